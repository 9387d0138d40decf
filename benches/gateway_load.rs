//! The two ends of a measurement that wrk and nginx are not: `scripts/bench_gateway.sh` builds and runs them.
//!
//! - `gateway_load paced PORT CONNECTIONS RATE SECONDS FILE`: requests at a steady rate, whether or not answers keep up. They begin at
//!   random moments (a Poisson process, always the same one), on whichever connection is free; a latency counts from the moment at which the
//!   request was due, so a request that had to wait for a connection counts its wait. Prints one JSON object. The bodies are FILE's lines.
//! - `gateway_load tokens PORT TOKENS GAP_US`: a model server that answers each POST with TOKENS server-sent events, one every GAP_US,
//!   each written by itself. `GET /count` says how many POSTs there were.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    reason = "a benchmark that fails says where, and prints its figures"
)]

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use rustix::time::{timerfd_create, timerfd_settime};

/// Keys that requests are sent under, by turns.
const KEYS: usize = 1_000;
/// Longest wait for the last answers after the load's end, in seconds.
const DRAIN_S_MAX: u64 = 10;
/// The timer's name among the events.
const TIMER: u64 = u64::MAX;
/// The listener's.
const LISTENER: u64 = u64::MAX - 1;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["paced", port, connections, rate, seconds, file] => {
            let bodies = std::fs::read_to_string(file).unwrap();
            let bodies: Vec<&str> = bodies.lines().collect();
            let seconds = Duration::from_secs(seconds.parse().unwrap());
            paced(port.parse().unwrap(), connections.parse().unwrap(), rate.parse().unwrap(), seconds, &bodies);
        }
        ["tokens", port, tokens, gap_us] => {
            tokens_server(port.parse().unwrap(), tokens.parse().unwrap(), Duration::from_micros(gap_us.parse().unwrap()));
        }
        _ => println!("gateway_load is run by scripts/bench_gateway.sh"),
    }
}

/// Waits for sockets and for one moment.
struct Events {
    epoll: OwnedFd,
    timer: OwnedFd,
    ready: Vec<epoll::Event>,
}

impl Events {
    fn new() -> Events {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        // Finer than epoll's own time limit, which may come 50 µs late.
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC).unwrap();
        epoll::add(&epoll, &timer, EventData::new_u64(TIMER), EventFlags::IN | EventFlags::ET).unwrap();
        Events { epoll, timer, ready: Vec::with_capacity(256) }
    }

    fn add(&self, source: impl AsFd, name: u64) {
        epoll::add(&self.epoll, source, EventData::new_u64(name), EventFlags::IN).unwrap();
    }

    /// The sockets that can be read, or none if `until` comes before.
    fn wait(&mut self, until: Option<Instant>) -> Vec<u64> {
        if let Some(until) = until {
            // Zero would switch it off.
            let left = until.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
            let it_value = Timespec { tv_sec: left.as_secs().try_into().unwrap(), tv_nsec: left.subsec_nanos().into() };
            let spec = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
            timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec).unwrap();
        }
        self.ready.clear();
        match epoll::wait(&self.epoll, spare_capacity(&mut self.ready), None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => panic!("epoll: {error}"),
        }
        self.ready.iter().map(|event| event.data.u64()).filter(|name| *name != TIMER).collect()
    }
}

/// One connection of the load, and the request on it.
struct Line {
    stream: TcpStream,
    due: Instant,
    read: Vec<u8>,
}

fn paced(port: u16, connections: usize, rate: f64, time: Duration, bodies: &[&str]) {
    let mut events = Events::new();
    let request = |key: usize| {
        let body = bodies[key % bodies.len()];
        let head = "POST /predict HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n";
        format!("{head}x-canary-key: user-{key}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
    };
    let requests: Vec<Vec<u8>> = (0..KEYS).map(request).collect();
    let connect = |name: usize| {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_nonblocking(true).unwrap();
        events.add(&stream, name as u64);
        Line { stream, due: Instant::now(), read: Vec::new() }
    };
    let mut lines: Vec<Line> = (0..connections).map(connect).collect();
    let mut free: VecDeque<usize> = (0..connections).collect();
    let (mut waiting, mut sent, mut unsent) = (VecDeque::new(), 0, 0);
    let mut latencies = Histogram::<u64>::new_with_bounds(1, 60_000_000, 3).unwrap();
    let mut late = latencies.clone();
    let mut random = fastrand::Rng::with_seed(1);
    let mut pause = || Duration::from_secs_f64(-(1.0 - random.f64()).ln() / rate);
    let begun = Instant::now();
    let end = begun + time;
    let mut next = begun + pause();
    loop {
        let now = Instant::now();
        while next <= now.min(end) {
            late.saturating_record(micros(now - next));
            waiting.push_back(next);
            next += pause();
        }
        while !waiting.is_empty() && !free.is_empty() {
            let (Some(due), Some(name)) = (waiting.pop_front(), free.pop_front()) else { break };
            let line = &mut lines[name];
            line.due = due;
            // A free connection has an empty buffer, and requests are small.
            let bytes = &requests[sent % KEYS];
            assert_eq!(line.stream.write(bytes).unwrap(), bytes.len(), "a request did not fit into a socket's buffer");
            sent += 1;
        }
        let over = next > end;
        if over {
            // More than was kept up with: not sent any more, and as late as it is by now at the least.
            for due in waiting.drain(..) {
                latencies.saturating_record(micros(now - due));
                unsent += 1;
            }
            if free.len() == connections {
                break;
            }
        }
        assert!(
            now < end + Duration::from_secs(DRAIN_S_MAX),
            "{} requests are unanswered {DRAIN_S_MAX} s after the end",
            connections - free.len()
        );
        for name in events.wait(Some(if over { end + Duration::from_secs(DRAIN_S_MAX) } else { next })) {
            let name = usize::try_from(name).unwrap();
            let line = &mut lines[name];
            if line.is_answered() {
                latencies.saturating_record(micros(line.due.elapsed()));
                free.push_back(name);
            }
        }
    }
    let at = |q| latencies.value_at_quantile(q);
    println!(
        r#"{{"requests": {sent}, "us": {}, "p50_us": {}, "p99_us": {}, "p999_us": {}, "max_us": {}, "load_late_p99_us": {}, "unsent": {unsent}}}"#,
        micros(begun.elapsed()),
        at(0.5),
        at(0.99),
        at(0.999),
        latencies.max(),
        late.value_at_quantile(0.99)
    );
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap()
}

impl Line {
    /// Reads what is there. True once, when the answer is complete.
    fn is_answered(&mut self) -> bool {
        let mut part = [0; 16_384];
        let length = match self.stream.read(&mut part) {
            Ok(0) => panic!("a connection was closed"),
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
            Err(error) => panic!("a connection broke: {error}"),
        };
        self.read.extend_from_slice(&part[..length]);
        let Some(head) = head_of(&self.read) else { return false };
        assert!(head.starts_with("HTTP/1.1 200 "), "this is not the answer that was asked for: {head}");
        let body: usize = field(&head, "content-length").unwrap_or_else(|| panic!("an answer without a length: {head}")).parse().unwrap();
        let complete = self.read.len() >= head.len() + body;
        if complete {
            self.read.clear();
        }
        complete
    }
}

/// A message's head with its empty line, if it is there.
fn head_of(bytes: &[u8]) -> Option<String> {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
    Some(String::from_utf8_lossy(&bytes[..end + 4]).into_owned())
}

fn field<'h>(head: &'h str, name: &str) -> Option<&'h str> {
    let mut fields = head.lines().filter_map(|line| line.split_once(':'));
    fields.find(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
}

/// A connection of the model server.
struct Caller {
    stream: TcpStream,
    read: Vec<u8>,
    /// Tokens that are still to come.
    left: usize,
}

fn tokens_server(port: u16, tokens: usize, gap: Duration) {
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut events = Events::new();
    events.add(&listener, LISTENER);
    let mut callers: HashMap<u64, Caller> = HashMap::new();
    let mut due: BinaryHeap<Reverse<(Instant, u64)>> = BinaryHeap::new();
    let (mut named, mut posts) = (0, 0_u64);
    loop {
        let now = Instant::now();
        while let Some(Reverse((moment, name))) = due.peek().copied().filter(|Reverse((moment, _))| *moment <= now) {
            due.pop();
            // Whoever went away in the middle is not written to.
            let Some(caller) = callers.get_mut(&name) else { continue };
            if caller.write_token(tokens).is_err() {
                callers.remove(&name);
            } else if caller.left > 0 {
                due.push(Reverse((moment + gap, name)));
            }
        }
        for name in events.wait(due.peek().map(|Reverse((moment, _))| *moment)) {
            if name == LISTENER {
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nonblocking(true).unwrap();
                    stream.set_nodelay(true).unwrap();
                    events.add(&stream, named);
                    callers.insert(named, Caller { stream, read: Vec::new(), left: 0 });
                    named += 1;
                }
                continue;
            }
            let Some(caller) = callers.get_mut(&name) else { continue };
            match caller.read_request() {
                Ok(None) => {}
                Ok(Some(head)) if head.starts_with("POST ") => {
                    posts += 1;
                    caller.left = tokens;
                    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
                    if caller.write(head).is_err() {
                        callers.remove(&name);
                        continue;
                    }
                    due.push(Reverse((Instant::now() + gap, name)));
                }
                Ok(Some(_)) => {
                    let count = posts.to_string();
                    if caller.write(&format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{count}", count.len())).is_err() {
                        callers.remove(&name);
                    }
                }
                Err(_) => {
                    callers.remove(&name);
                }
            }
        }
    }
}

impl Caller {
    /// Reads what is there. The head of a request that is complete.
    fn read_request(&mut self) -> std::io::Result<Option<String>> {
        let mut part = [0; 16_384];
        let length = match self.stream.read(&mut part) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        };
        self.read.extend_from_slice(&part[..length]);
        let Some(head) = head_of(&self.read) else { return Ok(None) };
        let body = self.read.get(head.len()..).unwrap_or_default();
        let complete = match field(&head, "content-length") {
            Some(length) => body.len() >= length.parse().unwrap(),
            None if field(&head, "transfer-encoding").is_some() => body.ends_with(b"0\r\n\r\n"),
            None => true,
        };
        if complete {
            self.read.clear();
        }
        Ok(complete.then_some(head))
    }

    /// The next token; with the last one the stream's end.
    fn write_token(&mut self, tokens: usize) -> std::io::Result<()> {
        let event = format!("data: {{\"token\":\"word-{:02}\"}}\n\n", tokens - self.left);
        self.left -= 1;
        let end = if self.left == 0 { "0\r\n\r\n" } else { "" };
        self.write(&format!("{:x}\r\n{event}\r\n{end}", event.len()))
    }

    /// All at once: so little fits into a socket's buffer, unless nobody reads.
    fn write(&mut self, text: &str) -> std::io::Result<()> {
        match self.stream.write(text.as_bytes())? {
            length if length == text.len() => Ok(()),
            _ => Err(ErrorKind::WriteZero.into()),
        }
    }
}
