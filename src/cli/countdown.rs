//! Watches a committed `reduce` until no request anywhere meets what it took away.
//!
//! All nodes are asked: each knows best what it has applied itself. What they say of the leases is true whoever says it, so the earliest end counts; and once one has been heard, the
//! countdown needs nobody any more.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures::FutureExt;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::api::{Outcome, Receipt};
use crate::cli::ask::ask_all;
use crate::cli::client::{Mesh, within};
use crate::cli::interrupt::Interrupt;
use crate::cli::output::{Console, Tone, listed};
use crate::cli::receipt::{all_applied, leases_ended, not_applied, print};
use crate::cli::{Exit, Surroundings};
use crate::core::ids::NodeId;

/// From one look at the clock to the next, in milliseconds.
const LOOK_MS: u64 = 100;
/// What `rollback --watch --output json` prints: the receipt as it was at the end.
#[derive(Serialize)]
struct Watched<'a> {
    #[serde(flatten)]
    receipt: &'a Receipt,
    /// No request anywhere meets what was taken away any more.
    in_force_everywhere: bool,
}

/// What is known so far.
struct Countdown {
    members: BTreeSet<NodeId>,
    applied: BTreeSet<NodeId>,
    /// When the leases of all others have ended; `None` while nobody has said so.
    ends: Option<Instant>,
}

impl Countdown {
    fn new(receipt: &Receipt) -> Countdown {
        let mut countdown = Countdown { members: BTreeSet::new(), applied: BTreeSet::new(), ends: None };
        countdown.hear(receipt);
        countdown
    }

    /// The time from the node's saying so to here is not counted: that only makes the end later than it is.
    fn hear(&mut self, receipt: &Receipt) {
        self.members = receipt.applied.iter().chain(&receipt.waiting).cloned().collect();
        self.applied.extend(receipt.applied.iter().cloned());
        let ends = receipt.leases_end_in_ms.and_then(|ms| Instant::now().checked_add(Duration::from_millis(ms)));
        self.ends = self.ends.into_iter().chain(ends).min();
    }

    fn waiting(&self) -> Vec<&NodeId> {
        self.members.difference(&self.applied).collect()
    }

    fn left(&self) -> Option<Duration> {
        self.ends.map(|ends| ends.saturating_duration_since(Instant::now()))
    }

    fn is_over(&self) -> bool {
        self.waiting().is_empty() || self.left() == Some(Duration::ZERO)
    }

    /// `no canary anywhere within 4.3 s: node-c has not applied it; node-a, node-b have`. On a narrow terminal the end is not seen.
    fn line(&self, goal: &str) -> String {
        let have = if self.applied.len() == 1 { "has" } else { "have" };
        let applied = format!("{} {have}", listed(&self.applied));
        match self.left() {
            _ if self.waiting().is_empty() => all_applied(goal),
            Some(Duration::ZERO) => leases_ended(goal, self.waiting()),
            Some(left) => format!("{}; {applied}", not_applied(goal, self.waiting(), left)),
            None => format!("not applied yet by {}; {applied}", listed(self.waiting())),
        }
    }
}

/// Shows who has applied it, who has not, and how long that can matter, until it does not any more.
pub async fn watch(
    mut receipt: Receipt,
    mesh: Mesh,
    goal: &str,
    interrupt: &Interrupt,
    around: &Surroundings,
    console: &mut Console<'_>,
) -> Exit {
    let mut countdown = Countdown::new(&receipt);
    if !console.is_json() {
        print(&receipt, goal, console);
        console.flush();
    }
    let path = format!("/transactions/{}", receipt.txid);
    let heard = ask_all(mesh.clients, &path, |client, path| client.get::<Receipt>(path).boxed());
    let bar = bar(around);
    let begun_over = countdown.is_over();
    let mut applied = countdown.applied.len();
    while !countdown.is_over() && !interrupt.came() {
        bar.set_message(countdown.line(goal));
        let left = countdown.left().unwrap_or(Duration::MAX);
        if let Some(Ok(answer)) = within(left.min(Duration::from_millis(LOOK_MS)), heard.recv()).await {
            // One that does not know of the commit yet has nothing to say.
            match answer.answer {
                Ok(receipt) if receipt.outcome == Outcome::Committed => countdown.hear(&receipt),
                _ => {}
            }
        }
        if countdown.applied.len() > applied && !around.stderr_terminal && !countdown.is_over() {
            console.say(&countdown.line(goal));
        }
        applied = countdown.applied.len();
    }
    bar.finish_and_clear();
    let over = countdown.is_over();
    receipt.leases_end_in_ms = if over { Some(0) } else { countdown.left().map(|left| left.as_millis() as u64) };
    receipt.waiting = countdown.waiting().into_iter().cloned().collect();
    receipt.applied = countdown.applied.iter().cloned().collect();
    console.data(&Watched { receipt: &receipt, in_force_everywhere: over }, |console| {
        // What was so from the beginning stands in the receipt.
        if !begun_over {
            console.line(&console.toned(if over { Tone::Good } else { Tone::Doubt }, countdown.line(goal)));
        }
    });
    if over {
        return Exit::Ok;
    }
    console.say(&format!("Watched no longer; it is committed all the same. Look again: canary-mesh tx show {}", receipt.txid));
    Exit::Unhealthy
}

/// One line on a terminal, written anew each time; nothing elsewhere.
fn bar(around: &Surroundings) -> ProgressBar {
    let target = if around.stderr_terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(None, target);
    if let Ok(style) = ProgressStyle::with_template("{wide_msg}") {
        bar.set_style(style);
    }
    bar
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU64, Ordering};

    use serde_json::{Value, json};

    use super::*;
    use crate::cli::testing::{Fake, Ran, Reply, answer, ran, refusal, story};

    fn receipt(applied: &[&str], waiting: &[&str], ends_in_ms: u64) -> Value {
        let mut receipt = crate::cli::testing::receipt("committed", 6);
        (receipt["applied"], receipt["waiting"], receipt["leases_end_in_ms"]) = (json!(applied), json!(waiting), json!(ends_in_ms));
        receipt
    }

    /// A node that takes a rollback, and says this of it later.
    fn node(first: Value, later: impl Fn() -> Reply + Send + Sync + 'static) -> Fake {
        let story = Mutex::new(story("node-a"));
        Fake::start(move |method, path, body| match path {
            "/rollback" => answer(200, &first),
            "/transactions/node-a-1-6" => later(),
            _ => story.lock().unwrap().reply(method, path, body),
        })
    }

    fn watch(nodes: &[&Fake], words: &str) -> Ran {
        let endpoints: String = nodes.iter().map(|node| format!(" --endpoint {}", node.address)).collect();
        ran(&format!("canary-mesh rollback --watch{endpoints} {words}"))
    }

    #[test]
    fn it_ends_when_everyone_has_applied_it_and_tells_of_each() {
        let asked = AtomicU64::new(0);
        let node = node(receipt(&["node-a"], &["node-b", "node-c"], 60_000), move || {
            answer(
                200,
                &match asked.fetch_add(1, Ordering::Relaxed) {
                    0 => receipt(&["node-a"], &["node-b", "node-c"], 60_000),
                    1 => receipt(&["node-a", "node-b"], &["node-c"], 60_000),
                    _ => receipt(&["node-a", "node-b", "node-c"], &[], 0),
                },
            )
        });
        let watched = watch(&[&node], "");
        assert_eq!(watched.exit, Exit::Ok, "{watched:?}");
        assert!(watched.out.contains("no canary anywhere within 60.0 s: node-b, node-c have not applied it\n"), "{}", watched.out);
        assert!(watched.out.ends_with("\nno canary anywhere: every member has applied it\n"), "{}", watched.out);
        let told: Vec<_> = watched.err.lines().collect();
        assert_eq!(told.len(), 1, "one line for each change: {told:?}");
        assert!(told[0].starts_with("no canary anywhere within "), "{told:?}");
        assert!(told[0].ends_with(" s: node-c has not applied it; node-a, node-b have"), "{told:?}");
    }

    #[test]
    fn the_countdown_goes_on_when_the_node_that_was_asked_is_lost_and_nobody_else_knows() {
        let lost = node(receipt(&["node-a"], &["node-c"], 250), || Reply::Break);
        let stranger = node(json!(null), || refusal(404, "unknown_transaction", "not known here"));
        let hangs = node(json!(null), || Reply::Hang);
        let begun = Instant::now();
        let watched = watch(&[&lost, &stranger, &hangs], "--route default");
        assert_eq!(watched.exit, Exit::Ok, "{watched:?}");
        assert!(begun.elapsed() >= Duration::from_millis(250));
        assert!(watched.out.ends_with("\nno canary of route default anywhere: the lease of node-c has ended\n"), "{}", watched.out);
        assert!(stranger.sent_to("/rollback").is_empty());
    }

    #[test]
    fn whoever_knows_more_is_believed_and_json_is_one_document_at_the_end() {
        let first = node(receipt(&["node-a"], &["node-b", "node-c"], 60_000), || Reply::Hang);
        let second = node(json!(null), || answer(200, &receipt(&["node-b"], &["node-a", "node-c"], 60_000)));
        let third = node(json!(null), || answer(200, &receipt(&["node-c"], &["node-a", "node-b"], 59_000)));
        let watched = watch(&[&first, &second, &third], "--output json");
        assert_eq!(watched.exit, Exit::Ok, "{watched:?}");
        let document = watched.json();
        assert_eq!((&document["in_force_everywhere"], &document["leases_end_in_ms"]), (&json!(true), &json!(0)));
        assert_eq!((&document["applied"], &document["waiting"]), (&json!(["node-a", "node-b", "node-c"]), &json!([])));
        assert_eq!((&document["txid"], &document["outcome"]), (&json!("node-a-1-6"), &json!("committed")));
    }

    #[test]
    fn what_is_over_from_the_beginning_is_said_once() {
        let node = node(receipt(&["node-a", "node-b", "node-c"], &[], 0), || Reply::Hang);
        let watched = watch(&[&node], "");
        assert_eq!((watched.exit, watched.err.as_str()), (Exit::Ok, ""));
        assert_eq!(watched.out.matches("no canary anywhere: every member has applied it").count(), 1, "{}", watched.out);
    }

    #[test]
    fn a_rollback_that_did_not_commit_is_not_watched() {
        let node = node(crate::cli::testing::receipt("unknown", 6), || panic!("not asked"));
        let watched = watch(&[&node], "");
        assert_eq!(watched.exit, Exit::Unknown);
        assert!(watched.err.contains("canary-mesh tx show node-a-1-6"), "{}", watched.err);
    }
}
