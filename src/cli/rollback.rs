//! `rollback`: away with the canaries, and with the last promotion if that is asked for.

use crate::api::{RollbackRequest, Routing};
use crate::cli::args::RollbackArgs;
use crate::cli::client::Mesh;
use crate::cli::output::Console;
use crate::cli::receipt::{key_or_random, submit};
use crate::cli::{Exit, Failure};

/// Rolls back and prints the receipt.
pub async fn run(args: RollbackArgs, mut mesh: Mesh, console: &mut Console<'_>) -> Result<Exit, Failure> {
    // Asked first only to find a node that answers: one that hangs must not hold up a rollback.
    let (client, _) = mesh.ask::<Routing>("/routing").await?;
    let key = key_or_random(args.idempotency_key);
    let request = RollbackRequest { route: args.route, stable: args.stable, idempotency_key: Some(key.clone()) };
    submit(client, "/rollback", &request, &key, console).await
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
}
