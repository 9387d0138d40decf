//! The log's file: open, create, append, compact.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::WalError;
use super::disk::{Disk, Os};
use super::frame::{self, Chain, Cut, Tail};
use crate::core::record::Record;

/// The file grows by this many bytes of zeros at a time, in the same write as the group that needs them.
pub const PREALLOCATE_BYTES: u64 = 256 << 10;

/// A node's durable log, open for appending. One process at a time has it.
pub struct Wal {
    path: PathBuf,
    disk: Box<dyn Disk>,
    file: File,
    /// Held for as long as the log is open. Beside the log, because the log's own file is replaced by a compaction.
    _lock: File,
    position: Position,
    poisoned: bool,
}

/// Where the next group goes.
#[derive(Clone, Copy)]
struct Position {
    chain: Chain,
    /// Where the last group ends, in bytes.
    end: u64,
    /// How long the file is: zeros from `end` on, in bytes.
    allocated: u64,
}

/// A log that was there.
pub struct Opened {
    /// The log, ready for more.
    pub wal: Wal,
    /// All its records, oldest first.
    pub records: Vec<Record>,
    /// What was cut off because its write had been cut short.
    pub cut: Option<Cut>,
}

/// What an append cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Synced {
    /// Bytes of the log that were written.
    pub bytes: u64,
    /// Of `total_took`, the time spent in the sync.
    pub sync_took: Duration,
    /// The whole append, with the serialisation.
    pub total_took: Duration,
}

impl Wal {
    /// Opens and reads a log; a torn tail is cut off. `None` if there is no file, or an empty one, which no log ever was.
    pub fn open(path: &Path) -> Result<Option<Opened>, WalError> {
        Wal::open_on(Box::new(Os), path)
    }

    /// Begins a log with these records, all durable afterwards. Refused if there is one.
    pub fn create(path: &Path, records: &[Record]) -> Result<Wal, WalError> {
        Wal::create_on(Box::new(Os), path, records)
    }

    pub(super) fn open_on(disk: Box<dyn Disk>, path: &Path) -> Result<Option<Opened>, WalError> {
        let lock = lock(path)?;
        remove_stale(&beside(path, ".tmp"))?;
        let mut file = match File::options().read(true).write(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(WalError::io(path, "open"))?,
        };
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(WalError::io(path, "read"))?;
        if bytes.is_empty() {
            return Ok(None);
        }
        let replay = frame::replay(&bytes);
        let (cut, allocated) = match replay.tail {
            Tail::Clean => (None, bytes.len() as u64),
            Tail::Torn(cut) => (Some(cut), replay.end),
            Tail::Damaged(damage) => return Err(WalError::damaged(path, damage)),
        };
        if cut.is_some() {
            disk.truncate(&file, replay.end).map_err(WalError::io(path, "cut the torn end off"))?;
        }
        // After a failed sync the kernel may show bytes that the disk does not have, and a sync alone would not write them again
        // (Rebello et al. 2020). Only the last group can be such: it is written and synced anew before anyone relies on it.
        if let Some(last) = replay.groups.last() {
            let group = bytes.get(last.offset as usize..replay.end as usize).unwrap_or_default();
            disk.write_at(&file, group, last.offset).map_err(WalError::io(path, "write"))?;
        }
        disk.sync(&file).map_err(WalError::io(path, "sync"))?;
        sync_dir_of(&*disk, path)?;
        let records = replay.groups.into_iter().flat_map(|group| group.records).collect();
        let position = Position { chain: replay.chain, end: replay.end, allocated };
        let wal = Wal { path: path.to_owned(), disk, file, _lock: lock, position, poisoned: false };
        Ok(Some(Opened { wal, records, cut }))
    }

    pub(super) fn create_on(disk: Box<dyn Disk>, path: &Path, records: &[Record]) -> Result<Wal, WalError> {
        let lock = lock(path)?;
        // Under the lock: since `open` found none, another process may have begun one.
        if fs::metadata(path).is_ok_and(|there| there.len() > 0) {
            return Err(WalError::Exists { path: path.to_owned() });
        }
        let (file, position) = publish(&*disk, path, records)?;
        Ok(Wal { path: path.to_owned(), disk, file, _lock: lock, position, poisoned: false })
    }

    /// Writes these records behind the others, all or nothing; durable when this returns. Records that are too large for one group
    /// together go in several, each all or nothing.
    pub fn append(&mut self, records: &[Record]) -> Result<Synced, WalError> {
        self.once_failed_never_again(|wal| {
            let started = Instant::now();
            let (groups, chain) = frame::encode(records, wal.position.chain).map_err(WalError::encode(&wal.path))?;
            let before = wal.position.end;
            let mut sync_took = Duration::ZERO;
            for group in groups {
                wal.write_group(group)?;
                let written = Instant::now();
                wal.disk.sync(&wal.file).map_err(WalError::io(&wal.path, "sync"))?;
                sync_took += written.elapsed();
            }
            wal.position.chain = chain;
            Ok(Synced { bytes: wal.position.end - before, sync_took, total_took: started.elapsed() })
        })
    }

    fn write_group(&mut self, mut group: Vec<u8>) -> Result<(), WalError> {
        let Position { end: start, allocated, .. } = self.position;
        let end = start + group.len() as u64;
        if end > allocated {
            self.position.allocated = end.next_multiple_of(PREALLOCATE_BYTES);
            group.resize((self.position.allocated - start) as usize, 0);
        }
        self.disk.write_at(&self.file, &group, start).map_err(WalError::io(&self.path, "write"))?;
        self.position.end = end;
        Ok(())
    }

    /// Puts these records in the place of all that the log holds. After a crash in the middle it holds either the old or the new.
    pub fn compact(&mut self, records: &[Record]) -> Result<(), WalError> {
        self.once_failed_never_again(|wal| {
            (wal.file, wal.position) = publish(&*wal.disk, &wal.path, records)?;
            Ok(())
        })
    }

    /// How long the log is, in bytes, without the zeros written ahead.
    pub fn len_bytes(&self) -> u64 {
        self.position.end
    }

    /// Nothing is written after a failure: what the disk then holds is not known, and trying again would only hide it.
    fn once_failed_never_again<T>(&mut self, work: impl FnOnce(&mut Wal) -> Result<T, WalError>) -> Result<T, WalError> {
        if self.poisoned {
            return Err(WalError::Poisoned { path: self.path.clone() });
        }
        self.poisoned = true;
        let done = work(self)?;
        self.poisoned = false;
        Ok(done)
    }
}

/// Writes a whole log under another name, syncs it, and puts it in its place.
fn publish(disk: &dyn Disk, path: &Path, records: &[Record]) -> Result<(File, Position), WalError> {
    let (groups, chain) = frame::encode(records, Chain::start()).map_err(WalError::encode(path))?;
    let temporary = beside(path, ".tmp");
    let write = WalError::io(&temporary, "write");
    let file = disk.create(&temporary).map_err(WalError::io(&temporary, "create"))?;
    let mut bytes = groups.concat();
    let end = bytes.len() as u64;
    let allocated = end.next_multiple_of(PREALLOCATE_BYTES);
    bytes.resize(allocated as usize, 0);
    disk.write_at(&file, &bytes, 0).map_err(write)?;
    disk.sync(&file).map_err(WalError::io(&temporary, "sync"))?;
    disk.rename(&temporary, path).map_err(WalError::io(path, "put the new log in the place of"))?;
    sync_dir_of(disk, path)?;
    Ok((file, Position { chain, end, allocated }))
}

/// The log's path with an ending added.
fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(ending);
    PathBuf::from(name)
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn sync_dir_of(disk: &dyn Disk, path: &Path) -> Result<(), WalError> {
    let dir = directory_of(path);
    disk.sync_dir(dir).map_err(WalError::io(dir, "sync the directory"))
}

fn lock(path: &Path) -> Result<File, WalError> {
    // Not created here: with a mistyped directory a node would begin an empty log and be taken for one that lost its disk.
    let dir = directory_of(path);
    if !dir.is_dir() {
        return Err(WalError::NoDirectory { dir: dir.to_owned() });
    }
    let lock_path = beside(path, ".lock");
    let file = File::options().write(true).create(true).truncate(false).open(&lock_path);
    let file = file.map_err(WalError::io(&lock_path, "create"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(WalError::Locked { path: path.to_owned() }),
        Err(TryLockError::Error(error)) => Err(WalError::io(&lock_path, "lock")(error)),
    }
}

/// A new log that a crash kept from its place.
fn remove_stale(temporary: &Path) -> Result<(), WalError> {
    match fs::remove_file(temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(WalError::io(temporary, "remove")(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use tempfile::TempDir;

    use super::super::frame::{Damage, Flaw};
    use super::super::samples::{decided, promise, snapshot};
    use super::*;

    const EIO: i32 = 5;
    const ENOSPC: i32 = 28;

    /// A disk that fails once, at one operation, and counts what is asked of it.
    struct Failing {
        asked: Arc<AtomicU64>,
        fails_at: u64,
        errno: i32,
    }

    impl Failing {
        fn next(&self) -> io::Result<()> {
            let failed = self.asked.fetch_add(1, Ordering::SeqCst) == self.fails_at;
            if failed { Err(io::Error::from_raw_os_error(self.errno)) } else { Ok(()) }
        }
    }

    impl Disk for Failing {
        fn create(&self, path: &Path) -> io::Result<File> {
            self.next().and_then(|()| Os.create(path))
        }
        fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
            self.next().inspect_err(|_| Os.write_at(file, &bytes[..bytes.len() / 2], offset).unwrap())?;
            Os.write_at(file, bytes, offset)
        }
        fn sync(&self, file: &File) -> io::Result<()> {
            self.next().and_then(|()| Os.sync(file))
        }
        fn truncate(&self, file: &File, bytes: u64) -> io::Result<()> {
            self.next().and_then(|()| Os.truncate(file, bytes))
        }
        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            self.next().and_then(|()| Os.rename(from, to))
        }
        fn sync_dir(&self, dir: &Path) -> io::Result<()> {
            self.next().and_then(|()| Os.sync_dir(dir))
        }
    }

    fn place() -> (TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node-a.log");
        (dir, path)
    }

    fn reopened(path: &Path) -> Opened {
        Wal::open(path).unwrap().expect("there is a log")
    }

    fn refused(path: &Path) -> WalError {
        match Wal::open(path) {
            Err(error) => error,
            Ok(_) => panic!("the log was opened"),
        }
    }

    /// A log of three groups, closed, and where the last of them begins and ends.
    fn three_groups(path: &Path) -> (usize, usize) {
        let mut wal = Wal::create(path, &[snapshot()]).unwrap();
        wal.append(&[promise(1), decided(1)]).unwrap();
        let last = wal.len_bytes() as usize;
        wal.append(&[promise(2), decided(2)]).unwrap();
        (last, wal.len_bytes() as usize)
    }

    #[test]
    fn what_was_appended_is_there_again_in_order_and_the_chain_goes_on() {
        let (_dir, path) = place();
        assert!(Wal::open(&path).unwrap().is_none(), "no file");
        let mut wal = Wal::create(&path, &[snapshot()]).unwrap();
        let synced = wal.append(&[promise(1), decided(1)]).unwrap();
        assert!(synced.bytes > 0 && synced.sync_took <= synced.total_took);
        drop(wal);
        let mut opened = reopened(&path);
        assert_eq!((opened.records.as_slice(), opened.cut), ([snapshot(), promise(1), decided(1)].as_slice(), None));
        opened.wal.append(&[decided(2)]).unwrap();
        let bytes = opened.wal.len_bytes();
        drop(opened);
        let opened = reopened(&path);
        assert_eq!((opened.records.len(), opened.wal.len_bytes()), (4, bytes));
    }

    #[test]
    fn the_file_grows_in_steps_and_every_group_survives_them() {
        let (_dir, path) = place();
        let mut wal = Wal::create(&path, &[snapshot()]).unwrap();
        let mut records = vec![snapshot()];
        while wal.len_bytes() < 2 * PREALLOCATE_BYTES {
            let batch: Vec<_> = (0..100).map(|n| decided(records.len() as u64 + n)).collect();
            wal.append(&batch).unwrap();
            records.extend(batch);
            assert_eq!(fs::metadata(&path).unwrap().len() % PREALLOCATE_BYTES, 0);
        }
        drop(wal);
        assert_eq!(reopened(&path).records, records);
    }

    #[test]
    fn a_torn_tail_is_cut_off_and_the_log_goes_on() {
        let (_dir, path) = place();
        let (last, end) = three_groups(&path);
        let whole = fs::read(&path).unwrap();
        // A sample at the file's level; the format's own test has every byte.
        for kept in (last + 1..end).step_by(29) {
            for tail in [vec![], vec![0; end - kept], vec![0xA5; end - kept]] {
                let image = [&whole[..kept], &tail].concat();
                if image.starts_with(&whole[..end]) {
                    continue;
                }
                fs::write(&path, image).unwrap();
                let mut opened = reopened(&path);
                assert_eq!(opened.records, [snapshot(), promise(1), decided(1)], "{kept} bytes kept");
                assert_eq!(opened.cut.unwrap().offset, last as u64);
                assert_eq!(fs::metadata(&path).unwrap().len(), last as u64);
                opened.wal.append(&[decided(7)]).unwrap();
                assert_eq!(fs::metadata(&path).unwrap().len(), PREALLOCATE_BYTES);
                drop(opened);
                let opened = reopened(&path);
                assert_eq!((opened.records.last(), opened.cut), (Some(&decided(7)), None));
            }
        }
    }

    #[test]
    fn a_damaged_log_is_refused_with_file_and_offset_and_left_as_it_is() {
        let (_dir, path) = place();
        let (last, _) = three_groups(&path);
        let mut image = fs::read(&path).unwrap();
        let second = frame::replay(&image).groups[1].offset;
        image[last - 1] ^= 0x40;
        fs::write(&path, &image).unwrap();
        let error = refused(&path);
        let WalError::Corrupt { damage, .. } = &error else { panic!("{error}") };
        assert_eq!(damage, &Damage { offset: second, flaw: Flaw::Checksum });
        let text = error.to_string();
        for part in [path.to_str().unwrap(), &format!("at byte {second}: its checksum is wrong"), "Do not delete it", "log verify"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(fs::read(&path).unwrap() == image, "a refused log is not touched");
    }

    #[test]
    fn a_file_that_is_no_log_is_refused_and_an_empty_one_is_as_none() {
        let (_dir, path) = place();
        fs::write(&path, "just some notes\n").unwrap();
        assert!(matches!(refused(&path), WalError::NotALog { .. }));
        assert!(matches!(Wal::create(&path, &[snapshot()]), Err(WalError::Exists { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "just some notes\n");
        fs::write(&path, "").unwrap();
        assert!(Wal::open(&path).unwrap().is_none());
        Wal::create(&path, &[snapshot()]).unwrap();
        assert_eq!(reopened(&path).records, [snapshot()]);
    }

    #[test]
    fn a_missing_directory_is_named_and_not_made() {
        let (dir, _) = place();
        let missing = dir.path().join("lgos");
        let error = refused(&missing.join("node-a.log"));
        assert!(error.to_string().contains("lgos: there is no such directory for the log"), "{error}");
        assert!(!missing.exists());
    }

    #[test]
    fn a_second_opener_is_refused_also_after_a_compaction() {
        let (_dir, path) = place();
        let mut wal = Wal::create(&path, &[snapshot()]).unwrap();
        assert!(matches!(refused(&path), WalError::Locked { .. }));
        assert!(matches!(Wal::create(&path, &[]), Err(WalError::Locked { .. })));
        wal.compact(&[snapshot()]).unwrap();
        assert!(matches!(refused(&path), WalError::Locked { .. }));
        drop(wal);
        reopened(&path);
    }

    #[test]
    fn a_compacted_log_holds_the_new_records_and_takes_more() {
        let (dir, path) = place();
        let mut wal = Wal::create(&path, &[snapshot()]).unwrap();
        for slot in 1..100 {
            wal.append(&[decided(slot)]).unwrap();
        }
        let before = wal.len_bytes();
        wal.compact(&[snapshot(), promise(99)]).unwrap();
        assert!(wal.len_bytes() < before / 10);
        wal.append(&[decided(100)]).unwrap();
        drop(wal);
        assert_eq!(reopened(&path).records, [snapshot(), promise(99), decided(100)]);
        let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["node-a.log", "node-a.log.lock"]);
    }

    #[test]
    fn a_new_log_that_a_crash_kept_from_its_place_is_removed_and_the_old_one_counts() {
        let (_dir, path) = place();
        three_groups(&path);
        let temporary = beside(&path, ".tmp");
        fs::write(&temporary, frame::encode(&[snapshot()], Chain::start()).unwrap().0.concat()).unwrap();
        assert_eq!(reopened(&path).records.len(), 5);
        assert!(!temporary.exists());
        fs::remove_file(&path).unwrap();
        fs::write(&temporary, "half of a first log").unwrap();
        assert!(Wal::open(&path).unwrap().is_none());
        assert!(!temporary.exists());
    }

    /// Lets each operation on the disk fail in turn, and asserts what must hold then. `work` is done on a log of one group.
    fn whichever_operation_fails(work: impl Fn(&mut Wal) -> Result<(), WalError>, before: &[Record], after: &[Record]) -> u64 {
        for fails_at in 0.. {
            for errno in [EIO, ENOSPC] {
                let (_dir, path) = place();
                let mut wal = Wal::create(&path, before).unwrap();
                let asked = Arc::new(AtomicU64::new(0));
                wal.disk = Box::new(Failing { asked: asked.clone(), fails_at, errno });
                let done = work(&mut wal);
                let asked_before = asked.load(Ordering::SeqCst);
                if asked_before <= fails_at {
                    done.unwrap();
                    assert_eq!(reopened_after(wal, &path), after);
                    return fails_at;
                }
                match done.unwrap_err() {
                    WalError::DiskFull { source, .. } => assert_eq!((source.raw_os_error(), errno), (Some(ENOSPC), ENOSPC)),
                    WalError::Io { source, .. } => assert_eq!((source.raw_os_error(), errno), (Some(EIO), EIO)),
                    other => panic!("{other}"),
                }
                assert!(matches!(wal.append(&[decided(8)]), Err(WalError::Poisoned { .. })));
                assert!(matches!(wal.compact(&[snapshot()]), Err(WalError::Poisoned { .. })));
                assert_eq!(asked.load(Ordering::SeqCst), asked_before, "a poisoned log asks nothing of the disk");
                let left = reopened_after(wal, &path);
                assert!(left == before || left == after, "operation {fails_at}: {left:?}");
            }
        }
        unreachable!()
    }

    fn reopened_after(wal: Wal, path: &Path) -> Vec<Record> {
        drop(wal);
        reopened(path).records
    }

    #[test]
    fn a_failed_append_poisons_the_log_and_loses_nothing_older() {
        let (before, after) = ([snapshot(), decided(1)], [snapshot(), decided(1), promise(2), decided(2)]);
        let operations = whichever_operation_fails(|wal| wal.append(&[promise(2), decided(2)]).map(drop), &before, &after);
        assert_eq!(operations, 2, "a write and a sync");
    }

    #[test]
    fn a_failed_append_that_lengthens_the_file_is_no_different() {
        let before: Vec<_> = (0..600).map(decided).collect();
        let batch: Vec<_> = (600..2_000).map(decided).collect();
        let after = [before.clone(), batch.clone()].concat();
        let operations = whichever_operation_fails(|wal| wal.append(&batch).map(drop), &before, &after);
        assert_eq!(operations, 2, "the zeros ahead cost no operation of their own");
    }

    #[test]
    fn a_failed_compaction_poisons_the_log_and_leaves_the_old_or_the_new() {
        let (before, after) = ([snapshot(), decided(1)], [snapshot(), promise(2)]);
        let operations = whichever_operation_fails(|wal| wal.compact(&after), &before, &after);
        assert_eq!(operations, 5, "create, write, sync, rename, sync of the directory");
    }

    #[test]
    fn a_log_that_cannot_be_made_durable_is_neither_created_nor_opened() {
        let failing = |fails_at| Box::new(Failing { asked: Arc::default(), fails_at, errno: EIO });
        let (_dir, path) = place();
        for fails_at in 0..5 {
            assert!(matches!(Wal::create_on(failing(fails_at), &path, &[snapshot()]), Err(WalError::Io { .. })), "{fails_at}");
            let placed = fails_at == 4;
            assert_eq!(path.exists(), placed, "only the sync of the directory comes after the rename");
        }
        fs::remove_file(&path).unwrap();
        let (last, end) = three_groups(&path);
        let torn = fs::read(&path).unwrap()[..end - 1].to_vec();
        for fails_at in 0..4 {
            fs::write(&path, &torn).unwrap();
            assert!(matches!(Wal::open_on(failing(fails_at), &path), Err(WalError::Io { .. })), "{fails_at}");
            assert_eq!(reopened(&path).wal.len_bytes(), last as u64);
        }
    }

    #[test]
    fn the_last_group_is_written_and_synced_anew_before_a_log_is_used() {
        struct Watching(Arc<AtomicU64>, u64);
        impl Disk for Watching {
            fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
                assert_eq!((offset, self.0.fetch_add(1, Ordering::SeqCst)), (self.1, 0));
                Os.write_at(file, bytes, offset)
            }
            fn sync(&self, file: &File) -> io::Result<()> {
                assert_eq!(self.0.fetch_add(1, Ordering::SeqCst), 1, "after the write");
                Os.sync(file)
            }
        }
        let (_dir, path) = place();
        let (last, _) = three_groups(&path);
        let asked = Arc::new(AtomicU64::new(0));
        let opened = Wal::open_on(Box::new(Watching(asked.clone(), last as u64)), &path).unwrap().unwrap();
        assert_eq!((asked.load(Ordering::SeqCst), opened.records.len()), (2, 5));
    }

    #[test]
    fn a_disk_that_is_really_full_is_named_as_that() {
        let (_dir, path) = place();
        let mut wal = Wal::create(&path, &[snapshot()]).unwrap();
        wal.file = File::options().write(true).open("/dev/full").unwrap();
        let error = wal.append(&[decided(1)]).unwrap_err();
        assert!(error.to_string().contains("the disk is full"), "{error}");
        assert!(matches!(wal.append(&[]), Err(WalError::Poisoned { .. })));
    }
}
