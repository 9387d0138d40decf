//! Every place where bytes of others come in, each a function that panics when something happens that may not. The targets in `fuzz/` call
//! them with what the fuzzer invents; the tests below with the corpus that fuzzing has left.

use crate::core::record::Record;
use crate::peers::PeersFile;
use crate::wal::frame::{self, Chain, Tail};

/// A connection's bytes on the control port.
pub fn frames(bytes: &[u8]) {
    crate::mesh::fuzz::frames(bytes);
}

/// One frame's body.
pub fn packet(bytes: &[u8]) {
    crate::mesh::fuzz::packet(bytes);
}

/// A connection's bytes on the data port.
pub fn requests(bytes: &[u8]) {
    crate::http::fuzz::requests(bytes);
}

/// A caller's bytes, and how a model server answers them, over sockets.
pub fn conversation(bytes: &[u8]) {
    crate::http::conversation::conversation(bytes);
}

/// The bodies of requests: changes and predictions.
pub fn bodies(bytes: &[u8]) {
    crate::http::fuzz::change(bytes);
    crate::gateway::fuzz::infer(bytes);
}

/// A model's file.
pub fn model_file(bytes: &[u8]) {
    crate::gateway::fuzz::model_file(bytes);
}

/// A peers.json.
pub fn peers(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(file) = PeersFile::parse(text) else { return };
    assert!(file.changes_live(&file).is_ok(), "a file follows itself");
    assert_eq!(file.genesis_state().is_ok(), !file.genesis.is_empty());
    for a in &file.peers {
        assert_eq!(file.peer(&a.id), Some(a), "ids are all different");
        for b in &file.peers {
            assert_eq!(file.linked(&a.id, &b.id), file.linked(&b.id, &a.id), "a link is cut for both");
        }
    }
}

/// Any file in the place of a log. Unless it is refused, what is read of it is there again after the next append.
pub fn log(bytes: &[u8]) {
    let replay = frame::replay(bytes);
    let end = replay.end as usize;
    assert!(end <= bytes.len());
    if let Tail::Damaged(_) = replay.tail {
        return;
    }
    let Ok((appended, chain)) = frame::encode(&[Record::Admitted], replay.chain) else { return };
    let longer = [bytes.get(..end).unwrap_or_default(), &appended.concat()].concat();
    let again = frame::replay(&longer);
    assert_eq!((again.end as usize, again.chain, &again.tail), (longer.len(), chain, &Tail::Clean));
    let (last, before) = again.groups.split_last().map(|(last, before)| (Some(&last.records), before)).unwrap_or_default();
    assert_eq!((before, last), (replay.groups.as_slice(), Some(&vec![Record::Admitted])));
}

/// A sound log, and what `bytes` make of it: flipped, zeroed, copied, cut. Nothing comes back that was not written there.
pub fn damaged_log(bytes: &[u8]) {
    let mut take = bytes.iter().copied();
    let mut next = || take.next().map(usize::from);
    let mut written = Vec::new();
    let (mut log, mut chain) = (Vec::new(), Chain::start());
    for group in 0..1 + next().unwrap_or(0) % 6 {
        let records = records(group as u64, next().unwrap_or(0) % 40);
        let Ok((groups, after)) = frame::encode(&records, chain) else { return };
        log.extend(groups.concat());
        chain = after;
        written.push(records);
    }
    log.resize(log.len() + next().unwrap_or(0), 0);
    while let Some(what) = next() {
        let mut place = || (next().unwrap_or(0) << 8 | next().unwrap_or(0)) % log.len().max(1);
        let (at, other) = (place(), place());
        let (from, to) = (at.min(other), at.max(other));
        match what % 5 {
            0 => log.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << (other % 8)),
            1 => log.iter_mut().skip(from).take(to - from).for_each(|byte| *byte = 0),
            2 => log.truncate(at),
            3 => log.copy_within(from..to, from / 2),
            _ => log.extend_from_within(from..to.min(from + 4_096)),
        }
    }
    let read = frame::replay(&log);
    for (read, written) in read.groups.iter().zip(&written) {
        assert_eq!(&read.records, written, "read is what was written, from the beginning");
    }
    assert!(read.groups.len() <= written.len(), "more groups than were written");
    self::log(&log);
}

/// Some records of a group: their content does not matter here, but which group they are of, and how many bytes they take.
fn records(group: u64, size: usize) -> Vec<Record> {
    let Ok(node) = crate::core::ids::NodeId::new("node-a") else { return Vec::new() };
    let peer = |n: u64| Record::Peer { node: node.clone(), disk_id: crate::core::ids::DiskId((group << 16 | n).to_be_bytes()) };
    (0..size as u64).map(peer).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, VecDeque};
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::core::Node;
    use crate::core::durable::Durable;
    use crate::core::gate::Gate;
    use crate::core::ids::{Digest, DiskId, MeshId, ModelId, NodeId, RouteName, Time};
    use crate::core::io::{AdvanceVotes, Input, Now, Output, Proposal, Settings};
    use crate::core::message::Message;
    use crate::core::state::{CanaryChange, Change, Kind, Model, RouteChange, RoutingState, Weights};
    use crate::core::value::Vote;

    type Target = (&'static str, fn(&[u8]));

    const TARGETS: [Target; 9] = [
        ("bodies", bodies),
        ("conversation", conversation),
        ("damaged_log", damaged_log),
        ("frames", frames),
        ("log", log),
        ("model_file", model_file),
        ("packet", packet),
        ("peers", peers),
        ("requests", requests),
    ];

    fn corpus(target: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
    }

    #[test]
    fn the_corpus_of_every_target_passes() {
        for (target, run) in TARGETS {
            let files: Vec<_> = fs::read_dir(corpus(target)).unwrap().map(|entry| entry.unwrap().path()).collect();
            assert!(!files.is_empty(), "{target} has no corpus");
            for file in files {
                println!("{}", file.display());
                run(&fs::read(file).unwrap());
            }
        }
    }

    /// What three nodes say to each other over some decisions, where now and then a message is lost, and what each of them records.
    fn said_by_three(seed: u64) -> (Vec<Message>, Vec<Vec<Record>>) {
        let ids: Vec<_> = ["node-a", "node-b", "node-c"].iter().map(|id| NodeId::new(id).unwrap()).collect();
        let (mesh, route) = (MeshId::new("demo").unwrap(), RouteName::new("default").unwrap());
        let routes = BTreeMap::from([(route.clone(), (ModelId::new("digits-v1").unwrap(), Gate::default()))]);
        let state = RoutingState::genesis(&mesh, ids.clone(), routes);
        let settings = Settings { heartbeat_ms: 2_000, prepare_timeout_ms: 2_000, lease_ms: 6_000, advance_votes: AdvanceVotes::Unfenced };
        let (mut nodes, mut logs) = (Vec::new(), Vec::new());
        for (n, id) in ids.iter().enumerate() {
            let genesis = Durable::genesis(&mesh, id, DiskId([n as u8; 8]), state.clone());
            nodes.push(Node::new(Durable::replay(genesis.clone()).unwrap(), settings));
            logs.push(vec![genesis]);
        }
        let mut random = fastrand::Rng::with_seed(seed);
        let (mut said, mut queue) = (Vec::new(), VecDeque::new());
        for n in 0..3 {
            let others = (0..3).filter(|other| *other != n);
            queue.extend(
                others.map(|other| (n, Input::LinkUp { peer: ids[other].clone(), incarnation: 1, disk_id: DiskId([other as u8; 8]) })),
            );
        }
        for round in 0..60 {
            queue.extend((0..3).map(|n| (n, Input::Tick)));
            if round % 4 == 3 {
                let canary = Model { id: ModelId::new("digits-v2").unwrap(), digest: Some(Digest([2; 32])) };
                let weights = Some(Weights::with_canary(random.u16(..=10_000)).unwrap());
                let change = RouteChange { stable: None, canary: CanaryChange::Set(canary), weights };
                let change = Change::Routes(BTreeMap::from([(route.clone(), change)]));
                let proposal = Proposal { kind: Kind::Advance, change, idempotency_key: Some(format!("key-{round}")) };
                queue.push_back((random.usize(..3), Input::Propose { caller: round, proposal: proposal.clone() }));
                queue.push_back((random.usize(..3), Input::Propose { caller: round + 100, proposal }));
            }
            let now = Now { time: Time(round * 900_000), unix_ms: 1_700_000_000_000 + round * 900 };
            while let Some((n, input)) = queue.pop_front() {
                for output in nodes[n].step(now, input) {
                    match output {
                        Output::Append { record, .. } => logs[n].push(vec![record]),
                        Output::Send { to, message, .. } => {
                            let to = ids.iter().position(|id| *id == to).unwrap();
                            if to != n {
                                said.push(message.clone());
                            }
                            if to == n || random.u8(..10) > 0 {
                                queue.push_back((to, Input::Message { from: ids[n].clone(), incarnation: 1, message }));
                            }
                        }
                        Output::Vet { slot, ballot, .. } => {
                            let vote = if random.u8(..8) > 0 { Vote::yes() } else { Vote::no("too many errors") };
                            queue.push_back((n, Input::Vetted { slot, ballot, vote }));
                        }
                        _ => {}
                    }
                }
            }
        }
        // Nothing has been forgotten here that anybody would need one for.
        said.extend(nodes.iter().map(|node| Message::Snapshot(node.durable().snapshot())));
        (said, logs.into_iter().map(|log| log.concat()).collect())
    }

    #[test]
    fn what_real_nodes_say_and_record_passes_and_every_kind_of_message_is_among_it() {
        let mut kinds = BTreeMap::new();
        for seed in 0..4 {
            let (said, logs) = said_by_three(seed);
            for message in &said {
                packet(&body(message));
                crate::mesh::fuzz::envelopes(message).iter().for_each(|envelope| packet(envelope));
                *kinds.entry(kind(message)).or_insert(0) += 1;
            }
            for records in logs {
                log(&frame::encode(&records, Chain::start()).unwrap().0.concat());
            }
        }
        assert_eq!(kinds.len(), 13, "{kinds:?}");
    }

    fn body(message: &Message) -> Vec<u8> {
        rmp_serde::to_vec_named(&(crate::mesh::PROTOCOL_VERSION, BTreeMap::from([("message", message)]))).unwrap()
    }

    fn kind(message: &Message) -> String {
        let json = serde_json::to_value(message).unwrap();
        json.as_object().and_then(|one| one.keys().next().cloned()).unwrap_or_default()
    }

    #[test]
    #[ignore = "writes seeds into fuzz/corpus, to be minimised: scripts/fuzz.sh says how"]
    fn write_seeds() {
        let write = |target: &str, name: String, bytes: &[u8]| {
            fs::create_dir_all(corpus(target)).unwrap();
            fs::write(corpus(target).join(name), bytes).unwrap();
        };
        for seed in 0..4 {
            let (said, logs) = said_by_three(seed);
            let mut stream = Vec::new();
            for (n, message) in said.iter().enumerate() {
                let body = body(message);
                stream.extend((body.len() as u32).to_be_bytes());
                stream.extend(&body);
                if n % 5 == 4 {
                    write("frames", format!("seed-{seed}-{n}"), &std::mem::take(&mut stream));
                }
                write("packet", format!("seed-{seed}-{n}-{}", kind(message).to_lowercase()), &body);
            }
            for (n, records) in logs.iter().enumerate() {
                for groups in [1, 2, 5, 9] {
                    let (mut bytes, mut chain) = (Vec::new(), Chain::start());
                    for group in records.chunks(2).take(groups) {
                        let (group, after) = frame::encode(group, chain).unwrap();
                        bytes.extend(group.concat());
                        chain = after;
                    }
                    write("log", format!("seed-{seed}-{n}-{groups}"), &bytes);
                    bytes.truncate(bytes.len() - 3 * groups);
                    write("log", format!("seed-{seed}-{n}-{groups}-cut"), &bytes);
                }
            }
        }
        for (n, envelope) in crate::mesh::fuzz::envelopes(&Message::Fetch { from: 7 }).into_iter().enumerate() {
            write("packet", format!("seed-envelope-{n}"), &envelope);
            write("frames", format!("seed-envelope-{n}"), &[&(envelope.len() as u32).to_be_bytes()[..], &envelope].concat());
        }
        let version = crate::mesh::PROTOCOL_VERSION;
        for (n, packet) in ["welcome", "refused"].into_iter().enumerate() {
            let bytes = match packet {
                "welcome" => rmp_serde::to_vec_named(&(version, packet)).unwrap(),
                _ => rmp_serde::to_vec_named(&(version, BTreeMap::from([(packet, BTreeMap::from([("reason", "no")]))]))).unwrap(),
            };
            write("packet", format!("seed-{n}"), &bytes);
        }
        // Everything that is sent to smuggle requests, and something sound, with each way of answering.
        let vectors: Vec<serde_json::Value> = serde_json::from_slice(&fs::read("tests/data/smuggling.json").unwrap()).unwrap();
        let sent = vectors.iter().map(|vector| vector["sends"].as_str().unwrap().chars().map(|char| char as u8).collect::<Vec<u8>>());
        let sound = "POST /predict HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhelloPOST /v1/models/default:predict HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
        for (n, asks) in sent.chain((0..8).map(|_| sound.into())).enumerate() {
            let says = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nyes\r\n0\r\n\r\n";
            let split = (asks.len() * 256).div_ceil(asks.len() + says.len()) as u8;
            let piece = [255, 1, 7][n % 3];
            write("conversation", format!("seed-{n}"), &[&[n as u8 % 8, piece, split][..], &asks, says.as_bytes()].concat());
        }
        let mut random = fastrand::Rng::with_seed(1);
        for n in 0..40 {
            let bytes: Vec<u8> = (0..random.usize(4..80)).map(|_| random.u8(..)).collect();
            write("damaged_log", format!("seed-{n}"), &bytes);
        }
        write("model_file", "seed".to_owned(), &fs::read("models/digits-v1.onnx").unwrap()[..2_000]);
        write("peers", "seed".to_owned(), &fs::read("peers.json").unwrap());
        let peers = r#"{"mesh":"m","timing":{"heartbeat_ms":100,"prepare_timeout_ms":200,"lease_ms":300},"advance_votes":"all","genesis":{"default":{"stable_model_id":"v1","gate":{"alpha_local_percent":1,"alpha_fleet_percent":2.5,"latency_ms_max":3,"agreement_percent_min":90,"distance_percent_max":4,"dry_run":true},"sticky":{"cookie":"uid"},"shield":true}},"peers":[{"id":"a","control":"[::1]:1","data":"h:2"},{"id":"b","control":"h:3","data":"h:4"}],"partitions":[["a"],["b"]]}"#;
        write("peers", "seed-all".to_owned(), peers.as_bytes());
        for (n, text) in [
            r#"{"kind":"advance","changes":{"default":{"canary_model_id":"digits-v2","weights":{"stable":90,"canary":10}}},"idempotency_key":"k"}"#,
            r#"{"kind":"reduce","changes":{"default":{"canary_model_id":null,"stable_model_id":"v1"}}}"#,
            r#"{"route":"default","stable":true,"idempotency_key":"k"}"#,
            r#"{"id":"7","inputs":[{"name":"b","shape":[2],"datatype":"INT64","data":[5,6]},{"name":"a","shape":[2,2],"datatype":"FP32","data":[[1,2.5],[3e2,-4]]}],"outputs":[{"name":"b"}]}"#,
            r#"{"inputs":[{"name":"x","shape":[1,3],"datatype":"BOOL","data":[[true,false,true]]}]}"#,
            r#"{"inputs":[{"name":"x","shape":[3],"datatype":"UINT8","data":[0,255,1]}]}"#,
            r#"{"inputs":[{"name":"x","shape":[2],"datatype":"INT8","data":[-128,127]}]}"#,
            r#"{"inputs":[{"name":"x","shape":[],"datatype":"FP64","data":[0.1]}],"outputs":[]}"#,
            r#"{"instances":[[1,2.5],[3e2,-4]]}"#,
            r#"{"signature_name":"serving_default","instances":[{"a":[1,2],"b":5},{"b":6,"a":[3,4]}]}"#,
            r#"{"inputs":{"a":[[1,2],[3,4]],"b":[5,6]}}"#,
            r#"{"outputs":{"a":[[0.1,0.9]],"b":[6]}}"#,
            r#"{"predictions":[[0.1,0.9],[1,0]]}"#,
            r#"{"parameters":{"binary_data_output":true},"inputs":[{"name":"x","shape":[4],"datatype":"UINT8","parameters":{"binary_data_size":4}}]}abcd"#,
            r#"{"inputs":[{"name":"x","shape":[2],"datatype":"FP16","parameters":{"binary_data_size":4}}],"outputs":[{"name":"x","parameters":{"binary_data":true}}]}abcd"#,
        ]
        .into_iter()
        .enumerate()
        {
            write("bodies", format!("seed-{n}"), text.as_bytes());
        }
        let requests = fs::read_to_string("models/requests.ndjson").unwrap();
        write("bodies", "seed-digits".to_owned(), requests.lines().next().unwrap().as_bytes());
        for (n, text) in [
            "GET /health HTTP/1.1\r\nHost: h\r\n\r\nGET /b HTTP/1.0\n\n",
            "POST /predict HTTP/1.1\r\nContent-Length: 5\r\n\r\nhelloGET / HTTP/1.1\r\n\r\n",
            "POST /c HTTP/1.1\r\ntransfer-encoding:chunked\r\n\r\n1a;x=\"y\"\r\nGET / HTTP/1.1\r\nA: b\r\n\r\n..\r\n2 \r\n\r\n\r\n0\r\nTrailer: t\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
            "POST / HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok",
            "\x16\x03\x01",
        ]
        .into_iter()
        .enumerate()
        {
            write("requests", format!("seed-{n}"), text.as_bytes());
        }
    }
}
