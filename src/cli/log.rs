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

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::{Seek, SeekFrom, Write};
    use std::path::PathBuf;

    use tempfile::TempDir;

    use super::*;
    use crate::cli::testing::ran;
    use crate::core::ballot::Ballot;
    use crate::core::ids::NodeId;
    use crate::core::record::Record;
    use crate::wal::Wal;

    /// A log of three groups with one promise each.
    fn log() -> (TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("node-a.log");
        let promise = |slot| Record::Promise { slot, ballot: Ballot { round: 1, node: NodeId::new("node-a").unwrap(), incarnation: 1 } };
        let mut wal = Wal::create(&file, &[promise(1)]).unwrap();
        for slot in 2..=3 {
            wal.append(&[promise(slot)]).unwrap();
        }
        (folder, file)
    }

    fn write_at(file: &Path, offset: u64, bytes: &[u8]) {
        let mut file = OpenOptions::new().write(true).open(file).unwrap();
        file.seek(SeekFrom::Start(offset)).unwrap();
        file.write_all(bytes).unwrap();
    }

    fn offsets(file: &Path) -> Vec<u64> {
        let dumped = ran(&format!("canary-mesh log dump {}", file.display()));
        dumped.out.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["offset"].as_u64().unwrap()).collect()
    }

    #[test]
    fn a_sound_log_is_verified_and_dumped_line_by_line() {
        let (_folder, file) = log();
        let verified = ran(&format!("canary-mesh log verify {}", file.display()));
        assert_eq!(verified.exit, Exit::Ok, "{verified:?}");
        assert!(verified.out.starts_with("ok: 3 records in 3 groups, "), "{}", verified.out);
        assert_eq!(ran(&format!("canary-mesh log verify {} --output json", file.display())).json()["records"], 3);
        assert_eq!(offsets(&file).len(), 3);
    }

    #[test]
    fn a_damaged_log_is_refused_with_the_offset_and_dumped_up_to_it() {
        let (_folder, file) = log();
        let second = offsets(&file)[1];
        write_at(&file, second + 20, &[0xff; 4]);
        for command in ["verify", "dump"] {
            let damaged = ran(&format!("canary-mesh log {command} {}", file.display()));
            assert_eq!(damaged.exit, Exit::Refused);
            assert!(damaged.err.contains(&format!("at byte {second}:")), "{}", damaged.err);
        }
        assert_eq!(offsets(&file).len(), 1);
    }

    #[test]
    fn a_torn_tail_is_said_and_is_no_error() {
        let (_folder, file) = log();
        let third = offsets(&file)[2];
        write_at(&file, third + 20, &[0xff; 4]);
        let torn = ran(&format!("canary-mesh log verify {}", file.display()));
        assert_eq!(torn.exit, Exit::Ok, "{torn:?}");
        assert!(torn.out.contains(&format!("at byte {third} are the remains of a write")), "{}", torn.out);
        let dumped = ran(&format!("canary-mesh log dump {}", file.display()));
        assert_eq!((dumped.exit, dumped.out.lines().count()), (Exit::Ok, 2));
        assert!(dumped.err.contains("are the remains of a write"), "{}", dumped.err);
    }
}
