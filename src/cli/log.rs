//! `log dump` and `log verify`: a decision log, looked at from outside. The node may be running.

use std::path::Path;

use crate::cli::output::{Console, Tone};
use crate::cli::{Exit, Failure};
use crate::wal::Cut;
use crate::wal::inspect::{self, DumpError, Report};

/// Prints every record, one JSON object a line. Damage is an error after the records before it.
pub fn dump(file: &Path, console: &mut Console<'_>) -> Result<Exit, Failure> {
    let mut damage = None;
    let mut torn = None;
    console.write(|out| {
        match inspect::dump(file, out) {
            Ok(report) => torn = report.torn,
            Err(DumpError::Log(error)) => damage = Some(Failure::refused(error.to_string())),
            Err(DumpError::Output(error)) => return Err(error),
        }
        Ok(())
    });
    if let Some(cut) = torn {
        console.say(&format!("{}: {}", file.display(), remains(&cut)));
    }
    damage.map_or(Ok(Exit::Ok), Err)
}

/// Says ok and what is in the log, or fails with the offset of the damage.
pub fn verify(file: &Path, console: &mut Console<'_>) -> Result<Exit, Failure> {
    let report = inspect::verify(file).map_err(|error| Failure::refused(error.to_string()))?;
    console.data(&report, |console| {
        let Report { records, groups, bytes, torn } = &report;
        let ok = console.toned(Tone::Good, "ok");
        console.line(&format!("{ok}: {records} records in {groups} groups, {bytes} bytes"));
        if let Some(cut) = torn {
            console.line(&console.toned(Tone::Doubt, remains(cut)));
        }
    });
    Ok(Exit::Ok)
}

fn remains(cut: &Cut) -> String {
    format!(
        "{} bytes at byte {} are the remains of a write that nobody was told of; the node cuts them off when it starts",
        cut.bytes, cut.offset
    )
}
