//! What `rollout start` sends: of its words, or of a file.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::api::{GateSettings, RolloutRequest};
use crate::cli::Failure;
use crate::cli::args::{Prometheus, RoutedModel, StartArgs, Webhook};
use crate::core::ids::{ModelId, RouteName};
use crate::core::rollout::{ExternalGate, Question};

/// The route of a model without one.
const ROUTE_DEFAULT: &str = "default";
/// How long an answer of an external gate may take unless it is said, in milliseconds.
const GATE_TIMEOUT_MS: u64 = 5_000;
/// Largest file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The request that the words mean, without its key if none was given.
pub fn request(args: StartArgs) -> Result<RolloutRequest, Failure> {
    if let Some(file) = &args.file {
        let mut request = read(file)?;
        request.idempotency_key = args.idempotency_key.or(request.idempotency_key);
        return Ok(request);
    }
    let gate = GateSettings {
        alpha_local_percent: args.alpha.map(|alpha| alpha.local),
        alpha_fleet_percent: args.alpha.map(|alpha| alpha.fleet),
        latency_ms_max: args.latency_max,
        agreement_percent_min: args.agreement_min,
        distance_percent_max: None,
        dry_run: args.dry_run.then_some(true),
    };
    Ok(RolloutRequest {
        routes: routes(args.models, args.route)?,
        steps: args.steps.map(|steps| steps.0),
        bake_ms: args.bake,
        bake_max_ms: args.bake_max,
        on_inconclusive: args.on_inconclusive.unwrap_or_default(),
        mirror_percent: args.mirror,
        gate,
        external: external(args.webhooks, args.prometheus, args.gate_timeout.unwrap_or(GATE_TIMEOUT_MS))?,
        progress_deadline_ms: args.progress_deadline,
        idempotency_key: args.idempotency_key,
    })
}

/// Either one model, whose route may be said apart, or every model with its route.
fn routes(models: Vec<RoutedModel>, route: Option<RouteName>) -> Result<BTreeMap<RouteName, ModelId>, Failure> {
    if models.len() > 1
        && let Some(RoutedModel { model, .. }) = models.iter().find(|routed| routed.route.is_none())
    {
        return Err(Failure::usage(format!("of several models each needs its route: --model ROUTE={model}")));
    }
    let mut routes = BTreeMap::new();
    for RoutedModel { route: own, model } in models {
        let name = match (own, &route) {
            (Some(own), Some(other)) => {
                return Err(Failure::usage(format!("--model {own}={model} has a route already; leave out --route {other}")));
            }
            (Some(own), None) => own,
            (None, Some(route)) => route.clone(),
            (None, None) => ROUTE_DEFAULT.parse().map_err(|error| Failure::usage(format!("{error}")))?,
        };
        if let Some(other) = routes.insert(name.clone(), model.clone()) {
            return Err(Failure::usage(format!("route {name} gets one model, not both {other} and {model}")));
        }
    }
    Ok(routes)
}

/// The gates in a row; a webhook without a name is called `webhook`, a further one `webhook-2`.
fn external(webhooks: Vec<Webhook>, prometheus: Vec<Prometheus>, timeout_ms: u64) -> Result<Vec<ExternalGate>, Failure> {
    let mut gates = Vec::new();
    let mut unnamed = 0_u32;
    for Webhook { name, url } in webhooks {
        let name = match name {
            Some(name) => name,
            None => {
                unnamed += 1;
                let name = if unnamed == 1 { "webhook".to_owned() } else { format!("webhook-{unnamed}") };
                name.parse().map_err(|error| Failure::usage(format!("{error}")))?
            }
        };
        gates.push(ExternalGate { name, timeout_ms, question: Question::Webhook { url } });
    }
    gates.extend(prometheus.into_iter().map(|Prometheus { name, question }| ExternalGate { name, timeout_ms, question }));
    let mut names = BTreeSet::new();
    match gates.iter().find(|gate| !names.insert(&gate.name)) {
        Some(twice) => Err(Failure::usage(format!("two gates are called {}; sentences could not tell them apart", twice.name))),
        None => Ok(gates),
    }
}

fn read(file: &Path) -> Result<RolloutRequest, Failure> {
    let name = file.display();
    let wrong = |error: &dyn fmt::Display| Failure::usage(format!("{name}: {error}"));
    let source: Box<dyn Read> = match file.to_str() {
        Some("-") => Box::new(io::stdin()),
        _ => Box::new(File::open(file).map_err(|error| wrong(&error))?),
    };
    let mut text = Vec::new();
    source.take(FILE_BYTES_MAX + 1).read_to_end(&mut text).map_err(|error| wrong(&error))?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(wrong(&format!("more than {FILE_BYTES_MAX} bytes, which no rollout has")));
    }
    let mut json = serde_json::Deserializer::from_slice(&text);
    let request = serde_path_to_error::deserialize(&mut json).map_err(|error| match error.path().to_string().as_str() {
        "." | "?" => wrong(error.inner()),
        path => wrong(&format!("at {path}: {}", error.inner())),
    })?;
    json.end().map_err(|error| wrong(&error))?;
    Ok(request)
}
