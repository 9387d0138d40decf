//! The node's numbers for `GET /metrics`.

use std::collections::BTreeMap;
use std::ops::Add as _;
use std::sync::atomic::Ordering::Relaxed;

use crate::api::LinkWord;
use crate::clock;
use crate::core::gate::{RouteEvidence, Tally, Trial, Verdict, judge};
use crate::core::ids::{ModelId, RouteName};
use crate::core::rollout::{Phase, Rollout};
use crate::core::state::Route;
use crate::gateway::{Bad, EndpointTotals, LATENCY_BUCKETS_US, Mirrored, UpstreamTotals, VariantTotals};
use crate::http::{Histogram, Metric, Sample, Series};
use crate::node::control::ControlPlane;
use crate::node::view::View;

/// All of them, of this moment.
pub fn metrics(plane: &ControlPlane) -> Vec<Metric> {
    let view = plane.view.load();
    let figures = &plane.figures;
    let seconds = |us: u64| us as f64 / 1e6;
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Relaxed) as f64;
    let links = plane.mesh.links();
    let per_link = |value: &dyn Fn(&crate::mesh::LinkStatus) -> f64| {
        links.iter().map(|(peer, link)| Sample::new([("peer", peer.to_string())], value(link))).collect()
    };
    let weights = view.state.routes.iter().flat_map(|(name, route)| {
        [("stable", route.weights.stable), ("canary", route.weights.canary)]
            .map(|(variant, bp)| Sample::new([("route", name.to_string()), ("variant", variant.to_owned())], f64::from(bp) / 10_000.0))
    });
    let evidence = plane.gateway.evidence();
    let lease = view.lease(clock::time());
    let fenced = view.fenced.iter().filter(|fence| fence.majority);
    let fenced = fenced.map(|fence| Sample::new([("member", fence.node.to_string())], 1.0));
    let decided = [("commit", &figures.commits), ("abort", &figures.aborts)];
    let decided = decided.map(|(outcome, counter)| Sample::new([("outcome", outcome.to_owned())], count(counter)));
    let (forwarded, dropped) = plane.mesh.passed_on();
    let passed_on = |(outcome, messages): (&str, u64)| Sample::new([("outcome", outcome.to_owned())], messages as f64);
    let totals = plane.gateway.totals();
    let upstreams = plane.gateway.upstreams();
    let sync = Histogram { buckets: Vec::new(), sum: seconds(figures.sync_us.load(Relaxed)), count: figures.syncs.load(Relaxed) };
    let metric = |name, help, series| Metric { name, help, series };
    vec![
        Metric::gauge("canary_mesh_slot", "Last decided slot.", view.head.slot as f64),
        Metric::gauge("canary_mesh_version", "Commits so far: the routing version.", view.head.version as f64),
        Metric::gauge("canary_mesh_incarnation", "Starts of this node's process.", view.incarnation as f64),
        Metric::gauge("canary_mesh_lease_held", "1 if this node may serve a canary now.", f64::from(u8::from(lease.held))),
        Metric::gauge("canary_mesh_lease_remaining_seconds", "For how long yet; 0 without a lease.", lease.remaining_ms as f64 / 1e3),
        metric("canary_mesh_fenced", "1 for each member that a majority is known here to have fenced.", Series::Gauge(fenced.collect())),
        Metric::gauge("canary_mesh_open_slot", "1 if a transaction holds the open slot here.", f64::from(u8::from(view.open.is_some()))),
        Metric::gauge("canary_mesh_uptime_seconds", "Since this process started.", clock::time().ms_since(plane.started) as f64 / 1e3),
        metric("canary_mesh_weight_ratio", "A variant's share of its route.", Series::Gauge(weights.collect())),
        metric(
            "canary_mesh_gate_verdict",
            "1 for what this node's own numbers of a route's canary come to: pass, fail or inconclusive.",
            Series::Gauge(verdicts(&view, &evidence)),
        ),
        metric(
            "canary_mesh_gate_log_e",
            "Natural logarithm of the evidence against the canary, by this node's numbers; a veto at the bound.",
            Series::Gauge(per_trial(&evidence, |trial| trial.bets.ln_e())),
        ),
        metric(
            "canary_mesh_gate_log_e_bound",
            "Where that evidence becomes this node's veto.",
            Series::Gauge(evidence.iter().filter(|seen| seen.trial.is_some()).map(|seen| bound(&view, seen)).collect()),
        ),
        metric(
            "canary_mesh_trial_requests",
            "Requests that chance or a sticky key gave to a variant since its canary began.",
            Series::Gauge(tallies(&evidence, |tally| tally.requests)),
        ),
        metric("canary_mesh_trial_bad", "Of these, bad ones.", Series::Gauge(tallies(&evidence, |tally| tally.bad))),
        metric(
            "canary_mesh_trial_compared",
            "Answers to mirrored requests that were compared since the canary began.",
            Series::Gauge(per_trial(&evidence, |trial| trial.agreement.compared as f64)),
        ),
        metric("canary_mesh_trial_agreed", "Of these, alike.", Series::Gauge(per_trial(&evidence, |trial| trial.agreement.agreed as f64))),
        metric(
            "canary_mesh_trial_unreachable",
            "1 if this node cannot reach the canary and serves stable instead.",
            Series::Gauge(per_trial(&evidence, |trial| f64::from(u8::from(trial.unreachable)))),
        ),
        metric("canary_mesh_rollouts", "Rollouts that are remembered, by their situation.", Series::Gauge(rollouts(&view))),
        metric("canary_mesh_rollout_step", "The step of the rollout under way, from 1.", Series::Gauge(rollout_step(&view))),
        metric("canary_mesh_decided_total", "Slots decided here since the start.", Series::Counter(decided.into())),
        metric("canary_mesh_wal_sync_seconds", "Syncs of the decision log.", Series::Histogram(vec![Sample::new([], sync)])),
        Metric::gauge("canary_mesh_wal_bytes", "Size of the decision log.", count(&figures.bytes)),
        Metric::counter("canary_mesh_events_dropped_total", "Events that found their queue full.", plane.events.dropped() as f64),
        Metric::gauge("canary_mesh_event_streams", "Open streams of GET /events.", plane.events.live().streams() as f64),
        metric(
            "canary_mesh_link_up",
            "1 if the direct link to the peer is up.",
            Series::Gauge(per_link(&|l| f64::from(u8::from(l.state == LinkWord::Up)))),
        ),
        metric(
            "canary_mesh_link_relayed",
            "1 if messages to the peer go over a third node.",
            Series::Gauge(per_link(&|l| f64::from(u8::from(l.state == LinkWord::Relayed)))),
        ),
        metric(
            "canary_mesh_relay_messages_total",
            "Messages between two other nodes, passed on or dropped for want of a link or of room.",
            Series::Counter([("forwarded", forwarded), ("dropped", dropped)].map(passed_on).into()),
        ),
        metric("canary_mesh_link_sent_bytes_total", "Bytes sent to the peer.", Series::Counter(per_link(&|l| l.bytes_sent as f64))),
        metric(
            "canary_mesh_link_received_bytes_total",
            "Bytes received from the peer.",
            Series::Counter(per_link(&|l| l.bytes_received as f64)),
        ),
        metric("canary_mesh_link_queue_bytes", "Bytes that wait for the peer.", Series::Gauge(per_link(&|l| l.queue_bytes as f64))),
        metric("canary_mesh_requests_total", "Requests answered by a model.", Series::Counter(per_variant(&totals, |t| t.requests as f64))),
        metric(
            "canary_mesh_requests_refused_total",
            "Requests that were wrong and reached no model.",
            Series::Counter(per_variant(&totals, |t| t.refused as f64)),
        ),
        metric(
            "canary_mesh_requests_shielded_total",
            "Requests that the canary failed on and stable answered instead.",
            Series::Counter(per_variant(&totals, |t| t.shielded as f64)),
        ),
        metric(
            "canary_mesh_mirrored_total",
            "Requests drawn to be copied to a canary, by what became of the copy.",
            Series::Counter(plane.gateway.mirrored().map(|(outcome, n)| mirrored(outcome, n)).into()),
        ),
        metric(
            "canary_mesh_upstream_outstanding",
            "Requests in flight to a model server.",
            Series::Gauge(per_server(&upstreams, |server| server.outstanding as f64, f64::add)),
        ),
        metric(
            "canary_mesh_upstream_ejected",
            "1 for a model server that is left out, or on trial, because requests or probes failed in a row.",
            Series::Gauge(per_server(&upstreams, |server| f64::from(u8::from(server.ejected)), f64::max)),
        ),
        metric(
            "canary_mesh_upstream_requests_total",
            "Requests given to a model server since its model was loaded.",
            Series::Counter(per_server(&upstreams, |server| server.requests as f64, f64::add)),
        ),
        metric(
            "canary_mesh_upstream_failures_total",
            "Of these, those that found no connection, or lost it before the answer was over.",
            Series::Counter(per_server(&upstreams, |server| server.failures as f64, f64::add)),
        ),
        metric(
            "canary_mesh_upstream_waiting",
            "Requests that wait for a place at a model's servers.",
            Series::Gauge(per_upstream(&upstreams, |upstream| upstream.waiting as f64)),
        ),
        metric(
            "canary_mesh_upstream_refused_total",
            "Requests that got no place at a model's servers.",
            Series::Counter(per_upstream(&upstreams, |upstream| upstream.refused as f64)),
        ),
        metric("canary_mesh_requests_bad_total", "Bad requests, by kind.", Series::Counter(bad(&totals))),
        metric("canary_mesh_request_seconds", "From request to the answer's head.", Series::Histogram(per_variant(&totals, latency))),
    ]
}

fn mirrored(outcome: Mirrored, copies: u64) -> Sample<f64> {
    Sample::new([("outcome", outcome.as_str().to_owned())], copies as f64)
}

fn per_trial(evidence: &[RouteEvidence], value: impl Fn(&Trial) -> f64) -> Vec<Sample<f64>> {
    let sample = |seen: &RouteEvidence| Some(Sample::new(of_canary(seen), value(seen.trial.as_ref()?)));
    evidence.iter().filter_map(sample).collect()
}

fn of_canary(seen: &RouteEvidence) -> Vec<(&'static str, String)> {
    vec![("route", seen.route.to_string()), ("model", seen.canary_model_id.as_ref().map(ModelId::to_string).unwrap_or_default())]
}

fn tallies(evidence: &[RouteEvidence], value: impl Fn(&Tally) -> u64) -> Vec<Sample<f64>> {
    let of = |seen: &RouteEvidence| {
        let trial = seen.trial?;
        let sample = |variant: &str, tally: &Tally| {
            Sample::new([("route", seen.route.to_string()), ("variant", variant.to_owned())], value(tally) as f64)
        };
        Some([sample("stable", &trial.stable), sample("canary", &trial.canary)])
    };
    evidence.iter().filter_map(of).flatten().collect()
}

fn verdicts(view: &View, evidence: &[RouteEvidence]) -> Vec<Sample<f64>> {
    let of = |(name, route): (&RouteName, &Route)| {
        let seen = evidence.iter().find(|seen| seen.route == *name);
        let canary = route.canary.as_ref()?.id.to_string();
        let judged = judge(name, route, &view.state.gate_of(name), seen, view.state.members.len()).verdict;
        Some([Verdict::Pass, Verdict::Fail, Verdict::Inconclusive].map(|verdict| {
            let labels = [("route", name.to_string()), ("model", canary.clone()), ("verdict", verdict.to_string())];
            Sample::new(labels, f64::from(u8::from(verdict == judged)))
        }))
    };
    view.state.routes.iter().filter_map(of).flatten().collect()
}

fn bound(view: &View, seen: &RouteEvidence) -> Sample<f64> {
    let gate = view.state.gate_of(&seen.route);
    Sample::new(of_canary(seen), gate.local_bound(view.state.members.len()).ln())
}

fn rollouts(view: &View) -> Vec<Sample<f64>> {
    let list = &view.state.rollouts.list;
    let count = |word: &str| list.iter().filter(|rollout| rollout.code() == word).count() as f64;
    ["queued", "running", "paused", "promoted", "rolled_back"].map(|word| Sample::new([("status", word.to_owned())], count(word))).into()
}

fn rollout_step(view: &View) -> Vec<Sample<f64>> {
    let step = |rollout: &Rollout| match rollout.phase {
        Phase::Step(at) => Some(Sample::new([("rollout", rollout.id.to_string())], f64::from(at) + 1.0)),
        _ => None,
    };
    view.state.rollouts.list.iter().filter_map(step).collect()
}

fn labels(totals: &VariantTotals) -> Vec<(&'static str, String)> {
    vec![("route", totals.route.to_string()), ("variant", totals.variant.as_str().to_owned()), ("model", totals.model.to_string())]
}

fn per_variant<V>(totals: &[VariantTotals], value: impl Fn(&VariantTotals) -> V) -> Vec<Sample<V>> {
    totals.iter().map(|totals| Sample::new(labels(totals), value(totals))).collect()
}

/// Where two files of one model are held for a while, the two are one series.
fn per_server(upstreams: &[UpstreamTotals], value: impl Fn(&EndpointTotals) -> f64, and: impl Fn(f64, f64) -> f64) -> Vec<Sample<f64>> {
    let mut series: BTreeMap<(String, &str), f64> = BTreeMap::new();
    for upstream in upstreams {
        for server in &upstream.servers {
            let before = series.entry((upstream.model.to_string(), &server.address)).or_default();
            *before = and(*before, value(server));
        }
    }
    let sample = |((model, server), value): ((String, &str), f64)| Sample::new([("model", model), ("server", server.to_owned())], value);
    series.into_iter().map(sample).collect()
}

fn per_upstream(upstreams: &[UpstreamTotals], value: impl Fn(&UpstreamTotals) -> f64) -> Vec<Sample<f64>> {
    let mut series: BTreeMap<String, f64> = BTreeMap::new();
    for upstream in upstreams {
        *series.entry(upstream.model.to_string()).or_default() += value(upstream);
    }
    series.into_iter().map(|(model, value)| Sample::new([("model", model)], value)).collect()
}

fn bad(totals: &[VariantTotals]) -> Vec<Sample<f64>> {
    let kinds = |totals: &VariantTotals| {
        let labels = labels(totals);
        let sample = move |(kind, count): &(Bad, u64)| {
            let mut labels = labels.clone();
            labels.push(("kind", kind.as_str().to_owned()));
            Sample::new(labels, *count as f64)
        };
        totals.bad.iter().map(sample).collect::<Vec<_>>()
    };
    totals.iter().flat_map(kinds).collect()
}

fn latency(totals: &VariantTotals) -> Histogram {
    let bounds = LATENCY_BUCKETS_US.iter().map(|us| *us as f64 / 1e6);
    let buckets = bounds.zip(totals.latency_buckets.iter().copied()).collect();
    Histogram { buckets, sum: totals.latency_us_sum as f64 / 1e6, count: totals.requests }
}
