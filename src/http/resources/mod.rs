//! What tide answers, one file per group of resources.

pub(super) mod events;
pub(super) mod health;
pub(super) mod history;
pub(super) mod index;
pub(super) mod members;
pub(super) mod metrics;
pub(super) mod models;
pub(super) mod openapi;
pub(super) mod peers;
pub(super) mod rollouts;
pub(super) mod routing;
pub(super) mod transactions;

use serde::de::DeserializeOwned;

use super::Refusal;
use super::app::State;

/// The request's query as (name, value), decoded; refused if it has a name that is not in `known`.
fn query(request: &tide::Request<State>, known: &[&str]) -> Result<Vec<(String, String)>, Refusal> {
    let pairs: Vec<(String, String)> = request.url().query_pairs().into_owned().collect();
    match pairs.iter().find(|(name, _)| !known.contains(&name.as_str())) {
        Some((name, _)) => {
            let sentence = format!("{} does not know the query parameter {name:?}; it takes {}", request.url().path(), known.join(" and "));
            Err(Refusal::new(400, "bad_query", sentence))
        }
        None => Ok(pairs),
    }
}

/// A number from the query, if it is there.
fn number(pairs: &[(String, String)], name: &str) -> Result<Option<u64>, Refusal> {
    let Some((_, value)) = pairs.iter().rev().find(|(other, _)| other == name) else { return Ok(None) };
    let wrong = |_| Refusal::new(400, "bad_query", format!("{name}={value} is not a whole number that is 0 or above"));
    value.parse().map(Some).map_err(wrong)
}

/// The request's JSON; a refusal says where it is wrong: the field, the line and the column.
pub(super) fn read_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let field = if path == "." { String::new() } else { format!(" at {path}") };
        let error = error.into_inner();
        let error_code = if error.is_data() { "bad_request" } else { "bad_json" };
        Refusal::new(400, error_code, format!("the body cannot be taken{field}: {error}"))
    })?;
    json.end().map_err(|error| Refusal::new(400, "bad_json", format!("the body has more behind its JSON: {error}")))?;
    Ok(value)
}
