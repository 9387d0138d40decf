//! The end of a run: the faults end for a majority or for all, they have to make progress, and then the mesh runs on in the calm.

use std::collections::BTreeMap;

use crate::core::io::Proposal;
use crate::core::rollout::Pause;
use crate::sim::coverage::Situation;
use crate::sim::node_name;
use crate::sim::oracle::{Verdict, broken};
use crate::sim::plan::CALM_US;
use crate::sim::process::State;
use crate::sim::world::wishes::probe;
use crate::sim::world::{CALM_GAP_US, Event, Healed, LOOK_US, PROGRESS_US_MAX, World};

impl World<'_> {
    pub(super) fn heal(&mut self) -> Verdict {
        let members = &self.oracle.state().members;
        let majority = self.oracle.state().majority();
        let well = |node: &usize| {
            let process = &self.processes[*node];
            !matches!(process.state, State::Refused) && !process.disk.is_damaged() && self.oracle.disk_counts(*node)
        };
        let well: Vec<_> = self.plan.order.iter().copied().filter(well).collect();
        let mut nodes: Vec<_> = well.iter().copied().filter(|node| members.contains_key(self.name(*node))).collect();
        if nodes.len() < majority {
            return broken("a plan leaves a majority", format!("{} of {} members are well", nodes.len(), members.len()));
        }
        let partly = self.plan.heal_majority && self.processes.iter().all(|process| process.admitted);
        if partly {
            nodes.truncate(majority);
        }
        self.coverage.met(if partly && majority < members.len() { Situation::HealedMajority } else { Situation::HealedAll });
        let mut rest: Vec<_> = (0..self.plan.nodes).filter(|node| !nodes.contains(node)).collect();
        if !partly {
            // Those that are lost, or dismissed, are there all the same.
            rest.clear();
        }
        self.say(|| format!("all faults end for {}", nodes.iter().map(|node| node_name(*node).to_string()).collect::<Vec<_>>().join(", ")));
        self.network.heal(|from, to| rest.contains(&from) != rest.contains(&to));
        for node in &rest {
            if self.plan.rest_down {
                self.processes[*node].held_down = true;
                self.crash(*node, true, 0);
            }
        }
        for node in 0..self.plan.nodes {
            if rest.contains(&node) {
                continue;
            }
            let process = &mut self.processes[node];
            process.disk.repair();
            (process.fuse, process.paused_until) = (None, self.now);
            let start = process.start;
            match process.state {
                State::Down | State::Broken => self.after(100_000, Event::Start { node, start }),
                State::Up(_) => self.after(0, Event::Resume { node, start }),
                State::Booting(_) | State::Refused => {}
            }
        }
        // Links that lost messages are made anew, as a transport would.
        for one in 0..self.plan.nodes {
            for other in one + 1..self.plan.nodes {
                self.break_link(one, other, 1_000);
            }
        }
        self.healed = Some(Healed {
            at: self.now,
            nodes,
            callers: BTreeMap::new(),
            committed: false,
            asked: 0,
            next_at: self.now + 500_000,
            agreed_at: None,
            unfinished: None,
        });
        self.after(LOOK_US, Event::Look);
        Ok(())
    }

    /// Has a transaction been committed since the heal, and do all that are healed agree? Then the mesh runs on for a while, and every
    /// single proposal must commit.
    pub(super) fn look(&mut self) -> Verdict {
        let Some(healed) = &mut self.healed else { return Ok(()) };
        // Whoever has been removed coordinates nothing.
        let members = &self.oracle.state().members;
        let able: Vec<_> = healed.nodes.iter().copied().filter(|node| members.contains_key(&self.processes[*node].id)).collect();
        if !healed.committed && self.now >= healed.next_at && !able.is_empty() {
            healed.next_at = self.now + 3_000_000;
            let node = able[healed.asked % able.len()];
            healed.asked += 1;
            if let Some(core) = self.processes[node].node() {
                // In the calm whoever is dead has been fenced long ago, and an advance goes on without it.
                let advance = healed.agreed_at.is_some() && healed.asked % 2 == 0;
                let (kind, change) = probe(core.durable().state(), advance);
                // Told before it is asked: the answer may come at once.
                healed.callers.insert(self.callers + 1, self.now);
                self.ask_for(node, Proposal { kind, change, idempotency_key: None })?;
            }
        }
        let Some(healed) = &self.healed else { return Ok(()) };
        let (committed, since) = (healed.committed, healed.agreed_at.map_or(healed.at, |_| healed.next_at));
        let differs: Vec<_> = healed.nodes.iter().filter_map(|node| Some((*node, self.differs(*node)?))).collect();
        if committed && differs.is_empty() {
            return self.agreed();
        }
        if self.now.saturating_sub(since) > PROGRESS_US_MAX {
            let differs: Vec<_> = differs.iter().map(|(node, why)| format!("{} {why}", node_name(*node))).collect();
            let text = format!("{} us after all faults ended, committed {committed}: {}", self.now - since, differs.join("; "));
            return broken(if committed { "all converge" } else { "a majority makes progress" }, text);
        }
        self.after(LOOK_US, Event::Look);
        Ok(())
    }

    /// All that are healed agree. The next proposal comes after a while, until the run has lasted long enough.
    fn agreed(&mut self) -> Verdict {
        let calm_us = if self.brief { 0 } else { self.plan.calm_us };
        let Some(healed) = &mut self.healed else { return Ok(()) };
        let since = *healed.agreed_at.get_or_insert(self.now);
        let unfinished = self.oracle.state().rollouts.list.iter().filter(|rollout| !rollout.is_over()).count();
        let unfinished_then = *healed.unfinished.get_or_insert(unfinished);
        if self.now >= since + calm_us {
            self.done = true;
            // A long line of them may take longer than the calm, but not even one of them may.
            let stands = self.oracle.state().current_rollout().filter(|rollout| rollout.paused != Some(Pause { for_ms: None }));
            return match stands {
                Some(rollout) if calm_us >= CALM_US && unfinished >= unfinished_then => {
                    broken("a rollout comes to an end", format!("{unfinished} have not, and {} is {:?}", rollout.id, rollout.phase))
                }
                _ => Ok(()),
            };
        }
        healed.committed = false;
        healed.next_at = self.now + CALM_GAP_US;
        self.after(CALM_GAP_US, Event::Look);
        Ok(())
    }

    /// What a healed node lacks.
    fn differs(&self, node: usize) -> Option<String> {
        let Some(core) = self.processes[node].node() else { return Some("is down".to_owned()) };
        let (head, wanted) = (core.durable().head(), self.oracle.head());
        if !self.oracle.state().members.contains_key(self.name(node)) {
            return None;
        }
        if head.slot != wanted {
            return Some(format!("is at slot {} of {wanted}", head.slot));
        }
        if core.durable().state() != self.oracle.state() {
            return Some("has another state".to_owned());
        }
        if let Some(txid) = core.open_transaction() {
            return Some(format!("is in doubt about {txid}"));
        }
        core.complaints().first().map(|complaint| format!("complains: {complaint}"))
    }
}
