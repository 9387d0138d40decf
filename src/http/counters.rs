//! What the front counts of itself.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Metric, Sample, Series};

/// The front's own numbers, for `GET /metrics`.
#[derive(Debug, Default)]
pub struct Counters {
    opened: Count,
    closed: Count,
    turned_away: Count,
    panics: Count,
    predict: [Count; CLASSES.len()],
    resource: [Count; CLASSES.len()],
    refused: [Count; CLASSES.len()],
}

/// The classes of a status, by its first digit.
const CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

/// Only ever counts up.
#[derive(Debug, Default)]
pub(super) struct Count(AtomicU64);

impl Count {
    pub(super) fn up(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn value(&self) -> f64 {
        self.0.load(Ordering::Relaxed) as f64
    }
}

/// Who answered a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answered {
    /// The data plane.
    Predict,
    /// The tide app.
    Resource,
    /// The front itself, because the request could not be read.
    Refused,
}

impl Counters {
    pub(super) fn opened(&self) {
        self.opened.up();
    }

    pub(super) fn closed(&self) {
        self.closed.up();
    }

    pub(super) fn turned_away(&self) {
        self.turned_away.up();
    }

    pub(super) fn panicked(&self) {
        self.panics.up();
    }

    pub(super) fn answered(&self, by: Answered, status: u16) {
        let class = usize::from(status / 100).saturating_sub(1);
        if let Some(count) = self.of(by).get(class) {
            count.up();
        }
    }

    fn of(&self, by: Answered) -> &[Count; CLASSES.len()] {
        match by {
            Answered::Predict => &self.predict,
            Answered::Resource => &self.resource,
            Answered::Refused => &self.refused,
        }
    }

    /// The numbers as metrics.
    pub(super) fn metrics(&self) -> Vec<Metric> {
        let by = [("predict", Answered::Predict), ("resource", Answered::Resource), ("refused", Answered::Refused)];
        let answers = by.into_iter().flat_map(|(word, by)| {
            let of_class = move |(class, count): (&str, &Count)| {
                Sample::new([("answered_by", word.to_owned()), ("class", class.to_owned())], count.value())
            };
            CLASSES.into_iter().zip(self.of(by)).map(of_class)
        });
        vec![
            Metric::gauge("canary_mesh_http_connections", "Open connections.", self.opened.value() - self.closed.value()),
            Metric::counter("canary_mesh_http_connections_opened_total", "Connections that were served.", self.opened.value()),
            Metric::counter(
                "canary_mesh_http_connections_turned_away_total",
                "Connections over the limit, answered 503 or closed.",
                self.turned_away.value(),
            ),
            Metric::counter(
                "canary_mesh_http_handler_panics_total",
                "Requests answered 500 because their handler panicked.",
                self.panics.value(),
            ),
            Metric {
                name: "canary_mesh_http_answers_total",
                help: "Answers by who gave them and the class of their status.",
                series: Series::Counter(answers.collect()),
            },
        ]
    }
}
