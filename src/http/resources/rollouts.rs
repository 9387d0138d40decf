//! `GET /rollouts`, `GET /rollouts/{id}`, `POST /rollouts`, `POST /rollouts/{id}/{action}`, `POST /rollouts/undo`: canaries on their way.

use tide::Request;

use super::read_json;
use super::transactions::status;
use crate::api::{RolloutActionRequest, RolloutReceipt, UndoRequest};
use crate::core::rollout::RolloutId;
use crate::http::app::{State, json};
use crate::http::{Refusal, RolloutAction};

/// The rollouts that are remembered.
pub(crate) async fn list(request: Request<State>) -> tide::Result {
    json(200, &request.state().control.rollouts().await)
}

/// One rollout.
pub(crate) async fn show(request: Request<State>) -> tide::Result {
    let id = id(&request)?;
    let rollouts = request.state().control.rollouts().await.rollouts;
    let unknown =
        || Refusal::new(404, "unknown_rollout", format!("there is no rollout {id}, or it is forgotten; GET /rollouts lists them"));
    json(200, rollouts.iter().find(|rollout| rollout.id == id).ok_or_else(unknown)?)
}

/// Starts a rollout, or has it wait behind those before it; the answer is the receipt of the transaction.
pub(crate) async fn start(mut request: Request<State>) -> tide::Result {
    let body = request.body_bytes().await?;
    if body.trim_ascii().is_empty() {
        let sentence = r#"the body is empty; send JSON such as {"routes": {"default": "digits-v2"}}"#;
        return Err(Refusal::new(400, "bad_json", sentence).into());
    }
    receipt(request.state().control.start_rollout(read_json(&body)?).await)
}

/// Does something to a rollout; without a body, in the plain way.
pub(crate) async fn act(mut request: Request<State>, action: RolloutAction) -> tide::Result {
    let id = id(&request)?;
    let body = request.body_bytes().await?;
    let asked = if body.trim_ascii().is_empty() { RolloutActionRequest::default() } else { read_json(&body)? };
    for (field, there, of) in [
        ("for_ms", asked.for_ms.is_some(), RolloutAction::Pause),
        ("full", asked.full, RolloutAction::Promote),
        ("reason", asked.reason.is_some(), RolloutAction::Abort),
    ] {
        if there && action != of {
            let sentence = format!("the body cannot be taken at {field}: it is for {}, and means nothing to {}", of.word(), action.word());
            return Err(Refusal::new(400, "bad_request", sentence).into());
        }
    }
    receipt(request.state().control.act_on_rollout(id, action, asked).await)
}

/// Makes stable again what it was; without a body, before the last promotion.
pub(crate) async fn undo(mut request: Request<State>) -> tide::Result {
    let body = request.body_bytes().await?;
    let undo = if body.trim_ascii().is_empty() { UndoRequest::default() } else { read_json(&body)? };
    receipt(request.state().control.undo(undo).await)
}

fn id(request: &Request<State>) -> Result<RolloutId, tide::Error> {
    Ok(request.param("id")?.parse().map_err(|error| Refusal::new(400, "bad_rollout_id", format!("{error}")))?)
}

fn receipt(receipt: Result<RolloutReceipt, Refusal>) -> tide::Result {
    let receipt = receipt?;
    json(status(&receipt.receipt), &receipt)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Outcome, RolloutList, RolloutRequest, RolloutView};
    use crate::http::fakes::{Fake, get, post, receipt, rollout_receipt, rollouts};

    const START: &str =
        r#"{"routes": {"default": "digits-v2"}, "steps": [{"weight_percent": 10}, {"weight_percent": 100, "pause": {"for_ms": null}}]}"#;
    const PATHS: [(&str, &str); 7] = [
        ("/rollouts", START),
        ("/rollouts/undo", ""),
        ("/rollouts/r7/pause", ""),
        ("/rollouts/r7/resume", " "),
        ("/rollouts/r7/promote", "{}"),
        ("/rollouts/r7/abort", ""),
        ("/rollouts/r7/retry", ""),
    ];

    #[test]
    fn rollouts_are_listed_and_shown_one_by_one() {
        let list: RolloutList = serde_json::from_str(&get(Fake::default(), "/rollouts").body).unwrap();
        assert_eq!(list, rollouts());
        let one: RolloutView = serde_json::from_str(&get(Fake::default(), "/rollouts/r7").body).unwrap();
        assert_eq!(one, rollouts().rollouts[0]);
        assert_eq!(get(Fake::default(), "/rollouts/r8").error(), (404, "unknown_rollout".into()));
        for path in ["/rollouts/7", "/rollouts/undo", "/rollouts/r-7"] {
            assert_eq!(get(Fake::default(), path).error(), (400, "bad_rollout_id".into()), "{path}");
        }
    }

    #[test]
    fn every_change_is_answered_by_its_receipt_and_the_status_tells_the_outcome() {
        for (outcome, code, status) in [
            (Outcome::Committed, None, 200),
            (Outcome::Aborted, Some("busy"), 409),
            (Outcome::Aborted, Some("vetoed"), 412),
            (Outcome::Aborted, Some("no_majority"), 503),
            (Outcome::Unknown, None, 504),
        ] {
            for (path, body) in PATHS {
                let answer = post(Fake { receipt: Ok(receipt(outcome, code)), ..Fake::default() }, path, body);
                assert_eq!(answer.status, status, "{outcome} {code:?} at {path}: {}", answer.body);
                let expected = rollout_receipt(receipt(outcome, code));
                assert_eq!(serde_json::from_str::<RolloutReceipt>(&answer.body).unwrap(), expected);
                assert_eq!(answer.json()["txid"], "node-a-1-7", "the receipt's fields are beside the rollout's name");
            }
        }
        for (path, body) in PATHS {
            let refusing = Fake { receipt: Err(Refusal::new(404, "unknown_rollout", "there is no rollout r7")), ..Fake::default() };
            assert_eq!(post(refusing, path, body).error(), (404, "unknown_rollout".into()));
        }
    }

    #[test]
    fn what_is_sent_arrives() {
        let fake = Fake::default();
        let asked = fake.asked.clone();
        for (path, body) in [
            ("/rollouts", START),
            ("/rollouts/r7/pause", r#"{"for_ms": 600000}"#),
            ("/rollouts/r7/promote", r#"{"full": true, "idempotency_key": "k"}"#),
            ("/rollouts/r8/abort", r#"{"reason": "the customers complain"}"#),
            ("/rollouts/undo", r#"{"to_version": 4, "route": "default"}"#),
        ] {
            assert_eq!(post(fake.clone(), path, body).status, 200, "{path}");
        }
        let request: RolloutRequest = serde_json::from_str(START).unwrap();
        let plain = RolloutActionRequest::default;
        let expected = [
            format!("start {request:?}"),
            format!("r7 Pause {:?}", RolloutActionRequest { for_ms: Some(600_000), ..plain() }),
            format!("r7 Promote {:?}", RolloutActionRequest { full: true, idempotency_key: Some("k".into()), ..plain() }),
            format!("r8 Abort {:?}", RolloutActionRequest { reason: Some("the customers complain".into()), ..plain() }),
            format!("undo {:?}", UndoRequest { to_version: Some(4), route: "default".parse().ok(), idempotency_key: None }),
        ];
        assert_eq!(asked.lock().unwrap().as_slice(), expected);
    }

    #[test]
    fn a_field_that_means_nothing_to_an_action_is_400_by_name() {
        for (path, body, said) in [
            ("pause", r#"{"full": true}"#, "at full: it is for promote, and means nothing to pause"),
            ("resume", r#"{"for_ms": 5}"#, "at for_ms: it is for pause, and means nothing to resume"),
            ("promote", r#"{"reason": "x"}"#, "at reason: it is for abort, and means nothing to promote"),
            ("retry", r#"{"reason": "x"}"#, "at reason: it is for abort, and means nothing to retry"),
            ("abort", r#"{"force": true}"#, "unknown field `force`"),
        ] {
            let answer = post(Fake::default(), &format!("/rollouts/r7/{path}"), body);
            assert_eq!(answer.error(), (400, "bad_request".into()), "{path}");
            assert!(answer.json()["message"].as_str().unwrap().contains(said), "{}", answer.body);
        }
    }

    #[test]
    fn what_is_not_a_rollout_is_400_with_the_place() {
        for (path, body, code, named) in [
            ("/rollouts", "", "bad_json", "the body is empty"),
            ("/rollouts", "{}", "bad_request", "missing field `routes`"),
            ("/rollouts", r#"{"routes": {"a b": "m"}}"#, "bad_request", "at routes"),
            ("/rollouts", r#"{"routes": {}, "steps": [{"weight_percent": 101}]}"#, "bad_request", "at steps[0].weight_percent"),
            ("/rollouts", r#"{"routes": {}, "gate": {"alpha": 5}}"#, "bad_request", "at gate.alpha"),
            ("/rollouts", r#"{"routes": {}, "bake": 5}"#, "bad_request", "unknown field `bake`"),
            ("/rollouts/7/abort", "", "bad_rollout_id", "\"7\" is not a rollout"),
            ("/rollouts/undo", r#"{"to": 4}"#, "bad_request", "unknown field `to`"),
        ] {
            let answer = post(Fake::default(), path, body);
            assert_eq!(answer.error(), (400, code.into()), "{path} {body}");
            assert!(answer.json()["message"].as_str().unwrap().contains(named), "{}", answer.body);
        }
        assert_eq!(post(Fake::default(), "/rollouts/r7/frobnicate", "").status, 404);
    }
}
