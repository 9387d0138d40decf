//! How long a node takes to start after a long history: `cargo bench --bench start`.
//!
//! One member decides TRANSACTIONS transactions (1,000,000 unless set) through the real core and the real log, with the
//! compaction that the node's loop does; then the log is opened and replayed, and last a real process is started on it.
//! The log lies in memory (/dev/shm) where there is such a place, since building it needs two syncs a transaction.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark that fails says where, and prints its figures")]

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use canary_mesh::core::Node;
use canary_mesh::core::durable::Durable;
use canary_mesh::core::ids::{Digest, DiskId, ModelId, RouteName, Time};
use canary_mesh::core::io::{AdvanceVotes, Input, Now, Output, Proposal, Settings};
use canary_mesh::core::state::{CanaryChange, Change, Kind, Model, RouteChange, Weights};
use canary_mesh::core::value::Vote;
use canary_mesh::peers::PeersFile;
use canary_mesh::wal::Wal;
use sha2::{Digest as _, Sha256};

fn main() {
    let transactions: u64 = std::env::var("TRANSACTIONS").map_or(1_000_000, |text| text.parse().unwrap());
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let ports: Vec<_> = (0..2).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let address = |at: usize| ports.get(at).unwrap().local_addr().unwrap();
    let (control, data) = (address(0), address(1));
    let peers = format!(
        r#"{{"mesh": "bench", "advance_votes": "all", "genesis": {{"default": {{"stable_model_id": "digits-v1"}}}},
            "peers": [{{"id": "node-a", "control": "{control}", "data": "{data}"}}]}}"#
    );
    drop(ports);
    std::fs::write(dir.path().join("peers.json"), &peers).unwrap();

    let log = dir.path().join("node-a.log");
    let (built, largest) = build(&PeersFile::parse(&peers).unwrap(), &log, transactions);
    println!(
        "{transactions} transactions in {:.1} s; the log is {:.1} MB, {:.1} MB at its largest",
        built.as_secs_f64(),
        mb(&log),
        largest
    );

    let start = Instant::now();
    let opened = Wal::open(&log).unwrap().unwrap();
    let records = opened.records.len();
    let durable = Durable::replay(opened.records).unwrap();
    assert_eq!(durable.head().slot, transactions);
    println!("opened and replayed: {records} records in {:.3} s", start.elapsed().as_secs_f64());
    drop(opened.wal);

    let start = Instant::now();
    let mut child = Command::new(env!("CARGO_BIN_EXE_canary-mesh"))
        .args(["serve", "--id", "node-a", "--models", concat!(env!("CARGO_MANIFEST_DIR"), "/models"), "--peers"])
        .arg(dir.path().join("peers.json"))
        .arg("--logs")
        .arg(dir.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    while !is_ready(&data.to_string()) {
        assert!(start.elapsed() < Duration::from_secs(60), "the node did not get ready");
        std::thread::sleep(Duration::from_millis(1));
    }
    println!("process started to /readyz 200: {:.3} s", start.elapsed().as_secs_f64());
    child.kill().unwrap();
    child.wait().unwrap();
}

fn mb(log: &Path) -> f64 {
    std::fs::metadata(log).unwrap().len() as f64 / 1e6
}

fn is_ready(data: &str) -> bool {
    let Ok(mut stream) = TcpStream::connect(data) else { return false };
    let mut answer = String::new();
    stream.write_all(b"GET /readyz HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n").is_ok()
        && stream.read_to_string(&mut answer).is_ok()
        && answer.starts_with("HTTP/1.1 200")
}

/// Decides the transactions one by one; the time it took and the largest size of the log, in MB.
fn build(peers: &PeersFile, log: &Path, transactions: u64) -> (Duration, f64) {
    let start = Instant::now();
    let id = peers.peers.first().unwrap().id.clone();
    let records = Durable::genesis(&peers.mesh, &id, DiskId([7; 8]), peers.genesis_state().unwrap());
    let mut wal = Wal::create(log, &records).unwrap();
    let timing = Settings { heartbeat_ms: 2_000, prepare_timeout_ms: 2_000, lease_ms: 6_000, advance_votes: AdvanceVotes::Unfenced };
    let mut node = Node::new(Durable::replay(records).unwrap(), timing);
    let file = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/models/digits-v2.onnx")).unwrap();
    let model = Model { id: ModelId::new("digits-v2").unwrap(), digest: Some(Digest(Sha256::digest(file).into())) };
    let (mut now, mut largest) = (0, 0.0_f64);
    let mut inputs = VecDeque::from([Input::Tick]);
    for n in 0..=transactions {
        let mut compact = false;
        while !inputs.is_empty() {
            let mut batch = Vec::new();
            for input in std::mem::take(&mut inputs) {
                now += 1;
                for output in node.step(Now { time: Time(now), unix_ms: now / 1_000 }, input) {
                    match output {
                        Output::Append { record, .. } => batch.push(record),
                        Output::Send { to, message, .. } if to == id => {
                            inputs.push_back(Input::Message { from: to, incarnation: 1, message });
                        }
                        Output::Vet { slot, ballot, .. } => inputs.push_back(Input::Vetted { slot, ballot, vote: Vote::yes() }),
                        Output::CompactDue => compact = true,
                        _ => {}
                    }
                }
            }
            if !batch.is_empty() {
                wal.append(&batch).unwrap();
            }
        }
        if compact {
            largest = largest.max(mb(log));
            wal.compact(&node.compact()).unwrap();
        }
        if n < transactions {
            inputs.push_back(Input::Propose { caller: n, proposal: proposal(n, model.clone()) });
        }
    }
    assert_eq!(node.durable().head().slot, transactions);
    (start.elapsed(), largest.max(mb(log)))
}

fn proposal(n: u64, model: Model) -> Proposal {
    let weights = Weights::with_canary(if n.is_multiple_of(2) { 100 } else { 200 }).unwrap();
    let change = RouteChange { stable: None, canary: CanaryChange::Set(model), weights: Some(weights) };
    let change = Change::Routes([(RouteName::new("default").unwrap(), change)].into());
    Proposal { kind: Kind::Advance, change, idempotency_key: Some(format!("transaction-{n}")) }
}
