//! `serve`: runs a node until it is told to stop.

use crate::cli::args::ServeArgs;
use crate::cli::{Exit, Failure};

/// Runs the node. THE NODE IS WIRED HERE: `crate::node::serve(args)` takes the place of the refusal below.
pub fn serve(args: ServeArgs) -> Result<Exit, Failure> {
    Err(Failure::refused(format!("this build has no node to run as {}", args.id)))
}
