//! What the rest of the node sees of the core: an immutable picture, made anew after every turn.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::api::{FenceView, LeaseView};
use crate::core::durable::Durable;
use crate::core::ids::{Incarnation, NodeId, Slot, Time, TxId};
use crate::core::message::Head;
use crate::core::state::RoutingState;

/// The core at the end of a turn.
pub struct View {
    /// The last decided slot.
    pub head: Head,
    /// The routing state.
    pub state: Arc<RoutingState>,
    /// This start's number.
    pub incarnation: Incarnation,
    /// Until when a canary may be served by this state; 0 if that has passed.
    pub lease_until: Time,
    /// The members that somebody has fenced.
    pub fenced: Vec<FenceView>,
    /// The open slot, if a transaction holds it: the slot, the transaction, since when.
    pub open: Option<(Slot, Option<TxId>, Time)>,
    /// What is known of the others.
    pub peers: BTreeMap<NodeId, PeerSeen>,
    /// Why this node should not be sent traffic; empty when all is well.
    pub complaints: Vec<String>,
    /// Why the log takes no more.
    pub broken: Option<String>,
}

/// What is known of one other node.
#[derive(Clone, Debug, Default)]
pub struct PeerSeen {
    /// Heard of within three beats.
    pub alive: bool,
    /// Its newest known incarnation.
    pub incarnation: Option<Incarnation>,
    /// Its newest known head.
    pub slot: Option<Slot>,
    /// When it was last heard directly.
    pub heard_at: Option<Time>,
}

impl View {
    /// The lease at this moment.
    pub fn lease(&self, now: Time) -> LeaseView {
        let left_us = self.lease_until.0.saturating_sub(now.0);
        LeaseView { held: left_us > 0, remaining_ms: left_us.div_ceil(1_000) }
    }

    /// Before the first turn.
    pub fn at_start(durable: &Durable) -> View {
        View {
            head: durable.head(),
            state: Arc::new(durable.state().clone()),
            incarnation: durable.incarnation(),
            lease_until: Time(0),
            fenced: Vec::new(),
            open: None,
            peers: BTreeMap::new(),
            complaints: vec!["the node is starting".into()],
            broken: None,
        }
    }
}
