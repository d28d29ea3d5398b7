//! Internal snapshots of an open image: listing them, and reading their table from the file. The bytes of the table
//! are `snapshot`'s.

use block::{ByteRange, HostFile};

use crate::error::{Corruption, Error, Fault};
use crate::header::Header;
use crate::image::Image;
use crate::snapshot::{Decoded, Snapshot, SnapshotEntry, decode};

/// What is read of a snapshot table at first, in bytes.
const FIRST_READ_BYTES: u64 = 64 << 10;

impl Image {
    /// The internal snapshots, oldest first. Nothing but their table is read.
    ///
    /// # Errors
    /// [`Error::Corrupt`] and [`Error::Unsupported`] for a table that breaks the format or a limit.
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>, Error> {
        let live = self.inner.live()?;
        let header = self.inner.core.lock().header.clone();
        let table = read_snapshots(&live.file, &header).await?;
        let disk_bytes = header.size_bytes;
        Ok(table.entries.iter().map(|entry| entry.describe(disk_bytes)).collect())
    }
}

/// A snapshot table as it lies in a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SnapshotTable {
    pub entries: Vec<SnapshotEntry>,
    /// Its length in bytes, without padding behind it.
    pub len: u64,
}

/// Reads the snapshot table that a header names. Memory is bounded by the limit of the table.
pub(crate) async fn read_snapshots(
    file: &HostFile,
    header: &Header,
) -> Result<SnapshotTable, Error> {
    if header.snapshots == 0 {
        return Ok(SnapshotTable::default());
    }
    let at = header.snapshots_at;
    let left = file.len().saturating_sub(at.0);
    let mut wanted = FIRST_READ_BYTES;
    loop {
        let len = wanted.min(left);
        let bytes = file.read(ByteRange::between(at.0, at.0.saturating_add(len))).await?;
        let decoded = decode(&bytes, header.snapshots, at);
        match decoded.map_err(|fault| fault.of(file.path()))? {
            Decoded::Table { entries, len } => return Ok(SnapshotTable { entries, len }),
            Decoded::Needs(more) if more > left => {
                let what = Corruption::Truncated { what: "the snapshot table" };
                return Err(Fault::Corrupt { at, what }.of(file.path()));
            }
            // Twice as much each time, so that a long table is not decoded often.
            Decoded::Needs(more) => wanted = more.max(wanted.saturating_mul(2)),
        }
    }
}
