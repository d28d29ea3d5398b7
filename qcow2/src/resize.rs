//! Changing the size of a disk. The new size is one write of the header's first sector; what it needs is durable
//! before, and what lay behind a smaller disk is gone before, so that it never comes back.

use std::sync::Arc;

use block::{ByteRange, Hold, ZeroMode};
use bytes::Bytes;

use crate::change::ChangeError;
use crate::core::Core;
use crate::create::Preallocation;
use crate::entry::{Cluster, Hosted, L2Entry};
use crate::error::{Error, Fault};
use crate::header::largest_disk_bytes;
use crate::image::{Image, Inner};
use crate::mapping::{Step, TableState};
use crate::units::{GuestOffset, HostOffset, Run, index};
use crate::write::Reach;

/// How to change the size of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResizeOptions {
    /// A smaller disk may lose what is behind its end.
    pub allow_shrinking: bool,
    /// What of the new area is made in advance.
    pub preallocation: Preallocation,
}

/// Clusters that nobody uses yet; they are given back unless they are kept.
struct Reserved<'a> {
    inner: &'a Inner,
    run: Option<Run>,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if let Some(run) = self.run.take() {
            self.inner.core.lock().give_back(&[run]);
        }
    }
}

impl Image {
    /// Changes the size of the disk, durably. A new area reads as zeros, whatever a backing file holds there.
    ///
    /// Bitmaps change with it: a new area is not dirty in them, and what lies behind a smaller disk is cut off. They
    /// are stored with the new size by the write that switches to it.
    ///
    /// After a crash the disk has its old size or its new one; where it was to shrink, what is behind the new end may
    /// read as zeros already. Requests go on meanwhile, and see the new size from its switch on; another resize, and
    /// what else changes the image as a whole, waits.
    ///
    /// # Errors
    /// [`Error::Change`] for a size that cannot be, [`Error::Request`] where the image is open for reading only,
    /// [`Error::Host`].
    pub async fn resize(&self, size_bytes: u64, options: &ResizeOptions) -> Result<(), Error> {
        let inner = &self.inner;
        if inner.limits().read_only {
            return Err(Error::Request(block::DeviceError::ReadOnly));
        }
        let _alone = inner.structure.lock().await;
        let live = inner.live()?;
        inner.check_resize(size_bytes, options)?;
        inner.check_bitmaps_for(&live, size_bytes).await?;
        inner.before_change(&live).await?;
        let old_bytes = inner.limits().size_bytes;
        if size_bytes < old_bytes {
            inner.cut_off(ByteRange::between(size_bytes, old_bytes)).await?;
        } else {
            let area = ByteRange::between(old_bytes, size_bytes);
            inner.grow_l1(size_bytes).await?;
            if let Err(error) = inner.prepare(area, options.preallocation).await {
                // What a failing host does not take back stays behind the end, where nobody reads it.
                let _kept = inner.give_back_behind(size_bytes).await;
                return Err(error);
            }
        }
        inner.switch_size(size_bytes).await?;
        if size_bytes < old_bytes {
            // Again: what was written there meanwhile.
            inner.cut_off(ByteRange::between(size_bytes, old_bytes)).await?;
            inner.shrink_data_file(size_bytes).await?;
            inner.drop_tables_behind(size_bytes).await?;
        }
        Ok(())
    }

    /// Gives back what a resize to `size_bytes`, which failed or was dropped, has made in advance behind the end of the
    /// disk. A resize that answers with an error has done so itself.
    ///
    /// # Errors
    /// [`Error::Host`]; what is not given back takes space, and nothing else.
    pub async fn undo_resize(&self, size_bytes: u64) -> Result<(), Error> {
        let _alone = self.inner.structure.lock().await;
        self.inner.give_back_behind(size_bytes).await
    }
}

impl Inner {
    /// Gives up what is mapped between the end of the disk and `size_bytes`. The caller is alone with the structure.
    async fn give_back_behind(&self, size_bytes: u64) -> Result<(), Error> {
        let live = self.live()?;
        let old_bytes = self.limits().size_bytes;
        let mapped_bytes = self.core.lock().header.l1_entries.saturating_mul(self.info.l2_coverage);
        let edge = old_bytes.next_multiple_of(self.cluster_bytes());
        let end = size_bytes.next_multiple_of(self.cluster_bytes()).min(mapped_bytes);
        if edge < end {
            self.discard(ByteRange::between(edge, end), Reach::Tables).await?;
            self.flush(&live).await?;
        }
        if old_bytes < size_bytes {
            self.shrink_data_file(old_bytes).await?;
        }
        Ok(())
    }

    fn check_resize(&self, size_bytes: u64, options: &ResizeOptions) -> Result<(), Error> {
        let from_bytes = self.limits().size_bytes;
        let core = self.core.lock();
        let header = &core.header;
        let limit_bytes = largest_disk_bytes(header.geometry);
        let prepared = options.preallocation != Preallocation::Off;
        let what = if size_bytes > limit_bytes {
            ChangeError::SizeBytes { size_bytes, limit_bytes }
        } else if size_bytes < from_bytes && !options.allow_shrinking {
            ChangeError::Shrinks { from_bytes, to_bytes: size_bytes }
        } else if header.snapshots > 0 && header.version < 3 {
            ChangeError::SnapshotsInVersion2
        } else if prepared && size_bytes < from_bytes {
            ChangeError::PreallocationWithoutGrowth
        } else {
            return Ok(());
        };
        drop(core);
        Err(self.refuse(what))
    }

    /// Makes the L1 table long enough for a disk of `size_bytes` bytes: a longer one elsewhere, where it has to be.
    async fn grow_l1(self: &Arc<Self>, size_bytes: u64) -> Result<(), Error> {
        let live = self.live()?;
        let (entries, needed, clusters) = {
            let core = self.core.lock();
            let needed = core.geometry.l1_entries(size_bytes);
            (core.header.l1_entries, needed, core.geometry.clusters(needed * 8))
        };
        if needed <= entries {
            return Ok(());
        }
        let (run, _) = self.step(&live, |core| core.reserve(clusters)).await?;
        let mut reserved = Reserved { inner: self, run: Some(run) };
        // Flushes: what counts the new table is durable before anything names it.
        let (live, quiet) = self.quiet().await?;
        let hold: Hold = Some(Arc::clone(&quiet) as _);
        let (old, at, mut table, mut header) = {
            let core = self.core.lock();
            let header = core.header.clone();
            let old = Run {
                start: core.geometry.host_cluster(header.l1_at),
                count: core.geometry.clusters(header.l1_entries * 8),
            };
            (old, core.geometry.host_offset(run.start), core.map.l1_bytes(), header)
        };
        let bytes = clusters * self.cluster_bytes();
        table.resize(index(bytes), 0);
        live.file.write(at.0, Bytes::from(table), hold.clone()).await?;
        live.file.sync().await?;
        header.l1_at = at;
        header.l1_entries = needed;
        self.switch_quietly(&live, &quiet, header).await?;
        let mut core = self.core.lock();
        core.map.move_l1(at, needed);
        core.fixed.remove(old);
        core.fixed.push(run);
        if old.start.0 != 0 {
            core.drop_references(Some(old));
        }
        reserved.run = None;
        Ok(())
    }

    /// Makes a new area behind the end read as zeros, and what is to be made in advance. Whatever the tables say of it
    /// was never part of this disk.
    async fn prepare(&self, area: ByteRange, mode: Preallocation) -> Result<(), Error> {
        let live = self.live()?;
        if let Some(data) = &live.data {
            let stale = area.intersection(ByteRange::between(0, data.len()));
            if !stale.is_empty() {
                data.write_zeroes(stale, None).await?;
            }
            match mode {
                Preallocation::Off | Preallocation::Metadata => {
                    data.set_len(data.len().max(area.end())).await?;
                }
                Preallocation::Falloc | Preallocation::Full => data.grow(area.end()).await?,
            }
        }
        if area.is_empty() {
            return Ok(());
        }
        // What lies behind the end in the last cluster is no part of the disk.
        let end = area.end().next_multiple_of(self.cluster_bytes());
        let whole = ByteRange::between(area.start(), end);
        let plain = live.data.is_none() && live.cipher.is_none();
        let (shows_through, extended) = {
            let core = self.core.lock();
            let below = core.backing_bytes.unwrap_or(0);
            (below > area.start(), core.geometry.is_extended())
        };
        match mode {
            Preallocation::Full => self.write_zeros_as_data(area, true, Reach::Tables).await,
            _ if self.info.raw_data => self.map_raw_data(area).await,
            Preallocation::Off => self.write_zeroes(area, ZeroMode::default(), Reach::Tables).await,
            // As QEMU does: zeros over a backing file are flagged, others are clusters in a hole.
            Preallocation::Metadata if plain && !shows_through && !extended => {
                self.reserve_zeros(whole, false, Reach::Tables).await
            }
            Preallocation::Falloc if plain && (shows_through || !extended) => {
                self.reserve_zeros(whole, true, Reach::Tables).await
            }
            Preallocation::Metadata | Preallocation::Falloc => {
                let mode = ZeroMode { keep_allocated: true, fast_only: false };
                let area = if live.data.is_none() { whole } else { area };
                self.write_zeroes(area, mode, Reach::Tables).await
            }
        }
    }

    /// Maps all of an area to the same place of the data file, which reads like the disk.
    async fn map_raw_data(&self, area: ByteRange) -> Result<(), Error> {
        for piece in area.pieces(self.info.l2_coverage) {
            let _guard = self.guests.lock_exclusive(self.widen(piece)).await;
            let live = self.live()?;
            self.record_change(&live, piece).await?;
            self.step(&live, |core| core.map_raw(piece)).await?;
        }
        Ok(())
    }

    /// Gives up what is behind a new end, durably: whole clusters, and the rest of the last one.
    async fn cut_off(&self, area: ByteRange) -> Result<(), Error> {
        let edge = area.start().next_multiple_of(self.cluster_bytes()).min(area.end());
        let rest = ByteRange::between(area.start(), edge);
        if !rest.is_empty() {
            self.write_zeroes(rest, ZeroMode::default(), Reach::Tables).await?;
        }
        // The rest of the last cluster was never part of the disk. A raw data file has nothing there.
        let last = area.end().next_multiple_of(self.cluster_bytes());
        let whole = ByteRange::between(edge, if self.info.raw_data { area.end() } else { last });
        if !whole.is_empty() {
            self.discard(whole, Reach::Tables).await?;
        }
        let live = self.live()?;
        self.flush(&live).await
    }

    async fn shrink_data_file(&self, size_bytes: u64) -> Result<(), Error> {
        let live = self.live()?;
        let Some(data) = live.data.as_ref().filter(|data| !data.is_fixed_len()) else {
            return Ok(());
        };
        if data.len() > size_bytes {
            data.set_len(size_bytes).await?;
        }
        Ok(data.sync().await?)
    }

    /// Frees the L2 tables that map nothing but what is behind the end.
    async fn drop_tables_behind(self: &Arc<Self>, size_bytes: u64) -> Result<(), Error> {
        let (live, quiet) = self.quiet().await?;
        let entries = self.core.lock().header.l1_entries;
        let first = self.core.lock().geometry.l1_entries(size_bytes);
        for l1 in first..entries {
            self.step_in_flush(&live, |core| core.drop_table(l1)).await?;
        }
        drop(quiet);
        self.flush(&live).await?;
        self.step_in_flush(&live, Core::settle).await
    }
}

impl Core {
    /// Maps the clusters of `piece`, which one L2 table maps, to the same place of the data file.
    fn map_raw(&mut self, piece: ByteRange) -> Result<Step<()>, Fault> {
        let l1 = self.geometry.l1_index(GuestOffset(piece.start()));
        match self.own_table(l1)? {
            Step::Ready(()) => {}
            needs => return Ok(needs),
        }
        let alloc = self.map.format().all();
        for part in piece.widen(self.geometry.bytes()).pieces(self.geometry.bytes()) {
            let host = Some(Hosted::exclusive(HostOffset(part.start())));
            let l2 = self.geometry.l2_index(GuestOffset(part.start()));
            self.map.set_entry(l1, l2, L2Entry::Cluster(Cluster { host, alloc, zero: 0 }));
        }
        Ok(Step::Ready(()))
    }

    /// Drops an L2 table and everything that it still names.
    fn drop_table(&mut self, l1: u64) -> Result<Step<()>, Fault> {
        match self.map.load_state(l1)? {
            Step::Ready(TableState::Absent) => return Ok(Step::Ready(())),
            Step::Ready(TableState::Owned(_) | TableState::Shared(_)) => {}
            Step::Load(table) => return Ok(Step::Load(table)),
            Step::Grow(to) => return Ok(Step::Grow(to)),
        }
        for l2 in 0..self.geometry.l2_entries() {
            let run = match self.map.entry(l1, l2)? {
                L2Entry::Cluster(cluster) if !self.map.format().external_data => {
                    cluster.host.map(|host| Run::one(self.geometry.host_cluster(host.at)))
                }
                L2Entry::Cluster(_) => None,
                L2Entry::Compressed(stream) => Some(stream.clusters(self.geometry)),
            };
            self.drop_references(run);
        }
        if let Some(at) = self.map.forget_table(l1) {
            let cluster = self.geometry.host_cluster(at);
            self.tables.remove(cluster);
            self.drop_reference(cluster);
        }
        Ok(Step::Ready(()))
    }
}
