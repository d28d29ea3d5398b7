//! Writing bitmaps to the file: marking them as out of date in place, and storing them anew beside the old ones with
//! one switch of the header. At every moment a bitmap on disk that is not marked tells every change.

use std::sync::Arc;

use block::Hold;
use bytes::Bytes;
use parking_lot::Mutex;

use super::codec::{
    BitmapCluster, BitmapsExtension, DirectoryEntry, bitmap_bytes, encode_directory, table_entries,
};
use super::track::{LiveBitmap, Turn};
use crate::core::Core;
use crate::error::Error;
use crate::image::{Inner, Live};
use crate::refcount::big_endian;
use crate::switch::switch_header;
use crate::units::{HostOffset, Run, SECTOR_BYTES, index};

/// Bits are written in pieces of about so many bytes.
const WRITE_BYTES: u64 = 1 << 20;

/// Clusters that were taken and that nothing on disk points at. Every write into them holds it; the last to let go
/// gives back what was not kept.
struct Fresh {
    core: Arc<Mutex<Core>>,
    runs: Mutex<Vec<Run>>,
    _turn: Hold,
}

impl Drop for Fresh {
    fn drop(&mut self) {
        let runs = std::mem::take(self.runs.get_mut());
        self.core.lock().give_back(&runs);
    }
}

/// What storing makes of one bitmap.
struct Stored {
    table_at: HostOffset,
    table_entries: u32,
    /// The clusters that only the old table names, and its own.
    gone: Vec<Run>,
}

/// Half a header may be on disk: whoever gives up here leaves an image that must be opened again.
struct Switching<'a>(Option<&'a Inner>);

impl Drop for Switching<'_> {
    fn drop(&mut self) {
        if let Some(inner) = self.0 {
            inner.poison(Error::Abandoned { file: inner.path.clone() });
        }
    }
}

impl Inner {
    /// Says in the file, durably, that enabled bitmaps miss the changes that are about to be made.
    pub(super) async fn mark_bitmaps(&self, live: &Live, turn: &Turn) -> Result<(), Error> {
        let (old, new) = self.bitmaps.with(|list| {
            let list = list.as_deref().unwrap_or_default();
            let old: Vec<_> = list.iter().map(|bitmap| bitmap.entry.clone()).collect();
            let new: Vec<_> = old
                .iter()
                .map(|entry| DirectoryEntry { in_use: entry.in_use | entry.auto, ..entry.clone() })
                .collect();
            (encode_directory(&old), encode_directory(&new))
        });
        if old == new {
            return Ok(());
        }
        let extension = self.core.lock().header.bitmaps().map_err(|fault| self.fault(fault))?;
        let Some(extension) = extension else { return Ok(()) };
        let unit = index(SECTOR_BYTES);
        let differs = |at: &usize| {
            old.get(*at..).zip(new.get(*at..)).is_some_and(|(old, new)| {
                old.get(..unit.min(old.len())) != new.get(..unit.min(new.len()))
            })
        };
        let mut sectors = (0..new.len()).step_by(unit).filter(differs);
        let first = sectors.next().unwrap_or(0);
        let end = (sectors.next_back().unwrap_or(first) + unit).min(new.len());
        let bytes = Bytes::from(new).slice(first..end);
        let at = extension.directory_at.0 + first as u64;
        let written = match live.file.write(at, bytes, turn.hold()).await {
            Ok(()) => live.file.sync().await,
            failed => failed,
        };
        written.map_err(|error| self.poison(Error::Host(error)))?;
        self.bitmaps.with(|list| {
            for bitmap in list.iter_mut().flatten() {
                bitmap.entry.in_use |= bitmap.entry.auto;
            }
        });
        Ok(())
    }

    /// Stores all bitmaps that the file does not tell yet, at the end of a session. The disk must be quiet.
    pub(crate) async fn save_bitmaps(&self, live: &Live) -> Result<(), Error> {
        let is_unsaved =
            |list: &mut Option<Vec<LiveBitmap>>| list.iter().flatten().any(LiveBitmap::is_unsaved);
        if !self.bitmaps.with(is_unsaved) {
            return Ok(());
        }
        let turn = self.bitmaps.turn().await;
        self.store_bitmaps(live, &turn, &[], None).await
    }

    /// Stores the list as it is in memory: new clusters for what changed, a new directory, the header, and then the
    /// old ones are free from the next flush on, with those of the bitmaps in `removed`. The write of the header that
    /// switches gives the disk its new size, where there is one, for which the list was made. The disk must be quiet.
    ///
    /// # Errors
    /// What the host fails at. Up to the switch of the header nothing has happened; failing there poisons the image.
    pub(super) async fn store_bitmaps(
        &self,
        live: &Live,
        turn: &Turn,
        removed: &[DirectoryEntry],
        size_bytes: Option<u64>,
    ) -> Result<(), Error> {
        let fresh = Arc::new(Fresh {
            core: Arc::clone(&self.core),
            runs: Mutex::default(),
            _turn: turn.hold(),
        });
        let count = self.bitmaps.with(|list| list.as_ref().map_or(0, Vec::len));
        let mut stored = Vec::with_capacity(count);
        for number in 0..count {
            stored.push(match self.store_one(live, &fresh, number).await {
                Err(error @ Error::Corrupt { .. }) => {
                    self.give_up_bitmap(number, &error);
                    None
                }
                stored => stored?,
            });
        }
        let mut gone = Vec::new();
        for entry in removed {
            gone.extend(self.clusters_of(live, entry.table_at, entry.table_entries).await);
        }
        let entries = self.bitmaps.with(|list| {
            let list = list.as_deref().unwrap_or_default();
            list.iter().zip(&stored).map(|(bitmap, stored)| entry_after(bitmap, stored)).collect()
        });
        let entries: Vec<DirectoryEntry> = entries;
        let extension = self.write_directory(live, &fresh, &entries).await?;
        // What the header is about to name, and its refcounts.
        self.flush(live).await?;
        let old = self.switch_bitmaps(live, extension, size_bytes).await?;
        let kept = std::mem::take(&mut *fresh.runs.lock());
        gone.extend(stored.into_iter().flatten().flat_map(|stored| stored.gone));
        let geometry = self.core.lock().geometry;
        gone.extend(old.map(|old| Run {
            start: geometry.host_cluster(old.directory_at),
            count: geometry.clusters(old.directory_bytes),
        }));
        {
            let mut core = self.core.lock();
            for run in gone {
                core.bitmaps.remove(run);
                for cluster in run.clusters() {
                    core.drop_reference(cluster);
                }
            }
            for run in kept {
                core.guard_bitmap(run);
            }
        }
        self.bitmaps.with(|list| {
            for (bitmap, entry) in list.iter_mut().flatten().zip(entries) {
                bitmap.saved(entry);
            }
        });
        Ok(())
    }

    /// Writes the bits of a bitmap that changed, and its table. `None` where the table stays as it is.
    async fn store_one(
        &self,
        live: &Live,
        fresh: &Arc<Fresh>,
        number: usize,
    ) -> Result<Option<Stored>, Error> {
        let look = self.bitmaps.with_one(number, |bitmap| {
            let changed = bitmap.is_consistent && !bitmap.touched.is_empty();
            let size_bytes = bitmap.map.size_bytes();
            changed.then(|| (bitmap.entry.clone(), bitmap.is_whole, bitmap.left, size_bytes))
        });
        let Some((entry, is_whole, left, size_bytes)) = look.flatten() else { return Ok(None) };
        let geometry = self.core.lock().geometry;
        let needed = table_entries(geometry, size_bytes, entry.granularity_bits);
        let old_at = entry.table_at;
        let mut table = if old_at.0 == 0 {
            vec![0; index(needed)]
        } else {
            self.read_bitmap_table(live, old_at, entry.table_entries).await?
        };
        let mut gone = match left {
            Some((at, entries)) => self.clusters_of(live, at, entries).await,
            None => Vec::new(),
        };
        let mut batch = Batch::default();
        let mut next = 0;
        while let Some(slots) =
            self.bitmaps.with_one(number, |bitmap| bitmap.touched.next_run(next)).flatten()
        {
            next = slots.end;
            for slot in slots {
                let Some(raw) = table.get(index(slot)).copied() else { break };
                let old = self.decode_bitmap_cluster(old_at, slot, raw)?;
                let entry_at = HostOffset(old_at.0.saturating_add(slot * 8));
                let new = self
                    .bits_of(live, number, slot, (!is_whole).then_some((old, entry_at)))
                    .await?;
                if let BitmapCluster::Stored(at) = old {
                    gone.push(Run::one(geometry.host_cluster(at)));
                }
                match new {
                    Bits::Zeros => set(&mut table, slot, BitmapCluster::Zeros),
                    Bits::Ones => set(&mut table, slot, BitmapCluster::Ones),
                    Bits::Mixed(bytes) => batch.push(slot, &bytes),
                }
                if batch.bytes.len() as u64 >= WRITE_BYTES {
                    self.write_bits(live, fresh, &mut batch, &mut table).await?;
                }
            }
        }
        self.write_bits(live, fresh, &mut batch, &mut table).await?;
        if old_at.0 != 0 {
            gone.push(Run {
                start: geometry.host_cluster(old_at),
                count: geometry.clusters(u64::from(entry.table_entries) * 8),
            });
        }
        let table_at = self.write_fresh(live, fresh, big_endian(&table)).await?;
        let table_entries = u32::try_from(table.len()).unwrap_or(u32::MAX);
        Ok(Some(Stored { table_at, table_entries, gone }))
    }

    /// What the bits of one cluster are to be: those in memory, and with them those that `old` says of the disk.
    async fn bits_of(
        &self,
        live: &Live,
        number: usize,
        slot: u64,
        old: Option<(BitmapCluster, HostOffset)>,
    ) -> Result<Bits, Error> {
        let geometry = self.core.lock().geometry;
        let mut bytes = vec![0; index(geometry.bytes())];
        let per_cluster = geometry.bytes() * 8;
        let first = slot * per_cluster;
        let all_bytes = self.bitmaps.with_one(number, |bitmap| {
            bitmap.map.pack(first, &mut bytes);
            bitmap_bytes(bitmap.map.size_bytes(), bitmap.entry.granularity_bits)
        });
        match old {
            Some((BitmapCluster::Ones, _)) => return Ok(Bits::Ones),
            Some((BitmapCluster::Stored(at), entry_at)) => {
                let below = self.read_bits(live, at, entry_at).await?;
                bytes.iter_mut().zip(below).for_each(|(byte, old)| *byte |= old);
            }
            Some((BitmapCluster::Zeros, _)) | None => {}
        }
        // Bits behind the end of the disk must be clear, so that a cluster that has such is never all set.
        let used = all_bytes.unwrap_or(0).saturating_sub(slot * geometry.bytes());
        Ok(if bytes.iter().all(|byte| *byte == 0) {
            Bits::Zeros
        } else if used >= geometry.bytes() && bytes.iter().all(|byte| *byte == u8::MAX) {
            Bits::Ones
        } else {
            Bits::Mixed(bytes)
        })
    }

    /// Writes collected bits into fresh clusters and their places into the table.
    async fn write_bits(
        &self,
        live: &Live,
        fresh: &Arc<Fresh>,
        batch: &mut Batch,
        table: &mut [u64],
    ) -> Result<(), Error> {
        let Batch { slots, bytes } = std::mem::take(batch);
        if slots.is_empty() {
            return Ok(());
        }
        let start = self.write_fresh(live, fresh, bytes).await?;
        for (slot, at) in slots.into_iter().zip((start.0..).step_by(index(self.cluster_bytes()))) {
            set(table, slot, BitmapCluster::Stored(HostOffset(at)));
        }
        Ok(())
    }

    /// Writes `bytes` into a run of fresh clusters, filled up with zeros, and says where.
    async fn write_fresh(
        &self,
        live: &Live,
        fresh: &Arc<Fresh>,
        mut bytes: Vec<u8>,
    ) -> Result<HostOffset, Error> {
        let cluster = self.cluster_bytes();
        let count = (bytes.len() as u64).div_ceil(cluster);
        bytes.resize(index(count * cluster), 0);
        let (run, _) = self
            .step(live, |core| {
                let reserved = core.reserve(count);
                if let Ok(crate::mapping::Step::Ready((run, _))) = &reserved {
                    fresh.runs.lock().push(*run);
                }
                reserved
            })
            .await?;
        let at = self.core.lock().geometry.host_offset(run.start);
        let hold: Hold = Some(Arc::clone(fresh) as _);
        live.file.write(at.0, bytes.into(), hold).await?;
        Ok(at)
    }

    async fn write_directory(
        &self,
        live: &Live,
        fresh: &Arc<Fresh>,
        entries: &[DirectoryEntry],
    ) -> Result<Option<BitmapsExtension>, Error> {
        if entries.is_empty() {
            return Ok(None);
        }
        let bytes = encode_directory(entries);
        let directory_bytes = bytes.len() as u64;
        let directory_at = self.write_fresh(live, fresh, bytes).await?;
        let count = u32::try_from(entries.len()).unwrap_or(u32::MAX);
        Ok(Some(BitmapsExtension { count, directory_bytes, directory_at }))
    }

    /// The clusters of a table and those that it names. Where they cannot be told they stay in use: space is lost, and
    /// nothing else.
    async fn clusters_of(&self, live: &Live, at: HostOffset, entries: u32) -> Vec<Run> {
        if at.0 == 0 {
            return Vec::new();
        }
        let table = match self.read_bitmap_table(live, at, entries).await {
            Ok(table) => table,
            Err(error) => {
                tracing::warn!(image = %self.path.display(), %error, "space of a bitmap stays in use");
                return Vec::new();
            }
        };
        let core = self.core.lock();
        let geometry = core.geometry;
        let named = table.iter().filter_map(|raw| match BitmapCluster::decode(*raw, geometry) {
            Ok(BitmapCluster::Stored(at)) => Some(Run::one(geometry.host_cluster(at))),
            Ok(_) | Err(_) => None,
        });
        let mut runs: Vec<_> = named.filter(|run| !core.is_metadata(*run)).collect();
        runs.push(Run {
            start: geometry.host_cluster(at),
            count: geometry.clusters(u64::from(entries) * 8),
        });
        runs
    }

    /// Makes the header name another directory, or none, and another size of the disk. Gives the directory that it
    /// named.
    async fn switch_bitmaps(
        &self,
        live: &Live,
        extension: Option<BitmapsExtension>,
        size_bytes: Option<u64>,
    ) -> Result<Option<BitmapsExtension>, Error> {
        let _gate = Arc::clone(&self.flush_gate).lock_owned().await;
        self.live_while_closing()?;
        let before = self.core.lock().header.clone();
        let old = before.bitmaps().map_err(|fault| self.fault(fault))?;
        let mut new = before.clone();
        if old.is_some() || extension.is_some() {
            new.set_bitmaps(extension);
        }
        new.size_bytes = size_bytes.unwrap_or(new.size_bytes);
        let mut switching = Switching(Some(self));
        let switched = switch_header(&live.file, &before, &mut new).await;
        if !matches!(switched, Ok(()) | Err(Error::Host(_))) {
            // Refused before anything was written.
            switching.0 = None;
        }
        switched.map_err(|error| match error {
            Error::Host(_) => self.poison(error),
            refused => refused,
        })?;
        {
            let mut core = self.core.lock();
            core.size_bytes = new.size_bytes;
            self.set_size(new.size_bytes);
            core.header = new;
        }
        switching.0 = None;
        Ok(old)
    }
}

/// What a cluster of bits is to be.
enum Bits {
    Zeros,
    Ones,
    Mixed(Vec<u8>),
}

/// Clusters of bits that wait to be written together.
#[derive(Default)]
struct Batch {
    slots: Vec<u64>,
    bytes: Vec<u8>,
}

impl Batch {
    fn push(&mut self, slot: u64, bytes: &[u8]) {
        self.slots.push(slot);
        self.bytes.extend_from_slice(bytes);
    }
}

impl LiveBitmap {
    /// It is in the file as `entry` says.
    fn saved(&mut self, entry: DirectoryEntry) {
        self.entry = entry;
        if self.is_consistent {
            self.touched = super::dirty::DirtyMap::new(
                self.touched.size_bytes(),
                self.touched.granularity_bits(),
            );
            self.left = None;
        }
        if self.is_consistent && !self.is_whole {
            // All that was recorded is on disk now.
            self.map =
                super::dirty::DirtyMap::new(self.map.size_bytes(), self.map.granularity_bits());
        }
    }
}

/// What the directory says of a bitmap once it is stored.
fn entry_after(bitmap: &LiveBitmap, stored: &Option<Stored>) -> DirectoryEntry {
    let mut entry = bitmap.entry.clone();
    // One with unknown extra data stays as it is; one that cannot be read was lost here.
    entry.in_use = !bitmap.is_consistent && (entry.in_use || !entry.is_foreign());
    if let Some(stored) = stored {
        entry.table_at = stored.table_at;
        entry.table_entries = stored.table_entries;
    }
    entry
}

fn set(table: &mut [u64], slot: u64, entry: BitmapCluster) {
    if let Some(place) = table.get_mut(index(slot)) {
        *place = entry.encode();
    }
}
