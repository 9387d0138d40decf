//! Asks several nodes, and says what a failed call means for a command.

use std::time::Duration;

use serde::de::DeserializeOwned;

use crate::cli::endpoint::Target;
use crate::cli::output::listed;
use crate::cli::{Exit, Failure};
pub use crate::http::client::{Answer, CallError, Client, within};

/// Longest wait for a node's answer while another one could be asked instead, in milliseconds.
pub const ASK_TIMEOUT_MS_MAX: u64 = 3_000;

impl From<CallError> for Failure {
    /// What a failed *question* means for the command. For a failed change see `receipt`.
    fn from(error: CallError) -> Failure {
        let message = error.to_string();
        match error {
            CallError::Refused { body, .. } => Failure { exit: Exit::Refused, message, body: Some(body) },
            CallError::NoConnection { .. } => Failure::new(Exit::NoConnection, format!("cannot connect to {message}")),
            _ => Failure::new(Exit::NoConnection, message),
        }
    }
}

/// The nodes to ask, in the order given.
pub struct Mesh {
    /// Not empty.
    pub clients: Vec<Client>,
    /// The longest wait for a whole answer.
    pub timeout: Duration,
}

impl Mesh {
    /// Connects to nobody yet.
    pub fn new(targets: Vec<Target>, timeout: Duration) -> Mesh {
        Mesh { clients: targets.into_iter().map(|target| Client::new(target, timeout)).collect(), timeout }
    }

    /// Asks one node after the other until one answers: only for questions, which may be asked twice.
    pub async fn ask<T: DeserializeOwned>(&mut self, path: &str) -> Result<(&mut Client, T), Failure> {
        let found = self.find(path, Some).await?;
        let found = found.and_then(|(at, document)| Some((self.clients.get_mut(at)?, document)));
        found.ok_or_else(|| unreachable(&[]))
    }

    /// The same until one has what is wanted: which node, and that. `None` if no answer has it.
    pub async fn find<T: DeserializeOwned, U>(
        &mut self,
        path: &str,
        wanted: impl Fn(T) -> Option<U>,
    ) -> Result<Option<(usize, U)>, Failure> {
        let timeout = self.timeout;
        let patience = if self.clients.len() > 1 { timeout.min(Duration::from_millis(ASK_TIMEOUT_MS_MAX)) } else { timeout };
        let mut answered = false;
        let mut failures = Vec::new();
        for (at, client) in self.clients.iter_mut().enumerate() {
            client.timeout = patience;
            let answer = client.get(path).await;
            client.timeout = timeout;
            match answer {
                Ok(document) => {
                    answered = true;
                    if let Some(found) = wanted(document) {
                        return Ok(Some((at, found)));
                    }
                }
                Err(refused @ CallError::Refused { .. }) => return Err(refused.into()),
                Err(error) => failures.push(error),
            }
        }
        if answered { Ok(None) } else { Err(unreachable(&failures)) }
    }
}

/// Nobody answered.
pub fn unreachable(failures: &[CallError]) -> Failure {
    let connected = failures.iter().any(|failure| !matches!(failure, CallError::NoConnection { .. }));
    let what = if connected { "no node answered" } else { "cannot connect to any node" };
    let message = format!(
        "{what} ({}).\nIs the mesh running (canary-mesh serve)? Name its data addresses with --endpoint.",
        listed(failures).replace(", ", "; ")
    );
    Failure::new(Exit::NoConnection, message)
}
