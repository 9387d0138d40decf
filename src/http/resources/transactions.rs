//! `POST /transactions`, `GET /transactions/{txid}`, `POST /rollback`: changes and their receipts.

use tide::Request;

use super::read_json;
use crate::api::{Outcome, Receipt, RollbackRequest};
use crate::core::ids::TxId;
use crate::http::Refusal;
use crate::http::app::{State, json};

/// Coordinates a transaction; the answer is its receipt.
pub(crate) async fn propose(mut request: Request<State>) -> tide::Result {
    let body = request.body_bytes().await?;
    if body.trim_ascii().is_empty() {
        let sentence = r#"the body is empty; send JSON such as {"kind": "advance", "changes": {"default": {"canary_model_id": "digits-v2", "weights": {"stable": 90, "canary": 10}}}}"#;
        return Err(Refusal::new(400, "bad_json", sentence).into());
    }
    let receipt = request.state().control.propose(read_json(&body)?).await?;
    json(status(&receipt), &receipt)
}

/// Takes canaries back; without a body, all of them.
pub(crate) async fn rollback(mut request: Request<State>) -> tide::Result {
    let body = request.body_bytes().await?;
    let rollback = if body.trim_ascii().is_empty() { RollbackRequest::default() } else { read_json(&body)? };
    let receipt = request.state().control.rollback(rollback).await?;
    json(status(&receipt), &receipt)
}

/// A receipt, asked for later. 200 whatever the outcome: that is in the receipt.
pub(crate) async fn show(request: Request<State>) -> tide::Result {
    let txid: TxId = request.param("txid")?.parse().map_err(|error| Refusal::new(400, "bad_txid", format!("{error}")))?;
    match request.state().control.transaction(txid.clone()).await {
        Some(receipt) => json(200, &receipt),
        None => {
            let sentence = format!(
                "{txid} is not known here. That does not mean that it was aborted: this node may not have heard of it yet; \
                 ask again, or ask {}, which coordinates it",
                txid.node
            );
            Err(Refusal::new(404, "unknown_transaction", sentence).into())
        }
    }
}

/// The status that goes with a receipt.
pub(super) fn status(receipt: &Receipt) -> u16 {
    match (receipt.outcome, receipt.error_code.as_deref()) {
        (Outcome::Committed, _) => 200,
        (Outcome::Unknown, _) => 504,
        (Outcome::Aborted, Some("busy" | "slot_taken" | "preempted")) => 409,
        (Outcome::Aborted, Some("vetoed" | "invalid")) => 412,
        (Outcome::Aborted, _) => 503,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::fakes::{Answered, Fake, get, post, receipt};

    const PROPOSAL: &str =
        r#"{"kind": "advance", "changes": {"default": {"canary_model_id": "digits-v2", "weights": {"stable": 90, "canary": 10}}}}"#;

    fn proposed(body: &str) -> Answered {
        post(Fake::default(), "/transactions", body)
    }

    fn ending(outcome: Outcome, error_code: Option<&str>) -> Fake {
        Fake { receipt: Ok(receipt(outcome, error_code)), ..Fake::default() }
    }

    #[test]
    fn the_status_tells_the_outcome_and_the_body_is_the_receipt() {
        use Outcome::{Aborted, Committed, Unknown};
        for (outcome, code, status) in [
            (Committed, None, 200),
            (Aborted, Some("busy"), 409),
            (Aborted, Some("slot_taken"), 409),
            (Aborted, Some("preempted"), 409),
            (Aborted, Some("vetoed"), 412),
            (Aborted, Some("invalid"), 412),
            (Aborted, Some("no_majority"), 503),
            (Aborted, Some("no_vote"), 503),
            (Aborted, Some("not_ready"), 503),
            (Aborted, Some("coordinator_lost"), 503),
            (Unknown, None, 504),
        ] {
            for (path, body) in [("/transactions", PROPOSAL), ("/rollback", "")] {
                let answer = post(ending(outcome, code), path, body);
                assert_eq!(answer.status, status, "{outcome} {code:?} at {path}");
                assert_eq!(serde_json::from_str::<Receipt>(&answer.body).unwrap(), receipt(outcome, code));
            }
        }
    }

    #[test]
    fn a_refusal_is_an_error_with_its_own_status() {
        let fake = Fake { receipt: Err(Refusal::new(503, "stopping", "the node is stopping")), ..Fake::default() };
        assert_eq!(post(fake, "/transactions", PROPOSAL).error(), (503, "stopping".into()));
    }

    #[test]
    fn a_proposal_arrives_as_it_was_sent() {
        let fake = Fake::default();
        let asked = fake.asked.clone();
        post(fake, "/transactions", PROPOSAL);
        assert_eq!(
            asked.lock().unwrap().as_slice(),
            [format!("propose {:?}", serde_json::from_str::<crate::api::TransactionRequest>(PROPOSAL).unwrap())]
        );
    }

    #[test]
    fn wrong_json_is_400_with_the_field_and_the_place() {
        for (body, code, named) in [
            ("", "bad_json", &["empty", "\"kind\""][..]),
            ("{", "bad_json", &["line 1 column 1"]),
            ("{}\n", "bad_request", &["missing field `kind`", "line 1 column 2"]),
            (r#"{"kind": "raise", "changes": {}}"#, "bad_request", &["at kind", "`raise`", "`advance`", "column 16"]),
            ("{\"kind\": \"advance\", \"changes\": {},\n \"force\": true}", "bad_request", &["`force`", "line 2 column 8"]),
            (r#"{"kind": "advance", "changes": {"a b": {}}}"#, "bad_request", &["at changes", "\"a b\" is not a name", "column"]),
            (
                r#"{"kind": "advance", "changes": {"default": {"weights": {"stable": "x", "canary": 1}}}}"#,
                "bad_request",
                &["at changes.default.weights.stable", "column"],
            ),
            (
                r#"{"kind": "advance", "changes": {"default": {"weights": {"stable": 99.999, "canary": 1}}}}"#,
                "bad_request",
                &["at changes.default.weights.stable", "two decimals", "column"],
            ),
            (r#"{"kind": "advance", "changes": {}} {}"#, "bad_json", &["more behind", "column 36"]),
        ] {
            let answer = proposed(body);
            assert_eq!(answer.error(), (400, code.into()), "{body}: {}", answer.body);
            let message = answer.json()["message"].as_str().unwrap().to_owned();
            assert!(named.iter().all(|part| message.contains(part)), "{body}: {message}");
        }
    }

    #[test]
    fn a_rollback_needs_no_body_and_takes_one() {
        let fake = Fake::default();
        let asked = fake.asked.clone();
        let (all, one) = (RollbackRequest::default(), r#"{"route": "default", "stable": true}"#);
        assert_eq!(post(fake.clone(), "/rollback", " ").status, 200);
        assert_eq!(post(fake, "/rollback", one).status, 200);
        let expected = [format!("rollback {all:?}"), format!("rollback {:?}", serde_json::from_str::<RollbackRequest>(one).unwrap())];
        assert_eq!(asked.lock().unwrap().as_slice(), expected);
        assert_eq!(post(Fake::default(), "/rollback", r#"{"rout": "default"}"#).error(), (400, "bad_request".into()));
    }

    #[test]
    fn a_receipt_can_be_asked_for_later_and_not_known_is_not_aborted() {
        let fake = ending(Outcome::Aborted, Some("vetoed"));
        let known = get(fake, "/transactions/node-a-1-7");
        assert_eq!((known.status, &known.json()["outcome"]), (200, &"aborted".into()));
        let unknown = get(Fake::default(), "/transactions/node-b-1-1");
        assert_eq!(unknown.error(), (404, "unknown_transaction".into()));
        assert!(unknown.json()["message"].as_str().unwrap().contains("does not mean that it was aborted"));
        assert_eq!(get(Fake::default(), "/transactions/nonsense").error(), (400, "bad_txid".into()));
    }
}
