//! Rules of the house that a compiler does not keep.

use std::fs;
use std::path::{Path, PathBuf};

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] })
        .filter(|path| path.extension() == Some("rs".as_ref()))
        .collect()
}

fn offenders(folder: &str, forbidden: &[&str]) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let files = sources(&root);
    assert!(!files.is_empty(), "{folder} has no sources");
    let mut found = Vec::new();
    for file in files.into_iter().filter(|file| !file.ends_with("transcripts.rs")) {
        let text = fs::read_to_string(&file).unwrap();
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        for (number, line) in code.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//")) {
            if let Some(word) = forbidden.iter().find(|word| line.contains(**word)) {
                found.push(format!("{}:{}: {word}", file.display(), number + 1));
            }
        }
    }
    found
}

#[test]
fn the_core_has_no_io_no_clock_no_randomness_no_async_and_no_logging() {
    let forbidden = [
        "async",
        "await",
        "futures::",
        "std::net",
        "std::fs",
        "std::io",
        "std::thread",
        "std::process",
        "std::env",
        "std::sync::Mutex",
        "Instant",
        "SystemTime",
        "rand",
        "log::",
        "println!",
        "eprintln!",
        "rmp_serde",
        "tide",
        "femme",
        "structopt",
        "unsafe",
    ];
    let found: Vec<_> = offenders("src/core", &forbidden).into_iter().filter(|found| !found.ends_with(": rand")).collect();
    assert_eq!(found, Vec::<String>::new());
    assert_eq!(offenders("src/core", &["fastrand", "getrandom", "rand::"]), Vec::<String>::new());
}

#[test]
fn the_simulator_has_no_io_no_clock_no_threads_and_no_randomness_but_its_seed() {
    let forbidden = [
        "async",
        "await",
        "futures::",
        "std::net",
        "std::fs",
        "std::io",
        "std::thread",
        "std::process",
        "std::env",
        "std::sync",
        "std::time",
        "Instant",
        "SystemTime",
        "getrandom",
        "fastrand::u",
        "Rng::new()",
        "HashMap",
        "HashSet",
        "println!",
        "unsafe",
    ];
    assert_eq!(offenders("src/sim", &forbidden), Vec::<String>::new());
    let above = [
        "crate::node",
        "crate::http",
        "crate::mesh",
        "crate::gateway",
        "crate::cli",
        "crate::api",
        "crate::peers",
        "wal::Wal",
        "wal::file",
    ];
    assert_eq!(offenders("src/sim", &above), Vec::<String>::new());
    assert_eq!(offenders("src/core", &["HashMap", "HashSet"]), Vec::<String>::new());
}

#[test]
fn the_core_imports_nothing_from_above_it() {
    let above = [
        "crate::node",
        "crate::http",
        "crate::mesh",
        "crate::gateway",
        "crate::wal",
        "crate::cli",
        "crate::api",
        "crate::peers",
        "crate::sim",
    ];
    assert_eq!(offenders("src/core", &above), Vec::<String>::new());
    assert_eq!(offenders("src/wal", &["crate::node", "crate::http", "crate::mesh", "crate::gateway", "crate::cli"]), Vec::<String>::new());
    assert_eq!(offenders("src/mesh", &["crate::node", "crate::http", "crate::gateway", "crate::wal", "crate::cli"]), Vec::<String>::new());
    assert_eq!(offenders("src/gateway", &["crate::node", "crate::http", "crate::mesh", "crate::wal", "crate::cli"]), Vec::<String>::new());
    assert_eq!(offenders("src/http", &["crate::node", "crate::mesh", "crate::wal", "crate::cli"]), Vec::<String>::new());
}

#[test]
fn crates_that_nobody_maintains_any_more_stay_at_their_edge() {
    let only = |word: &str, allowed: &[&str]| {
        let found = offenders("src", &[word]).into_iter();
        let elsewhere: Vec<_> = found.filter(|line| !allowed.iter().any(|place| line.contains(place))).collect();
        assert_eq!(elsewhere, Vec::<String>::new(), "{word} belongs in {allowed:?}");
    };
    only("tide::", &["src/http/"]);
    only("http_types", &["src/http/"]);
    only("structopt", &["src/cli/", "src/main.rs"]);
    only("femme", &["src/node/events.rs"]);
}
