//! The events of a node: one JSON object a line in `logs/<node id>.events.ndjson`, and a line for people through `log` and
//! femme on stdout.
//!
//! A thread of its own writes them, behind a bounded queue: neither a slow disk nor a closed terminal holds up the protocol.
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
use serde_json::{Map, Value, json};

use crate::core::ids::NodeId;
use crate::core::io::Event;
use crate::node::clock;

/// Events that may wait for the writer; more are dropped and counted.
pub const EVENTS_QUEUED_MAX: usize = 4_096;

/// Where events go. Cheap to clone.
#[derive(Clone)]
pub struct Events {
    node: NodeId,
    queue: SyncSender<Line>,
    dropped: Arc<AtomicU64>,
}

enum Line {
    Event { level: Level, line: Map<String, Value> },
    Flush(SyncSender<()>),
}

impl Events {
    /// Opens the file for appending and starts the writer.
    pub fn open(path: &Path, node: &NodeId, level: log::LevelFilter) -> io::Result<Events> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        femme::with_level(level);
        let (queue, lines) = sync_channel(EVENTS_QUEUED_MAX);
        std::thread::Builder::new().name("events".into()).spawn(move || write_all(file, lines))?;
        Ok(Events { node: node.clone(), queue, dropped: Arc::default() })
    }

    /// Says one thing. `fields` is anything that serialises to an object.
    pub fn say(&self, level: Level, event: &str, fields: impl Serialize) {
        let mut line = Map::new();
        let at = UNIX_EPOCH + Duration::from_millis(clock::unix_ms());
        line.insert("ts".into(), json!(humantime::format_rfc3339_millis(at).to_string()));
        line.insert("level".into(), json!(level.as_str().to_lowercase()));
        line.insert("node".into(), json!(self.node));
        line.insert("event".into(), json!(event));
        if let Ok(Value::Object(fields)) = serde_json::to_value(fields) {
            line.extend(fields.into_iter().filter(|(key, value)| key != "event" && !value.is_null()));
        }
        match self.queue.try_send(Line::Event { level, line }) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => {}
            Err(TrySendError::Full(_)) => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Says what the core has done.
    pub fn core(&self, event: &Event) {
        let level = match event {
            Event::Diverged { .. } => Level::Error,
            Event::GaveUp { .. } | Event::Resolving { .. } | Event::LinkDown { .. } => Level::Warn,
            _ => Level::Info,
        };
        let fields = serde_json::to_value(event).unwrap_or_default();
        let name = fields.get("event").and_then(Value::as_str).unwrap_or("event").to_owned();
        self.say(level, &name, fields);
    }

    /// Events that found the queue full.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
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

fn write_all(mut file: File, lines: Receiver<Line>) {
    let mut terminal = true;
    for line in lines {
        match line {
            Line::Event { level, line } => {
                if terminal {
                    terminal = catch_unwind(AssertUnwindSafe(|| log::log!(level, "{}", for_people(&line)))).is_ok();
                }
                // A full disk must not end the node here: its log will say so, and that one counts.
                let _ = serde_json::to_vec(&line).map(|mut bytes| {
                    bytes.push(b'\n');
                    file.write_all(&bytes)
                });
            }
            Line::Flush(done) => drop(done.send(())),
        }
    }
}

fn for_people(line: &Map<String, Value>) -> String {
    let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let name = line.get("event").map(plain).unwrap_or_default();
    let fields = line.iter().filter(|(key, _)| !["ts", "level", "event"].contains(&key.as_str()));
    fields.fold(name, |text, (key, value)| format!("{text} {key}={}", plain(value)))
}
