//! The core without the driver: what an image's metadata says and how it changes, for programs that move the bytes
//! themselves. No file is opened here, and nothing waits.
//!
//! A [`Metadata`] is fed with the bytes it asks for and answers where guest bytes lie, where a write has to go, and in
//! which order its own changes must reach the disk.
//!
//! ```
//! use block::ByteRange;
//! use qcow2::sans_io::{Metadata, Place, Step, Tables};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("disk.qcow2");
//! # tokio::runtime::Builder::new_current_thread().build()?.block_on(async {
//! #     use block::BlockDevice;
//! #     qcow2::Image::create(&path, &qcow2::CreateOptions::new(1 << 30)).await?;
//! #     let image = qcow2::Image::open(&path, qcow2::OpenOptions::writing()).await?;
//! #     image.write(1 << 20, vec![7; 65536].into(), block::Durability::Deferred).await?;
//! #     image.close().await?;
//! #     Ok::<_, Box<dyn std::error::Error>>(())
//! # })?;
//! let file = std::fs::read(&path)?; // However a program gets its bytes.
//! let part = |range: ByteRange| &file[range.start() as usize..range.end() as usize];
//!
//! let tables = Tables::of_header(&file, file.len() as u64)?;
//! let (l1, refcounts) = (part(tables.l1()).to_vec(), part(tables.refcounts()).to_vec());
//! let mut metadata = Metadata::new(tables, &l1, &refcounts, None, file.len() as u64);
//!
//! let wanted = ByteRange::between(1 << 20, (1 << 20) + 512);
//! let extents = loop {
//!     match metadata.lookup(wanted)? {
//!         Step::Ready(extents) => break extents,
//!         Step::Load(table) => {
//!             let bytes = part(metadata.bytes_of(table)).to_vec();
//!             metadata.loaded(table, &bytes)?;
//!         }
//!         Step::Grow(_) => unreachable!("reading needs no room"),
//!     }
//! };
//! let Place::Data { host, .. } = extents[0].place else { panic!("it was written") };
//! assert_eq!(file[host.0 as usize], 7);
//! # Ok(())
//! # }
//! ```

use block::ByteRange;

use crate::core::Core;
pub use crate::entry::Stream;
pub use crate::error::Fault;
pub use crate::flush::{Captured, FlushPlan, Reached};
use crate::header::Header;
pub use crate::mapping::{Extent, Place, Step, Table};
use crate::mapping::{Mapping, from_big_endian};
pub use crate::plan::{Area, Fill, Move, Reservation, WritePlan};
pub use crate::refcount::MetaWrite;
use crate::refcount::{RefcountWidth, Refcounts};
pub use crate::units::Run;
use crate::units::index;

/// How many extents a lookup answers at most.
const MOST_EXTENTS: usize = 1024;

/// What a header says of the tables that [`Metadata::new`] needs.
#[derive(Clone, Debug)]
pub struct Tables {
    header: Header,
}

impl Tables {
    /// Reads a header from the first cluster of an image of `file_bytes` bytes, or from more of it.
    ///
    /// # Errors
    /// What breaks the format, or is not known.
    pub fn of_header(cluster: &[u8], file_bytes: u64) -> Result<Self, Fault> {
        let header = Header::parse(cluster)?;
        header.check(file_bytes)?;
        Ok(Self { header })
    }

    /// The size of the virtual disk in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.header.size_bytes
    }

    /// The size of a cluster in bytes.
    pub fn cluster_bytes(&self) -> u64 {
        self.header.geometry.bytes()
    }

    /// Where the L1 table lies in the file.
    pub fn l1(&self) -> ByteRange {
        let at = self.header.l1_at.0;
        ByteRange::between(at, at.saturating_add(self.header.l1_entries * 8))
    }

    /// Where the refcount table lies in the file.
    pub fn refcounts(&self) -> ByteRange {
        let at = self.header.refcount_table_at.0;
        let len = self.header.refcount_table_clusters * self.cluster_bytes();
        ByteRange::between(at, at.saturating_add(len))
    }
}

/// The metadata of an image, as far as it has been loaded, with changes that are not written yet.
///
/// **The order of a write.** [`Metadata::plan_write`]; move the bytes of the plan; [`Metadata::publish`]. Requests that
/// meet in a cluster must not be planned at the same time. **The order of a flush.** [`Metadata::capture`]; write each
/// stage of the plan and sync behind it, the first also when it is empty; [`Metadata::landed`]; then drop the runs that
/// it names by [`Metadata::drop_run`], and give free what that names by [`Metadata::release`].
///
/// Snapshots, bitmaps and dirty or corrupt images are an [`crate::Image`]'s business: whoever writes here looks at the
/// header's features first.
#[derive(Debug)]
pub struct Metadata {
    core: Core,
}

impl Metadata {
    /// The metadata of an image of `file_bytes` bytes. `l1` and `refcounts` are the bytes that [`Tables`] names;
    /// `backing_bytes` is the size of the disk below, where there is one.
    pub fn new(
        tables: Tables,
        l1: &[u8],
        refcounts: &[u8],
        backing_bytes: Option<u64>,
        file_bytes: u64,
    ) -> Self {
        let header = tables.header;
        let geometry = header.geometry;
        let mut l1 = from_big_endian(l1);
        l1.resize(index(header.l1_entries), 0);
        let width = RefcountWidth::new(header.refcount_order).unwrap_or(RefcountWidth::DEFAULT);
        let table_run = Run {
            start: geometry.host_cluster(header.refcount_table_at),
            count: header.refcount_table_clusters,
        };
        let map = Mapping::new(header.entry_format(), header.l1_at, l1);
        let refs = Refcounts::new(geometry, width, from_big_endian(refcounts), table_run);
        let mut core = Core::new(header, map, refs, backing_bytes, file_bytes);
        core.find_tables();
        Self { core }
    }

    /// The bytes of the file that a table takes.
    pub fn bytes_of(&self, table: Table) -> ByteRange {
        let at = table.at().0;
        ByteRange::between(at, at.saturating_add(self.core.geometry.bytes()))
    }

    /// Takes in a table that was asked for.
    ///
    /// # Errors
    /// A table that lies where no table can, or is not whole.
    pub fn loaded(&mut self, table: Table, bytes: &[u8]) -> Result<(), Fault> {
        self.core.check_table(table)?;
        self.core.loaded(table, bytes)
    }

    /// The file has at least this length now; what is new in it reads as zeros.
    pub fn grown(&mut self, file_bytes: u64) {
        self.core.capacity_bytes = self.core.capacity_bytes.max(file_bytes);
    }

    /// Finds where `range` of the disk lives: extents in order, without gaps, which may end before the range does.
    ///
    /// # Errors
    /// What breaks the format where `range` begins.
    pub fn lookup(&mut self, range: ByteRange) -> Result<Step<Vec<Extent>>, Fault> {
        self.core.lookup(range, MOST_EXTENTS)
    }

    /// Finds the end of what is used. Needed once, before the first [`Metadata::plan_write`].
    ///
    /// # Errors
    /// A refcount table that breaks the format.
    pub fn find_end(&mut self) -> Result<Step<()>, Fault> {
        self.core.find_end()
    }

    /// Plans a write to `range`, which lies within the range of one L2 table. Clusters that it takes are counted from
    /// now on: publish the plan, or undo it.
    ///
    /// # Errors
    /// What breaks the format, or passes its limits; then nothing has changed.
    pub fn plan_write(&mut self, range: ByteRange) -> Result<Step<WritePlan>, Fault> {
        self.core.plan_write(range, &[])
    }

    /// Makes a plan's entries visible; its bytes are in the file.
    pub fn publish(&mut self, reservation: &Reservation) {
        self.core.publish(reservation);
    }

    /// Gives back what a plan took.
    pub fn undo(&mut self, reservation: &Reservation) {
        self.core.undo(reservation);
    }

    /// Takes what has to be written.
    pub fn capture(&mut self) -> (FlushPlan, Captured) {
        self.core.capture()
    }

    /// All of a plan is durable. Gives the runs that lost a reference.
    pub fn landed(&mut self, captured: Captured) -> Vec<Run> {
        self.core.landed(captured)
    }

    /// A flush was given up, after writes of this stage had begun: all of it has to be written again.
    pub fn revert(&mut self, captured: Captured, reached: Reached) {
        self.core.revert(captured, reached);
    }

    /// Drops one reference to each cluster of a run that [`Metadata::landed`] named. Gives those that nobody uses.
    ///
    /// # Errors
    /// A refcount table that breaks the format.
    pub fn drop_run(&mut self, run: Run) -> Result<Step<Vec<Run>>, Fault> {
        self.core.drop_run(run)
    }

    /// Clusters that nobody uses may be taken from now on.
    pub fn release(&mut self, runs: &[Run]) {
        self.core.release(runs);
    }
}
