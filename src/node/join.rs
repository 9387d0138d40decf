//! `serve --join`: the first records of the log of a node that joins a mesh which runs.

use std::collections::BTreeMap;
use std::time::Duration;

use async_std::task;
use log::Level;
use serde_json::json;

use crate::api;
use crate::core::durable::{Durable, JOINED_INCARNATION_MIN};
use crate::core::ids::{DiskId, Incarnation, NodeId};
use crate::core::message::Snapshot;
use crate::core::record::Record;
use crate::http::client::{Client, Endpoint, Target};
use crate::node::events::Events;
use crate::node::{ServeError, clock, new_disk};
use crate::peers::{Peer, PeersFile};

/// The longest wait for one node's snapshot, in milliseconds.
const ASK_MS_MAX: u64 = 3_000;
/// From the first round of questions to the second, in milliseconds. It doubles with every round.
const AGAIN_MS_BASE: u64 = 500;
/// The longest wait between two rounds, in milliseconds.
const AGAIN_MS_MAX: u64 = 5_000;

/// Asks the other nodes of peers.json until one gives its snapshot.
pub async fn first_records(id: &NodeId, file: &PeersFile, events: &Events) -> Result<Vec<Record>, ServeError> {
    let others: Vec<_> = file.peers.iter().filter(|peer| peer.id != *id).collect();
    if others.is_empty() {
        return Err(cannot(id, "peers.json names no other node to join".into()));
    }
    if seconds() < JOINED_INCARNATION_MIN {
        return Err(cannot(
            id,
            "by the clock of this machine it is before 2001; set it, because the names of transactions go by it".into(),
        ));
    }
    let disk_id = new_disk()?;
    let mut wait_ms = AGAIN_MS_BASE;
    loop {
        let mut failed: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        for peer in &others {
            match ask(id, peer, file).await? {
                Ok(snapshot) => {
                    let incarnation = incarnation(id, &snapshot);
                    let fields = json!({"from": peer.id, "slot": snapshot.slot, "state_hash": snapshot.state_hash, "disk_id": disk_id,
                        "next": format!("`canary-mesh members add {id}` makes this node a member")});
                    events.say(Level::Info, "joined", fields);
                    return Ok(records(id, incarnation, disk_id, snapshot));
                }
                Err(why) => failed.entry(why).or_default().push(peer.id.as_str()),
            }
        }
        let asked: Vec<_> = failed.into_iter().map(|(why, nodes)| format!("{}: {why}", nodes.join(", "))).collect();
        events.say(Level::Warn, "joining", json!({"asked": asked.join("; "), "again_in_ms": wait_ms}));
        task::sleep(Duration::from_millis(wait_ms)).await;
        wait_ms = wait_ms.saturating_mul(2).min(AGAIN_MS_MAX);
    }
}

fn cannot(id: &NodeId, why: String) -> ServeError {
    ServeError::Join { id: id.clone(), why }
}

/// One question. The inner error says why another node is to be asked, or the same one later.
async fn ask(id: &NodeId, peer: &Peer, file: &PeersFile) -> Result<Result<api::Snapshot, String>, ServeError> {
    let endpoint: Endpoint = match peer.data.parse() {
        Ok(endpoint) => endpoint,
        Err(why) => return Ok(Err(why)),
    };
    let mut client = Client::new(Target { node: Some(peer.id.clone()), endpoint }, Duration::from_millis(ASK_MS_MAX));
    let snapshot: api::Snapshot = match client.get("/snapshot").await {
        Ok(snapshot) => snapshot,
        Err(error) => return Ok(Err(error.to_string())),
    };
    if snapshot.mesh != file.mesh {
        let why = format!(
            "{} at {} runs in mesh {}, and peers.json is of mesh {}: check \"mesh\" and the data addresses",
            peer.id, peer.data, snapshot.mesh, file.mesh
        );
        return Err(cannot(id, why));
    }
    if snapshot.state.members.contains_key(id) {
        let why = format!(
            "{id} is a member still, with the log that is not here any more: `canary-mesh members remove {id}`; this node goes on by itself then"
        );
        return Ok(Err(why));
    }
    Ok(Ok(snapshot))
}

/// The seconds since 1970: above every start of a log that had this name before, so that neither a ballot nor a transaction id of it
/// comes again. Should a clock be wrong, above every start that the mesh has heard of, too.
fn incarnation(id: &NodeId, snapshot: &api::Snapshot) -> Incarnation {
    let heard = snapshot.incarnations.get(id).copied().unwrap_or(0);
    seconds().max(heard + 1)
}

/// Since 1970.
fn seconds() -> Incarnation {
    clock::unix_ms() / 1_000
}

fn records(id: &NodeId, incarnation: Incarnation, disk_id: DiskId, snapshot: api::Snapshot) -> Vec<Record> {
    let api::Snapshot { mesh, genesis_hash, slot, state_hash, state, peers: disks, .. } = snapshot;
    Durable::joining(&mesh, id, disk_id, incarnation, Snapshot { genesis_hash, slot, state_hash, state, disks })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::fakes;

    #[test]
    fn a_new_log_of_a_name_begins_above_every_start_that_was_heard_of_it() {
        let (a, d) = (NodeId::new("node-a").unwrap(), NodeId::new("node-d").unwrap());
        let mut snapshot = fakes::snapshot();
        let now = clock::unix_ms() / 1_000;
        assert!((now..=now + 60).contains(&incarnation(&d, &snapshot)));
        snapshot.incarnations.insert(a.clone(), now + 1_000);
        assert_eq!(incarnation(&a, &snapshot), now + 1_001);
    }

    #[test]
    fn a_snapshot_becomes_a_log_that_replays_to_where_it_was_taken() {
        let (d, snapshot) = (NodeId::new("node-d").unwrap(), fakes::snapshot());
        let durable = Durable::replay(records(&d, 7, DiskId([4; 8]), snapshot.clone())).unwrap();
        assert_eq!((durable.head().slot, durable.head().state_hash, durable.state()), (17, snapshot.state_hash, &snapshot.state));
        assert_eq!(durable.pinned_disk(&NodeId::new("node-a").unwrap()), Some(DiskId([1; 8])));
        assert_eq!((durable.node(), durable.mesh(), durable.incarnation()), (&d, &snapshot.mesh, 7));
    }
}
