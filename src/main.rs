//! `canary-mesh`: argv in, exit code out. The command line is [`canary_mesh::cli`].

use std::io::{self, BufWriter};
use std::process::ExitCode;

use canary_mesh::cli::{Surroundings, run};

fn main() -> ExitCode {
    // Not locked: a node's other threads and the progress bar write too.
    run(std::env::args_os(), &Surroundings::of_process(), &mut BufWriter::new(io::stdout()), &mut io::stderr()).into()
}
