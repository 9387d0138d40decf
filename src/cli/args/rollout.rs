//! The words of `rollout`.

use std::path::PathBuf;
use std::str::FromStr;

use structopt::StructOpt;

use super::{idempotency_key, percent};
use crate::api::{PercentBp, StepRequest};
use crate::core::ids::{ModelId, RouteName};
use crate::core::rollout::{GATE_TIMEOUT_MS_MAX, Number, OnInconclusive, Pause, Question, ROLLOUT_MS_MAX, RolloutId};

const START_HELP: &str = "Examples:\n    \
    canary-mesh rollout start --model digits-v2 --watch\n    \
    canary-mesh rollout start --model digits-v2 --steps 1,10,50:pause=10m,100:pause --bake 1m --mirror 5\n    \
    canary-mesh rollout start --model digits-v2 --prometheus 'errors=http://prom:9090|sum(rate(errors_total[1m]))|<=0.5'\n    \
    canary-mesh rollout start --model search=ranker-7 --model ads=ranker-7 --webhook bell=http://bell:8080/ring\n\n\
    With --watch: exits 0 when it is promoted, 1 when it is taken back, 5 when it is watched no longer (SIGINT), which leaves it running. \
    On a terminal one picture is redrawn. Elsewhere each change is a line on standard error, and the end goes to standard output; with \
    --output json that is one document, the rollout as GET /rollouts/{id} has it and its outcome: promoted, rolled_back, or null.";

/// `rollout`.
#[derive(Debug, StructOpt)]
pub enum RolloutCommand {
    /// Starts a rollout: the canary's share rises step by step on all nodes while the health gates allow it, up to the promotion
    #[structopt(after_help = START_HELP)]
    Start(Box<StartArgs>),
    /// Lists the rollouts: those that are over, the one under way, those that wait
    List,
    /// Shows how far a rollout is, and how each node judges it
    Show(ShowArgs),
    /// Has a rollout stand still at its step
    Pause(PauseArgs),
    /// Has a rollout go on that stands still
    Resume(ActArgs),
    /// Has a rollout take its next step at once
    Promote(PromoteArgs),
    /// Takes a rollout back: needs a majority only, whatever the health gates say
    Abort(AbortArgs),
    /// Starts the same rollout once more, under a new name
    Retry(RetryArgs),
    /// Makes the stable models again what they were before the last promotion
    Undo(UndoArgs),
}

/// `rollout start`.
#[derive(Debug, Default, StructOpt)]
pub struct StartArgs {
    /// The new model: MODEL for one route, or ROUTE=MODEL, repeatable, for several that switch together
    #[structopt(long = "model", value_name = "model", number_of_values = 1, required_unless = "file")]
    pub models: Vec<RoutedModel>,
    /// The route of a model without one [default: default]
    #[structopt(long, value_name = "route")]
    pub route: Option<RouteName>,
    /// The canary's shares in percent, rising; 50:pause stops at 50 % until resumed or promoted, 50:pause=10m for ten minutes
    /// [default: 1,10,50,100]
    #[structopt(long, value_name = "steps")]
    pub steps: Option<Steps>,
    /// Shortest time at each step: 30s, 5m, 2h, 1d; plain numbers are seconds [default: 30s]
    #[structopt(long, value_name = "time", parse(try_from_str = span))]
    pub bake: Option<u64>,
    /// Time at a step after which --on-inconclusive counts [default: ten times --bake]
    #[structopt(long, value_name = "time", parse(try_from_str = span))]
    pub bake_max: Option<u64>,
    /// What becomes of a step at which too little has been seen by then: wait, advance or abort [default: wait]
    #[structopt(long, value_name = "what", parse(try_from_str = on_inconclusive))]
    pub on_inconclusive: Option<OnInconclusive>,
    /// Share of stable's requests that the canary gets a copy of, to compare the answers; the rollout then begins with a step of 0 %
    #[structopt(long, value_name = "percent", parse(try_from_str = percent))]
    pub mirror: Option<PercentBp>,
    /// Smallest share of mirrored requests that both models answer alike
    #[structopt(long, value_name = "percent", parse(try_from_str = percent))]
    pub agreement_min: Option<PercentBp>,
    /// A request slower than this is bad, in milliseconds [default: stable's own 99th percentile of the last hour]
    #[structopt(long, value_name = "ms", parse(try_from_str = latency))]
    pub latency_max: Option<u64>,
    /// How probable it may be that a canary that is no worse is taken back: half of it for the nodes, half for their sum
    #[structopt(long, value_name = "percent", parse(try_from_str = alpha))]
    pub alpha: Option<Alpha>,
    /// The gate reports and never vetoes
    #[structopt(long)]
    pub dry_run: bool,
    /// Takes the rollout back when it has not moved for so long and is not paused
    #[structopt(long, value_name = "time", parse(try_from_str = span))]
    pub progress_deadline: Option<u64>,
    /// [NAME=]URL, repeatable: asked by POST before each next step; 200 to 202 is a yes
    #[structopt(long = "webhook", value_name = "webhook", number_of_values = 1)]
    pub webhooks: Vec<Webhook>,
    /// 'NAME=URL|QUERY|BOUNDS', repeatable: a Prometheus query whose one number must be within the bounds before each next step;
    /// BOUNDS is <=MAX, >=MIN or both with a comma
    #[structopt(long = "prometheus", value_name = "query", number_of_values = 1)]
    pub prometheus: Vec<Prometheus>,
    /// How long an answer of these may take [default: 5s]
    #[structopt(long, value_name = "time", parse(try_from_str = gate_timeout))]
    pub gate_timeout: Option<u64>,
    /// The JSON of POST /rollouts instead of all these; - is standard input
    #[structopt(long, value_name = "file", parse(from_os_str), conflicts_with_all = &["models", "route", "steps", "bake", "bake-max",
        "on-inconclusive", "mirror", "agreement-min", "latency-max", "alpha", "dry-run", "progress-deadline", "webhooks", "prometheus",
        "gate-timeout"])]
    pub file: Option<PathBuf>,
    /// Your own name for this request: however often it is sent, it is applied once [default: a random one]
    #[structopt(long, value_name = "key", parse(try_from_str = idempotency_key))]
    pub idempotency_key: Option<String>,
    /// Shows how it goes until it is over
    #[structopt(short, long)]
    pub watch: bool,
}

/// `rollout show`.
#[derive(Debug, StructOpt)]
pub struct ShowArgs {
    /// The rollout, such as r7 [default: the one that is running or paused]
    #[structopt(value_name = "id")]
    pub id: Option<RolloutId>,
    /// Shows how it goes until it is over; exits 0 when it is promoted, 1 when it is taken back, 5 when told to stop before
    #[structopt(short, long)]
    pub watch: bool,
}

/// `rollout resume`.
#[derive(Debug, StructOpt)]
pub struct ActArgs {
    /// The rollout, such as r7 [default: the one that is running or paused]
    #[structopt(value_name = "id")]
    pub id: Option<RolloutId>,
    /// Your own name for this request: however often it is sent, it is applied once [default: a random one]
    #[structopt(long, value_name = "key", parse(try_from_str = idempotency_key))]
    pub idempotency_key: Option<String>,
}

/// `rollout pause`.
#[derive(Debug, StructOpt)]
pub struct PauseArgs {
    /// Which, and under which key.
    #[structopt(flatten)]
    pub act: ActArgs,
    /// It goes on by itself after so long [default: when it is resumed or promoted]
    #[structopt(long = "for", value_name = "time", parse(try_from_str = span))]
    pub for_ms: Option<u64>,
}

/// `rollout promote`.
#[derive(Debug, StructOpt)]
pub struct PromoteArgs {
    /// Which, and under which key.
    #[structopt(flatten)]
    pub act: ActArgs,
    /// To the end at once, whatever steps are left
    #[structopt(long)]
    pub full: bool,
}

/// `rollout abort`.
#[derive(Debug, StructOpt)]
pub struct AbortArgs {
    /// Which, and under which key.
    #[structopt(flatten)]
    pub act: ActArgs,
    /// Why; others see it
    #[structopt(long, value_name = "text")]
    pub reason: Option<String>,
    /// Shows who has applied it, and ends when its canary is served nowhere; told to stop before, exits 5
    #[structopt(short, long)]
    pub watch: bool,
}

/// `rollout retry`.
#[derive(Debug, StructOpt)]
pub struct RetryArgs {
    /// The rollout, such as r7
    #[structopt(value_name = "id")]
    pub id: RolloutId,
    /// Shows how the new one goes until it is over; exits like start --watch
    #[structopt(short, long)]
    pub watch: bool,
    /// Your own name for this request: however often it is sent, it is applied once [default: a random one]
    #[structopt(long, value_name = "key", parse(try_from_str = idempotency_key))]
    pub idempotency_key: Option<String>,
}

/// `rollout undo`.
#[derive(Debug, StructOpt)]
pub struct UndoArgs {
    /// What they were at this routing version (see history) [default: before the last promotion]
    #[structopt(long, value_name = "version")]
    pub to_version: Option<u64>,
    /// Only this route [default: all that differ, or that the last promotion switched]
    #[structopt(long, value_name = "route")]
    pub route: Option<RouteName>,
    /// Shows how it goes until it is over, or in force everywhere; told to stop before, exits 5
    #[structopt(short, long)]
    pub watch: bool,
    /// Your own name for this request: however often it is sent, it is applied once [default: a random one]
    #[structopt(long, value_name = "key", parse(try_from_str = idempotency_key))]
    pub idempotency_key: Option<String>,
}

/// `MODEL` or `ROUTE=MODEL`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoutedModel {
    /// Its route, if it was said.
    pub route: Option<RouteName>,
    /// The model.
    pub model: ModelId,
}

impl FromStr for RoutedModel {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (route, model) = match text.split_once('=') {
            Some((route, model)) => (Some(route.parse::<RouteName>().map_err(|error| error.to_string())?), model),
            None => (None, text),
        };
        Ok(RoutedModel { route, model: model.parse::<ModelId>().map_err(|error| error.to_string())? })
    }
}

/// `1,10,50:pause=10m,100`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Steps(pub Vec<StepRequest>);

impl FromStr for Steps {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        text.split(',').map(step).collect::<Result<_, _>>().map(Steps)
    }
}

fn step(text: &str) -> Result<StepRequest, String> {
    let (share, pause) = match text.split_once(':') {
        None => (text, None),
        Some((share, "pause")) => (share, Some(Pause { for_ms: None })),
        Some((share, stop)) => {
            let time =
                stop.strip_prefix("pause=").ok_or_else(|| format!("{text:?} is not a step, such as 50, 50:pause or 50:pause=10m"))?;
            (share, Some(Pause { for_ms: Some(span(time)?) }))
        }
    };
    Ok(StepRequest { weight_percent: percent(share)?, pause })
}

/// How probable a false veto may be, in halves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alpha {
    /// By some node's own numbers.
    pub local: PercentBp,
    /// By the sum of all.
    pub fleet: PercentBp,
}

fn alpha(text: &str) -> Result<Alpha, String> {
    let PercentBp(whole) = percent(text)?;
    let local = whole / 2;
    match local {
        0 => Err(format!("{text:?} is too small: half of it must be 0.01 % at least")),
        _ => Ok(Alpha { local: PercentBp(local), fleet: PercentBp(whole.saturating_sub(local)) }),
    }
}

/// `[NAME=]URL`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Webhook {
    /// Its name, if it was said.
    pub name: Option<ModelId>,
    /// Where.
    pub url: String,
}

impl FromStr for Webhook {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        // A URL may hold an equals sign itself, but not before its scheme.
        let (name, url) = match text.split_once('=') {
            Some((name, url)) if !name.contains("://") => (Some(gate_name(name)?), url),
            _ => (None, text),
        };
        Ok(Webhook { name, url: gate_url(url)? })
    }
}

/// `NAME=URL|QUERY|BOUNDS`. A query may hold a bar itself, as regular expressions do: the first bar ends the URL, the last begins the bounds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prometheus {
    /// Its name.
    pub name: ModelId,
    /// What is asked.
    pub question: Question,
}

impl FromStr for Prometheus {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("{text:?} is not NAME=URL|QUERY|BOUNDS, such as 'errors=http://prom:9090|sum(rate(errors_total[1m]))|<=0.5'");
        let (place, rest) = text.split_once('|').ok_or_else(wrong)?;
        let (query, bounds) = rest.rsplit_once('|').ok_or_else(wrong)?;
        let (name, url) = place.split_once('=').filter(|(name, _)| !name.contains("://")).ok_or_else(wrong)?;
        let query = query.trim();
        if query.is_empty() {
            return Err(wrong());
        }
        let (mut min, mut max) = (None, None);
        for bound in bounds.split(',').map(str::trim) {
            let (kept, number) = match (bound.strip_prefix("<="), bound.strip_prefix(">=")) {
                (Some(number), _) => (&mut max, number),
                (_, Some(number)) => (&mut min, number),
                (None, None) => return Err(format!("{bound:?} is not a bound, such as <=0.5 or >=10")),
            };
            let number = number.trim().parse::<f64>().ok().and_then(|number| Number::try_from(number).ok());
            let number = number.ok_or_else(|| format!("{bound:?} has no number that could bound anything"))?;
            if kept.replace(number).is_some() {
                return Err(format!("{bounds:?} bounds the same side twice"));
            }
        }
        if min.zip(max).is_some_and(|(min, max)| f64::from(min) > f64::from(max)) {
            return Err(format!("nothing is within {bounds:?}"));
        }
        Ok(Prometheus { name: gate_name(name)?, question: Question::Prometheus { url: gate_url(url)?, query: query.to_owned(), min, max } })
    }
}

fn gate_name(text: &str) -> Result<ModelId, String> {
    let wrong = |_| format!("{text:?} cannot name a gate: letters, digits, '.', '_' and '-', up to 64, beginning with a letter or digit");
    text.parse().map_err(wrong)
}

fn gate_url(text: &str) -> Result<String, String> {
    if text.starts_with("https://") {
        return Err(format!("{text:?} asks for TLS, which the nodes do not speak; use http://"));
    }
    let fits = text.strip_prefix("http://").is_some_and(|rest| !rest.is_empty()) && text.parse::<http::Uri>().is_ok();
    if fits { Ok(text.to_owned()) } else { Err(format!("{text:?} is not a URL, such as http://host:8080/path")) }
}

fn on_inconclusive(text: &str) -> Result<OnInconclusive, String> {
    match text {
        "wait" => Ok(OnInconclusive::Wait),
        "advance" => Ok(OnInconclusive::Advance),
        "abort" => Ok(OnInconclusive::Abort),
        other => Err(format!("{other:?} is none of wait, advance and abort")),
    }
}

fn latency(text: &str) -> Result<u64, String> {
    match text.strip_suffix("ms").unwrap_or(text).trim().parse() {
        Ok(ms @ 1..) => Ok(ms),
        _ => Err(format!("{text:?} is not a whole number of milliseconds, 1 at least")),
    }
}

fn gate_timeout(text: &str) -> Result<u64, String> {
    match span(text)? {
        ms @ 1..=GATE_TIMEOUT_MS_MAX => Ok(ms),
        _ => Err(format!("{text:?} is not a time above 0 and up to {} seconds", GATE_TIMEOUT_MS_MAX / 1_000)),
    }
}

/// A time as rollouts have it, in milliseconds.
fn span(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a time up to 30 days, such as 500ms, 30s, 10m, 2h or 1d; plain numbers are seconds");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit_ms = match text.strip_prefix(digits) {
        Some("ms") => 1.0,
        Some("s" | "") => 1e3,
        Some("m") => 60e3,
        Some("h") => 3_600e3,
        Some("d") => 86_400e3,
        _ => return Err(wrong()),
    };
    let ms = digits.parse::<f64>().map_err(|_| wrong())? * unit_ms;
    if (0.0..=ROLLOUT_MS_MAX as f64).contains(&ms) { Ok(ms.round() as u64) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::{Cli, Command};

    fn parsed(line: &str) -> Result<RolloutCommand, String> {
        match Cli::from_iter_safe(format!("canary-mesh rollout {line}").split(' ')) {
            Ok(Cli { command: Command::Rollout(command), .. }) => Ok(command),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.message),
        }
    }

    #[test]
    fn times_may_be_up_to_thirty_days() {
        for (text, ms) in
            [("0", 0), ("500ms", 500), ("2", 2_000), ("1.5s", 1_500), ("10m", 600_000), ("2h", 7_200_000), ("30d", ROLLOUT_MS_MAX)]
        {
            assert_eq!(span(text), Ok(ms), "{text}");
        }
        for wrong in ["", "s", "-1s", "soon", "31d", "1w", "1h30m", "NaN", "inf", "1 h"] {
            assert!(span(wrong).unwrap_err().contains("30 days"), "{wrong}");
        }
    }

    #[test]
    fn a_step_is_a_share_and_perhaps_a_stop() {
        let Steps(steps) = "0,1,10.5%,50:pause,75:pause=10m,100".parse().unwrap();
        let shares: Vec<u16> = steps.iter().map(|step| step.weight_percent.0).collect();
        assert_eq!(shares, [0, 100, 1_050, 5_000, 7_500, 10_000]);
        let pauses: Vec<_> = steps.iter().map(|step| step.pause.map(|pause| pause.for_ms)).collect();
        assert_eq!(pauses, [None, None, None, Some(None), Some(Some(600_000)), None]);
        for (wrong, said) in [
            ("", "not a percentage"),
            ("1,,2", "not a percentage"),
            ("101", "not a percentage between"),
            ("50:stop", "is not a step, such as 50, 50:pause or 50:pause=10m"),
            ("50:pause=", "is not a time"),
            ("50:pause=soon", "is not a time"),
        ] {
            assert!(wrong.parse::<Steps>().unwrap_err().contains(said), "{wrong}");
        }
    }

    #[test]
    fn a_prometheus_gate_has_a_name_a_place_a_query_and_a_bound() {
        let read = |text: &str| text.parse::<Prometheus>();
        let number = |number: f64| Number::try_from(number).ok();
        let Prometheus { name, question } = read("errors=http://prom:9090|sum(rate(x{code=~\"5..|4..\"}[1m]))|>=-1, <=0.5").unwrap();
        let url = "http://prom:9090".to_owned();
        let query = "sum(rate(x{code=~\"5..|4..\"}[1m]))".to_owned();
        assert_eq!((name.as_str(), question), ("errors", Question::Prometheus { url, query, min: number(-1.0), max: number(0.5) }));
        for (wrong, said) in [
            ("errors=http://prom:9090", "is not NAME=URL|QUERY|BOUNDS"),
            ("errors=http://prom:9090|up", "is not NAME=URL|QUERY|BOUNDS"),
            ("http://prom:9090?a=b|up|<=1", "is not NAME=URL|QUERY|BOUNDS"),
            ("errors=http://prom:9090||<=1", "is not NAME=URL|QUERY|BOUNDS"),
            ("errors=http://prom:9090|up|<1", "\"<1\" is not a bound"),
            ("errors=http://prom:9090|up|<=NaN", "has no number"),
            ("errors=http://prom:9090|up|<=1,<=2", "the same side twice"),
            ("errors=http://prom:9090|up|>=2,<=1", "nothing is within"),
            ("errors=https://prom|up|<=1", "asks for TLS"),
            ("errors=prom:9090|up|<=1", "is not a URL"),
            ("a b=http://prom|up|<=1", "cannot name a gate"),
        ] {
            assert!(read(wrong).unwrap_err().contains(said), "{wrong}: {:?}", read(wrong));
        }
    }

    #[test]
    fn a_webhook_may_have_a_name() {
        let read = |text: &str| text.parse::<Webhook>().map(|hook| (hook.name.map(|name| name.to_string()), hook.url));
        assert_eq!(read("bell=http://bell:80/ring?a=b"), Ok((Some("bell".into()), "http://bell:80/ring?a=b".into())));
        assert_eq!(read("http://bell:80/ring?a=b"), Ok((None, "http://bell:80/ring?a=b".into())));
        for wrong in ["", "bell", "bell=", "=http://bell", "bell=https://bell", "bell=http://"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn alpha_is_shared_by_the_nodes_and_their_sum() {
        assert_eq!(alpha("5"), Ok(Alpha { local: PercentBp(250), fleet: PercentBp(250) }));
        assert_eq!(alpha("0.03"), Ok(Alpha { local: PercentBp(1), fleet: PercentBp(2) }));
        assert!(alpha("0.01").unwrap_err().contains("too small"));
    }

    #[test]
    fn a_model_may_name_its_route() {
        let read = |text: &str| text.parse::<RoutedModel>().map(|routed| (routed.route.map(|r| r.to_string()), routed.model.to_string()));
        assert_eq!(read("digits-v2"), Ok((None, "digits-v2".into())));
        assert_eq!(read("ads=digits-v2"), Ok((Some("ads".into()), "digits-v2".into())));
        for wrong in ["", "=m", "ads=", "a=b=c", "a b"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_words() {
        for (line, said) in [
            ("", "canary-mesh rollout"),
            ("start", "--model"),
            ("start --file f --model m", "cannot be used with"),
            ("start --file f --bake 1m", "cannot be used with"),
            ("start --file f --webhook http://w:1", "cannot be used with"),
            ("start --model m --on-inconclusive panic", "none of wait, advance and abort"),
            ("start --model m --latency-max 0", "1 at least"),
            ("start --model m --gate-timeout 61s", "up to 60 seconds"),
            ("start --model m --mirror 101", "not a percentage"),
            ("start --model m --idempotency-key=", "1 to 128 bytes"),
            ("show 7", "is not a rollout: r and a number, such as r7"),
            ("pause r7 --for ever", "is not a time"),
            ("resume r7 --full", "--full"),
            ("retry", "<id>"),
            ("undo --to-version x", "invalid digit"),
            ("frobnicate", "frobnicate"),
        ] {
            let refused = parsed(line).unwrap_err();
            assert!(refused.contains(said), "{line}: {refused}");
        }
        assert!(matches!(parsed("start --file - --watch --idempotency-key k"), Ok(RolloutCommand::Start(args)) if args.watch));
        assert!(matches!(
            parsed("pause --for 10m"),
            Ok(RolloutCommand::Pause(PauseArgs { for_ms: Some(600_000), act: ActArgs { id: None, .. } }))
        ));
    }
}
