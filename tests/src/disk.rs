//! Source disks: sparse raw files with data that nothing can guess, and digests that cost what a disk holds rather
//! than what it measures.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::SeekFrom;

/// The block in which changes are found, in bytes.
pub const BLOCK: u64 = 64 << 10;

/// A raw disk image that a test writes to as a guest would.
pub struct Disk {
    path: PathBuf,
    size_bytes: u64,
    writes: u64,
}

impl Disk {
    /// An empty sparse disk.
    ///
    /// # Errors
    /// What the host says.
    pub fn create(path: &Path, size_bytes: u64) -> Result<Self> {
        File::create_new(path)?.set_len(size_bytes)?;
        Ok(Self { path: path.to_owned(), size_bytes, writes: 0 })
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// As a source for an agent.
    pub fn source(&self) -> String {
        format!("file:{}", self.path.display())
    }

    /// Its size.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Writes fresh data at `offset`: no two calls write the same bytes.
    ///
    /// # Errors
    /// What the host says.
    pub fn write(&mut self, offset: u64, len: u64) -> Result<()> {
        self.writes += 1;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.writes.to_le_bytes());
        hasher.update(self.path.as_os_str().as_encoded_bytes());
        let mut bytes = hasher.finalize_xof();
        let file = File::options().write(true).open(&self.path)?;
        let mut piece = vec![0; usize::try_from(len.min(1 << 20))?];
        let mut done = 0;
        while done < len {
            let part = &mut piece[..usize::try_from((len - done).min(1 << 20))?];
            bytes.fill(part);
            file.write_all_at(part, offset + done)?;
            done += part.len() as u64;
        }
        Ok(())
    }

    /// Writes about `total` bytes in pieces of a few blocks, spread over the whole disk; answers the blocks touched.
    ///
    /// The places depend on the number of writes before, so each call chooses others.
    ///
    /// # Errors
    /// What the host says.
    pub fn scatter(&mut self, total: u64, piece: u64) -> Result<BTreeSet<u64>> {
        let mut touched = BTreeSet::new();
        let pieces = (total / piece).max(1);
        let stride = self.size_bytes / pieces;
        anyhow::ensure!(stride >= piece, "the disk is too small for {total} bytes");
        let slack = (stride - piece) / 512 + 1;
        for index in 0..pieces {
            let jitter = (self.writes.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) % slack * 512;
            let offset = index * stride + jitter;
            self.write(offset, piece)?;
            touched.extend(offset / BLOCK..(offset + piece).div_ceil(BLOCK));
        }
        Ok(touched)
    }

    /// Punches a hole, as a guest's trim would.
    ///
    /// # Errors
    /// What the host says.
    pub fn punch(&self, offset: u64, len: u64) -> Result<()> {
        use rustix::fs::FallocateFlags as Flags;
        let file = File::options().write(true).open(&self.path)?;
        Ok(rustix::fs::fallocate(&file, Flags::PUNCH_HOLE | Flags::KEEP_SIZE, offset, len)?)
    }

    /// The digest of its content now.
    ///
    /// # Errors
    /// What the host says.
    pub fn digest(&self) -> Result<String> {
        digest(&self.path)
    }
}

/// A digest of a raw file: its length and every block that is not all zero, with its place.
///
/// Equal content gives equal digests, however it is stored; holes are not read.
///
/// # Errors
/// What the host says.
pub fn digest(path: &Path) -> Result<String> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    let len = file.metadata()?.len();
    let mut all = blake3::Hasher::new();
    all.update(&len.to_le_bytes());
    let mut buffer = vec![0; usize::try_from(16 * BLOCK)?];
    let mut at = 0;
    while at < len {
        let Ok(data) = rustix::fs::seek(&file, SeekFrom::Data(at)) else { break };
        let hole = rustix::fs::seek(&file, SeekFrom::Hole(data))?;
        let mut place = data - data % BLOCK;
        while place < hole {
            let part = &mut buffer[..usize::try_from((hole - place).min(16 * BLOCK))?];
            let part_len = part.len() as u64;
            // The end of the data need not be the end of a block: read on to that.
            let whole = part_len.next_multiple_of(BLOCK).min(len - place);
            let part = &mut buffer[..usize::try_from(whole)?];
            file.read_exact_at(part, place)?;
            for (index, block) in part.chunks(usize::try_from(BLOCK)?).enumerate() {
                if block.iter().any(|byte| *byte != 0) {
                    all.update(&(place / BLOCK + index as u64).to_le_bytes());
                    all.update(block);
                }
            }
            place += whole;
        }
        at = place.max(hole);
    }
    Ok(all.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_does_not_depend_on_how_zeros_are_stored() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (sparse, full) = (folder.path().join("sparse"), folder.path().join("full"));
        let mut bytes = vec![0_u8; 300_000];
        bytes[131_100..131_200].fill(7);
        std::fs::write(&full, &bytes)?;
        let file = File::create(&sparse)?;
        file.set_len(300_000)?;
        file.write_all_at(&bytes[131_072..135_168], 131_072)?;
        assert_eq!(digest(&sparse)?, digest(&full)?);
        file.write_all_at(&[1], 299_999)?;
        assert_ne!(digest(&sparse)?, digest(&full)?);
        Ok(())
    }

    #[test]
    fn a_scattered_disk_changes_only_the_blocks_it_names() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let mut disk = Disk::create(&folder.path().join("disk"), 64 << 20)?;
        disk.scatter(4 << 20, 256 << 10)?;
        let before = std::fs::read(disk.path())?;
        let touched = disk.scatter(1 << 20, 128 << 10)?;
        let after = std::fs::read(disk.path())?;
        let block = usize::try_from(BLOCK)?;
        let changed: BTreeSet<u64> = (0..)
            .zip(before.chunks(block).zip(after.chunks(block)))
            .filter(|(_, (old, new))| old != new)
            .map(|(index, _)| index)
            .collect();
        assert_eq!(changed, touched);
        Ok(())
    }
}
