//! `GET /members`, `POST /members`, `GET /snapshot`: who decides, how that changes, and what a node begins with that joins.

use tide::Request;

use super::read_json;
use super::transactions::status;
use crate::http::Refusal;
use crate::http::app::{State, json};

/// The members, and whoever else is linked.
pub(crate) async fn list(request: Request<State>) -> tide::Result {
    json(200, &request.state().control.members().await?)
}

/// Adds or removes one member; the answer is the receipt of the `config` transaction.
pub(crate) async fn change(mut request: Request<State>) -> tide::Result {
    let body = request.body_bytes().await?;
    if body.trim_ascii().is_empty() {
        let sentence = r#"the body is empty; send JSON such as {"action": "add", "node": "node-d"}"#;
        return Err(Refusal::new(400, "bad_json", sentence).into());
    }
    let receipt = request.state().control.change_members(read_json(&body)?).await?;
    json(status(&receipt), &receipt)
}

/// The state as of the last decided slot. For `serve --join`; refused by a node that is not where a majority is.
pub(crate) async fn snapshot(request: Request<State>) -> tide::Result {
    json(200, &request.state().control.snapshot().await?)
}

#[cfg(test)]
mod tests {
    use crate::api::{MembersRequest, Outcome, Snapshot};
    use crate::http::Refusal;
    use crate::http::fakes::{Fake, get, post, receipt};

    #[test]
    fn members_and_learners_are_listed() {
        let answer = get(Fake::default(), "/members").json();
        let roles: Vec<_> = answer["members"].as_array().unwrap().iter().map(|m| m["role"].as_str().unwrap()).collect();
        assert_eq!((&answer["node"], roles), (&"node-a".into(), vec!["member", "learner"]));
    }

    #[test]
    fn a_change_arrives_as_it_was_sent_and_its_answer_is_a_receipt() {
        let fake = Fake::default();
        let asked = fake.asked.clone();
        let body = r#"{"action": "remove", "node": "node-c", "idempotency_key": "k"}"#;
        assert_eq!(post(fake, "/members", body).status, 200);
        assert_eq!(asked.lock().unwrap().as_slice(), [format!("members {:?}", serde_json::from_str::<MembersRequest>(body).unwrap())]);
        let vetoed = Fake { receipt: Ok(receipt(Outcome::Aborted, Some("vetoed"))), ..Fake::default() };
        assert_eq!(post(vetoed, "/members", body).status, 412);
        let refused = Fake { receipt: Err(Refusal::new(409, "already_member", "node-c is a member")), ..Fake::default() };
        assert_eq!(post(refused, "/members", body).error(), (409, "already_member".into()));
    }

    #[test]
    fn what_is_not_a_change_of_members_is_400_with_the_place() {
        for (body, code, named) in [
            ("", "bad_json", "the body is empty"),
            (r#"{"action": "replace", "node": "node-c"}"#, "bad_request", "at action: unknown variant `replace`"),
            (r#"{"action": "add"}"#, "bad_request", "missing field `node`"),
            (r#"{"action": "add", "node": "a b"}"#, "bad_request", "at node: the node id \"a b\" is not a name"),
            (r#"{"action": "add", "node": "node-d", "disk_id": "00"}"#, "bad_request", "unknown field `disk_id`"),
        ] {
            let answer = post(Fake::default(), "/members", body);
            assert_eq!(answer.error(), (400, code.into()), "{body}");
            assert!(answer.json()["message"].as_str().unwrap().contains(named), "{}", answer.body);
        }
    }

    #[test]
    fn a_snapshot_reads_back_as_what_the_node_has() {
        let answer = get(Fake::default(), "/snapshot");
        let snapshot: Snapshot = serde_json::from_str(&answer.body).unwrap();
        assert_eq!(snapshot, crate::http::fakes::snapshot());
        let behind = get(Fake { ready: false, ..Fake::default() }, "/snapshot");
        assert_eq!(behind.error(), (503, "not_ready".into()));
    }
}
