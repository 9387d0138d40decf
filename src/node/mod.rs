//! The shell: it owns the core, and wires log, mesh, timers, gateway and HTTP to it.
//!
//! Started in this order, each step failing before the next begins: peers.json, the two listeners, the log, the models, the
//! links, the loop, the front. Stopped in the other: `/readyz` fails first, requests drain, the log is synced, exit 0.

mod control;
mod events;
mod external;
mod fault;
mod join;
mod members;
mod metrics;
mod rollouts;
mod turns;
mod view;
mod vote;
mod watch;

use std::fs;
use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use async_signal::{Signal, Signals};
use async_std::channel::{Receiver, Sender, bounded};
use async_std::task;
use futures::channel::oneshot;
use futures::future::{Either, select};
use futures::stream::StreamExt;
use log::Level;
use serde_json::json;

pub use crate::node::fault::Fault;

use crate::clock;
use crate::core::Node;
use crate::core::durable::{Durable, ReplayError};
use crate::core::ids::{DiskId, NodeId};
use crate::core::io::{Input, Settings};
use crate::core::record::Record;
use crate::gateway::{self, Gateway};
use crate::http::{Front, Limits};
use crate::mesh::{Identity, Mesh, MeshConfig, PeerAddress};
use crate::node::control::ControlPlane;
use crate::node::events::Events;
use crate::node::turns::{LogFigures, Loop, TURNS_QUEUED_MAX, Turn};
use crate::node::view::View;
use crate::peers::{PeersError, PeersFile};
use crate::wal::{Wal, WalError};

/// Beats after which a silent link is given up.
const SILENT_BEATS_MAX: u64 = 5;

/// Shortest time from one report of this node's health to the next, in milliseconds.
const HEALTH_PAUSE_MS: u64 = 2;

/// What `serve` is told.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// This node's id in peers.json.
    pub id: NodeId,
    /// Path of peers.json.
    pub peers: PathBuf,
    /// The model repository.
    pub models: PathBuf,
    /// Where the log and the events go.
    pub logs: PathBuf,
    /// The armed fault.
    pub fault: Option<Fault>,
    /// Without a log: begin with the state of a mesh that runs, and not with the genesis.
    pub join: bool,
    /// What is told of.
    pub level: log::LevelFilter,
}

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// peers.json is wrong.
    #[error(transparent)]
    Peers(#[from] PeersError),
    /// A directory or file could not be made or opened.
    #[error("{what} {path}: {error}")]
    File {
        /// What it is for.
        what: &'static str,
        /// Where.
        path: String,
        /// Why not.
        error: io::Error,
    },
    /// An address could not be listened on.
    #[error("{id} cannot listen on {address} ({what} in peers.json): {error}{hint}")]
    Listen {
        /// The node.
        id: NodeId,
        /// `control` or `data`.
        what: &'static str,
        /// The address.
        address: String,
        /// Why not.
        error: io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// The log is damaged or in use.
    #[error(transparent)]
    Log(#[from] WalError),
    /// The log's records do not follow from each other.
    #[error("{path}: {error}; nothing was changed. Keep this file: it is evidence. Put a copy back that was made after this node stopped")]
    Replay {
        /// The log.
        path: String,
        /// What is wrong.
        error: ReplayError,
    },
    /// The log is another node's, or another mesh's.
    #[error("{path} is the log of {found}, and this is {here}; nothing was changed. Is --logs or --id wrong?")]
    Owner {
        /// The log.
        path: String,
        /// Whose it is.
        found: String,
        /// Who this is.
        here: String,
    },
    /// There is no mesh to join.
    #[error("{id} cannot join: {why}")]
    Join {
        /// The node.
        id: NodeId,
        /// What is in the way.
        why: String,
    },
    /// No randomness for a disk id.
    #[error("the system gives no random numbers: {0}")]
    Random(getrandom::Error),
}

/// Runs a node until it is told to stop by SIGTERM or SIGINT.
pub async fn serve(options: ServeOptions) -> Result<(), ServeError> {
    let peers_stamp = watch::stamp(&options);
    let file = PeersFile::load(&options.peers)?;
    file.check_member(&options.id)?;
    let control = listen(&options.id, "control", file.peer(&options.id).map(|peer| peer.control.as_str()))?;
    let data = listen(&options.id, "data", file.peer(&options.id).map(|peer| peer.data.as_str()))?;

    make_dir("the logs directory", &options.logs)?;
    let events_path = options.logs.join(format!("{}.events.ndjson", options.id));
    let in_file = |what, path: &Path| {
        let path = path.display().to_string();
        move |error| ServeError::File { what, path, error }
    };
    let events = Events::open(&events_path, &options.id, options.level).map_err(in_file("the events file", &events_path))?;
    let mut signals = Signals::new([Signal::Term, Signal::Int, Signal::Hup]).inspect_err(|error| {
        events.say(Level::Error, "no_signals", json!({"reason": error.to_string()}));
    });
    // Whoever waits for a mesh to join can be told to stop.
    let opened = match select(pin!(open_log(&options, &file, &events)), pin!(told_to_stop(signals.as_mut().ok(), || {}))).await {
        Either::Left((opened, _)) => Some(opened?),
        Either::Right(_) => None,
    };
    let Some((wal, durable)) = opened else {
        events.say(Level::Info, "stopped", json!({}));
        events.flush();
        return Ok(());
    };

    let (bad_news, heard) = bounded::<()>(1);
    // A full queue means that it is about to be heard.
    let alarm = Arc::new(move || bad_news.try_send(()).unwrap_or_default());
    let fail_canary = options.fault == Some(Fault::FailCanary);
    let gateway_options = gateway::Options { alarm, fail_canary, ..gateway::Options::default() };
    let gateway = Gateway::with_options(options.id.clone(), options.models.clone(), gateway_options);
    for model in durable.state().routes.values().flat_map(|route| route.models()) {
        if let Err(reason) = gateway.prepare(model).await {
            events.say(Level::Error, "model_missing", json!({"model": model.id, "reason": reason}));
        }
    }
    gateway.route(durable.state());

    let identity = Identity {
        mesh: durable.mesh().clone(),
        genesis_hash: durable.genesis_hash(),
        node: options.id.clone(),
        incarnation: durable.incarnation(),
        disk_id: durable.disk_id(),
    };
    let (turns, ready_turns) = bounded::<Turn>(TURNS_QUEUED_MAX);
    let mesh = Mesh::start(identity, control, mesh_config(&options.id, &file));
    let (mesh, inbox) = mesh.map_err(in_file("the control listener", Path::new("")))?;
    let mesh = Arc::new(mesh);

    let figures = Arc::new(LogFigures::default());
    figures.bytes.store(wal.len_bytes(), Ordering::Relaxed);
    let view = Arc::new(ArcSwap::from_pointee(View::at_start(&durable)));
    events.say(
        Level::Info,
        "started",
        json!({
            "incarnation": durable.incarnation(), "disk_id": durable.disk_id(), "slot": durable.head().slot, "version": durable.head().version,
            "state_hash": durable.head().state_hash, "control": file.peer(&options.id).map(|peer| &peer.control),
            "data": file.peer(&options.id).map(|peer| &peer.data), "fault": options.fault.map(|fault| format!("{fault:?}")),
        }),
    );
    let core_loop = Loop {
        node: Node::new(durable, core_settings(&file)),
        wal,
        mesh: mesh.clone(),
        gateway: gateway.clone(),
        events: events.clone(),
        view: view.clone(),
        figures: figures.clone(),
        turns: turns.clone(),
        fault: options.fault,
    };
    let in_thread = std::thread::Builder::new().name("core".into()).spawn(move || core_loop.run(&ready_turns, inbox));
    in_thread.map_err(in_file("a thread for", Path::new("the core")))?;

    let stopping = Arc::new(AtomicBool::new(false));
    let peers = Arc::new(ArcSwap::from_pointee(file));
    let plane = Arc::new(ControlPlane {
        id: options.id.clone(),
        view,
        turns: turns.clone(),
        gateway: gateway.clone(),
        mesh: mesh.clone(),
        peers: peers.clone(),
        figures,
        events: events.clone(),
        stopping: stopping.clone(),
        started: clock::time(),
    });
    let (reread, reread_asked) = bounded::<()>(1);
    task::spawn(watch::watch(options.clone(), peers_stamp, peers.clone(), mesh.clone(), turns.clone(), events.clone(), reread_asked));
    task::spawn(beat_health(peers, gateway.clone(), turns.clone(), heard));

    let stop = stop_signal(signals.ok(), events.clone(), stopping, reread);
    let front = Front::new(plane, Arc::new(gateway), Limits::default());
    let drained = front.serve(data, stop).await.map_err(in_file("the threads of", Path::new("the data plane")))?;
    events.say(Level::Info, "drained", json!({"cut": drained.cut}));

    mesh.stop().await;
    let (done, stopped) = oneshot::channel();
    if turns.send(Turn::Stop(done)).await.is_ok() {
        // An error says that the loop has ended already.
        let _ = stopped.await;
    }
    events.say(Level::Info, "stopped", json!({}));
    events.flush();
    Ok(())
}

fn listen(id: &NodeId, what: &'static str, address: Option<&str>) -> Result<TcpListener, ServeError> {
    let address = address.unwrap_or_default();
    TcpListener::bind(address).map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::AddrInUse => "; another process has it: is this node running already? `scripts/stop_mesh.sh` stops a mesh",
            io::ErrorKind::AddrNotAvailable => "; this machine does not have that address",
            io::ErrorKind::PermissionDenied => "; ports below 1024 need a privilege",
            _ => "",
        };
        ServeError::Listen { id: id.clone(), what, address: address.to_owned(), error, hint }
    })
}

fn make_dir(what: &'static str, path: &Path) -> Result<(), ServeError> {
    fs::create_dir_all(path).map_err(|error| ServeError::File { what, path: path.display().to_string(), error })
}

/// A name for a new log that no other log has.
fn new_disk() -> Result<DiskId, ServeError> {
    let mut disk = [0; 8];
    getrandom::fill(&mut disk).map_err(ServeError::Random)?;
    Ok(DiskId(disk))
}

/// Replays the log, or begins one; either way this start's boot record is synced before anything is sent.
async fn open_log(options: &ServeOptions, file: &PeersFile, events: &Events) -> Result<(Wal, Durable), ServeError> {
    let path = options.logs.join(format!("{}.log", options.id));
    let shown = path.display().to_string();
    let in_replay = |error| ServeError::Replay { path: shown.clone(), error };
    let Some(opened) = Wal::open(&path)? else {
        let records = match options.join {
            true => join::first_records(&options.id, file, events).await?,
            false => Durable::genesis(&file.mesh, &options.id, new_disk()?, file.genesis_state()?),
        };
        let durable = Durable::replay(records.iter().cloned()).map_err(in_replay)?;
        return Ok((Wal::create(&path, &records)?, durable));
    };
    let mut wal = opened.wal;
    if options.join {
        let why = "there is a log already, and it is kept. To join anew, have this node removed from the mesh and move the file away";
        events.say(Level::Info, "join_ignored", json!({"file": shown, "reason": why}));
    }
    if let Some(cut) = &opened.cut {
        events.say(Level::Warn, "torn_tail_cut", json!({"file": shown, "offset": cut.offset, "bytes": cut.bytes}));
    }
    let mut durable = Durable::replay(opened.records).map_err(in_replay)?;
    if (durable.mesh(), durable.node()) != (&file.mesh, &options.id) {
        let found = format!("{} in mesh {}", durable.node(), durable.mesh());
        let here = format!("{} in mesh {}", options.id, file.mesh);
        return Err(ServeError::Owner { path: shown, found, here });
    }
    let (mesh, node, disk_id) = (durable.mesh().clone(), durable.node().clone(), durable.disk_id());
    let boot = Record::Boot { mesh, node, incarnation: durable.incarnation() + 1, disk_id };
    wal.append(std::slice::from_ref(&boot))?;
    durable.apply(0, boot).map_err(in_replay)?;
    Ok((wal, durable))
}

fn core_settings(file: &PeersFile) -> Settings {
    let crate::peers::Timing { heartbeat_ms, prepare_timeout_ms, lease_ms } = file.timing;
    Settings { heartbeat_ms, prepare_timeout_ms, lease_ms, advance_votes: file.advance_votes }
}

fn mesh_config(id: &NodeId, file: &PeersFile) -> MeshConfig {
    let others = || file.peers.iter().filter(|peer| peer.id != *id);
    MeshConfig {
        peers: others().map(|peer| PeerAddress { id: peer.id.clone(), control: peer.control.clone() }).collect(),
        cut: others().filter(|peer| !file.linked(id, &peer.id)).map(|peer| peer.id.clone()).collect(),
        silence_ms_max: file.timing.heartbeat_ms.saturating_mul(SILENT_BEATS_MAX),
    }
}

/// Hands the core this node's health before every beat, and at once when there is bad news of a canary.
async fn beat_health(peers: Arc<ArcSwap<PeersFile>>, gateway: Arc<Gateway>, turns: Sender<Turn>, bad_news: Receiver<()>) {
    loop {
        if turns.send(Turn::Input(Input::Health(turns::health(&gateway)))).await.is_err() {
            return;
        }
        // A canary that fails all the time does not keep the core from its work.
        task::sleep(Duration::from_millis(HEALTH_PAUSE_MS)).await;
        let beat = task::sleep(Duration::from_millis(peers.load().timing.heartbeat_ms));
        select(pin!(beat), pin!(bad_news.recv())).await;
    }
}

/// Ends at SIGTERM or SIGINT; never where there are no signals.
async fn told_to_stop(signals: Option<&mut Signals>, hang_up: impl Fn()) {
    let Some(signals) = signals else { return std::future::pending().await };
    while let Some(Ok(Signal::Hup)) = signals.next().await {
        hang_up();
    }
}

/// Ends at SIGTERM or SIGINT; SIGHUP reads peers.json again. `/readyz` fails from the signal on.
async fn stop_signal(mut signals: Option<Signals>, events: Events, stopping: Arc<AtomicBool>, reread: Sender<()>) {
    // A full queue means that it will be read again anyway.
    told_to_stop(signals.as_mut(), || reread.try_send(()).unwrap_or_default()).await;
    stopping.store(true, Ordering::Relaxed);
    events.say(Level::Info, "stopping", json!({}));
    // By themselves they would not end, and the drain would wait for them.
    events.end_streams();
}
