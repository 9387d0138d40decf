//! `completions`: a script that teaches a shell the words.

use structopt::StructOpt;
use structopt::clap::Shell;

use crate::cli::args::Cli;
use crate::cli::output::Console;
use crate::cli::{Exit, Failure};

/// Prints the script.
pub fn run(shell: Shell, console: &mut Console<'_>) -> Result<Exit, Failure> {
    // Into memory first: clap panics when its writer fails.
    let mut script = Vec::new();
    Cli::clap().gen_completions_to("canary-mesh", shell, &mut script);
    console.write(|out| out.write_all(&script));
    Ok(Exit::Ok)
}
