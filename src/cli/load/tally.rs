//! Counts answers: by whom, how well, how fast, and what went wrong.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::requests::Request;
use crate::api::{ErrorBody, MODEL_HEADER, NODE_HEADER, REASON_HEADER, VARIANT_HEADER};
use crate::cli::client::{Answer, CallError};
use crate::cli::endpoint::Target;
use crate::cli::latency::{Latencies, Quantiles};

/// Different failures that are told.
const FAILURES_TOLD_MAX: usize = 5;
/// Different failures that one connection keeps apart.
const FAILURES_KEPT_MAX: usize = 64;
/// How much of an answer without a message is told, in characters.
const TOLD_CHARS_MAX: usize = 200;
/// Stands for what an answer did not say.
const UNSAID: &str = "-";

/// What one connection has seen, or all of them.
#[derive(Debug, Default)]
pub struct Tally {
    /// By variant and model.
    variants: BTreeMap<(String, String), Variant>,
    nodes: BTreeMap<String, u64>,
    reasons: BTreeMap<String, u64>,
    failures: BTreeMap<String, u64>,
}

#[derive(Debug, Default)]
struct Variant {
    requests: u64,
    errors: u64,
    labels: u64,
    correct: u64,
    latencies: Latencies,
}

/// What `load --output json` prints.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Requests sent.
    pub requests: u64,
    /// Of them without a proper answer.
    pub failed: u64,
    /// From the first to the last, in seconds.
    pub elapsed_s: f64,
    /// Requests per second that were reached.
    pub rate_per_s: f64,
    /// By variant and model.
    pub variants: Vec<VariantReport>,
    /// Answers by node.
    pub nodes: BTreeMap<String, u64>,
    /// Answers by the reason for their variant.
    pub reasons: BTreeMap<String, u64>,
    /// The most frequent failures.
    pub failures: Vec<FailureReport>,
}

/// One variant and model.
#[derive(Debug, Serialize)]
pub struct VariantReport {
    /// `stable`, `canary`, or `-` where nobody said.
    pub variant: String,
    /// The model.
    pub model: String,
    /// Requests.
    pub requests: u64,
    /// Of all requests, in percent.
    pub share_percent: f64,
    /// Labels that answers were compared with.
    pub labels: u64,
    /// Of them right, in percent; null without labels.
    pub accuracy_percent: Option<f64>,
    /// Requests without a proper answer.
    pub errors: u64,
    /// Of the proper answers; null without any.
    pub latency: Option<Quantiles>,
}

/// One kind of failure.
#[derive(Debug, Serialize)]
pub struct FailureReport {
    /// How often.
    pub count: u64,
    /// What was said.
    pub what: String,
}

impl Tally {
    /// Counts one request.
    pub fn count(&mut self, request: &Request, target: &Target, answer: Result<Answer, CallError>, took: Duration) {
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                let unsaid = (UNSAID.to_owned(), UNSAID.to_owned());
                self.variants.entry(unsaid).or_default().error();
                let what = match error {
                    CallError::NoConnection { .. } => format!("cannot connect to {error}"),
                    other => other.to_string(),
                };
                return self.failure(what);
            }
        };
        let said = |name| answer.headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let node = said(NODE_HEADER).unwrap_or_else(|| target.endpoint.to_string());
        let key = (said(VARIANT_HEADER).unwrap_or(UNSAID.into()), said(MODEL_HEADER).unwrap_or(UNSAID.into()));
        let variant = self.variants.entry(key).or_default();
        if answer.status.is_success() {
            variant.answered(request, &answer.body, took);
        } else {
            variant.error();
            self.failure(format!("{node} answered {}: {}", answer.status, message(&answer.body)));
        }
        *self.nodes.entry(node).or_default() += 1;
        if let Some(reason) = said(REASON_HEADER) {
            *self.reasons.entry(reason).or_default() += 1;
        }
    }

    fn failure(&mut self, what: String) {
        let full = self.failures.len() >= FAILURES_KEPT_MAX && !self.failures.contains_key(&what);
        let what = if full { "other failures".to_owned() } else { what };
        *self.failures.entry(what).or_default() += 1;
    }

    /// Counts what another has counted.
    pub fn add(&mut self, other: &Tally) {
        for (key, variant) in &other.variants {
            self.variants.entry(key.clone()).or_default().add(variant);
        }
        for (mine, theirs) in [(&mut self.nodes, &other.nodes), (&mut self.reasons, &other.reasons), (&mut self.failures, &other.failures)]
        {
            theirs.iter().for_each(|(name, count)| *mine.entry(name.clone()).or_default() += count);
        }
    }

    /// The end of it.
    pub fn report(self, elapsed: Duration) -> Report {
        let requests: u64 = self.variants.values().map(|variant| variant.requests).sum();
        let failed = self.variants.values().map(|variant| variant.errors).sum();
        let mut failures: Vec<_> = self.failures.into_iter().map(|(what, count)| FailureReport { count, what }).collect();
        failures.sort_by_key(|failure| std::cmp::Reverse(failure.count));
        failures.truncate(FAILURES_TOLD_MAX);
        let elapsed_s = elapsed.as_secs_f64();
        Report {
            requests,
            failed,
            elapsed_s,
            rate_per_s: requests as f64 / elapsed_s.max(f64::MIN_POSITIVE),
            variants: self.variants.into_iter().map(|(key, variant)| variant.report(key, requests)).collect(),
            nodes: self.nodes,
            reasons: self.reasons,
            failures,
        }
    }
}

impl Variant {
    fn error(&mut self) {
        self.requests += 1;
        self.errors += 1;
    }

    fn answered(&mut self, request: &Request, body: &[u8], took: Duration) {
        self.requests += 1;
        self.latencies.record(took);
        if let Some(classes) = (!request.labels.is_empty()).then(|| classes(body)).flatten() {
            self.labels += request.labels.len() as u64;
            self.correct += request.labels.iter().zip(&classes).filter(|(label, class)| label == class).count() as u64;
        }
    }

    fn add(&mut self, other: &Variant) {
        self.requests += other.requests;
        self.errors += other.errors;
        self.labels += other.labels;
        self.correct += other.correct;
        self.latencies.add(&other.latencies);
    }

    fn report(self, (variant, model): (String, String), of: u64) -> VariantReport {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        VariantReport {
            variant,
            model,
            requests: self.requests,
            share_percent: percent(self.requests, of),
            labels: self.labels,
            accuracy_percent: (self.labels > 0).then(|| percent(self.correct, self.labels)),
            errors: self.errors,
            latency: self.latencies.quantiles(),
        }
    }
}

/// What of an Open Inference Protocol V2 answer matters here.
#[derive(Deserialize)]
struct Inferred {
    outputs: Vec<Output>,
}

#[derive(Deserialize)]
struct Output {
    shape: Vec<usize>,
    data: Data,
}

/// The protocol allows a flat list and one that is nested like the shape.
#[derive(Deserialize)]
#[serde(untagged)]
enum Data {
    Flat(Vec<f64>),
    Rows(Vec<Vec<f64>>),
}

/// The class that each row of the first output says: the place of its largest number, or the number itself if it is alone.
fn classes(body: &[u8]) -> Option<Vec<i64>> {
    let Output { shape, data } = serde_json::from_slice::<Inferred>(body).ok()?.outputs.into_iter().next()?;
    let numbers = match data {
        Data::Flat(numbers) => numbers,
        Data::Rows(rows) => rows.concat(),
    };
    let rows = shape.first().copied().unwrap_or(1).max(1);
    let width = numbers.len() / rows;
    let class = |row: &[f64]| match row {
        [alone] => *alone as i64,
        row => {
            let largest = row.iter().enumerate().max_by(|(_, a), (_, b)| a.total_cmp(b));
            largest.map_or(-1, |(place, _)| place as i64)
        }
    };
    (width > 0).then(|| numbers.chunks_exact(width).map(class).collect())
}

/// What an answer that is an error says: our form, V2's form, or its beginning.
fn message(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct V2 {
        error: String,
    }
    let ours = serde_json::from_slice::<ErrorBody>(body).ok().map(|body| body.message);
    let theirs = || serde_json::from_slice::<V2>(body).ok().map(|body| body.error);
    ours.or_else(theirs).unwrap_or_else(|| String::from_utf8_lossy(body).chars().take(TOLD_CHARS_MAX).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_class_is_the_place_of_the_largest_number_in_each_row() {
        let said = |text: &str| classes(text.as_bytes());
        assert_eq!(said(r#"{"outputs": [{"shape": [2, 3], "data": [0.1, 0.7, 0.2, 0.5, 0.1, 0.4]}]}"#), Some(vec![1, 0]));
        assert_eq!(said(r#"{"outputs": [{"shape": [2, 2], "data": [[1, 2], [4, 3]]}]}"#), Some(vec![1, 0]));
        assert_eq!(said(r#"{"outputs": [{"shape": [2], "data": [7, 3]}]}"#), Some(vec![7, 3]));
        for strange in [r#"{"outputs": []}"#, r#"{"outputs": [{"shape": [1], "data": []}]}"#, "{}", "ok"] {
            assert_eq!(said(strange), None, "{strange}");
        }
    }

    #[test]
    fn an_error_is_told_in_its_own_words() {
        assert_eq!(message(br#"{"error_code": "x", "message": "no such route", "request_id": "1"}"#), "no such route");
        assert_eq!(message(br#"{"error": "wrong shape"}"#), "wrong shape");
        assert_eq!(message(b"<html>"), "<html>");
    }

    #[test]
    fn a_flood_of_different_failures_is_bounded() {
        let mut tally = Tally::default();
        (0..1_000).for_each(|n| tally.failure(format!("failure {n}")));
        assert_eq!(tally.failures.len(), FAILURES_KEPT_MAX + 1);
        assert_eq!(tally.report(Duration::from_secs(1)).failures.len(), FAILURES_TOLD_MAX);
    }
}
