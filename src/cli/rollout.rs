//! `rollout`: a new model on its way to all traffic, and what is done to it there.

mod known;
mod request;
mod view;
mod watch;

use serde::Serialize;

use crate::api::{Outcome, RolloutActionRequest, RolloutList, RolloutReceipt, RolloutStatus, Routing, UndoRequest};
use crate::cli::args::{RolloutCommand, ShowArgs, StartArgs};
use crate::cli::client::Mesh;
use crate::cli::countdown;
use crate::cli::interrupt::Interrupt;
use crate::cli::output::{Console, Field, counted};
use crate::cli::propose::route_of;
use crate::cli::receipt::{IN_FORCE, conclude, failure, key_or_random, send, tell};
use crate::cli::{Exit, Failure, Surroundings};
use crate::core::rollout::RolloutId;
use crate::http::RolloutAction;

pub use known::{drives, is_under_way};
pub use view::{summary, tone};

const PATH: &str = "/rollouts";

/// Does what the word behind `rollout` says.
pub async fn run(command: RolloutCommand, mesh: Mesh, around: &Surroundings, console: &mut Console<'_>) -> Result<Exit, Failure> {
    let plain = RolloutActionRequest::default;
    match command {
        RolloutCommand::Start(args) => start(*args, mesh, around, console).await,
        RolloutCommand::List => list(mesh, console).await,
        RolloutCommand::Show(args) => show(args, mesh, around, console).await,
        RolloutCommand::Pause(args) => {
            let request = RolloutActionRequest { for_ms: args.for_ms, idempotency_key: args.act.idempotency_key, ..plain() };
            act(RolloutAction::Pause, args.act.id, request, Then::Tell, mesh, around, console).await
        }
        RolloutCommand::Resume(args) => {
            let request = RolloutActionRequest { idempotency_key: args.idempotency_key, ..plain() };
            act(RolloutAction::Resume, args.id, request, Then::Tell, mesh, around, console).await
        }
        RolloutCommand::Promote(args) => {
            let request = RolloutActionRequest { full: args.full, idempotency_key: args.act.idempotency_key, ..plain() };
            act(RolloutAction::Promote, args.act.id, request, Then::Tell, mesh, around, console).await
        }
        RolloutCommand::Abort(args) => {
            let request = RolloutActionRequest { reason: args.reason, idempotency_key: args.act.idempotency_key, ..plain() };
            let then = if args.watch { Then::CountDown } else { Then::Tell };
            act(RolloutAction::Abort, args.act.id, request, then, mesh, around, console).await
        }
        RolloutCommand::Retry(args) => {
            let request = RolloutActionRequest { idempotency_key: args.idempotency_key, ..plain() };
            let then = if args.watch { Then::Watch } else { Then::Tell };
            act(RolloutAction::Retry, Some(args.id), request, then, mesh, around, console).await
        }
        RolloutCommand::Undo(args) => {
            let key = key_or_random(args.idempotency_key);
            let request = UndoRequest { to_version: args.to_version, route: args.route, idempotency_key: Some(key.clone()) };
            let then = if args.watch { Then::Watch } else { Then::Tell };
            let mut mesh = mesh;
            let (at, _) = awake(&mut mesh).await?;
            let order = Order { at, path: format!("{PATH}/undo"), request, key, goal: IN_FORCE.into(), then };
            carry_out(order, mesh, around, console).await
        }
    }
}

/// What comes after a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// The receipt, and no more.
    Tell,
    /// How the rollout goes; where none came of it, who has applied it.
    Watch,
    /// Who has applied it, until the goal is reached.
    CountDown,
}

/// Something to be sent, once.
struct Order<R> {
    /// To which node.
    at: usize,
    path: String,
    request: R,
    key: String,
    goal: String,
    then: Then,
}

async fn carry_out<R: Serialize>(
    order: Order<R>,
    mut mesh: Mesh,
    around: &Surroundings,
    console: &mut Console<'_>,
) -> Result<Exit, Failure> {
    let Order { at, path, request, key, goal, then } = order;
    let interrupt = if then == Then::Tell { Interrupt::default() } else { Interrupt::listen(around) };
    let Some(client) = mesh.clients.get_mut(at) else { return Err(Failure::usage("there is no such node")) };
    let answered: RolloutReceipt = send(client, &path, &request).await.map_err(|error| failure(error, &key))?;
    let RolloutReceipt { rollout, receipt } = &answered;
    if then == Then::Tell {
        return Ok(conclude(client, answered, &key, &goal, console).await);
    }
    if receipt.outcome != Outcome::Committed {
        return Ok(tell(&answered, &client.target.endpoint, &key, &goal, console));
    }
    match rollout {
        Some(id) if then == Then::Watch => {
            console.say(&format!("rollout {id}: asked for by transaction {}, which is committed", receipt.txid));
            watch::watch(*id, mesh, &interrupt, console).await
        }
        _ => Ok(countdown::watch(answered.receipt, mesh, &goal, &interrupt, around, console).await),
    }
}

/// The first node that answers. One that hangs must not hold up what is urgent.
async fn awake(mesh: &mut Mesh) -> Result<(usize, Routing), Failure> {
    let found = mesh.find("/routing", Some).await?;
    found.ok_or_else(|| Failure::refused("no node says what it routes by"))
}

async fn start(args: StartArgs, mut mesh: Mesh, around: &Surroundings, console: &mut Console<'_>) -> Result<Exit, Failure> {
    let then = if args.watch { Then::Watch } else { Then::Tell };
    let mut request = request::request(args)?;
    let key = key_or_random(request.idempotency_key.take());
    request.idempotency_key = Some(key.clone());
    let (at, routing) = awake(&mut mesh).await?;
    for route in request.routes.keys() {
        route_of(&routing, route)?;
    }
    carry_out(Order { at, path: PATH.into(), request, key, goal: IN_FORCE.into(), then }, mesh, around, console).await
}

async fn act(
    action: RolloutAction,
    id: Option<RolloutId>,
    mut request: RolloutActionRequest,
    then: Then,
    mut mesh: Mesh,
    around: &Surroundings,
    console: &mut Console<'_>,
) -> Result<Exit, Failure> {
    let (at, id) = match id {
        Some(id) => (awake(&mut mesh).await?.0, id),
        None => mesh.find::<RolloutList, _>(PATH, |list| under_way(&list)).await?.ok_or_else(none_under_way)?,
    };
    let key = key_or_random(request.idempotency_key.take());
    request.idempotency_key = Some(key.clone());
    let goal = match action {
        RolloutAction::Abort => format!("no canary of rollout {id} anywhere"),
        RolloutAction::Pause => format!("rollout {id} stands still everywhere"),
        _ => IN_FORCE.to_owned(),
    };
    carry_out(Order { at, path: format!("{PATH}/{id}/{}", action.word()), request, key, goal, then }, mesh, around, console).await
}

/// The one that is running or paused.
fn under_way(list: &RolloutList) -> Option<RolloutId> {
    let mut under_way = list.rollouts.iter().filter(|rollout| is_under_way(rollout));
    under_way.next().filter(|_| under_way.next().is_none()).map(|rollout| rollout.id)
}

fn none_under_way() -> Failure {
    Failure::refused("no rollout is running or paused, so say which one is meant; canary-mesh rollout list has those that are remembered")
}

async fn list(mut mesh: Mesh, console: &mut Console<'_>) -> Result<Exit, Failure> {
    let seen = known::look(&mut mesh).await?;
    let Some(known) = known::newest(&seen) else { return Err(none_under_way()) };
    console.data(&known.list, |console| {
        let rollouts = &known.list.rollouts;
        if rollouts.is_empty() {
            return console.line("no rollouts yet; canary-mesh rollout start --model MODEL begins one");
        }
        let rows = rollouts.iter().map(|rollout| {
            vec![
                Field::text(rollout.id),
                Field::text(rollout.status).toned(tone(rollout.status)),
                Field::text(view::routes(rollout)),
                Field::maybe(view::place(rollout)),
                Field::maybe(rollout.driver.as_ref()),
                Field::maybe(rollout.reason.as_ref()),
            ]
        });
        console.table(&["rollout", "status", "routes", "step", "driver", "reason"], rows);
        let waiting = rollouts.iter().filter(|rollout| rollout.status == RolloutStatus::Queued).count();
        let waiting = if waiting == 0 { String::new() } else { format!(", {waiting} of them waiting") };
        console.line(&format!("{}{waiting}, as {} sees it", counted(rollouts.len() as u64, "rollout"), known.list.node));
    });
    Ok(Exit::Ok)
}

async fn show(args: ShowArgs, mut mesh: Mesh, around: &Surroundings, console: &mut Console<'_>) -> Result<Exit, Failure> {
    let interrupt = if args.watch { Interrupt::listen(around) } else { Interrupt::default() };
    let seen = known::look(&mut mesh).await?;
    let id = match args.id {
        Some(id) => id,
        None => known::newest(&seen).and_then(|known| under_way(&known.list)).ok_or_else(none_under_way)?,
    };
    let Some((known, rollout)) = known::believed(&seen, id) else {
        let hint = "canary-mesh rollout list has those that are remembered";
        return Err(Failure::refused(format!("there is no rollout {id}, or it is forgotten; {hint}")));
    };
    if args.watch {
        return watch::watch(id, mesh, &interrupt, console).await;
    }
    let voices = known::voices(&mesh, &seen);
    let scene = view::Scene { rollout, age: known.at.elapsed(), voices: &voices };
    console.data(rollout, |console| scene.print(console));
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests;
