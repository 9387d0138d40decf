//! Who decides: what is shown of the members and of those who only learn, and what a change of them must fulfil here before it is
//! proposed. The members vote on it by what they see themselves.

use std::collections::{BTreeMap, BTreeSet};

use crate::api::{self, LinkWord, MemberView, MembersAction, Role};
use crate::core::Node;
use crate::core::ids::{Incarnation, NodeId, Slot};
use crate::core::io::Proposal;
use crate::core::state::{Change, Kind, MemberChange};
use crate::http::Refusal;
use crate::mesh::LinkStatus;
use crate::node::control::ControlPlane;

/// How far behind this node's head a learner may be when it is added.
pub const LEARNER_BEHIND_SLOTS_MAX: Slot = 8;

/// The members, and whoever else is linked, without what peers.json and this node's own gateway know.
fn seen(node: &Node) -> Vec<MemberView> {
    let (liveness, members) = (node.liveness(), &node.durable().state().members);
    let view = |id: &NodeId| {
        let peer = liveness.peer(id).filter(|_| id != node.id());
        let linked = peer.filter(|peer| peer.link.is_some());
        let own = id == node.id();
        MemberView {
            node: id.clone(),
            role: if members.contains_key(id) { Role::Member } else { Role::Learner },
            disk_id: match own {
                true => Some(node.durable().disk_id()),
                // A learner is whoever is linked: what was known of its name before does not matter.
                false if !members.contains_key(id) => linked.and_then(|peer| peer.disk_id),
                false => node.durable().pinned_disk(id).or(linked.and_then(|peer| peer.disk_id)),
            },
            alive: own || node.is_alive(id),
            slot: match own {
                true => Some(node.durable().head().slot),
                // What it said itself over this link: hearsay may be of another disk under its name.
                false if !members.contains_key(id) => linked.and_then(|peer| peer.head).map(|head| head.slot),
                false => liveness.head_slot(id),
            },
            models_missing: peer.map(|peer| peer.health.reasons.clone()).unwrap_or_default(),
            control: None,
            data: None,
        }
    };
    let learners = liveness.linked().chain([node.id()]).filter(|id| !members.contains_key(*id));
    let ids: BTreeSet<_> = members.keys().chain(learners).collect();
    ids.into_iter().map(view).collect()
}

/// The newest start that was heard of each node, this one's own included.
fn incarnations(node: &Node) -> BTreeMap<NodeId, Incarnation> {
    let heard = |(id, peer): (&NodeId, &crate::core::liveness::Peer)| {
        let newest = peer.newest.as_ref().map(|newest| newest.incarnation);
        Some((id.clone(), newest.max(peer.link)?))
    };
    node.liveness().peers().filter_map(heard).chain([(node.id().clone(), node.durable().incarnation())]).collect()
}

/// The state at the head: who joins is then never a member by a decision that has been undone since.
fn snapshot(node: &Node) -> api::Snapshot {
    let (durable, head) = (node.durable(), node.durable().head());
    let mut peers = durable.snapshot().disks;
    peers.entry(node.id().clone()).or_insert(durable.disk_id());
    api::Snapshot {
        mesh: durable.mesh().clone(),
        genesis_hash: durable.genesis_hash(),
        slot: head.slot,
        state_hash: head.state_hash,
        state: durable.state().clone(),
        peers,
        incarnations: incarnations(node),
    }
}

impl ControlPlane {
    fn ended(&self) -> Refusal {
        Refusal::new(503, "stopping", format!("{} is stopping; ask another node", self.id))
    }

    pub(super) async fn list_members(&self) -> Result<api::Members, Refusal> {
        let asked = self.query(|node| (node.durable().head().slot, seen(node))).await;
        let (slot, mut members) = asked.ok_or_else(|| self.ended())?;
        let file = self.peers.load();
        for member in &mut members {
            let peer = file.peer(&member.node);
            (member.control, member.data) = (peer.map(|peer| peer.control.clone()), peer.map(|peer| peer.data.clone()));
            if member.node == self.id {
                member.models_missing = self.gateway.models_missing();
            }
        }
        Ok(api::Members { node: self.id.clone(), slot, members })
    }

    pub(super) async fn propose_members(&self, request: api::MembersRequest) -> Result<api::Receipt, Refusal> {
        if let Some(receipt) = self.applied(request.idempotency_key.as_deref()).await {
            return Ok(receipt);
        }
        let members = self.list_members().await?;
        let change = match request.action {
            MembersAction::Add => {
                let in_file = self.peers.load().peer(&request.node).is_some();
                let link = self.mesh.links().remove(&request.node);
                let running =
                    |link: &LinkStatus| if link.state == LinkWord::Refused { "" } else { ". Is it running, with `serve --join`?" };
                let trouble = link.and_then(|link| Some(format!("{}{}", link.reason.as_ref()?, running(&link))));
                addition(&members, &request.node, in_file, trouble)?
            }
            MembersAction::Remove => removal(&members, &request.node)?,
        };
        let change = Change::Members(change);
        self.submit(Proposal { kind: Kind::Config, change, idempotency_key: request.idempotency_key }).await
    }

    pub(super) async fn give_snapshot(&self) -> Result<api::Snapshot, Refusal> {
        let ask = |node: &Node| match node.complaints() {
            complaints if complaints.is_empty() => Ok(snapshot(node)),
            complaints => Err(complaints.join("; ")),
        };
        let complaint = match &self.view.load().broken {
            Some(why) => Err(why.clone()),
            None => Ok(()),
        };
        let answer = match complaint {
            Err(why) => Err(why),
            Ok(()) => self.query(ask).await.ok_or_else(|| self.ended())?,
        };
        answer.map_err(|why| Refusal::new(503, "not_ready", format!("{} gives no snapshot now: {why}; ask another node", self.id)))
    }
}

/// The slot of the node that answers, if it can coordinate at all.
fn coordinates(members: &api::Members) -> Result<Slot, Refusal> {
    let own = members.members.iter().find(|member| member.node == members.node && member.role == Role::Member);
    own.map(|_| members.slot).ok_or_else(|| {
        let others = members.members.iter().filter(|member| member.role == Role::Member).map(|member| member.node.as_str());
        let others: Vec<_> = others.collect();
        let sentence = format!("{} is not a member and proposes nothing; ask one of {}", members.node, others.join(", "));
        Refusal::new(503, "not_ready", sentence)
    })
}

/// `in_file`: this node's peers.json has it. `trouble`: why there is no link to it, where that is known.
fn addition(members: &api::Members, id: &NodeId, in_file: bool, trouble: Option<String>) -> Result<MemberChange, Refusal> {
    let (here, own) = (&members.node, coordinates(members)?);
    let learner = members.members.iter().find(|member| member.node == *id);
    if learner.is_some_and(|learner| learner.role == Role::Member) {
        let sentence = format!(
            "{id} is a member already. If it has lost its log: `canary-mesh members remove {id}`, start it with `serve --join`, and then \
             add it"
        );
        return Err(Refusal::new(409, "already_member", sentence));
    }
    if !in_file {
        let sentence = format!(
            "{id} is not in the peers.json of {here}: put it there and in every other node's, with its addresses; the nodes read the file \
             when it changes"
        );
        return Err(Refusal::new(412, "not_in_peers", sentence));
    }
    let not_linked = |why: &str| Refusal::new(412, "not_linked", format!("{here} has no link to {id}: {why}"));
    let Some(learner) = learner else {
        return Err(not_linked(&trouble.unwrap_or_else(|| "it is being made".into())));
    };
    let (Some(disk_id), Some(slot)) = (learner.disk_id, learner.slot) else {
        return Err(not_linked("it has not said yet how far it is"));
    };
    if !learner.models_missing.is_empty() {
        let sentence = format!("{id} has not loaded every model that it would have to serve: {}", learner.models_missing.join("; "));
        return Err(Refusal::new(412, "models_missing", sentence));
    }
    if slot + LEARNER_BEHIND_SLOTS_MAX < own {
        let sentence = format!("{id} is at slot {slot} and {here} at {own}: it is added when it has caught up");
        return Err(Refusal::new(412, "behind", sentence));
    }
    Ok(MemberChange::Add { node: id.clone(), disk_id })
}

fn removal(members: &api::Members, id: &NodeId) -> Result<MemberChange, Refusal> {
    coordinates(members)?;
    let of_role = |role| members.members.iter().filter(move |member| member.role == role);
    let names: Vec<_> = of_role(Role::Member).map(|member| member.node.as_str()).collect();
    if !names.contains(&id.as_str()) {
        let learner = of_role(Role::Learner).any(|member| member.node == *id);
        let hint = if learner { "; it is a learner: stop it, or take it out of peers.json, to be rid of it" } else { "" };
        let sentence = format!("{id} is not a member; the members are {}{hint}", names.join(", "));
        return Err(Refusal::new(409, "not_a_member", sentence));
    }
    if names.len() == 1 {
        return Err(Refusal::new(409, "last_member", format!("{id} is the last member: without it there would be no mesh")));
    }
    Ok(MemberChange::Remove { node: id.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::ids::DiskId;

    fn id(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn view(name: &str, role: Role, slot: Slot) -> MemberView {
        MemberView {
            node: id(name),
            role,
            disk_id: Some(DiskId([7; 8])),
            alive: true,
            slot: Some(slot),
            models_missing: Vec::new(),
            control: None,
            data: None,
        }
    }

    /// As node-a sees it: two members, and a learner at this slot.
    fn members(learner: Slot) -> api::Members {
        let members = [("node-a", Role::Member, 20), ("node-b", Role::Member, 20), ("node-d", Role::Learner, learner)];
        api::Members { node: id("node-a"), slot: 20, members: members.map(|(name, role, slot)| view(name, role, slot)).into() }
    }

    fn refused(outcome: Result<MemberChange, Refusal>, status: u16, code: &str, says: &str) {
        let refusal = outcome.unwrap_err();
        assert_eq!((refusal.status, refusal.error_code), (status, code));
        assert!(refusal.message.contains(says), "{}", refusal.message);
    }

    #[test]
    fn a_learner_is_added_by_the_disk_it_is_linked_with_when_it_is_as_good_as_a_member() {
        let add = |members: &api::Members| addition(members, &id("node-d"), true, None);
        let expected = MemberChange::Add { node: id("node-d"), disk_id: DiskId([7; 8]) };
        assert_eq!(add(&members(20 - LEARNER_BEHIND_SLOTS_MAX)), Ok(expected));
        refused(add(&members(19 - LEARNER_BEHIND_SLOTS_MAX)), 412, "behind", "node-d is at slot 11 and node-a at 20");
        let mut poor = members(20);
        poor.members[2].models_missing = vec!["route default, canary: models/v2.onnx is not here".into()];
        refused(add(&poor), 412, "models_missing", "models/v2.onnx is not here");
        let mut silent = members(20);
        silent.members[2].slot = None;
        refused(add(&silent), 412, "not_linked", "has not said yet");
    }

    #[test]
    fn who_is_not_there_or_is_a_member_already_is_not_added() {
        let add = |name: &str, in_file, trouble: Option<&str>| addition(&members(20), &id(name), in_file, trouble.map(str::to_owned));
        refused(add("node-b", true, None), 409, "already_member", "`canary-mesh members remove node-b`, start it with `serve --join`");
        refused(add("node-e", false, None), 412, "not_in_peers", "not in the peers.json of node-a");
        refused(add("node-e", true, Some("dialling 127.0.0.1:60005")), 412, "not_linked", "node-a has no link to node-e: dialling 127");
    }

    #[test]
    fn a_member_is_removed_and_nobody_else_and_never_the_last_one() {
        let remove = |members: &api::Members, name: &str| removal(members, &id(name));
        assert_eq!(remove(&members(20), "node-b"), Ok(MemberChange::Remove { node: id("node-b") }));
        refused(
            remove(&members(20), "node-d"),
            409,
            "not_a_member",
            "node-d is not a member; the members are node-a, node-b; it is a learner",
        );
        refused(remove(&members(20), "node-x"), 409, "not_a_member", "node-x is not a member; the members are node-a, node-b");
        let mut alone = members(20);
        alone.members.remove(1);
        refused(remove(&alone, "node-a"), 409, "last_member", "node-a is the last member");
    }

    #[test]
    fn a_node_that_is_not_a_member_names_those_who_are() {
        let learner = api::Members { node: id("node-d"), ..members(20) };
        refused(
            removal(&learner, &id("node-b")),
            503,
            "not_ready",
            "node-d is not a member and proposes nothing; ask one of node-a, node-b",
        );
        refused(addition(&learner, &id("node-d"), true, None), 503, "not_ready", "ask one of node-a, node-b");
    }
}
