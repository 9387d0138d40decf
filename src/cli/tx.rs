//! `tx show`: what became of a transaction, from whoever knows.

use crate::api::{Outcome, Receipt};
use crate::cli::client::{CallError, Mesh, unreachable};
use crate::cli::output::Console;
use crate::cli::{Exit, Failure, receipt};
use crate::core::ids::TxId;

/// Asks one node after the other until one knows the outcome, and prints the receipt.
pub async fn show(txid: &TxId, mut mesh: Mesh, console: &mut Console<'_>) -> Result<Exit, Failure> {
    let path = format!("/transactions/{txid}");
    let mut unsettled = None;
    let mut refused = None;
    let mut failures = Vec::new();
    for client in &mut mesh.clients {
        match client.get::<Receipt>(&path).await {
            Ok(receipt) if receipt.outcome == Outcome::Unknown => unsettled = Some(receipt),
            Ok(receipt) => return Ok(receipt::print(&receipt, receipt::IN_FORCE, console)),
            Err(error @ CallError::Refused { .. }) => refused = Some(error),
            Err(error) => failures.push(error),
        }
    }
    match (unsettled, refused) {
        (Some(receipt), _) => Ok(receipt::print(&receipt, receipt::IN_FORCE, console)),
        (None, Some(error)) => Err(error.into()),
        (None, None) => Err(unreachable(&failures)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::testing::{Fake, answer, nobody, ran, refusal};

    fn node(status: u16, outcome: &'static str) -> Fake {
        Fake::start(move |_, _, _| match outcome {
            "" => refusal(status, "not_found", "node-a-1-5 is not known here"),
            outcome => answer(status, &crate::cli::testing::receipt(outcome, 5)),
        })
    }

    #[test]
    fn whoever_knows_the_outcome_is_believed() {
        for (outcome, exit) in [("committed", Exit::Ok), ("aborted", Exit::Refused), ("unknown", Exit::Unknown)] {
            let (stranger, unsure, knows) = (node(404, ""), node(200, "unknown"), node(200, outcome));
            let endpoints = [&nobody(), &stranger.address, &unsure.address, &knows.address];
            let endpoints: String = endpoints.iter().map(|endpoint| format!("--endpoint {endpoint} ")).collect();
            let shown = ran(&format!("canary-mesh {endpoints} tx show node-a-1-5"));
            assert_eq!(shown.exit, exit, "{shown:?}");
            assert!(shown.out.starts_with(&format!("{outcome} node-a-1-5: slot 5")), "{}", shown.out);
        }
    }

    #[test]
    fn a_transaction_that_nobody_knows_is_refused_in_the_nodes_words() {
        let shown = ran(&format!("canary-mesh tx show node-a-1-5 --endpoint {}", node(404, "").address));
        assert_eq!((shown.exit, shown.err.as_str()), (Exit::Refused, "error: node-a-1-5 is not known here\n"));
        assert_eq!(ran(&format!("canary-mesh tx show node-a-1-5 --endpoint {}", nobody())).exit, Exit::NoConnection);
    }
}
