//! Reading bitmaps from the file: the directory when it is first needed, the bits of a bitmap when somebody asks for
//! them. Whoever calls holds the turn.

use block::ByteRange;

use super::api::BitmapError;
use super::codec::{BitmapCluster, BitmapsExtension, parse_directory, table_entries};
use super::dirty::DirtyMap;
use super::track::{LiveBitmap, coverage_bits};
use crate::error::{Corruption, Error, Fault, TableKind};
use crate::image::{Inner, Live};
use crate::mapping::from_big_endian;
use crate::units::{HostOffset, Run};

/// How much of bitmap tables is read at most to know the clusters that they name, in bytes: the tables of a thousand
/// bitmaps over 32 TiB, with the usual sizes.
const MAX_GUARD_BYTES: u64 = 64 << 20;
/// Bits are read in pieces of so many bytes at most.
const READ_BYTES: u64 = 1 << 20;

impl Inner {
    /// Reads the directory, unless that was done.
    pub(super) async fn load_bitmaps(&self, live: &Live) -> Result<(), Error> {
        if self.bitmaps.with(|list| list.is_some()) {
            return Ok(());
        }
        let (extension, geometry, size_bytes) = {
            let core = self.core.lock();
            let extension = core.header.bitmaps().map_err(|fault| self.fault(fault))?;
            (extension, core.geometry, core.size_bytes)
        };
        let mut found = Vec::new();
        if let Some(extension) = extension {
            let bytes = self.read_directory(live, &extension).await?;
            let entries =
                parse_directory(&bytes, &extension, geometry).map_err(|fault| self.fault(fault))?;
            for entry in entries {
                entry.check_size(geometry, size_bytes).map_err(|fault| self.fault(fault))?;
                found.push(LiveBitmap::on_disk(entry, size_bytes, geometry));
            }
        }
        if !self.limits().read_only {
            self.guard_bitmaps(live, extension.as_ref(), &found).await;
        }
        self.bitmaps.with(|list| *list = Some(found));
        Ok(())
    }

    /// Notes the clusters of all bitmaps, so that they are not taken for free where refcounts are wrong. What cannot be
    /// read, or is too much, is left to its refcounts.
    async fn guard_bitmaps(
        &self,
        live: &Live,
        extension: Option<&BitmapsExtension>,
        bitmaps: &[LiveBitmap],
    ) {
        let geometry = self.core.lock().geometry;
        if let Some(extension) = extension {
            let count = geometry.clusters(extension.directory_bytes);
            let start = geometry.host_cluster(extension.directory_at);
            self.core.lock().guard_bitmap(Run { start, count });
        }
        let mut read_bytes = 0;
        for LiveBitmap { entry, .. } in bitmaps {
            let bytes = u64::from(entry.table_entries) * 8;
            let start = geometry.host_cluster(entry.table_at);
            self.core.lock().guard_bitmap(Run { start, count: geometry.clusters(bytes) });
            read_bytes += bytes;
            if read_bytes > MAX_GUARD_BYTES {
                continue;
            }
            let table = self.read_bitmap_table(live, entry.table_at, entry.table_entries).await;
            let mut core = self.core.lock();
            for raw in table.unwrap_or_default() {
                if let Ok(BitmapCluster::Stored(at)) = BitmapCluster::decode(raw, geometry) {
                    core.guard_bitmap(Run::one(geometry.host_cluster(at)));
                }
            }
        }
    }

    async fn read_directory(
        &self,
        live: &Live,
        extension: &BitmapsExtension,
    ) -> Result<Vec<u8>, Error> {
        let at = extension.directory_at;
        let range = self.place_in_file(live, at, extension.directory_bytes, at)?;
        let mut bytes = Vec::new();
        for piece in range.pieces(READ_BYTES) {
            bytes.extend_from_slice(&live.file.read(piece).await?);
        }
        Ok(bytes)
    }

    /// The entries of a bitmap table, as they lie on disk.
    pub(super) async fn read_bitmap_table(
        &self,
        live: &Live,
        at: HostOffset,
        entries: u32,
    ) -> Result<Vec<u64>, Error> {
        let range = self.place_in_file(live, at, u64::from(entries) * 8, at)?;
        let mut table = Vec::new();
        for piece in range.pieces(READ_BYTES) {
            table.extend(from_big_endian(&live.file.read(piece).await?));
        }
        Ok(table)
    }

    /// The bits of entry number `slot` of a table that starts at `table_at`, where they are neither all set nor all
    /// clear.
    pub(super) fn decode_bitmap_cluster(
        &self,
        table_at: HostOffset,
        slot: u64,
        raw: u64,
    ) -> Result<BitmapCluster, Error> {
        let geometry = self.core.lock().geometry;
        let at = HostOffset(table_at.0.saturating_add(slot * 8));
        BitmapCluster::decode(raw, geometry).map_err(|what| self.fault(Fault::Corrupt { at, what }))
    }

    /// The bits in a cluster that `entry_at` points at.
    pub(super) async fn read_bits(
        &self,
        live: &Live,
        at: HostOffset,
        entry_at: HostOffset,
    ) -> Result<bytes::Bytes, Error> {
        let range = self.place_in_file(live, at, self.cluster_bytes(), entry_at)?;
        Ok(live.file.read(range).await?)
    }

    /// Adds the bits that are on disk to those in memory, unless that was done.
    pub(super) async fn load_bits(&self, live: &Live, number: usize) -> Result<(), Error> {
        let found = self.bitmaps.with_one(number, |bitmap| {
            (bitmap.is_consistent && !bitmap.is_whole).then(|| bitmap.entry.clone())
        });
        let Some(entry) = found.flatten() else { return Ok(()) };
        let (geometry, size_bytes) = {
            let core = self.core.lock();
            (core.geometry, core.size_bytes)
        };
        let needed = table_entries(geometry, size_bytes, entry.granularity_bits);
        let table = self.read_bitmap_table(live, entry.table_at, entry.table_entries).await?;
        let mut map = DirtyMap::new(size_bytes, entry.granularity_bits);
        let per_cluster =
            1 << (coverage_bits(entry.granularity_bits, geometry) - entry.granularity_bits);
        for (slot, raw) in (0..needed).zip(table) {
            let first = slot * per_cluster;
            match self.decode_bitmap_cluster(entry.table_at, slot, raw)? {
                BitmapCluster::Zeros => {}
                BitmapCluster::Ones => map.set_bits(first..first + per_cluster),
                BitmapCluster::Stored(at) => {
                    let entry_at = HostOffset(entry.table_at.0 + slot * 8);
                    map.absorb(first, &self.read_bits(live, at, entry_at).await?);
                }
            }
            if map.is_over_limit() {
                let name = String::from_utf8_lossy(&entry.name).into_owned();
                let (file, reason) = (self.path.clone(), BitmapError::Memory);
                return Err(Error::Bitmap { file, name, reason });
            }
        }
        self.bitmaps.with_one(number, |bitmap| {
            bitmap.map.merge(&map);
            bitmap.is_whole = true;
        });
        Ok(())
    }

    /// Reads all bits of all bitmaps that can be read.
    pub(super) async fn load_all_bits(&self, live: &Live) -> Result<(), Error> {
        self.load_bitmaps(live).await?;
        let count = self.bitmaps.with(|list| list.as_ref().map_or(0, Vec::len));
        for number in 0..count {
            match self.load_bits(live, number).await {
                Err(error @ Error::Corrupt { .. }) => self.give_up_bitmap(number, &error),
                loaded => loaded?,
            }
        }
        Ok(())
    }

    /// A bitmap whose table or bits break the format means nothing any more.
    pub(super) fn give_up_bitmap(&self, number: usize, error: &Error) {
        tracing::warn!(image = %self.path.display(), %error, "a bitmap is lost");
        self.bitmaps.with_one(number, LiveBitmap::give_up);
    }

    /// The range of the file that a structure of bitmaps takes, which must lie in the file and apart from other
    /// metadata.
    fn place_in_file(
        &self,
        live: &Live,
        at: HostOffset,
        bytes: u64,
        entry_at: HostOffset,
    ) -> Result<ByteRange, Error> {
        let table = TableKind::Bitmap;
        let fault = |what| self.fault(Fault::Corrupt { at: entry_at, what });
        let end = at.0.saturating_add(bytes);
        if end > live.file.len() {
            return Err(fault(Corruption::BehindFile { table, host: at }));
        }
        let core = self.core.lock();
        let first = core.geometry.host_cluster(at);
        let last = core.geometry.host_cluster(HostOffset(end.saturating_sub(1)));
        if core.is_metadata(Run { start: first, count: last.0.saturating_sub(first.0) + 1 }) {
            return Err(fault(Corruption::OverlapsMetadata { table, host: at }));
        }
        Ok(ByteRange::between(at.0, end))
    }
}
