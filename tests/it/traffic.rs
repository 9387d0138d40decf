//! Callers who do nothing but ask for predictions, and remember every answer.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::mesh::{Answer, Mesh, PATIENCE, connect, requests};

/// From one request of a caller to its next. Without a break they would leave two cores nothing for the nodes' heartbeats.
const BREAK: Duration = Duration::from_millis(1);

/// One answer, or that there was none.
#[derive(Debug)]
pub struct Seen {
    /// The place of the node that was asked.
    pub node: usize,
    pub sent: Instant,
    pub answered: Instant,
    /// `None`: the connection was refused or broke.
    pub status: Option<u16>,
    pub variant: String,
    pub model: String,
    pub reason: String,
}

impl Seen {
    pub fn is_canary(&self) -> bool {
        self.variant == "canary"
    }
}

/// One connection, kept as long as the node keeps it.
pub struct Caller {
    port: u16,
    stream: Option<BufReader<TcpStream>>,
}

impl Caller {
    pub fn new(port: u16) -> Caller {
        Caller { port, stream: None }
    }

    pub fn post(&mut self, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Option<Answer> {
        let answer = self.asked(path, headers, body);
        if answer.is_none() {
            self.stream = None;
        }
        answer
    }

    fn asked(&mut self, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Option<Answer> {
        if self.stream.is_none() {
            let stream = connect(PATIENCE, self.port)?;
            stream.set_nodelay(true).ok()?;
            self.stream = Some(BufReader::new(stream));
        }
        let stream = self.stream.as_mut()?;
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let head = format!("POST {path} HTTP/1.1\r\nhost: test\r\n{headers}content-length: {}\r\n\r\n", body.len());
        stream.get_mut().write_all(&[head.as_bytes(), body].concat()).ok()?;
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if stream.read_line(&mut head).ok()? == 0 {
                return None;
            }
        }
        let status = head.split_whitespace().nth(1)?.parse().ok()?;
        let mut answer = Answer { status, head, body: Vec::new() };
        let length = answer.header("content-length")?.parse().ok()?;
        answer.body.resize(length, 0);
        stream.read_exact(&mut answer.body).ok()?;
        Some(answer)
    }
}

/// One caller for each of some nodes, until it is ended.
pub struct Traffic {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<Seen>>>,
    callers: Vec<JoinHandle<()>>,
}

impl Traffic {
    /// To all nodes.
    pub fn begin(mesh: &Mesh) -> Traffic {
        let all: Vec<_> = (0..mesh.nodes.len()).collect();
        Traffic::to(mesh, &all)
    }

    pub fn to(mesh: &Mesh, nodes: &[usize]) -> Traffic {
        let (stop, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let bodies: Arc<Vec<String>> = Arc::new(requests().iter().map(|line| line["request"].to_string()).collect());
        let callers = nodes.iter().map(|node| {
            let (node, port, stop, seen, bodies) = (*node, mesh.nodes[*node].data, stop.clone(), seen.clone(), bodies.clone());
            std::thread::spawn(move || {
                let mut caller = Caller::new(port);
                for body in bodies.iter().cycle().take_while(|_| !stop.load(Ordering::Relaxed)) {
                    let sent = Instant::now();
                    let answer = caller.post("/predict", &[], body.as_bytes());
                    let header = |name| answer.as_ref().and_then(|answer| answer.header(name)).unwrap_or_default().to_owned();
                    let one = Seen {
                        node,
                        sent,
                        answered: Instant::now(),
                        status: answer.as_ref().map(|answer| answer.status),
                        variant: header("x-canary-variant"),
                        model: header("x-canary-model"),
                        reason: header("x-canary-reason"),
                    };
                    // Nobody who holds the lock fails.
                    seen.lock().unwrap_or_else(PoisonError::into_inner).push(one);
                    std::thread::sleep(BREAK);
                }
            })
        });
        let callers = callers.collect();
        Traffic { stop, seen, callers }
    }

    /// How many of the answers so far are like this.
    pub fn count(&self, like: impl Fn(&Seen) -> bool) -> usize {
        self.seen.lock().unwrap().iter().filter(|seen| like(seen)).count()
    }

    /// Every answer, in the order in which they came.
    pub fn end(mut self) -> Vec<Seen> {
        self.stop();
        std::mem::take(&mut *self.seen.lock().unwrap())
    }

    fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for caller in self.callers.drain(..) {
            // One that has failed has said so.
            let _ = caller.join();
        }
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.stop();
    }
}
