//! Where the walk through an image starts: what the header, the snapshot table and the bitmap directory name. Read once,
//! so that the walk itself knows neither of the three.

use block::{ByteRange, HostFile};

use crate::bitmap::codec::{BitmapsExtension, DirectoryEntry, parse_directory};
use crate::error::{Corruption, Error, Fault, TableKind};
use crate::header::{BITMAPS, Header};
use crate::snapshots::{Salvaged, salvage_snapshots};
use crate::tally::finding::Finding;
use crate::tally::walk::Visit;
use crate::units::{ClusterGeometry, HostOffset};

/// A table somewhere in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TablePlace {
    /// Where it starts.
    pub at: HostOffset,
    /// Its entries of 8 bytes.
    pub entries: u64,
}

impl TablePlace {
    /// Its length in bytes.
    pub(crate) const fn bytes(self) -> u64 {
        self.entries.saturating_mul(8)
    }
}

/// A piece of the file that is used as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Where it starts.
    pub at: HostOffset,
    /// Its length in bytes.
    pub len: u64,
}

/// All that an image refers to directly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Roots {
    /// The version of the format.
    pub version: u32,
    /// The cluster size.
    pub geometry: ClusterGeometry,
    /// Data clusters lie in another file.
    pub external_data: bool,
    /// The active L1 table.
    pub l1: TablePlace,
    /// The refcount table.
    pub refcount_table: TablePlace,
    /// The L1 tables of the snapshots, in the order of the snapshot table.
    pub snapshots: Vec<TablePlace>,
    /// The snapshot table.
    pub snapshot_table: Option<Piece>,
    /// The encryption header.
    pub encryption: Option<Piece>,
    /// The bitmap directory.
    pub bitmap_directory: Option<Piece>,
    /// The bitmap tables.
    pub bitmaps: Vec<TablePlace>,
    /// Something that leads to more could not be read.
    pub incomplete: bool,
}

impl Roots {
    /// What a header names itself; snapshots and bitmaps are left out.
    pub(crate) fn of_header(header: &Header) -> Self {
        Self {
            version: header.version,
            geometry: header.geometry,
            external_data: header.has_data_file(),
            l1: TablePlace { at: header.l1_at, entries: header.l1_entries },
            refcount_table: TablePlace {
                at: header.refcount_table_at,
                entries: header.refcount_table_clusters.saturating_mul(header.geometry.bytes() / 8),
            },
            snapshots: Vec::new(),
            snapshot_table: None,
            encryption: header.extensions.luks.map(|luks| Piece { at: luks.at, len: luks.bytes }),
            bitmap_directory: None,
            bitmaps: Vec::new(),
            incomplete: false,
        }
    }

    /// What a header, the snapshot table and the bitmap directory name. What cannot be understood is told to `visit`
    /// and makes the roots incomplete.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub(crate) async fn read(
        file: &HostFile,
        header: &Header,
        visit: Visit<'_>,
    ) -> Result<Self, Error> {
        let mut roots = Self::of_header(header);
        let Salvaged { entries, len, fault } = salvage_snapshots(file, header).await?;
        roots.snapshot_table = (len > 0).then_some(Piece { at: header.snapshots_at, len });
        let place = |at, entries: u32| TablePlace { at, entries: u64::from(entries) };
        let places = entries.iter().map(|entry| place(entry.l1_at, entry.l1_entries));
        roots.snapshots = places.collect();
        match fault {
            // All that they refer to is known.
            Some(Fault::Corrupt { at, what: what @ Corruption::SnapshotText { .. } })
                if entries.len() as u64 == u64::from(header.snapshots) =>
            {
                visit.fault(Finding::SnapshotEntry { at, what }, 1);
            }
            Some(fault) => {
                let error = fault.of(file.path());
                roots.cannot_read(TableKind::Snapshots, header.snapshots_at, error, visit)?;
            }
            None => {}
        }
        // Without the bit, nobody may rely on what the extension says, not even on where it leads.
        if let Some(data) = &header.extensions.bitmaps
            && header.autoclear & BITMAPS != 0
        {
            let at = HostOffset(0);
            match BitmapsExtension::parse(data, at, header.geometry) {
                Ok(extension) => {
                    roots.read_bitmaps(file, &extension, header.size_bytes, visit).await?
                }
                Err(fault) => {
                    let error = fault.of(file.path());
                    roots.cannot_read(TableKind::BitmapDirectory, at, error, visit)?;
                }
            }
        }
        if header.version >= 3 && header.has_bitmaps() && header.extensions.bitmaps.is_none() {
            let (at, what) = (HostOffset(88), Corruption::BitmapsWithoutExtension);
            visit.fault(Finding::Unreadable { table: TableKind::BitmapDirectory, at, what }, 1);
        }
        Ok(roots)
    }

    async fn read_bitmaps(
        &mut self,
        file: &HostFile,
        extension: &BitmapsExtension,
        size_bytes: u64,
        visit: Visit<'_>,
    ) -> Result<(), Error> {
        let (at, len) = (extension.directory_at, extension.directory_bytes);
        self.bitmap_directory = Some(Piece { at, len });
        let range = ByteRange::between(at.0, at.0.saturating_add(len));
        let inside = range.intersection(ByteRange::between(0, file.len()));
        let bytes = file.read(inside).await?;
        match parse_directory(&bytes, extension, self.geometry) {
            Ok(entries) => {
                for entry in &entries {
                    // Writing such an image is refused.
                    if let Err(Fault::Corrupt { at, what }) =
                        entry.check_size(self.geometry, size_bytes)
                    {
                        visit.fault(Finding::Unreadable { table: TableKind::Bitmap, at, what }, 1);
                    }
                }
                let place = |entry: &DirectoryEntry| TablePlace {
                    at: entry.table_at,
                    entries: u64::from(entry.table_entries),
                };
                self.bitmaps = entries.iter().map(place).collect();
                Ok(())
            }
            Err(fault) => {
                let error = fault.of(file.path());
                self.cannot_read(TableKind::BitmapDirectory, at, error, visit)
            }
        }
    }

    /// Notes that a table could not be understood.
    fn cannot_read(
        &mut self,
        table: TableKind,
        at: HostOffset,
        error: Error,
        visit: Visit<'_>,
    ) -> Result<(), Error> {
        let finding = match error {
            Error::Corrupt { at, what, .. } => Finding::Unreadable { table, at, what },
            Error::Unsupported { feature, .. } => {
                Finding::BeyondLimits { table, at, what: feature }
            }
            error => return Err(error),
        };
        visit.fault(finding, 1);
        self.incomplete = true;
        Ok(())
    }
}
