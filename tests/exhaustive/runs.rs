//! The runs. What is large runs by `scripts/exhaustive.sh`, in a release build.

use std::sync::atomic::Ordering;
use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model};

use crate::model::{Action, Limit, Settings, Sync, Wish};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap())
}

/// Explores all there is, or stops at the first failure or after `seconds`.
fn explore(name: &str, settings: &Settings, seconds: u64) -> bool {
    let (started, limit) = (Instant::now(), Limit::seconds(seconds));
    let settings = Settings { limit: limit.clone(), ..settings.clone() };
    let checker = settings.checker().finish_when(HasDiscoveries::AnyFailures).spawn_dfs().join();
    let (took, unique) = (started.elapsed(), checker.unique_state_count());
    let whole = !limit.was_hit.load(Ordering::Relaxed);
    println!(
        "{name}: {unique} states, {} steps, depth {}, {:.1} s, {}",
        checker.state_count(),
        checker.max_depth(),
        took.as_secs_f64(),
        if whole { "to the end" } else { "NOT to the end" }
    );
    let mut found: Vec<_> = checker.discoveries().into_iter().collect();
    found.sort_by_key(|(name, _)| *name);
    for (property, path) in found {
        println!("  {property}: {} steps", path.clone().into_actions().len());
        if !property.starts_with("(reached)") {
            for (world, action) in path.into_vec() {
                println!("    {world:?}");
                match action {
                    Some(Action::Deliver(place)) => println!("    -> {:?}", world.parcels[place]),
                    action => println!("    -> {action:?}"),
                }
            }
        }
    }
    whole
}

#[test]
fn probe() {
    let wishes = std::env::var("WISHES").unwrap_or("a20 c30".into());
    let wish = |text: &str| {
        let at = usize::from(text.as_bytes()[1] - b'a');
        match &text[..1] {
            "A" => Wish::Advance(at, 20 + at as u16),
            "K" => Wish::Keyed(at, 20 + at as u16),
            "R" => Wish::Reduce(at),
            _ => Wish::Remove(at),
        }
    };
    let wishes: Vec<_> = wishes.split(' ').map(wish).collect();
    let mut settings = Settings::new(&wishes);
    settings.timeouts = number("T", 0) as u8;
    settings.crashes = number("C", 0) as u8;
    settings.cuts = number("CUTS", 0) as u8;
    settings.in_order = number("ORDER", 0) == 1;
    settings.late_timers = number("LATE", 0) == 1;
    settings.sync = if number("SYNC", 0) == 1 { Sync::AnyTime } else { Sync::AsTheShell };
    explore("probe", &settings, number("S", 60));
}
