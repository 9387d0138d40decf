//! Rollouts: a canary's way from its first share to promotion, or back. Part of the routing state, so that any node can go on with it.
//!
//! One rollout is under way at a time; further ones wait behind it, in order. `change` has what a transaction does to rollouts; `driver` is
//! the node's part: who goes on with a rollout, when, and on what evidence.

mod change;
pub mod driver;

pub use crate::core::rollout::change::shortened;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::core::gate::Gate;
use crate::core::hash::Feed;
use crate::core::ids::{ModelId, NodeId, RouteName, TxId};
use crate::core::state::{Model, Percent, RoutingState, WEIGHT_WHOLE_BP};

/// Steps of one rollout.
pub const ROLLOUT_STEPS_MAX: usize = 100;
/// Routes of one rollout.
pub const ROLLOUT_ROUTES_MAX: usize = 32;
/// Rollouts that may wait behind the one under way.
pub const ROLLOUTS_WAITING_MAX: usize = 16;
/// Rollouts that are over and still remembered.
pub const ROLLOUTS_KEPT_MAX: usize = 16;
/// External gates of one rollout.
pub const ROLLOUT_GATES_MAX: usize = 8;
/// Longest URL or query of an external gate, in bytes.
pub const GATE_TEXT_BYTES_MAX: usize = 2_048;
/// Longest time that a rollout may name, in milliseconds: 30 days.
pub const ROLLOUT_MS_MAX: u64 = 30 * 24 * 3_600 * 1_000;
/// Longest wait for one answer of an external gate, in milliseconds.
pub const GATE_TIMEOUT_MS_MAX: u64 = 60_000;
/// Longest reason that a rollout remembers, in bytes.
pub const ROLLOUT_REASON_BYTES_MAX: usize = 512;

/// Names a rollout: `r1`, `r2`, … in the order in which they were asked for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RolloutId(pub u64);

impl fmt::Display for RolloutId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("r{}", self.0))
    }
}

/// Text that names no rollout.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is not a rollout: r and a number, such as r7")]
pub struct RolloutIdError(String);

impl FromStr for RolloutId {
    type Err = RolloutIdError;
    fn from_str(text: &str) -> Result<Self, RolloutIdError> {
        let number = text.strip_prefix('r').filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
        number.and_then(|digits| digits.parse().ok()).map(RolloutId).ok_or_else(|| RolloutIdError(text.to_owned()))
    }
}

impl TryFrom<String> for RolloutId {
    type Error = RolloutIdError;
    fn try_from(text: String) -> Result<Self, RolloutIdError> {
        text.parse()
    }
}

impl From<RolloutId> for String {
    fn from(id: RolloutId) -> String {
        id.to_string()
    }
}

/// A stop on the way.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Pause {
    /// It ends by itself after so long, in milliseconds. `None`: it does not.
    pub for_ms: Option<u64>,
}

/// One step: a share for the canary, and perhaps a stop at it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Step {
    /// The canary's share, in basis points.
    pub weight: u16,
    /// A stop at this step.
    pub pause: Option<Pause>,
}

/// What becomes of a step at the end of its `bake_max_ms` if too little has been seen until then.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnInconclusive {
    /// It waits until enough has been seen.
    #[default]
    Wait,
    /// The rollout goes on all the same.
    Advance,
    /// The rollout is taken back.
    Abort,
}

/// A number that is equal to itself.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Number(u64);

impl TryFrom<f64> for Number {
    type Error = &'static str;
    fn try_from(number: f64) -> Result<Number, &'static str> {
        if number.is_finite() { Ok(Number(number.to_bits())) } else { Err("not a finite number") }
    }
}

impl From<Number> for f64 {
    fn from(number: Number) -> f64 {
        f64::from_bits(number.0)
    }
}

/// Somebody outside who is asked before a rollout goes on.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct ExternalGate {
    /// Its name in sentences.
    pub name: ModelId,
    /// How long an answer may take, in milliseconds.
    pub timeout_ms: u64,
    /// Who is asked what.
    pub question: Question,
}

/// Who is asked what.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Question {
    /// A Prometheus server: the query's one number must be within the bounds.
    Prometheus {
        /// The server: `http://host:port[/path]`.
        url: String,
        /// PromQL that gives one number.
        query: String,
        /// Smallest good value.
        min: Option<Number>,
        /// Largest good value.
        max: Option<Number>,
    },
    /// A POST with name, route, phase, weight and version: 200 to 202 is a yes.
    Webhook {
        /// Where: `http://host:port[/path]`.
        url: String,
    },
}

/// What somebody wants rolled out, and how.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct RolloutSpec {
    /// The new model of each route. They switch together.
    pub routes: BTreeMap<RouteName, Model>,
    /// The shares, rising. The first may be 0: then the canary sees mirrored requests only.
    pub steps: Vec<Step>,
    /// Shortest time at each step, in milliseconds.
    pub bake_ms: u64,
    /// Time at a step after which `on_inconclusive` counts, in milliseconds.
    pub bake_max_ms: u64,
    /// What becomes of a step at which too little has been seen.
    pub on_inconclusive: OnInconclusive,
    /// Share of stable's requests that the canary gets a copy of, in basis points.
    pub mirror_bp: u16,
    /// What the canary is judged by.
    pub gate: Gate,
    /// Who else is asked.
    pub external: Vec<ExternalGate>,
    /// A rollout that is not paused and does not move for so long is taken back, in milliseconds.
    pub progress_deadline_ms: Option<u64>,
}

/// How far a rollout is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// It waits for those before it.
    Queued,
    /// It is at this step, counted from 0.
    Step(u16),
    /// Its models are stable.
    Promoted,
    /// It was taken back.
    RolledBack,
}

/// One rollout.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Rollout {
    /// Its name.
    pub id: RolloutId,
    /// The transaction that asked for it.
    pub txid: TxId,
    /// What is wanted.
    pub spec: RolloutSpec,
    /// How far it is.
    pub phase: Phase,
    /// It stands still.
    pub paused: Option<Pause>,
    /// Who drives it, while that node is alive: who took the request, or made the last step.
    pub driver: NodeId,
    /// The stable models that it began from; empty while it is queued.
    pub previous: BTreeMap<RouteName, Model>,
    /// The routing version of the last change of `phase` or `paused`.
    pub since: u64,
    /// Why it was taken back or paused.
    pub reason: Option<String>,
}

/// All rollouts that are remembered, oldest first.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Rollouts {
    /// How many were ever asked for.
    pub begun: u64,
    /// Those that are over, then the one under way, then those that wait.
    pub list: VecDeque<Rollout>,
}

/// What a transaction does to rollouts.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RolloutChange {
    /// A new one. It begins at once if none is under way.
    Start(Box<RolloutSpec>),
    /// The next step; behind the last one the promotion.
    Step {
        /// Which rollout.
        id: RolloutId,
        /// Where it is now. Anywhere else nothing happens: no step is skipped or made twice.
        from: Phase,
    },
    /// The promotion, whatever steps are left.
    Full {
        /// Which rollout.
        id: RolloutId,
    },
    /// It stands still from now on.
    Pause {
        /// Which rollout.
        id: RolloutId,
        /// For how long.
        pause: Pause,
    },
    /// It goes on.
    Resume {
        /// Which rollout.
        id: RolloutId,
    },
    /// It is taken back. A promotion of it that was made meanwhile, too.
    Abort {
        /// Which rollout.
        id: RolloutId,
        /// Why.
        reason: String,
    },
}

impl RolloutSpec {
    /// Why this cannot be rolled out at all, whatever the state.
    pub fn check(&self) -> Result<(), String> {
        let steps = &self.steps;
        if self.routes.is_empty() || self.routes.len() > ROLLOUT_ROUTES_MAX {
            return Err(format!("a rollout has 1 to {ROLLOUT_ROUTES_MAX} routes, this one has {}", self.routes.len()));
        }
        if steps.is_empty() || steps.len() > ROLLOUT_STEPS_MAX {
            return Err(format!("a rollout has 1 to {ROLLOUT_STEPS_MAX} steps, this one has {}", steps.len()));
        }
        if let Some(step) = steps.iter().find(|step| step.weight > WEIGHT_WHOLE_BP) {
            return Err(format!("a step is at most 100 %, and one is {} %", Percent(step.weight)));
        }
        if let Some((one, next)) = steps.iter().zip(steps.iter().skip(1)).find(|(one, next)| one.weight >= next.weight) {
            let (one, next) = (Percent(one.weight), Percent(next.weight));
            return Err(format!("steps rise, and {next} % does not come after {one} %"));
        }
        if steps.first().is_some_and(|step| step.weight == 0) && self.mirror_bp == 0 {
            return Err("a step of 0 % shows nothing unless requests are mirrored; begin above 0, or set mirror".into());
        }
        if self.mirror_bp > WEIGHT_WHOLE_BP {
            return Err(format!("at most 100 % of the requests can be mirrored, not {} %", Percent(self.mirror_bp)));
        }
        let pauses = steps.iter().filter_map(|step| step.pause?.for_ms);
        for (what, ms) in [("bake", self.bake_ms), ("bake_max", self.bake_max_ms)]
            .into_iter()
            .chain(self.progress_deadline_ms.map(|ms| ("progress_deadline", ms)))
            .chain(pauses.map(|ms| ("a pause", ms)))
        {
            if ms > ROLLOUT_MS_MAX {
                return Err(format!("{what} is at most 30 days, not {ms} ms"));
            }
        }
        if self.bake_max_ms < self.bake_ms {
            return Err(format!("bake_max ({} ms) is shorter than bake ({} ms)", self.bake_max_ms, self.bake_ms));
        }
        if self.external.len() > ROLLOUT_GATES_MAX {
            return Err(format!("a rollout has at most {ROLLOUT_GATES_MAX} external gates, this one has {}", self.external.len()));
        }
        self.external.iter().try_for_each(ExternalGate::check)
    }
}

impl RolloutSpec {
    /// Errs on the large side, as an answer to a `FETCH` must fit its frame.
    pub(crate) fn rough_bytes(&self) -> usize {
        let text = |gate: &ExternalGate| match &gate.question {
            Question::Prometheus { url, query, .. } => url.len() + query.len(),
            Question::Webhook { url } => url.len(),
        };
        1_024 + self.routes.len() * 384 + self.steps.len() * 64 + self.external.iter().map(|gate| 256 + text(gate)).sum::<usize>()
    }
}

impl ExternalGate {
    fn check(&self) -> Result<(), String> {
        let name = &self.name;
        if !(1..=GATE_TIMEOUT_MS_MAX).contains(&self.timeout_ms) {
            return Err(format!("gate {name}: timeout_ms is 1 to {GATE_TIMEOUT_MS_MAX}, not {}", self.timeout_ms));
        }
        let texts = match &self.question {
            Question::Prometheus { min: None, max: None, .. } => {
                return Err(format!("gate {name}: it needs a min or a max, or nothing could fail"));
            }
            Question::Prometheus { url, query, .. } => vec![url, query],
            Question::Webhook { url } => vec![url],
        };
        match texts.iter().find(|text| text.is_empty() || text.len() > GATE_TEXT_BYTES_MAX) {
            Some(text) => Err(format!("gate {name}: url and query have 1 to {GATE_TEXT_BYTES_MAX} bytes, and one has {}", text.len())),
            None => Ok(()),
        }
    }
}

impl Rollout {
    /// Whether it is at some step.
    pub fn is_under_way(&self) -> bool {
        matches!(self.phase, Phase::Step(_))
    }

    /// Whether nothing more comes of it.
    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Promoted | Phase::RolledBack)
    }

    /// The step that it is at.
    pub fn step(&self) -> Option<&Step> {
        match self.phase {
            Phase::Step(at) => self.spec.steps.get(usize::from(at)),
            _ => None,
        }
    }
}

impl RoutingState {
    /// The rollout under way, or the first that waits for its turn.
    pub fn current_rollout(&self) -> Option<&Rollout> {
        let under_way = self.rollouts.list.iter().find(|rollout| rollout.is_under_way());
        under_way.or_else(|| self.rollouts.list.iter().find(|rollout| rollout.phase == Phase::Queued))
    }

    /// The rollout under way that this route is in.
    pub fn rollout_of(&self, route: &RouteName) -> Option<&Rollout> {
        self.rollouts.list.iter().find(|rollout| rollout.is_under_way() && rollout.spec.routes.contains_key(route))
    }

    /// The rollout of this name, if it is remembered.
    pub fn rollout(&self, id: RolloutId) -> Option<&Rollout> {
        self.rollouts.list.iter().find(|rollout| rollout.id == id)
    }
}

impl Rollouts {
    /// Takes all of them into a hash.
    pub(crate) fn feed(&self, feed: Feed) -> Feed {
        let feed = feed.u64(self.begun).u64(self.list.len() as u64);
        self.list.iter().fold(feed, |feed, rollout| rollout.feed(feed))
    }
}

impl Rollout {
    fn feed(&self, feed: Feed) -> Feed {
        let Rollout { id, txid, spec, phase, paused, driver, previous, since, reason } = self;
        let feed = spec.feed(feed.u64(id.0).str(&txid.to_string()));
        let feed = match phase {
            Phase::Queued => feed.u64(0),
            Phase::Step(at) => feed.u64(1).u64((*at).into()),
            Phase::Promoted => feed.u64(2),
            Phase::RolledBack => feed.u64(3),
        };
        let feed = feed_models(previous, feed_pause(paused.as_ref(), feed).str(driver.as_str()));
        feed.u64(*since).str(reason.as_deref().unwrap_or_default())
    }
}

impl RolloutSpec {
    fn feed(&self, feed: Feed) -> Feed {
        let RolloutSpec { routes, steps, bake_ms, bake_max_ms, on_inconclusive, mirror_bp, gate, external, progress_deadline_ms } = self;
        let mut feed = feed_models(routes, feed).u64(steps.len() as u64);
        for step in steps {
            feed = feed_pause(step.pause.as_ref(), feed.u64(step.weight.into()));
        }
        feed = feed.u64(*bake_ms).u64(*bake_max_ms).u64(*on_inconclusive as u64).u64((*mirror_bp).into());
        feed = gate.feed(feed).u64(external.len() as u64);
        for ExternalGate { name, timeout_ms, question } in external {
            feed = feed.str(name.as_str()).u64(*timeout_ms);
            feed = match question {
                Question::Prometheus { url, query, min, max } => {
                    let bound =
                        |feed: Feed, bound: &Option<Number>| feed.u64(bound.is_some().into()).u64(bound.map_or(0, |number| number.0));
                    bound(bound(feed.u64(0).str(url).str(query), min), max)
                }
                Question::Webhook { url } => feed.u64(1).str(url),
            };
        }
        feed.u64(progress_deadline_ms.map_or(0, |ms| ms.saturating_add(1)))
    }
}

fn feed_pause(pause: Option<&Pause>, feed: Feed) -> Feed {
    match pause {
        None => feed.u64(0),
        Some(Pause { for_ms: None }) => feed.u64(1),
        Some(Pause { for_ms: Some(ms) }) => feed.u64(2).u64(*ms),
    }
}

fn feed_models(models: &BTreeMap<RouteName, Model>, feed: Feed) -> Feed {
    models.iter().fold(feed.u64(models.len() as u64), |feed, (route, model)| {
        let digest = model.digest.map(|digest| digest.to_string()).unwrap_or_default();
        feed.str(route.as_str()).str(model.id.as_str()).str(&digest)
    })
}
