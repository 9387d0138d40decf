//! Real nodes, killed, stopped, cut apart and out of disk at random, while callers change the routing and readers look on. In the
//! end all that anybody was told is held against what every node has on record: `history` says how.
//!
//! `CHAOS_SEED` repeats a plan, `CHAOS_STEPS` sets its length, `CHAOS_MINUTES` the time of the long run, which `scripts/chaos.sh`
//! starts. The plan is the seed's; what it hits is not the same twice, so a seed that failed may have to be run a few times.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use canary_mesh::core::record::Record;
use canary_mesh::core::state::{CanaryChange, Change, IDEMPOTENCY_KEY_BYTES_MAX, Kind, Transaction};
use canary_mesh::core::value::Value as Chosen;
use canary_mesh::wal::frame;
use serde_json::{Value, json};

use crate::history::{Ask, Checked, Decided, History, Op, Place, Seen, Sighting, Told, check};
use crate::mesh::{Answer, Mesh, PATIENCE, connect, request_on, request_within, requests, wait_for};
use crate::nemesis::{Clock, Done, Nemesis, plan};

const IDS: [&str; 5] = ["node-a", "node-b", "node-c", "node-d", "node-e"];
/// Advances go to shares from here up, each once, and reduces to shares below it, each lower than the one before.
const ADVANCE_FROM_BP: u16 = 5_000;
/// Shares kept for the advances that are asked for when all has healed.
const ADVANCE_TO_BP: u16 = 9_900;
/// Steps in the part that every test run does: some 25 s.
const STEPS: usize = 60;
/// Steps of one mesh in the long run. Then another begins, so that no history outgrows what the nodes keep.
const STEPS_OF_A_ROUND: usize = 150;
/// One at a time: they are hard enough on a small machine.
static ALONE: Mutex<()> = Mutex::new(());

/// What callers, readers and nemesis share.
struct Run {
    clock: Arc<Clock>,
    ports: Vec<u16>,
    ops: Mutex<Vec<Op>>,
    sightings: Mutex<Vec<Sighting>>,
    /// How calls ended, by what was asked for.
    outcomes: Mutex<BTreeMap<String, usize>>,
    commit_ms: Mutex<Vec<u64>>,
    advances: AtomicU16,
    reduces: AtomicU16,
    keys: AtomicUsize,
    callers_stop: AtomicBool,
    readers_stop: AtomicBool,
}

/// What one mesh went through.
#[derive(Debug, Default)]
struct Figures {
    done: Done,
    checked: Checked,
    outcomes: BTreeMap<String, usize>,
    calls: usize,
    sightings: usize,
    stable_after_restart: usize,
    slots: usize,
    commit_ms: Vec<u64>,
    disk: &'static str,
}

fn body(ask: Ask, key: &Option<String>) -> (&'static str, Value) {
    let weights = |bp: u16| json!({"stable": f64::from(10_000 - bp) / 100.0, "canary": f64::from(bp) / 100.0});
    let (path, mut body) = match ask {
        Ask::Advance(bp) => {
            let change = json!({"canary_model_id": "digits-v2", "weights": weights(bp)});
            ("/transactions", json!({"kind": "advance", "changes": {"default": change}}))
        }
        Ask::Reduce(bp) => ("/transactions", json!({"kind": "reduce", "changes": {"default": {"weights": weights(bp)}}})),
        Ask::Rollback => ("/rollback", json!({})),
    };
    if let Some(key) = key {
        body["idempotency_key"] = json!(key);
    }
    (path, body)
}

fn text(json: &Value) -> String {
    json.as_str().unwrap_or_default().to_owned()
}

/// What an answer means, and a word for it.
fn told(answer: Option<&Answer>) -> (Told, String) {
    let Some(answer) = answer else { return (Told::Unknown { txid: None }, "no answer".into()) };
    let json = answer.json();
    let code = json["error_code"].as_str().unwrap_or("-").to_owned();
    match (json["outcome"].as_str(), answer.status) {
        (Some("committed"), 200) => {
            let (slot, version) = (json["slot"].as_u64().unwrap(), json["version"].as_u64().unwrap());
            (Told::Committed(Place { txid: text(&json["txid"]), slot, version, hash: text(&json["state_hash"]) }), "committed".into())
        }
        (Some("aborted"), 200 | 409 | 412 | 503) => (Told::Aborted { txid: text(&json["txid"]) }, format!("aborted: {code}")),
        (Some("unknown"), 200 | 504) => (Told::Unknown { txid: Some(text(&json["txid"])) }, "unknown".into()),
        (None, 504) => (Told::Unknown { txid: None }, "unknown".into()),
        (None, 400 | 404 | 409 | 412 | 503) => (Told::Refused, format!("refused: {code}")),
        _ => panic!("no such answer should be: {answer:?}"),
    }
}

impl Run {
    fn new(nemesis: &Nemesis) -> Run {
        Run {
            clock: nemesis.clock.clone(),
            ports: nemesis.mesh.nodes.iter().map(|node| node.data).collect(),
            ops: Mutex::default(),
            sightings: Mutex::default(),
            outcomes: Mutex::default(),
            commit_ms: Mutex::default(),
            advances: AtomicU16::new(ADVANCE_FROM_BP),
            reduces: AtomicU16::new(ADVANCE_FROM_BP),
            keys: AtomicUsize::new(0),
            callers_stop: AtomicBool::new(false),
            readers_stop: AtomicBool::new(false),
        }
    }

    fn call(&self, caller: usize, at: usize, ask: Ask, key: &Option<String>, patience: Duration) -> Told {
        let (path, body) = body(ask, key);
        let (process, start, began) = (self.clock.process(at), self.clock.moment(), Instant::now());
        let stream = connect(patience, self.ports[at]);
        let connected = stream.is_some();
        let answer = stream.and_then(|stream| request_on(stream, "POST", path, &[], body.to_string().as_bytes()));
        let (end, life) = (self.clock.moment(), self.clock.life(at, process));
        // Of a committed reduce: by when it is in force everywhere.
        let ends_in_ms = answer.as_ref().and_then(|answer| answer.json()["leases_end_in_ms"].as_u64());
        let gone_us = ends_in_ms.map(|ms| self.clock.us() + ms * 1_000);
        let (told, word) = if connected { told(answer.as_ref()) } else { (Told::Refused, "refused: nobody listens".into()) };
        if matches!(told, Told::Committed(_)) {
            self.commit_ms.lock().unwrap().push(began.elapsed().as_millis() as u64);
        }
        let what = match ask {
            Ask::Advance(_) => "advance",
            Ask::Reduce(_) => "reduce",
            Ask::Rollback => "rollback",
        };
        *self.outcomes.lock().unwrap().entry(format!("{what} {word}")).or_default() += 1;
        self.ops.lock().unwrap().push(Op { caller, at, life, ask, key: key.clone(), start, end, gone_us, told: told.clone() });
        told
    }

    /// Asks a node what became of a transaction.
    fn ask_later(&self, at: usize, txid: &str, healed: bool) {
        let (process, start, asked_us) = (self.clock.process(at), self.clock.moment(), self.clock.us());
        let patience = if healed { PATIENCE } else { Duration::from_secs(1) };
        let answer = request_within(patience, self.ports[at], "GET", &format!("/transactions/{txid}"), &[], b"");
        if let Some(answer) = answer {
            let told = told(Some(&answer)).0;
            self.saw(at, process, (start, asked_us), Seen::Receipt { txid: txid.to_owned(), told, healed });
        }
    }

    fn saw(&self, at: usize, process: usize, (start, asked_us): (u64, u64), seen: Seen) {
        let (end, life) = (self.clock.moment(), self.clock.life(at, process));
        self.sightings.lock().unwrap().push(Sighting { at, life, start, end, asked_us, seen });
    }

    /// A caller that stays with a node for a while. Its wishes are drawn, and repeated elsewhere when nothing is known of them.
    fn caller(&self, caller: usize, seed: u64) {
        let mut draw = fastrand::Rng::with_seed(seed);
        let mut at = draw.usize(0..self.ports.len());
        while !self.callers_stop.load(Ordering::Relaxed) {
            if draw.u32(0..4) == 0 {
                at = draw.usize(0..self.ports.len());
            }
            let ask = match draw.u32(0..100) {
                0..60 => Ask::Advance(self.advances.fetch_add(1, Ordering::Relaxed)),
                60..92 => Ask::Reduce(self.reduces.fetch_sub(1, Ordering::Relaxed)),
                _ => Ask::Rollback,
            };
            if matches!(ask, Ask::Advance(bp) if bp >= ADVANCE_TO_BP) || matches!(ask, Ask::Reduce(bp) if bp == 0 || bp > ADVANCE_FROM_BP) {
                return;
            }
            // Rollbacks are all alike: their key says whose each is.
            let key = (ask == Ask::Rollback || draw.bool()).then(|| {
                let number = self.keys.fetch_add(1, Ordering::Relaxed);
                // Long ones, so that logs grow.
                format!("{number:0width$}", width = [1, IDEMPOTENCY_KEY_BYTES_MAX][draw.usize(0..2)])
            });
            let patience = Duration::from_millis([150, 700, 3_000][draw.usize(0..3)]);
            let mut told = self.call(caller, at, ask, &key, patience);
            for _ in 0..3 {
                if let Told::Unknown { txid: Some(txid) } = &told {
                    (0..2).for_each(|_| self.ask_later(draw.usize(0..self.ports.len()), txid, false));
                }
                let again = match &told {
                    Told::Unknown { .. } => key.is_some(),
                    Told::Committed(_) => key.is_some() && draw.u32(0..8) == 0,
                    Told::Aborted { .. } => key.is_some() && draw.u32(0..4) == 0,
                    Told::Refused => false,
                };
                if !again || self.callers_stop.load(Ordering::Relaxed) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(draw.u64(0..100)));
                told = self.call(caller, draw.usize(0..self.ports.len()), ask, &key, patience);
            }
            // A node that is down answers at once.
            let pause_ms = if matches!(told, Told::Committed(_)) { 0..8 } else { 5..30 };
            std::thread::sleep(Duration::from_millis(draw.u64(pause_ms)));
        }
    }

    /// Looks at one node again and again.
    fn reader(&self, at: usize, request: &str) {
        let get = |path: &str| request_within(Duration::from_millis(500), self.ports[at], "GET", path, &[], b"");
        let share =
            |canary: &Value, weights: &Value| (!canary.is_null()).then(|| (weights["canary"].as_f64().unwrap() * 100.0).round() as u16);
        while !self.readers_stop.load(Ordering::Relaxed) {
            let (process, start) = (self.clock.process(at), (self.clock.moment(), self.clock.us()));
            if let Some(routing) = get("/routing").map(|answer| answer.json()) {
                let route = &routing["routes"]["default"];
                let seen = Seen::Routing {
                    slot: routing["slot"].as_u64().unwrap(),
                    version: routing["version"].as_u64().unwrap(),
                    hash: text(&routing["state_hash"]),
                    share: share(&route["canary_model_id"], &route["weights"]),
                    canary_served: routing["lease"]["held"].as_bool().unwrap(),
                };
                self.saw(at, process, start, seen);
            }
            let (process, start) = (self.clock.process(at), (self.clock.moment(), self.clock.us()));
            if let Some(state) = get("/routing/state").map(|answer| answer.json()) {
                let share = share(&state["canary_model_id"], &state["weights"]);
                let txid = state["txid"].as_str().map(str::to_owned);
                self.saw(at, process, start, Seen::State { version: state["version"].as_u64().unwrap(), txid, share });
            }
            let (process, start) = (self.clock.process(at), (self.clock.moment(), self.clock.us()));
            let patience = Duration::from_millis(500);
            if let Some(answer) = request_within(patience, self.ports[at], "POST", "/predict", &[], request.as_bytes())
                && answer.status == 200
            {
                let version = answer.header("x-canary-version").unwrap().parse().unwrap();
                let canary = answer.header("x-canary-variant") == Some("canary");
                self.saw(at, process, start, Seen::Predicted { version, canary });
            }
            std::thread::sleep(Duration::from_millis(25));
        }
    }
}

/// What a log's bytes say was decided.
fn decisions(log: &Path) -> Vec<Decided> {
    let bytes = std::fs::read(log).unwrap();
    let records = frame::replay(&bytes).groups.into_iter().flat_map(|group| group.records);
    let mut decided = Vec::new();
    for record in records {
        let Record::Decided { decision } = record else { continue };
        let commit = match &decision.value {
            Chosen::Commit(commit) => Some((asked(&commit.tx), commit.tx.idempotency_key.clone())),
            Chosen::Abort(_) => None,
        };
        let (slot, version, hash) = (decision.slot, decision.version, decision.state_hash.to_string());
        decided.push(Decided { slot, version, hash, txid: decision.value.txid().map(ToString::to_string), commit });
    }
    decided
}

fn asked(tx: &Transaction) -> Ask {
    let Change::Routes(changes) = &tx.change else { panic!("nobody asked for this: {tx:?}") };
    let change = changes.values().next().unwrap();
    match (tx.kind, &change.canary, change.weights) {
        (Kind::Advance, CanaryChange::Set(_), Some(weights)) => Ask::Advance(weights.canary),
        (Kind::Reduce, CanaryChange::Keep, Some(weights)) => Ask::Reduce(weights.canary),
        (Kind::Reduce, CanaryChange::Remove, None) => Ask::Rollback,
        _ => panic!("nobody asked for this: {tx:?}"),
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// Says how a failed run can be repeated, and where its logs are.
struct OnFailure {
    seed: u64,
    nodes: usize,
    steps: usize,
    dir: PathBuf,
}

impl Drop for OnFailure {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let OnFailure { seed, nodes, steps, dir } = self;
            let test = if *nodes == 3 { "three" } else { "five" };
            eprintln!("chaos failed with {nodes} nodes and seed {seed}. The logs are kept in {}.", dir.display());
            eprintln!("Again: CHAOS_SEED={seed} CHAOS_STEPS={steps} cargo test --release --test it chaos::{test}_nodes -- --nocapture");
        }
    }
}

fn chaos(nodes: usize, seed: u64, steps: usize) -> Figures {
    let parent = std::env::var_os("CHAOS_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = tempfile::Builder::new().prefix("mesh-").tempdir_in(parent).unwrap();
    let _on_failure = OnFailure { seed, nodes, steps, dir: dir.path().to_owned() };
    let mut draw = fastrand::Rng::with_seed(seed);
    let heartbeat_ms = [50, 100, 200][draw.usize(0..3)];
    let prepare_timeout_ms = [150, 400, 1_000][draw.usize(0..3)];
    let small = draw.usize(0..nodes);
    let timing = json!({"heartbeat_ms": heartbeat_ms, "prepare_timeout_ms": prepare_timeout_ms, "lease_ms": 3 * heartbeat_ms});
    eprintln!("chaos: {nodes} nodes, seed {seed}, {steps} steps, heartbeat {heartbeat_ms} ms, votes within {prepare_timeout_ms} ms");
    // The gate is tried elsewhere: a node that was stopped is slow, and would veto all that follows.
    let mesh = Mesh::with(dir, &IDS[..nodes], &timing, &json!({"dry_run": true}));
    let mut nemesis = Nemesis::begin(mesh, small);
    let run = Run::new(&nemesis);
    let request = requests()[0]["request"].to_string();
    let plan = plan(seed, nodes, steps, heartbeat_ms);
    std::thread::scope(|scope| {
        // However this ends, the threads do.
        let _stop = StopAll(&run);
        let (run, request) = (&run, &request);
        let callers: Vec<_> = (0..nodes + 1).map(|caller| scope.spawn(move || run.caller(caller, seed ^ (caller as u64 + 1)))).collect();
        let readers: Vec<_> = (0..nodes).map(|at| scope.spawn(move || run.reader(at, request))).collect();
        let mut at = 0;
        nemesis.carry_out(&plan, |done| {
            at += 1;
            if at % 50 == 0 {
                eprintln!("  step {at}: {}, {} calls", line(done), run.ops.lock().unwrap().len());
            }
        });
        nemesis.heal();
        nemesis.mesh.wait_ready();
        // A moment of ordinary work.
        std::thread::sleep(Duration::from_millis(500));
        run.callers_stop.store(true, Ordering::Relaxed);
        callers.into_iter().for_each(|caller| caller.join().unwrap());
        settle(run, &nemesis, nodes + 1);
        run.readers_stop.store(true, Ordering::Relaxed);
        readers.into_iter().for_each(|reader| reader.join().unwrap());
    });
    judge(run, nemesis)
}

struct StopAll<'run>(&'run Run);

impl Drop for StopAll<'_> {
    fn drop(&mut self) {
        self.0.callers_stop.store(true, Ordering::Relaxed);
        self.0.readers_stop.store(true, Ordering::Relaxed);
    }
}

/// When all faults are over: every node gets something committed, all converge, and what was unknown is settled and stays so.
fn settle(run: &Run, nemesis: &Nemesis, caller: usize) {
    let nodes = nemesis.mesh.nodes.len();
    let mut share = ADVANCE_TO_BP;
    let unknown: Vec<String> = {
        let ops = run.ops.lock().unwrap();
        ops.iter().filter_map(|op| if let Told::Unknown { txid: Some(txid) } = &op.told { Some(txid.clone()) } else { None }).collect()
    };
    for _ in 0..2 {
        for at in 0..nodes {
            wait_for("a node to commit when all has healed", || {
                // What was told aborted was nobody's, so the same may be asked for again: but each wish is one call's.
                share += 1;
                assert!(share < 10_000, "the healed mesh aborts and aborts");
                matches!(run.call(caller, at, Ask::Advance(share), &None, PATIENCE), Told::Committed(_))
            });
        }
        // Calls whose callers had hung up may still wait in line.
        let mut last = (Value::Null, Instant::now());
        wait_for("the mesh to come to rest", || {
            let slot = nemesis.mesh.json(0, "/routing")["slot"].clone();
            if slot != last.0 {
                last = (slot, Instant::now());
            }
            last.1.elapsed() > Duration::from_millis(1_200)
        });
        nemesis.mesh.wait_agreement();
        for txid in &unknown {
            (0..nodes).for_each(|at| run.ask_later(at, txid, true));
        }
    }
}

/// Holds everything against everything.
fn judge(run: Run, mut nemesis: Nemesis) -> Figures {
    let nodes = nemesis.mesh.nodes.len();
    let histories: Vec<_> = (0..nodes).map(|at| nemesis.mesh.history(at)).collect();
    nemesis.stop_all();
    let logs: Vec<_> = (0..nodes).map(|at| decisions(&nemesis.mesh.log_of(at))).collect();
    for at in 0..nodes {
        assert_eq!(histories[at], histories[0], "the histories of {} and {} differ", IDS[at], IDS[0]);
        assert_eq!(logs[at], logs[0], "the logs of {} and {} differ", IDS[at], IDS[0]);
        let events = nemesis.mesh.events_of(at);
        let broken = events.lines().find(|line| line.contains("\"event\":\"core_panic\"") || line.contains("\"event\":\"diverged\""));
        assert_eq!(broken, None, "{}", IDS[at]);
    }
    for (entry, decided) in histories[0].iter().zip(&logs[0]) {
        let shown =
            (entry["slot"].as_u64(), entry["version"].as_u64(), text(&entry["state_hash"]), entry["txid"].as_str().map(str::to_owned));
        assert_eq!(shown, (Some(decided.slot), Some(decided.version), decided.hash.clone(), decided.txid.clone()));
        assert_eq!(entry["outcome"] == "committed", decided.commit.is_some(), "{entry}");
    }
    assert_eq!(histories[0].len(), logs[0].len());

    let history = History {
        log: logs.into_iter().next().unwrap(),
        ops: run.ops.into_inner().unwrap(),
        sightings: run.sightings.into_inner().unwrap(),
        starts: nemesis.starts.clone(),
    };
    let checked = check(&history).unwrap_or_else(|why| panic!("{why}"));
    let restarted = |sighting: &&Sighting| sighting.life.is_some_and(|life| life > 0);
    let stable = |seen: &Seen| matches!(seen, Seen::Routing { canary_served: false, share: Some(_), .. });
    let mut commit_ms = run.commit_ms.into_inner().unwrap();
    commit_ms.sort_unstable();
    Figures {
        done: nemesis.done,
        checked,
        outcomes: run.outcomes.into_inner().unwrap(),
        calls: history.ops.len(),
        sightings: history.sightings.len(),
        stable_after_restart: history.sightings.iter().filter(restarted).filter(|sighting| stable(&sighting.seen)).count(),
        slots: history.log.len(),
        commit_ms,
        disk: nemesis.disk(),
    }
}

fn line(done: &Done) -> String {
    format!(
        "{} kills, {} stops ({} longer than five beats), {} cuts ({} at one end), disk filled {} times (log ended {} times), \
         at most {} at once",
        done.kills, done.stops, done.long_stops, done.cuts, done.one_sided_cuts, done.fills, done.logs_full, done.at_once
    )
}

impl Figures {
    fn add(&mut self, other: Figures) {
        let Done { kills, starts, stops, long_stops, cuts, one_sided_cuts, fills, logs_full, starts_on_full_disk, left_out, at_once } =
            other.done;
        self.done.kills += kills;
        self.done.starts += starts;
        self.done.stops += stops;
        self.done.long_stops += long_stops;
        self.done.cuts += cuts;
        self.done.one_sided_cuts += one_sided_cuts;
        self.done.fills += fills;
        self.done.logs_full += logs_full;
        self.done.starts_on_full_disk += starts_on_full_disk;
        self.done.left_out += left_out;
        self.done.at_once = self.done.at_once.max(at_once);
        self.checked.commits += other.checked.commits;
        self.checked.windows += other.checked.windows;
        self.checked.serialised += other.checked.serialised;
        self.checked.unknown_applied += other.checked.unknown_applied;
        self.checked.repeats_of_a_key += other.checked.repeats_of_a_key;
        self.checked.canary_after_restart += other.checked.canary_after_restart;
        self.checked.canary_after_reduce += other.checked.canary_after_reduce;
        for (word, count) in other.outcomes {
            *self.outcomes.entry(word).or_default() += count;
        }
        self.calls += other.calls;
        self.sightings += other.sightings;
        self.stable_after_restart += other.stable_after_restart;
        self.slots += other.slots;
        self.commit_ms.extend(other.commit_ms);
        self.commit_ms.sort_unstable();
        self.disk = other.disk;
    }

    fn print(&self, took: Duration) {
        let Checked { commits, windows, serialised, unknown_applied, repeats_of_a_key, canary_after_restart, canary_after_reduce } =
            &self.checked;
        let percentile = |share: usize| self.commit_ms.get((self.commit_ms.len() * share / 100).min(self.commit_ms.len().max(1) - 1));
        eprintln!("chaos: {:.1} min: {}", took.as_secs_f64() / 60.0, line(&self.done));
        eprintln!(
            "  {} starts, {} of them on a full disk; {} steps left out; the small disk is {}",
            self.done.starts, self.done.starts_on_full_disk, self.done.left_out, self.disk
        );
        eprintln!("  {} calls, {} slots decided, {commits} of them commits; {} sightings", self.calls, self.slots, self.sightings);
        for (word, count) in &self.outcomes {
            eprintln!("    {count:>7} {word}");
        }
        eprintln!(
            "  an order was found for {serialised} calls in {windows} windows; {unknown_applied} commits whose callers never knew, \
             {repeats_of_a_key} repeats of a key"
        );
        eprintln!("  after restarts: stable only in {} sightings, then the canary in {canary_after_restart}", self.stable_after_restart);
        eprintln!("  after a reduce and its leases: the canary in {canary_after_reduce} sightings, none of them from before it");
        eprintln!(
            "  commits as their callers saw them: p50 {:?} ms, p99 {:?} ms, max {:?} ms",
            percentile(50),
            percentile(99),
            percentile(100)
        );
    }
}

fn chaos_in_every_test_run(nodes: usize, seed: u64) {
    let _alone = ALONE.lock().unwrap_or_else(|left| left.into_inner());
    let start = Instant::now();
    let steps = number("CHAOS_STEPS").map_or(STEPS, |steps| steps as usize);
    let figures = chaos(nodes, number("CHAOS_SEED").unwrap_or(seed), steps);
    figures.print(start.elapsed());
    assert!(figures.checked.commits > 20, "too little was committed to prove anything");
    assert!(figures.done.kills > 5 && figures.done.stops > 5 && figures.done.cuts > 5 && figures.done.fills > 0, "{:?}", figures.done);
}

#[test]
fn three_nodes_under_chaos_never_disagree_and_every_answer_was_true() {
    chaos_in_every_test_run(3, 1);
}

#[test]
fn five_nodes_under_chaos_never_disagree_and_every_answer_was_true() {
    chaos_in_every_test_run(5, 2);
}

#[test]
#[ignore = "as long as CHAOS_MINUTES says: scripts/chaos.sh starts it"]
fn chaos_for_as_long_as_asked() {
    let _alone = ALONE.lock().unwrap_or_else(|left| left.into_inner());
    let start = Instant::now();
    let minutes = number("CHAOS_MINUTES").unwrap_or(60);
    let first = number("CHAOS_SEED").unwrap_or_else(|| fastrand::u64(..1_000_000));
    let steps = number("CHAOS_STEPS").map_or(STEPS_OF_A_ROUND, |steps| steps as usize);
    let (mut all, mut rounds) = (Figures::default(), 0);
    while rounds == 0 || start.elapsed() < Duration::from_secs(60 * minutes) {
        let nodes = if rounds % 2 == 0 { 3 } else { 5 };
        let figures = chaos(nodes, first + rounds, steps);
        eprintln!("  round {rounds}: {}, {} calls, {} commits, all true", line(&figures.done), figures.calls, figures.checked.commits);
        all.add(figures);
        rounds += 1;
    }
    eprintln!("chaos: {rounds} meshes, seeds {first} to {}", first + rounds - 1);
    all.print(start.elapsed());
}
