//! Watches a rollout until it is over, whoever drives it and whichever nodes die meanwhile.
//!
//! All nodes are asked all the time. Whoever knows the newest is believed, and what was once believed is not taken back for something older:
//! where the one node that knew of the last step is gone, the picture stays as it was until another one has caught up.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::api::{RolloutStatus, RolloutView};
use crate::cli::ask::{Heard, ask_all};
use crate::cli::client::{CallError, Mesh, unreachable, within};
use crate::cli::interrupt::Interrupt;
use crate::cli::output::{Console, listed};
use crate::cli::rollout::known::{self, Known, Voice};
use crate::cli::rollout::view::{Scene, Told, ending, tone};
use crate::cli::{Exit, Failure};
use crate::core::rollout::RolloutId;

/// From one picture to the next, in milliseconds.
const DRAW_MS: u64 = 200;
/// From one look at the clock to the next, in milliseconds.
const LOOK_MS: u64 = 100;

/// What `--watch --output json` prints at the end.
#[derive(Serialize)]
struct Watched<'a> {
    #[serde(flatten)]
    rollout: &'a RolloutView,
    /// `promoted` or `rolled_back`; null if it was watched no longer.
    outcome: Option<RolloutStatus>,
}

/// What is known so far.
struct Picture {
    id: RolloutId,
    /// By the order of the nodes: the last answer, or why there is none.
    seen: Vec<Option<Known>>,
    failures: Vec<Option<CallError>>,
    voices: Vec<Voice>,
    /// The newest that was ever heard, how new it is, and when it was said.
    best: Option<((u64, usize), RolloutView, Instant)>,
    heard_at: Instant,
}

impl Picture {
    fn hear(&mut self, heard: Heard<Known>) {
        let Heard { index, answer } = heard;
        let (Some(seen), Some(failure), Some(voice)) = (self.seen.get_mut(index), self.failures.get_mut(index), self.voices.get_mut(index))
        else {
            return;
        };
        match answer {
            Ok(known) => {
                self.heard_at = Instant::now();
                (voice.node, voice.lease) = (Some(known.list.node.clone()), Some(known.lease));
                (*seen, *failure) = (Some(known), None);
            }
            Err(error) => {
                voice.lease = None;
                (*seen, *failure) = (None, Some(error));
            }
        }
        if let Some((known, rollout)) = known::believed(&self.seen, self.id) {
            let newness = known::newness(known, rollout);
            if self.best.as_ref().is_none_or(|(best, ..)| newness >= *best) {
                self.best = Some((newness, rollout.clone(), known.at));
            }
        }
    }
}

/// Shows how it goes until it is over. It is promoted: ok. It is taken back: refused. It is watched no longer: it goes on all the same.
pub async fn watch(id: RolloutId, mesh: Mesh, interrupt: &Interrupt, console: &mut Console<'_>) -> Result<Exit, Failure> {
    let timeout = mesh.timeout;
    let nobody: Vec<Option<Known>> = mesh.clients.iter().map(|_| None).collect();
    let voices = known::voices(&mesh, &nobody);
    let failures = nobody.iter().map(|_| None).collect();
    let mut picture = Picture { id, voices, failures, seen: nobody, best: None, heard_at: Instant::now() };
    let heard = ask_all(mesh.clients, "", known::ask);
    let mut told = Told::default();
    let begun = Instant::now();
    let mut drawn_at: Option<Instant> = None;
    loop {
        if let Some(Ok(answer)) = within(Duration::from_millis(LOOK_MS), heard.recv()).await {
            picture.hear(answer);
        }
        if let Some((_, rollout, at)) = &picture.best {
            let over = known::is_over(rollout);
            if !console.is_live() {
                for change in told.changes(rollout) {
                    console.say(&format!("rollout {id}: {change}"));
                }
            } else if over || drawn_at.is_none_or(|drawn| drawn.elapsed() >= Duration::from_millis(DRAW_MS)) {
                drawn_at = Some(Instant::now());
                let scene = Scene { rollout, age: at.elapsed(), voices: &picture.voices };
                console.picture(|console| scene.print(console));
            }
            if over {
                return Ok(conclude(&picture, rollout, console));
            }
        }
        if interrupt.came() || console.is_closed() {
            return Ok(leave(&picture, console));
        }
        if picture.best.is_none() && begun.elapsed() >= timeout && picture.seen.iter().any(Option::is_some) {
            return Err(Failure::refused(format!(
                "no node that answers knows of rollout {id}; it may be forgotten: canary-mesh rollout list"
            )));
        }
        if picture.heard_at.elapsed() >= timeout {
            let failures: Vec<CallError> = picture.failures.into_iter().flatten().collect();
            let Failure { message, .. } = unreachable(&failures);
            let message =
                format!("{message}\nRollout {id} goes on where nodes are alive. Look again: canary-mesh rollout show {id} --watch");
            return Err(Failure::new(Exit::NoConnection, message));
        }
    }
}

/// It is over.
fn conclude(picture: &Picture, rollout: &RolloutView, console: &mut Console<'_>) -> Exit {
    let live = console.is_live();
    console.data(&Watched { rollout, outcome: Some(rollout.status) }, |console| {
        if !live {
            Scene { rollout, age: Duration::ZERO, voices: &picture.voices }.print(console);
        }
        console.line(&console.toned(tone(rollout.status), ending(rollout)));
    });
    match rollout.status {
        RolloutStatus::Promoted => Exit::Ok,
        _ => Exit::Refused,
    }
}

/// It is not over, and somebody wants to look no longer.
fn leave(picture: &Picture, console: &mut Console<'_>) -> Exit {
    let Picture { id, best, voices, .. } = picture;
    if let Some((_, rollout, at)) = best {
        let live = console.is_live();
        console.data(&Watched { rollout, outcome: None }, |console| {
            if !live {
                Scene { rollout, age: at.elapsed(), voices }.print(console);
            }
        });
    }
    let silent: Vec<_> = voices.iter().filter(|voice| voice.lease.is_none()).map(|voice| &voice.endpoint).collect();
    if !silent.is_empty() {
        console.say(&format!("no answer from {}", listed(silent)));
    }
    console.say(&format!("Watched no longer; rollout {id} goes on. Look again: canary-mesh rollout show {id} --watch"));
    Exit::Unhealthy
}
