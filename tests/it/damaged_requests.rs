//! Sound requests with a little damage, thousands of them, through a real node: a model server hears of nothing that could not be there.

use std::collections::BTreeMap;

use crate::mesh::{request, wait_for};
use crate::model_server::{Heard, ModelServer, Request};
use crate::wire::{Came, Wire};

const INPUTS: u64 = 3_000;

/// What damage is done to. `TAG` says which input it was.
const SOUND: [&str; 7] = [
    "GET /health HTTP/1.1\r\nHost: h\r\n\r\n",
    "POST /predict?TAG HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello",
    "POST /predict?TAG HTTP/1.0\r\nHost: h\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello",
    "POST /v2/models/default/infer?TAG HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\n\r\n",
    "POST /predict?TAG HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n05\r\nhello\r\n0\r\nT: t\r\n\r\n",
    "POST /predict?TAG HTTP/1.1\r\nHost: h\r\nContent-Length: 60\r\n\r\nPOST /predict?smuggled HTTP/1.1\r\nHost: h\r\nX-Pad: 0123456789\r\n\r\n",
    "POST /v1/models/default:predict?TAG HTTP/1.1\r\nHost: h\r\nX-Canary-Key: k\r\nContent-Length: 0\r\n\r\n",
];

/// Words that mean something to whoever reads a request.
const WORDS: [&str; 15] = [
    "\r",
    "\n",
    "\r\n",
    "\0",
    " ",
    "\t",
    ":",
    ",",
    "0",
    ";",
    "Content-Length: 3\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Connection: content-length\r\n",
    "HTTP/1.0",
    "\u{fffd}",
];

/// A number that damage does not make of another one.
fn tag(seed: u64) -> String {
    format!("{seed}-{:08x}", seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32)
}

fn tagged(text: &str) -> Option<u64> {
    let (seed, _) = text.split_once('-')?;
    let seed = seed.parse().ok()?;
    (text == tag(seed)).then_some(seed)
}

fn damage(stream: &mut Vec<u8>, random: &mut fastrand::Rng) {
    const STRETCH_BYTES_MAX: usize = 40;
    let (one, other) = (random.usize(..=stream.len()), random.usize(..=stream.len()));
    let from = one.min(other);
    let to = one.max(other).min(from + STRETCH_BYTES_MAX);
    match random.u8(..6) {
        0 => stream.truncate(to),
        1 => drop(stream.drain(from..to)),
        2 => {
            let stretch = stream[from..to].to_vec();
            stream.splice(one..one, stretch);
        }
        3 => stream[from..to].iter_mut().take(1).for_each(|byte| *byte ^= 1 << random.u8(..8)),
        4 => stream[from..to].iter_mut().take(1).for_each(|byte| *byte = random.u8(..)),
        _ => drop(stream.splice(one..one, random.choice(WORDS).unwrap().bytes())),
    }
}

fn input(seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut stream = Vec::new();
    for _ in 0..random.usize(1..=3) {
        stream.extend(random.choice(SOUND).unwrap().replace("TAG", &tag(seed)).bytes());
    }
    for _ in 0..random.usize(1..=4) {
        damage(&mut stream, &mut random);
    }
    stream
}

/// The most requests that there can be: every head ends with an empty line.
fn heads(stream: &[u8]) -> usize {
    stream.windows(2).filter(|two| two == b"\n\n").count() + stream.windows(3).filter(|three| three == b"\n\r\n").count()
}

#[test]
fn of_thousands_of_damaged_requests_a_model_server_hears_nothing_that_was_not_sent() {
    let server = ModelServer::named("server");
    let mesh = server.behind_a_node();
    let port = mesh.nodes[0].data;
    for seed in 0..INPUTS {
        let stream = input(seed);
        let mut wire = Wire::to(port);
        stream.chunks(1 << (seed % 8)).for_each(|piece| wire.send(piece));
        wire.end_sending();
        let mut answers = 0;
        let end = loop {
            match wire.answer() {
                Came::Answer(_) => answers += 1,
                end => break end,
            }
        };
        let shown = String::from_utf8_lossy(&stream);
        // Who has stopped sending is taken to have gone, so an answer that was under way may be cut.
        assert!(matches!(end, Came::End | Came::Broken(_)), "seed {seed}, {shown:?}: {end:?}");
        assert!(answers <= heads(&stream) + 1, "seed {seed}, {shown:?}: {answers} answers");
    }
    assert_eq!(request(port, "POST", "/predict?last", &[], b"last").unwrap().status, 200, "the node goes on");
    let mut heard = server.take();
    wait_for("the model server to hear the last one", || {
        heard.extend(server.take());
        heard.iter().any(|heard| matches!(heard, Heard::Request(request) if request.body == b"last"))
    });
    let mut by_seed: BTreeMap<u64, Vec<Request>> = BTreeMap::new();
    for heard in heard {
        match heard {
            Heard::Malformed(what) => panic!("the model server could not read this: {what}"),
            Heard::CutOff(_) => {}
            Heard::Request(request) => {
                let path = request.line.split(' ').nth(1).unwrap();
                if let Some(seed) = path.split_once('?').and_then(|(_, tag)| tagged(tag)) {
                    by_seed.entry(seed).or_default().push(request);
                }
            }
        }
    }
    for (seed, requests) in &by_seed {
        let stream = input(*seed);
        let shown = String::from_utf8_lossy(&stream);
        assert!(requests.len() <= heads(&stream), "seed {seed}, {shown:?}: {requests:?}");
        let bytes: usize = requests.iter().map(|request| request.line.len() + 2 + request.body.len()).sum();
        assert!(bytes <= stream.len(), "bytes were used twice: seed {seed}, {shown:?}: {requests:?}");
    }
    assert!(by_seed.len() as u64 > INPUTS / 10, "only {} of {INPUTS} inputs had a request that was passed on", by_seed.len());
    let metrics = String::from_utf8(mesh.get(0, "/metrics").unwrap().body).unwrap();
    assert!(metrics.contains("\ncanary_mesh_http_handler_panics_total 0\n"), "{metrics}");
    assert!(!mesh.events_of(0).contains("panicked"));
}
