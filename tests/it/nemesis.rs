//! What is done to the nodes: a plan drawn from a seed, carried out on processes, links and disks.
//!
//! The plan is a function of the seed alone. What each step hits when it comes is not, and that is the point: a step that finds its
//! node down already is left out and counted as such.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Once};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use crate::history::Moment;
use crate::mesh::{BINARY, Mesh, write_whole};

/// Size of the small disk, in bytes: more than any log of a run without a filler needs.
const DISK_BYTES: u64 = 64 << 20;
/// A full disk is freed again after this long, whether the log has come to its end or not.
const FULL_MS_MAX: u64 = 12_000;
const FILLER: &str = "filler";

/// A step of the plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    pub pause_ms: u64,
    pub fault: Fault,
    pub for_ms: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// SIGKILL, and a start when the time is over.
    Kill(usize),
    /// SIGSTOP, and SIGCONT when the time is over.
    Stop(usize),
    /// Links cut by the groups of peers.json, in the file of one node or of all.
    Cut { shape: Shape, groups: Vec<Vec<usize>>, only: Option<usize> },
    /// The disk of the node that has a small one is filled up.
    Fill,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    /// Nobody hears anybody.
    Full,
    Halves,
    Alone,
    /// One link, or a few: the nodes in no group hear both sides.
    Overlapping,
}

/// How often each thing was done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    pub kills: usize,
    pub starts: usize,
    pub stops: usize,
    pub long_stops: usize,
    pub cuts: usize,
    pub one_sided_cuts: usize,
    pub fills: usize,
    pub logs_full: usize,
    pub starts_on_full_disk: usize,
    pub left_out: usize,
    /// Most faults at work at once.
    pub at_once: usize,
}

/// The plan for this seed.
pub fn plan(seed: u64, nodes: usize, steps: usize, heartbeat_ms: u64) -> Vec<Step> {
    let mut draw = fastrand::Rng::with_seed(seed);
    (0..steps)
        .map(|step| {
            let at = draw.usize(0..nodes);
            let fault = match draw.u32(0..100) {
                // Each plan has at least two of them: one in the beginning, one in the middle.
                _ if step == 2 || step == steps / 2 => Fault::Fill,
                0..35 => Fault::Kill(at),
                35..65 => Fault::Stop(at),
                65..97 => {
                    let (shape, groups) = shape(&mut draw, nodes);
                    Fault::Cut { shape, groups, only: (draw.u32(0..5) == 0).then_some(at) }
                }
                _ => Fault::Fill,
            };
            let for_ms = match &fault {
                Fault::Kill(_) => draw.u64(0..900),
                Fault::Stop(_) if draw.u32(0..3) == 0 => heartbeat_ms * draw.u64(6..15),
                Fault::Stop(_) => draw.u64(50..250),
                Fault::Cut { .. } => draw.u64(300..2_500),
                Fault::Fill => FULL_MS_MAX,
            };
            Step { pause_ms: draw.u64(0..700), fault, for_ms }
        })
        .collect()
}

fn shape(draw: &mut fastrand::Rng, nodes: usize) -> (Shape, Vec<Vec<usize>>) {
    let mut ids: Vec<_> = (0..nodes).collect();
    draw.shuffle(&mut ids);
    match draw.u32(0..4) {
        0 => (Shape::Full, ids.into_iter().map(|id| vec![id]).collect()),
        1 => (Shape::Halves, ids.chunks(nodes.div_ceil(2)).map(<[usize]>::to_vec).collect()),
        2 => (Shape::Alone, vec![ids[..1].to_vec(), ids[1..].to_vec()]),
        _ => {
            let side = draw.usize(1..=(nodes - 1) / 2);
            (Shape::Overlapping, vec![ids[..side].to_vec(), ids[side..2 * side].to_vec()])
        }
    }
}

/// Moments, and which process of each node is running: even while it is, odd while it is not.
pub struct Clock {
    moment: AtomicUsize,
    began: Instant,
    lives: Vec<AtomicUsize>,
}

impl Clock {
    pub fn new(nodes: usize) -> Clock {
        Clock { moment: AtomicUsize::new(0), began: Instant::now(), lives: (0..nodes).map(|_| AtomicUsize::new(1)).collect() }
    }

    pub fn moment(&self) -> Moment {
        self.moment.fetch_add(1, Ordering::SeqCst) as Moment
    }

    /// Microseconds since the beginning: for what has to have happened within a time.
    pub fn us(&self) -> u64 {
        self.began.elapsed().as_micros() as u64
    }

    /// To be compared with what it says later: see [`Clock::life`].
    pub fn process(&self, at: usize) -> usize {
        self.lives[at].load(Ordering::SeqCst)
    }

    /// The process that answered, if it is the same as `before` the question.
    pub fn life(&self, at: usize, before: usize) -> Option<usize> {
        (self.process(at) == before && before.is_multiple_of(2)).then(|| before / 2 - 1)
    }
}

/// The mesh, and what is being done to it.
pub struct Nemesis {
    pub mesh: Mesh,
    pub clock: Arc<Clock>,
    pub done: Done,
    pub starts: Vec<(usize, usize, Moment)>,
    /// Whose logs are on the small disk.
    pub small: usize,
    mounted: bool,
    nodes: Vec<State>,
    filled: Option<Instant>,
    looked: Instant,
    cut: Option<Instant>,
}

/// How a node is, and until when.
#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Up,
    Killed(Instant),
    Stopped(Instant),
}

impl Nemesis {
    /// All nodes started and linked; one of them has its logs on a small disk, where mounting is allowed.
    pub fn begin(mut mesh: Mesh, small: usize) -> Nemesis {
        let clock = Arc::new(Clock::new(mesh.nodes.len()));
        expect_interrupts(mesh.dir.path());
        let small_logs = mesh.dir.path().join("small-disk");
        fs::create_dir(&small_logs).unwrap();
        let options = format!("size={DISK_BYTES},mode=0700");
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "canary-mesh-chaos"])
            .arg(&small_logs)
            .stderr(Stdio::null())
            .status();
        let mounted = mount.is_ok_and(|status| status.success());
        if mounted {
            mesh.nodes[small].logs = small_logs;
        }
        for node in &mut mesh.nodes {
            node.peers = mesh.dir.path().join(format!("{}.peers.json", node.id));
        }
        let nodes = vec![State::Up; mesh.nodes.len()];
        let (done, starts, looked) = (Done::default(), Vec::new(), Instant::now());
        let mut nemesis = Nemesis { mesh, clock, done, starts, small, mounted, nodes, filled: None, looked, cut: None };
        nemesis.write_peers(&[], None);
        (0..nemesis.nodes.len()).for_each(|at| nemesis.start(at));
        nemesis.mesh.wait_ready();
        nemesis
    }

    pub fn disk(&self) -> &'static str {
        if self.mounted { "a tmpfs" } else { "a limit on file sizes, as mounting is not allowed here" }
    }

    pub fn carry_out(&mut self, plan: &[Step], mut each: impl FnMut(&Done)) {
        for step in plan {
            let until = Instant::now() + Duration::from_millis(step.pause_ms);
            loop {
                self.end_what_is_over(false);
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                std::thread::sleep(left.min(Duration::from_millis(5)));
            }
            self.begin_fault(step);
            let faults = self.nodes.iter().filter(|state| **state != State::Up).count();
            self.done.at_once = self.done.at_once.max(faults + usize::from(self.cut.is_some()) + usize::from(self.filled.is_some()));
            each(&self.done);
        }
    }

    /// Ends every fault at once.
    pub fn heal(&mut self) {
        self.end_what_is_over(true);
    }

    fn begin_fault(&mut self, step: &Step) {
        let until = Instant::now() + Duration::from_millis(step.for_ms);
        match &step.fault {
            Fault::Kill(at) if !matches!(self.nodes[*at], State::Killed(_)) => {
                self.kill(*at);
                self.nodes[*at] = State::Killed(until);
            }
            Fault::Stop(at) if self.nodes[*at] == State::Up => {
                self.check_alive(*at);
                self.mesh.signal(*at, Signal::STOP);
                self.done.stops += 1;
                self.done.long_stops += usize::from(step.for_ms > 5 * self.heartbeat_ms());
                self.nodes[*at] = State::Stopped(until);
            }
            Fault::Cut { groups, only, .. } => {
                self.write_peers(groups, *only);
                self.done.cuts += 1;
                self.done.one_sided_cuts += usize::from(only.is_some());
                self.cut = Some(until);
            }
            Fault::Fill if self.filled.is_none() => {
                // A full disk means nothing to a node that is down.
                self.bring_up(self.small);
                self.fill();
                self.filled = Some(until);
            }
            Fault::Kill(_) | Fault::Stop(_) | Fault::Fill => self.done.left_out += 1,
        }
    }

    fn end_what_is_over(&mut self, all: bool) {
        let now = Instant::now();
        let over = |until: Instant| all || until <= now;
        if self.cut.is_some_and(over) {
            self.write_peers(&[], None);
            self.cut = None;
        }
        for at in 0..self.nodes.len() {
            if matches!(self.nodes[at], State::Stopped(until) | State::Killed(until) if over(until)) {
                self.bring_up(at);
            }
        }
        if let Some(until) = self.filled
            && (over(until) || self.looks_ended())
        {
            self.free();
            self.filled = None;
        }
    }

    fn bring_up(&mut self, at: usize) {
        match self.nodes[at] {
            State::Stopped(_) => self.mesh.signal(at, Signal::CONT),
            State::Killed(_) => self.start(at),
            State::Up => {}
        }
        self.nodes[at] = State::Up;
    }

    fn start(&mut self, at: usize) {
        let command = self.mesh.command(at, &[]);
        self.start_as(at, command);
    }

    fn start_as(&mut self, at: usize, mut command: Command) {
        let said = self.mesh.dir.path().join(format!("{}.out", self.mesh.nodes[at].id));
        while ENDING.load(Ordering::SeqCst) {
            std::thread::park();
        }
        command.stderr(fs::File::options().create(true).append(true).open(said).unwrap());
        // Whoever interrupts the tests at a terminal interrupts these through them.
        command.process_group(0);
        self.starts.push((at, self.clock.process(at) / 2, self.clock.moment()));
        self.mesh.start_as(at, command);
        self.clock.lives[at].fetch_add(1, Ordering::SeqCst);
        self.done.starts += 1;
        let pid = self.mesh.pid(at).unwrap_or_default();
        fs::write(self.mesh.dir.path().join(format!("{}.pid", self.mesh.nodes[at].id)), pid.to_string()).unwrap();
    }

    fn kill(&mut self, at: usize) {
        self.check_alive(at);
        self.clock.lives[at].fetch_add(1, Ordering::SeqCst);
        self.mesh.kill(at);
        self.done.kills += 1;
    }

    /// A node ends when it is killed, and never by itself; but while its disk is full it may refuse to start.
    fn check_alive(&mut self, at: usize) {
        let may_have_ended = at == self.small && self.filled.is_some();
        if !may_have_ended && let Some(status) = self.mesh.has_ended(at) {
            let said = fs::read_to_string(self.mesh.dir.path().join(format!("{}.out", self.mesh.nodes[at].id)));
            panic!("{} has ended by itself: {status}; {}", self.mesh.nodes[at].id, said.unwrap_or_default());
        }
    }

    fn heartbeat_ms(&self) -> u64 {
        self.mesh.peers()["timing"]["heartbeat_ms"].as_u64().unwrap()
    }

    /// Every node has a file of its own, so that a cut can be made at one end only.
    fn write_peers(&self, groups: &[Vec<usize>], only: Option<usize>) {
        let name = |at: &usize| self.mesh.nodes[*at].id.clone();
        let groups: Vec<Vec<String>> = groups.iter().map(|group| group.iter().map(name).collect()).collect();
        for (at, node) in self.mesh.nodes.iter().enumerate() {
            let mut peers = self.mesh.peers().clone();
            if only.is_none_or(|only| only == at) && !groups.is_empty() {
                peers["partitions"] = json!(groups);
            }
            write_whole(&node.peers, &peers);
        }
    }

    fn fill(&mut self) {
        self.done.fills += 1;
        if self.mounted {
            let filler = fs::File::create(self.mesh.nodes[self.small].logs.join(FILLER)).unwrap();
            let mut filler = std::io::BufWriter::with_capacity(4_096, filler);
            while std::io::Write::write_all(&mut filler, &[1; 4_096]).is_ok() {}
            return;
        }
        // Without a disk of its own: the node is started anew, and may not make its files any longer than they are.
        self.kill(self.small);
        let blocks = fs::metadata(self.mesh.log_of(self.small)).map_or(1, |meta| meta.len() / 1_024);
        let command = self.mesh.command(self.small, &[]);
        let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy().into_owned()).collect();
        let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
        let mut limited = Command::new("bash");
        limited.arg("-c").arg(script).arg(BINARY).args(arguments).arg0("bash").stdin(Stdio::null()).stdout(Stdio::null());
        self.start_as(self.small, limited);
    }

    /// The same, asked for no more often than it is worth.
    fn looks_ended(&mut self) -> bool {
        if self.looked.elapsed() < Duration::from_millis(100) {
            return false;
        }
        self.looked = Instant::now();
        self.log_has_ended()
    }

    fn log_has_ended(&self) -> bool {
        self.nodes[self.small] == State::Up
            && self
                .mesh
                .get_quickly(self.small, "/health")
                .is_some_and(|answer| String::from_utf8_lossy(&answer.body).contains("takes no more"))
    }

    /// A log that has failed takes nothing more until its node is started again.
    fn free(&mut self) {
        let failed = self.log_has_ended();
        self.done.logs_full += usize::from(failed);
        let was = self.nodes[self.small];
        if self.mounted && failed && self.done.logs_full.is_multiple_of(2) {
            // Once more while the disk is still full: it starts, or says why it does not. Either way it is started again.
            self.kill(self.small);
            self.start(self.small);
            self.done.starts_on_full_disk += 1;
            std::thread::sleep(Duration::from_millis(100));
        }
        if self.mounted {
            fs::remove_file(self.mesh.nodes[self.small].logs.join(FILLER)).unwrap();
        }
        if !matches!(was, State::Killed(_)) {
            self.kill(self.small);
            self.start(self.small);
            self.nodes[self.small] = State::Up;
        }
    }

    /// Asks all nodes to end, and waits until they have.
    pub fn stop_all(&mut self) {
        for at in 0..self.nodes.len() {
            self.check_alive(at);
            self.mesh.signal(at, Signal::TERM);
        }
        for at in 0..self.nodes.len() {
            let status = self.mesh.ended(at);
            assert!(status.success(), "{} was asked to stop, and ended with {status}", self.mesh.nodes[at].id);
        }
    }
}

impl Drop for Nemesis {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        if failed {
            self.mesh.dir.disable_cleanup(true);
            (0..self.nodes.len()).for_each(|at| eprintln!("--- {} was {:?}", self.mesh.nodes[at].id, self.nodes[at]));
        }
        (0..self.nodes.len()).for_each(|at| self.mesh.kill(at));
        leave_nothing(self.mesh.dir.path(), failed);
        LEFT_TO_CLEAN.lock().unwrap_or_else(|left| left.into_inner()).retain(|dir| dir != self.mesh.dir.path());
    }
}

/// Directories of meshes that are running, for the one who interrupts the tests.
static LEFT_TO_CLEAN: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
static ENDING: AtomicBool = AtomicBool::new(false);

fn expect_interrupts(dir: &Path) {
    static ONCE: Once = Once::new();
    LEFT_TO_CLEAN.lock().unwrap().push(dir.to_owned());
    ONCE.call_once(|| {
        let signals = async_signal::Signals::new([async_signal::Signal::Int, async_signal::Signal::Term]);
        let mut signals = signals.unwrap();
        std::thread::spawn(move || {
            futures::executor::block_on(futures::StreamExt::next(&mut signals));
            ENDING.store(true, Ordering::SeqCst);
            for dir in LEFT_TO_CLEAN.lock().unwrap().iter() {
                leave_nothing(dir, false);
                let _ = fs::remove_dir_all(dir);
            }
            std::process::exit(130);
        });
    });
}

/// Ends the processes that were started for this directory, and takes the small disk away. What was on it stays, if it is to be kept.
fn leave_nothing(dir: &Path, keep: bool) {
    let files = fs::read_dir(dir).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    for file in files.filter(|file| file.extension() == Some("pid".as_ref())) {
        let pid = fs::read_to_string(file).ok().and_then(|pid| pid.parse().ok()).and_then(rustix::process::Pid::from_raw);
        let Some(pid) = pid else { continue };
        // Process ids are used again: its arguments tell whether it is ours.
        let ours = || {
            let arguments = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
            String::from_utf8_lossy(&arguments).contains(&*dir.to_string_lossy())
        };
        for _ in 0..500 {
            if !ours() {
                break;
            }
            let _ = rustix::process::kill_process(pid, Signal::KILL);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let disk = dir.join("small-disk");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    if !mounts.contains(&*disk.to_string_lossy()) {
        return;
    }
    let kept = dir.join("small-disk-kept");
    if keep {
        let _ = Command::new("cp").arg("-r").arg(&disk).arg(&kept).status();
    }
    let unmounted = Command::new("umount").arg(&disk).status();
    if !unmounted.is_ok_and(|status| status.success()) {
        let _ = Command::new("umount").arg("--lazy").arg(&disk).status();
    }
    if keep {
        let _ = fs::remove_dir(&disk).and_then(|()| fs::rename(&kept, &disk));
    }
}

#[test]
fn a_plan_follows_from_its_seed_and_has_every_kind_of_fault() {
    let plan_of = |seed| plan(seed, 5, 400, 100);
    assert_eq!(plan_of(7), plan_of(7));
    assert_ne!(plan_of(7), plan_of(8));
    let count = |is: &dyn Fn(&Fault) -> bool| plan_of(7).iter().filter(|step| is(&step.fault)).count();
    assert!(count(&|fault| matches!(fault, Fault::Kill(_))) > 100);
    assert!(count(&|fault| matches!(fault, Fault::Stop(_))) > 80);
    assert!(count(&|fault| matches!(fault, Fault::Fill)) > 5);
    for wanted in [Shape::Full, Shape::Halves, Shape::Alone, Shape::Overlapping] {
        assert!(count(&|fault| matches!(fault, Fault::Cut { shape, .. } if *shape == wanted)) > 10, "{wanted:?}");
    }
}
