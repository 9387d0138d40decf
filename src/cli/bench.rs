//! `bench commit`: how long a decision takes on this mesh, and how much of that is the disk.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use async_std::task;
use bytes::Bytes;
use http::Method;
use serde::Serialize;

use crate::api::{Outcome, PercentBp, Receipt, RouteChangeRequest, Routing, TransactionRequest};
use crate::cli::args::BenchCommitArgs;
use crate::cli::client::{CallError, Client, Mesh, within};
use crate::cli::interrupt::Interrupt;
use crate::cli::latency::{Latencies, Quantiles};
use crate::cli::output::{Console, Field, Tone, counted, milliseconds};
use crate::cli::propose::{route_of, with_canary};
use crate::cli::{Exit, Failure, Surroundings, receipt};
use crate::core::ids::{ModelId, NodeId, Slot};
use crate::core::state::Kind;

/// The two shares that the canary goes to and fro between.
const SHARES: [PercentBp; 2] = [PercentBp(100), PercentBp(200)];
/// Failures in a row after which the rest is not tried.
const FAILURES_IN_A_ROW_MAX: u64 = 10;
/// How long the next node may take to learn of the last commit, in milliseconds. It is not part of any commit's time.
const CATCH_UP_MS_MAX: u64 = 1_000;
/// Between two looks at whether it has, in milliseconds.
const CATCH_UP_POLL_MS: u64 = 1;
/// Attempts to take the canary away at the end: another transaction may hold the slot.
const CLEAN_UP_ATTEMPTS_MAX: usize = 5;
/// Between two of these attempts, in milliseconds.
const CLEAN_UP_PAUSE_MS: u64 = 500;
/// The nodes' counters of what they spent in fdatasync.
const SYNC_SECONDS: &str = "canary_mesh_wal_sync_seconds_sum";
/// How often they did.
const SYNC_COUNT: &str = "canary_mesh_wal_sync_seconds_count";

/// What `bench commit --output json` prints.
#[derive(Serialize)]
struct Report {
    commits: u64,
    failed: u64,
    /// The whole run, with the waits for the next node to have heard of the last commit.
    elapsed_s: f64,
    commits_per_s: f64,
    /// As the caller sees it: from sending the request to having read the receipt.
    latency: Option<Quantiles>,
    failures: BTreeMap<String, u64>,
    nodes: Vec<NodeReport>,
}

/// What one node did during the run.
#[derive(Serialize)]
struct NodeReport {
    node: NodeId,
    /// Null where the node does not tell.
    syncs: Option<u64>,
    sync_ms_mean: Option<f64>,
    /// Of the time that the proposals took, in percent.
    sync_percent: Option<f64>,
}

/// A node's sync counters at one moment.
#[derive(Clone, Copy)]
struct Syncs {
    seconds: f64,
    count: f64,
}

/// Sets a canary, moves it to and fro, and takes it away again.
pub async fn commit(args: &BenchCommitArgs, mut mesh: Mesh, around: &Surroundings, console: &mut Console<'_>) -> Result<Exit, Failure> {
    check(args, &mut mesh).await?;
    let interrupt = Interrupt::listen(around);
    let set = change(args, Some(Some(args.canary.clone())), Some(SHARES[0]), Kind::Advance);
    let Some(first) = mesh.clients.first_mut() else { return Err(Failure::usage("no node was named")) };
    let begun = receipt::send::<Receipt>(first, "/transactions", &set).await;
    let measured = match begun {
        Ok(receipt) if receipt.outcome == Outcome::Committed => measure(args, &mut mesh, receipt.slot, &interrupt).await,
        Ok(receipt) => Err(Failure::refused(format!("the canary could not be set: {}", reason(&receipt)))),
        // Nothing was set if nothing was sent or it was refused; after any other failure it may have been.
        Err(error @ (CallError::NoConnection { .. } | CallError::Refused { .. })) => return Err(error.into()),
        Err(error) => Err(error.into()),
    };
    let cleaned = clean_up(args, &mut mesh).await;
    let report = measured?;
    console.data(&report, |console| print(&report, console));
    cleaned?;
    Ok(if report.failed > 0 || interrupt.came() { Exit::Refused } else { Exit::Ok })
}

/// Every node must answer, and the route must be free.
async fn check(args: &BenchCommitArgs, mesh: &mut Mesh) -> Result<(), Failure> {
    for client in &mut mesh.clients {
        let routing: Routing = client.get("/routing").await?;
        let route = route_of(&routing, &args.route)?;
        if let Some(canary) = &route.canary_model_id {
            let message = format!(
                "route {} has the canary {canary} at {} already, and this needs the route for itself; take it away first: canary-mesh rollback --route {}",
                args.route, routing.node, args.route
            );
            return Err(Failure::refused(message));
        }
        client.target.node = Some(routing.node);
    }
    Ok(())
}

fn change(args: &BenchCommitArgs, canary_model_id: Option<Option<ModelId>>, share: Option<PercentBp>, kind: Kind) -> TransactionRequest {
    let change = RouteChangeRequest { stable_model_id: None, canary_model_id, weights: share.map(with_canary) };
    TransactionRequest { kind, changes: [(args.route.clone(), change)].into(), idempotency_key: None }
}

async fn measure(args: &BenchCommitArgs, mesh: &mut Mesh, mut head: Option<Slot>, interrupt: &Interrupt) -> Result<Report, Failure> {
    let before = all_syncs(mesh).await;
    let mut latencies = Latencies::default();
    let mut failures = BTreeMap::<String, u64>::new();
    let (mut commits, mut failed, mut failed_in_a_row) = (0, 0, 0);
    let [low, high] = SHARES;
    let mut share = low;
    let mut proposing = Duration::ZERO;
    let began = Instant::now();
    let nodes = mesh.clients.len() as u64;
    for turn in 0..args.count {
        if interrupt.came() || failed_in_a_row == FAILURES_IN_A_ROW_MAX {
            break;
        }
        let Some(client) = mesh.clients.get_mut((turn % nodes) as usize) else { break };
        let next = if share == low { high } else { low };
        catch_up(client, head).await;
        let sent = Instant::now();
        let answer = receipt::send::<Receipt>(client, "/transactions", &change(args, None, Some(next), Kind::Advance)).await;
        let took = sent.elapsed();
        proposing += took;
        match answer {
            Ok(receipt) if receipt.outcome == Outcome::Committed => {
                latencies.record(took);
                head = receipt.slot;
                (share, commits, failed_in_a_row) = (next, commits + 1, 0);
                continue;
            }
            Ok(receipt) => *failures.entry(reason(&receipt)).or_default() += 1,
            Err(error) => *failures.entry(error.to_string()).or_default() += 1,
        }
        (failed, failed_in_a_row) = (failed + 1, failed_in_a_row + 1);
        share = present_share(args, mesh).await.unwrap_or(share);
    }
    let elapsed = began.elapsed();
    let after = all_syncs(mesh).await;
    let nodes = mesh.clients.iter().zip(before.into_iter().zip(after));
    Ok(Report {
        commits,
        failed,
        elapsed_s: elapsed.as_secs_f64(),
        commits_per_s: commits as f64 / elapsed.as_secs_f64().max(f64::MIN_POSITIVE),
        latency: latencies.quantiles(),
        failures,
        nodes: nodes.filter_map(|(client, (before, after))| node_report(client, before, after, proposing)).collect(),
    })
}

/// Waits until this node knows the last commit: it checks a proposal against the state it has, and would refuse one that fits the next.
async fn catch_up(client: &mut Client, head: Option<Slot>) {
    let Some(head) = head else { return };
    let asking = async {
        while client.get::<Routing>("/routing").await.is_ok_and(|routing| routing.slot < head) {
            task::sleep(Duration::from_millis(CATCH_UP_POLL_MS)).await;
        }
    };
    let _ = within(Duration::from_millis(CATCH_UP_MS_MAX), asking).await;
}

/// The share after a failure: the transaction may have committed all the same.
async fn present_share(args: &BenchCommitArgs, mesh: &mut Mesh) -> Option<PercentBp> {
    let (_, routing) = mesh.ask::<Routing>("/routing").await.ok()?;
    routing.routes.get(&args.route).map(|route| route.weights.canary)
}

/// Takes the canary away, whatever happened before.
async fn clean_up(args: &BenchCommitArgs, mesh: &mut Mesh) -> Result<(), Failure> {
    let mut last = String::new();
    for attempt in 0..CLEAN_UP_ATTEMPTS_MAX {
        if attempt > 0 {
            task::sleep(Duration::from_millis(CLEAN_UP_PAUSE_MS)).await;
        }
        match take_away(args, mesh).await {
            Ok(()) => return Ok(()),
            Err(why) => last = why,
        }
    }
    let message = format!(
        "the canary {} could not be taken away again ({last}); do it by hand: canary-mesh propose --route {} --no-canary",
        args.canary, args.route
    );
    Err(Failure::refused(message))
}

async fn take_away(args: &BenchCommitArgs, mesh: &mut Mesh) -> Result<(), String> {
    let (client, routing) = mesh.ask::<Routing>("/routing").await.map_err(|failure| failure.message)?;
    let canary = routing.routes.get(&args.route).and_then(|route| route.canary_model_id.as_ref());
    if canary != Some(&args.canary) {
        return Ok(());
    }
    match receipt::send::<Receipt>(client, "/transactions", &change(args, Some(None), None, Kind::Reduce)).await {
        Ok(receipt) if receipt.outcome == Outcome::Committed => Ok(()),
        Ok(receipt) => Err(reason(&receipt)),
        Err(error) => Err(error.to_string()),
    }
}

/// Why it did not commit, without what is different each time.
fn reason(receipt: &Receipt) -> String {
    let reason = receipt.reason.clone().unwrap_or_else(|| receipt.outcome.to_string());
    receipt.error_code.as_ref().map_or(reason.clone(), |code| format!("{code}: {reason}"))
}

async fn all_syncs(mesh: &mut Mesh) -> Vec<Option<Syncs>> {
    futures::future::join_all(mesh.clients.iter_mut().map(syncs)).await
}

async fn syncs(client: &mut Client) -> Option<Syncs> {
    let answer = client.send(Method::GET, "/metrics", Bytes::new()).await.ok()?;
    let text = std::str::from_utf8(&answer.body).ok()?;
    Some(Syncs { seconds: metric(text, SYNC_SECONDS)?, count: metric(text, SYNC_COUNT)? })
}

/// The sum over a metric's samples in the Prometheus text format.
fn metric(text: &str, name: &str) -> Option<f64> {
    let value = |line: &str| {
        let rest = line.strip_prefix(name)?;
        let rest = if rest.starts_with('{') { rest.rsplit_once('}')?.1 } else { rest };
        rest.strip_prefix(' ')?.split(' ').next()?.parse::<f64>().ok()
    };
    text.lines().filter_map(value).reduce(|sum, value| sum + value)
}

fn node_report(client: &Client, before: Option<Syncs>, after: Option<Syncs>, proposing: Duration) -> Option<NodeReport> {
    let spent = before.zip(after).map(|(before, after)| (after.seconds - before.seconds, after.count - before.count));
    Some(NodeReport {
        node: client.target.node.clone()?,
        syncs: spent.map(|(_, count)| count as u64),
        sync_ms_mean: spent.filter(|(_, count)| *count > 0.0).map(|(seconds, count)| seconds * 1_000.0 / count),
        sync_percent: spent.map(|(seconds, _)| seconds * 100.0 / proposing.as_secs_f64().max(f64::MIN_POSITIVE)),
    })
}

fn print(report: &Report, console: &mut Console<'_>) {
    let Report { commits, failed, elapsed_s, commits_per_s, .. } = report;
    console.line(&format!("{} in {elapsed_s:.2} s ({commits_per_s:.1} per second), {failed} failed", counted(*commits, "commit")));
    if let Some(Quantiles { p50_ms, p99_ms, max_ms }) = report.latency {
        let [p50, p99, max] = [p50_ms, p99_ms, max_ms].map(milliseconds);
        console.line(&format!("commit: p50 {p50} ms, p99 {p99} ms, max {max} ms"));
    }
    for (why, count) in &report.failures {
        console.line(&console.toned(Tone::Bad, format!("{count} x {why}")));
    }
    let decimals = |value: Option<f64>| value.map(|value| format!("{value:.2}"));
    let row = |node: &NodeReport| {
        let commits = *commits as f64;
        let per_commit = node.syncs.filter(|_| commits > 0.0).map(|syncs| syncs as f64 / commits);
        vec![
            Field::text(&node.node),
            number(node.syncs),
            number(decimals(per_commit)),
            number(decimals(node.sync_ms_mean)),
            number(decimals(node.sync_percent)),
        ]
    };
    console.table(&["node", "syncs", "per commit", "mean ms", "% of commit time"], report.nodes.iter().map(row));
}

fn number(value: Option<impl ToString>) -> Field {
    Field::number(value.map_or_else(|| "-".to_owned(), |value| value.to_string()))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use serde_json::json;

    use super::*;
    use crate::cli::testing::{Fake, Ran, Reply, Story, answer, nobody, ran, receipt, refusal, story};

    fn bench(nodes: &[&Fake], words: &str) -> Ran {
        let endpoints: String = nodes.iter().map(|node| format!(" --endpoint {}", node.address)).collect();
        ran(&format!("canary-mesh bench commit --canary digits-v2{endpoints} {words}"))
    }

    /// Two nodes that share one story, as a mesh does; `spoil` may answer a proposal before the story does.
    fn two(spoil: impl Fn(u64) -> Option<Reply> + Send + Sync + Copy + 'static) -> ([Fake; 2], Arc<Mutex<Story>>) {
        let shared = Arc::new(Mutex::new(story("node-a")));
        let proposals = Arc::new(Mutex::new(0));
        let nodes = ["node-a", "node-b"].map(|name| {
            let (shared, proposals) = (shared.clone(), proposals.clone());
            Fake::start(move |method, path, body| {
                if method == "POST" {
                    *proposals.lock().unwrap() += 1;
                    if let Some(reply) = spoil(*proposals.lock().unwrap()) {
                        return reply;
                    }
                }
                let mut story = shared.lock().unwrap();
                story.node = name;
                story.reply(method, path, body)
            })
        });
        (nodes, shared)
    }

    #[test]
    fn the_canary_goes_to_and_fro_through_all_nodes_and_the_route_is_left_as_it_was() {
        let ([a, b], shared) = two(|_| None);
        let done = bench(&[&a, &b], "--count 5 --output json");
        assert_eq!(done.exit, Exit::Ok, "{done:?}");
        let report = done.json();
        assert_eq!((&report["commits"], &report["failed"]), (&json!(5), &json!(0)));
        assert_eq!((&report["nodes"][1]["node"], &report["nodes"][1]["syncs"]), (&json!("node-b"), &json!(10)));
        let mean = report["nodes"][0]["sync_ms_mean"].as_f64().unwrap();
        assert!((mean - 0.1).abs() < 1e-6, "{mean}");
        let share = |body: &serde_json::Value| (body["kind"].clone(), body["changes"]["default"]["weights"]["canary"].clone());
        let sent: Vec<_> = a.sent_to("/transactions").iter().map(share).collect();
        let advance = |share: f64| (json!("advance"), json!(share));
        assert_eq!(sent, [advance(1.0), advance(2.0), advance(2.0), advance(2.0), (json!("reduce"), json!(null))]);
        assert_eq!(b.sent_to("/transactions").len(), 2);
        let story = shared.lock().unwrap();
        assert_eq!((&story.canary, story.weight), (&None, 0.0));
    }

    #[test]
    fn a_node_that_has_not_heard_of_the_last_commit_is_waited_for() {
        let shared = Arc::new(Mutex::new(story("node-a")));
        let heard = Arc::new(Mutex::new(4));
        let nodes = ["node-a", "node-b"].map(|name| {
            let (shared, heard) = (shared.clone(), heard.clone());
            Fake::start(move |method, path, body| {
                let mut story = shared.lock().unwrap();
                let mut heard = heard.lock().unwrap();
                story.node = name;
                if name == "node-a" {
                    return story.reply(method, path, body);
                }
                let late = *heard < story.slot;
                match method {
                    "POST" if late => refusal(412, "invalid", "nothing would change"),
                    "GET" if path == "/routing" && late => {
                        let known = Story { slot: *heard, ..story.clone() }.reply(method, path, body);
                        *heard += 1;
                        known
                    }
                    _ => {
                        let reply = story.reply(method, path, body);
                        *heard = story.slot;
                        reply
                    }
                }
            })
        });
        let done = bench(&[&nodes[0], &nodes[1]], "--count 6 --output json");
        assert_eq!((done.exit, &done.json()["commits"], &done.json()["failed"]), (Exit::Ok, &json!(6), &json!(0)), "{done:?}");
    }

    #[test]
    fn failures_are_counted_by_reason_and_the_route_is_left_as_it_was() {
        let ([a, b], shared) = two(|proposal| {
            let mut busy = receipt("aborted", 9);
            (busy["error_code"], busy["reason"]) = ("busy".into(), "node-b-1-1 holds the slot".into());
            (proposal == 3 || proposal == 4).then(|| answer(409, &busy))
        });
        let done = bench(&[&a, &b], "--count 6");
        assert_eq!(done.exit, Exit::Refused);
        for said in ["4 commits in", "2 failed", "2 x busy: node-b-1-1 holds the slot", "commit: p50", "% of commit time"] {
            assert!(done.out.contains(said), "{said:?} in {}", done.out);
        }
        assert_eq!(shared.lock().unwrap().canary, None);
    }

    #[test]
    fn a_mesh_that_fails_all_the_time_ends_it_early() {
        let ([a, b], shared) = two(|proposal| (2..=11).contains(&proposal).then_some(Reply::Break));
        let done = bench(&[&a, &b], "--count 1000 --output json");
        assert_eq!((done.exit, &done.json()["failed"]), (Exit::Refused, &json!(FAILURES_IN_A_ROW_MAX)), "{done:?}");
        assert_eq!(shared.lock().unwrap().canary, None);
    }

    #[test]
    fn a_canary_that_could_not_be_taken_away_is_said_with_what_to_do() {
        let ([a, b], _) = two(|proposal| (proposal > 2).then_some(Reply::Break));
        let done = bench(&[&a, &b], "--count 1");
        assert_eq!(done.exit, Exit::Refused);
        assert!(done.err.contains("canary-mesh propose --route default --no-canary"), "{}", done.err);
        assert!(done.out.contains("1 commit in"), "{}", done.out);
    }

    #[test]
    fn a_route_in_use_an_unknown_one_and_a_missing_node_are_refused_before_anything_is_sent() {
        let mut taken = story("node-a");
        taken.canary = Some("digits-v3".into());
        let taken = taken.start();
        let refused = bench(&[&taken], "");
        assert_eq!(refused.exit, Exit::Refused);
        assert!(refused.err.contains("has the canary digits-v3") && refused.err.contains("canary-mesh rollback"), "{}", refused.err);
        let free = story("node-a").start();
        assert_eq!(bench(&[&free], "--route nope").exit, Exit::Refused);
        assert_eq!(
            ran(&format!("canary-mesh bench commit --canary v --endpoint {} --endpoint {}", free.address, nobody())).exit,
            Exit::NoConnection
        );
        assert!(free.sent_to("/transactions").is_empty() && taken.sent_to("/transactions").is_empty());
    }

    #[test]
    fn a_metric_is_the_sum_of_its_samples_and_of_no_other_name() {
        let text = "# HELP x y\nx 1.5\nx{disk=\"a b\"} 2 1700000000\nx_sum 9\nxx 9\n";
        assert_eq!(metric(text, "x"), Some(3.5));
        assert_eq!(metric(text, "z"), None);
    }
}
