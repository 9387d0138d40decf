//! A whole conversation over real sockets, for the fuzzer: a caller, the front, and a model server that is on the same thread.
//!
//! What the fuzzer invents is a caller's bytes, how a model server answers, and for some conversations the bytes of its answer. What must
//! hold, whatever they are: the model server gets the requests that were sent, in their order, with the bodies that they had; each of
//! them is framed in one way; what the caller gets is a row of answers that are framed in one way, no more than it asked for, each with the body
//! that belongs to its request.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use async_std::task::block_on;
use futures::FutureExt as _;
use futures::channel::oneshot;

use super::fakes::Fake;
use super::front::Target;
use super::fuzz::{Request, limits, parts};
use super::{Front, connection};
use crate::core::gate::Gate;
use crate::core::ids::{MeshId, ModelId, NodeId, RouteName, Time};
use crate::core::state::RoutingState;
use crate::eventloop;
use crate::gateway::Gateway;

/// Turns of the loop in which nobody sends anything, after which nobody will.
const QUIET_TURNS: u32 = 12;
/// Pieces in which a caller sends at most, so that long inputs are not slow ones.
const PIECES_MAX: usize = 64;

/// How the model server answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Answers {
    /// With the request's own body and its length.
    Length,
    /// The same in chunks, with a trailer.
    Chunks,
    /// The same up to the end of the connection.
    UntilClose,
    /// With an error, as soon as the head is there.
    Early,
    /// With half of what it announced.
    Broken,
    /// With bytes of the fuzzer's.
    Invented,
}

/// The front, and where its model server listens. Made once: a conversation takes a fraction of a millisecond.
fn stage() -> &'static (Arc<Front>, TcpListener) {
    static STAGE: OnceLock<(Arc<Front>, TcpListener)> = OnceLock::new();
    STAGE.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("canary-mesh-conversation-{}", std::process::id()));
        let stage = set_up(&dir);
        // The model is loaded, and its file is not read again.
        let _ = std::fs::remove_dir_all(&dir);
        stage.unwrap_or_else(|error| panic!("the stage cannot be set: {error}"))
    })
}

fn set_up(dir: &Path) -> Result<(Arc<Front>, TcpListener), Box<dyn std::error::Error>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    std::fs::create_dir_all(dir)?;
    std::fs::write(dir.join("m.json"), format!(r#"{{"http": "http://{}"}}"#, listener.local_addr()?))?;
    let node = NodeId::new("node-a")?;
    let routes = [(RouteName::new("default")?, (ModelId::new("m")?, Gate::default()))];
    let state = RoutingState::genesis(&MeshId::new("fuzz")?, [node.clone()], routes.into());
    let gateway = Gateway::new(node, dir.to_owned());
    std::thread::scope(|scope| {
        // Whether it is ready is asked once. A server that hangs up does not know the question.
        scope.spawn(|| drop(listener.accept()));
        let models = state.routes.values().map(|route| &route.stable);
        models.map(|model| block_on(gateway.prepare(model))).collect::<Result<Vec<()>, String>>()
    })?;
    gateway.route(&state);
    gateway.lease(Time(u64::MAX));
    listener.set_nonblocking(true)?;
    Ok((Front::new(Arc::new(Fake::default()), Arc::new(gateway), limits()), listener))
}

/// One conversation: how the model server answers, in how large pieces the caller sends, how much of the rest is the caller's, the rest.
pub(crate) fn conversation(bytes: &[u8]) {
    let Some((&[how, piece, split], rest)) = bytes.split_first_chunk::<3>() else { return };
    let how = match how % 8 {
        1 => Answers::Chunks,
        2 => Answers::UntilClose,
        3 => Answers::Early,
        4 => Answers::Broken,
        5 | 6 => Answers::Invented,
        _ => Answers::Length,
    };
    let at = if how == Answers::Invented { rest.len() * usize::from(split) / 256 } else { rest.len() };
    let (asks, says) = rest.split_at(at);
    let (requests, _) = parts(asks, asks.len().max(1));
    let piece = usize::from(piece).max(asks.len() / PIECES_MAX).max(1);
    let (heard, told) = match eventloop::run(talk(how, asks, piece, says)) {
        Ok(both) => both,
        Err(error) => panic!("no event loop: {error}"),
    };

    let predictions = requests.iter().filter(|request| request.is_prediction());
    // The last may have come in part.
    let whole = heard.len() - usize::from(heard.last().is_some_and(Option::is_none));
    assert!(whole <= predictions.clone().count(), "more came than was sent");
    for (heard, sent) in heard.iter().zip(predictions.clone()) {
        let got = heard.as_ref().filter(|_| how != Answers::Early);
        assert!(got.is_none_or(|got| *got == sent.data), "{how:?}: {:?} came of {:?}", got, sent.data);
    }
    // What was invented may be a change of protocols, and then nothing has to be an answer.
    if how == Answers::Invented && requests.iter().any(|request| request.facts.upgrade) {
        return;
    }
    check_answers(how, &told, &requests);
}

/// Plays it. Gives what the model server heard, the body of each request or nothing if it was not complete, and what the caller was told.
async fn talk(how: Answers, asks: &[u8], piece: usize, says: &[u8]) -> (Vec<Option<Vec<u8>>>, Vec<u8>) {
    let (front, listener) = stage();
    let pair = UnixStream::pair().and_then(|(caller, theirs)| {
        caller.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        Ok((caller, theirs))
    });
    let (mut caller, theirs) = pair.unwrap_or_else(|error| panic!("no sockets: {error}"));
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = eventloop::spawn(connection(Arc::clone(front), theirs.into(), stopped.map(drop)));
    let (mut stop, mut servers, mut told, mut asks) = (Some(stop), Vec::<Server>::new(), Vec::new(), asks);
    let mut heard = Vec::new();
    let mut quiet = 0;
    loop {
        let mut moved = false;
        if let Ok((stream, _)) = listener.accept() {
            moved = true;
            if stream.set_nonblocking(true).is_ok() {
                servers.push(Server { stream: Some(stream), held: Vec::new(), answered: false });
            }
        }
        if let Ok(count) = caller.write(asks.get(..piece.min(asks.len())).unwrap_or_default())
            && count > 0
        {
            asks = asks.get(count..).unwrap_or_default();
            moved = true;
        }
        let ended = read(&mut caller, &mut told, &mut moved);
        for server in &mut servers {
            server.act(how, says, &mut heard, &mut moved);
        }
        quiet = if moved { 0 } else { quiet + 1 };
        if quiet > QUIET_TURNS || ended {
            // A connection that waits for another request ends now. One that waits for the rest of one is cut.
            if stop.take().is_none() || ended {
                break;
            }
            quiet = 0;
        }
        eventloop::yield_now().await;
    }
    drop(serving);
    (heard, told)
}

/// Reads what is there. Says whether the other side has ended.
fn read(stream: &mut impl Read, into: &mut Vec<u8>, moved: &mut bool) -> bool {
    let mut part = [0; 4096];
    match stream.read(&mut part) {
        Ok(0) => true,
        Ok(count) => {
            into.extend_from_slice(part.get(..count).unwrap_or_default());
            *moved = true;
            false
        }
        Err(error) => error.kind() != ErrorKind::WouldBlock,
    }
}

/// One connection of the model server.
struct Server {
    stream: Option<TcpStream>,
    held: Vec<u8>,
    /// The request that is coming has its answer.
    answered: bool,
}

impl Server {
    fn act(&mut self, how: Answers, says: &[u8], heard: &mut Vec<Option<Vec<u8>>>, moved: &mut bool) {
        let Some(stream) = &mut self.stream else { return };
        let ended = read(stream, &mut self.held, moved);
        while let Some(request) = Heard::read(&self.held) {
            if how == Answers::Early && !self.answered {
                self.answered = true;
                heard.push(request.body.clone().map(|(body, _)| body));
                self.say(b"HTTP/1.1 400 No\r\nContent-Length: 2\r\n\r\nno");
            }
            let Some((body, length)) = request.body else { break };
            self.held.drain(..length);
            if std::mem::take(&mut self.answered) {
                continue;
            }
            let answer = match how {
                Answers::Early => continue,
                Answers::Length => [format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes(), &body].concat(),
                Answers::Broken => {
                    [format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", 2 * body.len() + 1).as_bytes(), &body].concat()
                }
                Answers::UntilClose => [&b"HTTP/1.1 200 OK\r\n\r\n"[..], &body].concat(),
                Answers::Chunks => {
                    let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
                    let chunk = if body.is_empty() { String::new() } else { format!("{:x};a=b\r\n", body.len()) };
                    let end = if body.is_empty() { "0\r\n" } else { "\r\n0\r\nSum: 7\r\n" };
                    [head.as_bytes(), chunk.as_bytes(), &body, end.as_bytes(), b"\r\n"].concat()
                }
                Answers::Invented => says.to_vec(),
            };
            heard.push(Some(body));
            self.say(&answer);
            if matches!(how, Answers::Broken | Answers::UntilClose | Answers::Invented) {
                self.stream = None;
                return;
            }
        }
        if ended {
            if how != Answers::Early && Heard::read(&self.held).is_some() {
                heard.push(None);
            }
            self.stream = None;
        }
    }

    fn say(&mut self, bytes: &[u8]) {
        // An answer is short, and if nobody takes it that is seen by reading.
        let _ = self.stream.as_mut().map(|stream| stream.write_all(bytes));
    }
}

/// A request as a model server reads it that trusts nobody.
struct Heard {
    /// With the bytes that all of it took; `None` if not all of it is there.
    body: Option<(Vec<u8>, usize)>,
}

impl Heard {
    /// Nothing if its head is not there.
    fn read(held: &[u8]) -> Option<Heard> {
        let end = held.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
        let head = Head::read(held.get(..end)?);
        assert!(head.first.starts_with("POST /") || head.first.starts_with("GET /"), "{:?}", head.first);
        assert!(head.first.ends_with(" HTTP/1.1"), "{:?}", head.first);
        for name in ["host", "x-request-id", "x-forwarded-proto"] {
            assert_eq!(head.values(name).count(), 1, "{name}: {head:?}");
        }
        let rest = held.get(end..)?;
        let body = match head.framing() {
            Framing::Length(length) => rest.get(..length).map(|body| (body.to_vec(), end + length)),
            Framing::Chunks => unchunked(rest).map(|(body, used)| (body, end + used)),
            // An upgrade, which has no body.
            Framing::None => Some((Vec::new(), end)),
        };
        Some(Heard { body })
    }
}

/// A head as the plainest of readers has it.
#[derive(Debug)]
struct Head {
    first: String,
    lines: Vec<(String, String)>,
}

enum Framing {
    Length(usize),
    Chunks,
    None,
}

impl Head {
    fn read(bytes: &[u8]) -> Head {
        let text: String = bytes.iter().map(|byte| char::from(*byte)).collect();
        let mut lines = text.trim_end_matches("\r\n").split("\r\n");
        let first = lines.next().unwrap_or_default().to_owned();
        assert!(!text.replace("\r\n", "").contains(['\r', '\n', '\0']), "{text:?}");
        let field = |line: &str| match line.split_once(':') {
            Some((name, value)) => (name.to_ascii_lowercase(), value.trim_matches([' ', '\t']).to_owned()),
            None => panic!("no field: {line:?}"),
        };
        Head { first, lines: lines.map(field).collect() }
    }

    fn values<'h>(&'h self, name: &'h str) -> impl Iterator<Item = &'h str> {
        self.lines.iter().filter(move |(other, _)| other == name).map(|(_, value)| value.as_str())
    }

    fn framing(&self) -> Framing {
        let lengths: Vec<_> = self.values("content-length").collect();
        let codings: Vec<_> = self.values("transfer-encoding").collect();
        match (lengths.as_slice(), codings.as_slice()) {
            ([], []) => Framing::None,
            ([], ["chunked"]) => Framing::Chunks,
            ([length], []) if length.bytes().all(|byte| byte.is_ascii_digit()) => match length.parse() {
                Ok(length) => Framing::Length(length),
                Err(error) => panic!("no length: {length:?}: {error}"),
            },
            _ => panic!("framed in several ways: {self:?}"),
        }
    }
}

/// The data of a body in chunks as this node writes them, and the bytes that all of it takes; nothing if it is not complete.
fn unchunked(mut bytes: &[u8]) -> Option<(Vec<u8>, usize)> {
    let (mut data, all) = (Vec::new(), bytes.len());
    let line = |bytes: &[u8]| bytes.windows(2).position(|window| window == b"\r\n");
    loop {
        let end = line(bytes)?;
        let size = std::str::from_utf8(bytes.get(..end)?).ok().and_then(|size| usize::from_str_radix(size, 16).ok());
        let Some(size) = size else { panic!("no size of a chunk: {:?}", String::from_utf8_lossy(bytes)) };
        bytes = bytes.get(end + 2..)?;
        if size == 0 {
            // Trailers, up to an empty line.
            loop {
                let end = line(bytes)?;
                bytes = bytes.get(end + 2..)?;
                if end == 0 {
                    return Some((data, all - bytes.len()));
                }
            }
        }
        data.extend_from_slice(bytes.get(..size)?);
        assert!(bytes.get(size..size + 2)? == b"\r\n", "a chunk that does not end: {:?}", String::from_utf8_lossy(bytes));
        bytes = bytes.get(size + 2..)?;
    }
}

/// What a caller was told is a row of answers to what it asked, up to one that broke off.
fn check_answers(how: Answers, mut told: &[u8], requests: &[Request]) {
    let mut asked = requests.iter();
    while !told.is_empty() {
        let Some(end) = told.windows(4).position(|window| window == b"\r\n\r\n") else { return };
        let head = Head::read(told.get(..end + 4).unwrap_or_default());
        let rest = told.get(end + 4..).unwrap_or_default();
        assert!(head.first.starts_with("HTTP/1.1 "), "{head:?}");
        let status: u16 = head.first.get(9..12).and_then(|status| status.parse().ok()).unwrap_or_default();
        if status == 100 {
            told = rest;
            continue;
        }
        assert!((200..=599).contains(&status), "{head:?}");
        assert_eq!(head.values("x-request-id").count(), 1, "{head:?}");
        let request = asked.next();
        let closes = head.values("connection").any(|word| word == "close");
        assert!(request.is_some() || (status >= 400 && closes), "nobody asked for this: {head:?}");
        let head_only = request.is_some_and(|request| request.method == "HEAD");
        let body = match head.framing() {
            _ if head_only || status == 204 || status == 304 => Some((Vec::new(), 0)),
            Framing::Length(length) => rest.get(..length).map(|body| (body.to_vec(), length)),
            Framing::Chunks => unchunked(rest),
            Framing::None => Some((rest.to_vec(), rest.len())),
        };
        let Some((body, used)) = body else { return };
        if let (200, Some(request)) = (status, request.filter(|request| request.is_prediction()))
            && !matches!(how, Answers::Invented | Answers::Broken)
        {
            assert_eq!(body, request.data, "{how:?}: another one's answer");
        }
        told = rest.get(used..).unwrap_or_default();
        assert!(request.is_some() || told.is_empty(), "more after the end: {:?}", String::from_utf8_lossy(told));
    }
}

impl Request {
    /// Whether it is passed on to the model server.
    fn is_prediction(&self) -> bool {
        let path = self.target.split('?').next().unwrap_or_default();
        let known = Target::route_of(path) == Some("default");
        let upgrade = self.method == "GET" && self.facts.upgrade && self.data.is_empty();
        known && (self.method == "POST" || upgrade)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sound_conversation_is_heard_and_answered() {
        let asks = b"POST /predict HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello\
            POST /predict HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n";
        for how in [Answers::Length, Answers::Chunks, Answers::UntilClose, Answers::Early] {
            for piece in [1, 9, asks.len()] {
                if how == Answers::Early && piece < asks.len() {
                    // Whoever is told of an error before it has sent all of a request need not go on.
                    continue;
                }
                let (heard, told) = eventloop::run(talk(how, asks, piece, b"")).unwrap();
                assert_eq!(heard.len(), 2, "{how:?}, {piece}: {heard:?}");
                let told = String::from_utf8_lossy(&told);
                let (status, words) = if how == Answers::Early { ("400 No", ["no", "no"]) } else { ("200 OK", ["hello", "hi"]) };
                assert_eq!(told.matches(&format!("HTTP/1.1 {status}\r\n")).count(), 2, "{how:?}, {piece}: {told}");
                assert!(words.iter().all(|word| told.contains(word)), "{how:?}, {piece}: {told}");
            }
        }
        let says = b"HTTP/1.1 299 Fine\r\nContent-Length: 1\r\n\r\n!";
        let (_, told) = eventloop::run(talk(Answers::Invented, asks, 9, says)).unwrap();
        assert!(String::from_utf8_lossy(&told).contains("HTTP/1.1 299 Fine\r\n"));
    }
}
