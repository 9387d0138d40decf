//! `status`: every node in one table, and whether they tell the same story.

use std::collections::BTreeMap;
use std::time::Duration;

use async_std::task;
use bytes::Bytes;
use futures::future::join_all;
use http::Method;
use serde::Serialize;

use crate::api::{
    FenceView, Health, HealthWord, History, LeaseView, LinkWord, OpenView, PeerView, Peers, RolloutList, RolloutStatus, RolloutView,
    RouteView, Routing,
};
use crate::cli::args::StatusArgs;
use crate::cli::client::{CallError, Client, Mesh};
use crate::cli::output::{Console, Field, Tone, counted, listed};
use crate::cli::rollout::{self, drives, is_under_way, tone};
use crate::cli::{Exit, Failure};
use crate::core::ids::{Incarnation, NodeId, RouteName, Slot, StateHash, TxId};

/// From one picture to the next with `--watch`, in milliseconds.
const WATCH_INTERVAL_MS: u64 = 1_000;
/// How long a node may take to reach a head that another one had, before it counts as behind, in milliseconds.
const BEHIND_GRACE_MS: u64 = 300;

/// What `status --output json` prints.
#[derive(Serialize)]
struct Report {
    converged: bool,
    summary: String,
    problems: Vec<String>,
    /// What is wrong with members that were not asked.
    notes: Vec<String>,
    nodes: Vec<NodeReport>,
    /// The rollout under way, as whoever knows the newest of it sees it.
    rollout: Option<RolloutView>,
    /// How many rollouts wait for their turn.
    rollouts_waiting: usize,
}

/// One node: what it said, or why it said nothing.
#[derive(Serialize)]
struct NodeReport {
    endpoint: String,
    node: Option<NodeId>,
    error: Option<String>,
    #[serde(flatten)]
    seen: Option<Seen>,
}

/// What one node said of itself.
#[derive(Serialize)]
struct Seen {
    ready: bool,
    health: HealthWord,
    reasons: Vec<String>,
    incarnation: Incarnation,
    slot: Slot,
    version: u64,
    state_hash: StateHash,
    txid: Option<TxId>,
    members: Vec<NodeId>,
    routes: BTreeMap<RouteName, RouteView>,
    links: Vec<PeerView>,
    lease: LeaseView,
    fenced: Vec<FenceView>,
    open: Option<OpenView>,
    /// The rollouts; none where the node does not say.
    #[serde(skip)]
    rollouts: Vec<RolloutView>,
}

/// A node that answered, by the name it gave.
struct Voice<'a> {
    node: &'a NodeId,
    seen: &'a Seen,
}

/// Prints the picture: once, or every second until nobody looks any more.
pub async fn run(args: &StatusArgs, mut mesh: Mesh, console: &mut Console<'_>) -> Result<Exit, Failure> {
    loop {
        let (report, exit) = look(&mut mesh).await;
        let show = |console: &mut Console<'_>| console.data(&report, |console| print(&report, console));
        if args.watch {
            console.picture(show)
        } else {
            show(console)
        }
        console.flush();
        if !args.watch || console.is_closed() {
            return Ok(exit);
        }
        task::sleep(Duration::from_millis(WATCH_INTERVAL_MS)).await;
    }
}

/// Asks every node, and those once more that lag: a head that another node has had for a while is missing, not on its way.
async fn look(mesh: &mut Mesh) -> (Report, Exit) {
    let mut nodes = observe_all(mesh).await;
    let head = |nodes: &[NodeReport]| nodes.iter().filter_map(|node| Some(node.seen.as_ref()?.slot)).max().unwrap_or(0);
    let due = head(&nodes);
    if nodes.iter().any(|node| node.seen.as_ref().is_some_and(|seen| seen.slot < due)) {
        task::sleep(Duration::from_millis(BEHIND_GRACE_MS)).await;
        nodes = observe_all(mesh).await;
    }
    name_the_silent(&mut nodes);
    let common = common_hashes(mesh, &nodes).await;
    // Who asks only the others knows of the one that is missing, and is told whether those are well.
    let (fenced, notes): (Vec<_>, Vec<_>) =
        fences(&nodes).into_iter().partition(|fence| nodes.iter().any(|node| node.node.as_ref() == Some(&fence.node)));
    let said = |fences: Vec<&FenceView>| fences.into_iter().map(ToString::to_string).collect::<Vec<_>>();
    let (fenced, notes) = (said(fenced), [said(notes), detours(&nodes)].concat());
    let problems: Vec<String> = [unwell(&nodes), fenced, behind(&nodes, due), disagreement(&common)].concat();
    let exit = match problems.is_empty() {
        true => Exit::Ok,
        false if nodes.iter().all(|node| node.seen.is_none()) => Exit::NoConnection,
        false => Exit::Unhealthy,
    };
    let summary = summary(&nodes, &common, &problems);
    let rollouts = rollouts(&nodes);
    let rollouts_waiting = rollouts.iter().filter(|rollout| rollout.status == RolloutStatus::Queued).count();
    let rollout = rollouts.iter().find(|rollout| is_under_way(rollout)).cloned();
    (Report { converged: problems.is_empty(), summary, problems, notes, rollout, rollouts_waiting, nodes }, exit)
}

/// The rollouts as whoever has the newest version sees them; of several, who drives the one under way.
fn rollouts(nodes: &[NodeReport]) -> &[RolloutView] {
    let newest = voices(nodes).max_by_key(|voice| (voice.seen.version, drives(voice.node, &voice.seen.rollouts)));
    newest.map(|voice| voice.seen.rollouts.as_slice()).unwrap_or_default()
}

async fn observe_all(mesh: &mut Mesh) -> Vec<NodeReport> {
    join_all(mesh.clients.iter_mut().map(|client| async {
        let seen = observe(client).await;
        let (node, seen, error) = match seen {
            Ok((node, seen)) => (Some(node), Some(seen), None),
            Err(error) => (client.target.node.clone(), None, Some(error)),
        };
        let error = error.map(|error| match error {
            CallError::NoConnection { why, .. } => why,
            other => other.to_string(),
        });
        NodeReport { endpoint: client.target.endpoint.to_string(), node, error, seen }
    }))
    .await
}

async fn observe(client: &mut Client) -> Result<(NodeId, Seen), CallError> {
    let Routing { node, slot, version, state_hash, txid, members, routes, lease, fenced, open } = client.get("/routing").await?;
    let peers: Peers = client.get("/peers").await?;
    let health: Health = client.get("/health").await?;
    let rollouts = client.get::<RolloutList>("/rollouts").await.map(|list| list.rollouts).unwrap_or_default();
    let ready = client.send(Method::GET, "/readyz", Bytes::new()).await?.status.is_success();
    let Health { status, reasons, .. } = health;
    let Peers { incarnation, peers: links, .. } = peers;
    let seen = Seen {
        ready,
        health: status,
        reasons,
        incarnation,
        slot,
        version,
        state_hash,
        txid,
        members,
        routes,
        links,
        lease,
        fenced,
        open,
        rollouts,
    };
    Ok((node, seen))
}

/// The others know who should be at an address that does not answer.
fn name_the_silent(nodes: &mut [NodeReport]) {
    let known: BTreeMap<String, NodeId> = nodes
        .iter()
        .filter_map(|node| node.seen.as_ref())
        .flat_map(|seen| seen.links.iter().map(|peer| (peer.data.clone(), peer.node.clone())))
        .collect();
    for silent in nodes.iter_mut().filter(|node| node.node.is_none()) {
        silent.node = known.get(&silent.endpoint).cloned();
    }
}

/// The highest slot that all have decided, and each one's hash there; fewer of them where a node does not keep that slot any more.
async fn common_hashes(mesh: &mut Mesh, nodes: &[NodeReport]) -> (Slot, BTreeMap<NodeId, StateHash>) {
    let slot = voices(nodes).map(|voice| voice.seen.slot).min().unwrap_or(0);
    let asked = mesh.clients.iter_mut().zip(nodes).map(|(client, report)| async move {
        let (node, seen) = (report.node.clone()?, report.seen.as_ref()?);
        if seen.slot == slot {
            return Some((node, seen.state_hash));
        }
        let history: History = client.get(&format!("/history?from={slot}&limit=1")).await.ok()?;
        let entry = history.decisions.first().filter(|entry| entry.slot == slot)?;
        Some((node, entry.state_hash))
    });
    (slot, join_all(asked).await.into_iter().flatten().collect())
}

fn voices(nodes: &[NodeReport]) -> impl Iterator<Item = Voice<'_>> {
    nodes.iter().filter_map(|report| Some(Voice { node: report.node.as_ref()?, seen: report.seen.as_ref()? }))
}

fn unwell(nodes: &[NodeReport]) -> Vec<String> {
    let mut problems = Vec::new();
    for report in nodes {
        if let Some(error) = &report.error {
            let name = report.node.as_ref().map_or_else(|| report.endpoint.clone(), |node| format!("{node} ({})", report.endpoint));
            problems.push(format!("{name} cannot be reached: {error}"));
        }
    }
    for Voice { node, seen } in voices(nodes) {
        if seen.health == HealthWord::Degraded {
            problems.push(format!("{node} is degraded: {}", seen.reasons.join("; ")));
        } else if !seen.ready {
            problems.push(format!("{node} is not ready; see /readyz?verbose there"));
        }
    }
    problems
}

/// The members that a majority has fenced, each once, by whoever knows of the most who have.
fn fences(nodes: &[NodeReport]) -> Vec<&FenceView> {
    let mut fences: BTreeMap<&NodeId, &FenceView> = BTreeMap::new();
    for fence in voices(nodes).flat_map(|voice| &voice.seen.fenced).filter(|fence| fence.majority) {
        let known = fences.entry(&fence.node).or_insert(fence);
        if known.by.len() < fence.by.len() {
            *known = fence;
        }
    }
    fences.into_values().collect()
}

/// The links that are refused or go over a third node, with the reason.
fn detours(nodes: &[NodeReport]) -> Vec<String> {
    let detour = |node: &NodeId, peer: &PeerView| match (peer.link, peer.reason.as_deref()) {
        (LinkWord::Refused, Some(reason)) => Some(format!("{node} has no link to {}: {reason}", peer.node)),
        (LinkWord::Relayed, Some(reason)) => Some(format!("{node} reaches {} {reason}", peer.node)),
        _ => None,
    };
    voices(nodes).flat_map(|voice| voice.seen.links.iter().filter_map(move |peer| detour(voice.node, peer))).collect()
}

fn behind(nodes: &[NodeReport], due: Slot) -> Vec<String> {
    let late = voices(nodes).filter(|voice| voice.seen.slot < due);
    late.map(|Voice { node, seen }| format!("{node} is behind: at slot {}, and others are at {due}", seen.slot)).collect()
}

fn disagreement((slot, hashes): &(Slot, BTreeMap<NodeId, StateHash>)) -> Vec<String> {
    let camps = camps(hashes);
    if camps.len() < 2 {
        return Vec::new();
    }
    let told = camps.iter().map(|(hash, nodes)| format!("{} at {}", listed(nodes), hash.short()));
    let told = told.collect::<Vec<_>>().join(", ");
    vec![format!("the nodes disagree about slot {slot}: {told}. Keep every log, and compare them with canary-mesh log dump")]
}

/// Who holds which hash, the largest camp first.
fn camps(hashes: &BTreeMap<NodeId, StateHash>) -> Vec<(StateHash, Vec<&NodeId>)> {
    let mut camps: BTreeMap<StateHash, Vec<&NodeId>> = BTreeMap::new();
    for (node, hash) in hashes {
        camps.entry(*hash).or_default().push(node);
    }
    let mut camps: Vec<_> = camps.into_iter().collect();
    camps.sort_by_key(|(_, nodes)| std::cmp::Reverse(nodes.len()));
    camps
}

/// The sentence under the table.
fn summary(nodes: &[NodeReport], (slot, hashes): &(Slot, BTreeMap<NodeId, StateHash>), problems: &[String]) -> String {
    if !problems.is_empty() {
        return counted(problems.len() as u64, "problem");
    }
    let Some(first) = voices(nodes).next() else { return "no node was asked".into() };
    let count = voices(nodes).count();
    let members = first.seen.members.len();
    let who = match (count, members) {
        (1, _) => format!("{} is well", first.node),
        (all, members) if all >= members => format!("all {all} nodes agree"),
        (some, _) => format!("{some} nodes agree"),
    };
    let rest = if count < members { format!(" ({count} of {members} members asked)") } else { String::new() };
    if voices(nodes).any(|voice| voice.seen.slot != *slot) {
        let compared = if hashes.len() < count { " as far as it is kept" } else { "" };
        return format!("{who}{rest} up to slot {slot}{compared}; later ones are being decided");
    }
    format!("{who}{rest}: version {}, slot {slot}, hash {}", first.seen.version, first.seen.state_hash.short())
}

fn print(report: &Report, console: &mut Console<'_>) {
    let camps: BTreeMap<_, _> = voices(&report.nodes).map(|voice| (voice.node.clone(), voice.seen.state_hash)).collect();
    let usual = self::camps(&camps).first().map(|(hash, _)| *hash);
    let header = ["node", "endpoint", "state", "start", "head", "version", "hash", "lease", "routes", "links", "open"];
    console.table(&header, report.nodes.iter().map(|node| row(node, usual)));
    if let Some(rollout) = &report.rollout {
        console.line(&console.toned(tone(rollout.status), rollout::summary(rollout)));
    }
    if report.rollouts_waiting > 0 {
        let wait = if report.rollouts_waiting == 1 { "waits" } else { "wait" };
        console.line(&format!("{} {wait} for the turn", counted(report.rollouts_waiting as u64, "rollout")));
    }
    for note in &report.notes {
        console.line(&console.toned(Tone::Doubt, note));
    }
    for problem in &report.problems {
        let problem = console.toned(Tone::Bad, problem);
        console.line(&problem);
    }
    let tone = if report.converged { Tone::Good } else { Tone::Bad };
    console.line(&console.toned(tone, &report.summary));
}

fn row(report: &NodeReport, usual: Option<StateHash>) -> Vec<Field> {
    let mut row = vec![Field::maybe(report.node.as_ref()), Field::text(&report.endpoint)];
    let Some(seen) = &report.seen else {
        row.push(Field::text("unreachable").toned(Tone::Bad));
        row.extend(std::iter::repeat_with(|| Field::maybe(None::<&str>)).take(8));
        return row;
    };
    let learner = report.node.as_ref().is_some_and(|node| !seen.members.contains(node));
    let state = match (seen.health, seen.ready) {
        _ if learner => Field::text("learner").toned(Tone::Doubt),
        (HealthWord::Ok, true) => Field::text("ready").toned(Tone::Good),
        (HealthWord::Ok, false) => Field::text("not ready").toned(Tone::Doubt),
        (HealthWord::Degraded, true) => Field::text("degraded").toned(Tone::Doubt),
        (HealthWord::Degraded, false) => Field::text("degraded, not ready").toned(Tone::Bad),
    };
    let hash = Field::text(seen.state_hash.short());
    let open = seen.open.as_ref().map(|open| {
        let what = open.txid.as_ref().map_or_else(|| "open".to_owned(), ToString::to_string);
        format!("{what} in slot {} for {} ms", open.slot, open.since_ms)
    });
    row.extend([
        state,
        Field::number(seen.incarnation),
        Field::number(seen.slot),
        Field::number(seen.version),
        if Some(seen.state_hash) == usual { hash } else { hash.toned(Tone::Doubt) },
        Field::lease(seen.lease),
        Field::text(seen.routes.iter().map(route_text).collect::<Vec<_>>().join("; ")),
        links_field(&seen.links),
        Field::maybe(open),
    ]);
    row
}

/// `default: digits-v1 90 / digits-v2 10`.
fn route_text((name, route): (&RouteName, &RouteView)) -> String {
    let RouteView { stable_model_id, weights, .. } = route;
    match &route.canary_model_id {
        Some(canary) => format!("{name}: {stable_model_id} {} / {canary} {}", weights.stable, weights.canary),
        None => format!("{name}: {stable_model_id} {}", weights.stable),
    }
}

/// `2/2 up`, and the others by name.
fn links_field(links: &[PeerView]) -> Field {
    // Reasons would make the table too wide: they are told below it.
    let word = |peer: &PeerView| match peer.link {
        LinkWord::Up => None,
        LinkWord::Down => Some(format!("{} down", peer.node)),
        LinkWord::Cut => Some(format!("{} cut", peer.node)),
        LinkWord::Refused => Some(format!("{} refused", peer.node)),
        LinkWord::Relayed => Some(format!("{} relayed", peer.node)),
    };
    let others: Vec<String> = links.iter().filter_map(word).collect();
    let up = links.len() - others.len();
    let text = [format!("{up}/{} up", links.len())].into_iter().chain(others.clone()).collect::<Vec<_>>().join(", ");
    if others.is_empty() { Field::text(text) } else { Field::text(text).toned(Tone::Doubt) }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};

    use super::*;
    use crate::cli::Surroundings;
    use crate::cli::testing::{Fake, Story, nobody, ran, ran_in, story};

    fn status(nodes: &[&Fake], more: &str) -> crate::cli::testing::Ran {
        let endpoints: String = nodes.iter().map(|node| format!(" --endpoint {}", node.address)).collect();
        ran(&format!("canary-mesh status{endpoints} {more}"))
    }

    fn three(change: impl Fn(&mut Story)) -> [Fake; 3] {
        ["node-a", "node-b", "node-c"].map(|node| {
            let mut story = story(node);
            change(&mut story);
            story.start()
        })
    }

    #[test]
    fn nodes_that_agree_are_shown_and_said_to() {
        let [a, b, c] = three(|story| (story.canary, story.weight) = (Some("digits-v2".into()), 12.5));
        let shown = status(&[&a, &b, &c], "");
        assert_eq!(shown.exit, Exit::Ok, "{shown:?}");
        assert_eq!(shown.out.lines().last(), Some("all 3 nodes agree: version 4, slot 4, hash 04040404"));
        let row = shown.out.lines().nth(2).unwrap();
        for part in ["node-b", &b.address, "ready", "04040404", "default: digits-v1 87.5 / digits-v2 12.5", "2/2 up"] {
            assert!(row.contains(part), "{part:?} in {row:?}");
        }
        let json = status(&[&a, &b, &c], "--output json").json();
        assert_eq!((&json["converged"], &json["nodes"][2]["node"]), (&true.into(), &"node-c".into()));
        assert_eq!(status(&[&a], "").out.lines().last(), Some("node-a is well (1 of 3 members asked): version 4, slot 4, hash 04040404"));
    }

    #[test]
    fn a_node_that_is_not_there_is_named_by_the_others() {
        let gone = nobody();
        let [a, b, _] = three(|story| story.others[1] = gone.clone());
        let shown = ran(&format!("canary-mesh status --endpoint {} --endpoint {} --endpoint {gone}", a.address, b.address));
        assert_eq!(shown.exit, Exit::Unhealthy);
        assert!(shown.out.contains(&format!("node-c ({gone}) cannot be reached: Connection refused")), "{}", shown.out);
        assert!(shown.out.lines().nth(3).unwrap().contains("unreachable"), "{}", shown.out);
        assert_eq!(ran(&format!("canary-mesh status --endpoint {gone}")).exit, Exit::NoConnection);
    }

    #[test]
    fn a_node_that_is_behind_does_not_disagree() {
        let [a, b, c] = three(|story| story.slot = if story.node == "node-b" { 3 } else { 5 });
        let shown = status(&[&a, &b, &c], "");
        assert_eq!(shown.exit, Exit::Unhealthy);
        assert!(shown.out.contains("node-b is behind: at slot 3, and others are at 5"), "{}", shown.out);
        assert!(!shown.out.contains("disagree"), "{}", shown.out);
        assert!(a.asked().contains(&"GET /history?from=3&limit=1".to_owned()));
    }

    #[test]
    fn a_node_with_another_hash_at_the_common_slot_disagrees() {
        let [a, b, c] = three(|story| match story.node {
            "node-a" => story.slot = 5,
            "node-c" => story.hash = |_| 0xcc,
            _ => {}
        });
        let shown = status(&[&a, &b, &c], "");
        assert_eq!(shown.exit, Exit::Unhealthy);
        assert!(shown.out.contains("the nodes disagree about slot 4: node-a, node-b at 04040404, node-c at cccccccc"), "{}", shown.out);
    }

    #[test]
    fn a_degraded_node_and_one_that_is_not_ready_are_not_well() {
        let [a, b, c] = three(|story| match story.node {
            "node-a" => (story.degraded, story.links) = (Some("no lease"), ["down", "cut"]),
            "node-b" => (story.ready, story.links) = (false, ["up", "relayed"]),
            _ => {}
        });
        let shown = status(&[&a, &b, &c], "");
        assert_eq!(shown.exit, Exit::Unhealthy);
        for said in [
            "node-a is degraded: no lease",
            "node-b is not ready",
            "0/2 up, node-b down, node-c cut",
            "1/2 up, node-c relayed",
            "2 problems",
        ] {
            assert!(shown.out.contains(said), "{said:?} in {}", shown.out);
        }
    }

    #[test]
    fn a_node_that_is_not_a_member_is_shown_as_a_learner() {
        let learner = story("node-d").start();
        let [a, b, c] = three(|_| {});
        let shown = status(&[&a, &b, &c, &learner], "");
        let states: Vec<_> = shown.out.lines().skip(1).take(4).map(|line| line.split_whitespace().nth(2).unwrap()).collect();
        assert_eq!(states, ["ready", "ready", "ready", "learner"], "{}", shown.out);
    }

    #[test]
    fn a_node_without_a_lease_is_shown_and_a_fenced_member_is_a_problem_said_once() {
        let [a, b, c] = three(|story| match story.node {
            "node-c" => story.lease_ms = 0,
            "node-a" => story.fenced = vec![("node-c", &["node-a"], false)],
            _ => story.fenced = vec![("node-c", &["node-a", "node-b"], true)],
        });
        let shown = status(&[&a, &b, &c], "");
        assert_eq!(shown.exit, Exit::Unhealthy);
        let lease = |line: usize| shown.out.lines().nth(line).unwrap().split_whitespace().skip(6).take(2).collect::<Vec<_>>().join(" ");
        assert_eq!((lease(1).as_str(), lease(3).as_str()), ("04040404 5.9", "04040404 none"), "{}", shown.out);
        let problem = "node-c is fenced by node-a, node-b: until it has caught up it serves stable, and an advance goes on without its vote unless advance_votes is all";
        assert!(shown.out.contains(&format!("\n{problem}\n1 problem\n")), "{}", shown.out);
        let json = status(&[&a, &b, &c], "--output json").json();
        assert_eq!(json["nodes"][2]["lease"], serde_json::json!({"held": false, "remaining_ms": 0}));
        assert_eq!(json["nodes"][1]["fenced"][0]["by"], serde_json::json!(["node-a", "node-b"]));
        let others = status(&[&a, &b], "");
        assert_eq!(others.exit, Exit::Ok, "those that were asked are well");
        assert!(others.out.contains(&format!("\n{problem}\n2 nodes agree (2 of 3 members asked)")), "{}", others.out);
    }

    #[test]
    fn a_server_that_is_no_node_is_told_apart() {
        let stranger = Fake::start(|_, _, _| crate::cli::testing::Reply::Answer(200, Vec::new(), "<html>hello".into()));
        let shown = status(&[&stranger], "");
        assert!(shown.out.contains("not a canary-mesh node's") && shown.out.contains("<html>hello"), "{}", shown.out);
    }

    #[test]
    fn a_rollout_under_way_and_those_that_wait_are_shown_under_the_table() {
        use crate::cli::testing::rollout;
        let [a, b, c] = three(|story| {
            let mut now = rollout("running", Some(1), Some("node-b"));
            if story.node != "node-b" {
                now["waits_for"] = serde_json::Value::Null;
            }
            story.rollouts = vec![rollout("rolled_back", None, None), now, rollout("queued", None, None), rollout("queued", None, None)];
        });
        let shown = status(&[&a, &b, &c], "");
        let said = "\nrollout r7 (default: digits-v1 → digits-v2) is running at 10 % (step 2 of 3), driven by node-b: the end of its bake\n\
                    2 rollouts wait for the turn\nall 3 nodes agree";
        assert!(shown.out.contains(said), "{}", shown.out);
        let json = status(&[&a, &b, &c], "--output json").json();
        assert_eq!((&json["rollout"]["id"], &json["rollouts_waiting"]), (&"r7".into(), &2.into()));
        let old = Fake::start({
            let story = std::sync::Mutex::new(story("node-a"));
            move |method, path, body| match path {
                "/rollouts" => crate::cli::testing::refusal(404, "not_found", "there is no such resource here"),
                _ => story.lock().unwrap().reply(method, path, body),
            }
        });
        assert_eq!(status(&[&old], "").exit, Exit::Ok, "a node that knows nothing of rollouts is as well as it was");
    }

    #[test]
    fn a_terminal_gets_one_picture_over_the_other() {
        let node = story("node-a").start();
        let line = format!("canary-mesh status -w --endpoint {} --no-color", node.address);
        let (mut out, mut err) = (Pictures(Vec::new(), 2), Vec::new());
        let terminal = Surroundings { stdout_terminal: true, ..Surroundings::default() };
        assert_eq!(crate::cli::run(line.split(' ').map(Into::into), &terminal, &mut out, &mut err), Exit::Ok);
        let text = String::from_utf8(out.0).unwrap();
        let pictures: Vec<_> = text.split("\x1b[H").skip(1).collect();
        assert_eq!(pictures.len(), 2, "{text:?}");
        assert!(pictures[0].starts_with("\x1b[2Jnode "), "the first one wipes the screen: {text:?}");
        assert!(pictures[1].starts_with("node ") && pictures[1].ends_with("\x1b[K\n\x1b[J"), "the next one only what is left: {text:?}");
    }

    /// A reader who leaves after some pictures.
    struct Pictures(Vec<u8>, usize);

    impl Write for Pictures {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if bytes.starts_with(b"\x1b[H") {
                self.1 = self.1.checked_sub(1).ok_or(io::ErrorKind::BrokenPipe)?;
            }
            self.0.extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A reader who leaves after some lines.
    struct Leaves(usize);

    impl Write for Leaves {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 = self.0.checked_sub(1).ok_or(io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn watching_goes_on_until_the_reader_leaves() {
        let node = story("node-a").start();
        let (mut out, mut err) = (Leaves(6), Vec::new());
        let line = format!("canary-mesh status -w --endpoint {}", node.address);
        let exit = crate::cli::run(line.split(' ').map(Into::into), &Surroundings::default(), &mut out, &mut err);
        assert_eq!((exit, String::from_utf8(err).unwrap()), (Exit::Ok, String::new()));
        assert!(node.asked().iter().filter(|line| *line == "GET /routing").count() >= 2);
    }

    #[test]
    fn a_terminal_gets_colours_and_no_color_takes_them_away() {
        let node = story("node-a").start();
        let line = format!("canary-mesh status --endpoint {}", node.address);
        let terminal = Surroundings { stdout_terminal: true, ..Surroundings::default() };
        assert!(ran_in(&line, &terminal).out.contains("\x1b["));
        assert!(!ran_in(&format!("{line} --no-color"), &terminal).out.contains("\x1b["));
        assert!(!ran_in(&line, &Surroundings { no_color: true, ..terminal }).out.contains("\x1b["));
    }
}
