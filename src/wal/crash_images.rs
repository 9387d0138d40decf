//! Crash images: a workload is recorded operation by operation, and what the disk can hold after a crash behind each of them is built
//! and recovered.
//!
//! What a crash may do here: of the writes to a file since its last sync, any 512-byte sectors are kept and the rest lost; the length that such
//! a write gave the file is kept, lost, or kept in part; a cut may be lost; of the directory's changes since its last sync, any number of
//! the last ones are lost. What is synced is kept. A sector is whole: the format's own tests have every byte.
//!
//! What must hold on every image: it is a log (or there is none, before the first one was begun), what it holds is the state after the
//! last call that had returned or, if a call was under way, one that this call leads to, and the log goes on with an append that reads back.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use super::disk::{Disk, Os};
use super::file::{PREALLOCATE_BYTES, Wal};
use super::frame::{self, Chain, Tail};
use crate::core::ballot::Ballot;
use crate::core::durable::Durable;
use crate::core::gate::Gate;
use crate::core::ids::{DiskId, MeshId, ModelId, NodeId, RouteName};
use crate::core::record::Record;
use crate::core::state::{CanaryChange, Change, Kind, RouteChange, RoutingState, Transaction};
use crate::core::value::{CastVote, Commit, Value, Vote, commit_hash};

const SECTOR_BYTES: usize = 512;
const PAGE_BYTES: usize = 4_096;

/// One of the two names that the log uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Name {
    Log,
    /// The one that a whole log is written under before it is put in its place.
    New,
}

#[derive(Clone, Debug)]
enum Op {
    Create,
    Write { file: Name, offset: usize, bytes: Vec<u8> },
    Truncate { file: Name, bytes: usize },
    Sync(Name),
    Rename,
    Unlink,
    SyncDir,
}

/// A sync that a mistaken program would leave out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Skip {
    Directory,
    Log,
    NewLog,
}

/// The operating system, and a record of what was asked of it.
#[derive(Clone)]
struct Recorder {
    path: PathBuf,
    skip: Option<Skip>,
    ops: Arc<Mutex<Vec<Op>>>,
}

impl Recorder {
    fn new(path: &Path, skip: Option<Skip>) -> Recorder {
        Recorder { path: path.to_owned(), skip, ops: Arc::default() }
    }

    fn push(&self, op: Op) {
        self.ops.lock().unwrap().push(op);
    }

    fn take(&self) -> Vec<Op> {
        std::mem::take(&mut self.ops.lock().unwrap())
    }

    fn name(&self, file: &File) -> Name {
        let log = fs::metadata(&self.path).ok().map(|log| log.ino());
        if log == Some(file.metadata().unwrap().ino()) { Name::Log } else { Name::New }
    }
}

impl Disk for Recorder {
    fn create(&self, path: &Path) -> io::Result<File> {
        assert_eq!(path, new_path(&self.path));
        self.push(Op::Create);
        Os.create(path)
    }
    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.push(Op::Write { file: self.name(file), offset: offset as usize, bytes: bytes.to_vec() });
        Os.write_at(file, bytes, offset)
    }
    // Nothing needs to reach this disk: it is the record that is crashed.
    fn sync(&self, file: &File) -> io::Result<()> {
        let name = self.name(file);
        let skipped = if name == Name::Log { Skip::Log } else { Skip::NewLog };
        if self.skip != Some(skipped) {
            self.push(Op::Sync(name));
        }
        Ok(())
    }
    fn truncate(&self, file: &File, bytes: u64) -> io::Result<()> {
        self.push(Op::Truncate { file: self.name(file), bytes: bytes as usize });
        Os.truncate(file, bytes)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.push(Op::Rename);
        Os.rename(from, to)
    }
    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        if self.skip != Some(Skip::Directory) {
            self.push(Op::SyncDir);
        }
        Ok(())
    }
}

fn new_path(path: &Path) -> PathBuf {
    path.with_added_extension("tmp")
}

// ── the workload ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/// What a log can hold. `None`: there is none yet.
type State = Option<Rc<Vec<Record>>>;

/// Operations, and behind each of them what may be found after a crash.
#[derive(Default)]
struct Trace {
    steps: Vec<Step>,
}

struct Step {
    op: Op,
    call: &'static str,
    allowed: Vec<State>,
}

impl Trace {
    /// A call did these operations. Until it returns, it may have had any of its effects or none; then, the last one for sure.
    fn call(&mut self, call: &'static str, ops: Vec<Op>, before: &State, effects: &[State]) {
        let last = ops.len().saturating_sub(1);
        for (index, op) in ops.into_iter().enumerate() {
            let under_way = [std::slice::from_ref(before), effects].concat();
            let allowed = if index == last { effects.last().cloned().into_iter().collect() } else { under_way };
            self.steps.push(Step { op, call, allowed });
        }
    }
}

/// A log that records what it does, and the status that its records lead to.
struct Workload {
    recorder: Recorder,
    wal: Option<Wal>,
    durable: Durable,
    held: Rc<Vec<Record>>,
    trace: Trace,
    random: fastrand::Rng,
}

impl Workload {
    fn begin(path: &Path, skip: Option<Skip>) -> Workload {
        let (mesh, node) = (MeshId::new("m").unwrap(), node());
        let routes = [(route(), (ModelId::new("v1").unwrap(), Gate::default()))];
        let state = RoutingState::genesis(&mesh, [node.clone(), NodeId::new("node-b").unwrap()], routes.into());
        let records = Durable::genesis(&mesh, &node, DiskId([1; 8]), state);
        let recorder = Recorder::new(path, skip);
        let wal = Wal::create_on(Box::new(recorder.clone()), path, &records).unwrap();
        let durable = Durable::replay(records.clone()).unwrap();
        let held = Rc::new(records);
        let mut trace = Trace::default();
        trace.call("create", recorder.take(), &None, &[Some(held.clone())]);
        Workload { recorder, wal: Some(wal), durable, held, trace, random: fastrand::Rng::with_seed(1) }
    }

    fn append(&mut self, records: Vec<Record>) {
        for record in &records {
            self.durable.apply(0, record.clone()).unwrap();
        }
        let wal = self.wal.as_mut().unwrap();
        let length = fs::metadata(&self.recorder.path).unwrap().len();
        wal.append(&records).unwrap();
        let longer = fs::metadata(&self.recorder.path).unwrap().len() > length;
        let before = self.held.clone();
        // More than one group goes group by group, each synced; each may be the last that is there.
        let (groups, _) = frame::encode(&records, Chain::start()).unwrap();
        let mut held = (*before).clone();
        let groups = frame::replay(&groups.concat()).groups;
        let effects: Vec<State> = groups
            .into_iter()
            .map(|group| {
                held.extend(group.records);
                Some(Rc::new(held.clone()))
            })
            .collect();
        self.held = Rc::new(held);
        let call = if longer { "append that lengthens the file" } else { "append" };
        self.trace.call(call, self.recorder.take(), &Some(before), &effects);
    }

    fn compact(&mut self, records: Vec<Record>) {
        self.durable = Durable::replay(records.clone()).unwrap();
        self.wal.as_mut().unwrap().compact(&records).unwrap();
        let before = std::mem::replace(&mut self.held, Rc::new(records));
        self.trace.call("compaction", self.recorder.take(), &Some(before), &[Some(self.held.clone())]);
    }

    /// The process stops and another one starts.
    fn restart(&mut self) {
        self.wal = None;
        let opened = Wal::open_on(Box::new(self.recorder.clone()), &self.recorder.path).unwrap().unwrap();
        assert_eq!(opened.records, *self.held);
        self.wal = Some(opened.wal);
        let held = Some(self.held.clone());
        self.trace.call("open", self.recorder.take(), &held, std::slice::from_ref(&held));
        let (mesh, node) = (self.durable.mesh().clone(), self.durable.node().clone());
        let (incarnation, disk_id) = (self.durable.incarnation() + 1, self.durable.disk_id());
        self.append(vec![Record::Boot { mesh, node, incarnation, disk_id }]);
    }

    /// One slot from promise to decision in three appends, the last of which holds about this many bytes.
    fn decide(&mut self, bytes: usize) {
        let slot = self.durable.head().slot + 1;
        let ballot = |round| Ballot { round, node: node(), incarnation: 1 };
        let canary =
            (slot % 2 == 1).then_some(CanaryChange::Set(crate::core::state::Model { id: ModelId::new("v2").unwrap(), digest: None }));
        let change = RouteChange { stable: None, canary: canary.unwrap_or(CanaryChange::Remove), weights: None };
        let change = Change::Routes([(route(), change)].into());
        let tx = Transaction { txid: format!("node-a-1-{slot}").parse().unwrap(), kind: Kind::Advance, change, idempotency_key: None };
        let after = self.durable.state().after(&tx).unwrap();
        let state_hash = commit_hash(self.durable.head().state_hash, slot, &tx, &after);
        let reason = (0..bytes).map(|_| self.random.alphanumeric()).collect();
        let votes = vec![CastVote { node: node(), vote: Vote { reason: Some(reason), ..Vote::yes() } }];
        let value = Value::Commit(Commit { tx: tx.clone(), state_hash, votes, excused: Vec::new(), at: 1_700_000_000_000 });
        let decision = self.durable.decision_of(&value);
        self.append(vec![Record::Promise { slot, ballot: ballot(1) }]);
        self.append(vec![Record::Prepared { slot, ballot: ballot(2), tx }, Record::Accepted { slot, ballot: ballot(2), value }]);
        self.append(vec![Record::Decided { decision }]);
    }

    /// The records that stand for the head alone.
    fn snapshot(&self) -> Vec<Record> {
        let durable = &self.durable;
        let (mesh, node, incarnation) = (durable.mesh().clone(), durable.node().clone(), durable.incarnation());
        let head = durable.head();
        let (genesis_hash, state) = (durable.genesis_hash(), durable.state().clone());
        vec![
            Record::Boot { mesh, node, incarnation, disk_id: durable.disk_id() },
            Record::Snapshot { genesis_hash, slot: head.slot, state_hash: head.state_hash, state },
        ]
    }
}

fn node() -> NodeId {
    NodeId::new("node-a").unwrap()
}

fn route() -> RouteName {
    RouteName::new("default").unwrap()
}

/// Groups of a few sectors and of many, a file that grows twice, two compactions, two restarts.
fn workload(path: &Path, skip: Option<Skip>) -> Workload {
    let mut work = Workload::begin(path, skip);
    work.restart();
    for bytes in [0, 300, 1_200, 5_000, 24_000] {
        work.decide(bytes);
    }
    work.compact(work.durable.records());
    for bytes in [900, 60_000, 2_000] {
        work.decide(bytes);
    }
    work.restart();
    work.decide(150_000);
    work.decide(100);
    work.compact(work.snapshot());
    for bytes in [0, 3_000] {
        work.decide(bytes);
    }
    work
}

// ── the disk that is crashed ───────────────────────────────────────────────────────────────────────────────────────────────────────

/// A file: what a crash cannot take, and what has been asked since.
#[derive(Clone, Default)]
struct Inode {
    durable: Rc<Vec<u8>>,
    pending: Vec<Pending>,
}

#[derive(Clone)]
enum Pending {
    Write { offset: usize, bytes: Rc<Vec<u8>> },
    Truncate(usize),
}

/// Which file each name stands for.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
struct Names {
    log: Option<usize>,
    new: Option<usize>,
}

#[derive(Clone, Default)]
struct Model {
    inodes: Vec<Inode>,
    /// As synced, then as changed since, change by change. Never empty.
    names: Vec<Names>,
}

impl Model {
    fn empty() -> Model {
        Model { inodes: Vec::new(), names: vec![Names::default()] }
    }

    /// A disk that holds exactly this.
    fn holding(log: Option<&[u8]>, new: Option<&[u8]>) -> Model {
        let mut model = Model::empty();
        let mut place = |bytes: Option<&[u8]>| {
            bytes.map(|bytes| {
                model.inodes.push(Inode { durable: Rc::new(bytes.to_vec()), pending: Vec::new() });
                model.inodes.len() - 1
            })
        };
        let names = Names { log: place(log), new: place(new) };
        model.names = vec![names];
        model
    }

    fn inode(&mut self, name: Name) -> &mut Inode {
        let names = self.names.last().unwrap();
        let index = if name == Name::Log { names.log } else { names.new };
        &mut self.inodes[index.unwrap()]
    }

    fn rename_to(&mut self, names: Names) {
        self.names.push(names);
    }

    fn apply(&mut self, op: &Op) {
        let names = *self.names.last().unwrap();
        match op {
            Op::Create => {
                assert!(names.new.is_none(), "a file is begun anew only after the old one was removed");
                self.inodes.push(Inode::default());
                self.rename_to(Names { new: Some(self.inodes.len() - 1), ..names });
            }
            Op::Write { file, offset, bytes } => {
                let change = Pending::Write { offset: *offset, bytes: Rc::new(bytes.clone()) };
                self.inode(*file).pending.push(change);
            }
            Op::Truncate { file, bytes } => self.inode(*file).pending.push(Pending::Truncate(*bytes)),
            Op::Sync(file) => {
                let inode = self.inode(*file);
                let all = inode.atoms();
                inode.durable = Rc::new(inode.after(&all, &vec![true; all.len()], None));
                inode.pending.clear();
            }
            Op::Rename => self.rename_to(Names { log: names.new, new: None }),
            Op::Unlink => self.rename_to(Names { new: None, ..names }),
            Op::SyncDir => self.names = vec![names],
        }
    }
}

/// What is kept or lost as a whole: a sector of a write, or a cut.
#[derive(Clone, Copy)]
struct Atom {
    change: usize,
    sector: usize,
}

impl Inode {
    /// Everything that a crash may take. A sector that a write leaves as it was is not among them.
    fn atoms(&self) -> Vec<Atom> {
        let mut atoms = Vec::new();
        for (index, change) in self.pending.iter().enumerate() {
            match change {
                Pending::Truncate(_) => atoms.push(Atom { change: index, sector: 0 }),
                Pending::Write { offset, bytes } => {
                    let sectors = offset / SECTOR_BYTES..(offset + bytes.len()).div_ceil(SECTOR_BYTES);
                    let alone = self.pending.len() == 1;
                    let changes = |sector: &usize| {
                        let (from, to) = within(*sector, *offset, bytes.len());
                        let old = (from..to).map(|at| self.durable.get(at).copied().unwrap_or(0));
                        !alone || !old.eq(bytes[from - offset..to - offset].iter().copied())
                    };
                    atoms.extend(sectors.filter(changes).map(|sector| Atom { change: index, sector }));
                }
            }
        }
        atoms
    }

    /// The lengths that the last write leads from and to, if it lengthens the file.
    fn growth(&self) -> Option<(usize, usize)> {
        let Some(Pending::Write { offset, bytes }) = self.pending.last() else { return None };
        let before = Inode { durable: self.durable.clone(), pending: self.pending[..self.pending.len() - 1].to_vec() };
        let atoms = before.atoms();
        let before = before.after(&atoms, &vec![true; atoms.len()], None).len();
        let after = offset + bytes.len();
        (after > before).then_some((before, after))
    }

    /// What is there when these atoms are kept, and the file's length after its growth is this.
    fn after(&self, atoms: &[Atom], kept: &[bool], length: Option<usize>) -> Vec<u8> {
        let mut bytes = (*self.durable).clone();
        for (index, change) in self.pending.iter().enumerate() {
            let kept = atoms.iter().zip(kept).filter(|(atom, kept)| atom.change == index && **kept).map(|(atom, _)| atom.sector);
            match change {
                Pending::Truncate(length) => kept.for_each(|_| bytes.truncate(*length)),
                Pending::Write { offset, bytes: written } => {
                    bytes.resize(bytes.len().max(offset + written.len()), 0);
                    for sector in kept {
                        let (from, to) = within(sector, *offset, written.len());
                        bytes[from..to].copy_from_slice(&written[from - offset..to - offset]);
                    }
                }
            }
        }
        bytes.truncate(length.unwrap_or(usize::MAX));
        bytes
    }
}

/// The part of a sector that a write covers.
fn within(sector: usize, offset: usize, length: usize) -> (usize, usize) {
    ((sector * SECTOR_BYTES).max(offset), ((sector + 1) * SECTOR_BYTES).min(offset + length))
}

/// How many losses of one write are tried.
#[derive(Clone, Copy)]
struct Budget {
    /// Up to this many sectors, every subset.
    subsets_of_max: usize,
    /// Beyond, about so many prefixes, suffixes, and subsets of one lost or one kept.
    regular: usize,
    /// And so many random ones.
    random: usize,
    /// Every so many images, the real recovery on a real file.
    real_every: u64,
    /// Every so many images, a recovery that is itself crashed.
    again_every: u64,
}

/// Which sectors are kept, and which rule says so.
fn losses(atoms: usize, budget: Budget, random: &mut fastrand::Rng) -> Vec<(&'static str, Vec<bool>)> {
    if atoms <= budget.subsets_of_max {
        return (0..1usize << atoms).map(|bits| ("any subset", (0..atoms).map(|at| bits >> at & 1 == 1).collect())).collect();
    }
    let mut losses = Vec::new();
    let mut rule = |name, kept: &mut dyn FnMut(usize) -> bool| losses.push((name, (0..atoms).map(kept).collect()));
    let stride = atoms.div_ceil(budget.regular);
    for n in (0..=atoms).step_by(stride) {
        rule("prefix", &mut |at| at < n);
        rule("suffix", &mut |at| at >= n);
    }
    for n in (0..atoms).step_by(stride) {
        rule("one lost", &mut |at| at != n);
        rule("one kept", &mut |at| at == n);
    }
    for n in 0..budget.random {
        let of_ten = [5, 1, 9][n % 3];
        rule("random", &mut |_| random.u8(..10) < of_ten);
    }
    losses
}

// ── recovery and its oracle ────────────────────────────────────────────────────────────────────────────────────────────────────────

/// What recovery found.
struct Recovered {
    records: Vec<Record>,
    chain: Chain,
    end: usize,
    torn: bool,
}

type Recovery = dyn Fn(&[u8]) -> Result<Option<Recovered>, String>;

/// What `Wal::open` does, without the file.
fn recover(bytes: &[u8]) -> Result<Option<Recovered>, String> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let replay = frame::replay(bytes);
    let torn = match replay.tail {
        Tail::Clean => false,
        Tail::Torn(_) => true,
        Tail::Damaged(damage) => return Err(format!("called damaged at byte {}: {}", damage.offset, damage.flaw)),
    };
    let records = replay.groups.into_iter().flat_map(|group| group.records).collect();
    Ok(Some(Recovered { records, chain: replay.chain, end: replay.end as usize, torn }))
}

/// What was tried.
#[derive(Default, Debug)]
struct Figures {
    crash_points: u64,
    images: u64,
    by_call: BTreeMap<&'static str, u64>,
    by_loss: BTreeMap<&'static str, u64>,
    by_finding: BTreeMap<&'static str, u64>,
    opened_really: u64,
    recoveries_crashed: u64,
}

struct Explorer<'a> {
    budget: Budget,
    recovery: &'a Recovery,
    random: fastrand::Rng,
    figures: Figures,
    /// States that are known to replay.
    replayed: HashSet<*const Vec<Record>>,
    dir: tempfile::TempDir,
}

impl Explorer<'_> {
    fn new(budget: Budget, recovery: &Recovery) -> Explorer<'_> {
        let dir = tempfile::tempdir().unwrap();
        let random = fastrand::Rng::with_seed(7);
        Explorer { budget, recovery, random, figures: Figures::default(), replayed: HashSet::new(), dir }
    }

    /// Crashes behind every operation, and gives the first image on which something is wrong.
    fn explore(&mut self, mut model: Model, trace: &Trace, depth: usize) -> Result<(), String> {
        for (index, step) in trace.steps.iter().enumerate() {
            model.apply(&step.op);
            self.figures.crash_points += 1;
            for state in step.allowed.iter().flatten() {
                if self.replayed.insert(Rc::as_ptr(state)) {
                    Durable::replay(state.iter().cloned()).map_err(|error| error.to_string())?;
                }
            }
            for (lost, names) in model.names.iter().rev().enumerate() {
                let place = |why: String| {
                    let op = match &step.op {
                        Op::Write { file, offset, bytes } => format!("write of {} bytes to {file:?} at {offset}", bytes.len()),
                        other => format!("{other:?}"),
                    };
                    format!("operation {index} ({}: {op}), {lost} names lost: {why}", step.call)
                };
                self.crash(&model, *names, lost, step, depth).map_err(place)?;
            }
        }
        Ok(())
    }

    /// All contents that the log's file can have now.
    fn crash(&mut self, model: &Model, names: Names, names_lost: usize, step: &Step, depth: usize) -> Result<(), String> {
        let new = names.new.map(|index| &model.inodes[index]);
        let Some(log) = names.log.map(|index| &model.inodes[index]) else {
            for new in new.map(any_of).unwrap_or_else(|| vec![None]) {
                self.image("no log", names_lost, None, new.as_deref(), step, depth)?;
            }
            return Ok(());
        };
        for new in new.map(any_of).unwrap_or_default() {
            let atoms = log.atoms();
            let bytes = log.after(&atoms, &vec![true; atoms.len()], None);
            self.image("a new log beside it", names_lost, Some(&bytes), new.as_deref(), step, depth)?;
        }
        let atoms = log.atoms();
        let growth = log.growth();
        let mut seen = HashSet::new();
        for (rule, kept) in losses(atoms.len(), self.budget, &mut self.random) {
            let mut lengths = vec![(rule, None)];
            if let Some((before, after)) = growth {
                lengths.push(("length lost", Some(before)));
                if kept.iter().all(|kept| *kept) {
                    let pages = before / PAGE_BYTES + 1..after / PAGE_BYTES;
                    let pages = pages.clone().step_by(pages.len().div_ceil(self.budget.regular).max(1));
                    lengths.extend(pages.map(|page| ("length kept in part", Some(page * PAGE_BYTES))));
                } else if rule == "random" {
                    let sectors = self.random.usize(before.div_ceil(SECTOR_BYTES)..=after / SECTOR_BYTES);
                    lengths.push(("length kept in part", Some((sectors * SECTOR_BYTES).min(after))));
                }
            }
            for (rule, length) in lengths {
                // What lies behind the end makes no difference, lost or not.
                let visible =
                    atoms.iter().zip(&kept).map(|(atom, kept)| *kept && length.is_none_or(|length| atom.sector * SECTOR_BYTES < length));
                let visible: Vec<bool> = visible.collect();
                if seen.insert((visible, length)) {
                    let bytes = log.after(&atoms, &kept, length);
                    self.image(rule, names_lost, Some(&bytes), None, step, depth)?;
                }
            }
        }
        Ok(())
    }

    fn image(
        &mut self,
        rule: &'static str,
        names_lost: usize,
        log: Option<&[u8]>,
        new: Option<&[u8]>,
        step: &Step,
        depth: usize,
    ) -> Result<(), String> {
        self.figures.images += 1;
        *self.figures.by_call.entry(step.call).or_default() += 1;
        *self.figures.by_loss.entry(if names_lost > 0 { "name lost" } else { rule }).or_default() += 1;
        let bytes = log.unwrap_or_default();
        let recovered = (self.recovery)(bytes).map_err(|why| format!("{rule}: {why}"))?;
        let found = recovered.as_ref().map(|recovered| recovered.records.as_slice());
        let fits = |state: &&State| state.as_ref().map(|records| records.as_slice()) == found;
        let Some(state) = step.allowed.iter().find(fits).cloned() else {
            let counts: Vec<_> = step.allowed.iter().map(|state| state.as_ref().map_or(0, |records| records.len())).collect();
            let count = found.map_or(0, <[Record]>::len);
            return Err(format!("{rule}: recovery found {count} records, and there can be {counts:?} of them"));
        };
        let finding = match &recovered {
            None => "no log yet",
            Some(Recovered { torn: true, .. }) => "a torn end",
            Some(_) if Some(&state) == step.allowed.last() => "all",
            Some(_) => "all but what was under way",
        };
        *self.figures.by_finding.entry(finding).or_default() += 1;
        if let Some(recovered) = &recovered {
            goes_on(bytes, recovered)?;
        }
        let torn = recovered.as_ref().is_some_and(|recovered| recovered.torn);
        // Any number of images whose real recovery costs a file each is too many; the rare ones come more often.
        let often = if torn || new.is_some() || names_lost > 0 { 1 } else { 8 };
        if depth == 0 && self.figures.images.is_multiple_of(self.budget.real_every * often) {
            self.really(log, new, &state, torn)?;
        }
        if depth == 0 && self.figures.images % (self.budget.again_every * often) == 1 {
            self.crash_in_recovery(log, new, &state)?;
        }
        Ok(())
    }

    fn place(&self, log: Option<&[u8]>, new: Option<&[u8]>) -> PathBuf {
        let path = self.dir.path().join("node-a.log");
        for (path, bytes) in [(&path, log), (&new_path(&path), new)] {
            let _ = fs::remove_file(path);
            if let Some(bytes) = bytes {
                fs::write(path, bytes).unwrap();
            }
        }
        path
    }

    /// The recovery that runs in a node finds the same, and its log goes on.
    fn really(&mut self, log: Option<&[u8]>, new: Option<&[u8]>, state: &State, torn: bool) -> Result<(), String> {
        self.figures.opened_really += 1;
        let path = self.place(log, new);
        let opened = Wal::open(&path).map_err(|error| format!("Wal::open: {error}"))?;
        assert!(!new_path(&path).exists(), "what a crash kept from its place is removed");
        let Some(mut opened) = opened else {
            return if state.is_none() { Ok(()) } else { Err("Wal::open found no log".to_owned()) };
        };
        let state = state.as_ref().ok_or("Wal::open found a log")?;
        if opened.records != **state || opened.cut.is_some() != torn {
            return Err(format!("Wal::open found {} records, and not {}", opened.records.len(), state.len()));
        }
        opened.wal.append(&[Record::Admitted]).map_err(|error| error.to_string())?;
        drop(opened);
        let opened = Wal::open(&path).map_err(|error| error.to_string())?.ok_or("no log after an append")?;
        let as_expected = opened.cut.is_none() && opened.records == [state.as_slice(), &[Record::Admitted]].concat();
        if as_expected { Ok(()) } else { Err("an append after recovery does not read back".to_owned()) }
    }

    /// The recovery of this image, and the first append after it, are a workload of their own.
    fn crash_in_recovery(&mut self, log: Option<&[u8]>, new: Option<&[u8]>, state: &State) -> Result<(), String> {
        let path = self.place(log, new);
        let recorder = Recorder::new(&path, None);
        let opened = Wal::open_on(Box::new(recorder.clone()), &path).map_err(|error| error.to_string())?;
        let (Some(mut opened), Some(held)) = (opened, state.as_ref()) else { return Ok(()) };
        self.figures.recoveries_crashed += 1;
        let mut trace = Trace::default();
        let removed = new.map(|_| Op::Unlink);
        trace.call("open", removed.into_iter().chain(recorder.take()).collect(), state, std::slice::from_ref(state));
        let longer = Rc::new([held.as_slice(), &[Record::Admitted]].concat());
        opened.wal.append(&[Record::Admitted]).map_err(|error| error.to_string())?;
        trace.call("append", recorder.take(), state, &[Some(longer)]);
        let explored = self.explore(Model::holding(log, new), &trace, 1);
        explored.map_err(|why| format!("in the recovery of this: {why}"))
    }
}

/// Some contents of a file that nobody may read: as synced, half of what was written since, all of it.
fn any_of(inode: &Inode) -> Vec<Option<Vec<u8>>> {
    let atoms = inode.atoms();
    let some = |kept: &dyn Fn(usize) -> bool| {
        let kept: Vec<bool> = (0..atoms.len()).map(kept).collect();
        Some(inode.after(&atoms, &kept, None))
    };
    vec![None, Some((*inode.durable).clone()), some(&|at| at % 2 == 1), some(&|_| true)]
}

/// The next append is written where recovery says, and all is read back.
fn goes_on(bytes: &[u8], recovered: &Recovered) -> Result<(), String> {
    let (groups, _) = frame::encode(&[Record::Admitted], recovered.chain).unwrap();
    let group = groups.concat();
    let mut longer = bytes[..if recovered.torn { recovered.end } else { bytes.len() }].to_vec();
    let end = recovered.end + group.len();
    longer.resize(longer.len().max(end.next_multiple_of(PREALLOCATE_BYTES as usize)), 0);
    longer[recovered.end..end].copy_from_slice(&group);
    let replay = frame::replay(&longer);
    let records = replay.groups.iter().flat_map(|group| &group.records);
    let as_expected = replay.tail == Tail::Clean && records.eq(recovered.records.iter().chain([&Record::Admitted]));
    if as_expected { Ok(()) } else { Err(format!("an append after recovery does not read back: {:?}", replay.tail)) }
}

const A_FEW: Budget = Budget { subsets_of_max: 6, regular: 12, random: 21, real_every: 7, again_every: 61 };
const MANY: Budget = Budget { subsets_of_max: 10, regular: 60, random: 400, real_every: 101, again_every: 397 };

fn crash_everywhere(budget: Budget, skip: Option<Skip>, recovery: &Recovery) -> Result<Figures, String> {
    let dir = tempfile::tempdir().unwrap();
    let work = workload(&dir.path().join("node-a.log"), skip);
    let mut explorer = Explorer::new(budget, recovery);
    explorer.explore(Model::empty(), &work.trace, 0)?;
    Ok(explorer.figures)
}

fn print(figures: &Figures) {
    println!("crash images: {figures:#?}");
}

#[test]
fn every_disk_that_a_crash_can_leave_is_recovered_to_a_state_that_was() {
    let figures = crash_everywhere(A_FEW, None, &recover).unwrap();
    print(&figures);
    // A run that no longer reaches what it is for has to be seen.
    let findings: Vec<_> = figures.by_finding.keys().copied().collect();
    assert_eq!(findings, ["a torn end", "all", "all but what was under way", "no log yet"]);
    assert_eq!(figures.by_call.len(), 5, "{:?}", figures.by_call);
    assert_eq!(figures.by_loss.len(), 11, "{:?}", figures.by_loss);
    assert!(figures.opened_really > 100 && figures.recoveries_crashed > 10);
}

#[test]
#[ignore = "for a release build; scripts/prove.sh runs it"]
fn every_disk_that_a_crash_can_leave_is_recovered_many_more_of_them() {
    print(&crash_everywhere(MANY, None, &recover).unwrap());
}

#[test]
fn a_sync_that_is_left_out_is_found() {
    for (skip, found) in [(Skip::Directory, "1 names lost"), (Skip::Log, "recovery found"), (Skip::NewLog, "create: Rename")] {
        let why = crash_everywhere(A_FEW, Some(skip), &recover).unwrap_err();
        assert!(why.contains(found), "{why}");
    }
}

#[test]
fn a_recovery_that_cuts_too_much_or_refuses_a_torn_end_is_found() {
    let cuts_one_group_more = |bytes: &[u8]| {
        let replay = frame::replay(bytes);
        match replay.groups.last() {
            Some(last) if replay.groups.len() > 1 && replay.tail != Tail::Clean => recover(&bytes[..last.offset as usize]),
            _ => recover(bytes),
        }
    };
    let why = crash_everywhere(A_FEW, None, &cuts_one_group_more).unwrap_err();
    assert!(why.contains("and there can be"), "{why}");
    let refuses = |bytes: &[u8]| match recover(bytes) {
        Ok(Some(Recovered { torn: true, .. })) => Err("called damaged".to_owned()),
        other => other,
    };
    let why = crash_everywhere(A_FEW, None, &refuses).unwrap_err();
    assert!(why.contains("called damaged"), "{why}");
}
