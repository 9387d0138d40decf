//! `GET /openapi.json`: everything the front serves, in OpenAPI 3.1.

use tide::Request;

use crate::http::app::{State, text};

/// Written by hand; a test holds it to what is served.
pub(super) const DOCUMENT: &str = include_str!("../openapi.json");

/// The document as it is.
pub(crate) async fn document(_: Request<State>) -> tide::Result {
    text(200, "application/json", DOCUMENT.to_owned())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use serde::de::DeserializeOwned;
    use serde_json::Value;

    use super::DOCUMENT;
    use crate::api;
    use crate::http::app::routes;
    use crate::http::fakes::{Fake, get, post};

    /// What goes past tide.
    const PREDICTIONS: [&str; 3] = ["/predict", "/v2/models/{route}/infer", "/v1/models/{route}:predict"];

    fn document() -> Value {
        serde_json::from_str(DOCUMENT).unwrap()
    }

    #[test]
    fn the_document_and_the_served_routes_are_the_same() {
        let served = routes(Arc::new(Fake::default()), Arc::default()).served;
        let in_braces = |path: &str| {
            let segments = path.split('/').map(|s| s.strip_prefix(':').map_or(s.to_owned(), |name| format!("{{{name}}}")));
            segments.collect::<Vec<_>>().join("/")
        };
        let mut expected: BTreeSet<(String, String)> =
            served.iter().map(|(method, path)| (in_braces(path), method.to_string().to_lowercase())).collect();
        expected.extend(PREDICTIONS.map(|path| (path.to_owned(), "post".to_owned())));
        let document = document();
        let mut documented = BTreeSet::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            documented.extend(item.as_object().unwrap().keys().map(|method| (path.clone(), method.clone())));
        }
        assert_eq!(documented, expected);
    }

    #[test]
    fn every_reference_leads_somewhere_and_everything_is_referred_to() {
        fn references(value: &Value, found: &mut BTreeSet<String>) {
            match value {
                Value::Object(fields) => {
                    found.extend(fields.get("$ref").map(|target| target.as_str().unwrap().to_owned()));
                    fields.values().for_each(|field| references(field, found));
                }
                Value::Array(items) => items.iter().for_each(|item| references(item, found)),
                _ => {}
            }
        }
        let document = document();
        let mut found = BTreeSet::new();
        references(&document, &mut found);
        let mut defined = BTreeSet::new();
        for (group, entries) in document["components"].as_object().unwrap() {
            defined.extend(entries.as_object().unwrap().keys().map(|name| format!("#/components/{group}/{name}")));
        }
        assert_eq!(found, defined);
    }

    /// Checks `value` against the part of JSON Schema that the document uses; gives the first place that does not fit.
    fn check(document: &Value, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
        let wrong = |what: &str| Err(format!("{at}: {what}: {value} against {schema}"));
        if let Some(target) = schema.get("$ref") {
            let pointer = target.as_str().unwrap().strip_prefix('#').unwrap();
            return check(document, document.pointer(pointer).unwrap(), value, at);
        }
        if let Some(options) = schema.get("anyOf") {
            let fits = options.as_array().unwrap().iter().any(|option| check(document, option, value, at).is_ok());
            return if fits { Ok(()) } else { wrong("no option fits") };
        }
        let kind = match value {
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::Number(n) if n.is_u64() || n.is_i64() => "integer",
            Value::Number(_) => "number",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        };
        let kinds: Vec<&str> = match schema.get("type") {
            Some(Value::Array(kinds)) => kinds.iter().filter_map(Value::as_str).collect(),
            Some(kind) => kind.as_str().into_iter().collect(),
            None => return wrong("the schema has no type"),
        };
        let fits = kinds.contains(&kind) || kind == "integer" && kinds.contains(&"number");
        if !fits {
            return wrong("the type differs");
        }
        if let Some(words) = schema.get("enum")
            && !words.as_array().unwrap().contains(value)
        {
            return wrong("not one of the words");
        }
        if let Value::Array(items) = value {
            for (index, item) in items.iter().enumerate() {
                check(document, &schema["items"], item, &format!("{at}[{index}]"))?;
            }
        }
        if let Value::Object(fields) = value {
            let properties = schema.get("properties").and_then(Value::as_object);
            for (name, field) in fields {
                match properties.and_then(|p| p.get(name)).or(schema.get("additionalProperties").filter(|a| a.is_object())) {
                    Some(schema) => check(document, schema, field, &format!("{at}.{name}"))?,
                    None => return wrong(&format!("{name} is not in the schema")),
                }
            }
            for name in schema.get("required").and_then(Value::as_array).into_iter().flatten() {
                if !fields.contains_key(name.as_str().unwrap()) {
                    return wrong(&format!("{name} is missing"));
                }
            }
        }
        Ok(())
    }

    fn schema_of<'a>(document: &'a Value, method: &str, path: &str, status: u16) -> &'a Value {
        let mut response = &document["paths"][path][method]["responses"][status.to_string()];
        if let Some(target) = response.get("$ref") {
            response = document.pointer(target.as_str().unwrap().strip_prefix('#').unwrap()).unwrap();
        }
        &response["content"]["application/json"]["schema"]
    }

    #[test]
    fn what_is_answered_is_what_the_document_says() {
        let document = document();
        for path in [
            "/routing",
            "/routing/state",
            "/health",
            "/peers",
            "/members",
            "/snapshot",
            "/history",
            "/rollouts",
            "/v2",
            "/v2/health/live",
            "/v2/health/ready",
            "/v1/models",
        ] {
            let answer = get(Fake::default(), path);
            check(&document, schema_of(&document, "get", path, 200), &answer.json(), path).unwrap();
        }
        let receipt = get(Fake::default(), "/transactions/node-a-1-7").json();
        check(&document, schema_of(&document, "get", "/transactions/{txid}", 200), &receipt, "receipt").unwrap();
        for (path, asked) in [
            ("/v2/models/{route}", "/v2/models/default"),
            ("/v2/models/{route}", "/v2/models/other"),
            ("/v2/models/{route}", "/v2/models/nope"),
            ("/v2/models/{route}/ready", "/v2/models/default/ready"),
            ("/v1/models/{route}", "/v1/models/default"),
        ] {
            let answer = get(Fake::default(), asked);
            check(&document, schema_of(&document, "get", path, answer.status), &answer.json(), asked).unwrap();
        }
        let one = get(Fake::default(), "/rollouts/r7").json();
        check(&document, schema_of(&document, "get", "/rollouts/{id}", 200), &one, "rollout").unwrap();
        let stopping = Fake::default();
        stopping.events.end();
        for (method, path, answer) in [
            ("post", "/rollouts", post(Fake::default(), "/rollouts", r#"{"routes": {"default": "m"}}"#)),
            ("post", "/rollouts", post(Fake::default(), "/rollouts", "{}")),
            ("post", "/rollouts/{id}/pause", post(Fake::default(), "/rollouts/r7/pause", "")),
            ("post", "/rollouts/undo", post(Fake::default(), "/rollouts/undo", "")),
            ("get", "/routing/state", get(Fake::default(), "/routing/state?route=nope")),
            ("get", "/history", get(Fake::default(), "/history?limit=x")),
            ("get", "/events", get(Fake::default(), "/events?from=1")),
            ("get", "/events", get(stopping, "/events")),
            ("post", "/transactions", post(Fake::default(), "/transactions", "{}")),
            ("post", "/rollback", post(Fake::default(), "/rollback", "{")),
            ("post", "/members", post(Fake::default(), "/members", "{}")),
            ("get", "/snapshot", get(Fake { ready: false, ..Fake::default() }, "/snapshot")),
            ("get", "/transactions/{txid}", get(Fake::default(), "/transactions/x")),
            ("get", "/rollouts/{id}", get(Fake::default(), "/rollouts/x")),
            ("get", "/rollouts/{id}", get(Fake::default(), "/rollouts/r8")),
        ] {
            check(&document, schema_of(&document, method, path, answer.status), &answer.json(), path).unwrap();
        }
    }

    /// Whether a request that the document's example shows is one that is taken.
    fn example<T: DeserializeOwned>(document: &Value, path: &str) {
        let content = &document["paths"][path]["post"]["requestBody"]["content"]["application/json"];
        let example = &content["example"];
        serde_json::from_value::<T>(example.clone()).unwrap_or_else(|e| panic!("{path}: {e}: {example}"));
        check(document, &content["schema"], example, path).unwrap();
    }

    #[test]
    fn the_examples_are_taken() {
        let document = document();
        example::<api::TransactionRequest>(&document, "/transactions");
        example::<api::RollbackRequest>(&document, "/rollback");
        example::<api::MembersRequest>(&document, "/members");
        example::<api::RolloutRequest>(&document, "/rollouts");
        for action in ["pause", "resume", "promote", "abort", "retry"] {
            example::<api::RolloutActionRequest>(&document, &format!("/rollouts/{{id}}/{action}"));
        }
        example::<api::UndoRequest>(&document, "/rollouts/undo");
    }
}
