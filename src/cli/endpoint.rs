//! Where nodes are asked: data addresses, as typed or as known from peers.json.

use std::path::Path;

use crate::cli::{Failure, Surroundings};
pub use crate::http::client::{Endpoint, Target};
use crate::peers::PeersFile;

/// Asked when nothing else is known: the addresses of the peers.json that comes with the project.
pub const ENDPOINTS_DEFAULT: [&str; 3] = ["127.0.0.1:50051", "127.0.0.1:50052", "127.0.0.1:50053"];
/// Looked for in the present folder.
const PEERS_FILE: &str = "peers.json";

/// The nodes to ask, each once: those typed, else those of the environment, else those of ./peers.json, else the default ones.
pub fn targets(typed: &[Endpoint], around: &Surroundings) -> Result<Vec<Target>, Failure> {
    let mut found: Vec<Target> = if !typed.is_empty() {
        typed.iter().map(|endpoint| Target { node: None, endpoint: endpoint.clone() }).collect()
    } else if let Some(list) = &around.endpoints {
        parse_all(list.split(',').map(str::trim)).map_err(|e| Failure::usage(format!("CANARY_MESH_ENDPOINT: {e}")))?
    } else {
        let file = around.directory.join(PEERS_FILE);
        if file.exists() { of_peers_file(&file)? } else { parse_all(ENDPOINTS_DEFAULT).map_err(Failure::usage)? }
    };
    let all = found.clone();
    let mut index = 0;
    found.retain(|target| {
        index += 1;
        !all.iter().take(index - 1).any(|earlier| earlier.endpoint == target.endpoint)
    });
    Ok(found)
}

fn parse_all<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<Vec<Target>, String> {
    texts.into_iter().map(|text| Ok(Target { node: None, endpoint: text.parse()? })).collect()
}

fn of_peers_file(file: &Path) -> Result<Vec<Target>, Failure> {
    let peers = PeersFile::load(file).map_err(|e| Failure::usage(format!("{e}\nMend it, or name the nodes with --endpoint.")))?;
    let target = |peer: crate::peers::Peer| {
        let endpoint = peer.data.parse().map_err(|e| Failure::usage(format!("{}: {}: {e}", file.display(), peer.id)))?;
        Ok(Target { node: Some(peer.id), endpoint })
    };
    peers.peers.into_iter().map(target).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(typed: &[&str], around: &Surroundings) -> Result<Vec<String>, Failure> {
        let typed: Vec<Endpoint> = typed.iter().map(|text| text.parse().unwrap()).collect();
        let show = |target: Target| format!("{}@{}", target.node.map(|n| n.to_string()).unwrap_or_default(), target.endpoint);
        targets(&typed, around).map(|targets| targets.into_iter().map(show).collect())
    }

    #[test]
    fn what_is_typed_comes_before_the_environment_and_that_before_the_file_and_that_before_the_default() {
        let folder = tempfile::tempdir().unwrap();
        let mut around = Surroundings { directory: folder.path().into(), ..Surroundings::default() };
        assert_eq!(found(&[], &around).unwrap(), ENDPOINTS_DEFAULT.map(|e| format!("@{e}")));
        let file = r#"{"mesh": "m", "advance_votes": "all", "peers": [{"id": "n1", "control": "127.0.0.1:1", "data": "127.0.0.1:2"}]}"#;
        std::fs::write(folder.path().join(PEERS_FILE), file).unwrap();
        assert_eq!(found(&[], &around).unwrap(), ["n1@127.0.0.1:2"]);
        around.endpoints = Some("a:1, http://b:2,a:1".into());
        assert_eq!(found(&[], &around).unwrap(), ["@a:1", "@b:2"]);
        assert_eq!(found(&["c:3"], &around).unwrap(), ["@c:3"]);
    }

    #[test]
    fn a_broken_source_is_named_and_not_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(PEERS_FILE), "{").unwrap();
        let mut around = Surroundings { directory: folder.path().into(), ..Surroundings::default() };
        let broken = found(&[], &around).unwrap_err();
        assert!(broken.message.contains(PEERS_FILE) && broken.message.contains("--endpoint"), "{}", broken.message);
        around.endpoints = Some("nowhere".into());
        let broken = found(&[], &around).unwrap_err();
        assert!(broken.message.starts_with("CANARY_MESH_ENDPOINT: \"nowhere\""), "{}", broken.message);
    }
}
