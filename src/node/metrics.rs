//! The node's numbers for `GET /metrics`.

use std::sync::atomic::Ordering::Relaxed;

use crate::api::LinkWord;
use crate::clock;
use crate::gateway::{Bad, LATENCY_BUCKETS_US, VariantTotals};
use crate::http::{Histogram, Metric, Sample, Series};
use crate::node::control::ControlPlane;

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
    let lease = view.lease(clock::time());
    let fenced = view.fenced.iter().filter(|fence| fence.majority);
    let fenced = fenced.map(|fence| Sample::new([("member", fence.node.to_string())], 1.0));
    let decided = [("commit", &figures.commits), ("abort", &figures.aborts)];
    let decided = decided.map(|(outcome, counter)| Sample::new([("outcome", outcome.to_owned())], count(counter)));
    let (forwarded, dropped) = plane.mesh.passed_on();
    let passed_on = |(outcome, messages): (&str, u64)| Sample::new([("outcome", outcome.to_owned())], messages as f64);
    let totals = plane.gateway.totals();
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
        metric("canary_mesh_decided_total", "Slots decided here since the start.", Series::Counter(decided.into())),
        metric("canary_mesh_wal_sync_seconds", "Syncs of the decision log.", Series::Histogram(vec![Sample::new([], sync)])),
        Metric::gauge("canary_mesh_wal_bytes", "Size of the decision log.", count(&figures.bytes)),
        Metric::counter("canary_mesh_events_dropped_total", "Events that found their queue full.", plane.events.dropped() as f64),
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
        metric("canary_mesh_requests_bad_total", "Bad requests, by kind.", Series::Counter(bad(&totals))),
        metric("canary_mesh_request_seconds", "From request to the answer's head.", Series::Histogram(per_variant(&totals, latency))),
    ]
}

fn labels(totals: &VariantTotals) -> Vec<(&'static str, String)> {
    vec![("route", totals.route.to_string()), ("variant", totals.variant.as_str().to_owned()), ("model", totals.model.to_string())]
}

fn per_variant<V>(totals: &[VariantTotals], value: impl Fn(&VariantTotals) -> V) -> Vec<Sample<V>> {
    totals.iter().map(|totals| Sample::new(labels(totals), value(totals))).collect()
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
