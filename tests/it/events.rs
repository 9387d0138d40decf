//! `GET /events` of real nodes: what happens is there as it happens, once, and across a broken connection.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::mesh::{Mesh, PATIENCE, connect, wait_for};

/// A caller of `GET /events`.
struct Stream {
    socket: BufReader<TcpStream>,
    /// What came of the body and was not read yet.
    text: String,
    /// What a browser would send as Last-Event-ID.
    last_id: String,
}

#[derive(Debug, PartialEq)]
struct Event {
    id: String,
    name: String,
    data: Value,
}

impl Stream {
    fn open(mesh: &Mesh, at: usize, query: &str, last_id: Option<&str>) -> Stream {
        let mut socket = connect(PATIENCE, mesh.nodes[at].data).unwrap();
        let header = last_id.map_or(String::new(), |id| format!("last-event-id: {id}\r\n"));
        socket.write_all(format!("GET /events{query} HTTP/1.1\r\nhost: test\r\n{header}\r\n").as_bytes()).unwrap();
        let mut stream = Stream { socket: BufReader::new(socket), text: String::new(), last_id: String::new() };
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert_ne!(stream.socket.read_line(&mut head).unwrap(), 0, "{head}");
        }
        assert!(head.starts_with("HTTP/1.1 200 ") && head.contains("content-type: text/event-stream\r\n"), "{head}");
        stream
    }

    /// The next frame that is an event; `None` at the end of the answer.
    fn next(&mut self) -> Option<Event> {
        loop {
            let Some((frame, rest)) = self.text.split_once("\n\n").map(|(frame, rest)| (frame.to_owned(), rest.to_owned())) else {
                let chunk = self.chunk()?;
                self.text += &chunk;
                continue;
            };
            self.text = rest;
            let field = |name: &str| frame.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            self.last_id = field("id").unwrap_or_else(|| panic!("a frame without an id: {frame}")).to_owned();
            if let (Some(name), Some(data)) = (field("event"), field("data")) {
                return Some(Event { id: self.last_id.clone(), name: name.to_owned(), data: serde_json::from_str(data).unwrap() });
            }
        }
    }

    fn chunk(&mut self) -> Option<String> {
        let mut size = String::new();
        self.socket.read_line(&mut size).unwrap();
        let size = usize::from_str_radix(size.trim_end(), 16).unwrap_or_else(|_| panic!("no size of a chunk: {size:?}"));
        let mut chunk = vec![0; size + 2];
        self.socket.read_exact(&mut chunk).unwrap();
        chunk.truncate(size);
        (size > 0).then(|| String::from_utf8(chunk).unwrap())
    }

    /// Everything up to the first event that is meant.
    fn until(&mut self, meant: impl Fn(&Event) -> bool) -> Vec<Event> {
        let start = Instant::now();
        let mut events = Vec::new();
        loop {
            assert!(start.elapsed() < PATIENCE, "waited in vain behind {events:?}");
            events.push(self.next().unwrap_or_else(|| panic!("the stream ended behind {events:?}")));
            if events.last().is_some_and(&meant) {
                return events;
            }
        }
    }
}

fn decided(slot: u64) -> impl Fn(&Event) -> bool {
    move |event| event.name == "decided" && event.data["slot"] == slot
}

/// The lines of the node's file, in order.
fn lines(mesh: &Mesh, at: usize) -> Vec<Value> {
    mesh.events_of(at).lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[test]
fn a_decision_is_told_as_it_happens_and_who_comes_back_gets_the_rest_without_a_gap_or_a_repeat() {
    let mesh = Mesh::started();
    // Begun on a node that does not coordinate: it is told of what all decide.
    let mut stream = Stream::open(&mesh, 1, "", None);
    assert_eq!(mesh.advance(0, "digits-v2", 10.0).unwrap().status, 200);
    let mut seen = stream.until(decided(1));
    let last = seen.last().unwrap();
    assert_eq!((&last.data["event"], &last.data["node"], &last.data["version"]), (&json!("decided"), &json!("node-b"), &json!(1)));
    let back_from = stream.last_id.clone();
    drop(stream);
    wait_for("the node to notice", || {
        let metrics = mesh.get(1, "/metrics").unwrap().body;
        String::from_utf8(metrics).unwrap().contains("canary_mesh_event_streams 0\n")
    });

    // What happens while nobody listens, and one more while somebody does again.
    assert_eq!(mesh.advance(0, "digits-v2", 20.0).unwrap().status, 200);
    let mut stream = Stream::open(&mesh, 1, "", Some(&back_from));
    assert_eq!(mesh.advance(2, "digits-v2", 30.0).unwrap().status, 200);
    seen.extend(stream.until(decided(3)));
    let numbers: Vec<u64> = seen.iter().map(|event| event.id.rsplit_once('-').unwrap().1.parse().unwrap()).collect();
    let first = numbers[0];
    assert_eq!(numbers, (first..first + seen.len() as u64).collect::<Vec<_>>(), "no gap and no repeat");
    let streamed: Vec<_> = seen.into_iter().map(|event| event.data).collect();
    wait_for("the same in the file", || lines(&mesh, 1).windows(streamed.len()).any(|lines| lines == streamed));

    let mut some = Stream::open(&mesh, 1, &format!("?event=decided&last_event_id={back_from}"), None);
    let slots: Vec<_> = some.until(decided(3)).into_iter().map(|event| event.data["slot"].clone()).collect();
    assert_eq!(slots, [2, 3]);
}

#[test]
fn a_stop_ends_the_streams_and_a_new_start_says_that_it_does_not_know_their_events() {
    let mut mesh = Mesh::started();
    let mut streams: Vec<_> = (0..3).map(|_| Stream::open(&mesh, 2, "", None)).collect();
    let asked = Instant::now();
    mesh.signal(2, Signal::TERM);
    for stream in &mut streams {
        stream.until(|event| event.name == "stopping");
        assert_eq!(stream.next(), None, "the answer is complete");
    }
    assert!(mesh.ended(2).success());
    assert!(asked.elapsed().as_secs() < 8, "draining would have waited 10 s for them: {:?}", asked.elapsed());

    mesh.start(2, &[]);
    mesh.wait_ready();
    let mut stream = Stream::open(&mesh, 2, "", Some(&streams[0].last_id));
    let events = stream.until(|event| event.name == "started");
    assert_eq!((events[0].name.as_str(), &events[0].data["missed"]), ("missed", &Value::Null));
    assert_eq!(events.last().unwrap().data["incarnation"], 2);
}
