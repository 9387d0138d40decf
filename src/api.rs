//! The JSON that goes in and out over HTTP. The front writes it and the command line reads it: one definition for both.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::core::gate::{Gate, Tally, Verdict};
use crate::core::ids::{Digest, DiskId, Incarnation, MeshId, ModelId, NodeId, RouteName, Slot, StateHash, TxId, UnixMs};
use crate::core::rollout::{ExternalGate, OnInconclusive, Pause, RolloutId};
use crate::core::state::{Kind, Percent, RouteStatus, RoutingState, Weights};

/// Response header: `stable` or `canary`.
pub const VARIANT_HEADER: &str = "x-canary-variant";
/// Response header: the model's id.
pub const MODEL_HEADER: &str = "x-canary-model";
/// Response header: the routing version the answer was routed by.
pub const VERSION_HEADER: &str = "x-canary-version";
/// Response header: the node that answered.
pub const NODE_HEADER: &str = "x-canary-node";
/// Response header: why this variant.
pub const REASON_HEADER: &str = "x-canary-reason";

/// Request header: the caller's sticky key.
pub const KEY_HEADER: &str = "x-canary-key";
/// Request header to model servers: nobody waits for this answer, it is only compared.
pub const MIRROR_HEADER: &str = "x-canary-mirror";

/// Every error's body.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// A stable word for programs.
    pub error_code: String,
    /// What is wrong, where, and what to do.
    pub message: String,
    /// Names the request in the node's events.
    pub request_id: String,
}

/// `GET /v2/models/{route}`: the stable model of a route, as the Open Inference Protocol V2 describes models.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelMetadata {
    /// The route.
    pub name: String,
    /// What answers call the version of their model: stable's, and the canary's if it has a share.
    pub versions: Vec<String>,
    /// What the model is.
    pub platform: String,
    /// What it wants.
    pub inputs: Vec<TensorMetadata>,
    /// What it gives.
    pub outputs: Vec<TensorMetadata>,
}

/// An input or output of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorMetadata {
    /// Its name.
    pub name: String,
    /// A type of the protocol, such as `FP32`.
    pub datatype: String,
    /// Its dimensions, -1 where one is open; `[-1]` also where the model's file does not even say how many there are.
    pub shape: Vec<i64>,
}

/// Whether the model of a route is ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelReady {
    /// The route.
    pub name: String,
    /// Its stable model is loaded.
    pub ready: bool,
}

/// `GET /v1/models`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelList {
    /// The routes.
    pub models: Vec<String>,
}

/// Shares in percent, with two decimals at most. JSON numbers; basis points inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightsPercent {
    /// Share of the stable model.
    pub stable: PercentBp,
    /// Share of the canary.
    pub canary: PercentBp,
}

impl From<Weights> for WeightsPercent {
    fn from(weights: Weights) -> Self {
        WeightsPercent { stable: PercentBp(weights.stable), canary: PercentBp(weights.canary) }
    }
}

impl From<WeightsPercent> for Weights {
    fn from(weights: WeightsPercent) -> Self {
        Weights { stable: weights.stable.0, canary: weights.canary.0 }
    }
}

/// Basis points, written and read as percent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PercentBp(pub u16);

impl PercentBp {
    /// From percent: 0 to 100 with at most two decimals.
    pub fn from_percent(percent: f64) -> Result<PercentBp, String> {
        let bp = percent * 100.0;
        let rounded = bp.round();
        if !(0.0..=10_000.0).contains(&rounded) {
            return Err(format!("{percent} is not a percentage between 0 and 100"));
        }
        if (bp - rounded).abs() > 1e-6 {
            return Err(format!("{percent} has more than two decimals; shares are whole hundredths of a percent"));
        }
        Ok(PercentBp(rounded as u16))
    }
}

impl fmt::Display for PercentBp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Percent(self.0).fmt(f)
    }
}

impl Serialize for PercentBp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(f64::from(self.0) / 100.0)
    }
}

impl<'de> Deserialize<'de> for PercentBp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let percent = f64::deserialize(deserializer)?;
        PercentBp::from_percent(percent).map_err(serde::de::Error::custom)
    }
}

/// `POST /transactions`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransactionRequest {
    /// `advance` or `reduce`.
    pub kind: Kind,
    /// Route name to its change.
    pub changes: BTreeMap<RouteName, RouteChangeRequest>,
    /// Applied at most once, however often it is sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
}

/// A change to one route.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteChangeRequest {
    /// The new stable model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stable_model_id: Option<ModelId>,
    /// The canary; an explicit `null` removes it.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "present")]
    pub canary_model_id: Option<Option<ModelId>>,
    /// The new shares, in percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<WeightsPercent>,
}

/// Keeps "absent" and "null" apart: a field that is there is `Some`, whatever it holds.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<ModelId>>, D::Error> {
    Option::<ModelId>::deserialize(deserializer).map(Some)
}

/// `POST /rollback`. Without a route: every route that has a canary.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RollbackRequest {
    /// Only this route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<RouteName>,
    /// Also take back the last promotion: stable becomes the model before it.
    #[serde(default)]
    pub stable: bool,
    /// Applied at most once, however often it is sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
}

/// How a transaction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Chosen, for ever.
    Committed,
    /// Never to be committed by anybody.
    Aborted,
    /// Not settled yet; ask again with the txid.
    Unknown,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Outcome::Committed => "committed",
            Outcome::Aborted => "aborted",
            Outcome::Unknown => "unknown",
        })
    }
}

/// What the caller of a transaction gets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Receipt {
    /// The transaction.
    pub txid: TxId,
    /// How it ended.
    pub outcome: Outcome,
    /// The slot it was decided in; null if it never got one.
    pub slot: Option<Slot>,
    /// The version with that slot.
    pub version: u64,
    /// The hash of the log with that slot.
    pub state_hash: StateHash,
    /// Why, if it was not committed.
    pub reason: Option<String>,
    /// A stable word for the reason: `vetoed`, `no_vote`, `busy`, `no_majority`, `preempted`, `coordinator_lost`, `slot_taken`, `not_ready`, `invalid`.
    pub error_code: Option<String>,
    /// The votes as far as they were heard.
    pub votes: Vec<VoteLine>,
    /// Members known to have applied it.
    pub applied: Vec<NodeId>,
    /// Members not known to have applied it yet.
    pub waiting: Vec<NodeId>,
    /// Of a committed `reduce`: within so many milliseconds from now no request anywhere meets what it took away, as the leases of
    /// those that wait have ended by then. 0 when that is so already; null for anything else.
    #[serde(default)]
    pub leases_end_in_ms: Option<u64>,
    /// From request to outcome, in milliseconds; null when asked of a node that did not coordinate it.
    pub elapsed_ms: Option<f64>,
}

/// One member's vote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VoteLine {
    /// The member.
    pub node: NodeId,
    /// What it voted.
    pub vote: VoteWord,
    /// Its reason.
    pub reason: Option<String>,
}

/// A vote in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VoteWord {
    /// For it.
    Yes,
    /// Against it.
    No,
    /// Done without.
    Excused,
}

impl fmt::Display for VoteWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            VoteWord::Yes => "yes",
            VoteWord::No => "no",
            VoteWord::Excused => "excused",
        })
    }
}

/// `GET /history`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// Oldest first.
    pub decisions: Vec<HistoryEntry>,
}

/// One decided slot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HistoryEntry {
    /// The slot.
    pub slot: Slot,
    /// The transaction; null where it is not known.
    pub txid: Option<TxId>,
    /// Its kind; null where it is not known.
    pub kind: Option<Kind>,
    /// `committed` or `aborted`.
    pub outcome: Outcome,
    /// The version with that slot.
    pub version: u64,
    /// The hash of the log with that slot.
    pub state_hash: StateHash,
    /// Why, if it was aborted.
    pub reason: Option<String>,
    /// The votes.
    pub votes: Vec<VoteLine>,
    /// When it was decided: milliseconds since 1970, by the coordinator's clock.
    pub at: UnixMs,
}

/// `GET /routing/state`: exactly these six.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedState {
    /// Number of commits.
    pub version: u64,
    /// The route's stable model.
    pub stable_model_id: ModelId,
    /// The route's canary.
    pub canary_model_id: Option<ModelId>,
    /// The shares, in percent.
    pub weights: WeightsPercent,
    /// The route's situation.
    pub status: RouteStatus,
    /// The transaction of the last commit.
    pub txid: Option<TxId>,
}

/// `GET /routing`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Routing {
    /// Who answers.
    pub node: NodeId,
    /// Its last decided slot.
    pub slot: Slot,
    /// Its version.
    pub version: u64,
    /// Its hash of the log.
    pub state_hash: StateHash,
    /// The transaction of the last commit.
    pub txid: Option<TxId>,
    /// Who decides.
    pub members: Vec<NodeId>,
    /// The routes.
    pub routes: BTreeMap<RouteName, RouteView>,
    /// Whether this node may serve a canary.
    pub lease: LeaseView,
    /// The members that somebody is known here to have fenced.
    pub fenced: Vec<FenceView>,
    /// The open slot, if a transaction is prepared in it here.
    pub open: Option<OpenView>,
}

/// One route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteView {
    /// The stable model.
    pub stable_model_id: ModelId,
    /// Its file's SHA-256 as committed; null for a model of the genesis.
    pub stable_digest: Option<Digest>,
    /// The canary.
    pub canary_model_id: Option<ModelId>,
    /// Its file's SHA-256 as committed.
    pub canary_digest: Option<Digest>,
    /// The stable model before the last promotion.
    pub previous_stable_model_id: Option<ModelId>,
    /// The shares, in percent.
    pub weights: WeightsPercent,
    /// The situation.
    pub status: RouteStatus,
    /// Salts the sticky keys: 16 hexadecimal digits. New with every canary.
    pub salt: String,
}

/// Whether a node may serve a canary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseView {
    /// It may.
    pub held: bool,
    /// For how long yet, if nobody grants it more; 0 without a lease.
    pub remaining_ms: u64,
}

/// A member that gets no more grants from some others before it has caught up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceView {
    /// The member.
    pub node: NodeId,
    /// Who has fenced it, as far as this node knows.
    pub by: Vec<NodeId>,
    /// They are a majority: it holds no lease, so an `advance` goes on without its vote.
    pub majority: bool,
}

impl fmt::Display for FenceView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FenceView { node, by, majority } = self;
        let by = by.iter().map(NodeId::as_str).collect::<Vec<_>>().join(", ");
        let meaning = match majority {
            true => "until it has caught up it serves stable, and an advance goes on without its vote unless advance_votes is all",
            false => "no majority, so it may hold a lease, and an advance needs its vote",
        };
        write!(f, "{node} is fenced by {by}: {meaning}")
    }
}

/// A slot that is being decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenView {
    /// The slot.
    pub slot: Slot,
    /// The transaction prepared in it.
    pub txid: Option<TxId>,
    /// For how long.
    pub since_ms: u64,
}

/// `GET /peers`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peers {
    /// Who answers.
    pub node: NodeId,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// Every other node of peers.json.
    pub peers: Vec<PeerView>,
}

/// One peer as seen from here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerView {
    /// The peer.
    pub node: NodeId,
    /// Its control address.
    pub control: String,
    /// Its data address.
    pub data: String,
    /// The link to it.
    pub link: LinkWord,
    /// Why the link is not up, or was last refused.
    pub reason: Option<String>,
    /// Whether it counts as alive: heard of, directly or over others, within three beats.
    pub alive: bool,
    /// Its incarnation, where it is known.
    pub incarnation: Option<Incarnation>,
    /// Its last known head.
    pub slot: Option<Slot>,
    /// Milliseconds since a message of its own last came, directly or over a third node.
    pub heard_ms_ago: Option<u64>,
}

/// A link's state in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkWord {
    /// Messages flow.
    Up,
    /// Not connected; dialling or waiting to be dialled.
    Down,
    /// Cut by `partitions` in peers.json.
    Cut,
    /// The handshake was refused; `reason` says by whom and why.
    Refused,
    /// Messages flow over a third node; `reason` says over which, and why the direct link is not up.
    Relayed,
}

/// `GET /health`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Health {
    /// Who answers.
    pub node: NodeId,
    /// `ok` or `degraded`.
    pub status: HealthWord,
    /// Why it is degraded.
    pub reasons: Vec<String>,
    /// What is wrong with others, as it is known here; that makes this node no worse.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Per route.
    pub routes: BTreeMap<RouteName, RouteHealth>,
}

/// A node's health in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthWord {
    /// All is well.
    Ok,
    /// It answers, with a restriction.
    Degraded,
}

/// One route's numbers on this node, within the sliding window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouteHealth {
    /// The stable model's.
    pub stable: VariantHealth,
    /// The canary's; null without one.
    pub canary: Option<VariantHealth>,
    /// How this node's gate would vote now.
    pub gate: GateView,
}

/// One variant's numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VariantHealth {
    /// Requests answered.
    pub requests: u64,
    /// Of them bad.
    pub bad: u64,
    /// Median latency.
    pub p50_ms: f64,
    /// 99th percentile of the latency.
    pub p99_ms: f64,
}

/// A gate's verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GateView {
    /// The verdict.
    pub verdict: Verdict,
    /// One sentence with the numbers.
    pub reason: String,
}

/// Largest probability of a false veto that may be asked for, in basis points: with more, nothing would have to be seen for one.
pub const ALPHA_BP_MAX: u16 = 5_000;

/// A gate as people write it: shares in percent; what is left out stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GateSettings {
    /// How probable a veto by some node's own numbers may be for a canary that is no worse.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha_local_percent: Option<PercentBp>,
    /// How probable a veto by the sum of all numbers may be for such a canary.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha_fleet_percent: Option<PercentBp>,
    /// A request slower than this is bad, in milliseconds; without it, one slower than stable's own 99th percentile of the last hour.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_ms_max: Option<u64>,
    /// Smallest share of mirrored requests that both models answer alike.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agreement_percent_min: Option<PercentBp>,
    /// Numbers count as alike up to this relative distance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distance_percent_max: Option<PercentBp>,
    /// The gate reports and never vetoes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<bool>,
}

impl GateSettings {
    /// This gate with these settings over it. The error is a sentence.
    pub fn over(self, gate: Gate) -> Result<Gate, String> {
        let positive = |name: &str, percent: Option<PercentBp>, now: u16| match percent {
            Some(PercentBp(0)) => Err(format!("{name} must be above 0")),
            Some(percent) if percent.0 > ALPHA_BP_MAX => {
                Err(format!("{name} must be at most {} %, not {percent} %", Percent(ALPHA_BP_MAX)))
            }
            percent => Ok(percent.map_or(now, |percent| percent.0)),
        };
        if self.latency_ms_max == Some(0) {
            return Err("latency_ms_max must be at least 1".into());
        }
        Ok(Gate {
            alpha_local_bp: positive("alpha_local_percent", self.alpha_local_percent, gate.alpha_local_bp)?,
            alpha_fleet_bp: positive("alpha_fleet_percent", self.alpha_fleet_percent, gate.alpha_fleet_bp)?,
            latency_ms_max: self.latency_ms_max.or(gate.latency_ms_max),
            agreement_bp_min: self.agreement_percent_min.map_or(gate.agreement_bp_min, |percent| percent.0),
            distance_bp_max: self.distance_percent_max.map_or(gate.distance_bp_max, |percent| percent.0),
            dry_run: self.dry_run.unwrap_or(gate.dry_run),
        })
    }
}

impl From<Gate> for GateSettings {
    fn from(gate: Gate) -> GateSettings {
        GateSettings {
            alpha_local_percent: Some(PercentBp(gate.alpha_local_bp)),
            alpha_fleet_percent: Some(PercentBp(gate.alpha_fleet_bp)),
            latency_ms_max: gate.latency_ms_max,
            agreement_percent_min: Some(PercentBp(gate.agreement_bp_min)),
            distance_percent_max: Some(PercentBp(gate.distance_bp_max)),
            dry_run: Some(gate.dry_run),
        }
    }
}

/// A step of a rollout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepRequest {
    /// The canary's share.
    pub weight_percent: PercentBp,
    /// A stop at this step: `{"for_ms": null}` until somebody resumes or promotes it, `{"for_ms": 60000}` for a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause: Option<Pause>,
}

/// `POST /rollouts`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RolloutRequest {
    /// The new model of each route; they switch together.
    pub routes: BTreeMap<RouteName, ModelId>,
    /// The shares, rising. Without them 1, 10, 50 and 100 %.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<Vec<StepRequest>>,
    /// Shortest time at each step; 30 s without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bake_ms: Option<u64>,
    /// Time at a step after which `on_inconclusive` counts; ten times `bake_ms` without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bake_max_ms: Option<u64>,
    /// What becomes of a step at which too little has been seen.
    #[serde(default)]
    pub on_inconclusive: OnInconclusive,
    /// Share of stable's requests that the canary gets a copy of. With a share, the rollout begins with a step of 0 %.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror_percent: Option<PercentBp>,
    /// Over the routes' own gates.
    #[serde(default)]
    pub gate: GateSettings,
    /// Who else is asked before each next step.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub external: Vec<ExternalGate>,
    /// A rollout that does not move for so long, and is not paused, is taken back. Without it there is no such limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress_deadline_ms: Option<u64>,
    /// Applied at most once, however often it is sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
}

/// `POST /rollouts/{id}/pause`, `resume`, `promote`, `abort`, `retry`. The body may be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RolloutActionRequest {
    /// `pause`: it goes on by itself after so long.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub for_ms: Option<u64>,
    /// `promote`: whatever steps are left.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub full: bool,
    /// `abort`: why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Applied at most once, however often it is sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
}

/// `POST /rollouts/undo`: stable becomes again what it was.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UndoRequest {
    /// As of this routing version; without it, before the last promotion.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to_version: Option<u64>,
    /// Only this route; without it, all that differ, or that the last promotion switched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub route: Option<RouteName>,
    /// Applied at most once, however often it is sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
}

/// What became of a request about a rollout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RolloutReceipt {
    /// Which rollout; null if none came of it.
    pub rollout: Option<RolloutId>,
    /// The receipt of the transaction.
    #[serde(flatten)]
    pub receipt: Receipt,
}

/// `GET /rollouts`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RolloutList {
    /// Who answers.
    pub node: NodeId,
    /// Oldest first: those that are over, the one under way, those that wait.
    pub rollouts: Vec<RolloutView>,
}

/// A rollout's situation in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RolloutStatus {
    /// It waits for those before it.
    Queued,
    /// It is at some step.
    Running,
    /// It is at some step and stands still.
    Paused,
    /// Its models are stable.
    Promoted,
    /// It was taken back.
    RolledBack,
}

impl fmt::Display for RolloutStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            RolloutStatus::Queued => "queued",
            RolloutStatus::Running => "running",
            RolloutStatus::Paused => "paused",
            RolloutStatus::Promoted => "promoted",
            RolloutStatus::RolledBack => "rolled back",
        })
    }
}

/// One rollout as one node sees it; also `GET /rollouts/{id}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RolloutView {
    /// Its name.
    pub id: RolloutId,
    /// Its situation.
    pub status: RolloutStatus,
    /// The new model of each route.
    pub routes: BTreeMap<RouteName, ModelId>,
    /// The stable models that it began from; empty while it is queued.
    pub previous: BTreeMap<RouteName, ModelId>,
    /// Its steps.
    pub steps: Vec<StepRequest>,
    /// At which of them it is, from 0; null while it is queued or when it is over.
    pub step: Option<usize>,
    /// The canary's share now; null while it is queued or when it is over.
    pub weight_percent: Option<PercentBp>,
    /// Why it was taken back or stands still.
    pub reason: Option<String>,
    /// What holds it up, or what it does next: one sentence of the node that drives it; null at other nodes.
    pub waits_for: Option<String>,
    /// Who drives it, as far as the node that answers can tell; null when it is over.
    pub driver: Option<NodeId>,
    /// Shortest time at each step.
    pub bake_ms: u64,
    /// Time after which `on_inconclusive` counts.
    pub bake_max_ms: u64,
    /// What becomes of a step at which too little has been seen.
    pub on_inconclusive: OnInconclusive,
    /// Share of stable's requests that the canary gets a copy of.
    pub mirror_percent: PercentBp,
    /// Since when this node knows of the present step, in milliseconds; null while it is queued or when it is over.
    pub step_elapsed_ms: Option<u64>,
    /// For how long it still stands still, in milliseconds; null if it does not, or for ever.
    pub pause_left_ms: Option<u64>,
    /// Its gate.
    pub gate: GateSettings,
    /// Who else is asked, and what they last said.
    pub external: Vec<ExternalView>,
    /// What the sums over all nodes come to, per route; empty unless it is under way.
    pub fleet: BTreeMap<RouteName, GateView>,
    /// What each member's own numbers come to, as far as the node that answers has heard; empty unless it is under way.
    pub nodes: Vec<NodeVerdict>,
    /// The last decision of the mesh, with every vote; null unless it is under way.
    #[serde(default)]
    pub last_decision: Option<HistoryEntry>,
    /// The transaction that asked for it.
    pub txid: TxId,
}

/// An external gate and its last answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExternalView {
    /// The gate.
    #[serde(flatten)]
    pub gate: ExternalGate,
    /// Its last answer at this step; null where the node that answers has none, as all but the driver.
    pub answer: Option<GateView>,
}

/// One member's part in a rollout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeVerdict {
    /// The member.
    pub node: NodeId,
    /// The route.
    pub route: RouteName,
    /// What its own numbers come to.
    #[serde(flatten)]
    pub gate: GateView,
    /// The stable model beside the canary, since the canary began.
    pub stable: Tally,
    /// The canary, since it began.
    pub canary: Tally,
}

/// `GET /members`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Members {
    /// Who answers.
    pub node: NodeId,
    /// Its last decided slot: who is a member is as of it.
    pub slot: Slot,
    /// The members, and whoever else is linked, by id.
    pub members: Vec<MemberView>,
}

/// One node as seen from here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberView {
    /// The node.
    pub node: NodeId,
    /// Whether it decides.
    pub role: Role,
    /// The disk that it is known by: the one the log admitted or that it was first met with, else the one it is linked with.
    pub disk_id: Option<DiskId>,
    /// Heard of, directly or over others, within three beats.
    pub alive: bool,
    /// Its last known head.
    pub slot: Option<Slot>,
    /// The models of the routing state that it has not loaded: a sentence each.
    pub models_missing: Vec<String>,
    /// Its control address, if peers.json has it.
    pub control: Option<String>,
    /// Its data address, if peers.json has it.
    pub data: Option<String>,
}

/// Whether a node decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// It votes.
    Member,
    /// It only learns what is decided.
    Learner,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Role::Member => "member",
            Role::Learner => "learner",
        })
    }
}

/// `POST /members`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MembersRequest {
    /// What to do.
    pub action: MembersAction,
    /// With whom.
    pub node: NodeId,
    /// Applied at most once, however often it is sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
}

/// What becomes of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MembersAction {
    /// It becomes a member.
    Add,
    /// It is a member no longer.
    Remove,
}

/// `GET /snapshot`: what a node begins with that joins.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The mesh.
    pub mesh: MeshId,
    /// The hash of slot 0.
    pub genesis_hash: StateHash,
    /// The last decided slot.
    pub slot: Slot,
    /// The hash of the log with it.
    pub state_hash: StateHash,
    /// The state, as the log has it.
    pub state: RoutingState,
    /// By which disks the members are known.
    pub peers: BTreeMap<NodeId, DiskId>,
    /// The newest start that was heard of each node, member or not. Whoever joins under one of these names begins above it.
    pub incarnations: BTreeMap<NodeId, Incarnation>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_percent_outside_and_basis_points_inside() {
        let weights: WeightsPercent = serde_json::from_str(r#"{"stable": 99.95, "canary": 0.05}"#).unwrap();
        assert_eq!(Weights::from(weights), Weights { stable: 9_995, canary: 5 });
        assert_eq!(serde_json::to_string(&weights).unwrap(), r#"{"stable":99.95,"canary":0.05}"#);
        for wrong in [r#"{"stable": 99.999, "canary": 0}"#, r#"{"stable": -1, "canary": 0}"#, r#"{"stable": 101, "canary": 0}"#] {
            assert!(serde_json::from_str::<WeightsPercent>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_absent_canary_and_a_null_one_are_different_requests() {
        let change = |text| serde_json::from_str::<RouteChangeRequest>(text).unwrap().canary_model_id;
        assert_eq!(change("{}"), None);
        assert_eq!(change(r#"{"canary_model_id": null}"#), Some(None));
        assert!(matches!(change(r#"{"canary_model_id": "v2"}"#), Some(Some(_))));
    }
}
