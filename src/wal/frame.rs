//! The log's format, pure: records to groups of bytes, and a file's bytes back to records.
//!
//! A log is groups without gaps, then zeros or nothing. A group is what was synced at once:
//!
//! | bytes | what |
//! |---|---|
//! | 8 | magic; the last one is the format's version |
//! | 4 | length of the payload, big-endian |
//! | 4 | CRC-32 of all the group's other bytes, big-endian |
//! | 32 | chain: SHA-256(chain of the group before ‖ payload) |
//! | length | payload: records as MessagePack with named fields, one after another |
//!
//! **Torn or damaged.** No group is written before the one before it is synced. So when a group is bad and another one begins
//! behind it, the bad one had been synced: that is damage. When nothing begins behind it, its write was cut short before anyone was
//! told: that is a torn tail. It is enough that a group *begins*: one that is itself torn proves the same of the one before it. A log
//! comes into being under another name with its first group synced, so a bad first group is damage too, and so is a group whose checksum
//! is right and whose chain is not. What cannot be told apart: a last group that was synced and damaged later looks like a torn one.

use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

#[cfg(feature = "mutants")]
use crate::core::mutant::Mutant;
use crate::core::record::Record;

/// Largest payload of one group, in bytes.
pub const GROUP_BYTES_MAX: usize = 16 << 20;
/// The version of the format that this program writes and reads.
pub const FORMAT_VERSION: u8 = 1;

/// How deeply a record may be nested. Ours need fewer than 20 levels; what a newer version adds is skipped, level by level.
const DEPTH_MAX: usize = 64;

/// Begins every group, and nothing that a record holds looks like it: UTF-8 never has the byte 0xC1, MessagePack has it only inside a
/// number or a length, and a length has no second one behind it.
const MAGIC: [u8; 7] = *b"\xC1\xC1mesh\xC1";
const HEADER_BYTES: usize = MAGIC.len() + 1 + 4 + 4 + CHAIN_BYTES;
const CHAIN_BYTES: usize = 32;

/// The hash over everything up to a group: a group fits only where it was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Chain([u8; CHAIN_BYTES]);

impl Chain {
    /// The chain of a log without groups.
    pub fn start() -> Chain {
        Chain(Sha256::digest([b"canary-mesh log ".as_slice(), &[FORMAT_VERSION]].concat()).into())
    }

    fn after(self, payload: &[u8]) -> Chain {
        Chain(Sha256::new_with_prefix(self.0).chain_update(payload).finalize().into())
    }
}

/// A record that cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// Over [`GROUP_BYTES_MAX`].
    #[error("a record of {0} bytes is larger than the {GROUP_BYTES_MAX} that a log group may have")]
    TooLarge(usize),
    /// Its serialisation failed.
    #[error("a record cannot be serialised: {0}")]
    Serialise(#[from] rmp_serde::encode::Error),
}

/// The groups that hold these records, to be written one behind the other, each synced before the next, and the chain after them.
/// One group, also for no records at all, unless they are larger than [`GROUP_BYTES_MAX`] together.
pub fn encode(records: &[Record], mut chain: Chain) -> Result<(Vec<Vec<u8>>, Chain), EncodeError> {
    let mut groups = Vec::new();
    let mut payload = Vec::new();
    for record in records {
        let start = payload.len();
        rmp_serde::encode::write_named(&mut payload, record)?;
        let bytes = payload.len() - start;
        if bytes > GROUP_BYTES_MAX {
            return Err(EncodeError::TooLarge(bytes));
        }
        if payload.len() > GROUP_BYTES_MAX {
            let next = payload.split_off(start);
            groups.push(seal(&payload, &mut chain));
            payload = next;
        }
    }
    groups.push(seal(&payload, &mut chain));
    Ok((groups, chain))
}

/// The group of this payload, which is at most [`GROUP_BYTES_MAX`] long. Moves the chain on.
fn seal(payload: &[u8], chain: &mut Chain) -> Vec<u8> {
    *chain = chain.after(payload);
    let length = (payload.len() as u32).to_be_bytes();
    let crc = checksum(FORMAT_VERSION, &length, &chain.0, payload).to_be_bytes();
    [MAGIC.as_slice(), &[FORMAT_VERSION], &length, &crc, &chain.0, payload].concat()
}

fn checksum(version: u8, length: &[u8; 4], chain: &[u8; CHAIN_BYTES], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for part in [MAGIC.as_slice(), &[version], length, chain, payload] {
        hasher.update(part);
    }
    hasher.finalize()
}

/// What a log's bytes hold.
#[derive(Debug)]
pub struct Replay {
    /// The groups, as far as they are good.
    pub groups: Vec<Group>,
    /// The chain after them.
    pub chain: Chain,
    /// Where the last of them ends, in bytes from the beginning.
    pub end: u64,
    /// What is behind them.
    pub tail: Tail,
}

/// What was synced at once.
#[derive(Debug, PartialEq, Eq)]
pub struct Group {
    /// Where it begins, in bytes from the beginning of the log.
    pub offset: u64,
    /// Its records.
    pub records: Vec<Record>,
}

/// What is behind the last good group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tail {
    /// Nothing, or zeros.
    Clean,
    /// A write that was cut short and never acknowledged.
    Torn(Cut),
    /// Something that had been synced and is no longer what it was.
    Damaged(Damage),
}

/// The remains of a write that never was acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Cut {
    /// Where they begin, in bytes from the beginning of the log.
    pub offset: u64,
    /// How many bytes they are, without the zeros behind them.
    pub bytes: u64,
}

/// A place in a log that is not what was written there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Where the group begins, in bytes from the beginning of the log.
    pub offset: u64,
    /// What is wrong with it.
    pub flaw: Flaw,
}

/// What is wrong with a group.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    /// The whole file has not one beginning of a group.
    #[error("there is no log group in the whole file")]
    NotALog,
    /// No magic.
    #[error("no log group begins here")]
    NoGroup,
    /// Over [`GROUP_BYTES_MAX`].
    #[error("its length says {0} bytes, and {GROUP_BYTES_MAX} is the most")]
    Length(u32),
    /// The file ends inside it.
    #[error("the file ends inside it")]
    Short,
    /// Other bytes than were written.
    #[error("its checksum is wrong")]
    Checksum,
    /// Written by another version of the format.
    #[error("it has format version {0}")]
    Version(u8),
    /// Whole, but of another place or another log.
    #[error("it does not continue the group before it: the hash chain is broken")]
    Chain,
    /// Whole, but not to be understood.
    #[error("it is whole, but holds a record that this version cannot read ({0}); a newer version may have written it")]
    Record(String),
}

impl Flaw {
    /// Whether a write that was cut short can look like this.
    fn may_be_torn(&self) -> bool {
        match self {
            Flaw::NoGroup | Flaw::Length(_) | Flaw::Short | Flaw::Checksum => true,
            Flaw::NotALog | Flaw::Version(_) | Flaw::Chain | Flaw::Record(_) => false,
        }
    }
}

/// Reads a log's bytes from its beginning.
pub fn replay(bytes: &[u8]) -> Replay {
    replay_by(bytes, judge)
}

/// Reads a log's bytes as a node does that makes this mistake.
#[cfg(feature = "mutants")]
pub fn replay_mutated(bytes: &[u8], mutant: Option<Mutant>) -> Replay {
    let torn = |offset, bytes| Tail::Torn(Cut { offset, bytes });
    match (mutant, replay(bytes)) {
        (Some(Mutant::DamageTakenForTorn), _) => replay_by(bytes, |_, offset, _, bytes| torn(offset as u64, bytes as u64)),
        (Some(Mutant::TornTailCutTooFar), Replay { groups, tail: Tail::Torn(cut), .. }) if groups.len() > 1 => {
            let last = groups.last().map_or(0, |group| group.offset);
            let before = replay(bytes.get(..last as usize).unwrap_or_default());
            Replay { tail: torn(last, cut.offset - last + cut.bytes), ..before }
        }
        (_, replay) => replay,
    }
}

fn replay_by(bytes: &[u8], judge: impl Fn(Flaw, usize, &[u8], usize) -> Tail) -> Replay {
    let content_bytes = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    let mut replay = Replay { groups: Vec::new(), chain: Chain::start(), end: 0, tail: Tail::Clean };
    let (mut offset, mut rest) = (0, bytes);
    while offset < content_bytes {
        match read_group(rest, replay.chain) {
            Ok((group_bytes, chain, records)) => {
                replay.groups.push(Group { offset: offset as u64, records });
                replay.chain = chain;
                offset += group_bytes;
                rest = rest.get(group_bytes..).unwrap_or_default();
            }
            Err(flaw) => {
                replay.tail = judge(flaw, offset, rest, content_bytes - offset);
                break;
            }
        }
    }
    replay.end = offset as u64;
    replay
}

/// Torn or damaged: the rule at the top of this module.
fn judge(flaw: Flaw, offset: usize, rest: &[u8], bytes: usize) -> Tail {
    let group_behind = || rest.get(1..).unwrap_or_default().windows(MAGIC.len()).any(|bytes| bytes == MAGIC);
    let offset_u64 = offset as u64;
    match flaw {
        Flaw::NoGroup if offset == 0 && !group_behind() => Tail::Damaged(Damage { offset: 0, flaw: Flaw::NotALog }),
        flaw if flaw.may_be_torn() && offset > 0 && !group_behind() => Tail::Torn(Cut { offset: offset_u64, bytes: bytes as u64 }),
        flaw => Tail::Damaged(Damage { offset: offset_u64, flaw }),
    }
}

/// The group at the beginning of `bytes`: its size, the chain after it, its records.
fn read_group(bytes: &[u8], before: Chain) -> Result<(usize, Chain, Vec<Record>), Flaw> {
    let rest = bytes.strip_prefix(&MAGIC).ok_or(Flaw::NoGroup)?;
    let (&[version], rest) = rest.split_first_chunk().ok_or(Flaw::Short)?;
    let (length_bytes, rest) = rest.split_first_chunk().ok_or(Flaw::Short)?;
    let (crc, rest) = rest.split_first_chunk().ok_or(Flaw::Short)?;
    let (chain, rest) = rest.split_first_chunk().ok_or(Flaw::Short)?;
    let length = u32::from_be_bytes(*length_bytes);
    if length as usize > GROUP_BYTES_MAX {
        return Err(Flaw::Length(length));
    }
    let payload = rest.get(..length as usize).ok_or(Flaw::Short)?;
    if checksum(version, length_bytes, chain, payload) != u32::from_be_bytes(*crc) {
        return Err(Flaw::Checksum);
    }
    if version != FORMAT_VERSION {
        return Err(Flaw::Version(version));
    }
    let after = before.after(payload);
    if after.0 != *chain {
        return Err(Flaw::Chain);
    }
    let records = decode(payload).map_err(|error| Flaw::Record(error.to_string()))?;
    Ok((HEADER_BYTES + payload.len(), after, records))
}

/// The values of MessagePack that these bytes are, one behind the other.
pub(crate) fn decode<T: DeserializeOwned>(payload: &[u8]) -> Result<Vec<T>, rmp_serde::decode::Error> {
    let mut values = Vec::new();
    let mut reader = rmp_serde::Deserializer::new(payload);
    reader.set_max_depth(DEPTH_MAX);
    while !reader.get_ref().is_empty() {
        values.push(T::deserialize(&mut reader)?);
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::value::Value;
    use crate::wal::samples::{decided, promise, snapshot};

    /// A log of these groups, and where each begins.
    fn log(groups: &[&[Record]]) -> (Vec<u8>, Vec<usize>) {
        let (mut bytes, mut offsets, mut chain) = (Vec::new(), Vec::new(), Chain::start());
        for records in groups {
            let (encoded, after) = encode(records, chain).unwrap();
            assert_eq!(encoded.len(), 1);
            offsets.push(bytes.len());
            bytes.extend(encoded.concat());
            chain = after;
        }
        (bytes, offsets)
    }

    fn with_key(key: String) -> Record {
        let Record::Decided { mut decision } = decided(1) else { unreachable!() };
        let Value::Commit(commit) = &mut decision.value else { unreachable!() };
        commit.tx.idempotency_key = Some(key);
        Record::Decided { decision }
    }

    fn four_groups() -> (Vec<u8>, Vec<usize>) {
        log(&[&[snapshot()], &[promise(1), decided(1)], &[decided(2)], &[promise(3), decided(3)]])
    }

    fn records(replay: &Replay) -> Vec<Record> {
        replay.groups.iter().flat_map(|group| group.records.clone()).collect()
    }

    fn damaged(offset: usize, flaw: Flaw) -> Tail {
        Tail::Damaged(Damage { offset: offset as u64, flaw })
    }

    /// `payload` as the group after `before`, with this version and every checksum right.
    fn forged(version: u8, payload: &[u8], before: Chain) -> Vec<u8> {
        let (length, chain) = ((payload.len() as u32).to_be_bytes(), before.after(payload));
        let crc = checksum(version, &length, &chain.0, payload).to_be_bytes();
        [MAGIC.as_slice(), &[version], &length, &crc, &chain.0, payload].concat()
    }

    #[test]
    fn records_read_back_group_by_group_and_zeros_behind_them_are_the_end() {
        let (bytes, offsets) = four_groups();
        for zeros in [0, 1, 7, 5_000] {
            let replay = replay(&[bytes.clone(), vec![0; zeros]].concat());
            assert_eq!((replay.end, &replay.tail), (bytes.len() as u64, &Tail::Clean));
            assert_eq!(replay.groups.iter().map(|g| g.offset as usize).collect::<Vec<_>>(), offsets);
            assert_eq!(records(&replay), [snapshot(), promise(1), decided(1), decided(2), promise(3), decided(3)]);
        }
        assert_eq!(replay(&[]).tail, Tail::Clean);
    }

    #[test]
    fn a_write_cut_short_at_any_byte_is_torn_whatever_is_left_in_its_place() {
        let (bytes, offsets) = four_groups();
        let (last, mut random) = (offsets[3], fastrand::Rng::with_seed(3));
        for kept in last..bytes.len() {
            let torn = |tail: Vec<u8>| {
                let image = [&bytes[..kept], &tail].concat();
                let replay = replay(&image);
                if image.starts_with(&bytes) {
                    assert_eq!(replay.tail, Tail::Clean, "the bytes that were lost were zeros");
                    return;
                }
                let content = image.iter().rposition(|b| *b != 0).unwrap() + 1;
                let cut = Cut { offset: last as u64, bytes: content.saturating_sub(last) as u64 };
                assert_eq!(replay.tail, if content > last { Tail::Torn(cut) } else { Tail::Clean }, "{kept} bytes kept");
                assert_eq!((replay.end, replay.groups.len()), (last as u64, 3));
            };
            torn(vec![]);
            torn(vec![0; bytes.len() - kept + 4_096]);
            torn((kept..bytes.len() + 700).map(|_| random.u8(..)).collect());
            torn(bytes[kept..].iter().map(|byte| !byte).collect());
        }
    }

    #[test]
    fn a_bit_flipped_anywhere_before_the_last_group_is_damage_in_the_group_it_is_in() {
        let (bytes, offsets) = four_groups();
        for at in 0..offsets[3] {
            let group = offsets.iter().rposition(|offset| *offset <= at).unwrap();
            for bit in 0..8 {
                let mut image = bytes.clone();
                image[at] ^= 1 << bit;
                let replay = replay(&image);
                let Tail::Damaged(damage) = &replay.tail else { panic!("byte {at} bit {bit}: {:?}", replay.tail) };
                assert_eq!((damage.offset, replay.groups.len()), (offsets[group] as u64, group), "byte {at} bit {bit}");
                assert!(damage.flaw.may_be_torn(), "byte {at} bit {bit}: the checksum covers all, not {:?}", damage.flaw);
            }
        }
    }

    #[test]
    fn a_lost_write_in_the_middle_is_damage() {
        let (bytes, offsets) = four_groups();
        let mut image = bytes.clone();
        image[offsets[1]..offsets[3]].fill(0);
        assert_eq!(replay(&image).tail, damaged(offsets[1], Flaw::NoGroup));
    }

    #[test]
    fn damage_before_a_torn_group_is_not_taken_for_a_part_of_it() {
        let (mut bytes, offsets) = four_groups();
        bytes[offsets[2] + HEADER_BYTES] ^= 1;
        bytes.truncate(offsets[3] + MAGIC.len());
        assert_eq!(replay(&bytes).tail, damaged(offsets[2], Flaw::Checksum));
    }

    #[test]
    fn a_bad_first_group_is_never_a_torn_write() {
        let (bytes, _) = log(&[&[snapshot()]]);
        assert_eq!(replay(&bytes[..bytes.len() - 1]).tail, damaged(0, Flaw::Short));
        assert_eq!(replay(&bytes[..3]).tail, damaged(0, Flaw::NotALog));
        let mut flipped = bytes.clone();
        flipped[HEADER_BYTES] ^= 1;
        assert_eq!(replay(&flipped).tail, damaged(0, Flaw::Checksum));
    }

    #[test]
    fn a_group_of_another_place_or_another_log_does_not_fit() {
        let (bytes, at) = four_groups();
        let (other, other_at) = log(&[&[snapshot(), promise(9)], &[decided(1)]]);
        let spliced = [&bytes[..at[2]], &other[other_at[1]..]].concat();
        assert_eq!(replay(&spliced).tail, damaged(at[2], Flaw::Chain), "at the end");
        let spliced = [&bytes[..at[1]], &other[other_at[1]..], &bytes[at[2]..]].concat();
        assert_eq!(replay(&spliced).tail, damaged(at[1], Flaw::Chain), "in the middle");
        let left_out = [&bytes[..at[1]], &bytes[at[2]..]].concat();
        assert_eq!(replay(&left_out).tail, damaged(at[1], Flaw::Chain), "one left out");
        let twice = [&bytes[..at[3]], &bytes[at[2]..at[3]]].concat();
        assert_eq!(replay(&twice).tail, damaged(at[3], Flaw::Chain), "one written twice");
    }

    #[test]
    fn no_text_in_a_record_looks_like_a_group() {
        for length in 1..=700 {
            let text: String = "mesh".chars().cycle().take(length).collect();
            let mut payload = encode(&[with_key(text)], Chain::start()).unwrap().0.concat().split_off(1);
            payload.extend(encode(&[promise(0xC1C1), promise(0xC1)], Chain::start()).unwrap().0.concat().split_off(1));
            assert!(!payload.windows(MAGIC.len()).any(|bytes| bytes == MAGIC), "a text of {length} bytes");
        }
    }

    #[test]
    fn what_is_not_a_log_is_said_to_be_none() {
        for other in [b"{\"mesh\": \"demo\"}".to_vec(), vec![0xFF; 10_000], [vec![0; 100], b"x".to_vec()].concat()] {
            assert_eq!(replay(&other).tail, damaged(0, Flaw::NotALog));
        }
        let (bytes, _) = four_groups();
        let beginning_lost = [vec![7; 9], bytes].concat();
        assert_eq!(replay(&beginning_lost).tail, damaged(0, Flaw::NoGroup));
    }

    #[test]
    fn a_newer_format_a_newer_record_and_a_length_over_the_cap_are_named() {
        let start = Chain::start();
        assert_eq!(replay(&forged(2, b"whatever", start)).tail, damaged(0, Flaw::Version(2)));
        let unknown = rmp_serde::to_vec_named(&std::collections::BTreeMap::from([("rollout", 1)])).unwrap();
        let Tail::Damaged(Damage { offset: 0, flaw: Flaw::Record(why) }) = replay(&forged(FORMAT_VERSION, &unknown, start)).tail else {
            panic!("an unknown record was read");
        };
        assert!(why.contains("unknown variant `rollout`"), "{why}");
        let mut long = log(&[&[snapshot()]]).0;
        long[MAGIC.len() + 1..][..4].fill(0xFF);
        assert_eq!(replay(&long).tail, damaged(0, Flaw::Length(u32::MAX)));
    }

    #[test]
    fn records_that_are_too_large_together_become_several_groups_and_one_alone_is_refused() {
        let large = |bytes: usize| with_key("k".repeat(bytes));
        let three = [large(7 << 20), large(7 << 20), large(7 << 20)];
        let (groups, chain) = encode(&three, Chain::start()).unwrap();
        assert_eq!(groups.len(), 2);
        assert!(groups.iter().all(|group| group.len() <= HEADER_BYTES + GROUP_BYTES_MAX));
        let replay = replay(&groups.concat());
        assert_eq!((records(&replay), replay.chain, replay.tail), (three.to_vec(), chain, Tail::Clean));
        assert!(matches!(encode(&[large(GROUP_BYTES_MAX)], Chain::start()), Err(EncodeError::TooLarge(_))));
        let (none, _) = encode(&[], Chain::start()).unwrap();
        assert_eq!(none.len(), 1, "a log without records still begins");
    }

    #[cfg(feature = "mutants")]
    #[test]
    fn mutants_cut_off_what_was_synced() {
        let (bytes, offsets) = four_groups();
        let torn = &bytes[..bytes.len() - 1];
        assert_eq!(replay_mutated(torn, None).end, offsets[3] as u64);
        let too_far = replay_mutated(torn, Some(Mutant::TornTailCutTooFar));
        assert_eq!((too_far.end, too_far.groups.len()), (offsets[2] as u64, 2));
        assert!(matches!(too_far.tail, Tail::Torn(cut) if cut.offset + cut.bytes == torn.len() as u64));
        let mut flipped = bytes.clone();
        flipped[offsets[1] + 60] ^= 1;
        assert!(matches!(replay_mutated(&flipped, None).tail, Tail::Damaged(_)));
        let cut = replay_mutated(&flipped, Some(Mutant::DamageTakenForTorn));
        assert_eq!((cut.end, matches!(cut.tail, Tail::Torn(_))), (offsets[1] as u64, true));
    }
}
