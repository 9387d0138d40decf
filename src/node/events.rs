//! The events of a node: one JSON object a line in `logs/<node id>.events.ndjson`, and a line for people through `log` and
//! femme on stdout.
//!
//! A thread of its own writes them, behind a bounded queue: neither a slow disk nor a closed terminal holds up the protocol. The same
//! objects are what `GET /events` streams: the thread puts them into a ring, which nobody who reads it can hold up.
//! femme panics when stdout is closed; here that only ends the lines on the terminal.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, UNIX_EPOCH};

use log::Level;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::clock;
use crate::core::ids::{NodeId, UnixMs};
use crate::core::io::Event;
use crate::http::LiveEvents;

/// Events that may wait for the writer; more are dropped and counted.
pub const EVENTS_QUEUED_MAX: usize = 4_096;
/// From one writing to the next, in milliseconds.
const GATHER_MS: u64 = 5;

/// Where events go. Cheap to clone.
#[derive(Clone)]
pub struct Events {
    queue: SyncSender<Line>,
    dropped: Arc<AtomicU64>,
    live: Arc<LiveEvents>,
}

enum Line {
    Event { at: UnixMs, level: Level, what: What },
    Flush(SyncSender<()>),
    EndStreams,
}

/// What is said. It becomes text on the writer's thread: the protocol does not wait for that.
enum What {
    Core(Event),
    Other(String, Value),
}

impl Events {
    /// Opens the file for appending and starts the writer.
    pub fn open(path: &Path, node: &NodeId, level: log::LevelFilter) -> io::Result<Events> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        femme::with_level(level);
        let (queue, lines) = sync_channel(EVENTS_QUEUED_MAX);
        let live = LiveEvents::new(fastrand::u64(..));
        std::thread::Builder::new().name("events".into()).spawn({
            let (node, live) = (node.clone(), live.clone());
            move || write_all(file, &node, &lines, &live)
        })?;
        Ok(Events { queue, dropped: Arc::default(), live })
    }

    /// Says one thing. `fields` is anything that serialises to an object.
    pub fn say(&self, level: Level, event: &str, fields: impl Serialize) {
        self.queue(level, What::Other(event.to_owned(), serde_json::to_value(fields).unwrap_or_default()));
    }

    /// Says what the core has done.
    pub fn core(&self, event: Event) {
        let level = match event {
            Event::Diverged { .. } => Level::Error,
            Event::GaveUp { .. } | Event::Resolving { .. } | Event::LinkDown { .. } | Event::LeaseLost | Event::Fenced { .. } => {
                Level::Warn
            }
            _ => Level::Info,
        };
        self.queue(level, What::Core(event));
    }

    fn queue(&self, level: Level, what: What) {
        match self.queue.try_send(Line::Event { at: clock::unix_ms(), level, what }) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => {}
            Err(TrySendError::Full(_)) => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Events that found the queue full.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// What `GET /events` streams.
    pub fn live(&self) -> &Arc<LiveEvents> {
        &self.live
    }

    /// Ends the streams behind everything said so far.
    pub fn end_streams(&self) {
        if self.queue.try_send(Line::EndStreams).is_err() {
            // The queue is full, or the writer gone: that they end counts for more than that they end with everything.
            self.live.end();
        }
    }

    /// Waits until everything said so far is written.
    pub fn flush(&self) {
        let (done, written) = sync_channel(1);
        if self.queue.send(Line::Flush(done)).is_ok() {
            // An error says that the writer is gone: then there is nothing to wait for.
            let _ = written.recv_timeout(Duration::from_secs(2));
        }
    }
}

/// Writes what has gathered, and then lets more gather: whoever says something need not wake this thread each time.
fn write_all(mut file: File, node: &NodeId, lines: &Receiver<Line>, live: &LiveEvents) {
    let mut terminal = true;
    while let Ok(first) = lines.recv() {
        let mut bytes = Vec::new();
        let mut flushed = Vec::new();
        for line in std::iter::once(first).chain(std::iter::from_fn(|| lines.try_recv().ok())) {
            match line {
                Line::Event { at, level, what } => {
                    let line = written(node, at, level, what);
                    if terminal {
                        terminal = catch_unwind(AssertUnwindSafe(|| log::log!(level, "{}", for_people(&line)))).is_ok();
                    }
                    if let Ok(json) = serde_json::to_string(&line) {
                        live.push(&line.event, &json);
                        bytes.extend_from_slice(json.as_bytes());
                        bytes.push(b'\n');
                    }
                }
                Line::Flush(done) => flushed.push(done),
                Line::EndStreams => live.end(),
            }
        }
        // A full disk must not end the node here: its log will say so, and that one counts.
        let _ = file.write_all(&bytes);
        match flushed.is_empty() {
            true => std::thread::sleep(Duration::from_millis(GATHER_MS)),
            // Whoever waited may have gone.
            false => flushed.into_iter().for_each(|done| done.send(()).unwrap_or_default()),
        }
    }
}

/// One line of the file.
#[derive(Serialize)]
struct Written<'a> {
    ts: String,
    level: String,
    node: &'a NodeId,
    event: String,
    #[serde(flatten)]
    fields: Map<String, Value>,
}

fn written(node: &NodeId, at: UnixMs, level: Level, what: What) -> Written<'_> {
    let (name, fields) = match what {
        What::Core(event) => (None, serde_json::to_value(&event).unwrap_or_default()),
        What::Other(name, fields) => (Some(name), fields),
    };
    let mut fields = match fields {
        Value::Object(fields) => fields,
        other => Map::from_iter([("detail".to_owned(), other)]),
    };
    let own = fields.remove("event").and_then(|event| event.as_str().map(str::to_owned));
    fields.retain(|_, value| !value.is_null());
    let ts = humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(at)).to_string();
    Written { ts, level: level.as_str().to_lowercase(), node, event: name.or(own).unwrap_or_default(), fields }
}

fn for_people(line: &Written<'_>) -> String {
    let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let start = format!("{} node={}", line.event, line.node);
    line.fields.iter().fold(start, |text, (key, value)| format!("{text} {key}={}", plain(value)))
}
