//! External gates: somebody outside who is asked before a rollout goes on. Off the core's path: an answer is handed to it as a fact.
//!
//! A webhook is told what is about to happen; 200 to 202 is a yes, any other status a no. A Prometheus server is asked for one number, which
//! must be within bounds. Whoever cannot be asked, or answers with something else, has said neither.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::join_all;
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::core::gate::Verdict;
use crate::core::ids::{ModelId, NodeId, RouteName};
use crate::core::rollout::driver::ExternalAnswer;
use crate::core::rollout::{ExternalGate, Number, Phase, Question, Rollout, RolloutId};
use crate::http::client::{Client, Endpoint, Target, within};

/// How much of an external gate's answer is read, in bytes.
pub const EXTERNAL_BODY_BYTES_MAX: usize = 64 << 10;
/// How much of it stands in a sentence, in characters.
pub const EXTERNAL_SAID_CHARS_MAX: usize = 200;
/// Where a server listens whose address names no port.
const PORT_UNNAMED: u16 = 80;

/// What is about to happen.
#[derive(Clone, PartialEq, Debug)]
pub struct About {
    /// The rollout that wants to go on.
    pub rollout: RolloutId,
    /// The model that each of its routes is to get.
    pub routes: BTreeMap<RouteName, ModelId>,
    /// What it wants.
    pub phase: Ahead,
    /// The canary's share at the moment, in percent.
    pub weight_percent: f64,
    /// The routing version at the moment.
    pub version: u64,
    /// Who asks.
    pub node: NodeId,
}

/// What a rollout wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ahead {
    /// Its next step.
    Step,
    /// Its models made stable.
    Promotion,
}

impl Ahead {
    /// The word that a webhook is told.
    pub const fn as_str(self) -> &'static str {
        match self {
            Ahead::Step => "step",
            Ahead::Promotion => "promotion",
        }
    }
}

/// Says why this gate could never be asked, if so: for when a rollout is started.
pub fn check_gate(gate: &ExternalGate) -> Result<(), String> {
    let (Question::Webhook { url } | Question::Prometheus { url, .. }) = &gate.question;
    Url::parse(url).map(drop).map_err(|why| format!("gate {}: {why}", gate.name))
}

impl About {
    /// The rollout as it is when its gates are asked.
    pub fn of(rollout: &Rollout, version: u64, node: NodeId) -> About {
        let last = rollout.spec.steps.len().saturating_sub(1);
        let routes = rollout.spec.routes.iter().map(|(name, model)| (name.clone(), model.id.clone())).collect();
        let phase = if rollout.phase == Phase::Step(last as u16) { Ahead::Promotion } else { Ahead::Step };
        let weight = rollout.step().map_or(0, |step| step.weight);
        About { rollout: rollout.id, routes, phase, weight_percent: f64::from(weight) / 100.0, version, node }
    }
}

/// Asks all of them at once. The answers are in the order of the gates.
pub async fn ask_all(gates: &[ExternalGate], about: &About) -> Vec<ExternalAnswer> {
    join_all(gates.iter().map(|gate| ask(gate, about))).await
}

/// Asks one, for as long as the gate's `timeout_ms` allows: to connect, and to answer.
pub async fn ask(gate: &ExternalGate, about: &About) -> ExternalAnswer {
    let until = Instant::now() + Duration::from_millis(gate.timeout_ms);
    let answered = match &gate.question {
        Question::Webhook { url } => webhook(gate, url, about, until).await,
        Question::Prometheus { url, query, min, max } => prometheus(url, query, until).await.map(|value| within_bounds(value, *min, *max)),
    };
    let (verdict, said) = answered.unwrap_or_else(|why| (Verdict::Inconclusive, why));
    ExternalAnswer { name: gate.name.clone(), verdict, sentence: format!("gate {}: {said}", gate.name) }
}

async fn webhook(gate: &ExternalGate, url: &str, about: &About, until: Instant) -> Result<(Verdict, String), String> {
    let About { rollout, routes, phase, weight_percent, version, node } = about;
    let document = json!({
        "name": gate.name, "rollout": rollout, "routes": routes, "route": routes.keys().next(), "phase": phase.as_str(),
        "weight": weight_percent, "version": version, "node": node,
    });
    let url = Url::parse(url)?;
    let path = if url.path.is_empty() { "/" } else { url.path };
    let (status, mut body) = call(&url, Method::POST, path, Bytes::from(document.to_string()), until).await?;
    if (200..=202).contains(&status.as_u16()) {
        return Ok((Verdict::Pass, format!("yes ({})", status.as_u16())));
    }
    // The status is the answer. What else there is explains it, as far as it comes.
    let mut bytes = Vec::new();
    let _ = within(until.saturating_duration_since(Instant::now()), read(&mut body, &mut bytes)).await;
    let said = beginning(&bytes);
    let said = if said.is_empty() { String::new() } else { format!(", {said}") };
    Ok((Verdict::Fail, format!("no ({}{said})", status.as_u16())))
}

/// The one number that the query gives, or why there is none.
async fn prometheus(url: &str, query: &str, until: Instant) -> Result<f64, String> {
    let url = Url::parse(url)?;
    let path = format!("{}/api/v1/query?query={}", url.path.trim_end_matches('/'), percent_encoded(query));
    let (status, mut body) = call(&url, Method::GET, &path, Bytes::new(), until).await?;
    let mut bytes = Vec::new();
    let read = within(until.saturating_duration_since(Instant::now()), read(&mut body, &mut bytes)).await;
    match read.ok_or_else(|| format!("{} began an answer and did not end it in time", url.endpoint))? {
        Ending::Whole => {}
        Ending::Larger => return Err(format!("{} answered more than {EXTERNAL_BODY_BYTES_MAX} bytes", url.endpoint)),
        Ending::Broken(why) => return Err(format!("{} broke its answer off: {why}", url.endpoint)),
    }
    let strange = || format!("{} answered {} with {:?}", url.endpoint, status.as_u16(), beginning(&bytes));
    let answer: Answer = serde_json::from_slice(&bytes).map_err(|_| strange())?;
    match answer {
        Answer { status: Word::Error, error: Some(error), .. } => Err(format!("{} answered: {}", url.endpoint, shown(&error))),
        Answer { status: Word::Success, data: Some(data), .. } if status.is_success() => data.number(),
        _ => Err(strange()),
    }
}

fn within_bounds(value: f64, min: Option<Number>, max: Option<Number>) -> (Verdict, String) {
    let (min, max) = (min.map(f64::from), max.map(f64::from));
    match (min, max) {
        (Some(min), _) if value < min => (Verdict::Fail, format!("{value} is below {min}")),
        (_, Some(max)) if value > max => (Verdict::Fail, format!("{value} is above {max}")),
        (Some(min), Some(max)) => (Verdict::Pass, format!("{value} is between {min} and {max}")),
        (Some(min), None) => (Verdict::Pass, format!("{value} is at least {min}")),
        (None, Some(max)) => (Verdict::Pass, format!("{value} is at most {max}")),
        (None, None) => (Verdict::Inconclusive, format!("{value}, and no bound to hold it against")),
    }
}

/// Prometheus' answer to a query, as far as it matters.
#[derive(Deserialize)]
struct Answer {
    status: Word,
    data: Option<Data>,
    error: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Word {
    Success,
    Error,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Data {
    result_type: String,
    result: Value,
}

#[derive(Deserialize)]
struct Series {
    /// When the server looked, and the number as text.
    value: (f64, String),
}

impl Data {
    fn number(self) -> Result<f64, String> {
        let strange = |error: serde_json::Error| format!("its {} is not one: {error}", shown(&self.result_type));
        let (_, text): (f64, String) = match self.result_type.as_str() {
            "scalar" => serde_json::from_value(self.result).map_err(strange)?,
            "vector" => {
                let mut series: Vec<Series> = serde_json::from_value(self.result).map_err(strange)?;
                match (series.pop(), series.len()) {
                    (None, _) => return Err("no data".into()),
                    (Some(only), 0) => only.value,
                    (Some(_), others) => {
                        let many = others + 1;
                        return Err(format!("the query gives {many} values, and it must give one; sum or average them in it"));
                    }
                }
            }
            _ => return Err("the query gives neither a scalar nor an instant vector".into()),
        };
        match text.parse::<f64>() {
            Ok(value) if value.is_nan() => Err("no data (NaN)".into()),
            Ok(value) => Ok(value),
            Err(_) => Err(format!("{:?} is not a number", shown(&text))),
        }
    }
}

/// Sends a request and waits for the answer's head.
async fn call(url: &Url<'_>, method: Method, path: &str, body: Bytes, until: Instant) -> Result<(StatusCode, Incoming), String> {
    let left = until.saturating_duration_since(Instant::now());
    let mut client = Client::new(Target { node: None, endpoint: url.endpoint.clone() }, left);
    let answered = within(left, client.ask(method, path, body)).await;
    let response = answered.ok_or_else(|| format!("{} has not answered in time", url.endpoint))?.map_err(|error| error.to_string())?;
    let (head, body) = response.into_parts();
    Ok((head.status, body))
}

/// How a body ended.
enum Ending {
    Whole,
    Larger,
    Broken(String),
}

/// Reads a body into `bytes`, up to the limit. What was read stays there if the caller waits no longer.
async fn read(body: &mut Incoming, bytes: &mut Vec<u8>) -> Ending {
    while let Some(frame) = body.frame().await {
        let data = match frame {
            Ok(frame) => frame.into_data().unwrap_or_default(),
            Err(error) => return Ending::Broken(error.to_string()),
        };
        let room = EXTERNAL_BODY_BYTES_MAX - bytes.len();
        bytes.extend(data.iter().take(room));
        if data.len() > room {
            return Ending::Larger;
        }
    }
    Ending::Whole
}

fn beginning(bytes: &[u8]) -> String {
    shown(String::from_utf8_lossy(bytes).trim())
}

/// Its first characters, in one line: what others write ends up in logs and on screens.
fn shown(text: &str) -> String {
    text.chars().take(EXTERNAL_SAID_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// `http://host[:port][/path]`.
struct Url<'a> {
    endpoint: Endpoint,
    /// Empty, or from its `/` on.
    path: &'a str,
}

impl Url<'_> {
    fn parse(text: &str) -> Result<Url<'_>, String> {
        let wrong = |why: &str| format!("{text:?} is not an external gate's address: {why}");
        if text.get(..8).is_some_and(|scheme| scheme.eq_ignore_ascii_case("https://")) {
            return Err(wrong("the nodes do not speak TLS; use http://, or a local TLS proxy"));
        }
        let rest = text.strip_prefix("http://").ok_or_else(|| wrong("it must begin with http://"))?;
        let (authority, path) = rest.split_at_checked(rest.find('/').unwrap_or(rest.len())).unwrap_or((rest, ""));
        if text.contains(['?', '#']) {
            return Err(wrong("it may have a path, but no '?' or '#'"));
        }
        if authority.contains('@') {
            return Err(wrong("a user name or password cannot stand in it"));
        }
        if !path.is_empty() && path.parse::<http::uri::PathAndQuery>().is_err() {
            return Err(wrong("its path has characters that must be percent-encoded"));
        }
        // A colon within the brackets of an IPv6 address begins no port.
        let names_port = authority.rsplit(']').next().is_some_and(|rest| rest.contains(':'));
        let address = if names_port { authority.to_owned() } else { format!("{authority}:{PORT_UNNAMED}") };
        let endpoint = address.parse().map_err(|_| wrong("it needs a host, and a port of 1 to 65535 if any"))?;
        Ok(Url { endpoint, path })
    }
}

/// As RFC 3986 wants it in a query: all but its unreserved characters as `%` and two digits.
fn percent_encoded(text: &str) -> String {
    use std::fmt::Write as _;
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use async_std::task::block_on;

    use super::*;
    use crate::cli::testing::{Fake, Reply, answer, nobody};

    const SOON_MS: u64 = 50;
    const LONG_MS: u64 = 30_000;
    /// Enough for a head to come over the loopback on a busy machine.
    const STALL_MS: u64 = 2_000;

    fn about() -> About {
        let route = |name, model| (RouteName::new(name).unwrap(), ModelId::new(model).unwrap());
        About {
            rollout: RolloutId(7),
            routes: [route("digits", "digits-v2"), route("letters", "letters-v5")].into(),
            phase: Ahead::Step,
            weight_percent: 12.5,
            version: 41,
            node: NodeId::new("node-a").unwrap(),
        }
    }

    fn gate(timeout_ms: u64, question: Question) -> ExternalGate {
        ExternalGate { name: ModelId::new("load-test").unwrap(), timeout_ms, question }
    }

    fn hook(address: &str, timeout_ms: u64) -> ExternalGate {
        gate(timeout_ms, Question::Webhook { url: format!("http://{address}/hooks/canary") })
    }

    fn rate(address: &str, min: Option<f64>, max: Option<f64>) -> ExternalGate {
        let bound = |bound: Option<f64>| bound.map(|number| Number::try_from(number).unwrap());
        let url = format!("http://{address}/prom/");
        gate(LONG_MS, Question::Prometheus { url, query: "sum(rate(errors[1m]))".into(), min: bound(min), max: bound(max) })
    }

    fn asked(gate: &ExternalGate) -> (Verdict, String) {
        let ExternalAnswer { verdict, sentence, .. } = block_on(ask(gate, &about()));
        (verdict, sentence)
    }

    fn text(status: u16, body: impl Into<String>) -> Reply {
        Reply::Answer(status, Vec::new(), body.into())
    }

    /// What a gate with a max of 0.05 makes of this answer.
    fn queried(body: impl Into<String>) -> (Verdict, String) {
        let body = body.into();
        let server = Fake::start(move |_, _, _| text(200, body.clone()));
        asked(&rate(&server.address, None, Some(0.05)))
    }

    fn vector(values: &[&str]) -> String {
        let result: Vec<_> = values.iter().map(|value| json!({"metric": {"job": "x"}, "value": [1_732_308_843.123, value]})).collect();
        json!({"status": "success", "data": {"resultType": "vector", "result": result}, "warnings": []}).to_string()
    }

    #[test]
    fn a_webhook_is_told_what_is_about_to_happen_and_200_to_202_is_a_yes() {
        for status in [200, 201, 202] {
            let server = Fake::start(move |_, _, _| text(status, "whatever"));
            assert_eq!(asked(&hook(&server.address, LONG_MS)), (Verdict::Pass, format!("gate load-test: yes ({status})")));
            let expected = json!({
                "name": "load-test", "rollout": "r7", "routes": {"digits": "digits-v2", "letters": "letters-v5"}, "route": "digits",
                "phase": "step", "weight": 12.5, "version": 41, "node": "node-a",
            });
            assert_eq!(server.sent_to("/hooks/canary"), [expected]);
        }
        let server = Fake::start(|_, _, _| text(200, ""));
        let bare = gate(LONG_MS, Question::Webhook { url: format!("http://{}", server.address) });
        block_on(ask(&bare, &About { phase: Ahead::Promotion, ..about() }));
        let told: Vec<Value> = server.sent_to("/");
        assert_eq!(told[0]["phase"], "promotion");
    }

    #[test]
    fn any_other_status_of_a_webhook_is_a_no_with_its_reason() {
        for (status, body, sentence) in [
            (204, "", "gate load-test: no (204)"),
            (302, "", "gate load-test: no (302)"),
            (403, " p99 is\n2.1 s ", "gate load-test: no (403, p99 is 2.1 s)"),
            (503, "down", "gate load-test: no (503, down)"),
        ] {
            let server = Fake::start(move |_, _, _| text(status, body));
            assert_eq!(asked(&hook(&server.address, LONG_MS)), (Verdict::Fail, sentence.to_owned()));
        }
        let server = Fake::start(|_, _, _| text(400, "ö".repeat(EXTERNAL_BODY_BYTES_MAX)));
        let (verdict, sentence) = asked(&hook(&server.address, LONG_MS));
        assert_eq!((verdict, sentence), (Verdict::Fail, format!("gate load-test: no (400, {})", "ö".repeat(EXTERNAL_SAID_CHARS_MAX))));
    }

    #[test]
    fn whoever_cannot_be_asked_has_said_neither_yes_nor_no() {
        let address = nobody();
        for gate in [hook(&address, LONG_MS), rate(&address, Some(0.0), None)] {
            let (verdict, sentence) = asked(&gate);
            assert_eq!(verdict, Verdict::Inconclusive);
            assert!(sentence.starts_with(&format!("gate load-test: {address}: ")), "{sentence}");
        }
        let broken = Fake::start(|_, _, _| Reply::Break);
        assert_eq!(asked(&hook(&broken.address, LONG_MS)).0, Verdict::Inconclusive);
        let (verdict, sentence) = asked(&gate(LONG_MS, Question::Webhook { url: "https://a".into() }));
        assert!(verdict == Verdict::Inconclusive && sentence.contains("TLS"), "{sentence}");
    }

    #[test]
    fn a_gate_that_never_answers_is_waited_for_no_longer_than_it_may_take() {
        let silent = Fake::start(|_, _, _| Reply::Hang);
        let begun = Instant::now();
        let mut query = rate(&silent.address, None, Some(1.0));
        query.timeout_ms = SOON_MS;
        for gate in [hook(&silent.address, SOON_MS), query] {
            let sentence = format!("gate load-test: {} has not answered in time", silent.address);
            assert_eq!(asked(&gate), (Verdict::Inconclusive, sentence));
        }
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(2 * SOON_MS) && took < Duration::from_millis(LONG_MS), "{took:?}");
    }

    /// A server that sends a head that promises more than it ever sends, and keeps the connection.
    fn stalling(head: &'static str) -> String {
        use std::io::{Read as _, Write as _};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4_096]);
            let _ = stream.write_all(head.as_bytes());
            // Until the gate hangs up.
            while stream.read(&mut [0; 4_096]).is_ok_and(|read| read > 0) {}
        });
        address
    }

    #[test]
    fn a_body_that_never_ends_is_not_waited_for_and_a_status_counts_without_it() {
        let refusing = hook(&stalling("HTTP/1.1 403 Forbidden\r\ncontent-length: 100\r\n\r\nnot today"), STALL_MS);
        let address = stalling("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{\"status\"");
        let counting = ExternalGate { timeout_ms: STALL_MS, ..rate(&address, None, Some(1.0)) };
        let answers = block_on(ask_all(&[refusing, counting], &about()));
        let said = |verdict, sentence: &str| (verdict, sentence.to_owned());
        let got = |at: usize| (answers[at].verdict, answers[at].sentence.clone());
        assert_eq!(got(0), said(Verdict::Fail, "gate load-test: no (403, not today)"));
        let unended = format!("gate load-test: {address} began an answer and did not end it in time");
        assert_eq!(got(1), said(Verdict::Inconclusive, &unended));
        let (verdict, sentence) = asked(&hook(&stalling("SSH-2.0-OpenSSH_9.2\r\n\r\n"), LONG_MS));
        assert!(verdict == Verdict::Inconclusive && sentence.contains("broke the connection"), "{sentence}");
    }

    #[test]
    fn a_number_within_the_bounds_passes_and_any_other_fails_with_number_and_bound() {
        let scalar = json!({"status": "success", "data": {"resultType": "scalar", "result": [1.5, "0.07"]}}).to_string();
        let server = Fake::start(move |_, _, _| text(200, scalar.clone()));
        for (min, max, verdict, said) in [
            (None, Some(0.05), Verdict::Fail, "0.07 is above 0.05"),
            (Some(0.1), None, Verdict::Fail, "0.07 is below 0.1"),
            (None, Some(0.07), Verdict::Pass, "0.07 is at most 0.07"),
            (Some(0.07), None, Verdict::Pass, "0.07 is at least 0.07"),
            (Some(0.0), Some(1.0), Verdict::Pass, "0.07 is between 0 and 1"),
        ] {
            assert_eq!(asked(&rate(&server.address, min, max)), (verdict, format!("gate load-test: {said}")));
        }
        assert_eq!(server.asked()[0], "GET /prom/api/v1/query?query=sum%28rate%28errors%5B1m%5D%29%29");
        assert_eq!(queried(vector(&["0.01"])).0, Verdict::Pass);
        assert_eq!(queried(vector(&["+Inf"])), (Verdict::Fail, "gate load-test: inf is above 0.05".to_owned()));
        assert_eq!(queried(vector(&["-Inf"])).0, Verdict::Pass);
    }

    #[test]
    fn no_number_or_more_than_one_is_neither() {
        for (body, says) in [
            (vector(&[]), "no data"),
            (vector(&["NaN"]), "no data (NaN)"),
            (vector(&["0.1", "0.2"]), "the query gives 2 values, and it must give one; sum or average them in it"),
            (vector(&["many"]), "\"many\" is not a number"),
            (
                json!({"status": "success", "data": {"resultType": "matrix", "result": [{"values": []}]}}).to_string(),
                "neither a scalar nor",
            ),
            (json!({"status": "success", "data": {"resultType": "scalar", "result": 3}}).to_string(), "its scalar is not one"),
            (json!({"status": "success", "data": {"resultType": "vector", "result": [{}]}}).to_string(), "its vector is not one"),
            ("<html>\nlog in</html>".to_owned(), "with \"<html> log in</html>\""),
            ("{}".to_owned(), "with \"{}\""),
            (json!({"status": "success"}).to_string(), "success"),
            (String::new(), "answered 200 with \"\""),
            ("x".repeat(EXTERNAL_BODY_BYTES_MAX + 1), "answered more than 65536 bytes"),
            (format!("{}{}", vector(&["0.01"]), " ".repeat(10 << 20)), "answered more than 65536 bytes"),
        ] {
            let (verdict, sentence) = queried(body);
            assert_eq!(verdict, Verdict::Inconclusive, "{sentence}");
            assert!(sentence.starts_with("gate load-test: ") && sentence.contains(says), "{sentence}");
        }
        let wrong = json!({"status": "error", "errorType": "bad_data", "error": "parse error: unclosed left parenthesis"});
        let server = Fake::start(move |_, _, _| answer(400, &wrong));
        let (verdict, sentence) = asked(&rate(&server.address, None, Some(1.0)));
        assert!(verdict == Verdict::Inconclusive && sentence.ends_with("answered: parse error: unclosed left parenthesis"), "{sentence}");
        let server = Fake::start(move |_, _, _| text(502, vector(&["0.01"])));
        assert_eq!(asked(&rate(&server.address, None, Some(1.0))).0, Verdict::Inconclusive);
    }

    #[test]
    fn all_are_asked_at_once_and_answer_in_order() {
        use std::io::{Read as _, Write as _};
        // Neither answers before both have been asked. Threads of their own: those of the runtime may be too few to wait for each other.
        let together = std::sync::Arc::new(std::sync::Barrier::new(2));
        let server = |head: &'static str| {
            let (together, listener) = (together.clone(), std::net::TcpListener::bind("127.0.0.1:0").unwrap());
            let address = listener.local_addr().unwrap().to_string();
            std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let _ = stream.read(&mut [0; 4_096]);
                together.wait();
                let _ = stream.write_all(head.as_bytes());
            });
            address
        };
        let yes = server("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
        let no = server("HTTP/1.1 418 Teapot\r\ncontent-length: 0\r\n\r\n");
        let answers = block_on(ask_all(&[hook(&yes, LONG_MS), hook(&no, LONG_MS)], &about()));
        let verdicts: Vec<_> = answers.iter().map(|answer| (answer.name.as_str(), answer.verdict)).collect();
        assert_eq!(verdicts, [("load-test", Verdict::Pass), ("load-test", Verdict::Fail)]);
        assert!(block_on(ask_all(&[], &about())).is_empty());
    }

    #[test]
    fn an_address_is_http_with_a_host_and_perhaps_a_port_and_a_path() {
        for right in ["http://a", "http://a/", "http://a:9090/prom", "http://127.0.0.1:1/x/y", "http://[::1]", "http://[::1]:9090/x"] {
            assert_eq!(Url::parse(right).map(drop), Ok(()), "{right}");
        }
        assert_eq!(Url::parse("http://[::1]/x").map(|url| (url.endpoint.to_string(), url.path)), Ok(("[::1]:80".to_owned(), "/x")));
        for (wrong, says) in [
            ("https://a", "do not speak TLS"),
            ("HTTPS://a", "do not speak TLS"),
            ("a:80", "must begin with http://"),
            ("", "must begin with http://"),
            ("http://", "needs a host"),
            ("http:///x", "needs a host"),
            ("http://a:0", "a port of 1 to 65535"),
            ("http://a:70000", "a port of 1 to 65535"),
            ("http://a:", "a port of 1 to 65535"),
            ("http://u:p@a", "user name or password"),
            ("http://a/x?y", "no '?' or '#'"),
            ("http://a#x", "no '?' or '#'"),
            ("http://a/x y", "percent-encoded"),
            ("http://a b/", "needs a host"),
        ] {
            let refused = Url::parse(wrong).map(drop).unwrap_err();
            assert!(refused.contains(says), "{wrong}: {refused}");
        }
    }

    #[test]
    fn a_query_is_encoded_to_the_last_byte() {
        assert_eq!(percent_encoded("a-b_c.d~9"), "a-b_c.d~9");
        assert_eq!(percent_encoded("x{job=\"a b\"} > 1 & é\n%"), "x%7Bjob%3D%22a%20b%22%7D%20%3E%201%20%26%20%C3%A9%0A%25");
    }
}
