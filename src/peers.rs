//! peers.json: where the nodes are, how the mesh begins, and which links are cut as a drill.
//!
//! It says where nodes are; the log says who counts. A file is taken whole or refused with what is wrong in it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::api::GateSettings;
use crate::core::gate::Gate;
use crate::core::ids::{MeshId, ModelId, NodeId, RouteName};
pub use crate::core::io::AdvanceVotes;
use crate::core::state::{MEMBERS_MAX, ROUTES_MAX, RoutingState, Sticky};

/// Largest peers.json, in bytes.
pub const PEERS_FILE_BYTES_MAX: u64 = 1 << 20;
/// Shortest time between two heartbeats, in milliseconds.
pub const HEARTBEAT_MS_MIN: u64 = 50;
/// Longest time between two heartbeats, in milliseconds.
pub const HEARTBEAT_MS_MAX: u64 = 60_000;
/// Shortest time that a coordinator waits for votes, in milliseconds.
pub const PREPARE_TIMEOUT_MS_MIN: u64 = 100;
/// Longest time that a coordinator waits for votes, in milliseconds.
pub const PREPARE_TIMEOUT_MS_MAX: u64 = 600_000;
/// Shortest lease, in heartbeats: one that is lost or late must not cost it.
pub const LEASE_HEARTBEATS_MIN: u64 = 3;
/// Longest lease, in milliseconds.
pub const LEASE_MS_MAX: u64 = 3_600_000;

/// The whole of peers.json, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeersFile {
    /// The mesh.
    pub mesh: MeshId,
    /// How often, and how long.
    pub timing: Timing,
    /// Whose votes an `advance` needs.
    pub advance_votes: AdvanceVotes,
    /// The routes of slot 0, read on a first start without `--join` only. May be empty otherwise.
    pub genesis: BTreeMap<RouteName, GenesisRoute>,
    /// The nodes, in the order of the file. Not empty; ids and addresses are all different.
    pub peers: Vec<Peer>,
    /// Groups of nodes whose links to other groups are cut. No node is in two of them.
    pub partitions: Vec<BTreeSet<NodeId>>,
}

/// How often, and how long. All in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timing {
    /// From one heartbeat to the next.
    pub heartbeat_ms: u64,
    /// How long a coordinator waits for votes, and a participant for the decision before it resolves.
    pub prepare_timeout_ms: u64,
    /// How long a canary may be served after a majority was last heard.
    pub lease_ms: u64,
}

impl Default for Timing {
    fn default() -> Self {
        Timing { heartbeat_ms: 2_000, prepare_timeout_ms: 2_000, lease_ms: 6_000 }
    }
}

/// A node, and where it is.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Its id.
    pub id: NodeId,
    /// Where other nodes reach it: `host:port`.
    pub control: String,
    /// Where clients reach it: `host:port`.
    pub data: String,
}

/// A route of slot 0.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenesisRoute {
    /// The model that answers it.
    pub stable_model_id: ModelId,
    /// When numbers speak against a canary.
    #[serde(default, deserialize_with = "gate")]
    pub gate: Gate,
    /// Where a caller's sticky key is found besides `x-canary-key`.
    #[serde(default, deserialize_with = "sticky")]
    pub sticky: Option<Sticky>,
    /// A canary that fails is retried on stable.
    #[serde(default)]
    pub shield: bool,
}

/// A peers.json was refused.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", file.as_deref().unwrap_or(Path::new("peers.json")).display())]
pub struct PeersError {
    /// The file, where it is known.
    pub file: Option<PathBuf>,
    /// What is wrong with it.
    #[source]
    pub problem: PeersProblem,
}

/// What is wrong with a peers.json, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum PeersProblem {
    /// Missing, or not to be read.
    #[error("cannot be read: {0}; name an existing file with --peers")]
    Unreadable(io::Error),
    /// Over [`PEERS_FILE_BYTES_MAX`].
    #[error("is larger than {PEERS_FILE_BYTES_MAX} bytes; this cannot be a list of peers")]
    TooLarge,
    /// Not UTF-8.
    #[error("is not text: {0}")]
    NotText(std::str::Utf8Error),
    /// Not JSON, or not this JSON. Names the key, line and column.
    #[error("{0}")]
    Malformed(serde_json::Error),
    /// Understood, and wrong.
    #[error("{0}")]
    Invalid(String),
}

impl From<PeersProblem> for PeersError {
    fn from(problem: PeersProblem) -> Self {
        PeersError { file: None, problem }
    }
}

/// The file as it is written, before it is checked.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    mesh: MeshId,
    #[serde(default)]
    timing: Timing,
    #[serde(default)]
    advance_votes: AdvanceVotes,
    #[serde(default, deserialize_with = "routes_once")]
    genesis: BTreeMap<RouteName, GenesisRoute>,
    peers: Vec<Peer>,
    #[serde(default)]
    partitions: Vec<Vec<NodeId>>,
}

impl PeersFile {
    /// Reads the text of a peers.json.
    pub fn parse(text: &str) -> Result<PeersFile, PeersError> {
        let written: Written = serde_json::from_str(text).map_err(PeersProblem::Malformed)?;
        check_timing(&written.timing)?;
        check_peers(&written.peers)?;
        if written.genesis.len() > ROUTES_MAX {
            return invalid(format!("genesis has {} routes, and a mesh has at most {ROUTES_MAX}", written.genesis.len()));
        }
        let partitions = partition_groups(written.partitions, &written.peers)?;
        let Written { mesh, timing, advance_votes, genesis, peers, .. } = written;
        Ok(PeersFile { mesh, timing, advance_votes, genesis, peers, partitions })
    }

    /// Reads a peers.json.
    pub fn load(path: &Path) -> Result<PeersFile, PeersError> {
        let read = || -> Result<PeersFile, PeersError> {
            let file = File::open(path).map_err(PeersProblem::Unreadable)?;
            let mut bytes = Vec::new();
            file.take(PEERS_FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(PeersProblem::Unreadable)?;
            if bytes.len() as u64 > PEERS_FILE_BYTES_MAX {
                return Err(PeersProblem::TooLarge.into());
            }
            PeersFile::parse(std::str::from_utf8(&bytes).map_err(PeersProblem::NotText)?)
        };
        read().map_err(|error| PeersError { file: Some(path.to_owned()), ..error })
    }

    /// The node of this id.
    pub fn peer(&self, id: &NodeId) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.id == *id)
    }

    /// Whether `partitions` leaves the link between two nodes whole. A node in no group keeps all of its links.
    pub fn linked(&self, a: &NodeId, b: &NodeId) -> bool {
        let group = |id| self.partitions.iter().position(|group| group.contains(id));
        match (group(a), group(b)) {
            (Some(a), Some(b)) => a == b,
            _ => true,
        }
    }

    /// The routing state of slot 0. An error if the file has no `genesis`: it may be left out only after the first start, and where a node joins.
    pub fn genesis_state(&self) -> Result<RoutingState, PeersError> {
        if self.genesis.is_empty() {
            return invalid(
                "genesis is missing or empty, and a first start needs it; \
                 add \"genesis\": {\"default\": {\"stable_model_id\": \"<model>\"}}, the same in every node's file; \
                 a node that joins a running mesh starts with --join instead",
            );
        }
        let members = self.peers.iter().map(|peer| peer.id.clone());
        let routes = self.genesis.iter().map(|(name, route)| (name.clone(), (route.stable_model_id.clone(), route.gate)));
        let mut state = RoutingState::genesis(&self.mesh, members, routes.collect());
        for (name, written) in &self.genesis {
            if let Some(route) = state.routes.get_mut(name) {
                (route.sticky, route.shield) = (written.sticky.clone(), written.shield);
            }
        }
        Ok(state)
    }

    /// Refuses an id that the file does not have.
    pub fn check_member(&self, id: &NodeId) -> Result<(), PeersError> {
        if self.peer(id).is_some() {
            return Ok(());
        }
        invalid(format!("there is no peer {id}; the peers are {}", names(self.peers.iter().map(|peer| &peer.id))))
    }

    /// Refuses this file as the successor of `old` in a running node if it has another mesh or genesis. Nodes may come and go: who counts
    /// is settled by the log.
    pub fn changes_live(&self, old: &PeersFile) -> Result<(), PeersError> {
        if self.mesh != old.mesh {
            return invalid(format!("mesh became {}, and this node runs in {}; a node never changes its mesh", self.mesh, old.mesh));
        }
        if self.genesis != old.genesis {
            return invalid("genesis is read on the first start only; put it back, and change routes by a transaction");
        }
        Ok(())
    }
}

fn invalid<T>(sentence: impl Into<String>) -> Result<T, PeersError> {
    Err(PeersProblem::Invalid(sentence.into()).into())
}

/// Names in a row, or "none".
fn names<'a>(ids: impl Iterator<Item = &'a NodeId>) -> String {
    let ids: Vec<_> = ids.map(NodeId::as_str).collect();
    if ids.is_empty() { "none".into() } else { ids.join(", ") }
}

fn check_timing(timing: &Timing) -> Result<(), PeersError> {
    let lease_ms_min = timing.heartbeat_ms.saturating_mul(LEASE_HEARTBEATS_MIN);
    for (key, value, min, max) in [
        ("heartbeat_ms", timing.heartbeat_ms, HEARTBEAT_MS_MIN, HEARTBEAT_MS_MAX),
        ("prepare_timeout_ms", timing.prepare_timeout_ms, PREPARE_TIMEOUT_MS_MIN, PREPARE_TIMEOUT_MS_MAX),
        ("lease_ms", timing.lease_ms, lease_ms_min, LEASE_MS_MAX),
    ] {
        if !(min..=max).contains(&value) {
            let why = if key == "lease_ms" { ", no less than three heartbeats" } else { "" };
            return invalid(format!("timing.{key} is {value}; it must be {min} to {max}{why}"));
        }
    }
    Ok(())
}

fn check_peers(peers: &[Peer]) -> Result<(), PeersError> {
    if peers.is_empty() {
        return invalid("peers is empty; name at least this node");
    }
    if peers.len() > MEMBERS_MAX {
        return invalid(format!("peers names {} nodes, and a mesh has at most {MEMBERS_MAX}", peers.len()));
    }
    let mut ids = BTreeSet::new();
    let mut addresses = BTreeMap::new();
    for peer in peers {
        if !ids.insert(&peer.id) {
            return invalid(format!("peers has {} twice; every node needs its own id", peer.id));
        }
        for (key, address) in [("control", &peer.control), ("data", &peer.data)] {
            let place = format!("{key} of {}", peer.id);
            if let Err(why) = check_address(address) {
                return invalid(format!("{place} is {address:?}: {why}"));
            }
            if let Some(other) = addresses.insert(address, place.clone()) {
                return invalid(format!("{other} and {place} are both {address}; every address can be given once"));
            }
        }
    }
    Ok(())
}

/// `host:port`, or `[v6 address]:port`.
fn check_address(address: &str) -> Result<(), String> {
    let Some((host, port)) = address.rsplit_once(':') else {
        return Err("it must be host:port, such as 127.0.0.1:60001".into());
    };
    let bracketed = host.starts_with('[') && host.ends_with(']');
    let bare = if bracketed { host.trim_start_matches('[').trim_end_matches(']') } else { host };
    if bare.is_empty() {
        return Err("the host is missing; use 0.0.0.0 or an address that the other nodes can reach".into());
    }
    if bare.contains(':') != bracketed {
        return Err("an IPv6 address, and nothing else, stands in brackets, such as [::1]:60001".into());
    }
    if bare.contains(|c: char| c.is_whitespace() || c.is_control() || "[]/@".contains(c)) {
        return Err("the host is not a name or an address; a URL is not wanted, only host:port".into());
    }
    // Written back, so that "+1" and "01", which parse, are not other spellings of an address.
    match port.parse::<u16>() {
        Ok(number) if number > 0 && number.to_string() == port => Ok(()),
        _ => Err("the port must be a number from 1 to 65535".into()),
    }
}

fn partition_groups(groups: Vec<Vec<NodeId>>, peers: &[Peer]) -> Result<Vec<BTreeSet<NodeId>>, PeersError> {
    let mut placed = BTreeSet::new();
    for id in groups.iter().flatten() {
        if !peers.iter().any(|peer| peer.id == *id) {
            let peers = names(peers.iter().map(|peer| &peer.id));
            return invalid(format!("partitions names {id}, which is not in peers; the peers are {peers}"));
        }
        if !placed.insert(id) {
            return invalid(format!("partitions names {id} twice; a node can be in one group only"));
        }
    }
    Ok(groups.iter().map(|group| group.iter().cloned().collect()).collect())
}

/// As people write it: shares in percent, each of them optional.
fn gate<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Gate, D::Error> {
    GateSettings::deserialize(deserializer)?.over(Gate::default()).map_err(D::Error::custom)
}

/// `{"header": "x-user-id"}` or `{"cookie": "uid"}`.
fn sticky<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Sticky>, D::Error> {
    let sticky = Option::<Sticky>::deserialize(deserializer)?;
    if let Some(Sticky::Header(name) | Sticky::Cookie(name)) = &sticky
        && http::HeaderName::from_bytes(name.as_bytes()).is_err()
    {
        return Err(D::Error::custom(format!("sticky: {name:?} is not the name of a header or a cookie")));
    }
    Ok(sticky)
}

/// A map of which no key may come twice; JSON's own readers would keep the last silently.
fn routes_once<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<RouteName, GenesisRoute>, D::Error> {
    struct Routes;
    impl<'de> Visitor<'de> for Routes {
        type Value = BTreeMap<RouteName, GenesisRoute>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map from route to {\"stable_model_id\": …}")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut routes = BTreeMap::new();
            while let Some((name, route)) = map.next_entry::<RouteName, GenesisRoute>()? {
                if routes.contains_key(&name) {
                    return Err(A::Error::custom(format!("genesis has route {name} twice")));
                }
                routes.insert(name, route);
            }
            Ok(routes)
        }
    }
    deserializer.deserialize_map(Routes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIPPED: &str = include_str!("../peers.json");

    fn id(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    /// The shipped file with one thing replaced, which must be there.
    fn with(from: &str, to: &str) -> String {
        assert!(SHIPPED.contains(from), "{from}");
        SHIPPED.replacen(from, to, 1)
    }

    fn partitioned(groups: &str) -> String {
        with("\"mesh\"", &format!("\"partitions\": {groups}, \"mesh\""))
    }

    fn refusal(text: &str) -> String {
        PeersFile::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn the_shipped_file_is_three_nodes_that_all_hear_each_other() {
        let file = PeersFile::parse(SHIPPED).unwrap();
        assert_eq!((file.mesh.as_str(), file.timing, file.advance_votes), ("demo", Timing::default(), AdvanceVotes::Unfenced));
        assert_eq!(file.peers.iter().map(|p| p.id.as_str()).collect::<Vec<_>>(), ["node-a", "node-b", "node-c"]);
        assert_eq!(file.peer(&id("node-c")).unwrap().data, "127.0.0.1:50053");
        assert!(file.linked(&id("node-a"), &id("node-b")));
        let state = file.genesis_state().unwrap();
        assert_eq!((state.members.len(), state.routes.values().next().unwrap().stable.id.as_str()), (3, "digits-v1"));
        let route = state.routes.values().next().unwrap();
        let gate = Gate { latency_ms_max: Some(500), ..Gate::default() };
        assert_eq!((route.shield, route.gate), (true, gate));
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        let file = PeersFile::parse(r#"{"mesh": "m", "peers": [{"id": "a", "control": "[::1]:1", "data": "host.example:2"}]}"#).unwrap();
        assert_eq!((file.timing, file.advance_votes, file.partitions.len()), (Timing::default(), AdvanceVotes::Unfenced, 0));
        let missing = file.genesis_state().unwrap_err().to_string();
        assert!(missing.starts_with("peers.json: genesis is missing"), "{missing}");
    }

    #[test]
    fn a_gate_is_written_in_percent_and_each_part_may_be_left_out() {
        let gate = |json: &str| {
            let (_, rest) = SHIPPED.split_once("\"gate\": ").unwrap();
            let text = with(&rest[..=rest.find('}').unwrap()], json);
            PeersFile::parse(&text).map(|file| file.genesis.values().next().unwrap().gate).map_err(|e| e.to_string())
        };
        assert_eq!(gate("{}").unwrap(), Gate::default());
        let all = gate(
            r#"{"alpha_local_percent": 1, "alpha_fleet_percent": 0.5, "latency_ms_max": 3, "agreement_percent_min": 90.5,
                "distance_percent_max": 1, "dry_run": true}"#,
        );
        let expected = Gate {
            alpha_local_bp: 100,
            alpha_fleet_bp: 50,
            latency_ms_max: Some(3),
            agreement_bp_min: 9_050,
            distance_bp_max: 100,
            dry_run: true,
        };
        assert_eq!(all.unwrap(), expected);
        for (json, says) in [
            (r#"{"latency_ms_max": 0}"#, "latency_ms_max must be at least 1"),
            (r#"{"alpha_local_percent": 0}"#, "alpha_local_percent must be above 0"),
            (r#"{"alpha_fleet_percent": 51}"#, "alpha_fleet_percent must be at most 50 %, not 51 %"),
            (r#"{"agreement_percent_min": 101}"#, "101 is not a percentage"),
            (r#"{"bad_bp_max": 5}"#, "unknown field `bad_bp_max`"),
        ] {
            let refused = gate(json).unwrap_err();
            assert!(refused.contains(says) && refused.contains(" at line "), "{refused}");
        }
    }

    #[test]
    fn malformed_files_and_unknown_keys_are_refused_with_line_and_column() {
        for (text, says) in [
            (String::new(), "EOF while parsing a value at line 1"),
            (with("\"advance_votes\"", "advance_votes"), "key must be a string at line 4 column 3"),
            (with("\"mesh\"", "\"mash\""), "unknown field `mash`, expected one of `mesh`"),
            (with("\"heartbeat_ms\"", "\"heartbeat\""), "unknown field `heartbeat`, expected one of `heartbeat_ms`"),
            (
                with("\"stable_model_id\"", "\"stable\""),
                "unknown field `stable`, expected one of `stable_model_id`, `gate`, `sticky`, `shield`",
            ),
            (with("\"control\"", "\"ctrl\""), "unknown field `ctrl`, expected one of `id`, `control`, `data` at line 13"),
            (with("\"mesh\"", "\"mesh\": \"x\", \"mesh\""), "duplicate field `mesh` at line 2"),
            (with("\"default\"", "\"default\": {\"stable_model_id\": \"x\"}, \"default\""), "genesis has route default twice at line 11"),
            (with("\"demo\"", "\"two words\""), "the mesh \"two words\" is not a name"),
            (with("\"node-a\"", "\"\""), "the node id \"\" is not a name"),
            (with("2000", "-1"), "invalid value: integer `-1`"),
            (with("\"unfenced\"", "\"some\""), "unknown variant `some`, expected `unfenced` or `all`"),
            (with("\"id\": \"node-a\", ", ""), "missing field `id` at line 13"),
        ] {
            let refused = refusal(&text);
            assert!(refused.starts_with("peers.json: ") && refused.contains(says), "{refused}");
            assert!(refused.contains("line ") && refused.contains("column "), "{refused}");
        }
    }

    #[test]
    fn a_file_that_makes_no_sense_is_refused_by_the_thing_that_is_wrong() {
        for (text, says) in [
            (with("\"node-b\"", "\"node-a\""), "peers has node-a twice"),
            (with("60002", "60001"), "control of node-a and control of node-b are both 127.0.0.1:60001"),
            (with("50053", "50051"), "data of node-a and data of node-c are both 127.0.0.1:50051"),
            (with("50051", "60001"), "control of node-a and data of node-a are both 127.0.0.1:60001"),
            (with("\"heartbeat_ms\": 2000", "\"heartbeat_ms\": 0"), "timing.heartbeat_ms is 0; it must be 50 to 60000"),
            (with("\"heartbeat_ms\": 2000", "\"heartbeat_ms\": 60001"), "timing.heartbeat_ms is 60001"),
            (with("\"prepare_timeout_ms\": 2000", "\"prepare_timeout_ms\": 99"), "timing.prepare_timeout_ms is 99; it must be 100"),
            (with("\"lease_ms\": 6000", "\"lease_ms\": 5999"), "timing.lease_ms is 5999; it must be 6000 to 3600000, no less than three"),
            (partitioned(r#"[["node-a"], ["node-x"]]"#), "partitions names node-x, which is not in peers; the peers are node-a, node-b"),
            (partitioned(r#"[["node-a"], ["node-a", "node-b"]]"#), "partitions names node-a twice"),
            (r#"{"mesh": "m", "peers": []}"#.into(), "peers is empty"),
        ] {
            let refused = refusal(&text);
            assert!(refused.starts_with("peers.json: ") && refused.contains(says), "{refused}");
        }
    }

    #[test]
    fn more_peers_than_a_mesh_may_have_are_refused() {
        let peer = |n: usize| format!(r#"{{"id": "n{n}", "control": "h{n}:1", "data": "h{n}:2"}}"#);
        let file = |count| format!(r#"{{"mesh": "m", "peers": [{}]}}"#, (0..count).map(peer).collect::<Vec<_>>().join(","));
        assert_eq!(PeersFile::parse(&file(MEMBERS_MAX)).unwrap().peers.len(), MEMBERS_MAX);
        assert!(refusal(&file(MEMBERS_MAX + 1)).contains("peers names 513 nodes, and a mesh has at most 512"));
    }

    #[test]
    fn an_address_is_a_host_and_a_port() {
        for good in ["127.0.0.1:1", "localhost:65535", "[::1]:60001", "node-a.mesh.example:80"] {
            assert_eq!(check_address(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "host",
            ":1",
            "[]:1",
            "host:",
            "host:0",
            "host:65536",
            "host:+1",
            "host:01",
            "host:x",
            "::1:80",
            "[host]:80",
            "http://host:80",
            "a b:80",
            "host :80",
            "[::1:80",
            "host/x:80",
        ] {
            assert!(check_address(bad).is_err(), "{bad}");
            let refused = refusal(&with("\"127.0.0.1:60001\"", &format!("{bad:?}")));
            assert!(refused.contains(&format!("control of node-a is {bad:?}: ")), "{refused}");
        }
    }

    #[test]
    fn links_between_groups_are_cut_and_a_node_in_no_group_keeps_its_own() {
        let file = PeersFile::parse(&partitioned(r#"[["node-a"], ["node-b"]]"#)).unwrap();
        for (a, b, linked) in [
            ("node-a", "node-b", false),
            ("node-b", "node-a", false),
            ("node-a", "node-c", true),
            ("node-c", "node-b", true),
            ("node-a", "node-a", true),
        ] {
            assert_eq!(file.linked(&id(a), &id(b)), linked, "{a} {b}");
        }
        let same = PeersFile::parse(&partitioned(r#"[["node-a", "node-b"], ["node-c"]]"#)).unwrap();
        assert!(same.linked(&id("node-a"), &id("node-b")) && !same.linked(&id("node-b"), &id("node-c")));
    }

    #[test]
    fn an_own_id_that_is_not_there_is_refused_with_the_ids_that_are() {
        let file = PeersFile::parse(SHIPPED).unwrap();
        file.check_member(&id("node-b")).unwrap();
        let refused = file.check_member(&id("node-d")).unwrap_err().to_string();
        assert_eq!(refused, "peers.json: there is no peer node-d; the peers are node-a, node-b, node-c");
    }

    #[test]
    fn a_running_node_takes_everything_new_but_another_mesh_and_another_genesis() {
        let old = PeersFile::parse(SHIPPED).unwrap();
        let more = with("\"peers\": [", r#""peers": [{ "id": "node-d", "control": "127.0.0.1:60004", "data": "127.0.0.1:50054" },"#);
        for live in [with("60002", "60012"), with("50052", "50062"), with("6000 }", "9000 }"), with("\"node-c\"", "\"node-d\""), more] {
            PeersFile::parse(&live).unwrap().changes_live(&old).unwrap();
        }
        PeersFile::parse(&partitioned(r#"[["node-a"], ["node-b", "node-c"]]"#)).unwrap().changes_live(&old).unwrap();
        for (text, says) in [
            (with("\"demo\"", "\"other\""), "mesh became other, and this node runs in demo"),
            (with("digits-v1", "digits-v2"), "genesis is read on the first start only"),
        ] {
            let refused = PeersFile::parse(&text).unwrap().changes_live(&old).unwrap_err().to_string();
            assert!(refused.contains(says), "{refused}");
        }
    }

    #[test]
    fn a_file_that_is_missing_too_large_or_not_text_is_refused_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mesh.json");
        let refused = || {
            let refused = PeersFile::load(&path).unwrap_err().to_string();
            assert!(refused.starts_with(&format!("{}: ", path.display())), "{refused}");
            refused
        };
        assert!(refused().contains("cannot be read: No such file"));
        std::fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(refused().contains("is not text: invalid utf-8"));
        std::fs::write(&path, format!("{SHIPPED}{}", " ".repeat(PEERS_FILE_BYTES_MAX as usize))).unwrap();
        assert!(refused().contains("is larger than 1048576 bytes"));
        std::fs::write(&path, with("\"node-b\"", "\"node-a\"")).unwrap();
        assert!(refused().contains("peers has node-a twice"));
        std::fs::write(&path, SHIPPED).unwrap();
        assert_eq!(PeersFile::load(&path).unwrap(), PeersFile::parse(SHIPPED).unwrap());
    }
}
