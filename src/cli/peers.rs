//! `peers check`: whether a peers.json would be taken.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Serialize;

use crate::cli::output::{Console, counted, listed};
use crate::cli::{Exit, Failure};
use crate::core::ids::NodeId;
use crate::peers::{Peer, PeersFile};

/// What is said of a good file.
#[derive(Serialize)]
struct Summary<'a> {
    ok: bool,
    mesh: String,
    peers: &'a [Peer],
    routes: Vec<String>,
    partitions: &'a [BTreeSet<NodeId>],
}

/// Prints ok and what is in the file, or fails with what is wrong with it.
pub fn check(file: &Path, id: Option<&NodeId>, console: &mut Console<'_>) -> Result<Exit, Failure> {
    let peers = PeersFile::load(file).map_err(|error| Failure::refused(error.to_string()))?;
    if let Some(id) = id {
        peers.check_member(id).map_err(|error| Failure::refused(format!("{}: {error}", file.display())))?;
    }
    let summary = Summary {
        ok: true,
        mesh: peers.mesh.to_string(),
        peers: &peers.peers,
        routes: peers.genesis.iter().map(|(name, route)| format!("{name}: {}", route.stable_model_id)).collect(),
        partitions: &peers.partitions,
    };
    console.data(&summary, |console| {
        let Summary { mesh, peers, routes, partitions, .. } = &summary;
        let nodes = format!("{} ({})", counted(peers.len() as u64, "node"), listed(peers.iter().map(|peer| &peer.id)));
        let routes = if routes.is_empty() { "no genesis".to_owned() } else { listed(routes) };
        let groups: Vec<String> = partitions.iter().map(|group| format!("[{}]", listed(group))).collect();
        let cut = if groups.is_empty() { "no links cut".to_owned() } else { format!("links cut between {}", groups.join(" and ")) };
        console.line(&format!("ok: mesh {mesh}, {nodes}, {routes}, {cut}"));
    });
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cli::testing::{Ran, ran};

    fn check(text: &str, words: &str) -> Ran {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        ran(&format!("canary-mesh peers check {} {words}", file.path().display()))
    }

    const GOOD: &str = r#"{"mesh": "demo", "advance_votes": "all", "genesis": {"default": {"stable_model_id": "digits-v1"}},
        "peers": [{"id": "node-a", "control": "127.0.0.1:60001", "data": "127.0.0.1:50051"},
                  {"id": "node-b", "control": "127.0.0.1:60002", "data": "127.0.0.1:50052"}],
        "partitions": [["node-a"], ["node-b"]]}"#;

    #[test]
    fn a_good_file_is_summed_up() {
        let checked = check(GOOD, "--id node-b");
        let said = "ok: mesh demo, 2 nodes (node-a, node-b), default: digits-v1, links cut between [node-a] and [node-b]\n";
        assert_eq!((checked.exit, checked.out.as_str()), (Exit::Ok, said));
        let second = json!({"id": "node-b", "control": "127.0.0.1:60002", "data": "127.0.0.1:50052"});
        assert_eq!(check(GOOD, "--output json").json()["peers"][1], second);
    }

    #[test]
    fn a_bad_file_and_a_missing_id_are_named() {
        for (text, words, said) in
            [(GOOD, "--id node-z", "there is no peer node-z"), ("{\"mesh\": 1}", "", "line 1 column 10"), ("", "", "EOF")]
        {
            let checked = check(text, words);
            assert_eq!((checked.exit, checked.out.as_str()), (Exit::Refused, ""));
            assert!(checked.err.contains(said) && checked.err.matches("/tmp").count() <= 1, "{}", checked.err);
        }
        assert_eq!(ran("canary-mesh peers check /nowhere/peers.json").exit, Exit::Refused);
    }
}
