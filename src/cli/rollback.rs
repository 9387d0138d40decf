//! `rollback`: away with the canaries, and with the last promotion if that is asked for.

use crate::api::{Outcome, Receipt, RollbackRequest, Routing};
use crate::cli::args::RollbackArgs;
use crate::cli::client::Mesh;
use crate::cli::countdown::watch;
use crate::cli::interrupt::Interrupt;
use crate::cli::output::Console;
use crate::cli::receipt::{failure, key_or_random, no_canary_of, send, submit, tell};
use crate::cli::{Exit, Failure, Surroundings};

/// Rolls back and prints the receipt; with `--watch` it then counts down until no canary is served anywhere.
pub async fn run(args: RollbackArgs, mut mesh: Mesh, around: &Surroundings, console: &mut Console<'_>) -> Result<Exit, Failure> {
    // Asked first only to find a node that answers: one that hangs must not hold up a rollback.
    let (client, _) = mesh.ask::<Routing>("/routing").await?;
    let key = key_or_random(args.idempotency_key);
    let goal = no_canary_of(args.route.as_ref());
    let request = RollbackRequest { route: args.route, stable: args.stable, idempotency_key: Some(key.clone()) };
    if !args.watch {
        return submit(client, "/rollback", &request, &key, &goal, console).await;
    }
    let interrupt = Interrupt::listen(around);
    let receipt: Receipt = send(client, "/rollback", &request).await.map_err(|error| failure(error, &key))?;
    if receipt.outcome != Outcome::Committed {
        return Ok(tell(&receipt, &client.target.endpoint, &key, &goal, console));
    }
    Ok(watch(receipt, mesh, &goal, &interrupt, around, console).await)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use serde_json::json;

    use super::*;
    use crate::cli::testing::{Fake, answer, ran, receipt, refusal, story};

    fn node(reply: impl Fn() -> crate::cli::testing::Reply + Send + Sync + 'static) -> Fake {
        let story = Mutex::new(story("node-a"));
        Fake::start(move |method, path, body| if path == "/rollback" { reply() } else { story.lock().unwrap().reply(method, path, body) })
    }

    #[test]
    fn a_rollback_is_of_everything_or_of_one_route_and_carries_a_key() {
        let node = node(|| answer(200, &receipt("committed", 6)));
        let line = format!("canary-mesh rollback --endpoint {}", node.address);
        assert_eq!(ran(&line).exit, Exit::Ok);
        assert_eq!(ran(&format!("{line} --route default --stable --idempotency-key k")).exit, Exit::Ok);
        let sent = node.sent_to("/rollback");
        assert_eq!((&sent[0]["stable"], sent[0].get("route")), (&json!(false), None));
        assert!(sent[0]["idempotency_key"].as_str().unwrap().len() > 16);
        assert_eq!(sent[1], json!({"route": "default", "stable": true, "idempotency_key": "k"}));
    }

    #[test]
    fn nothing_to_roll_back_is_a_refusal() {
        let node = node(|| refusal(400, "invalid", "no route has a canary"));
        let refused = ran(&format!("canary-mesh rollback --endpoint {}", node.address));
        assert_eq!((refused.exit, refused.err.as_str()), (Exit::Refused, "error: no route has a canary\n"));
    }

    #[test]
    fn without_watching_the_receipt_says_what_is_still_waited_for() {
        for (waiting, ends_in_ms, said) in [
            (json!(["node-c"]), 5_800, "no canary anywhere within 5.8 s: node-c has not applied it"),
            (json!(["node-b", "node-c"]), 5_840, "no canary anywhere within 5.9 s: node-b, node-c have not applied it"),
            (json!(["node-c"]), 0, "no canary anywhere: the lease of node-c has ended"),
            (json!([]), 0, "no canary anywhere: every member has applied it"),
        ] {
            let node = node(move || {
                let mut committed = receipt("committed", 6);
                (committed["waiting"], committed["leases_end_in_ms"]) = (waiting.clone(), json!(ends_in_ms));
                answer(200, &committed)
            });
            let done = ran(&format!("canary-mesh rollback --endpoint {}", node.address));
            assert_eq!((done.exit, done.out.lines().last()), (Exit::Ok, Some(said)));
        }
    }
}
