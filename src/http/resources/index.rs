//! `GET /`: what there is, taken from the OpenAPI document so that nothing is left out.

use std::sync::LazyLock;

use serde_json::Value;
use tide::Request;

use super::openapi::DOCUMENT;
use crate::http::app::{State, text};

static LIST: LazyLock<String> = LazyLock::new(|| {
    let document: Value = serde_json::from_str(DOCUMENT).unwrap_or_default();
    let mut list = format!("canary-mesh {}\n\n", env!("CARGO_PKG_VERSION"));
    for (path, item) in document.get("paths").and_then(Value::as_object).into_iter().flatten() {
        for (method, operation) in item.as_object().into_iter().flatten() {
            let summary = operation.get("summary").and_then(Value::as_str).unwrap_or_default();
            list.push_str(&format!("{:<5}{path:<28} {summary}\n", method.to_uppercase()));
        }
    }
    list
});

/// One line for each thing that can be asked.
pub(crate) async fn list(_: Request<State>) -> tide::Result {
    text(200, "text/plain; charset=utf-8", LIST.clone())
}

#[cfg(test)]
mod tests {
    use crate::http::fakes::{Fake, get};

    #[test]
    fn the_index_lists_every_path_with_a_sentence() {
        let list = get(Fake::default(), "/").body;
        assert!(list.starts_with("canary-mesh "));
        for line in ["GET  /routing/state", "POST /predict", "POST /transactions", "GET  /transactions/{txid}"] {
            let found = list.lines().find(|l| l.split_once("  ").is_some() && l.starts_with(line));
            assert!(found.is_some_and(|l| l.len() > 40), "{line} is not in {list}");
        }
    }
}
