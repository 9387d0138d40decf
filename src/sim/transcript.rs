//! Messages, events and answers in words, in the style of the core's transcripts.

use crate::core::io::{Event, Outcome, Receipt};
use crate::core::message::{AcceptAnswer, Message, PrepareAnswer, ResolveAnswer};
use crate::core::state::Percent;
use crate::core::value::Value;
use crate::sim::oracle::brief;

/// A number for each kind of message, for the trace.
pub fn number(message: &Message) -> u64 {
    match message {
        Message::PrepareReq { .. } => 1,
        Message::PrepareResp { .. } => 2,
        Message::AcceptReq { .. } => 3,
        Message::AcceptResp { .. } => 4,
        Message::Decision { .. } => 5,
        Message::ResolveReq { .. } => 6,
        Message::ResolveResp { .. } => 7,
        Message::Heartbeat(_) => 8,
        Message::Fetch { .. } => 9,
        Message::Decisions { .. } => 10,
        Message::Pinned { .. } => 11,
        Message::Grant(_) => 12,
        Message::Snapshot(_) => 13,
    }
}

/// The slot and the round that a message is about, or what stands for them.
pub fn coordinates(message: &Message) -> (u64, u64) {
    match message {
        Message::PrepareReq { slot, ballot, .. }
        | Message::PrepareResp { slot, ballot, .. }
        | Message::AcceptReq { slot, ballot, .. }
        | Message::AcceptResp { slot, ballot, .. }
        | Message::ResolveReq { slot, ballot }
        | Message::ResolveResp { slot, ballot, .. } => (*slot, ballot.round),
        Message::Decision { decision } => (decision.slot, decision.version),
        Message::Heartbeat(beat) => (beat.head.slot, beat.beat),
        Message::Fetch { from } => (*from, 0),
        Message::Decisions { decisions } => (decisions.first().map_or(0, |first| first.slot), decisions.len() as u64),
        Message::Pinned { disk_id } => (u64::from_be_bytes(disk_id.0), 0),
        Message::Snapshot(snapshot) => (snapshot.slot, 0),
        Message::Grant(grant) => (grant.beat, grant.incarnation),
    }
}

/// A message in a line.
pub fn message(message: &Message) -> String {
    let accepted = |accepted: &Option<(crate::core::ballot::Ballot, Value)>| {
        accepted.as_ref().map(|(ballot, value)| format!(", has accepted {} at {ballot}", brief(value))).unwrap_or_default()
    };
    match message {
        Message::PrepareReq { slot, ballot, tx, .. } => format!("PREPARE_REQ slot {slot} at {ballot}: {}", tx.txid),
        Message::PrepareResp { slot, ballot, answer } => {
            let answer = match answer {
                PrepareAnswer::Voted { vote, accepted: before, .. } => {
                    format!("{}{}", if vote.yes { "yes" } else { "no" }, accepted(before))
                }
                PrepareAnswer::Busy { holder } => format!("busy with {holder}"),
                PrepareAnswer::Rejected { promised } => format!("has promised {promised}"),
                PrepareAnswer::NotReady { reason } => reason.clone(),
            };
            format!("PREPARE_RESP slot {slot} at {ballot}: {answer}")
        }
        Message::AcceptReq { slot, ballot, value } => format!("ACCEPT_REQ slot {slot} at {ballot}: {}", brief(value)),
        Message::AcceptResp { slot, ballot, answer } => {
            let answer = match answer {
                AcceptAnswer::Accepted => "accepted".to_owned(),
                AcceptAnswer::Rejected { promised } => format!("has promised {promised}"),
            };
            format!("ACCEPT_RESP slot {slot} at {ballot}: {answer}")
        }
        Message::Decision { decision } => format!("DECISION slot {}: {}", decision.slot, brief(&decision.value)),
        Message::ResolveReq { slot, ballot } => format!("RESOLVE_REQ slot {slot} at {ballot}"),
        Message::ResolveResp { slot, ballot, answer } => {
            let answer = match answer {
                ResolveAnswer::Promised { accepted: before, prepared } => {
                    let prepared = prepared.as_ref().map(|tx| format!(", is prepared for {}", tx.txid)).unwrap_or_default();
                    format!("promised{}{prepared}", accepted(before))
                }
                ResolveAnswer::Rejected { promised } => format!("has promised {promised}"),
            };
            format!("RESOLVE_RESP slot {slot} at {ballot}: {answer}")
        }
        Message::Heartbeat(beat) => format!("HEARTBEAT {} at slot {}", beat.beat, beat.head.slot),
        Message::Fetch { from } => format!("FETCH from slot {from}"),
        Message::Decisions { decisions } => {
            let (first, last) = (decisions.first().map_or(0, |d| d.slot), decisions.last().map_or(0, |d| d.slot));
            format!("DECISIONS {first} to {last}")
        }
        Message::Pinned { disk_id } => format!("PINNED disk {disk_id}"),
        Message::Snapshot(snapshot) => format!("SNAPSHOT of slot {}", snapshot.slot),
        Message::Grant(grant) => format!("GRANT for beat {}", grant.beat),
    }
}

/// An event in a line.
pub fn event(event: &Event) -> String {
    let because = |reason: &Option<String>| reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
    match event {
        Event::Proposed { slot, ballot, txid, kind } => format!("proposes {txid} ({kind}) for slot {slot} at {ballot}"),
        Event::Voted { slot, txid, yes, reason } => {
            format!("votes {} on {txid} in slot {slot}{}", if *yes { "yes" } else { "no" }, because(reason))
        }
        Event::Deciding { slot, txid, value } => {
            let txid = txid.as_ref().map(|txid| format!(" of {txid}")).unwrap_or_default();
            format!("asks for accepts in slot {slot}: {value}{txid}")
        }
        Event::GaveUp { slot, txid, reason } => format!("gives {txid} in slot {slot} up: {reason}"),
        Event::Resolving { slot, ballot, reason } => format!("resolves slot {slot} at {ballot}: {reason}"),
        Event::Decided { slot, value, version, reason, .. } => {
            format!("decided slot {slot}: {value}, version {version}{}", because(reason))
        }
        Event::LinkUp { peer, .. } => format!("is linked to {peer}"),
        Event::LinkDown { peer } => format!("is not linked to {peer} any more"),
        Event::Admitted => "is recorded by every member".to_owned(),
        Event::LeaseHeld => "holds a lease".to_owned(),
        Event::LeaseLost => "holds no lease any more".to_owned(),
        Event::Fenced { member } => format!("has fenced {member}"),
        Event::FenceLifted { member } => format!("grants to {member} again"),
        Event::CaughtUp { slot } => format!("has caught up, slot {slot}"),
        Event::Installed { slot, peer } => format!("takes in what slot {slot} came to, from {peer}"),
        Event::CatchingUp { peer, from } => format!("fetches slot {from} and on from {peer}"),
        Event::Rollout { rollout, status, weight_bp, reason } => {
            let weight = weight_bp.map(|bp| format!(" at {} %", Percent(bp))).unwrap_or_default();
            format!("sees {rollout} {}{weight}{}", status.replace('_', " "), because(reason))
        }
        Event::Diverged { reason } => format!("DIVERGED: {reason}"),
    }
}

/// An answer in a line.
pub fn receipt(receipt: &Receipt) -> String {
    let outcome = match &receipt.outcome {
        Outcome::Committed => "committed".to_owned(),
        Outcome::Aborted(cause) => format!("aborted ({cause})"),
        Outcome::Unknown(why) => format!("unknown ({why})"),
    };
    let slot = receipt.slot.map(|slot| format!(", slot {slot}, version {}", receipt.version)).unwrap_or_default();
    format!("{} {outcome}{slot}", receipt.txid)
}
