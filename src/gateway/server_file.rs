//! `<id>.json`: the model servers of a model, and how they are dealt with.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use http::uri::PathAndQuery;
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::gateway::address::Address;
use crate::gateway::endpoints::{ENDPOINTS_MAX, Limits};

/// Time for a model server's answer where its file names none, in milliseconds.
pub const UPSTREAM_TIMEOUT_MS: u64 = 30_000;
/// Longest time for an answer that a file may name, in milliseconds.
pub const UPSTREAM_TIMEOUT_MS_MAX: u64 = 3_600_000;
/// Time to connect to a model server where its file names none, in milliseconds; less where its time for an answer is less.
pub const UPSTREAM_CONNECT_MS: u64 = 5_000;
/// Requests that one model server may have in flight where its file names no number. It keeps a stuck server from taking all sockets.
pub const UPSTREAM_IN_FLIGHT: u64 = 1_024;
/// Most requests in flight to one model server that a file may name.
pub const UPSTREAM_IN_FLIGHT_MAX: u64 = 65_536;
/// Requests that may wait for a place at the model servers of one model where its file names no number: as many as for a model in the node.
pub const UPSTREAM_QUEUE: u64 = 256;
/// Most waiting requests that a file may name.
pub const UPSTREAM_QUEUE_MAX: u64 = 65_536;
/// How long a request may wait for a place where its file names no time, in milliseconds.
pub const UPSTREAM_QUEUE_MS: u64 = 1_000;
/// Longest wait for a place that a file may name, in milliseconds.
pub const UPSTREAM_QUEUE_MS_MAX: u64 = 60_000;
/// How often a request that could not be sent is tried elsewhere where its file names no number.
pub const UPSTREAM_RETRIES: u64 = 1;
/// Most retries that a file may name.
pub const UPSTREAM_RETRIES_MAX: u64 = 16;
/// Failures in a row, of requests or of probes, after which a model server is left out where its file names no number.
pub const UPSTREAM_FAILURES: u64 = 3;
/// Most failures in a row that a file may name.
pub const UPSTREAM_FAILURES_MAX: u64 = 100;
/// How often a model server is probed where its file asks for that and names no time, in milliseconds.
pub const PROBE_INTERVAL_MS: u64 = 5_000;
/// Shortest time between two probes that a file may name, in milliseconds.
pub const PROBE_INTERVAL_MS_MIN: u64 = 100;
/// Longest time between two probes that a file may name, in milliseconds.
pub const PROBE_INTERVAL_MS_MAX: u64 = 3_600_000;
/// Time for the answer to a probe where its file names none, in milliseconds; less where it is probed more often.
pub const PROBE_MS: u64 = 1_000;

/// Where the Open Inference Protocol V2 says whether a server is ready.
const READY_PATH: &str = "/v2/health/ready";

/// The model servers of a model, and how they are dealt with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Servers {
    pub(crate) addresses: Vec<Address>,
    pub(crate) limits: Limits,
    /// For an answer's head, and each silence within its body.
    pub(crate) timeout: Duration,
    pub(crate) connect_timeout: Duration,
    /// How often a request of which nothing was sent is tried at another server.
    pub(crate) retries: u32,
    /// Where it is asked whether a server is ready.
    pub(crate) ready_path: PathAndQuery,
    /// How that is asked all the time, if it is.
    pub(crate) probes: Option<Probes>,
}

/// How often a model server is asked whether it is ready, and for how long its answer is waited for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Probes {
    pub(crate) interval: Duration,
    pub(crate) timeout: Duration,
}

/// The file as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ServerFile {
    #[serde(deserialize_with = "one_or_more")]
    http: Vec<String>,
    timeout_ms: Option<u64>,
    connect_timeout_ms: Option<u64>,
    in_flight_max: Option<u64>,
    queue_max: Option<u64>,
    queue_ms_max: Option<u64>,
    retries: Option<u64>,
    health: Option<HealthFile>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object, which may be empty")]
struct HealthFile {
    path: Option<String>,
    interval_ms: Option<u64>,
    timeout_ms: Option<u64>,
    failures: Option<u64>,
}

impl Servers {
    /// Reads a file. The error says what is wrong with it.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Servers, String> {
        let mut json = serde_json::Deserializer::from_slice(bytes);
        let file: ServerFile = serde_path_to_error::deserialize(&mut json).map_err(|error| match error.path().to_string().as_str() {
            "." => error.inner().to_string(),
            path => format!("{path}: {}", error.inner()),
        })?;
        json.end().map_err(|error| error.to_string())?;
        let timeout_ms = within("timeout_ms", file.timeout_ms, UPSTREAM_TIMEOUT_MS, 1..=UPSTREAM_TIMEOUT_MS_MAX)?;
        let connect_ms = UPSTREAM_CONNECT_MS.min(timeout_ms);
        let connect_ms = within("connect_timeout_ms", file.connect_timeout_ms, connect_ms, 1..=timeout_ms)?;
        let in_flight_max = within("in_flight_max", file.in_flight_max, UPSTREAM_IN_FLIGHT, 1..=UPSTREAM_IN_FLIGHT_MAX)?;
        let queue_max = within("queue_max", file.queue_max, UPSTREAM_QUEUE, 0..=UPSTREAM_QUEUE_MAX)?;
        let queue_ms_max = within("queue_ms_max", file.queue_ms_max, UPSTREAM_QUEUE_MS, 1..=UPSTREAM_QUEUE_MS_MAX)?;
        let retries = within("retries", file.retries, UPSTREAM_RETRIES, 0..=UPSTREAM_RETRIES_MAX)?;
        let (mut failures, mut probes, mut ready_path) = (UPSTREAM_FAILURES, None, PathAndQuery::from_static(READY_PATH));
        if let Some(HealthFile { path, interval_ms, timeout_ms, failures: named }) = file.health {
            let allowed = PROBE_INTERVAL_MS_MIN..=PROBE_INTERVAL_MS_MAX;
            let interval_ms = within("health.interval_ms", interval_ms, PROBE_INTERVAL_MS, allowed)?;
            // One probe is over before the next begins.
            let timeout_ms = within("health.timeout_ms", timeout_ms, PROBE_MS.min(interval_ms), 1..=interval_ms)?;
            failures = within("health.failures", named, UPSTREAM_FAILURES, 1..=UPSTREAM_FAILURES_MAX)?;
            ready_path = path.map_or(Ok(ready_path), |path| path_of(&path))?;
            probes = Some(Probes { interval: Duration::from_millis(interval_ms), timeout: Duration::from_millis(timeout_ms) });
        }
        let limits =
            Limits { in_flight_max: in_flight_max as usize, queue_max: queue_max as usize, queue_ms_max, failures_max: failures as u32 };
        Ok(Servers {
            addresses: addresses(&file.http)?,
            limits,
            timeout: Duration::from_millis(timeout_ms),
            connect_timeout: Duration::from_millis(connect_ms),
            retries: retries as u32,
            ready_path,
            probes,
        })
    }
}

fn within(name: &str, named: Option<u64>, usual: u64, allowed: RangeInclusive<u64>) -> Result<u64, String> {
    let value = named.unwrap_or(usual);
    let (least, most) = (allowed.start(), allowed.end());
    if allowed.contains(&value) { Ok(value) } else { Err(format!("{name} is {value}; it may be {least} to {most}")) }
}

fn path_of(text: &str) -> Result<PathAndQuery, String> {
    let wrong = |why: &str| format!("health.path is {text:?}: {why}");
    if !text.starts_with('/') || text.contains('#') {
        return Err(wrong("it must begin with '/', and have no '#'"));
    }
    text.parse().map_err(|error: http::uri::InvalidUri| wrong(&error.to_string()))
}

fn addresses(texts: &[String]) -> Result<Vec<Address>, String> {
    if !(1..=ENDPOINTS_MAX).contains(&texts.len()) {
        return Err(format!("http names {} model servers; it may be 1 to {ENDPOINTS_MAX}", texts.len()));
    }
    let addresses = texts.iter().map(|text| Address::parse(text)).collect::<Result<Vec<Address>, String>>()?;
    let mut seen = BTreeSet::new();
    if let Some(twice) = addresses.iter().find(|address| !seen.insert((address.host().to_ascii_lowercase(), address.port()))) {
        return Err(format!("http names {twice} twice; it would get two shares"));
    }
    // One model, one path: which server answers must not change what is asked of it.
    let mut pairs = addresses.iter().zip(addresses.iter().skip(1));
    if let Some((one, other)) = pairs.find(|(one, other)| one.path() != other.path()) {
        return Err(format!("http names {one} and {other} with different paths; all servers of a model have the same path, or none"));
    }
    Ok(addresses)
}

/// A string, or a list of strings.
fn one_or_more<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct Texts;

    impl<'de> Visitor<'de> for Texts {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("the address of a model server, or a list of them")
        }

        fn visit_str<E>(self, text: &str) -> Result<Vec<String>, E> {
            Ok(vec![text.to_owned()])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<String>, A::Error> {
            let mut texts = Vec::new();
            while let Some(text) = list.next_element()? {
                texts.push(text);
            }
            Ok(texts)
        }
    }

    deserializer.deserialize_any(Texts)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(text: &str) -> Result<Servers, String> {
        Servers::parse(text.as_bytes())
    }

    #[test]
    fn a_file_that_names_a_server_only_gets_the_usual() {
        let servers = parse(r#"{"http": "http://127.0.0.1:9001"}"#).unwrap();
        let limits = Limits { in_flight_max: 1_024, queue_max: 256, queue_ms_max: 1_000, failures_max: 3 };
        assert_eq!(
            servers,
            Servers {
                addresses: vec![Address::parse("http://127.0.0.1:9001").unwrap()],
                limits,
                timeout: Duration::from_secs(30),
                connect_timeout: Duration::from_secs(5),
                retries: 1,
                ready_path: PathAndQuery::from_static("/v2/health/ready"),
                probes: None,
            }
        );
        let quick = parse(r#"{"http": "http://127.0.0.1:9001", "timeout_ms": 200}"#).unwrap();
        assert_eq!(quick.connect_timeout, Duration::from_millis(200));
    }

    #[test]
    fn every_field_can_be_named() {
        let servers = parse(
            r#"{"http": ["http://a:1/v2/models/m/infer", "http://b:1/v2/models/m/infer", "http://a:2/v2/models/m/infer"],
                "timeout_ms": 9000, "connect_timeout_ms": 50, "in_flight_max": 4, "queue_max": 0, "queue_ms_max": 60000, "retries": 0}"#,
        );
        let servers = servers.unwrap();
        let shown: Vec<_> = servers.addresses.iter().map(Address::to_string).collect();
        assert_eq!(shown, ["a:1", "b:1", "a:2"]);
        assert_eq!(servers.limits, Limits { in_flight_max: 4, queue_max: 0, queue_ms_max: 60_000, failures_max: 3 });
        assert_eq!((servers.timeout.as_millis(), servers.connect_timeout.as_millis(), servers.retries), (9_000, 50, 0));
    }

    #[test]
    fn probes_are_asked_for_with_an_object_that_may_be_empty() {
        let health = |health: &str| parse(&format!(r#"{{"http": "http://h", "health": {health}}}"#)).unwrap();
        let probes =
            |interval, timeout| Some(Probes { interval: Duration::from_millis(interval), timeout: Duration::from_millis(timeout) });
        let usual = health("{}");
        assert_eq!((usual.probes, usual.ready_path.as_str(), usual.limits.failures_max), (probes(5_000, 1_000), "/v2/health/ready", 3));
        assert_eq!(health(r#"{"interval_ms": 250}"#).probes, probes(250, 250));
        let named = health(r#"{"path": "/up?deep=1", "interval_ms": 100, "timeout_ms": 99, "failures": 1}"#);
        assert_eq!((named.probes, named.ready_path.as_str(), named.limits.failures_max), (probes(100, 99), "/up?deep=1", 1));
    }

    #[test]
    fn what_is_wrong_is_said_with_the_field_and_what_it_may_be() {
        let with = |field: &str, value: serde_json::Value| {
            let mut file = json!({ "http": "http://h", "timeout_ms": 500 });
            file[field] = value;
            parse(&file.to_string()).unwrap_err()
        };
        for (field, value, why) in [
            ("timeout_ms", json!(0), "timeout_ms is 0; it may be 1 to 3600000"),
            ("timeout_ms", json!(3_600_001), "timeout_ms is 3600001; it may be 1 to 3600000"),
            ("connect_timeout_ms", json!(501), "connect_timeout_ms is 501; it may be 1 to 500"),
            ("in_flight_max", json!(0), "in_flight_max is 0; it may be 1 to 65536"),
            ("in_flight_max", json!(65_537), "in_flight_max is 65537; it may be 1 to 65536"),
            ("queue_max", json!(65_537), "queue_max is 65537; it may be 0 to 65536"),
            ("queue_ms_max", json!(0), "queue_ms_max is 0; it may be 1 to 60000"),
            ("retries", json!(17), "retries is 17; it may be 0 to 16"),
            ("retries", json!(-1), "retries: invalid value: integer `-1`, expected u64"),
            ("queue_max", json!("many"), "queue_max: invalid type: string \"many\", expected u64"),
            ("http", json!([]), "http names 0 model servers; it may be 1 to 64"),
            ("http", json!(vec!["http://h"; 65]), "http names 65 model servers; it may be 1 to 64"),
            ("http", json!(7), "http: invalid type: integer `7`, expected the address of a model server, or a list of them"),
            ("http", json!(["http://h", 7]), "http[1]: invalid type: integer `7`, expected a string"),
            ("http", json!(["http://h", "h"]), "\"h\" is not the address of a model server: it must begin with http://"),
            ("http", json!(["http://h", "http://H:80"]), "http names H:80 twice; it would get two shares"),
            (
                "http",
                json!(["http://h/p", "http://g/q"]),
                "http names h and g with different paths; all servers of a model have the same path, or none",
            ),
            (
                "http",
                json!(["http://h/p", "http://g"]),
                "http names h and g with different paths; all servers of a model have the same path, or none",
            ),
            ("health", json!("/up"), "health: invalid type: string \"/up\", expected an object, which may be empty"),
            ("health", json!({ "interval": 5 }), "health.interval: unknown field `interval`, expected one of `path`, "),
            ("health", json!({ "interval_ms": 99 }), "health.interval_ms is 99; it may be 100 to 3600000"),
            ("health", json!({ "timeout_ms": 5_001 }), "health.timeout_ms is 5001; it may be 1 to 5000"),
            ("health", json!({ "failures": 0 }), "health.failures is 0; it may be 1 to 100"),
            ("health", json!({ "path": "up" }), "health.path is \"up\": it must begin with '/', and have no '#'"),
            ("health", json!({ "path": "/up there" }), "health.path is \"/up there\": invalid uri character"),
            ("https", json!("https://h"), "https: unknown field `https`, expected one of `http`, "),
        ] {
            let refused = with(field, value.clone());
            assert!(refused.starts_with(why), "{field} {value}: {refused}");
        }
        assert!(parse(r#"{"http": "http://h"} x"#).unwrap_err().starts_with("trailing characters"));
    }
}
