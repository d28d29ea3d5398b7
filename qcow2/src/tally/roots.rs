//! Where the walk through an image starts: what the header, the snapshot table and the bitmap directory name. Read once,
//! so that the walk itself knows neither of the three.

use block::HostFile;

use crate::error::Error;
use crate::header::Header;
use crate::snapshots::read_snapshots;
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
        match read_snapshots(file, header).await {
            Ok(table) => {
                roots.snapshot_table =
                    (table.len > 0).then_some(Piece { at: header.snapshots_at, len: table.len });
                let place = |at, entries: u32| TablePlace { at, entries: u64::from(entries) };
                let places = table.entries.iter().map(|entry| place(entry.l1_at, entry.l1_entries));
                roots.snapshots = places.collect();
            }
            Err(Error::Host(error)) => return Err(Error::Host(error)),
            Err(error) => {
                let (what, at) = ("snapshot table", header.snapshots_at);
                visit(Finding::Unreadable { what, at, reason: error.to_string() }, 1);
                roots.incomplete = true;
            }
        }
        roots.incomplete |= header.extensions.bitmaps.is_some();
        Ok(roots)
    }
}
