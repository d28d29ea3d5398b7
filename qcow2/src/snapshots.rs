//! Internal snapshots of an open image: listing, making, applying and deleting them. The bytes of their table are
//! `snapshot`'s, and how a new state of the metadata gets into the file is `republish`'s.

use std::time::{SystemTime, UNIX_EPOCH};

use block::{ByteRange, HostFile};

use crate::error::{Corruption, Error, Fault, Feature, SnapshotError};
use crate::header::Header;
use crate::image::Image;
use crate::republish::Present;
use crate::snapshot::{
    self, Decoded, MAX_SNAPSHOT_NAME_BYTES, MAX_SNAPSHOT_TABLE_BYTES, Snapshot, SnapshotEntry,
    decode,
};
use crate::tally::TablePlace;

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

impl Image {
    /// Keeps the disk as it is now as an internal snapshot, and gives it a new id. Names need not be unique.
    ///
    /// Requests wait while the snapshot is made, and go on after it; what had returned before is in it.
    ///
    /// # Errors
    /// [`Error::Snapshot`] for a name that is too long, and where there can be no snapshots.
    /// [`Feature::RefcountTooNarrow`] where refcounts cannot count it, [`Error::Damaged`] for a damaged image,
    /// [`Error::Host`]: nothing has changed then. [`Error::Poisoned`] where taking effect failed.
    pub async fn create_snapshot(&self, name: &str) -> Result<Snapshot, Error> {
        let (len, limit) = (name.len(), MAX_SNAPSHOT_NAME_BYTES);
        if len > limit || name.contains('\0') {
            return Err(self.refused(SnapshotError::Name { len, limit }));
        }
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut made = None;
        let make = |present: &Present| {
            let header = &present.header;
            self.check_internal_data(header)?;
            if header.refcount_order == 0 {
                let feature = Feature::RefcountTooNarrow { bits: 1, needed: 2 };
                return Err(self.inner.fault(Fault::Unsupported(feature)));
            }
            let mut state = present.unchanged();
            let entry = SnapshotEntry {
                l1_at: header.l1_at,
                l1_entries: u32::try_from(header.l1_entries).unwrap_or(u32::MAX),
                id: snapshot::new_id(&state.snapshots),
                name: name.as_bytes().to_vec(),
                date_secs: u32::try_from(since.as_secs()).unwrap_or(u32::MAX),
                date_nanos: since.subsec_nanos(),
                vm_clock_nanos: 0,
                vm_state_bytes: 0,
                disk_bytes: Some(header.size_bytes),
                icount: None,
                unknown: Vec::new(),
            };
            made = Some(entry.describe(header.size_bytes));
            state.snapshots.push(entry);
            Ok(state)
        };
        let _alone = self.inner.structure.lock().await;
        self.inner.republish(make).await?;
        // There is no new state that was not made.
        made.ok_or_else(|| self.not_found(name))
    }

    /// Makes the disk what it was when a snapshot was taken, which an id or else a name tells. The snapshot stays. The
    /// disk gets the size that it had then.
    ///
    /// # Errors
    /// [`Error::Snapshot`], also for an image with dirty bitmaps, which would not tell of the change. Otherwise as
    /// [`Image::create_snapshot`].
    pub async fn apply_snapshot(&self, id_or_name: &str) -> Result<(), Error> {
        let make = |present: &Present| {
            if present.header.has_bitmaps() {
                return Err(self.refused(SnapshotError::Bitmaps));
            }
            self.check_internal_data(&present.header)?;
            let mut state = present.unchanged();
            let at = snapshot::find(&state.snapshots, id_or_name);
            let entry = at.and_then(|at| state.snapshots.get(at));
            let entry = entry.ok_or_else(|| self.not_found(id_or_name))?;
            let checked = entry.check(present.header.geometry, present.file_bytes);
            checked.map_err(|fault| self.inner.fault(fault))?;
            state.tree = TablePlace { at: entry.l1_at, entries: u64::from(entry.l1_entries) };
            state.size_bytes = entry.disk_bytes.unwrap_or(present.header.size_bytes);
            Ok(state)
        };
        let _alone = self.inner.structure.lock().await;
        self.inner.republish(make).await
    }

    /// Forgets a snapshot, which an id or else a name tells, and frees what only it referenced.
    ///
    /// # Errors
    /// [`Error::Snapshot`]; otherwise as [`Image::create_snapshot`].
    pub async fn delete_snapshot(&self, id_or_name: &str) -> Result<(), Error> {
        self.delete_found(id_or_name, snapshot::find).await
    }

    /// As [`Image::delete_snapshot`], by name alone, as `qemu-img snapshot -d` does: the oldest of that name goes, and
    /// one that has it as its id stays.
    ///
    /// # Errors
    /// As [`Image::delete_snapshot`].
    pub async fn delete_snapshot_named(&self, name: &str) -> Result<(), Error> {
        self.delete_found(name, snapshot::find_named).await
    }

    async fn delete_found(
        &self,
        wanted: &str,
        find: fn(&[SnapshotEntry], &str) -> Option<usize>,
    ) -> Result<(), Error> {
        let make = |present: &Present| {
            self.check_internal_data(&present.header)?;
            let mut state = present.unchanged();
            let at = find(&state.snapshots, wanted).ok_or_else(|| self.not_found(wanted))?;
            state.snapshots.remove(at);
            Ok(state)
        };
        let _alone = self.inner.structure.lock().await;
        self.inner.republish(make).await
    }

    fn check_internal_data(&self, header: &Header) -> Result<(), Error> {
        if header.entry_format().external_data {
            return Err(self.refused(SnapshotError::ExternalDataFile));
        }
        Ok(())
    }

    fn not_found(&self, id_or_name: &str) -> Error {
        self.refused(SnapshotError::NotFound(id_or_name.to_owned()))
    }

    fn refused(&self, what: SnapshotError) -> Error {
        Error::Snapshot { file: self.inner.path.clone(), what }
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

/// A snapshot table that may break the format, as far as it can be read.
#[derive(Clone, Debug)]
pub(crate) struct Salvaged {
    pub entries: Vec<SnapshotEntry>,
    /// The length of what was read in bytes, without padding behind it.
    pub len: u64,
    /// How it breaks the format or passes a limit first.
    pub fault: Option<Fault>,
}

/// Reads what can be read of the snapshot table that a header names.
///
/// # Errors
/// [`Error::Host`].
pub(crate) async fn salvage_snapshots(file: &HostFile, header: &Header) -> Result<Salvaged, Error> {
    let fault = match read_snapshots(file, header).await {
        Ok(SnapshotTable { entries, len }) => return Ok(Salvaged { entries, len, fault: None }),
        Err(Error::Corrupt { at, what, .. }) => Fault::Corrupt { at, what },
        Err(Error::Unsupported { feature, .. }) => Fault::Unsupported(feature),
        Err(error) => return Err(error),
    };
    let at = header.snapshots_at.0;
    let range = ByteRange::between(at, at.saturating_add(MAX_SNAPSHOT_TABLE_BYTES));
    let inside = range.intersection(ByteRange::between(0, file.len()));
    let bytes = file.read(inside).await?;
    let (entries, len) = snapshot::salvage(&bytes, header.snapshots);
    Ok(Salvaged { entries, len, fault: Some(fault) })
}
