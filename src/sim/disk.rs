//! A log on a disk of 512-byte sectors that keeps what was synced, and of the rest whatever it likes.
//!
//! The bytes are those of the real log ([`frame::encode`]), and a start reads them by the real rule ([`frame::replay`]). What the disk may
//! do is what a disk may do: after a loss of power any subset of the sectors that were written since the last sync is there; a write or
//! a sync may fail; a bit of what had been synced may flip, and a write may go to the wrong place. Of these, only damage that the format
//! can tell from a torn write is done: never to the last group, for losing a synced last group whole is a lost disk, not a fault.

use fastrand::Rng;

use crate::core::record::Record;
use crate::sim::mistakes::{self, Mutant};
use crate::wal::frame::{self, Chain, Damage, Tail};

/// The unit that is written whole or not at all, in bytes.
pub const SECTOR_BYTES: usize = 512;
/// The file grows by so many bytes of zeros at a time. Small, so that a run crosses many such borders.
const PREALLOCATE_BYTES: usize = 4_096;

/// How a write or sync fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errno {
    /// The disk is broken for this once.
    Eio,
    /// The disk is full.
    Enospc,
}

/// At which of the two it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// A write.
    Write,
    /// A sync.
    Sync,
}

/// A failed write or sync: the log takes no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed(pub Operation, pub Errno);

/// What a start finds.
#[derive(Debug)]
pub struct Opened {
    /// The records, oldest first.
    pub records: Vec<Record>,
    /// A torn tail was cut off.
    pub torn: bool,
    /// Groups that had been acknowledged and are not among what was found.
    pub groups_lost: usize,
    /// A group is there whose sync had not been acknowledged.
    pub unsynced_kept: bool,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Disk {
    rng: Rng,
    /// What is there for sure.
    image: Vec<u8>,
    /// Written and not synced: where, and what.
    cached: Vec<(usize, Vec<u8>)>,
    chain: Chain,
    end: usize,
    allocated: usize,
    groups_written: usize,
    groups_synced: usize,
    last_synced_at: usize,
    last_written_at: usize,
    replacing: Option<(Vec<u8>, Chain)>,
    /// The log that a loss of power brings back, where the directory was not synced.
    replaced: Option<Vec<u8>>,
    failing: Option<Failed>,
    full: bool,
    misdirecting: bool,
    misdirected: bool,
    damaged: bool,
}

impl Disk {
    /// A log that begins with these records, all synced.
    pub fn new(seed: u64, records: &[Record]) -> Disk {
        let mut disk = Disk {
            rng: Rng::with_seed(seed),
            image: Vec::new(),
            cached: Vec::new(),
            chain: Chain::start(),
            end: 0,
            allocated: 0,
            groups_written: 0,
            groups_synced: 0,
            last_synced_at: 0,
            last_written_at: 0,
            replacing: None,
            replaced: None,
            failing: None,
            full: false,
            misdirecting: false,
            misdirected: false,
            damaged: false,
        };
        // A log comes into being under another name and is synced before it has its own: there is nothing to lose here.
        disk.replace(records);
        disk.finish_replacing(true);
        disk
    }

    /// The next operation of this kind fails.
    pub fn fail_next(&mut self, operation: Operation, errno: Errno) {
        self.failing = Some(Failed(operation, errno));
    }

    /// The next write goes to another place.
    pub fn misdirect_next(&mut self) {
        self.misdirecting = true;
    }

    /// There is room again, and nothing is about to fail.
    pub fn repair(&mut self) {
        (self.full, self.failing, self.misdirecting) = (false, None, false);
    }

    /// Whether a write has gone to another place.
    pub fn has_misdirected(&self) -> bool {
        self.misdirected
    }

    /// Something that had been synced is not what it was.
    pub fn is_damaged(&self) -> bool {
        self.damaged
    }

    fn fails(&mut self, operation: Operation) -> Option<Failed> {
        if self.full && operation == Operation::Write {
            return Some(Failed(operation, Errno::Enospc));
        }
        let failed = self.failing.take_if(|failed| failed.0 == operation)?;
        self.full |= failed.1 == Errno::Enospc;
        Some(failed)
    }

    /// Writes these records as one group behind the others. After a failure nothing more may be written.
    pub fn write(&mut self, records: &[Record]) -> Result<(), Failed> {
        let Ok((groups, chain)) = frame::encode(records, self.chain) else { return Err(Failed(Operation::Write, Errno::Eio)) };
        let failed = self.fails(Operation::Write);
        for mut group in groups {
            let (at, end) = (self.end, self.end + group.len());
            if end > self.allocated {
                self.allocated = end.next_multiple_of(PREALLOCATE_BYTES);
                group.resize(self.allocated - at, 0);
            }
            if let Some(failed) = failed {
                // What was written before it failed is there or not.
                group.truncate(self.rng.usize(0..=group.len()));
                self.cached.push((at, group));
                return Err(failed);
            }
            if std::mem::take(&mut self.misdirecting) && self.misdirect(at, &group) {
                group.clear();
            }
            self.cached.push((at, group));
            (self.end, self.last_written_at) = (end, at);
            self.groups_written += 1;
        }
        self.chain = chain;
        Ok(())
    }

    /// Puts the group somewhere else, on sectors that others have.
    fn misdirect(&mut self, right: usize, group: &[u8]) -> bool {
        let sectors = right / SECTOR_BYTES;
        if sectors < 2 || self.last_synced_at < SECTOR_BYTES * 2 {
            return false;
        }
        let at = self.rng.usize(1..self.last_synced_at / SECTOR_BYTES) * SECTOR_BYTES;
        let bytes = group.len().min(self.last_synced_at - at);
        self.image[at..at + bytes].copy_from_slice(&group[..bytes]);
        (self.damaged, self.misdirected) = (true, true);
        true
    }

    /// Flips a bit of what had been synced, before the last group. False if there is nothing before it.
    pub fn flip(&mut self) -> bool {
        if self.last_synced_at == 0 {
            return false;
        }
        let at = self.rng.usize(0..self.last_synced_at);
        self.image[at] ^= 1 << self.rng.u32(0..8);
        self.damaged = true;
        true
    }

    /// Makes durable what was written.
    pub fn sync(&mut self) -> Result<(), Failed> {
        if let Some(failed) = self.fails(Operation::Sync) {
            return Err(failed);
        }
        for (at, bytes) in std::mem::take(&mut self.cached) {
            put(&mut self.image, at, &bytes);
        }
        self.groups_synced = self.groups_written;
        self.last_synced_at = self.last_written_at;
        Ok(())
    }

    /// Writes a whole new log beside the present one.
    pub fn replace(&mut self, records: &[Record]) {
        if let Ok((groups, chain)) = frame::encode(records, Chain::start()) {
            self.replacing = Some((groups.concat(), chain));
        }
    }

    /// The new log is synced and has its name.
    pub fn finish_replacing(&mut self, directory_synced: bool) {
        let Some((bytes, chain)) = self.replacing.take() else { return };
        let old = std::mem::replace(&mut self.image, bytes);
        self.replaced = (!directory_synced).then_some(old);
        self.chain = chain;
        self.cached.clear();
        self.end = self.image.len();
        self.allocated = self.end.next_multiple_of(PREALLOCATE_BYTES);
        self.image.resize(self.allocated, 0);
        (self.groups_written, self.groups_synced) = (1, 1);
        (self.last_synced_at, self.last_written_at) = (0, 0);
        self.damaged = false;
    }

    /// The process is gone. What it wrote is still in the kernel's cache.
    pub fn process_gone(&mut self) {
        // Between the new log's sync and the directory's, either name may be what is found; both are whole.
        if self.replacing.is_some() && self.rng.bool() {
            self.finish_replacing(true);
        }
        self.replacing = None;
        self.misdirecting = false;
    }

    /// Power is lost: of the sectors written since the last sync, any subset is there.
    pub fn power_gone(&mut self) {
        self.process_gone();
        if let Some(old) = self.replaced.take_if(|_| self.rng.bool()) {
            (self.image, self.cached) = (old, Vec::new());
        }
        let kept_of_8 = [0, 8, 4, self.rng.u32(0..=8)][self.rng.usize(0..4)];
        let old_bytes = self.image.len();
        for (at, bytes) in std::mem::take(&mut self.cached) {
            let mut from = 0;
            while from < bytes.len() {
                let to = ((at + from) / SECTOR_BYTES * SECTOR_BYTES + SECTOR_BYTES - at).min(bytes.len());
                if self.rng.u32(0..8) < kept_of_8 {
                    put(&mut self.image, at + from, &bytes[from..to]);
                }
                from = to;
            }
        }
        // Where the file had not been before, a lost sector may hold anything.
        if self.image.len() > old_bytes && self.rng.u32(0..8) == 0 {
            for sector in self.image[old_bytes..].chunks_mut(SECTOR_BYTES).filter(|sector| sector.iter().all(|byte| *byte == 0)) {
                let junk = self.rng.u8(..);
                sector.fill_with(|| junk.wrapping_add(self.rng.u8(0..3)));
            }
        }
    }

    /// Reads the log as a start does: a torn tail is cut, the last group written and synced anew.
    pub fn open(&mut self, mutant: Option<Mutant>) -> Result<Opened, Damage> {
        for (at, bytes) in std::mem::take(&mut self.cached) {
            put(&mut self.image, at, &bytes);
        }
        let replay = mistakes::replay(&self.image, mutant);
        let torn = match replay.tail {
            Tail::Clean => false,
            Tail::Torn(_) => true,
            Tail::Damaged(damage) => return Err(damage),
        };
        let groups = replay.groups.len();
        let groups_lost = self.groups_synced.saturating_sub(groups);
        let unsynced_kept = groups > self.groups_synced;
        (self.groups_written, self.groups_synced) = (groups, groups);
        self.last_synced_at = replay.groups.last().map_or(0, |group| group.offset as usize);
        self.last_written_at = self.last_synced_at;
        self.chain = replay.chain;
        self.end = replay.end as usize;
        if torn {
            self.image.truncate(self.end);
        }
        self.allocated = self.image.len();
        let records = replay.groups.into_iter().flat_map(|group| group.records).collect();
        Ok(Opened { records, torn, groups_lost, unsynced_kept })
    }

    /// How long the log is, in bytes.
    pub fn len_bytes(&self) -> usize {
        self.end
    }
}

fn put(image: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if image.len() < at + bytes.len() {
        image.resize(at + bytes.len(), 0);
    }
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::ballot::Ballot;
    use crate::core::ids::NodeId;

    fn promise(slot: u64) -> Record {
        Record::Promise { slot, ballot: Ballot { round: 1, node: NodeId::new("a").unwrap(), incarnation: 1 } }
    }

    /// A log of five synced groups.
    fn disk(seed: u64) -> Disk {
        let mut disk = Disk::new(seed, &[promise(0)]);
        for slot in 1..5 {
            disk.write(&[promise(slot)]).unwrap();
            disk.sync().unwrap();
        }
        disk
    }

    #[test]
    fn a_loss_of_power_takes_nothing_that_was_synced_and_tears_only_what_was_not() {
        let (mut torn, mut kept) = (0, 0);
        for seed in 0..500 {
            let mut disk = disk(seed);
            let batch: Vec<_> = (5..60).map(promise).collect();
            disk.write(&batch).unwrap();
            disk.power_gone();
            let opened = disk.open(None).unwrap();
            let whole = opened.records.len() == 60;
            assert!(whole || opened.records.len() == 5, "seed {seed}: {} records", opened.records.len());
            assert_eq!((opened.groups_lost, opened.unsynced_kept), (0, whole));
            torn += usize::from(opened.torn);
            kept += usize::from(whole);
            disk.write(&[promise(99)]).unwrap();
            disk.sync().unwrap();
            assert_eq!(disk.open(None).unwrap().records.last(), Some(&promise(99)));
        }
        assert!(torn > 50 && kept > 50, "{torn} torn, {kept} kept");
    }

    #[test]
    fn a_killed_process_loses_nothing_that_it_wrote() {
        let mut disk = disk(1);
        disk.write(&[promise(5)]).unwrap();
        disk.process_gone();
        assert_eq!(disk.open(None).unwrap().records.len(), 6);
    }

    #[test]
    fn a_flipped_bit_and_a_misdirected_write_are_damage_and_a_compaction_ends_it() {
        for seed in 0..200 {
            let mut flipped = disk(seed);
            assert!(flipped.flip());
            assert!(flipped.clone().open(None).is_err(), "seed {seed}");
            flipped.replace(&[promise(9)]);
            flipped.finish_replacing(true);
            assert_eq!(flipped.open(None).unwrap().records, [promise(9)]);
            let mut misdirected = disk(seed);
            for slot in 5..40 {
                misdirected.write(&[promise(slot)]).unwrap();
                misdirected.sync().unwrap();
            }
            misdirected.misdirect_next();
            misdirected.write(&[promise(40)]).unwrap();
            misdirected.sync().unwrap();
            assert!(misdirected.is_damaged() && misdirected.has_misdirected());
            assert!(misdirected.open(None).is_err(), "seed {seed}");
        }
    }

    #[test]
    fn a_write_or_sync_fails_once_and_a_full_disk_until_there_is_room() {
        let mut disk = disk(3);
        disk.fail_next(Operation::Sync, Errno::Eio);
        disk.write(&[promise(5)]).unwrap();
        assert_eq!(disk.sync(), Err(Failed(Operation::Sync, Errno::Eio)));
        disk.power_gone();
        assert!((5..=6).contains(&disk.open(None).unwrap().records.len()));
        disk.fail_next(Operation::Write, Errno::Enospc);
        for _ in 0..2 {
            assert_eq!(disk.write(&[promise(6)]), Err(Failed(Operation::Write, Errno::Enospc)));
        }
        disk.repair();
        disk.process_gone();
        disk.open(None).unwrap();
        assert_eq!(disk.write(&[promise(6)]), Ok(()));
    }
}
