//! `propose`: one route's change, as the kind of transaction that it is.

use crate::api::{PercentBp, RouteChangeRequest, RouteView, Routing, TransactionRequest, WeightsPercent};
use crate::cli::args::ProposeArgs;
use crate::cli::client::Mesh;
use crate::cli::output::{Console, listed};
use crate::cli::receipt::{IN_FORCE, key_or_random, no_canary_of, submit};
use crate::cli::{Exit, Failure};
use crate::core::ids::RouteName;
use crate::core::state::{Kind, WEIGHT_WHOLE_BP};

/// What the node says of this route.
pub fn route_of<'r>(routing: &'r Routing, name: &RouteName) -> Result<&'r RouteView, Failure> {
    routing.routes.get(name).ok_or_else(|| {
        Failure::refused(format!("there is no route {name}; the routes of {} are {}", routing.node, listed(routing.routes.keys())))
    })
}

/// Looks at the route, proposes, and prints the receipt.
pub async fn run(args: ProposeArgs, mut mesh: Mesh, console: &mut Console<'_>) -> Result<Exit, Failure> {
    if args.canary.is_none() && !args.no_canary && !args.promote && args.weight.is_none() {
        return Err(Failure::usage("nothing is proposed: say --canary MODEL, --weight PERCENT, --promote or --no-canary"));
    }
    // Whoever answers this gets the proposal: a node that hangs is found out before anything is at stake.
    let (client, routing) = mesh.ask::<Routing>("/routing").await?;
    let route = route_of(&routing, &args.route)?;
    let (change, kind) = change(&args, route)?;
    let key = key_or_random(args.idempotency_key);
    let goal = if args.no_canary { no_canary_of(Some(&args.route)) } else { IN_FORCE.to_owned() };
    let changes = [(args.route, change)].into();
    let request = TransactionRequest { kind: args.kind.unwrap_or(kind), changes, idempotency_key: Some(key.clone()) };
    submit(client, "/transactions", &request, &key, &goal, console).await
}

/// The change that the words mean on this route, and its natural kind.
fn change(args: &ProposeArgs, route: &RouteView) -> Result<(RouteChangeRequest, Kind), Failure> {
    if args.promote {
        let Some(canary) = &route.canary_model_id else {
            let message = format!("route {} has no canary to promote; its stable model is {}", args.route, route.stable_model_id);
            return Err(Failure::refused(message));
        };
        let change = RouteChangeRequest { stable_model_id: Some(canary.clone()), ..RouteChangeRequest::default() };
        return Ok((change, Kind::Advance));
    }
    if args.no_canary {
        return Ok((RouteChangeRequest { canary_model_id: Some(None), ..RouteChangeRequest::default() }, Kind::Reduce));
    }
    let new_canary = args.canary.as_ref().filter(|canary| route.canary_model_id.as_ref() != Some(*canary));
    let lowers = new_canary.is_none() && args.weight.is_some_and(|weight| weight.0 < route.weights.canary.0);
    let change =
        RouteChangeRequest { stable_model_id: None, canary_model_id: args.canary.clone().map(Some), weights: args.weight.map(with_canary) };
    Ok((change, if lowers { Kind::Reduce } else { Kind::Advance }))
}

/// The weights with this share for the canary.
pub fn with_canary(canary: PercentBp) -> WeightsPercent {
    WeightsPercent { stable: PercentBp(WEIGHT_WHOLE_BP.saturating_sub(canary.0)), canary }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use serde_json::{Value, json};

    use super::*;
    use crate::cli::testing::{Fake, Ran, Reply, answer, nobody, ran, receipt, refusal, story};

    fn with_share(weight: f64) -> Fake {
        let mut node = story("node-a");
        (node.canary, node.weight) = (Some("digits-v2".into()), weight);
        node.start()
    }

    fn propose(node: &Fake, words: &str) -> Ran {
        ran(&format!("canary-mesh propose --endpoint {} {words}", node.address))
    }

    /// The one proposal that was sent, without its key.
    fn sent(node: &Fake) -> Value {
        let mut sent = node.sent_to("/transactions");
        assert_eq!(sent.len(), 1, "{sent:?}");
        sent[0].as_object_mut().unwrap().remove("idempotency_key").unwrap();
        sent.remove(0)
    }

    #[test]
    fn a_new_canary_is_an_advance_and_the_receipt_has_every_vote() {
        let node = story("node-a").start();
        let done = propose(&node, "--route default --canary digits-v2 --weight 10.25");
        assert_eq!(done.exit, Exit::Ok, "{done:?}");
        let change = json!({"canary_model_id": "digits-v2", "weights": {"stable": 89.75, "canary": 10.25}});
        assert_eq!(sent(&node), json!({"kind": "advance", "changes": {"default": change}}));
        let expected = "committed node-a-1-5: slot 5, version 5, hash 05050505, 1.25 ms\n\
                        node    vote  reason\nnode-a  yes   -\nnode-b  yes   -\nnode-c  yes   -\napplied by node-a, node-b, node-c\n";
        assert_eq!(done.out, expected);
    }

    #[test]
    fn a_weight_alone_is_an_advance_up_and_a_reduce_down_unless_told() {
        for (now, words, kind) in [
            (10.0, "--weight 20", "advance"),
            (10.0, "--weight 5", "reduce"),
            (10.0, "--canary digits-v2 --weight 5", "reduce"),
            (10.0, "--canary digits-v3 --weight 5", "advance"),
            (10.0, "--weight 5 --kind advance", "advance"),
            (10.0, "--no-canary", "reduce"),
            (10.0, "--promote", "advance"),
        ] {
            let node = with_share(now);
            assert_eq!(propose(&node, words).exit, Exit::Ok, "{words}");
            assert_eq!(sent(&node)["kind"], kind, "{words}");
        }
    }

    #[test]
    fn promotion_names_the_present_canary_and_removal_is_an_explicit_null() {
        let node = with_share(50.0);
        propose(&node, "--promote");
        assert_eq!(sent(&node)["changes"]["default"], json!({"stable_model_id": "digits-v2"}));
        let node = with_share(50.0);
        propose(&node, "--no-canary");
        assert_eq!(sent(&node)["changes"]["default"], json!({"canary_model_id": null}));
    }

    #[test]
    fn what_cannot_be_is_refused_before_anything_is_sent() {
        let node = story("node-a").start();
        for (words, exit, said) in [
            ("--promote", Exit::Refused, "route default has no canary to promote; its stable model is digits-v1"),
            ("--route nope --weight 5", Exit::Refused, "there is no route nope; the routes of node-a are default"),
            ("", Exit::Usage, "nothing is proposed"),
            ("--weight 101", Exit::Usage, "not a percentage"),
            ("--weight 1 --idempotency-key=", Exit::Usage, "1 to 128 bytes"),
        ] {
            let refused = propose(&node, words);
            assert_eq!(refused.exit, exit, "{words}: {refused:?}");
            assert!(refused.err.contains(said) && refused.out.is_empty(), "{words}: {refused:?}");
        }
        assert!(node.sent_to("/transactions").is_empty());
    }

    fn posts(reply: impl Fn() -> Reply + Send + Sync + 'static) -> Fake {
        let story = Mutex::new(story("node-a"));
        Fake::start(move |method, path, body| if method == "POST" { reply() } else { story.lock().unwrap().reply(method, path, body) })
    }

    #[test]
    fn a_veto_is_an_abort_with_the_reason_of_the_node() {
        let node = posts(|| {
            let mut vetoed = receipt("aborted", 5);
            vetoed["reason"] = "node-c voted no".into();
            vetoed["error_code"] = "vetoed".into();
            vetoed["votes"][2] = json!({"node": "node-c", "vote": "no", "reason": "models/digits-v4.onnx is not here"});
            answer(412, &vetoed)
        });
        let aborted = propose(&node, "--canary digits-v4 --weight 1");
        assert_eq!(aborted.exit, Exit::Refused);
        for said in ["aborted node-a-1-5", "reason: node-c voted no (vetoed)", "node-c  no    models/digits-v4.onnx is not here"] {
            assert!(aborted.out.contains(said), "{said:?} in {}", aborted.out);
        }
        assert!(!aborted.out.contains("applied"), "{}", aborted.out);
        assert_eq!(propose(&node, "--weight 1 --output json").json()["error_code"], "vetoed");
    }

    #[test]
    fn a_refusal_is_said_and_is_json_for_programs() {
        let node = posts(|| refusal(400, "invalid", "weights must sum to 100 %"));
        let refused = propose(&node, "--weight 1");
        assert_eq!((refused.exit, refused.err.as_str(), refused.out.as_str()), (Exit::Refused, "error: weights must sum to 100 %\n", ""));
        assert_eq!(propose(&node, "--weight 1 --output json").json()["error_code"], "invalid");
    }

    #[test]
    fn an_unknown_outcome_tells_how_to_ask_and_how_to_repeat() {
        let node = posts(|| answer(504, &receipt("unknown", 5)));
        let unknown = propose(&node, "--weight 1 --idempotency-key deploy-7");
        assert_eq!(unknown.exit, Exit::Unknown);
        assert!(unknown.err.contains(&format!("canary-mesh tx show node-a-1-5 --endpoint {}", node.address)), "{}", unknown.err);
        assert!(unknown.err.contains("--idempotency-key deploy-7"), "{}", unknown.err);
    }

    #[test]
    fn a_broken_connection_a_hang_and_an_inner_error_after_sending_are_unknown_and_nobody_else_is_asked() {
        for reply in [|| Reply::Break, || Reply::Hang, || refusal(500, "internal", "a handler failed")] {
            let (node, other) = (posts(reply), story("node-b").start());
            let unknown = propose(&node, &format!("--endpoint {} --timeout 2s --weight 1", other.address));
            assert_eq!(unknown.exit, Exit::Unknown, "{unknown:?}");
            let key = node.sent_to("/transactions")[0]["idempotency_key"].as_str().unwrap().to_owned();
            assert!(key.starts_with("cli-") && unknown.err.contains(&key), "{}", unknown.err);
            assert!(other.asked().is_empty(), "{:?}", other.asked());
        }
    }

    #[test]
    fn a_node_that_takes_no_connection_or_hangs_before_anything_is_sent_is_passed_over() {
        for first in [nobody(), Fake::start(|_, _, _| Reply::Hang).address] {
            let second = story("node-b").start();
            let done = ran(&format!("canary-mesh propose --timeout 2s --endpoint {first} --endpoint {} --weight 1", second.address));
            assert_eq!(done.exit, Exit::Ok, "{done:?}");
            assert_eq!(second.sent_to("/transactions").len(), 1);
        }
        let nowhere = ran(&format!("canary-mesh propose --endpoint {} --endpoint {} --weight 1", nobody(), nobody()));
        assert_eq!(nowhere.exit, Exit::NoConnection);
        assert!(nowhere.err.contains("cannot connect to any node") && nowhere.err.contains("--endpoint"), "{}", nowhere.err);
    }

    #[test]
    fn who_applies_it_late_is_waited_for_and_the_dead_are_not() {
        let story = Mutex::new(story("node-a"));
        story.lock().unwrap().links = ["up", "down"];
        let polls = Mutex::new(0);
        let node = Fake::start(move |method, path, body| {
            let mut late = receipt("committed", 5);
            let mut applied = |nodes: &[&str], waiting: &[&str]| (late["applied"], late["waiting"]) = (json!(nodes), json!(waiting));
            if method == "POST" {
                applied(&["node-a"], &["node-b", "node-c"]);
            } else if path == "/transactions/node-a-1-5" {
                *polls.lock().unwrap() += 1;
                if *polls.lock().unwrap() < 3 {
                    applied(&["node-a"], &["node-b", "node-c"])
                } else {
                    applied(&["node-a", "node-b"], &["node-c"])
                }
            } else {
                return story.lock().unwrap().reply(method, path, body);
            }
            answer(200, &late)
        });
        let done = propose(&node, "--weight 1");
        assert_eq!(done.exit, Exit::Ok);
        assert!(done.out.ends_with("applied by node-a, node-b\nnot known to be applied yet by node-c\n"), "{}", done.out);
        assert_eq!(node.asked().iter().filter(|line| *line == "GET /transactions/node-a-1-5").count(), 3);
    }
}
