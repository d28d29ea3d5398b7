//! All that an image knows about itself, behind one lock: mapping, refcounts, free space. It decides and never does
//! I/O; what it needs of the driver it says with [`Step`].

use std::collections::HashSet;

use block::ByteRange;

use crate::cache::{L2_TABLES, REFCOUNT_BLOCKS};
use crate::error::Fault;
use crate::free::FreeRuns;
use crate::header::Header;
use crate::mapping::{Extent, Mapping, Step, Table};
use crate::overlap::{RunSet, Tables};
use crate::refcount::{BlockState, Refcounts};
use crate::streams::ImageId;
use crate::units::{ClusterGeometry, HostCluster, HostOffset, Run};

/// The state of an image.
#[derive(Debug)]
pub(crate) struct Core {
    /// The name of the image among all that are open.
    pub(crate) id: ImageId,
    pub(crate) geometry: ClusterGeometry,
    pub(crate) size_bytes: u64,
    /// The size of the backing file, where there is one.
    pub(crate) backing_bytes: Option<u64>,
    pub(crate) header: Header,
    pub(crate) map: Mapping,
    pub(crate) refs: Refcounts,
    /// Clusters with refcount 0 that may be taken.
    pub(crate) free: FreeRuns,
    /// The refcount blocks before this one were looked through for holes, or are not needed for that.
    pub(crate) looked_at: u64,
    /// The file has grown since the last look.
    pub(crate) may_look: bool,
    /// The cluster behind the last that is used: where the file grows. 0 until [`Core::find_end`] has found it.
    pub(crate) end: u64,
    /// Clusters from here on were never written: they read as zeros.
    pub(crate) virgin_floor: u64,
    /// How long the file was when it was opened, in bytes, without what was freed at its end since.
    pub(crate) kept_bytes: u64,
    /// Clusters that this session has freed and not taken again.
    pub(crate) freed: RunSet,
    /// The length of the file that is known to be there, in bytes.
    pub(crate) capacity_bytes: u64,
    /// Clusters that were never written read as zeros, so that only data needs to be written to them.
    pub(crate) fresh_reads_zero: bool,
    /// Metadata that never moves: header, L1 table, snapshot table.
    pub(crate) fixed: RunSet,
    /// The clusters of L2 tables and refcount blocks. Only for writing: a wrong refcount must not make room of them.
    pub(crate) tables: Tables,
    /// The clusters of bitmaps, as far as they are known: from when the directory is read, which is before the first
    /// change of the disk.
    pub(crate) bitmaps: RunSet,
    /// Clusters of data that two entries call their own.
    pub(crate) used_twice: HashSet<HostCluster>,
    /// References that are gone in memory, and on disk after the next flush: their refcounts may drop then.
    pub(crate) dropped: Vec<Run>,
    /// References that are gone on disk, too: their refcounts may drop now.
    pub(crate) ready: Vec<Run>,
    /// Where compressed clusters go on in a host cluster that they have not filled.
    pub(crate) packing: Option<HostOffset>,
}

impl Core {
    /// The state of an image of which header, L1 table and refcount table were read.
    pub(crate) fn new(
        header: Header,
        map: Mapping,
        refs: Refcounts,
        backing_bytes: Option<u64>,
        file_bytes: u64,
    ) -> Self {
        let geometry = header.geometry;
        let l1 = Run {
            start: geometry.host_cluster(header.l1_at),
            count: geometry.clusters(header.l1_entries * 8),
        };
        let mut fixed = RunSet::default();
        fixed.push(Run::one(HostCluster(0)));
        fixed.push(l1);
        if let Some(luks) = header.extensions.luks {
            let count = geometry.clusters(luks.bytes);
            fixed.push(Run { start: geometry.host_cluster(luks.at), count });
        }
        let clusters = geometry.clusters(file_bytes);
        // What lies in a data file is not known, and zeros on the host are no zeros once decrypted.
        let fresh_reads_zero = !map.format().external_data && header.crypt_method == 0;
        Self {
            id: ImageId::new(),
            geometry,
            size_bytes: header.size_bytes,
            backing_bytes,
            fresh_reads_zero,
            header,
            map,
            refs,
            free: FreeRuns::default(),
            looked_at: 0,
            may_look: false,
            end: 0,
            virgin_floor: clusters,
            kept_bytes: file_bytes,
            freed: RunSet::default(),
            capacity_bytes: file_bytes,
            fixed,
            tables: Tables::default(),
            bitmaps: RunSet::default(),
            used_twice: HashSet::new(),
            dropped: Vec::new(),
            ready: Vec::new(),
            packing: None,
        }
    }

    /// Where `range` lives, see [`Mapping::lookup`].
    pub(crate) fn lookup(
        &mut self,
        range: ByteRange,
        most: usize,
    ) -> Result<Step<Vec<Extent>>, Fault> {
        self.map.lookup(range, most)
    }

    /// Where the file may end when it is closed, in bytes: what was in it before and was not freed since is kept, also
    /// where refcounts say that nobody uses it. They may be wrong, and then it is somebody's data.
    pub(crate) const fn kept_end_bytes(&self) -> u64 {
        let used = self.end_bytes();
        if used > self.kept_bytes { used } else { self.kept_bytes }
    }

    /// Where the file ends that holds all that is used, in bytes.
    pub(crate) const fn end_bytes(&self) -> u64 {
        self.end.saturating_mul(self.geometry.bytes())
    }

    /// Whether unallocated guest bytes from `at` on read as zeros.
    pub(crate) fn reads_zero_from(&self, at: u64) -> bool {
        self.backing_bytes.is_none_or(|bytes| at >= bytes)
    }

    /// From now on zeros are stored as such wherever they are written, as over a backing file that has data
    /// everywhere: one that has not been recorded yet may.
    pub(crate) fn expect_any_backing(&mut self) {
        self.backing_bytes = Some(u64::MAX);
    }

    /// Takes in a table that was read.
    ///
    /// # Errors
    /// What [`Mapping::insert_loaded`] refuses.
    pub(crate) fn loaded(&mut self, table: Table, bytes: &[u8]) -> Result<(), Fault> {
        if !self.is_missing(table) {
            return Ok(());
        }
        match table {
            Table::L2 { l1, at } => {
                self.map.insert_loaded(l1, at, bytes)?;
                if self.end > 0 && !self.map.format().external_data {
                    self.note_used_twice(l1);
                }
            }
            Table::Refcounts { block, at } => {
                self.refs.insert_loaded(block, at, bytes.to_vec());
                self.collect_free(block);
            }
        }
        Ok(())
    }

    /// Whether a table still has to be loaded, from where it says.
    pub(crate) fn is_missing(&self, table: Table) -> bool {
        match table {
            Table::L2 { l1, at } => self.map.is_missing(l1, at),
            Table::Refcounts { block, at } => {
                self.refs.state(block) == Ok(BlockState::Unloaded(at))
            }
        }
    }

    /// Whether so much of what all images keep in memory waits to be written here that only a flush helps.
    pub(crate) fn is_full(&self) -> bool {
        (L2_TABLES.is_over() && self.map.dirty_bytes() > L2_TABLES.dirty_bytes())
            || (REFCOUNT_BLOCKS.is_over()
                && self.refs.dirty_bytes() > REFCOUNT_BLOCKS.dirty_bytes())
    }
}
