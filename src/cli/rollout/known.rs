//! What each node knows of rollouts, and whom to believe.

use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::{BoxFuture, join_all};

use crate::api::{LeaseView, RolloutList, RolloutStatus, RolloutView, Routing};
use crate::cli::Failure;
use crate::cli::client::{ASK_TIMEOUT_MS_MAX, CallError, Client, Mesh, unreachable};
use crate::core::ids::NodeId;
use crate::core::rollout::RolloutId;

/// What one node knows.
pub struct Known {
    /// Its routing version. It was asked before the rollouts, so they are at least as new.
    pub version: u64,
    /// Whether it may serve a canary.
    pub lease: LeaseView,
    /// The rollouts, and its name.
    pub list: RolloutList,
    /// When it said so.
    pub at: Instant,
}

/// Asks a node for all that.
pub fn ask<'a>(client: &'a mut Client, _: &'a str) -> BoxFuture<'a, Result<Known, CallError>> {
    async move {
        let routing: Routing = client.get("/routing").await?;
        let list = client.get("/rollouts").await?;
        Ok(Known { version: routing.version, lease: routing.lease, list, at: Instant::now() })
    }
    .boxed()
}

/// Asks every node once, at the same time. One answer at least is there.
pub async fn look(mesh: &mut Mesh) -> Result<Vec<Option<Known>>, Failure> {
    let patience = mesh.timeout.min(Duration::from_millis(ASK_TIMEOUT_MS_MAX));
    let alone = mesh.clients.len() == 1;
    let asked = mesh.clients.iter_mut().map(|client| async move {
        let timeout = std::mem::replace(&mut client.timeout, patience);
        if alone {
            client.timeout = timeout;
        }
        let answer = ask(client, "").await;
        client.timeout = timeout;
        answer
    });
    let (mut seen, mut failures) = (Vec::new(), Vec::new());
    for answer in join_all(asked).await {
        match answer {
            Ok(known) => seen.push(Some(known)),
            Err(error) => {
                seen.push(None);
                failures.push(error);
            }
        }
    }
    if seen.iter().any(Option::is_some) {
        return Ok(seen);
    }
    // Somebody who refuses has been reached.
    let refused = failures.iter().position(|failure| matches!(failure, CallError::Refused { .. }));
    Err(match refused {
        Some(at) => failures.swap_remove(at).into(),
        None => unreachable(&failures),
    })
}

/// Whether it is at some step.
pub fn is_under_way(rollout: &RolloutView) -> bool {
    matches!(rollout.status, RolloutStatus::Running | RolloutStatus::Paused)
}

/// Whether nothing more comes of it.
pub fn is_over(rollout: &RolloutView) -> bool {
    matches!(rollout.status, RolloutStatus::Promoted | RolloutStatus::RolledBack)
}

/// How new a picture of a rollout is: the routing version first, then how far the rollout is.
pub fn newness(known: &Known, rollout: &RolloutView) -> (u64, usize) {
    let progress = match rollout.step {
        _ if is_over(rollout) => usize::MAX,
        Some(step) => step.saturating_add(1),
        None => 0,
    };
    (known.version, progress)
}

/// Whoever knows the newest of a rollout; of several, its driver, who alone knows what it waits for.
pub fn believed(seen: &[Option<Known>], id: RolloutId) -> Option<(&Known, &RolloutView)> {
    let all = seen.iter().flatten().filter_map(|known| {
        let rollout = known.list.rollouts.iter().find(|rollout| rollout.id == id)?;
        Some((known, rollout))
    });
    all.max_by_key(|(known, rollout)| (newness(known, rollout), rollout.driver.as_ref() == Some(&known.list.node)))
}

/// Whoever has the newest version; of several, who drives the rollout under way.
pub fn newest(seen: &[Option<Known>]) -> Option<&Known> {
    seen.iter().flatten().max_by_key(|known| (known.version, drives(&known.list.node, &known.list.rollouts)))
}

/// Whether one of these is driven by this node.
pub fn drives(node: &NodeId, rollouts: &[RolloutView]) -> bool {
    rollouts.iter().any(|rollout| rollout.driver.as_ref() == Some(node))
}

/// A node that was asked.
pub struct Voice {
    /// Its name, where it is known.
    pub node: Option<NodeId>,
    /// Where it is.
    pub endpoint: String,
    /// Its lease; `None` if it does not answer.
    pub lease: Option<LeaseView>,
}

/// The nodes that were asked, in their order.
pub fn voices(mesh: &Mesh, seen: &[Option<Known>]) -> Vec<Voice> {
    let voice = |(client, known): (&Client, &Option<Known>)| Voice {
        node: known.as_ref().map(|known| known.list.node.clone()).or_else(|| client.target.node.clone()),
        endpoint: client.target.endpoint.to_string(),
        lease: known.as_ref().map(|known| known.lease),
    };
    mesh.clients.iter().zip(seen).map(voice).collect()
}
