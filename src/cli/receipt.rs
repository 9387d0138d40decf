//! Sends what changes something, once, and prints what became of it.

use std::time::Duration;

use async_std::task;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api::{Outcome, Peers, Receipt, RolloutReceipt, VoteWord};
use crate::cli::client::{CallError, Client, within};
use crate::cli::endpoint::Endpoint;
use crate::cli::output::{Console, Field, Tone, listed, milliseconds};
use crate::cli::{Exit, Failure};
use crate::core::ids::{NodeId, RouteName, TxId};

/// How long to wait for the live members to apply a commit, in milliseconds.
const APPLY_WAIT_MS_MAX: u64 = 1_000;
/// What a change is in the end, where nothing more is known of it.
pub const IN_FORCE: &str = "in force everywhere";
/// How long to wait before asking again who has applied it, in milliseconds.
const APPLY_POLL_MS: u64 = 20;

/// What a change is answered with: a receipt, and perhaps more.
pub trait Answered: Serialize + DeserializeOwned {
    /// The receipt.
    fn receipt(&self) -> &Receipt;
    /// The same, to be brought up to date.
    fn receipt_mut(&mut self) -> &mut Receipt;
    /// What is more, in a line for people.
    fn more(&self) -> Option<String> {
        None
    }
}

impl Answered for Receipt {
    fn receipt(&self) -> &Receipt {
        self
    }
    fn receipt_mut(&mut self) -> &mut Receipt {
        self
    }
}

impl Answered for RolloutReceipt {
    fn receipt(&self) -> &Receipt {
        &self.receipt
    }
    fn receipt_mut(&mut self) -> &mut Receipt {
        &mut self.receipt
    }
    fn more(&self) -> Option<String> {
        self.rollout.map(|id| format!("rollout {id}"))
    }
}

/// A key of one's own, for a request that was given none: whoever is left without an answer can repeat it safely.
pub fn key_or_random(key: Option<String>) -> String {
    key.unwrap_or_else(|| format!("cli-{:032x}", fastrand::u128(..)))
}

/// Sends a change to one node, waits a moment until the live members have applied it, and prints the receipt. `goal` is what a `reduce`
/// has reached when it is in force everywhere.
pub async fn submit(
    client: &mut Client,
    path: &str,
    request: &impl Serialize,
    key: &str,
    goal: &str,
    console: &mut Console<'_>,
) -> Result<Exit, Failure> {
    let receipt: Receipt = send(client, path, request).await.map_err(|error| failure(error, key))?;
    Ok(conclude(client, receipt, key, goal, console).await)
}

/// Waits a moment until the live members have applied what was committed, and prints the receipt.
pub async fn conclude(client: &mut Client, mut answered: impl Answered, key: &str, goal: &str, console: &mut Console<'_>) -> Exit {
    if answered.receipt().outcome == Outcome::Committed {
        follow(client, answered.receipt_mut()).await;
    }
    tell(&answered, &client.target.endpoint, key, goal, console)
}

/// Prints the receipt of a change that was just sent there, and what to do about an outcome that is not settled.
pub fn tell(answered: &impl Answered, endpoint: &Endpoint, key: &str, goal: &str, console: &mut Console<'_>) -> Exit {
    let exit = print(answered, goal, console);
    if exit == Exit::Unknown {
        console.say(&ask_again(&answered.receipt().txid, endpoint));
        console.say(&repeat(key));
    }
    exit
}

/// Sends a change to one node and reads the receipt, whatever the outcome.
pub async fn send<T: Answered>(client: &mut Client, path: &str, request: &impl Serialize) -> Result<T, CallError> {
    let answer = client.post(path, request).await?;
    let receipt = serde_json::from_slice(&answer.body).ok();
    receipt.map_or_else(|| client.read(&answer, false), Ok)
}

/// What a failed change means: only a request that was never sent, or was refused, is known to have done nothing.
pub fn failure(error: CallError, key: &str) -> Failure {
    let unknown = match &error {
        CallError::NoConnection { .. } => false,
        CallError::Refused { status, .. } => status.is_server_error() && status.as_u16() != 503,
        CallError::Lost { .. } | CallError::TimedOut { .. } | CallError::Strange { .. } => true,
    };
    if !unknown {
        return error.into();
    }
    let message = format!("{error}.\nThe outcome is unknown. See what was decided: canary-mesh history\n{}", repeat(key));
    Failure { message, exit: Exit::Unknown, ..error.into() }
}

fn ask_again(txid: &TxId, endpoint: &Endpoint) -> String {
    format!("The outcome is not settled. Ask again: canary-mesh tx show {txid} --endpoint {endpoint}")
}

fn repeat(key: &str) -> String {
    format!("Or repeat the same command with --idempotency-key {key}: it is applied at most once.")
}

/// Asks until every live member has applied it, or for a second. Who has not by then stands in the receipt.
async fn follow(client: &mut Client, receipt: &mut Receipt) {
    let path = format!("/transactions/{}", receipt.txid);
    let asking = async {
        while !receipt.waiting.is_empty() {
            task::sleep(Duration::from_millis(APPLY_POLL_MS)).await;
            let Ok(now) = client.get::<Receipt>(&path).await else { return };
            (receipt.applied, receipt.waiting, receipt.leases_end_in_ms) = (now.applied, now.waiting, now.leases_end_in_ms);
            let Ok(peers) = client.get::<Peers>("/peers").await else { return };
            if !receipt.waiting.iter().any(|node| is_alive(node, &peers)) {
                return;
            }
        }
    };
    let _ = within(Duration::from_millis(APPLY_WAIT_MS_MAX), asking).await;
}

fn is_alive(node: &NodeId, peers: &Peers) -> bool {
    *node == peers.node || peers.peers.iter().any(|peer| peer.node == *node && peer.alive)
}

/// The goal of taking canaries away: of one route, or all.
pub fn no_canary_of(route: Option<&RouteName>) -> String {
    route.map_or_else(|| "no canary anywhere".to_owned(), |route| format!("no canary of route {route} anywhere"))
}

/// Whether a committed `reduce` has reached its goal, or by when it will have.
fn progress(receipt: &Receipt, goal: &str) -> Option<(Tone, String)> {
    let waiting = &receipt.waiting;
    Some(match receipt.leases_end_in_ms? {
        _ if waiting.is_empty() => (Tone::Good, all_applied(goal)),
        0 => (Tone::Good, leases_ended(goal, waiting)),
        ms => (Tone::Doubt, not_applied(goal, waiting, Duration::from_millis(ms))),
    })
}

/// The goal is reached.
pub fn all_applied(goal: &str) -> String {
    format!("{goal}: every member has applied it")
}

/// The goal is reached, whatever those that wait know.
pub fn leases_ended<'a>(goal: &str, waiting: impl IntoIterator<Item = &'a NodeId>) -> String {
    let waiting: Vec<_> = waiting.into_iter().collect();
    let what = if waiting.len() == 1 { ("lease", "has") } else { ("leases", "have") };
    format!("{goal}: the {} of {} {} ended", what.0, listed(waiting), what.1)
}

/// The goal is not reached yet. Tenths of a second, rounded up: it is a promise.
pub fn not_applied<'a>(goal: &str, waiting: impl IntoIterator<Item = &'a NodeId>, within: Duration) -> String {
    let waiting: Vec<_> = waiting.into_iter().collect();
    let have = if waiting.len() == 1 { "has" } else { "have" };
    let seconds = within.as_millis().div_ceil(100) as f64 / 10.0;
    format!("{goal} within {seconds:.1} s: {} {have} not applied it", listed(waiting))
}

/// Prints a receipt. The outcome is the exit.
pub fn print(answered: &impl Answered, goal: &str, console: &mut Console<'_>) -> Exit {
    let receipt = answered.receipt();
    let (tone, exit) = match receipt.outcome {
        Outcome::Committed => (Tone::Good, Exit::Ok),
        Outcome::Aborted => (Tone::Bad, Exit::Refused),
        Outcome::Unknown => (Tone::Doubt, Exit::Unknown),
    };
    console.data(answered, |console| {
        let slot = receipt.slot.map_or_else(|| "no slot".to_owned(), |slot| format!("slot {slot}"));
        let elapsed = receipt.elapsed_ms.map(|ms| format!(", {} ms", milliseconds(ms))).unwrap_or_default();
        let outcome = console.toned(tone, receipt.outcome);
        let Receipt { txid, version, state_hash, .. } = receipt;
        console.line(&format!("{outcome} {txid}: {slot}, version {version}, hash {}{elapsed}", state_hash.short()));
        if let Some(reason) = &receipt.reason {
            let code = receipt.error_code.as_ref().map(|code| format!(" ({code})")).unwrap_or_default();
            console.line(&format!("reason: {reason}{code}"));
        }
        if let Some(more) = answered.more() {
            console.line(&more);
        }
        if !receipt.votes.is_empty() {
            let rows = receipt.votes.iter().map(|line| {
                let tone = match line.vote {
                    VoteWord::Yes => Tone::Good,
                    VoteWord::No => Tone::Bad,
                    VoteWord::Excused => Tone::Doubt,
                };
                vec![Field::text(&line.node), Field::text(line.vote).toned(tone), Field::maybe(line.reason.as_ref())]
            });
            console.table(&["node", "vote", "reason"], rows);
        }
        // Only a commit is applied.
        if receipt.outcome != Outcome::Committed {
            return;
        }
        if !receipt.applied.is_empty() {
            console.line(&format!("applied by {}", listed(&receipt.applied)));
        }
        if let Some((tone, text)) = progress(receipt, goal) {
            console.line(&console.toned(tone, text));
        } else if !receipt.waiting.is_empty() {
            let waiting = format!("not known to be applied yet by {}", listed(&receipt.waiting));
            console.line(&console.toned(Tone::Doubt, waiting));
        }
    });
    exit
}
