//! `members`: who decides, and how that changes.

use std::time::{Duration, Instant};

use async_std::task;

use crate::api::{Members, MembersAction, MembersRequest, Outcome, Receipt, Role, VoteWord};
use crate::cli::args::MemberArgs;
use crate::cli::client::{ASK_TIMEOUT_MS_MAX, CallError, Client, Mesh, unreachable};
use crate::cli::output::{Console, Field, Tone, counted};
use crate::cli::receipt::{IN_FORCE, conclude, failure, key_or_random, send};
use crate::cli::{Exit, Failure};
use crate::core::ids::NodeId;

const PATH: &str = "/members";
/// From one try that was refused to the next, in milliseconds.
const ASK_AGAIN_MS: u64 = 250;
/// The same after a try that took a slot, in milliseconds.
const PROPOSE_AGAIN_MS: u64 = 1_000;
/// Refusals that pass by themselves: the node is not ready to be added yet.
const NOT_YET: [&str; 3] = ["not_linked", "models_missing", "behind"];
/// Aborts that pass by themselves: a dead member is not fenced yet, another transaction was first, or a member does not see yet what the
/// coordinator sees of the node that is added.
const ADD_NOT_NOW: [&str; 5] = ["no_vote", "busy", "slot_taken", "preempted", "vetoed"];
/// The same, where a no means that the mesh would be stranded.
const REMOVE_NOT_NOW: [&str; 4] = ["no_vote", "busy", "slot_taken", "preempted"];

/// Prints the members and the learners.
pub async fn list(mut mesh: Mesh, console: &mut Console<'_>) -> Result<Exit, Failure> {
    let (_, members) = coordinator(&mut mesh, None).await?;
    console.data(&members, |console| print(&members, console));
    Ok(Exit::Ok)
}

/// Adds a node as soon as it is ready for that, and prints the receipt.
pub async fn add(args: MemberArgs, mesh: Mesh, console: &mut Console<'_>) -> Result<Exit, Failure> {
    change(MembersAction::Add, args, mesh, console).await
}

/// Removes a member, a dead one as soon as its vote can be done without, and prints the receipt.
pub async fn remove(args: MemberArgs, mesh: Mesh, console: &mut Console<'_>) -> Result<Exit, Failure> {
    change(MembersAction::Remove, args, mesh, console).await
}

async fn change(action: MembersAction, args: MemberArgs, mut mesh: Mesh, console: &mut Console<'_>) -> Result<Exit, Failure> {
    let (timeout, until) = (mesh.timeout, Instant::now() + mesh.timeout);
    let MemberArgs { node, idempotency_key } = args;
    let (client, _) = coordinator(&mut mesh, Some(&node)).await?;
    let key = key_or_random(idempotency_key);
    let request = MembersRequest { action, node: node.clone(), idempotency_key: Some(key.clone()) };
    let (what, not_now) = match action {
        MembersAction::Add => ("add", &ADD_NOT_NOW[..]),
        MembersAction::Remove => ("remove", &REMOVE_NOT_NOW[..]),
    };
    let waited = format!("It has been waited for {timeout:?}; with --timeout 60s it would be for longer.");
    let mut said = String::new();
    loop {
        // What was refused or aborted has changed nothing, so the same is sent again.
        let (why, wait_ms) = match send::<Receipt>(client, PATH, &request).await {
            Ok(receipt) => {
                let passes = receipt.outcome == Outcome::Aborted && is_one_of(not_now, receipt.error_code.as_deref());
                if !passes || Instant::now() >= until {
                    let exit = conclude(client, receipt, &key, IN_FORCE, console).await;
                    if passes {
                        console.say(&waited);
                    }
                    return Ok(exit);
                }
                (objections(&receipt), PROPOSE_AGAIN_MS)
            }
            Err(CallError::Refused { body, .. }) if is_one_of(&NOT_YET, Some(&body.error_code)) => {
                if Instant::now() >= until {
                    return Err(Failure { exit: Exit::Refused, message: format!("{}\n{waited}", body.message), body: Some(body) });
                }
                (body.message, ASK_AGAIN_MS)
            }
            Err(error) => return Err(failure(error, &key)),
        };
        if said != why {
            console.say(&format!("waiting to {what} {node}: {why}"));
            said = why;
        }
        task::sleep(Duration::from_millis(wait_ms)).await;
    }
}

fn is_one_of(codes: &[&str], code: Option<&str>) -> bool {
    code.is_some_and(|code| codes.contains(&code))
}

/// Why the members did not want it.
fn objections(receipt: &Receipt) -> String {
    let no = receipt.votes.iter().filter(|line| line.vote == VoteWord::No);
    let said = no.filter_map(|line| Some(format!(": {}", line.reason.as_ref()?)));
    let reason = receipt.reason.clone().unwrap_or_else(|| "aborted".into());
    [reason].into_iter().chain(said).collect()
}

/// The first node that is a member and not the one that it is about: that one may have lost its log, and know nothing. If there is no
/// such node, the first that answers.
async fn coordinator<'a>(mesh: &'a mut Mesh, about: Option<&NodeId>) -> Result<(&'a mut Client, Members), Failure> {
    let timeout = mesh.timeout;
    let patience = if mesh.clients.len() > 1 { timeout.min(Duration::from_millis(ASK_TIMEOUT_MS_MAX)) } else { timeout };
    let mut second = None;
    let mut failures = Vec::new();
    for client in &mut mesh.clients {
        client.timeout = patience;
        let answer = client.get::<Members>(PATH).await;
        client.timeout = timeout;
        match answer {
            Ok(members) if is_member(&members) && about != Some(&members.node) => return Ok((client, members)),
            Ok(members) => {
                second.get_or_insert((client, members));
            }
            Err(error) => failures.push(error),
        }
    }
    second.ok_or_else(|| unreachable(&failures))
}

fn is_member(members: &Members) -> bool {
    members.members.iter().any(|member| member.node == members.node && member.role == Role::Member)
}

fn print(members: &Members, console: &mut Console<'_>) {
    let rows = members.members.iter().map(|member| {
        let alive = if member.alive { Field::text("alive").toned(Tone::Good) } else { Field::text("down").toned(Tone::Bad) };
        let models = match member.models_missing.as_slice() {
            [] => Field::text("loaded"),
            missing => Field::text(missing.join("; ")).toned(Tone::Doubt),
        };
        let role = Field::text(member.role);
        vec![
            Field::text(&member.node),
            if member.role == Role::Learner { role.toned(Tone::Doubt) } else { role },
            alive,
            member.slot.map_or_else(|| Field::maybe(None::<&str>), Field::number),
            Field::maybe(member.disk_id),
            Field::maybe(member.control.as_ref()),
            Field::maybe(member.data.as_ref()),
            models,
        ]
    });
    console.table(&["node", "role", "state", "head", "disk", "control", "data", "models"], rows);
    let count = members.members.iter().filter(|member| member.role == Role::Member).count();
    console.line(&format!("{} as of slot {}, as {} sees it", counted(count as u64, "member"), members.slot, members.node));
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use serde_json::{Value, json};

    use super::*;
    use crate::cli::testing::{Fake, Reply, answer, nobody, ran, receipt, refusal};

    fn members(own: &str, roles: &[(&str, &str)]) -> Value {
        let view = |(node, role): &(&str, &str)| {
            json!({"node": node, "role": role, "disk_id": "0707070707070707", "alive": *node != "node-c", "slot": 4,
                "models_missing": [], "control": "127.0.0.1:60001", "data": null})
        };
        json!({"node": own, "slot": 4, "members": roles.iter().map(view).collect::<Vec<_>>()})
    }

    const THREE: [(&str, &str); 4] = [("node-a", "member"), ("node-b", "member"), ("node-c", "member"), ("node-d", "learner")];

    /// Lists `roles`, and answers changes by `change`.
    fn node(own: &'static str, roles: &'static [(&str, &str)], change: impl Fn() -> Reply + Send + Sync + 'static) -> Fake {
        Fake::start(move |method, _, _| if method == "POST" { change() } else { answer(200, &members(own, roles)) })
    }

    fn committing(own: &'static str) -> Fake {
        node(own, &THREE, || answer(200, &receipt("committed", 5)))
    }

    #[test]
    fn members_and_learners_are_listed_with_what_is_known_of_them() {
        let node = committing("node-a");
        let listed = ran(&format!("canary-mesh members list --endpoint {}", node.address));
        let expected = "node    role     state  head  disk              control          data  models\n\
                        node-a  member   alive     4  0707070707070707  127.0.0.1:60001  -     loaded\n\
                        node-b  member   alive     4  0707070707070707  127.0.0.1:60001  -     loaded\n\
                        node-c  member   down      4  0707070707070707  127.0.0.1:60001  -     loaded\n\
                        node-d  learner  alive     4  0707070707070707  127.0.0.1:60001  -     loaded\n\
                        3 members as of slot 4, as node-a sees it\n";
        assert_eq!((listed.exit, listed.out.as_str()), (Exit::Ok, expected));
        assert_eq!(ran(&format!("canary-mesh members --endpoint {}", node.address)).out, expected, "the list is what is meant by no word");
        let json = ran(&format!("canary-mesh members list --output json --endpoint {}", node.address)).json();
        assert_eq!(json["members"][3]["role"], "learner");
        assert_eq!(ran(&format!("canary-mesh members list --endpoint {}", nobody())).exit, Exit::NoConnection);
    }

    #[test]
    fn a_change_goes_to_a_member_that_it_is_not_about() {
        let (d, c, a) = (committing("node-d"), committing("node-c"), committing("node-a"));
        let endpoints = [&nobody(), &d.address, &c.address, &a.address].map(|address| format!("--endpoint {address}")).join(" ");
        let removed = ran(&format!("canary-mesh members remove node-c {endpoints} --idempotency-key k"));
        assert_eq!(removed.exit, Exit::Ok, "{removed:?}");
        assert!(removed.out.starts_with("committed node-a-1-5: slot 5"), "{}", removed.out);
        assert_eq!(a.sent_to("/members"), [json!({"action": "remove", "node": "node-c", "idempotency_key": "k"})]);
        assert!(c.sent_to("/members").is_empty() && d.sent_to("/members").is_empty());
        let alone = ran(&format!("canary-mesh members remove node-c --endpoint {}", c.address));
        assert_eq!((alone.exit, c.sent_to("/members").len()), (Exit::Ok, 1), "who is alone is asked all the same");
    }

    #[test]
    fn an_addition_waits_until_the_node_is_ready_and_says_for_what() {
        let tries = Mutex::new(0);
        let node = node("node-a", &THREE, move || {
            *tries.lock().unwrap() += 1;
            match *tries.lock().unwrap() {
                1 | 2 => refusal(412, "not_linked", "node-a has no link to node-d"),
                3 => refusal(412, "behind", "node-d is at slot 1 and node-a at 40"),
                4 => {
                    let mut vetoed = receipt("aborted", 5);
                    (vetoed["error_code"], vetoed["reason"]) = ("vetoed".into(), "node-b voted no".into());
                    vetoed["votes"][1] = json!({"node": "node-b", "vote": "no", "reason": "node-b has not heard of node-d"});
                    answer(412, &vetoed)
                }
                _ => answer(200, &receipt("committed", 5)),
            }
        });
        let added = ran(&format!("canary-mesh members add node-d --endpoint {}", node.address));
        assert_eq!(added.exit, Exit::Ok, "{added:?}");
        let expected = "waiting to add node-d: node-a has no link to node-d\n\
                        waiting to add node-d: node-d is at slot 1 and node-a at 40\n\
                        waiting to add node-d: node-b voted no: node-b has not heard of node-d\n";
        assert_eq!(added.err, expected);
        let keys: Vec<_> = node.sent_to("/members").iter().map(|sent| sent["idempotency_key"].clone()).collect();
        assert!(keys.len() == 5 && keys.iter().all(|key| *key == keys[0]), "{keys:?}");
    }

    #[test]
    fn a_removal_waits_until_a_dead_member_is_fenced_and_not_where_the_mesh_would_be_stranded() {
        let aborted = |code: &str, reason: &str| {
            let mut aborted = receipt("aborted", 5);
            (aborted["error_code"], aborted["reason"]) = (code.into(), reason.into());
            answer(503, &aborted)
        };
        let tries = Mutex::new(0);
        let dead = node("node-a", &THREE, move || {
            *tries.lock().unwrap() += 1;
            if *tries.lock().unwrap() == 1 { aborted("no_vote", "no vote from node-c") } else { answer(200, &receipt("committed", 6)) }
        });
        let removed = ran(&format!("canary-mesh members remove node-c --endpoint {}", dead.address));
        assert_eq!((removed.exit, removed.err.as_str()), (Exit::Ok, "waiting to remove node-c: no vote from node-c\n"));
        let stranded = node("node-a", &THREE, move || aborted("vetoed", "node-a voted no"));
        let refused = ran(&format!("canary-mesh members remove node-b --endpoint {}", stranded.address));
        assert_eq!((refused.exit, stranded.sent_to("/members").len()), (Exit::Refused, 1), "{refused:?}");
    }

    #[test]
    fn an_addition_waits_no_longer_than_it_is_told_and_not_at_all_for_what_does_not_pass() {
        let never = node("node-a", &THREE, || refusal(412, "behind", "node-d is at slot 1 and node-a at 40"));
        let refused = ran(&format!("canary-mesh members add node-d --timeout 300ms --endpoint {}", never.address));
        assert_eq!(refused.exit, Exit::Refused);
        assert!(refused.err.ends_with(
            "error: node-d is at slot 1 and node-a at 40\nIt has been waited for 300ms; with --timeout 60s it would be for longer.\n"
        ));
        let vetoing = node("node-a", &THREE, || {
            let mut vetoed = receipt("aborted", 5);
            vetoed["error_code"] = "vetoed".into();
            answer(412, &vetoed)
        });
        let refused = ran(&format!("canary-mesh members add node-d --timeout 300ms --endpoint {}", vetoing.address));
        assert_eq!((refused.exit, refused.out.starts_with("aborted node-a-1-5: slot 5")), (Exit::Refused, true), "{refused:?}");
        for (status, code) in [(409, "already_member"), (412, "not_in_peers")] {
            let refusing = node("node-a", &THREE, move || refusal(status, code, "no"));
            let refused = ran(&format!("canary-mesh members add node-d --endpoint {}", refusing.address));
            assert_eq!((refused.exit, refused.err.as_str()), (Exit::Refused, "error: no\n"));
            assert_eq!(refusing.sent_to("/members").len(), 1);
        }
    }

    #[test]
    fn a_change_whose_outcome_is_not_known_says_how_to_repeat_it() {
        let node = node("node-a", &THREE, || Reply::Break);
        let lost = ran(&format!("canary-mesh members remove node-c --idempotency-key k --endpoint {}", node.address));
        assert_eq!(lost.exit, Exit::Unknown);
        assert!(lost.err.contains("--idempotency-key k"), "{}", lost.err);
    }
}
