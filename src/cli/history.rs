//! `history`: what was decided, slot by slot.

use crate::api::{History, HistoryEntry, Outcome, VoteLine, VoteWord};
use crate::cli::args::HistoryArgs;
use crate::cli::client::Mesh;
use crate::cli::output::{Console, Field, Tone};
use crate::cli::{Exit, Failure};
use crate::core::ids::UnixMs;

/// Prints the decisions that one node knows.
pub async fn run(args: &HistoryArgs, mut mesh: Mesh, console: &mut Console<'_>) -> Result<Exit, Failure> {
    let from = args.from.map(|from| format!("from={from}"));
    let limit = args.limit.map(|limit| format!("limit={limit}"));
    let query: Vec<String> = from.into_iter().chain(limit).collect();
    let (_, history) = mesh.ask::<History>(&format!("/history?{}", query.join("&"))).await?;
    console.data(&history, |console| {
        if history.decisions.is_empty() {
            return console.say("nothing was decided there");
        }
        let header = ["slot", "time (UTC)", "txid", "kind", "outcome", "version", "hash", "votes and reasons"];
        console.table(&header, history.decisions.iter().map(row));
    });
    Ok(Exit::Ok)
}

fn row(entry: &HistoryEntry) -> Vec<Field> {
    let tone = if entry.outcome == Outcome::Committed { Tone::Good } else { Tone::Bad };
    vec![
        Field::number(entry.slot),
        Field::text(utc(entry.at)),
        Field::maybe(entry.txid.as_ref()),
        Field::maybe(entry.kind),
        Field::text(entry.outcome).toned(tone),
        Field::number(entry.version),
        Field::text(entry.state_hash.short()),
        Field::text(why(entry)),
    ]
}

/// The votes counted, those that were not a yes by name, and the reason.
fn why(entry: &HistoryEntry) -> String {
    let yes = entry.votes.iter().filter(|line| line.vote == VoteWord::Yes).count();
    let named = |line: &VoteLine| match &line.reason {
        Some(reason) => format!("{} {}: {reason}", line.node, line.vote),
        None => format!("{} {}", line.node, line.vote),
    };
    let others = entry.votes.iter().filter(|line| line.vote != VoteWord::Yes).map(named);
    let counted = (yes > 0).then(|| format!("{yes} yes"));
    counted.into_iter().chain(others).chain(entry.reason.clone()).collect::<Vec<_>>().join("; ")
}

/// A moment as `2024-11-22 20:54:03.123`. Days to date by Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
fn utc(at: UnixMs) -> String {
    let (days, ms) = (at / 86_400_000, at % 86_400_000);
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1_000 % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{:03}", ms % 1_000)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cli::testing::{Fake, answer, hash, ran, story};

    #[test]
    fn a_time_is_a_date() {
        assert_eq!(utc(0), "1970-01-01 00:00:00.000");
        assert_eq!(utc(951_782_399_999), "2000-02-28 23:59:59.999");
        assert_eq!(utc(951_782_400_000), "2000-02-29 00:00:00.000");
        assert_eq!(utc(1_732_308_843_123), "2024-11-22 20:54:03.123");
        assert_eq!(utc(1_735_689_599_000), "2024-12-31 23:59:59.000");
    }

    #[test]
    fn every_slot_is_a_line_with_its_votes_and_its_reason() {
        let votes = json!([{"node": "node-a", "vote": "yes", "reason": null}, {"node": "node-b", "vote": "yes", "reason": null},
            {"node": "node-c", "vote": "no", "reason": "no such model"}]);
        let decisions = json!([{"slot": 7, "txid": "node-a-1-7", "kind": "advance", "outcome": "aborted", "version": 5, "state_hash": hash(7),
            "reason": "vetoed", "votes": votes, "at": 0}, {"slot": 8, "txid": null, "kind": null, "outcome": "aborted", "version": 5,
            "state_hash": hash(8), "reason": "coordinator lost", "votes": [], "at": 1}]);
        let document = json!({"decisions": decisions});
        let (node, copy) = (document.clone(), document.clone());
        let node = Fake::start(move |_, _, _| answer(200, &node));
        let shown = ran(&format!("canary-mesh history --endpoint {}", node.address));
        assert_eq!(shown.exit, Exit::Ok);
        let lines: Vec<_> = shown.out.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(lines[1], "7 1970-01-01 00:00:00.000 node-a-1-7 advance aborted 5 07070707 2 yes; node-c no: no such model; vetoed");
        assert_eq!(lines[2], "8 1970-01-01 00:00:00.001 - - aborted 5 08080808 coordinator lost");
        assert_eq!(ran(&format!("canary-mesh history --output json --endpoint {}", node.address)).json(), copy);
    }

    #[test]
    fn from_and_limit_are_passed_on() {
        let node = story("node-a").start();
        let shown = ran(&format!("canary-mesh history --from 2 --limit 2 --endpoint {}", node.address));
        assert_eq!((shown.exit, shown.out.lines().count()), (Exit::Ok, 3), "{shown:?}");
        assert_eq!(node.asked(), ["GET /history?from=2&limit=2"]);
        let empty = ran(&format!("canary-mesh history --from 9 --endpoint {}", node.address));
        assert_eq!((empty.out.as_str(), empty.err.as_str()), ("", "nothing was decided there\n"));
    }
}
