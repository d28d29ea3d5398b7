//! Digest files: what a disk held when a run sent it, as the digests of its blocks that are not zero, so that the next
//! run can tell what changed. Synchronous file I/O in order, constant memory; comparing is not done here.
//!
//! A file is a header, entries in rising order of block, and a footer; integers are little-endian.
//!
//! | at | bytes | what |
//! | --- | --- | --- |
//! | 0 | 8 | magic `SNDIGEST` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | block size in bytes, 65536 |
//! | 16 | 8 | size of the disk in bytes |
//! | 24 | 16 | UUID of the state |
//! | 40 | 8 | sequence of the state |
//! | 48 | 16 | UUID of the lineage: that of the first state in a row of states that follow each other |
//! | 64 | 32 | BLAKE3-256 of the disk's identity (its source as it is spelled, and its key) |
//! | 96 | 40 each | entries: block number (8), BLAKE3-256 of its bytes (32) |
//! | end - 40 | 8 | number of entries |
//! | end - 32 | 32 | BLAKE3-256 of everything before |
//!
//! A file is complete or absent under its own name `{uuid}-{sequence}.digests`: it is written beside it, made durable
//! and renamed. While it is written its writer holds a lock on it, by which a left-over is told from work in progress.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::blocks::{BLOCK_BYTES, BlockDigest, blocks_of};
use crate::change_id::StateId;

const MAGIC: [u8; 8] = *b"SNDIGEST";
const VERSION: u32 = 1;
/// `BLOCK_BYTES` as the header holds it.
const BLOCK_FIELD: u32 = 64 << 10;
const HEADER_BYTES: usize = 96;
const ENTRY_BYTES: usize = 40;
const FOOTER_BYTES: usize = 40;
const HASH_BYTES: usize = 32;
/// How much is read or written at once.
const BUFFER_BYTES: usize = 1 << 20;

pub(crate) const SUFFIX: &str = ".digests";
pub(crate) const PARTIAL_SUFFIX: &str = ".digests.partial";

/// What a digest file says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// The size of the disk, in bytes.
    pub(crate) disk_bytes: u64,
    /// The state whose digests follow.
    pub(crate) state: StateId,
    /// The lineage of the state.
    pub(crate) lineage: Uuid,
    /// Which disk it is.
    pub(crate) disk: DiskIdentity,
}

/// The hash of how a disk is named where this agent runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DiskIdentity(pub(crate) [u8; HASH_BYTES]);

/// One block that is not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The number of the block.
    pub(crate) block: u64,
    /// Its digest.
    pub(crate) digest: BlockDigest,
}

/// Why a digest file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DigestError {
    /// There is none of that state.
    #[error("there are no digests of {state} in {}", directory.display())]
    Absent {
        /// The state.
        state: StateId,
        /// Where it was looked for.
        directory: PathBuf,
    },
    /// The host failed.
    #[error("{}: {source}", path.display())]
    Host {
        /// The file or directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file does not begin like a digest file.
    #[error("{}: not a digest file", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// A later version, or another block size.
    #[error("{}: version {version} with blocks of {block_bytes} bytes is not supported", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
        /// Its block size.
        block_bytes: u32,
    },
    /// The file is shorter than it says, or its length is no possible one.
    #[error("{}: cut off or grown: {len} bytes", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
    },
    /// The hash over the file is not the one at its end.
    #[error("{}: its content does not match its hash", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// The file holds another state than its name says.
    #[error("{}: it holds the digests of {found}", path.display())]
    OtherState {
        /// The file.
        path: PathBuf,
        /// What it holds.
        found: StateId,
    },
    /// Blocks that do not rise, or lie behind the end of the disk.
    #[error("{}: block {block} is out of order", path.display())]
    Order {
        /// The file.
        path: PathBuf,
        /// The block.
        block: u64,
    },
}

/// The path of the digest file of `state`.
pub(crate) fn path_of(directory: &Path, state: StateId) -> PathBuf {
    directory.join(format!("{}-{}{SUFFIX}", state.uuid.hyphenated(), state.sequence))
}

/// A digest file that is being written. Dropped before [`DigestWriter::finish`] it leaves nothing.
#[derive(Debug)]
pub(crate) struct DigestWriter {
    file: Partial,
    out: BufWriter<File>,
    hash: blake3::Hasher,
    entries: u64,
    next_block: u64,
    end_block: u64,
}

/// A durable digest file that does not have its name yet. Dropped before [`Finished::publish`] it leaves nothing.
#[derive(Debug)]
pub(crate) struct Finished {
    file: Partial,
    /// Keeps the lock until the file has its name.
    _locked: File,
}

/// The file under its temporary name; removed when dropped.
#[derive(Debug)]
struct Partial {
    path: PathBuf,
    final_path: PathBuf,
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Already renamed, or a left-over that the next run sweeps.
        let _ = fs::remove_file(&self.path);
    }
}

impl DigestWriter {
    /// Begins the file of `header.state` in `directory`, which is made if it is missing.
    pub(crate) fn create(directory: &Path, header: &Header) -> Result<Self, DigestError> {
        fs::create_dir_all(directory).map_err(|source| host(directory, source))?;
        let final_path = path_of(directory, header.state);
        let path = final_path.with_extension("digests.partial");
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        let file = file.map_err(|source| host(&path, source))?;
        // From here on dropping `partial` removes the file.
        let partial = Partial { path, final_path };
        match file.try_lock() {
            // Without locks a sweep may take the file away from under this run, which then fails; never wrongly.
            Ok(()) | Err(fs::TryLockError::WouldBlock) => {}
            Err(fs::TryLockError::Error(error)) => {
                tracing::debug!(path = %partial.path.display(), %error, "no lock on the digest file");
            }
        }
        let mut writer = Self {
            file: partial,
            out: BufWriter::with_capacity(BUFFER_BYTES, file),
            hash: blake3::Hasher::new(),
            entries: 0,
            next_block: 0,
            end_block: blocks_of(header.disk_bytes),
        };
        writer.put(&encode_header(header))?;
        Ok(writer)
    }

    /// Adds a block behind the last one.
    pub(crate) fn push(&mut self, entry: Entry) -> Result<(), DigestError> {
        if entry.block < self.next_block || entry.block >= self.end_block {
            return Err(DigestError::Order { path: self.file.path.clone(), block: entry.block });
        }
        let mut bytes = [0; ENTRY_BYTES];
        let (block, digest) = bytes.split_at_mut(8);
        block.copy_from_slice(&entry.block.to_le_bytes());
        digest.copy_from_slice(&entry.digest.0);
        self.put(&bytes)?;
        self.next_block = entry.block + 1;
        self.entries += 1;
        Ok(())
    }

    /// Completes the file and makes its bytes durable.
    pub(crate) fn finish(mut self) -> Result<Finished, DigestError> {
        self.put(&self.entries.to_le_bytes())?;
        let hash = self.hash.finalize();
        let path = self.file.path.clone();
        self.out.write_all(hash.as_bytes()).map_err(|source| host(&path, source))?;
        let file = self.out.into_inner().map_err(|error| host(&path, error.into_error()))?;
        file.sync_all().map_err(|source| host(&path, source))?;
        Ok(Finished { file: self.file, _locked: file })
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), DigestError> {
        self.hash.update(bytes);
        self.out.write_all(bytes).map_err(|source| host(&self.file.path, source))
    }
}

impl Finished {
    /// Gives the file its name, durably. Only now is it a baseline.
    pub(crate) fn publish(self) -> Result<(), DigestError> {
        let Partial { path, final_path } = &self.file;
        fs::rename(path, final_path).map_err(|source| host(path, source))?;
        let directory = final_path.parent().unwrap_or(Path::new("."));
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(|source| host(directory, source))
    }
}

/// The digests of a state that an earlier run sent: verified as a whole, then read in order.
#[derive(Debug)]
pub(crate) struct DigestReader {
    path: PathBuf,
    header: Header,
    input: BufReader<File>,
    left: u64,
}

impl DigestReader {
    /// Opens the digests of `state` and reads the file once to see that it is whole.
    ///
    /// A missing entry would pass for a block of zeros and hide a change: nothing is believed before the hash fits.
    pub(crate) fn open(directory: &Path, state: StateId) -> Result<Self, DigestError> {
        let path = path_of(directory, state);
        let file = File::open(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => {
                DigestError::Absent { state, directory: directory.to_owned() }
            }
            _ => host(&path, source),
        })?;
        let len = file.metadata().map_err(|source| host(&path, source))?.len();
        let mut input = BufReader::with_capacity(BUFFER_BYTES, file);
        let header = read_header(&path, &mut input)?;
        let left =
            entries_in(len).ok_or_else(|| DigestError::Length { path: path.clone(), len })?;
        let mut reader = Self { path, header, input, left };
        reader.verify()?;
        if header.state != state {
            return Err(DigestError::OtherState { path: reader.path, found: header.state });
        }
        reader.rewind(left)?;
        Ok(reader)
    }

    /// What the file says of itself.
    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    fn verify(&mut self) -> Result<(), DigestError> {
        let damaged = |path: &Path| DigestError::Damaged { path: path.to_owned() };
        let (entries, end_block) = (self.left, blocks_of(self.header.disk_bytes));
        let mut hash = blake3::Hasher::new();
        hash.update(&encode_header(&self.header));
        let (mut next_block, mut order) = (0, None);
        while let Some((entry, bytes)) = self.next_raw()? {
            hash.update(&bytes);
            if entry.block < next_block || entry.block >= end_block {
                order.get_or_insert(entry.block);
            }
            next_block = entry.block.saturating_add(1);
        }
        let count: [u8; FOOTER_BYTES - HASH_BYTES] = self.take()?;
        hash.update(&count);
        let wanted: [u8; HASH_BYTES] = self.take()?;
        if hash.finalize() != blake3::Hash::from_bytes(wanted) {
            return Err(damaged(&self.path));
        }
        if u64::from_le_bytes(count) != entries {
            return Err(damaged(&self.path));
        }
        match order {
            Some(block) => Err(DigestError::Order { path: self.path.clone(), block }),
            None => Ok(()),
        }
    }

    fn rewind(&mut self, left: u64) -> Result<(), DigestError> {
        let entries = SeekFrom::Start(HEADER_BYTES as u64);
        self.input.seek(entries).map_err(|source| host(&self.path, source))?;
        self.left = left;
        Ok(())
    }

    fn next_raw(&mut self) -> Result<Option<(Entry, [u8; ENTRY_BYTES])>, DigestError> {
        if self.left == 0 {
            return Ok(None);
        }
        let bytes: [u8; ENTRY_BYTES] = self.take()?;
        self.left -= 1;
        let mut fields = Fields(&bytes);
        let entry =
            Entry { block: u64::from_le_bytes(fields.take()), digest: BlockDigest(fields.take()) };
        Ok(Some((entry, bytes)))
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], DigestError> {
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes).map_err(|source| host(&self.path, source))?;
        Ok(bytes)
    }
}

impl Iterator for DigestReader {
    type Item = Result<Entry, DigestError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_raw().map(|found| found.map(|(entry, _)| entry)).transpose()
    }
}

/// Reads the header of a file without believing that the rest is whole.
pub(crate) fn peek(path: &Path) -> Result<Header, DigestError> {
    let file = File::open(path).map_err(|source| host(path, source))?;
    read_header(path, &mut &file)
}

fn read_header(path: &Path, input: &mut impl Read) -> Result<Header, DigestError> {
    let foreign = || DigestError::Foreign { path: path.to_owned() };
    let mut bytes = [0; HEADER_BYTES];
    input.read_exact(&mut bytes).map_err(|source| match source.kind() {
        io::ErrorKind::UnexpectedEof => foreign(),
        _ => host(path, source),
    })?;
    let mut fields = Fields(&bytes);
    if fields.take() != MAGIC {
        return Err(foreign());
    }
    let version = u32::from_le_bytes(fields.take());
    let block_bytes = u32::from_le_bytes(fields.take());
    if version != VERSION || u64::from(block_bytes) != BLOCK_BYTES {
        return Err(DigestError::Unsupported { path: path.to_owned(), version, block_bytes });
    }
    Ok(Header {
        disk_bytes: u64::from_le_bytes(fields.take()),
        state: StateId {
            uuid: Uuid::from_bytes(fields.take()),
            sequence: u64::from_le_bytes(fields.take()),
        },
        lineage: Uuid::from_bytes(fields.take()),
        disk: DiskIdentity(fields.take()),
    })
}

fn encode_header(header: &Header) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&BLOCK_FIELD.to_le_bytes());
    bytes.extend_from_slice(&header.disk_bytes.to_le_bytes());
    bytes.extend_from_slice(header.state.uuid.as_bytes());
    bytes.extend_from_slice(&header.state.sequence.to_le_bytes());
    bytes.extend_from_slice(header.lineage.as_bytes());
    bytes.extend_from_slice(&header.disk.0);
    bytes
}

/// The number of entries in a file of `len` bytes, if a file can be that long.
fn entries_in(len: u64) -> Option<u64> {
    let entries = len.checked_sub((HEADER_BYTES + FOOTER_BYTES) as u64)?;
    (entries % ENTRY_BYTES as u64 == 0).then_some(entries / ENTRY_BYTES as u64)
}

/// Fixed-size fields of a record whose length the caller knows; what is not there reads as zeros.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }
}

fn host(path: &Path, source: io::Error) -> DigestError {
    DigestError::Host { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const BLOCKS: u64 = 1000;

    fn header() -> Header {
        let state = StateId::following(None);
        Header {
            disk_bytes: BLOCKS * BLOCK_BYTES - 7,
            state,
            lineage: state.uuid,
            disk: DiskIdentity([7; 32]),
        }
    }

    fn write(directory: &Path, header: &Header, entries: &BTreeMap<u64, [u8; 32]>) -> PathBuf {
        let mut writer = DigestWriter::create(directory, header).unwrap();
        for (block, digest) in entries {
            writer.push(Entry { block: *block, digest: BlockDigest(*digest) }).unwrap();
        }
        writer.finish().unwrap().publish().unwrap();
        path_of(directory, header.state)
    }

    fn any_entries() -> impl Strategy<Value = BTreeMap<u64, [u8; 32]>> {
        proptest::collection::btree_map(0..BLOCKS, any::<[u8; 32]>(), 0..60)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_was_written_is_read_in_order(entries in any_entries()) {
            let (directory, header) = (tempfile::tempdir().unwrap(), header());
            let path = write(directory.path(), &header, &entries);
            let reader = DigestReader::open(directory.path(), header.state).unwrap();
            prop_assert_eq!(reader.header(), &header);
            prop_assert_eq!(&peek(&path).unwrap(), &header);
            let read: BTreeMap<_, _> =
                reader.map(|entry| entry.unwrap()).map(|entry| (entry.block, entry.digest.0)).collect();
            prop_assert_eq!(read, entries);
        }

        #[test]
        fn a_flipped_bit_is_found(entries in any_entries(), at in any::<prop::sample::Index>(), bit in 0..8u8) {
            let (directory, header) = (tempfile::tempdir().unwrap(), header());
            let path = write(directory.path(), &header, &entries);
            let mut bytes = fs::read(&path).unwrap();
            *at.get_mut(&mut bytes) ^= 1 << bit;
            fs::write(&path, bytes).unwrap();
            prop_assert!(DigestReader::open(directory.path(), header.state).is_err());
        }

        #[test]
        fn a_cut_or_grown_file_is_found(
            entries in any_entries(), keep in any::<prop::sample::Index>(), more in 1usize..200, cut in any::<bool>(),
        ) {
            let (directory, header) = (tempfile::tempdir().unwrap(), header());
            let path = write(directory.path(), &header, &entries);
            let mut bytes = fs::read(&path).unwrap();
            match cut {
                true => bytes.truncate(keep.index(bytes.len())),
                false => bytes.resize(bytes.len() + more, 0),
            }
            fs::write(&path, bytes).unwrap();
            prop_assert!(DigestReader::open(directory.path(), header.state).is_err());
        }
    }

    #[test]
    fn blocks_out_of_order_or_behind_the_end_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = DigestWriter::create(directory.path(), &header()).unwrap();
        let entry = |block| Entry { block, digest: BlockDigest([1; 32]) };
        writer.push(entry(5)).unwrap();
        assert!(matches!(writer.push(entry(5)), Err(DigestError::Order { block: 5, .. })));
        assert!(matches!(writer.push(entry(4)), Err(DigestError::Order { block: 4, .. })));
        assert!(matches!(writer.push(entry(BLOCKS)), Err(DigestError::Order { .. })));
        writer.push(entry(BLOCKS - 1)).unwrap();
    }

    #[test]
    fn a_file_that_was_not_published_leaves_nothing() {
        let (directory, header) = (tempfile::tempdir().unwrap(), header());
        drop(DigestWriter::create(directory.path(), &header).unwrap());
        drop(DigestWriter::create(directory.path(), &header).unwrap().finish().unwrap());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        let absent = DigestReader::open(directory.path(), header.state);
        assert!(matches!(absent, Err(DigestError::Absent { .. })));
    }

    #[test]
    fn a_file_under_another_name_is_refused() {
        let (directory, header) = (tempfile::tempdir().unwrap(), header());
        let path = write(directory.path(), &header, &BTreeMap::new());
        let other = StateId::following(None);
        fs::rename(path, path_of(directory.path(), other)).unwrap();
        let refused = DigestReader::open(directory.path(), other);
        assert!(
            matches!(refused, Err(DigestError::OtherState { found, .. }) if found == header.state)
        );
    }
}
