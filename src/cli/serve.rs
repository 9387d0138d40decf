//! `serve`: runs a node until it is told to stop.

use async_std::task;

use crate::cli::args::ServeArgs;
use crate::cli::{Exit, Failure};
use crate::node::{self, ServeOptions};

/// Runs the node.
pub fn serve(args: ServeArgs) -> Result<Exit, Failure> {
    if cfg!(feature = "mutants") {
        let why = "this program is built to make mistakes on purpose, for its checkers to find (feature `mutants`): it serves nobody";
        return Err(Failure::refused(why));
    }
    let ServeArgs { id, peers, models, logs, join, fault, log_level } = args;
    let options = ServeOptions { id, peers, models, logs, fault, join, level: log_level };
    task::block_on(node::serve(options)).map_err(|error| Failure::refused(error.to_string()))?;
    Ok(Exit::Ok)
}
