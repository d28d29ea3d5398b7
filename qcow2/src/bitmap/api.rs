//! What users do with bitmaps: list, make, remove, clear, switch, merge, read. Every change is durable when it returns,
//! or has not happened.

use block::{ByteRange, DeviceError, MAX_EXTENTS};

use super::codec::{
    DirectoryEntry, MAX_BITMAP_BYTES, MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAP_GRANULARITY_BITS,
    MAX_BITMAP_NAME_BYTES, MAX_BITMAPS, MIN_BITMAP_GRANULARITY_BITS, bitmap_bytes,
};
use super::dirty::{DirtyExtent, DirtyMap, MAX_BITMAP_MEMORY_BYTES};
use super::track::LiveBitmap;
use crate::error::Error;
use crate::image::{Image, Inner};
use crate::units::HostOffset;

/// What cannot be done with a bitmap.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BitmapError {
    /// There is none of that name.
    #[error("there is no such bitmap")]
    Unknown,
    /// There is one of that name.
    #[error("there is such a bitmap already")]
    Exists,
    /// It was not saved by the last program that recorded changes in it.
    #[error("it was not saved and may miss changes: it can only be removed")]
    Inconsistent,
    /// It holds extra data that only later versions know how to use.
    #[error("it holds extra data that is not known: it can only be removed")]
    ExtraData,
    /// The name is empty or too long.
    #[error("a name of {bytes} bytes (1 to {MAX_BITMAP_NAME_BYTES} are needed)")]
    Name {
        /// Its length.
        bytes: usize,
    },
    /// No power of two from 512 bytes to 2 GiB.
    #[error("a granularity of {bytes} bytes (a power of two from 512 to 2147483648 is needed)")]
    Granularity {
        /// The granularity asked for.
        bytes: u64,
    },
    /// A bitmap of nothing has no form in the format.
    #[error("the disk is empty: make it larger first")]
    EmptyDisk,
    /// Too many bits for the disk.
    #[error("{bytes} bytes of bits (at most {MAX_BITMAP_BYTES}): use a larger granularity")]
    TooLarge {
        /// The bytes of bits that it would have.
        bytes: u64,
    },
    /// The image has as many as it can.
    #[error("the image has {MAX_BITMAPS} bitmaps already, or names of too many bytes")]
    TooMany,
    /// The bitmaps of this process would take too much memory.
    #[error(
        "the bitmaps of this process would take more than {MAX_BITMAP_MEMORY_BYTES} bytes of memory"
    )]
    Memory,
    /// Version 2 of the format cannot say whether bitmaps are up to date.
    #[error("images of version 2 cannot keep bitmaps")]
    Version2,
}

/// A bitmap of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapInfo {
    /// Its name. Bytes that are no UTF-8 are replaced.
    pub name: String,
    /// The bytes of the disk that a bit stands for: a power of two.
    pub granularity_bytes: u64,
    /// Changes are recorded in it: its `auto` flag.
    pub enabled: bool,
    /// It was not saved by the last program that recorded changes in it (its `in-use` flag), or holds extra data that
    /// is not known: it can be removed, nothing else.
    pub inconsistent: bool,
    /// The bytes of the disk that it calls dirty, where it is consistent.
    pub dirty_bytes: Option<u64>,
}

impl Image {
    /// The bitmaps of the image, in the order in which they are recorded.
    ///
    /// An image whose bitmaps were left behind by a program that does not know bitmaps has none. A bitmap whose table
    /// breaks the format is inconsistent.
    ///
    /// # Errors
    /// [`Error::Corrupt`] where the directory breaks the format, [`Error::Host`].
    pub async fn bitmaps(&self) -> Result<Vec<BitmapInfo>, Error> {
        let inner = &self.inner;
        let live = inner.live()?;
        let _turn = inner.bitmaps.turn().await;
        inner.load_all_bits(&live).await?;
        Ok(inner.bitmaps.with(|list| list.iter().flatten().map(BitmapInfo::of).collect()))
    }

    /// Makes a bitmap in which nothing is dirty: changes of at least `granularity_bytes` each (a power of two from 512
    /// bytes to 2 GiB; 64 KiB is usual) are recorded from now on, if it is `enabled`.
    ///
    /// # Errors
    /// [`Error::Bitmap`], [`Error::Host`], or a read-only image.
    pub async fn add_bitmap(
        &self,
        name: &str,
        granularity_bytes: u64,
        enabled: bool,
    ) -> Result<(), Error> {
        let inner = &self.inner;
        let refused = |reason| inner.bitmap_error(name, reason);
        if name.is_empty() || name.len() > MAX_BITMAP_NAME_BYTES {
            return Err(refused(BitmapError::Name { bytes: name.len() }));
        }
        let bits = granularity_bytes.trailing_zeros();
        let allowed = MIN_BITMAP_GRANULARITY_BITS..=MAX_BITMAP_GRANULARITY_BITS;
        if !granularity_bytes.is_power_of_two() || !allowed.contains(&bits) {
            return Err(refused(BitmapError::Granularity { bytes: granularity_bytes }));
        }
        if inner.core.lock().header.version < 3 {
            return Err(refused(BitmapError::Version2));
        }
        let entry = DirectoryEntry {
            name: name.as_bytes().to_vec(),
            table_at: HostOffset(0),
            table_entries: 0,
            granularity_bits: bits,
            in_use: false,
            auto: enabled,
            extra_is_compatible: false,
            extra: Vec::new(),
        };
        let geometry = inner.core.lock().geometry;
        inner
            .change_bitmaps(name, false, |list, found, size_bytes| {
                if found.is_some() {
                    return Err(BitmapError::Exists);
                }
                if size_bytes == 0 {
                    return Err(BitmapError::EmptyDisk);
                }
                let bytes = bitmap_bytes(size_bytes, bits);
                if bytes > MAX_BITMAP_BYTES {
                    return Err(BitmapError::TooLarge { bytes });
                }
                let mut bitmap = LiveBitmap::on_disk(entry, size_bytes, geometry);
                bitmap.replace(DirtyMap::new(size_bytes, bits), size_bytes);
                let bytes = |bitmap: &LiveBitmap| bitmap.entry.encoded_bytes() as u64;
                let directory_bytes = list.iter().map(bytes).sum::<u64>() + bytes(&bitmap);
                let is_full = list.len() as u64 >= u64::from(MAX_BITMAPS);
                if is_full || directory_bytes > MAX_BITMAP_DIRECTORY_BYTES {
                    return Err(BitmapError::TooMany);
                }
                list.push(bitmap);
                Ok(Change::default())
            })
            .await
    }

    /// Removes a bitmap, in whatever state it is.
    ///
    /// # Errors
    /// As [`Image::add_bitmap`].
    pub async fn remove_bitmap(&self, name: &str) -> Result<(), Error> {
        self.inner
            .change_bitmaps(name, false, |list, found, _| {
                let at = found.ok_or(BitmapError::Unknown)?;
                Ok(Change { removed: Some(list.remove(at).entry) })
            })
            .await
    }

    /// Makes a bitmap say that nothing is dirty.
    ///
    /// # Errors
    /// As [`Image::add_bitmap`].
    pub async fn clear_bitmap(&self, name: &str) -> Result<(), Error> {
        self.inner
            .change_bitmaps(name, true, |list, found, size_bytes| {
                let bitmap = usable(list, found)?;
                bitmap
                    .replace(DirtyMap::new(size_bytes, bitmap.entry.granularity_bits), size_bytes);
                Ok(Change::default())
            })
            .await
    }

    /// Records changes in a bitmap from now on.
    ///
    /// # Errors
    /// As [`Image::add_bitmap`].
    pub async fn enable_bitmap(&self, name: &str) -> Result<(), Error> {
        self.switch_bitmap(name, true).await
    }

    /// Records no changes in a bitmap from now on; it keeps what it says.
    ///
    /// # Errors
    /// As [`Image::add_bitmap`].
    pub async fn disable_bitmap(&self, name: &str) -> Result<(), Error> {
        self.switch_bitmap(name, false).await
    }

    async fn switch_bitmap(&self, name: &str, enabled: bool) -> Result<(), Error> {
        self.inner
            .change_bitmaps(name, true, |list, found, _| {
                usable(list, found)?.entry.auto = enabled;
                Ok(Change::default())
            })
            .await
    }

    /// Makes everything dirty in the bitmap `target` that is so in the bitmap `source` of the image `from`, which may
    /// be this one. Granularities and disk sizes may differ.
    ///
    /// # Errors
    /// As [`Image::add_bitmap`], and what reading `source` fails at.
    pub async fn merge_bitmap(&self, target: &str, from: &Self, source: &str) -> Result<(), Error> {
        let map = from.bitmap_content(source).await?;
        self.inner
            .change_bitmaps(target, true, |list, found, size_bytes| {
                let bitmap = usable(list, found)?;
                let mut merged = bitmap.map.second().ok_or(BitmapError::Memory)?;
                merged.merge(&map);
                if merged.is_over_limit() {
                    return Err(BitmapError::Memory);
                }
                bitmap.map = merged;
                let mut at = 0;
                while let Some(run) = map.next_run(at) {
                    at = run.end;
                    let unit = map.granularity_bits();
                    let range = ByteRange::between(run.start << unit, run.end << unit);
                    bitmap.touched.set(range.intersection(ByteRange::between(0, size_bytes)));
                }
                Ok(Change::default())
            })
            .await
    }

    /// Which parts of `range` a bitmap calls dirty now: in order, without gaps, neighbours different, and at most
    /// [`MAX_EXTENTS`] of them, which may end before `range` does.
    ///
    /// While writes are in flight, what they are about to change is dirty already.
    ///
    /// # Errors
    /// [`Error::Bitmap`] where there is none or it is inconsistent, [`Error::Request`] for a range that leaves the
    /// disk, [`Error::Corrupt`], [`Error::Host`].
    pub async fn dirty_extents(
        &self,
        name: &str,
        range: ByteRange,
    ) -> Result<Vec<DirtyExtent>, Error> {
        self.inner.limits().check_read(range)?;
        self.look_at_bitmap(name, |map| map.extents(range, MAX_EXTENTS)).await
    }

    async fn bitmap_content(&self, name: &str) -> Result<DirtyMap, Error> {
        let content = self.look_at_bitmap(name, DirtyMap::second).await?;
        content.ok_or_else(|| self.inner.bitmap_error(name, BitmapError::Memory))
    }

    async fn look_at_bitmap<T>(
        &self,
        name: &str,
        look: impl FnOnce(&DirtyMap) -> T,
    ) -> Result<T, Error> {
        let inner = &self.inner;
        let live = inner.live()?;
        let _turn = inner.bitmaps.turn().await;
        inner.load_bitmaps(&live).await?;
        let number = inner.bitmaps.with(|list| {
            let list = list.get_or_insert_default();
            let number = find(list, name);
            usable(list, number).map(|_| number.unwrap_or(0))
        });
        let number = number.map_err(|reason| inner.bitmap_error(name, reason))?;
        inner.load_bits(&live, number).await?;
        let found = inner.bitmaps.with_one(number, |bitmap| look(&bitmap.map));
        found.ok_or_else(|| inner.bitmap_error(name, BitmapError::Unknown))
    }
}

/// What a change of the list leaves to be done in the file.
#[derive(Default)]
struct Change {
    removed: Option<DirectoryEntry>,
}

impl Inner {
    /// Changes the list, with the disk quiet, and stores it. `change` gets the list, the place of the bitmap in it, and
    /// the size of the disk, which may have changed while it was not quiet; with `needs_bits` only if the bitmap can be
    /// read.
    async fn change_bitmaps(
        &self,
        name: &str,
        needs_bits: bool,
        change: impl FnOnce(&mut Vec<LiveBitmap>, Option<usize>, u64) -> Result<Change, BitmapError>,
    ) -> Result<(), Error> {
        if self.limits().read_only {
            return Err(Error::Request(DeviceError::ReadOnly));
        }
        let live = self.live()?;
        self.before_change(&live).await?;
        let _quiet = self.guests.lock_exclusive(ByteRange::between(0, u64::MAX)).await;
        let live = self.live()?;
        let size_bytes = self.limits().size_bytes;
        let turn = self.bitmaps.turn().await;
        self.load_bitmaps(&live).await?;
        let number = self.bitmaps.with(|list| list.as_ref().and_then(|list| find(list, name)));
        if let Some(number) = number.filter(|_| needs_bits) {
            self.load_bits(&live, number).await?;
        }
        let (undo, changed) = self.bitmaps.with(|list| {
            let list = list.get_or_insert_default();
            let found = find(list, name);
            let before = found.and_then(|at| list.get(at).cloned().map(|bitmap| (at, bitmap)));
            (Undo { inner: Some(self), before }, change(list, found, size_bytes))
        });
        let changed = match changed {
            Ok(changed) => changed,
            Err(reason) => {
                undo.forget();
                return Err(self.bitmap_error(name, reason));
            }
        };
        self.store_bitmaps(&live, &turn, changed.removed.as_slice(), None).await?;
        // The file names the new list, and nothing leads back from here.
        undo.forget();
        if let Err(error) = self.flush(&live).await {
            tracing::warn!(image = %self.path.display(), %error, "space of bitmaps stays in use");
        }
        Ok(())
    }

    fn bitmap_error(&self, name: &str, reason: BitmapError) -> Error {
        Error::Bitmap { file: self.path.clone(), name: name.to_owned(), reason }
    }
}

/// Puts the list back as it was before one bitmap was added, removed or changed, unless it was told to forget.
struct Undo<'a> {
    inner: Option<&'a Inner>,
    /// The bitmap with its place, if there was one.
    before: Option<(usize, LiveBitmap)>,
}

impl Undo<'_> {
    fn forget(mut self) {
        self.inner = None;
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        let Some(inner) = self.inner else { return };
        let before = self.before.take();
        inner.bitmaps.with(|list| {
            let list = list.get_or_insert_default();
            match before {
                None => drop(list.pop()),
                Some((at, bitmap)) => match list.get_mut(at) {
                    Some(place) if place.entry.name == bitmap.entry.name => *place = bitmap,
                    _ => list.insert(at.min(list.len()), bitmap),
                },
            }
        });
    }
}

impl BitmapInfo {
    fn of(bitmap: &LiveBitmap) -> Self {
        Self {
            name: String::from_utf8_lossy(&bitmap.entry.name).into_owned(),
            granularity_bytes: 1 << bitmap.entry.granularity_bits,
            enabled: bitmap.entry.auto,
            inconsistent: !bitmap.is_consistent,
            dirty_bytes: bitmap.is_consistent.then(|| bitmap.map.dirty_bytes()),
        }
    }
}

fn find(list: &[LiveBitmap], name: &str) -> Option<usize> {
    list.iter().position(|bitmap| bitmap.entry.name == name.as_bytes())
}

/// The bitmap at `found`, if its content means anything.
fn usable(list: &mut [LiveBitmap], found: Option<usize>) -> Result<&mut LiveBitmap, BitmapError> {
    let bitmap = found.and_then(|at| list.get_mut(at)).ok_or(BitmapError::Unknown)?;
    if bitmap.is_consistent {
        return Ok(bitmap);
    }
    let foreign = bitmap.entry.is_foreign();
    Err(if foreign { BitmapError::ExtraData } else { BitmapError::Inconsistent })
}
