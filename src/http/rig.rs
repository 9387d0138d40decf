//! Model servers of tests, over real sockets: what each does is written out.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use super::tests::PATIENCE;
use super::*;
use crate::core::gate::Gate;
use crate::core::ids::{MeshId, ModelId, NodeId};
use crate::core::state::{Model, RoutingState, Weights};

/// One connection of a model server.
pub(super) struct Connection(pub(super) BufReader<TcpStream>);

impl Connection {
    /// The lines of the next request's head; none if there is none.
    pub(super) fn head(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line).unwrap_or(0) == 0 {
                return Vec::new();
            }
            match line.strip_suffix("\r\n").unwrap() {
                "" => return lines,
                line => lines.push(line.to_owned()),
            }
        }
    }

    pub(super) fn read(&mut self, bytes: usize) -> String {
        let mut read = vec![0; bytes];
        self.0.read_exact(&mut read).unwrap();
        String::from_utf8(read).unwrap()
    }

    /// The body that belongs to this head, by its length.
    pub(super) fn body(&mut self, head: &[String]) -> String {
        let length = head.iter().find_map(|line| line.to_lowercase().strip_prefix("content-length: ").map(str::to_owned));
        self.read(length.map_or(0, |length| length.parse().unwrap()))
    }

    /// Ends it as a process does that dies: what it has not read is lost, and whoever writes to it hears of that.
    pub(super) fn reset(self) {
        rustix::net::sockopt::set_socket_linger(self.0.get_ref(), Some(Duration::ZERO)).unwrap();
    }

    pub(super) fn say(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.get_mut().write_all(bytes.as_ref()).unwrap();
    }

    /// Answers the next requests with what is read of their heads' content length.
    pub(super) fn echo(&mut self) {
        loop {
            let head = self.head();
            if head.is_empty() {
                return;
            }
            let body = self.body(&head);
            self.say(ok(&body));
        }
    }
}

pub(super) fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

/// A model server: what it does on each of its connections, and how many there were.
pub(super) struct Server {
    pub(super) address: String,
    pub(super) connections: Arc<AtomicUsize>,
}

impl Server {
    pub(super) fn start(serve: impl Fn(Connection) + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (connections, serve) = (Arc::<AtomicUsize>::default(), Arc::new(serve));
        let counted = Arc::clone(&connections);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                stream.set_nodelay(true).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                counted.fetch_add(1, SeqCst);
                let serve = Arc::clone(&serve);
                std::thread::spawn(move || serve(Connection(BufReader::new(stream))));
            }
        });
        Server { address, connections }
    }

    /// One that tells the head and the body of each prediction that it gets.
    pub(super) fn telling() -> (Server, mpsc::Receiver<(Vec<String>, String)>) {
        let (tell, told) = mpsc::channel();
        let server = Server::start(move |mut connection| {
            loop {
                let head = connection.head();
                let Some(first) = head.first() else { return };
                if first.starts_with("POST") {
                    let body = connection.body(&head);
                    let _ = tell.send((head, body));
                }
                connection.say(ok("hi"));
            }
        });
        (server, told)
    }

    /// One that answers each request with these bytes.
    pub(super) fn saying(answer: impl Into<Vec<u8>>) -> Server {
        let answer = answer.into();
        Server::start(move |mut connection| {
            while !connection.head().is_empty() {
                connection.say(&answer);
            }
        })
    }
}

/// An address that nobody listens on.
pub(super) fn nobody() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

pub(super) fn write_model(dir: &Path, id: &str, http: &str, more: &str) {
    std::fs::write(dir.join(format!("{id}.json")), format!(r#"{{"http": {http}{more}}}"#)).unwrap();
}

pub(super) fn state(version: u64, canary: Option<(&str, u16)>) -> RoutingState {
    let route = RouteName::new("default").unwrap();
    let routes = [(route.clone(), (ModelId::new("m").unwrap(), Gate::default()))];
    let mut state = RoutingState::genesis(&MeshId::new("test").unwrap(), [NodeId::new("node-a").unwrap()], routes.into());
    state.version = version;
    let of_route = state.routes.get_mut(&route).unwrap();
    if let Some((id, weight)) = canary {
        of_route.canary = Some(Model { id: ModelId::new(id).unwrap(), digest: None });
        of_route.weights = Weights::with_canary(weight).unwrap();
    }
    state
}
