//! The JSON that goes in and out over HTTP. The front writes it and the command line reads it: one definition for both.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::core::gate::Verdict;
use crate::core::ids::{Digest, DiskId, Incarnation, MeshId, ModelId, NodeId, RouteName, Slot, StateHash, TxId, UnixMs};
use crate::core::state::{Kind, RouteStatus, RoutingState, Weights};

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
        crate::core::state::Percent(self.0).fmt(f)
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
