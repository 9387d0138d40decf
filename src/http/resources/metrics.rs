//! `GET /metrics`: the node's numbers for Prometheus.

use tide::Request;

use crate::http::app::{State, text};
use crate::http::{METRICS_CONTENT_TYPE, encode};

/// The control plane's and the front's own.
pub(crate) async fn exposition(request: Request<State>) -> tide::Result {
    let State { control, counters } = request.state();
    let mut metrics = control.metrics();
    metrics.extend(counters.metrics());
    text(200, METRICS_CONTENT_TYPE, encode(&metrics))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use crate::http::fakes::{Fake, get};

    #[test]
    fn every_line_is_one_that_prometheus_reads() {
        let answer = get(Fake::default(), "/metrics");
        assert_eq!(answer.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
        assert!(answer.body.contains("canary_mesh_slot 17\n") && answer.body.contains("canary_mesh_http_connections 0\n"));
        let is_name = |name: &str| {
            let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
            plain && name.starts_with(|c: char| c.is_ascii_alphabetic())
        };
        let mut families = BTreeSet::new();
        let mut lines = answer.body.lines().peekable();
        while let Some(line) = lines.next() {
            let name = line.strip_prefix("# HELP ").unwrap().split(' ').next().unwrap();
            assert!(is_name(name) && families.insert(name.to_owned()), "{line}");
            let kind = lines.next().unwrap().strip_prefix(&format!("# TYPE {name} ")).unwrap();
            assert!(kind == "gauge" || (kind == "counter" && name.ends_with("_total")), "{name} is a {kind}");
            while let Some(line) = lines.next_if(|line| !line.starts_with('#')) {
                let (series, number) = line.rsplit_once(' ').unwrap();
                let (series, labels) = series.split_once('{').unwrap_or((series, "}"));
                assert_eq!(series, name);
                number.parse::<f64>().unwrap();
                for label in labels.strip_suffix('}').unwrap().split(',').filter(|label| !label.is_empty()) {
                    let (label, value) = label.split_once('=').unwrap();
                    assert!(is_name(label) && value.len() >= 2 && value.starts_with('"') && value.ends_with('"'), "{line}");
                }
            }
        }
    }
}
