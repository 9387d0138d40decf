//! The command line: words in, data on standard output, talk on standard error, and an exit code that programs can act on.
//!
//! [`run`] is the one entrance. It is handed all that it needs of the process, so that every command can be tried without one.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use async_std::task;
use structopt::StructOpt;
use structopt::clap::ErrorKind;

use crate::api::ErrorBody;
use crate::cli::args::{BenchCommand, Cli, Command, Format, LogCommand, MembersArgs, MembersCommand, PeersCommand, TxCommand};
use crate::cli::client::Mesh;
use crate::cli::output::Console;

pub mod args;
mod ask;
mod bench;
mod client;
mod completions;
mod countdown;
mod endpoint;
mod history;
mod interrupt;
mod latency;
mod load;
mod log;
mod members;
mod output;
mod peers;
mod propose;
mod receipt;
mod rollback;
mod rollout;
mod serve;
mod sim;
mod status;
#[cfg(test)]
pub(crate) mod testing;
mod tx;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done, and well.
    Ok,
    /// Refused or aborted; something asked about is not as it should be.
    Refused,
    /// The words were not understood.
    Usage,
    /// No node could be reached.
    NoConnection,
    /// It was sent, and nobody can say yet what became of it.
    Unknown,
    /// Somebody is unhealthy, or the nodes have not converged.
    Unhealthy,
}

impl Exit {
    /// The process's exit code.
    pub fn code(self) -> u8 {
        match self {
            Exit::Ok => 0,
            Exit::Refused => 1,
            Exit::Usage => 2,
            Exit::NoConnection => 3,
            Exit::Unknown => 4,
            Exit::Unhealthy => 5,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit.code())
    }
}

/// Why a command could not do what it was asked to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Failure {
    exit: Exit,
    /// What is wrong, where, and what to do.
    message: String,
    /// What the node said, if it was the node that refused.
    body: Option<ErrorBody>,
}

impl Failure {
    fn new(exit: Exit, message: impl Into<String>) -> Failure {
        Failure { exit, message: message.into(), body: None }
    }

    fn usage(message: impl Into<String>) -> Failure {
        Failure::new(Exit::Usage, message)
    }

    fn refused(message: impl Into<String>) -> Failure {
        Failure::new(Exit::Refused, message)
    }
}

/// What a command sees of its process.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// `CANARY_MESH_ENDPOINT`, if it is set and not empty.
    pub endpoints: Option<String>,
    /// `NO_COLOR` is set and not empty.
    pub no_color: bool,
    /// Standard output is a terminal.
    pub stdout_terminal: bool,
    /// Standard error is a terminal.
    pub stderr_terminal: bool,
    /// Where peers.json is looked for.
    pub directory: PathBuf,
    /// Whether a long command may take SIGINT and SIGTERM to end in order.
    pub signals: bool,
}

impl Surroundings {
    /// Those of this process.
    pub fn of_process() -> Surroundings {
        let set = |name| std::env::var(name).ok().filter(|value: &String| !value.is_empty());
        Surroundings {
            endpoints: set("CANARY_MESH_ENDPOINT"),
            no_color: set("NO_COLOR").is_some(),
            stdout_terminal: io::stdout().is_terminal(),
            stderr_terminal: io::stderr().is_terminal(),
            directory: PathBuf::new(),
            signals: true,
        }
    }
}

/// Does what `argv` (the program's name first) says.
pub fn run(argv: impl IntoIterator<Item = OsString>, around: &Surroundings, out: &mut dyn Write, err: &mut dyn Write) -> Exit {
    let cli = match Cli::from_iter_safe(argv) {
        Ok(cli) => cli,
        Err(asked) if matches!(asked.kind, ErrorKind::HelpDisplayed | ErrorKind::VersionDisplayed) => {
            let mut console = Console::new(out, err, Format::Table, false, false);
            console.line(&asked.message);
            return console.finish(Exit::Ok);
        }
        Err(wrong) => {
            let mut console = Console::new(out, err, Format::Table, false, false);
            console.say(&wrong.message);
            return console.finish(Exit::Usage);
        }
    };
    let Cli { global, command } = cli;
    let colour = !global.no_color && !around.no_color;
    let mut console = Console::new(out, err, global.output, around.stdout_terminal, colour);
    let mesh = || endpoint::targets(&global.endpoints, around).map(|targets| Mesh::new(targets, global.timeout));
    let result = match command {
        Command::Serve(args) => serve::serve(args),
        Command::Status(args) => task::block_on(async { status::run(&args, mesh()?, &mut console).await }),
        Command::Propose(args) => task::block_on(async { propose::run(args, mesh()?, &mut console).await }),
        Command::Rollout(command) => task::block_on(async { rollout::run(command, mesh()?, around, &mut console).await }),
        Command::Rollback(args) => task::block_on(async { rollback::run(args, mesh()?, around, &mut console).await }),
        Command::History(args) => task::block_on(async { history::run(&args, mesh()?, &mut console).await }),
        Command::Tx(TxCommand::Show { txid }) => task::block_on(async { tx::show(&txid, mesh()?, &mut console).await }),
        Command::Members(MembersArgs { command: None | Some(MembersCommand::List) }) => {
            task::block_on(async { members::list(mesh()?, &mut console).await })
        }
        Command::Members(MembersArgs { command: Some(MembersCommand::Add(args)) }) => {
            task::block_on(async { members::add(args, mesh()?, &mut console).await })
        }
        Command::Members(MembersArgs { command: Some(MembersCommand::Remove(args)) }) => {
            task::block_on(async { members::remove(args, mesh()?, &mut console).await })
        }
        Command::Log(LogCommand::Dump { file }) => log::dump(&file, &mut console),
        Command::Log(LogCommand::Verify { file }) => log::verify(&file, &mut console),
        Command::Peers(PeersCommand::Check { file, id }) => peers::check(&file, id.as_ref(), &mut console),
        Command::Load(args) => task::block_on(async { load::run(&args, mesh()?, around, &mut console).await }),
        Command::Bench(BenchCommand::Commit(args)) => task::block_on(async { bench::commit(&args, mesh()?, around, &mut console).await }),
        Command::Sim(args) => sim::run_seeds(&args, &mut console),
        Command::Completions { shell } => completions::run(shell, &mut console),
    };
    let exit = result.unwrap_or_else(|failure| {
        if let Some(body) = &failure.body {
            console.data(body, |_| {});
        }
        console.error(&failure.message);
        failure.exit
    });
    console.finish(exit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::testing::ran;

    #[test]
    fn help_and_version_are_data_and_a_wrong_word_is_talk() {
        let help = ran("canary-mesh propose --help");
        assert_eq!((help.exit, help.err.as_str()), (Exit::Ok, ""));
        assert!(help.out.starts_with("canary-mesh-propose") && help.out.contains("--weight"), "{}", help.out);
        assert_eq!(ran("canary-mesh --version").exit, Exit::Ok);
        for line in [
            "canary-mesh",
            "canary-mesh frobnicate",
            "canary-mesh status --nope",
            "canary-mesh tx show 7",
            "canary-mesh --timeout 0 status",
        ] {
            let wrong = ran(line);
            assert_eq!((wrong.exit, wrong.out.as_str()), (Exit::Usage, ""), "{line}");
            assert!(!wrong.err.is_empty(), "{line}");
        }
    }

    #[test]
    fn every_exit_has_its_code() {
        let exits = [Exit::Ok, Exit::Refused, Exit::Usage, Exit::NoConnection, Exit::Unknown, Exit::Unhealthy];
        assert_eq!(exits.map(Exit::code), [0, 1, 2, 3, 4, 5]);
    }
}
