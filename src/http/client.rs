//! Asks nodes over HTTP/1.1, for the command line and for a node that joins: one kept connection to each, a bound on every wait, and
//! errors that tell what is known of the request's fate.

use std::fmt;
use std::future::Future;
use std::str::FromStr;
use std::time::Duration;

use async_std::net::TcpStream;
use async_std::{future, task};
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, HeaderMap};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use serde::Serialize;
use serde::de::DeserializeOwned;
use smol_hyper::rt::FuturesIo;

use crate::api::ErrorBody;
use crate::core::ids::NodeId;

/// Longest wait for a connection, in milliseconds; `--timeout` can only shorten it.
pub const CONNECT_TIMEOUT_MS_MAX: u64 = 3_000;
/// Largest answer that is read, in bytes.
pub const ANSWER_BYTES_MAX: usize = 64 << 20;
/// How often a connection is opened or used for one request that no connection took.
const SENDS_MAX: usize = 4;
/// How much of a strange answer is shown, in characters.
const BEGINNING_CHARS_MAX: usize = 160;

/// A node's data address: `host:port`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Endpoint(String);

impl Endpoint {
    /// `host:port`, as the sockets and the Host header want it.
    pub fn authority(&self) -> &str {
        &self.0
    }
}

impl FromStr for Endpoint {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with("https://") {
            return Err(format!("{text:?} asks for TLS, which the nodes do not speak; write http:// or just host:port"));
        }
        let address = text.strip_prefix("http://").unwrap_or(text);
        let address = address.strip_suffix('/').unwrap_or(address);
        let wrong = || format!("{text:?} is not a node's data address, such as 127.0.0.1:50051 or http://127.0.0.1:50051");
        let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
        let host_fits = !host.is_empty() && host.parse::<http::uri::Authority>().is_ok() && !host.contains('@');
        match port.parse::<u16>() {
            Ok(1..) if host_fits => Ok(Endpoint(address.to_owned())),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// A node to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its id, where peers.json told it.
    pub node: Option<NodeId>,
    /// Where it is.
    pub endpoint: Endpoint,
}

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its head.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
}

/// A question that got no proper answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nothing was sent.
    #[error("{endpoint}: {why}")]
    NoConnection {
        /// Who was asked.
        endpoint: Endpoint,
        /// What the system said.
        why: String,
    },
    /// It was sent, or part of it, and the connection broke before the answer was whole.
    #[error("{endpoint} broke the connection before it had answered: {why}")]
    Lost {
        /// Who was asked.
        endpoint: Endpoint,
        /// What happened.
        why: String,
    },
    /// It was sent, or part of it, and time is up.
    #[error("{endpoint} has not answered within {within:?}")]
    TimedOut {
        /// Who was asked.
        endpoint: Endpoint,
        /// The time there was.
        within: Duration,
    },
    /// An answer that no node gives.
    #[error("{endpoint} answered {status} with something that is not a canary-mesh node's: {beginning:?}")]
    Strange {
        /// Who was asked.
        endpoint: Endpoint,
        /// The answer's status.
        status: StatusCode,
        /// How it begins.
        beginning: String,
    },
    /// The node refused, and says why.
    #[error("{}", body.message)]
    Refused {
        /// The answer's status.
        status: StatusCode,
        /// Why.
        body: ErrorBody,
    },
}

/// One node, and the connection to it once there is one.
pub struct Client {
    /// Who is asked.
    pub target: Target,
    /// The longest wait for a whole answer.
    pub timeout: Duration,
    connection: Option<SendRequest<Full<Bytes>>>,
}

impl Client {
    /// Connects when it is first asked.
    pub fn new(target: Target, timeout: Duration) -> Client {
        Client { target, timeout, connection: None }
    }

    fn endpoint(&self) -> Endpoint {
        self.target.endpoint.clone()
    }

    /// Asks for a resource.
    pub async fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, CallError> {
        let answer = self.send(Method::GET, path, Bytes::new()).await?;
        self.read(&answer, answer.status.is_success())
    }

    /// Sends a document. The answer's status is the caller's to judge.
    pub async fn post(&mut self, path: &str, document: &impl Serialize) -> Result<Answer, CallError> {
        #[expect(clippy::expect_used, reason = "the documents of api.rs have text for keys and no number that JSON lacks")]
        let body = serde_json::to_vec(document).expect("a document of api.rs");
        self.send(Method::POST, path, body.into()).await
    }

    /// Reads an answer as `T` if it should be one, else as the reason why not.
    pub fn read<T: DeserializeOwned>(&self, answer: &Answer, wanted: bool) -> Result<T, CallError> {
        let Answer { status, body, .. } = answer;
        if wanted && let Ok(document) = serde_json::from_slice(body) {
            return Ok(document);
        }
        match serde_json::from_slice(body) {
            Ok(body) if !wanted => Err(CallError::Refused { status: *status, body }),
            _ => {
                let beginning = String::from_utf8_lossy(body).chars().take(BEGINNING_CHARS_MAX).collect();
                Err(CallError::Strange { endpoint: self.endpoint(), status: *status, beginning })
            }
        }
    }

    /// Sends one request and reads the whole answer. A request that a dead kept connection never took is sent again on a new one;
    /// one that may have been taken is not.
    pub async fn send(&mut self, method: Method, path: &str, body: Bytes) -> Result<Answer, CallError> {
        if !self.connected().await {
            self.connect().await?;
        }
        let (timeout, endpoint) = (self.timeout, self.endpoint());
        let timed_out = CallError::TimedOut { endpoint, within: timeout };
        within(timeout, self.exchange(method, path, body)).await.unwrap_or(Err(timed_out))
    }

    async fn connected(&mut self) -> bool {
        match &mut self.connection {
            Some(connection) => connection.ready().await.is_ok(),
            None => false,
        }
    }

    /// Opens a connection, and drops the one there was.
    pub async fn connect(&mut self) -> Result<(), CallError> {
        let no_connection = |why: String| CallError::NoConnection { endpoint: self.endpoint(), why };
        let limit = self.timeout.min(Duration::from_millis(CONNECT_TIMEOUT_MS_MAX));
        let dialled = within(limit, TcpStream::connect(self.target.endpoint.authority())).await;
        let stream = dialled.ok_or_else(|| no_connection(format!("no connection within {limit:?}")))?;
        let stream = stream.and_then(|stream| stream.set_nodelay(true).map(|()| stream));
        let stream = stream.map_err(|error| no_connection(innermost(&error)))?;
        let (sender, connection) = http1::handshake(FuturesIo::new(stream)).await.map_err(|error| no_connection(error.to_string()))?;
        task::spawn(connection);
        self.connection = Some(sender);
        Ok(())
    }

    /// Sends one request and gives back the answer as soon as its head is there, for whoever reads only the beginning of a body. The wait is
    /// the caller's to bound, and the connection is not kept.
    pub async fn ask(&mut self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, CallError> {
        self.head(method, path, body).await.map(|(response, _)| response)
    }

    async fn exchange(&mut self, method: Method, path: &str, body: Bytes) -> Result<Answer, CallError> {
        let (response, connection) = self.head(method, path, body).await?;
        let (head, body) = response.into_parts();
        let lost = |error: Box<dyn std::error::Error + Send + Sync>| CallError::Lost { endpoint: self.endpoint(), why: error.to_string() };
        let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await.map_err(lost)?;
        self.connection = Some(connection);
        Ok(Answer { status: head.status, headers: head.headers, body: body.to_bytes() })
    }

    /// Each turn either connects or sends.
    async fn head(&mut self, method: Method, path: &str, body: Bytes) -> Result<(Response<Incoming>, SendRequest<Full<Bytes>>), CallError> {
        let endpoint = self.endpoint();
        let lost = |why: String| CallError::Lost { endpoint: endpoint.clone(), why };
        let mut request = Request::builder().method(method).uri(path).header(HOST, endpoint.authority());
        if !body.is_empty() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        let mut request = request.body(Full::new(body)).map_err(|error| lost(error.to_string()))?;
        for _ in 0..SENDS_MAX {
            // Taken out, so that a request given up half-way leaves no connection with a stray answer in it.
            let Some(mut connection) = self.connection.take() else {
                self.connect().await?;
                continue;
            };
            match connection.try_send_request(request).await {
                Ok(response) => return Ok((response, connection)),
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(lost(error.into_error().to_string())),
                },
            }
        }
        Err(CallError::NoConnection { endpoint, why: "it closes every connection before it takes a request".into() })
    }
}

/// The future's value, or `None` if it takes longer.
pub async fn within<T>(limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    future::timeout(limit, future).await.ok()
}

/// The system's own words; async-std wraps them in others that say the same.
fn innermost(error: &std::io::Error) -> String {
    let mut inner: &dyn std::error::Error = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex};

    use async_std::io::WriteExt;
    use async_std::net::TcpListener;
    use futures::{AsyncReadExt, StreamExt};

    use super::*;
    use crate::cli::testing::{Fake, Reply, answer, nobody, refusal};

    fn client(address: &str) -> Client {
        Client::new(Target { node: None, endpoint: address.parse().unwrap() }, Duration::from_secs(10))
    }

    /// A server that answers one request on each connection and then closes it without a word.
    async fn closing() -> (String, Arc<AtomicUsize>, Arc<Mutex<usize>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (connections, closed) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(0)));
        let (counted, marked) = (connections.clone(), closed.clone());
        task::spawn(async move {
            let mut incoming = listener.incoming();
            while let Some(Ok(mut stream)) = incoming.next().await {
                counted.fetch_add(1, Ordering::Relaxed);
                let mut request = [0; 4_096];
                let _ = stream.read(&mut request).await;
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n7").await;
                drop(stream);
                *marked.lock().unwrap() += 1;
            }
        });
        (address, connections, closed)
    }

    #[test]
    fn an_address_is_host_and_port_with_or_without_http() {
        for text in ["127.0.0.1:50051", "http://127.0.0.1:50051", "http://127.0.0.1:50051/"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().authority(), "127.0.0.1:50051");
        }
        assert_eq!("[::1]:80".parse::<Endpoint>().unwrap().authority(), "[::1]:80");
        for wrong in ["", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:70000", ":80", "http://a:80/x", "https://a:80", "a b:80", "u@a:80"] {
            assert!(wrong.parse::<Endpoint>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_kept_connection_is_used_again_and_a_dead_one_is_replaced() {
        task::block_on(async {
            let (address, connections, closed) = closing().await;
            let mut client = client(&address);
            for asked in 1..=3 {
                assert_eq!(client.get::<u64>("/").await.unwrap(), 7);
                while *closed.lock().unwrap() < asked {
                    task::yield_now().await;
                }
            }
            assert_eq!(connections.load(Ordering::Relaxed), 3);
        });
    }

    #[test]
    fn what_became_of_a_request_is_told_apart() {
        task::block_on(async {
            let none = client(&nobody()).get::<u64>("/").await.unwrap_err();
            assert!(matches!(none, CallError::NoConnection { .. }), "{none}");
            let broken = client(&Fake::start(|_, _, _| Reply::Break).address).get::<u64>("/").await.unwrap_err();
            assert!(matches!(broken, CallError::Lost { .. }), "{broken}");
            let silent = Fake::start(|_, _, _| Reply::Hang);
            let mut asking = client(&silent.address);
            asking.timeout = Duration::from_millis(100);
            let silent = asking.get::<u64>("/").await.unwrap_err();
            assert!(
                matches!(silent, CallError::TimedOut { .. }) && silent.to_string().ends_with("has not answered within 100ms"),
                "{silent}"
            );
            let strange = client(&Fake::start(|_, _, _| answer(200, &"seven")).address).get::<u64>("/").await.unwrap_err();
            assert!(matches!(strange, CallError::Strange { .. }), "{strange}");
            let refused =
                client(&Fake::start(|_, _, _| refusal(503, "not_ready", "catching up")).address).get::<u64>("/").await.unwrap_err();
            assert!(matches!(refused, CallError::Refused { status: StatusCode::SERVICE_UNAVAILABLE, .. }), "{refused}");
            assert_eq!(refused.to_string(), "catching up");
        });
    }

    #[test]
    fn an_answer_that_came_too_late_is_not_taken_for_the_next_one() {
        task::block_on(async {
            let calls = AtomicUsize::new(0);
            let node = Fake::start(move |_, _, _| match calls.fetch_add(1, Ordering::Relaxed) {
                0 => Reply::Hang,
                call => answer(200, &call),
            });
            let mut asking = client(&node.address);
            asking.timeout = Duration::from_millis(100);
            assert!(matches!(asking.get::<usize>("/").await, Err(CallError::TimedOut { .. })));
            asking.timeout = Duration::from_secs(10);
            assert_eq!(asking.get::<usize>("/").await.unwrap(), 1);
        });
    }
}
