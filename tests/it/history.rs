//! What callers asked and were told, what was seen of every node meanwhile, and whether all of it agrees with the log.
//!
//! The mesh is held to be one register: a version, and the canary's share. Two independent judges look at the callers' history:
//!
//! - **Direct rules.** Versions are unique, so the log gives the one order in which the writes can have happened: each has to follow
//!   from the one before it in the model, and the order has to respect real time (no write has ended before one of a lower version
//!   was asked for). With receipts, aborts, keys and sightings held against the same log this is complete, and linear in time.
//! - **stateright's tester**, which knows nothing of the log: it searches for an order of the calls that the model can give these
//!   answers in. It searches windows of [`WINDOW`] versions (its time grows with the square of a window's length), each beginning
//!   at the state that the one before ended at; across windows only the direct rule of real time holds. A call that never got
//!   an answer may take effect at any later time or never: whether it did, and as which version, is taken from the log.

use std::collections::{BTreeMap, BTreeSet};

use stateright::semantics::{ConsistencyTester, LinearizabilityTester, SequentialSpec};

/// Versions that the tester searches at once.
const WINDOW: usize = 48;

/// A moment: a number drawn from one counter, so that what ended before something began has the smaller one.
pub type Moment = u64;

/// What a caller asks for. Every share of a run is asked for by one caller, once, or under one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ask {
    /// This share for the canary, in basis points.
    Advance(u16),
    /// A lower one.
    Reduce(u16),
    /// No canary.
    Rollback,
}

/// A call.
#[derive(Clone, Debug)]
pub struct Op {
    pub caller: usize,
    pub at: usize,
    /// The process that answered, as in [`Sighting::life`].
    pub life: Option<usize>,
    pub ask: Ask,
    pub key: Option<String>,
    pub start: Moment,
    pub end: Moment,
    /// Of a `reduce` that was told committed: from when on nobody serves what it took away, in microseconds.
    pub gone_us: Option<u64>,
    pub told: Told,
}

/// Where a transaction stands in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub txid: String,
    pub slot: u64,
    pub version: u64,
    pub hash: String,
}

/// What a caller was told.
#[derive(Clone, Debug)]
pub enum Told {
    Committed(Place),
    Aborted {
        txid: String,
    },
    /// Refused before it became a transaction.
    Refused,
    /// It was told so, or heard nothing at all.
    Unknown {
        txid: Option<String>,
    },
}

/// A slot of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decided {
    pub slot: u64,
    pub version: u64,
    pub hash: String,
    pub txid: Option<String>,
    /// What it did, if it is a commit.
    pub commit: Option<(Ask, Option<String>)>,
}

/// Something that was seen of a node.
#[derive(Clone, Debug)]
pub struct Sighting {
    pub at: usize,
    /// The node's process, counted from 0; `None` if it may have been one or the next.
    pub life: Option<usize>,
    pub start: Moment,
    pub end: Moment,
    /// When it was asked for, in microseconds.
    pub asked_us: u64,
    pub seen: Seen,
}

#[derive(Clone, Debug)]
pub enum Seen {
    Routing { slot: u64, version: u64, hash: String, share: Option<u16>, canary_served: bool },
    State { version: u64, txid: Option<String>, share: Option<u16> },
    Predicted { version: u64, canary: bool },
    Receipt { txid: String, told: Told, healed: bool },
}

impl Seen {
    fn is_canary_served(&self) -> bool {
        match self {
            Seen::Routing { canary_served, share, .. } => *canary_served && share.is_some(),
            Seen::Predicted { canary, .. } => *canary,
            Seen::State { .. } | Seen::Receipt { .. } => false,
        }
    }

    fn version(&self) -> Option<u64> {
        match self {
            Seen::Routing { version, .. } | Seen::State { version, .. } | Seen::Predicted { version, .. } => Some(*version),
            Seen::Receipt { .. } => None,
        }
    }
}

/// Everything of one run.
#[derive(Clone, Debug, Default)]
pub struct History {
    pub log: Vec<Decided>,
    pub ops: Vec<Op>,
    pub sightings: Vec<Sighting>,
    /// When each process was started: node, life, the moment before.
    pub starts: Vec<(usize, usize, Moment)>,
}

/// What a check has looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    pub commits: usize,
    pub windows: usize,
    pub serialised: usize,
    pub unknown_applied: usize,
    pub repeats_of_a_key: usize,
    pub canary_after_restart: usize,
    pub canary_after_reduce: usize,
}

/// The model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Register {
    version: u64,
    share: Option<u16>,
    applied: BTreeMap<String, u64>,
}

/// What a call of the model gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ret {
    Committed(u64),
    Senseless,
}

impl SequentialSpec for Register {
    type Op = (Ask, Option<String>);
    type Ret = Ret;

    fn invoke(&mut self, (ask, key): &Self::Op) -> Ret {
        if let Some(version) = key.as_ref().and_then(|key| self.applied.get(key)) {
            return Ret::Committed(*version);
        }
        let share = match (*ask, self.share) {
            (Ask::Advance(share), now) if now != Some(share) => Some(share),
            (Ask::Reduce(share), Some(now)) if share < now => Some(share),
            (Ask::Rollback, Some(_)) => None,
            _ => return Ret::Senseless,
        };
        self.share = share;
        self.version += 1;
        self.applied.extend(key.clone().map(|key| (key, self.version)));
        Ret::Committed(self.version)
    }
}

/// What makes two calls the same wish: their key, or else their share, which is nobody else's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Wish {
    Key(String),
    Share(Ask),
}

fn wish(ask: Ask, key: &Option<String>) -> Wish {
    key.clone().map_or(Wish::Share(ask), Wish::Key)
}

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what()) }
}

/// Looks at all of it, and says what does not agree.
pub fn check(history: &History) -> Result<Checked, String> {
    let mut checked = Checked::default();
    let commits = follow_the_log(history)?;
    checked.commits = commits.len();
    check_answers(history, &commits, &mut checked)?;
    check_real_time(history, &commits)?;
    check_sightings(history, &commits, &mut checked)?;
    search_windows(history, &commits, &mut checked)?;
    Ok(checked)
}

/// The commits, in order of their versions, each following from the one before.
fn follow_the_log(history: &History) -> Result<Vec<&Decided>, String> {
    let (mut model, mut commits) = (Register::default(), Vec::new());
    for (decided, slot) in history.log.iter().zip(1..) {
        ensure(decided.slot == slot, || format!("slot {slot} is missing in the log: {decided:?}"))?;
        if let Some((ask, key)) = &decided.commit {
            let applied = key.as_ref().and_then(|key| model.applied.get(key));
            ensure(applied.is_none(), || format!("a key was applied twice, as version {applied:?} and by {decided:?}"))?;
            let ret = model.invoke(&(*ask, key.clone()));
            ensure(ret == Ret::Committed(decided.version), || format!("{decided:?} does not follow from what was before it: {ret:?}"))?;
            commits.push(decided);
        }
        ensure(decided.version == model.version, || format!("{decided:?} has the wrong version, not {}", model.version))?;
    }
    let hashes: BTreeSet<_> = history.log.iter().map(|decided| &decided.hash).collect();
    ensure(hashes.len() == history.log.len(), || "two slots have one hash".into())?;
    Ok(commits)
}

/// Every answer agrees with the log, and every commit was asked for.
fn check_answers(history: &History, commits: &[&Decided], checked: &mut Checked) -> Result<(), String> {
    let by_txid: BTreeMap<_, _> = commits.iter().filter_map(|commit| Some((commit.txid.as_deref()?, *commit))).collect();
    let mut possible = BTreeSet::new();
    for op in &history.ops {
        match &op.told {
            Told::Committed(place) => {
                check_committed(history, place).map_err(|why| format!("{why}; told by {op:?}"))?;
                let done = &history.log[place.slot as usize - 1].commit;
                let same = done.as_ref().is_some_and(|(ask, key)| wish(*ask, key) == wish(op.ask, &op.key) && *ask == op.ask);
                ensure(same, || format!("the log has another change there, {done:?}; told by {op:?}"))?;
            }
            Told::Aborted { txid } => {
                let commit = by_txid.get(txid.as_str());
                ensure(commit.is_none(), || format!("told aborted, and committed as {commit:?}: {op:?}"))?;
            }
            Told::Refused | Told::Unknown { .. } => {}
        }
        if matches!(op.told, Told::Committed(_) | Told::Unknown { .. }) {
            possible.insert(wish(op.ask, &op.key));
        }
    }
    for commit in commits {
        let (ask, key) = commit.commit.as_ref().ok_or("no commit")?;
        ensure(possible.contains(&wish(*ask, key)), || {
            format!("nobody asked for {commit:?}, or all who did were told aborted or refused")
        })?;
        let calls = || history.ops.iter().filter(|op| wish(op.ask, &op.key) == wish(*ask, key));
        checked.unknown_applied += usize::from(calls().all(|op| !matches!(op.told, Told::Committed(_))));
        checked.repeats_of_a_key += calls().count() - 1;
    }
    Ok(())
}

fn check_committed(history: &History, place: &Place) -> Result<(), String> {
    let decided = (place.slot as usize).checked_sub(1).and_then(|index| history.log.get(index));
    let same = decided.is_some_and(|decided| {
        let found = (decided.txid.as_ref(), decided.version, &decided.hash, decided.commit.is_some());
        found == (Some(&place.txid), place.version, &place.hash, true)
    });
    ensure(same, || format!("{place:?} was told committed, and the log has {decided:?}"))
}

/// From when on each commit may have happened, and by when it must have: of all calls with that wish that may have done it.
fn spans(history: &History, commits: &[&Decided]) -> Vec<(Moment, Moment)> {
    let mut spans: BTreeMap<Wish, (Moment, Moment)> = BTreeMap::new();
    for op in &history.ops {
        let end = match &op.told {
            Told::Committed(_) => op.end,
            Told::Unknown { .. } => Moment::MAX,
            Told::Aborted { .. } | Told::Refused => continue,
        };
        let span = spans.entry(wish(op.ask, &op.key)).or_insert((Moment::MAX, Moment::MAX));
        *span = (span.0.min(op.start), span.1.min(end));
    }
    let of = |commit: &&Decided| commit.commit.as_ref().and_then(|(ask, key)| spans.get(&wish(*ask, key)).copied());
    commits.iter().map(|commit| of(commit).unwrap_or((0, Moment::MAX))).collect()
}

/// No write had ended before one of a lower version was asked for.
fn check_real_time(history: &History, commits: &[&Decided]) -> Result<(), String> {
    let (mut ended_first, mut by) = (Moment::MAX, 0);
    for ((start, end), commit) in spans(history, commits).into_iter().zip(commits).rev() {
        ensure(start < ended_first, || {
            format!("version {by} was told at {ended_first}, and version {} asked for at {start}", commit.version)
        })?;
        if end < ended_first {
            (ended_first, by) = (end, commit.version);
        }
    }
    Ok(())
}

fn check_sightings(history: &History, commits: &[&Decided], checked: &mut Checked) -> Result<(), String> {
    let spans = spans(history, commits);
    let share_at = |version: u64| match (version as usize).checked_sub(1).map(|index| commits.get(index)) {
        None => Some(None),
        Some(commit) => match commit?.commit.as_ref()?.0 {
            Ask::Advance(share) | Ask::Reduce(share) => Some(Some(share)),
            Ask::Rollback => Some(None),
        },
    };
    let committed: BTreeMap<_, _> = commits.iter().filter_map(|commit| Some((commit.txid.as_deref()?, *commit))).collect();
    let mut shown: BTreeMap<(usize, usize), u64> = BTreeMap::new();
    let mut genesis_hashes = BTreeSet::new();
    for sighting in &history.sightings {
        let wrong = |what: &str| format!("{what}: {sighting:?}");
        if let Some(version) = sighting.seen.version() {
            let share = share_at(version).ok_or_else(|| wrong("no such version was ever committed"))?;
            let (since, _) = (version as usize).checked_sub(1).map_or((0, 0), |index| spans[index]);
            ensure(since < sighting.end, || wrong("seen before anybody asked for it"))?;
            if let Some(life) = sighting.life {
                let before = shown.insert((sighting.at, life), version).unwrap_or_default();
                ensure(before <= version, || wrong(&format!("the version went back, from {before}")))?;
            }
            match &sighting.seen {
                Seen::Routing { share: seen, .. } | Seen::State { share: seen, .. } => {
                    ensure(*seen == share, || wrong(&format!("this version's share is {share:?}")))?;
                }
                Seen::Predicted { canary, .. } => ensure(!canary || share.is_some(), || wrong("a canary answered, and there is none"))?,
                Seen::Receipt { .. } => {}
            }
        }
        match &sighting.seen {
            Seen::Routing { slot: 0, hash, .. } => _ = genesis_hashes.insert(hash.clone()),
            Seen::Routing { slot, version, hash, .. } => {
                let decided = history.log.get(*slot as usize - 1).ok_or_else(|| wrong("no such slot"))?;
                ensure((decided.version, &decided.hash) == (*version, hash), || wrong(&format!("the log has {decided:?}")))?;
            }
            Seen::State { version, txid, .. } => {
                let last = (*version as usize).checked_sub(1).and_then(|index| commits[index].txid.clone());
                ensure(last == *txid, || wrong(&format!("this version is of {last:?}")))?;
            }
            Seen::Predicted { .. } => {}
            Seen::Receipt { txid, told, healed } => match told {
                Told::Committed(place) => {
                    ensure(place.txid == *txid, || wrong("the receipt of another"))?;
                    check_committed(history, place).map_err(|why| wrong(&why))?;
                }
                Told::Aborted { .. } => ensure(!committed.contains_key(txid.as_str()), || wrong("told aborted, and committed"))?,
                Told::Unknown { .. } => ensure(!healed, || wrong("still unknown when all had healed"))?,
                // It is not known there; then it is in no slot.
                Told::Refused => ensure(!healed || !committed.contains_key(txid.as_str()), || wrong("not known when all had healed"))?,
            },
        }
    }
    ensure(genesis_hashes.len() <= 1, || format!("two hashes of the genesis: {genesis_hashes:?}"))?;
    check_own_word(history)?;
    check_leases(history, checked)?;
    check_restarts(history, checked)
}

/// What a node has told a caller it shows itself from then on, for as long as its process lives.
fn check_own_word(history: &History) -> Result<(), String> {
    let mut told: BTreeMap<(usize, usize), Vec<(Moment, u64)>> = BTreeMap::new();
    for op in &history.ops {
        if let (Told::Committed(place), Some(life)) = (&op.told, op.life) {
            told.entry((op.at, life)).or_default().push((op.end, place.version));
        }
    }
    told.values_mut().for_each(|told| running_max(told));
    for sighting in &history.sightings {
        let (Some(version), Some(life)) = (sighting.seen.version(), sighting.life) else { continue };
        let most = told.get(&(sighting.at, life)).map_or(0, |told| told_before(told, sighting.start));
        ensure(most <= version, || format!("the node had told of version {most}: {sighting:?}"))?;
    }
    Ok(())
}

/// What a `reduce` took away nobody serves any more when the leases have ended that its caller was told of: not the stopped, not the
/// cut off, not those that are back.
fn check_leases(history: &History, checked: &mut Checked) -> Result<(), String> {
    let told = |op: &Op| if let Told::Committed(place) = &op.told { Some((op.gone_us?, place.version)) } else { None };
    let mut gone: Vec<_> = history.ops.iter().filter_map(told).collect();
    running_max(&mut gone);
    for sighting in history.sightings.iter().filter(|sighting| sighting.seen.is_canary_served()) {
        let (Some(version), most) = (sighting.seen.version(), told_before(&gone, sighting.asked_us)) else { continue };
        checked.canary_after_reduce += usize::from(most > 0);
        ensure(most <= version, || format!("a canary was served, when the leases from before version {most} had ended: {sighting:?}"))?;
    }
    Ok(())
}

/// After a restart no canary is served before all is known that was told to callers before the start.
fn check_restarts(history: &History, checked: &mut Checked) -> Result<(), String> {
    let committed = |op: &Op| if let Told::Committed(place) = &op.told { Some((op.end, place.version)) } else { None };
    let mut told: Vec<_> = history.ops.iter().filter_map(committed).collect();
    running_max(&mut told);
    let started: BTreeMap<_, _> = history.starts.iter().map(|(at, life, moment)| ((*at, *life), *moment)).collect();
    for sighting in &history.sightings {
        let served = sighting.seen.is_canary_served();
        let start = sighting.life.filter(|life| *life > 0).and_then(|life| started.get(&(sighting.at, life)));
        let (true, Some(start), Some(version)) = (served, start, sighting.seen.version()) else { continue };
        checked.canary_after_restart += 1;
        let most = told_before(&told, *start);
        ensure(most <= version, || {
            format!("a canary was served after a restart, when version {most} had been told before it: {sighting:?}")
        })?;
    }
    Ok(())
}

/// Sorted by moment, with the highest version so far.
fn running_max(told: &mut [(Moment, u64)]) {
    told.sort_unstable();
    let mut most = 0;
    for (_, version) in told {
        most = most.max(*version);
        *version = most;
    }
}

fn told_before(told: &[(Moment, u64)], moment: Moment) -> u64 {
    let before = told.partition_point(|(end, _)| *end < moment);
    before.checked_sub(1).map_or(0, |index| told[index].1)
}

fn search_windows(history: &History, commits: &[&Decided], checked: &mut Checked) -> Result<(), String> {
    let version_of: BTreeMap<_, _> =
        commits.iter().filter_map(|commit| commit.commit.as_ref().map(|(ask, key)| (wish(*ask, key), commit.version))).collect();
    let mut by_window: Vec<Vec<&Op>> = vec![Vec::new(); commits.len().div_ceil(WINDOW)];
    for op in &history.ops {
        if let (Some(version), Told::Committed(_) | Told::Unknown { .. }) = (version_of.get(&wish(op.ask, &op.key)), &op.told) {
            by_window[(*version as usize - 1) / WINDOW].push(op);
        }
    }
    let mut model = Register::default();
    for (calls, window) in by_window.into_iter().zip(commits.chunks(WINDOW)) {
        let calls: Vec<_> = calls.into_iter().map(|op| (op, version_of[&wish(op.ask, &op.key)])).collect();
        if !serialisable(&model, &calls) {
            return Err(format!("no order of these calls gives these answers, from {model:?}: {calls:#?}"));
        }
        checked.windows += 1;
        checked.serialised += calls.len();
        for (ask, key) in window.iter().filter_map(|commit| commit.commit.as_ref()) {
            model.invoke(&(*ask, key.clone()));
        }
        model.applied.clear();
    }
    Ok(())
}

/// Whether the tester finds an order for these calls, given with the versions that they made.
fn serialisable(from: &Register, calls: &[(&Op, u64)]) -> bool {
    let mut events = Vec::new();
    for (index, (op, version)) in calls.iter().enumerate() {
        let (thread, end, version) = match &op.told {
            Told::Committed(place) => (op.caller, op.end, place.version),
            // Nobody waits for it any more: it is a thread of its own from here on.
            _ => (usize::MAX - index, Moment::MAX, *version),
        };
        events.push((op.start, index, thread, None));
        events.push((end, index, thread, Some(version)));
    }
    events.sort_unstable();
    let mut tester = LinearizabilityTester::new(from.clone());
    for (_, index, thread, ended) in events {
        let op = calls[index].0;
        let taken = match ended {
            None => tester.on_invoke(thread, (op.ask, op.key.clone())),
            Some(version) => tester.on_return(thread, Ret::Committed(version)),
        };
        if taken.is_err() {
            return false;
        }
    }
    tester.is_consistent()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(version: u64) -> Place {
        Place { txid: format!("a-1-{version}"), slot: version, version, hash: format!("hash-{version}") }
    }

    fn committed(version: u64) -> Told {
        Told::Committed(place(version))
    }

    fn op(caller: usize, span: (Moment, Moment), ask: Ask, told: Told) -> Op {
        Op { caller, at: 0, life: Some(0), ask, key: None, start: span.0, end: span.1, gone_us: None, told }
    }

    fn keyed(key: &str, op: Op) -> Op {
        Op { key: Some(key.into()), ..op }
    }

    fn decided(version: u64, ask: Ask, key: Option<&str>) -> Decided {
        let Place { txid, slot, hash, .. } = place(version);
        Decided { slot, version, hash, txid: Some(txid), commit: Some((ask, key.map(str::to_owned))) }
    }

    /// Two writes one after the other, one beside them, and one whose caller heard nothing.
    fn good() -> History {
        let log = vec![
            decided(1, Ask::Advance(10), None),
            decided(2, Ask::Advance(30), Some("k")),
            decided(3, Ask::Reduce(20), None),
            decided(4, Ask::Rollback, Some("r")),
        ];
        let ops = vec![
            op(0, (1, 4), Ask::Advance(10), committed(1)),
            keyed("k", op(1, (2, 9), Ask::Advance(30), Told::Unknown { txid: None })),
            op(0, (5, 12), Ask::Reduce(20), committed(3)),
            keyed("k", op(1, (10, 11), Ask::Advance(30), committed(2))),
            op(2, (3, 6), Ask::Advance(40), Told::Aborted { txid: "b-1-1".into() }),
            keyed("r", op(2, (13, 14), Ask::Rollback, committed(4))),
        ];
        History { log, ops, ..History::default() }
    }

    /// What the check says, which must be no, and whether the tester by itself says no as well.
    fn refused(history: &History, tester_too: bool) -> String {
        let said = check(history).unwrap_err();
        let calls: Vec<_> = history
            .ops
            .iter()
            .filter_map(|op| if let Told::Committed(place) = &op.told { Some((op, place.version)) } else { None })
            .collect();
        assert_eq!(serialisable(&Register::default(), &calls), !tester_too, "{said}");
        said
    }

    fn routing(life: usize, span: (Moment, Moment), version: u64, share: Option<u16>) -> Sighting {
        let seen = Seen::Routing { slot: version, version, hash: place(version).hash, share, canary_served: share.is_some() };
        Sighting { at: 0, life: Some(life), start: span.0, end: span.1, asked_us: 0, seen }
    }

    #[test]
    fn a_true_history_is_taken() {
        let mut history = good();
        let shares = [None, Some(10), Some(30), Some(20), None];
        history.sightings = (0..5).map(|version| routing(0, (20 + version, 21 + version), version, shares[version as usize])).collect();
        // A reader that is behind is not wrong, but the node that told its caller is not behind itself.
        history.sightings.iter_mut().for_each(|sighting| sighting.at = 1);
        let expected = Checked {
            commits: 4,
            windows: 1,
            serialised: 5,
            unknown_applied: 0,
            repeats_of_a_key: 1,
            canary_after_restart: 0,
            canary_after_reduce: 0,
        };
        assert_eq!(check(&history), Ok(expected));
        history.ops.remove(3);
        assert_eq!(check(&history).unwrap().unknown_applied, 1);
    }

    #[test]
    fn a_lost_write_is_refused() {
        let mut history = good();
        history.log.remove(2);
        history.log[2] = Decided { slot: 3, version: 3, ..history.log[2].clone() };
        // The callers alone cannot know.
        assert!(refused(&history, false).contains("told committed"));
        // But they do if the next one is told the same version, as if nothing had been there.
        let mut history = good();
        history.log.remove(2);
        history.log[2] = Decided { slot: 3, ..decided(3, Ask::Rollback, Some("r")) };
        history.ops[5].told = committed(3);
        assert!(refused(&history, true).contains("another change"));
    }

    #[test]
    fn a_version_that_was_told_to_two_is_refused() {
        let mut history = good();
        history.ops.push(op(3, (5, 8), Ask::Advance(50), committed(3)));
        assert!(refused(&history, true).contains("another change"));
    }

    #[test]
    fn a_write_that_is_ordered_before_one_that_had_ended_is_refused() {
        let mut history = good();
        history.ops.retain(|op| op.key.is_none());
        history.log.retain(|decided| decided.commit.as_ref().is_some_and(|(_, key)| key.is_none()));
        history.log[1] =
            Decided { slot: 2, version: 2, hash: "hash-2".into(), txid: Some("a-1-2".into()), commit: Some((Ask::Advance(20), None)) };
        history.ops[1] = op(0, (5, 12), Ask::Advance(20), committed(2));
        assert_eq!(check(&history).map(|checked| checked.commits), Ok(2));
        // The second had ended before the first was asked for.
        history.ops[0].caller = 7;
        (history.ops[0].start, history.ops[0].end) = (13, 14);
        assert!(refused(&history, true).contains("asked for at 13"));
        (history.ops[0].start, history.ops[0].end) = (11, 14);
        assert!(check(&history).is_ok(), "beside each other they have any order");
    }

    #[test]
    fn an_aborted_write_that_was_applied_is_refused() {
        let mut history = good();
        history.ops[0].told = Told::Aborted { txid: "a-1-1".into() };
        assert!(refused(&history, true).contains("told aborted, and committed"));
        // Under another txid it is no better: nobody else asked for that share.
        history.ops[0].told = Told::Aborted { txid: "a-1-99".into() };
        assert!(refused(&history, true).contains("nobody asked for"));
        history.ops[0].told = Told::Refused;
        assert!(refused(&history, true).contains("nobody asked for"));
    }

    #[test]
    fn a_key_that_was_applied_twice_is_refused() {
        let mut history = good();
        history.log.push(decided(5, Ask::Advance(30), Some("k")));
        history.ops.push(keyed("k", op(1, (20, 21), Ask::Advance(30), committed(5))));
        assert!(refused(&history, true).contains("applied twice"));
    }

    #[test]
    fn a_reduce_that_raises_and_a_version_that_is_skipped_are_refused() {
        let mut history = good();
        history.log[2].commit = Some((Ask::Reduce(35), None));
        history.ops[2].ask = Ask::Reduce(35);
        assert!(refused(&history, true).contains("does not follow"));
        let mut history = good();
        history.log[3].version = 5;
        history.ops[5].told = Told::Committed(Place { version: 5, ..place(4) });
        assert!(refused(&history, true).contains("does not follow"));
    }

    #[test]
    fn what_nodes_show_is_held_against_the_log() {
        let with = |sightings: &[Sighting]| History { sightings: sightings.to_vec(), ..good() };
        let said = |sightings: &[Sighting]| refused(&with(sightings), false);
        assert!(said(&[routing(0, (20, 21), 3, Some(30))]).contains("this version's share is Some(20)"));
        assert!(said(&[routing(0, (20, 21), 5, None)]).contains("no such version"));
        assert!(said(&[routing(0, (20, 21), 4, None), routing(0, (22, 23), 3, Some(20))]).contains("went back"));
        assert!(said(&[routing(0, (1, 3), 3, Some(20))]).contains("before anybody asked"));
        assert!(said(&[routing(0, (20, 21), 3, Some(20))]).contains("had told of version 4"));
        let mut other = routing(0, (20, 21), 4, None);
        other.seen = Seen::Routing { slot: 4, version: 4, hash: "another".into(), share: None, canary_served: false };
        assert!(said(&[other]).contains("the log has"));
    }

    #[test]
    fn a_canary_served_after_a_restart_from_before_what_was_told_is_refused() {
        let mut history = good();
        history.starts = vec![(0, 1, 15)];
        history.sightings = vec![routing(1, (16, 17), 3, Some(20))];
        assert!(refused(&history, false).contains("after a restart"));
        history.starts = vec![(0, 1, 13)];
        assert_eq!(check(&history).unwrap().canary_after_restart, 1);
    }

    #[test]
    fn a_canary_from_before_a_reduce_is_refused_when_the_leases_have_ended() {
        let mut history = good();
        history.ops[2].gone_us = Some(700);
        let seen = |asked_us, version, canary| {
            let seen = Seen::Predicted { version, canary };
            vec![Sighting { at: 1, life: None, start: 20, end: 21, asked_us, seen }]
        };
        for (asked_us, version, canary, judged) in [(700, 2, true, 0), (701, 3, true, 1), (701, 2, false, 0)] {
            history.sightings = seen(asked_us, version, canary);
            assert_eq!(check(&history).unwrap().canary_after_reduce, judged, "{asked_us} {version}");
        }
        history.sightings = seen(701, 2, true);
        assert!(refused(&history, false).contains("the leases from before version 3 had ended"));
    }

    #[test]
    fn an_answer_asked_for_later_is_held_against_the_log() {
        let with = |txid: &str, told, healed| {
            let seen = Seen::Receipt { txid: txid.into(), told, healed };
            History { sightings: vec![Sighting { at: 1, life: None, start: 30, end: 31, asked_us: 0, seen }], ..good() }
        };
        assert!(refused(&with("a-1-2", Told::Aborted { txid: "a-1-2".into() }, false), false).contains("told aborted"));
        assert!(refused(&with("a-1-2", Told::Refused, true), false).contains("not known"));
        assert!(refused(&with("b-1-9", Told::Unknown { txid: None }, true), false).contains("still unknown"));
        assert!(refused(&with("b-1-9", committed(2), true), false).contains("of another"));
        for (told, healed) in [(Told::Unknown { txid: None }, false), (Told::Refused, true), (Told::Aborted { txid: "b-1-9".into() }, true)]
        {
            assert!(check(&with("b-1-9", told, healed)).is_ok());
        }
    }
}
