//! `load`: sends requests at a rate that does not wait for the answers, and counts who answered and how well.

mod requests;
mod tally;
mod trace;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_std::task;
use futures::future::join_all;
use http::Method;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::cli::args::LoadArgs;
use crate::cli::client::{Client, Mesh, unreachable};
use crate::cli::interrupt::Interrupt;
use crate::cli::output::{Console, Field, Tone, counted, milliseconds};
use crate::cli::{Exit, Failure, Surroundings};
use requests::Requests;
use tally::{Report, Tally};
use trace::{Moments, Trace};

/// What all connections share.
struct Job {
    requests: Requests,
    path: String,
    rate: f64,
    count: u64,
    nodes: u64,
    began: Instant,
    progress: ProgressBar,
    trace: Option<Trace>,
    /// Requests without a proper answer so far, for the progress bar.
    failed: AtomicU64,
    interrupt: Interrupt,
}

/// One connection, and which turns are its node's.
struct Lane {
    client: Client,
    /// The node's place among the nodes.
    node: u64,
    /// Requests that this node's connections have taken so far.
    taken: Arc<AtomicU64>,
}

/// Sends, shows progress on a terminal, and prints who answered.
pub async fn run(args: &LoadArgs, mesh: Mesh, around: &Surroundings, console: &mut Console<'_>) -> Result<Exit, Failure> {
    let requests = Requests::load(&args.file).map_err(Failure::usage)?;
    let count = args.count.unwrap_or(requests.len() as u64);
    let lanes = connect(mesh, args.connections).await?;
    let trace = args.trace.as_deref().map(Trace::create).transpose().map_err(Failure::usage)?;
    let job = Arc::new(Job {
        requests,
        path: args.path.clone(),
        rate: args.rate,
        count,
        nodes: lanes.iter().map(|lane| lane.node + 1).max().unwrap_or(1),
        began: Instant::now(),
        progress: progress(count, around),
        trace,
        failed: AtomicU64::new(0),
        interrupt: Interrupt::listen(around),
    });
    let tallies = join_all(lanes.into_iter().map(|lane| task::spawn(drive(lane, job.clone())))).await;
    job.progress.finish_and_clear();
    let mut tally = Tally::default();
    tallies.iter().for_each(|other| tally.add(other));
    let report = tally.report(job.began.elapsed());
    console.data(&report, |console| print(&report, console));
    job.trace.as_ref().map_or(Ok(()), Trace::finish).map_err(Failure::refused)?;
    Ok(if report.failed > 0 { Exit::Refused } else { Exit::Ok })
}

/// Connections to every node. One that takes none now is tried again with every request; if no node does, nothing is sent.
async fn connect(mesh: Mesh, connections: usize) -> Result<Vec<Lane>, Failure> {
    let nodes = mesh.clients.len();
    let mut lanes = Vec::new();
    let mut failures = Vec::new();
    for (node, mut first) in (0..).zip(mesh.clients) {
        failures.extend(first.connect().await.err());
        let taken = Arc::new(AtomicU64::new(0));
        let others = (1..connections).map(|_| Client::new(first.target.clone(), mesh.timeout)).collect::<Vec<_>>();
        lanes.extend([first].into_iter().chain(others).map(|client| Lane { client, node, taken: taken.clone() }));
    }
    if failures.len() == nodes { Err(unreachable(&failures)) } else { Ok(lanes) }
}

/// Sends this connection's turns until there are none left.
async fn drive(mut lane: Lane, job: Arc<Job>) -> Tally {
    let mut tally = Tally::default();
    loop {
        let turn = lane.taken.fetch_add(1, Ordering::Relaxed) * job.nodes + lane.node;
        let wait = Duration::try_from_secs_f64(turn as f64 / job.rate).ok();
        let Some(due) = wait.and_then(|wait| job.began.checked_add(wait)).filter(|_| turn < job.count) else { break };
        // A request that waits for a free connection is slow, and its wait counts; a timer that rings late is not its fault.
        let late = due <= Instant::now();
        job.interrupt.sleep_until(due).await;
        if job.interrupt.came() {
            break;
        }
        let sent = Instant::now();
        let request = job.requests.turn(turn);
        let answer = lane.client.send(Method::POST, &job.path, request.body.clone()).await;
        if !answer.as_ref().is_ok_and(|answer| answer.status.is_success()) {
            let failed = job.failed.fetch_add(1, Ordering::Relaxed) + 1;
            job.progress.set_message(format!("({failed} failed)"));
        }
        let answered = Instant::now();
        if let Some(trace) = &job.trace {
            trace.note(&lane.client.target, &answer, Moments { due, sent, answered });
        }
        tally.count(request, &lane.client.target, answer, answered - if late { due } else { sent });
        job.progress.inc(1);
    }
    tally
}

fn progress(count: u64, around: &Surroundings) -> ProgressBar {
    let target = if around.stderr_terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(count), target);
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} requests, {eta} left {msg}");
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar
}

fn print(report: &Report, console: &mut Console<'_>) {
    let header = ["variant", "model", "requests", "share %", "accuracy %", "labels", "errors", "p50 ms", "p99 ms"];
    let row = |variant: &tally::VariantReport| {
        let errors = Field::number(variant.errors);
        vec![
            Field::text(&variant.variant),
            Field::text(&variant.model),
            Field::number(variant.requests),
            Field::number(format!("{:.1}", variant.share_percent)),
            Field::number(variant.accuracy_percent.map_or_else(|| "-".into(), |percent| format!("{percent:.1}"))),
            Field::number(variant.labels),
            if variant.errors > 0 { errors.toned(Tone::Bad) } else { errors },
            Field::number(variant.latency.map_or_else(|| "-".into(), |latency| milliseconds(latency.p50_ms))),
            Field::number(variant.latency.map_or_else(|| "-".into(), |latency| milliseconds(latency.p99_ms))),
        ]
    };
    console.table(&header, report.variants.iter().map(row));
    let counts =
        |counts: &BTreeMap<String, u64>| counts.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ");
    if !report.nodes.is_empty() {
        console.line(&format!("answered by: {}", counts(&report.nodes)));
    }
    if !report.reasons.is_empty() {
        console.line(&format!("reasons: {}", counts(&report.reasons)));
    }
    let Report { requests, failed, elapsed_s, rate_per_s, .. } = report;
    let total = format!("{} in {elapsed_s:.2} s ({rate_per_s:.1} per second), {failed} failed", counted(*requests, "request"));
    let tone = if *failed > 0 { Tone::Bad } else { Tone::Good };
    console.line(&console.toned(tone, total));
    for failure in &report.failures {
        console.line(&console.toned(Tone::Bad, format!("{} x {}", failure.count, failure.what)));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::api::{MODEL_HEADER, NODE_HEADER, REASON_HEADER, VARIANT_HEADER};
    use crate::cli::testing::{Fake, Ran, Reply, nobody, ran, refusal};

    /// Says the digit in the request, or the next one if `wrong`.
    fn node(name: &'static str, variant: &'static str, model: &'static str, wrong: bool) -> Fake {
        Fake::start(move |_, _, body| {
            let request: serde_json::Value = serde_json::from_str(body).unwrap();
            let mut data = vec![0.0; 10];
            data[request["digit"].as_u64().unwrap() as usize % 9 + usize::from(wrong)] = 0.9;
            let body = json!({"outputs": [{"name": "probabilities", "shape": [1, 10], "datatype": "FP32", "data": data}]});
            let said = [(NODE_HEADER, name), (VARIANT_HEADER, variant), (MODEL_HEADER, model), (REASON_HEADER, "split")];
            Reply::Answer(200, said.map(|(name, value)| (name, value.to_owned())).into(), body.to_string())
        })
    }

    fn load(lines: &str, words: &str) -> Ran {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), lines).unwrap();
        ran(&format!("canary-mesh load --file {} --rate 2000 {words}", file.path().display()))
    }

    fn digits() -> String {
        (0..9).map(|digit| format!("{{\"label\": {digit}, \"request\": {{\"digit\": {digit}}}}}\n")).collect()
    }

    #[test]
    fn requests_go_to_the_nodes_in_turn_and_the_answers_are_judged() {
        let (a, b) = (node("node-a", "stable", "digits-v1", false), node("node-b", "canary", "digits-v2", true));
        let words = format!("--endpoint {} --endpoint {} --count 21 --output json", a.address, b.address);
        let done = load(&digits(), &words);
        assert_eq!(done.exit, Exit::Ok, "{done:?}");
        let report = done.json();
        assert_eq!((&report["requests"], &report["failed"]), (&json!(21), &json!(0)));
        assert_eq!(report["nodes"], json!({"node-a": 11, "node-b": 10}));
        assert_eq!(report["reasons"], json!({"split": 21}));
        let (canary, stable) = (&report["variants"][0], &report["variants"][1]);
        assert_eq!(
            (&canary["variant"], &canary["model"], &canary["accuracy_percent"]),
            (&json!("canary"), &json!("digits-v2"), &json!(0.0))
        );
        assert_eq!((&stable["requests"], &stable["labels"], &stable["accuracy_percent"]), (&json!(11), &json!(11), &json!(100.0)));
        assert!(stable["latency"]["p50_ms"].as_f64().unwrap() > 0.0);
        let sent: Vec<_> = a.sent_to("/predict").iter().map(|body| body["digit"].as_u64().unwrap()).collect();
        assert_eq!(sent.len(), 11);
    }

    #[test]
    fn the_table_has_a_line_for_each_variant() {
        let node = node("node-a", "stable", "digits-v1", false);
        let done = load(&digits(), &format!("--endpoint {}", node.address));
        let row: Vec<_> = done.out.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(&row[..7], ["stable", "digits-v1", "9", "100.0", "100.0", "9", "0"], "{}", done.out);
        assert!(done.out.contains("answered by: node-a 9\nreasons: split 9\n9 requests in "), "{}", done.out);
        assert_eq!(done.err, "");
    }

    #[test]
    fn a_failure_is_counted_and_told() {
        let broken = Fake::start(|_, _, _| refusal(502, "upstream", "canary digits-v2: connection refused"));
        let (fine, gone) = (node("node-a", "stable", "digits-v1", false), nobody());
        let done = load(&digits(), &format!("--endpoint {} --endpoint {} --endpoint {gone}", fine.address, broken.address));
        assert_eq!(done.exit, Exit::Refused);
        let failed = format!("3 x {} answered 502 Bad Gateway: canary digits-v2: connection refused", broken.address);
        let unreached = format!("3 x cannot connect to {gone}: Connection refused");
        for said in ["9 requests in", "6 failed", &failed, &unreached] {
            assert!(done.out.contains(said), "{said:?} in {}", done.out);
        }
    }

    #[test]
    fn a_wrong_file_and_nodes_that_are_not_there_are_told_before_anything_is_sent() {
        let node = node("node-a", "stable", "digits-v1", false);
        let wrong = load("{\"label\": 1", &format!("--endpoint {}", node.address));
        assert_eq!(wrong.exit, Exit::Usage);
        assert!(wrong.err.contains("line 1"), "{}", wrong.err);
        assert_eq!(load(&digits(), &format!("--endpoint {}", nobody())).exit, Exit::NoConnection);
        assert!(node.asked().is_empty());
    }

    #[test]
    fn a_request_that_waits_for_a_connection_is_slow_for_as_long_as_it_waits() {
        let slow = Fake::start(|_, _, _| {
            std::thread::sleep(Duration::from_millis(20));
            Reply::Answer(200, Vec::new(), "{}".into())
        });
        let done = load("{}\n", &format!("--endpoint {} --connections 1 --count 10 --output json", slow.address));
        let max = done.json()["variants"][0]["latency"]["max_ms"].as_f64().unwrap();
        assert!(max > 150.0, "ten requests at once over one connection that takes 20 ms each: the last waits for nine, {max} ms");
    }

    #[test]
    fn a_trace_has_a_line_for_every_answer_and_for_every_request_without_one() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("trace.csv");
        let (fine, gone) = (node("node-a", "stable", "digits-v1", false), nobody());
        let done = load(&digits(), &format!("--endpoint {} --endpoint {gone} --trace {}", fine.address, file.display()));
        assert_eq!(done.exit, Exit::Refused, "{done:?}");
        let text = std::fs::read_to_string(&file).unwrap();
        let lines: Vec<Vec<_>> = text.lines().map(|line| line.split(',').collect()).collect();
        assert_eq!(lines[0], ["due_ms", "sent_ms", "answered_ms", "node", "status", "variant", "model", "version", "reason"]);
        assert_eq!(lines.len(), 1 + 9);
        let answers: Vec<_> = lines[1..].iter().filter(|line| line[3] == "node-a").collect();
        assert_eq!(answers.len(), 5);
        for line in answers {
            assert_eq!(line[4..], ["200", "stable", "digits-v1", "", "split"]);
            let [due, sent, answered] = [0, 1, 2].map(|at| line[at].parse::<f64>().unwrap());
            assert!(due <= sent && sent < answered, "{line:?}");
        }
        let gone = gone.to_string();
        assert_eq!(lines[1..].iter().filter(|line| line[3] == gone && line[4..].concat().is_empty()).count(), 4);
        let nowhere = dir.path().join("no/such/folder.csv");
        let done = load(&digits(), &format!("--endpoint {} --trace {}", fine.address, nowhere.display()));
        assert_eq!(done.exit, Exit::Usage, "{done:?}");
    }

    #[test]
    fn the_path_is_the_callers() {
        let node = node("node-a", "stable", "digits-v1", false);
        load(&digits(), &format!("--endpoint {} --path /v2/models/default/infer --count 1", node.address));
        assert_eq!(node.sent_to("/v2/models/default/infer").len(), 1);
    }
}
