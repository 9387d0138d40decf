//! Looking at a log from outside, without changing it: also at that of a running node.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};

use super::WalError;
use super::frame::{self, Cut, Replay, Tail};

/// How often a log that is being written while it is read is read again.
const READS_MAX: usize = 32;

/// What is in a sound log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Records.
    pub records: u64,
    /// Groups: what was synced at once.
    pub groups: u64,
    /// Bytes of them all.
    pub bytes: u64,
    /// The remains of a write that never was acknowledged; the next start of the node cuts them off.
    pub torn: Option<Cut>,
}

/// A dump that came to no good end.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The log. All records before the damage have been written out.
    #[error(transparent)]
    Log(#[from] WalError),
    /// The output.
    #[error("the records cannot be written out: {0}")]
    Output(#[from] io::Error),
}

/// One record as `log dump` shows it.
#[derive(Serialize)]
struct Line<'a> {
    /// Where its group begins, in bytes.
    offset: u64,
    /// Counts the records, from 0.
    index: u64,
    record: &'a str,
    #[serde(flatten)]
    fields: Map<String, Value>,
}

/// Reads a log and says what is in it, or where it is damaged.
pub fn verify(path: &Path) -> Result<Report, WalError> {
    report(path, &read_settled(path)?)
}

/// Writes every record as one line of JSON: `offset` of its group, `index`, `record` (which kind) and its fields.
pub fn dump(path: &Path, out: &mut dyn Write) -> Result<Report, DumpError> {
    let replay = read_settled(path)?;
    let records = replay.groups.iter().flat_map(|group| group.records.iter().map(|record| (group.offset, record)));
    for (index, (offset, record)) in (0..).zip(records) {
        let (kind, fields) = named(serde_json::to_value(record).map_err(io::Error::from)?);
        serde_json::to_writer(&mut *out, &Line { offset, index, record: &kind, fields }).map_err(io::Error::from)?;
        out.write_all(b"\n")?;
    }
    out.flush()?;
    Ok(report(path, &replay)?)
}

fn report(path: &Path, replay: &Replay) -> Result<Report, WalError> {
    let torn = match &replay.tail {
        Tail::Clean => None,
        Tail::Torn(cut) => Some(*cut),
        Tail::Damaged(damage) => return Err(WalError::damaged(path, damage.clone())),
    };
    let records = replay.groups.iter().map(|group| group.records.len() as u64).sum();
    Ok(Report { records, groups: replay.groups.len() as u64, bytes: replay.end, torn })
}

fn read_settled(path: &Path) -> Result<Replay, WalError> {
    settled(|| fs::read(path).map_err(WalError::io(path, "read")))
}

/// A read is not one moment: of a log that is being written it may have the end and not what came just before. So damage, or a torn
/// tail, is believed only when a second read has the same bytes.
fn settled(mut read: impl FnMut() -> Result<Vec<u8>, WalError>) -> Result<Replay, WalError> {
    let mut bytes = read()?;
    for _ in 1..READS_MAX {
        let replay = frame::replay(&bytes);
        if replay.tail == Tail::Clean {
            return Ok(replay);
        }
        let again = read()?;
        if again == bytes {
            return Ok(replay);
        }
        bytes = again;
    }
    Ok(frame::replay(&bytes))
}

/// A record's kind and fields out of `{"kind": {fields}}`, or out of `"kind"` if it has none.
fn named(record: Value) -> (String, Map<String, Value>) {
    match record {
        Value::String(kind) => (kind, Map::new()),
        Value::Object(one) => match one.into_iter().next() {
            Some((kind, Value::Object(fields))) => (kind, fields),
            _ => Default::default(),
        },
        _ => Default::default(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::core::record::Record;
    use crate::wal::Wal;
    use crate::wal::samples::{decided, promise, snapshot};

    #[test]
    fn a_dump_is_one_json_object_a_record_with_its_place_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node-a.log");
        let mut wal = Wal::create(&path, &[snapshot(), Record::Admitted]).unwrap();
        let second = wal.len_bytes();
        wal.append(&[promise(1), decided(1)]).unwrap();
        let mut out = Vec::new();
        let report = dump(&path, &mut out).unwrap();
        assert_eq!(report, Report { records: 4, groups: 2, bytes: wal.len_bytes(), torn: None });
        assert_eq!(report, verify(&path).unwrap());
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[1], r#"{"offset":0,"index":1,"record":"admitted"}"#);
        let ballot = r#""ballot":{"incarnation":1,"node":"node-a","round":1}"#;
        assert_eq!(lines[2], format!(r#"{{"offset":{second},"index":2,"record":"promise",{ballot},"slot":1}}"#));
        let last: Value = serde_json::from_str(lines[3]).unwrap();
        assert_eq!((&last["record"], &last["decision"]["value"]["commit"]["tx"]["txid"]), (&"decided".into(), &"node-a-1-1".into()));
    }

    #[test]
    fn a_torn_end_is_reported_and_left_and_damage_is_an_error_after_the_good_records() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node-a.log");
        let mut wal = Wal::create(&path, &[snapshot()]).unwrap();
        let second = wal.len_bytes();
        wal.append(&[decided(1)]).unwrap();
        let end = wal.len_bytes();
        let mut image = fs::read(&path).unwrap();
        image.truncate(end as usize - 1);
        fs::write(&path, &image).unwrap();
        let cut = Cut { offset: second, bytes: end - 1 - second };
        assert_eq!(verify(&path).unwrap(), Report { records: 1, groups: 1, bytes: second, torn: Some(cut) });
        assert!(fs::read(&path).unwrap() == image, "looking changes nothing");

        image[second as usize - 1] ^= 1;
        fs::write(&path, &image).unwrap();
        assert!(matches!(verify(&path), Err(WalError::Corrupt { damage, .. }) if damage.offset == 0));
        let mut out = Vec::new();
        assert!(matches!(dump(&path, &mut out), Err(DumpError::Log(WalError::Corrupt { .. }))));
        assert!(out.is_empty());
        assert!(matches!(verify(&dir.path().join("other.log")), Err(WalError::Io { .. })));
    }

    #[test]
    fn a_closed_output_ends_the_dump_with_its_own_error() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node-a.log");
        Wal::create(&path, &[snapshot()]).unwrap();
        assert!(matches!(dump(&path, &mut Closed), Err(DumpError::Output(e)) if e.kind() == io::ErrorKind::BrokenPipe));
    }

    #[test]
    fn a_read_that_overlapped_a_write_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node-a.log");
        let mut wal = Wal::create(&path, &[snapshot()]).unwrap();
        let second = wal.len_bytes() as usize;
        wal.append(&[decided(1)]).unwrap();
        let third = wal.len_bytes() as usize;
        wal.append(&[decided(2)]).unwrap();
        let whole = fs::read(&path).unwrap();
        let mut overlapped = whole.clone();
        overlapped[second..third].fill(0);

        let mut reads = [overlapped.clone(), whole].into_iter();
        assert_eq!(settled(|| Ok(reads.next().unwrap())).unwrap().groups.len(), 3);
        let mut reads = [overlapped.clone(), overlapped].into_iter();
        assert!(matches!(settled(|| Ok(reads.next().unwrap())).unwrap().tail, Tail::Damaged(_)));
    }

    #[test]
    fn a_log_that_is_being_written_is_never_called_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node-a.log");
        let mut wal = Wal::create(&path, &[snapshot()]).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut slot = 0;
                while !done.load(Ordering::SeqCst) {
                    slot += 1;
                    let records: Vec<_> = (0..20).map(|_| decided(slot)).collect();
                    wal.append(&records).unwrap();
                    if slot % 50 == 0 {
                        wal.compact(&[snapshot()]).unwrap();
                    }
                }
                slot
            });
            let verdicts: Vec<_> = (0..100).map(|_| verify(&path)).collect();
            done.store(true, Ordering::SeqCst);
            assert!(writer.join().unwrap() > 0);
            for verdict in verdicts {
                assert_eq!(verdict.unwrap().torn, None);
            }
        });
        assert_eq!(verify(&path).unwrap().bytes, wal.len_bytes());
    }
}
