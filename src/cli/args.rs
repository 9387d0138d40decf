//! What may be typed: the words of the command line, and how each is read.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use structopt::StructOpt;
use structopt::clap::{AppSettings, Shell};

use crate::api::PercentBp;
use crate::cli::endpoint::Endpoint;
use crate::core::ids::{ModelId, NodeId, RouteName, Slot, TxId};
use crate::core::state::{IDEMPOTENCY_KEY_BYTES_MAX, Kind};
use crate::node::Fault;
use crate::sim::plan::{Knob, NODES_MAX};

mod rollout;

pub use rollout::*;

/// Largest rate that `load` takes, in requests per second.
pub const LOAD_RATE_PER_S_MAX: f64 = 1_000_000.0;
/// Most connections that `load` opens to one node.
pub const LOAD_CONNECTIONS_MAX: usize = 1_024;
/// Most threads that `sim` takes.
pub const SIM_JOBS_MAX: usize = 256;
/// Longest `--timeout`, in seconds.
pub const TIMEOUT_S_MAX: f64 = 3_600.0;

/// The whole command line.
#[derive(Debug, StructOpt)]
#[structopt(
    name = "canary-mesh",
    global_settings = &[AppSettings::VersionlessSubcommands, AppSettings::UnifiedHelpMessage, AppSettings::DisableHelpSubcommand],
    setting = AppSettings::SubcommandRequiredElseHelp,
    after_help = "Exit codes: 0 ok, 1 refused or aborted, 2 usage, 3 cannot connect, 4 outcome unknown, 5 unhealthy or not converged.\n\
                  Data goes to standard output, talk to standard error."
)]
pub struct Cli {
    /// Options that every command takes.
    #[structopt(flatten)]
    pub global: Global,
    /// What to do.
    #[structopt(subcommand)]
    pub command: Command,
}

/// Options that stand before or after the command.
#[derive(Debug, StructOpt)]
pub struct Global {
    /// A node's data address, such as 127.0.0.1:50051; repeatable, and those after the command replace those before it [env:
    /// CANARY_MESH_ENDPOINT, comma separated] [default: the nodes of ./peers.json, else 127.0.0.1:50051 to 50053]
    #[structopt(long = "endpoint", value_name = "address", global = true, number_of_values = 1)]
    pub endpoints: Vec<Endpoint>,
    /// How to write data
    #[structopt(long, value_name = "format", global = true, default_value = "table", possible_values = &["table", "json"])]
    pub output: Format,
    /// How long to wait for an answer, such as 5s or 500ms; plain numbers are seconds
    #[structopt(long, value_name = "time", global = true, default_value = "10s", parse(try_from_str = duration))]
    pub timeout: Duration,
    /// No colours, even on a terminal [env: NO_COLOR]
    #[structopt(long, global = true)]
    pub no_color: bool,
}

/// How data is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Columns for people.
    Table,
    /// JSON for programs.
    Json,
}

impl FromStr for Format {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "table" => Ok(Format::Table),
            "json" => Ok(Format::Json),
            other => Err(format!("{other:?} is neither table nor json")),
        }
    }
}

/// A peer-to-peer mesh that switches a fleet between a stable and a canary model by one atomic decision
// The commands. Their enum's first line is what the help begins with.
#[derive(Debug, StructOpt)]
pub enum Command {
    /// Runs a node
    Serve(ServeArgs),
    /// Shows every node in one table, and who disagrees
    Status(StatusArgs),
    /// Proposes a change of routing and prints how each node voted
    Propose(ProposeArgs),
    /// Moves a new model to all traffic step by step while the health gates allow it, and shows how it goes
    Rollout(RolloutCommand),
    /// Takes canaries away: needs a majority only, whatever the health gates say
    Rollback(RollbackArgs),
    /// Lists what was decided, oldest first
    History(HistoryArgs),
    /// Asks about one transaction
    Tx(TxCommand),
    /// Shows who decides, and changes it
    Members(MembersArgs),
    /// Reads a node's decision log
    Log(LogCommand),
    /// Reads peers.json
    Peers(PeersCommand),
    /// Sends a file of requests at a rate, and shows who answered and how well
    Load(LoadArgs),
    /// Measures the running mesh
    Bench(BenchCommand),
    /// Runs the protocol against simulated networks, disks and crashes, and says what it found
    #[structopt(setting = AppSettings::Hidden)]
    Sim(SimArgs),
    /// Prints a completion script for a shell
    Completions {
        /// The shell
        #[structopt(value_name = "shell", possible_values = &Shell::variants())]
        shell: Shell,
    },
}

/// `serve`.
#[derive(Clone, Debug, PartialEq, Eq, StructOpt)]
pub struct ServeArgs {
    /// This node's id in peers.json
    #[structopt(long, value_name = "node")]
    pub id: NodeId,
    /// The nodes of the mesh
    #[structopt(long, value_name = "file", default_value = "peers.json", parse(from_os_str))]
    pub peers: PathBuf,
    /// The folder with the models
    #[structopt(long, value_name = "folder", default_value = "models", parse(from_os_str))]
    pub models: PathBuf,
    /// The folder for the decision log and the events
    #[structopt(long, value_name = "folder", default_value = "logs", parse(from_os_str))]
    pub logs: PathBuf,
    /// Without a log: joins the mesh that the other nodes of peers.json run, as a learner; `members add` makes it a member. With a log
    /// it changes nothing
    #[structopt(long)]
    pub join: bool,
    /// For drills only: the point at which this process kills itself (kill-before-vote, kill-after-prepared, kill-before-decision,
    /// kill-after-decision), or fail-canary: every answer that this node's canary would give is an error 500
    #[structopt(long, value_name = "point")]
    pub fault: Option<Fault>,
    /// How much to say about what happens
    #[structopt(long, value_name = "level", default_value = "info", possible_values = &["error", "warn", "info", "debug", "trace"])]
    pub log_level: log::LevelFilter,
}

/// `status`.
#[derive(Debug, StructOpt)]
pub struct StatusArgs {
    /// Shows it again every second
    #[structopt(short, long)]
    pub watch: bool,
}

/// `propose`.
#[derive(Debug, StructOpt)]
pub struct ProposeArgs {
    /// The route to change
    #[structopt(long, value_name = "route", default_value = "default")]
    pub route: RouteName,
    /// The model to try
    #[structopt(long, value_name = "model", conflicts_with_all = &["no-canary", "promote"])]
    pub canary: Option<ModelId>,
    /// Takes the canary away
    #[structopt(long, conflicts_with_all = &["promote", "weight"])]
    pub no_canary: bool,
    /// Makes the present canary the stable model
    #[structopt(long, conflicts_with = "weight")]
    pub promote: bool,
    /// The canary's share in percent, with up to two decimals
    #[structopt(long, value_name = "percent", parse(try_from_str = percent))]
    pub weight: Option<PercentBp>,
    /// advance (every node must vote yes) or reduce (a majority is enough, may only lower) [default: what the change is]
    #[structopt(long, value_name = "kind", parse(try_from_str = kind))]
    pub kind: Option<Kind>,
    /// Your own name for this request: however often it is sent, it is applied once [default: a random one]
    #[structopt(long, value_name = "key", parse(try_from_str = idempotency_key))]
    pub idempotency_key: Option<String>,
}

/// `rollback`.
#[derive(Debug, StructOpt)]
pub struct RollbackArgs {
    /// Only this route [default: every route that has a canary]
    #[structopt(long, value_name = "route")]
    pub route: Option<RouteName>,
    /// Also takes the last promotion back
    #[structopt(long)]
    pub stable: bool,
    /// Shows who has applied it and how long it takes yet, and ends when no canary is served anywhere; told to stop before, exits 5
    #[structopt(short, long)]
    pub watch: bool,
    /// Your own name for this request: however often it is sent, it is applied once [default: a random one]
    #[structopt(long, value_name = "key", parse(try_from_str = idempotency_key))]
    pub idempotency_key: Option<String>,
}

/// `history`.
#[derive(Debug, StructOpt)]
pub struct HistoryArgs {
    /// The first slot to show
    #[structopt(long, value_name = "slot")]
    pub from: Option<Slot>,
    /// How many slots to show at most
    #[structopt(long, value_name = "count")]
    pub limit: Option<u64>,
}

/// `tx`.
#[derive(Debug, StructOpt)]
pub enum TxCommand {
    /// Prints its receipt; exits 0 if it committed, 1 if it was aborted, 4 if that is not settled
    Show {
        /// The transaction, such as node-a-1-7
        #[structopt(value_name = "txid")]
        txid: TxId,
    },
}

/// `members`.
#[derive(Debug, StructOpt)]
pub struct MembersArgs {
    /// What to do; without a word, `list`.
    #[structopt(subcommand)]
    pub command: Option<MembersCommand>,
}

/// What to do with the members.
#[derive(Debug, StructOpt)]
pub enum MembersCommand {
    /// Lists the members, and the learners: nodes that are linked and have no vote; this is what `members` alone does
    List,
    /// Makes a learner a member, as soon as it has caught up and loaded the models; waits for that up to --timeout
    Add(MemberArgs),
    /// Lets a member go: it votes no more and serves stable only; a dead one as soon as its lease has run out, up to --timeout
    Remove(MemberArgs),
}

/// `members add` and `members remove`.
#[derive(Debug, StructOpt)]
pub struct MemberArgs {
    /// The node, by its id in peers.json
    #[structopt(value_name = "node")]
    pub node: NodeId,
    /// Your own name for this request: however often it is sent, it is applied once [default: a random one]
    #[structopt(long, value_name = "key", parse(try_from_str = idempotency_key))]
    pub idempotency_key: Option<String>,
}

/// `log`.
#[derive(Debug, StructOpt)]
pub enum LogCommand {
    /// Prints every record, one JSON object a line
    Dump {
        /// The log, such as logs/node-a.log
        #[structopt(value_name = "file", parse(from_os_str))]
        file: PathBuf,
    },
    /// Says ok, or what is wrong at which offset
    Verify {
        /// The log, such as logs/node-a.log
        #[structopt(value_name = "file", parse(from_os_str))]
        file: PathBuf,
    },
}

/// `peers`.
#[derive(Debug, StructOpt)]
pub enum PeersCommand {
    /// Says ok, or what is wrong with the file
    Check {
        /// The file
        #[structopt(value_name = "file", default_value = "peers.json", parse(from_os_str))]
        file: PathBuf,
        /// A node that must be in it
        #[structopt(long, value_name = "node")]
        id: Option<NodeId>,
    },
}

/// `load`.
#[derive(Debug, StructOpt)]
pub struct LoadArgs {
    /// One JSON object a line: {"label": 7, "request": {…}}, or just the request
    #[structopt(long, value_name = "file", parse(from_os_str))]
    pub file: PathBuf,
    /// Requests per second, over all nodes
    #[structopt(long, value_name = "rate", default_value = "200", parse(try_from_str = rate))]
    pub rate: f64,
    /// Connections to each node
    #[structopt(long, value_name = "count", default_value = "4", parse(try_from_str = connections))]
    pub connections: usize,
    /// How many requests to send; the file is begun again when it ends [default: the file once]
    #[structopt(long, value_name = "count")]
    pub count: Option<u64>,
    /// Where to send them
    #[structopt(long, value_name = "path", default_value = "/predict", parse(try_from_str = path))]
    pub path: String,
    /// Also writes every answer to this file, a line of comma-separated values each: when it was due, sent and answered, and who gave it
    #[structopt(long, value_name = "file", parse(from_os_str))]
    pub trace: Option<PathBuf>,
}

/// `bench`.
#[derive(Debug, StructOpt)]
pub enum BenchCommand {
    /// Commits in a row through all nodes in turn, moving a canary between 1 % and 2 %
    Commit(BenchCommitArgs),
}

/// `bench commit`.
#[derive(Debug, StructOpt)]
pub struct BenchCommitArgs {
    /// How many commits
    #[structopt(long, value_name = "count", default_value = "200")]
    pub count: u64,
    /// The route to move; it must have no canary, and has none afterwards
    #[structopt(long, value_name = "route", default_value = "default")]
    pub route: RouteName,
    /// The model to use as the canary
    #[structopt(long, value_name = "model")]
    pub canary: ModelId,
}

/// `sim`.
#[derive(Debug, StructOpt)]
pub struct SimArgs {
    /// How many seeds to run
    #[structopt(long, value_name = "count", default_value = "1000")]
    pub seeds: u64,
    /// The first of them
    #[structopt(long, value_name = "seed", default_value = "0")]
    pub seed: u64,
    /// How many nodes each run has, up to 16 [default: drawn by each seed]
    #[structopt(long, value_name = "count", parse(try_from_str = nodes))]
    pub nodes: Option<usize>,
    /// Only these actions of a seed's plan, as a minimised failure names them
    #[structopt(long, value_name = "number", use_delimiter = true)]
    pub keep: Option<Vec<usize>>,
    /// Without these parts of a seed's surroundings, as a minimised failure names them
    #[structopt(long, value_name = "part", use_delimiter = true)]
    pub off: Vec<Knob>,
    /// Each seed cuts one node off, in rough weather and with clocks that differ, and says when it last served a canary
    #[structopt(long, conflicts_with = "mutants")]
    pub cuts: bool,
    /// Each seed is a rollout whose driver is killed again and again, and says whether it came to its end
    #[structopt(long, conflicts_with_all = &["cuts", "mutants"])]
    pub drivers: bool,
    /// Makes each of the known mistakes (src/core/mutant.rs) on purpose, and says after how many seeds it was caught, and by what
    #[structopt(long, conflicts_with_all = &["keep", "off"])]
    pub mutants: bool,
    /// Makes this one of those mistakes
    #[structopt(long, value_name = "name", conflicts_with = "mutants")]
    pub mutant: Option<String>,
    /// Shows a failure as it is, without making it small first
    #[structopt(long)]
    pub whole: bool,
    /// How many threads run seeds
    #[structopt(long, value_name = "count", default_value = "1", parse(try_from_str = jobs))]
    pub jobs: usize,
}

fn nodes(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=NODES_MAX) => Ok(count),
        _ => Err(format!("{text:?} is not a number of nodes from 1 to {NODES_MAX}")),
    }
}

fn jobs(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=SIM_JOBS_MAX) => Ok(count),
        _ => Err(format!("{text:?} is not a number of threads from 1 to {SIM_JOBS_MAX}")),
    }
}

fn percent(text: &str) -> Result<PercentBp, String> {
    let number = text.strip_suffix('%').unwrap_or(text).trim();
    let percent = number.parse().map_err(|_| format!("{text:?} is not a percentage, such as 10 or 0.5"))?;
    PercentBp::from_percent(percent)
}

fn kind(text: &str) -> Result<Kind, String> {
    match text {
        "advance" => Ok(Kind::Advance),
        "reduce" => Ok(Kind::Reduce),
        other => Err(format!("{other:?} is neither advance nor reduce")),
    }
}

fn idempotency_key(text: &str) -> Result<String, String> {
    match text.len() {
        1..=IDEMPOTENCY_KEY_BYTES_MAX => Ok(text.to_owned()),
        other => Err(format!("a key has 1 to {IDEMPOTENCY_KEY_BYTES_MAX} bytes, this one has {other}")),
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a time above 0 and up to {TIMEOUT_S_MAX} seconds, such as 5s or 500ms");
    let (number, unit_s) = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(number), _) => (number, 0.001),
        (None, Some(number)) => (number, 1.0),
        (None, None) => (text, 1.0),
    };
    let seconds = number.parse::<f64>().map_err(|_| wrong())? * unit_s;
    if seconds > 0.0 && seconds <= TIMEOUT_S_MAX { Ok(Duration::from_secs_f64(seconds)) } else { Err(wrong()) }
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 && rate <= LOAD_RATE_PER_S_MAX => Ok(rate),
        _ => Err(format!("{text:?} is not a rate above 0 and up to {LOAD_RATE_PER_S_MAX} requests per second")),
    }
}

fn connections(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=LOAD_CONNECTIONS_MAX) => Ok(count),
        _ => Err(format!("{text:?} is not a number of connections from 1 to {LOAD_CONNECTIONS_MAX}")),
    }
}

fn path(text: &str) -> Result<String, String> {
    let wrong = || format!("{text:?} is not a path that begins with '/'");
    if !text.starts_with('/') {
        return Err(wrong());
    }
    text.parse::<http::Uri>().map(|_| text.to_owned()).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Cli {
        Cli::from_iter_safe(line.split(' ')).unwrap()
    }

    #[test]
    fn global_options_stand_before_or_after_the_command() {
        for line in [
            "canary-mesh --endpoint a:1 --endpoint b:2 --output json --timeout 500ms --no-color tx show node-a-1-7",
            "canary-mesh tx show node-a-1-7 --endpoint a:1 --endpoint b:2 --output json --timeout 500ms --no-color",
            "canary-mesh --output json tx --endpoint a:1 --endpoint b:2 show --timeout 0.5 --no-color node-a-1-7",
        ] {
            let global = parsed(line).global;
            let endpoints: Vec<_> = global.endpoints.iter().map(ToString::to_string).collect();
            assert_eq!(endpoints, ["a:1", "b:2"], "{line}");
            assert_eq!((global.output, global.timeout, global.no_color), (Format::Json, Duration::from_millis(500), true), "{line}");
        }
        let global = parsed("canary-mesh status").global;
        assert_eq!((global.endpoints.len(), global.output, global.timeout), (0, Format::Table, Duration::from_secs(10)));
    }

    #[test]
    fn serve_reads_its_places_and_has_defaults() {
        let Command::Serve(args) =
            parsed("canary-mesh serve --id node-a --logs /l --join --fault kill-before-vote --log-level debug").command
        else {
            panic!("not serve");
        };
        let expected = ServeArgs {
            id: NodeId::new("node-a").unwrap(),
            peers: "peers.json".into(),
            models: "models".into(),
            logs: "/l".into(),
            join: true,
            fault: Some(Fault::BeforeVote),
            log_level: log::LevelFilter::Debug,
        };
        assert_eq!(args, expected);
    }

    #[test]
    fn shares_are_percent_with_two_decimals() {
        assert_eq!(percent("10"), Ok(PercentBp(1_000)));
        assert_eq!(percent("0.25%"), Ok(PercentBp(25)));
        for wrong in ["ten", "100.01", "-1", "0.123", "NaN", "inf", ""] {
            assert!(percent(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times_have_units_and_bounds() {
        assert_eq!(duration("2"), Ok(Duration::from_secs(2)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1_500)));
        for wrong in ["0", "-1s", "NaN", "soon", "1h", "3601", ""] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_makes_no_sense_together_is_refused() {
        for line in [
            "canary-mesh propose --canary v2 --promote",
            "canary-mesh propose --promote --weight 5",
            "canary-mesh propose --no-canary --weight 5",
            "canary-mesh propose --no-canary --canary v2",
            "canary-mesh propose --kind config --weight 5",
            "canary-mesh load --file f --rate 0",
            "canary-mesh load --file f --connections 0",
            "canary-mesh load --file f --path predict",
            "canary-mesh load --file f --count -1",
            "canary-mesh tx show seven",
            "canary-mesh members add",
            "canary-mesh members remove a/b",
            "canary-mesh members replace node-a",
            "canary-mesh serve",
            "canary-mesh serve --id a/b",
            "canary-mesh completions csh",
            "canary-mesh",
            "canary-mesh frobnicate",
        ] {
            assert!(Cli::from_iter_safe(line.split(' ')).is_err(), "{line}");
        }
    }
}
