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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::testing::ran;

    #[test]
    fn every_shell_has_a_script_that_knows_the_commands() {
        for shell in Shell::variants() {
            let script = ran(&format!("canary-mesh completions {}", shell.to_lowercase()));
            assert_eq!(script.exit, Exit::Ok);
            assert!(script.out.contains("propose") && script.out.contains("idempotency-key"), "{shell}");
        }
        assert_eq!(ran("canary-mesh completions csh").exit, Exit::Usage);
    }
}
