//! Bitmaps of a disk that gets another size: they are fitted to it in memory and stored beside the old ones, and the
//! write of the header that names them gives the disk its size. What else a new size takes is told in `resize`.

use std::sync::Arc;

use block::ByteRange;

use super::codec::{MAX_BITMAP_BYTES, bitmap_bytes};
use super::track::LiveBitmap;
use crate::change::ChangeError;
use crate::error::Error;
use crate::image::{Inner, Live};

impl Inner {
    /// Refuses a size of the disk that a bitmap of the image cannot have, before anything is done for it.
    ///
    /// # Errors
    /// [`ChangeError::InconsistentBitmap`], [`ChangeError::BitmapBytes`]; what reading bitmaps fails at.
    pub(crate) async fn check_bitmaps_for(
        &self,
        live: &Live,
        size_bytes: u64,
    ) -> Result<(), Error> {
        let _turn = self.bitmaps.turn().await;
        self.load_all_bits(live).await?;
        let refused = self
            .bitmaps
            .with(|list| list.iter().flatten().find_map(|bitmap| refusal_of(bitmap, size_bytes)));
        refused.map_or(Ok(()), |what| Err(self.refuse(what)))
    }

    /// Gives the disk another size, and all bitmaps with it, durably.
    ///
    /// # Errors
    /// As [`Inner::check_bitmaps_for`], and [`Error::Host`]: the size is the old one then. [`Error::Poisoned`] where
    /// the switch failed.
    pub(crate) async fn switch_size(self: &Arc<Self>, size_bytes: u64) -> Result<(), Error> {
        self.live()?;
        let _quiet = self.guests.lock_exclusive(ByteRange::between(0, u64::MAX)).await;
        let live = self.live()?;
        self.before_change(&live).await?;
        // Somebody may have made a bitmap meanwhile.
        self.check_bitmaps_for(&live, size_bytes).await?;
        let turn = self.bitmaps.turn().await;
        let geometry = self.core.lock().geometry;
        let mut undo = Undo { inner: self, before: None };
        self.bitmaps.with(|list| {
            let list = list.get_or_insert_default();
            undo.before = Some(list.clone());
            list.iter_mut().for_each(|bitmap| bitmap.resize(size_bytes, geometry));
        });
        let stored = self.store_bitmaps(&live, &turn, &[], Some(size_bytes)).await;
        if stored.is_ok() || self.limits().size_bytes == size_bytes {
            undo.before = None;
        }
        stored
    }
}

/// Puts the bitmaps back as they were, unless that was taken away.
struct Undo<'a> {
    inner: &'a Inner,
    before: Option<Vec<LiveBitmap>>,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if let Some(before) = self.before.take() {
            self.inner.bitmaps.with(|list| *list = Some(before));
        }
    }
}

fn refusal_of(bitmap: &LiveBitmap, size_bytes: u64) -> Option<ChangeError> {
    let name = String::from_utf8_lossy(&bitmap.entry.name).into_owned();
    if !bitmap.is_consistent {
        return Some(ChangeError::InconsistentBitmap { name });
    }
    let bytes = bitmap_bytes(size_bytes, bitmap.entry.granularity_bits);
    let fits = (1..=MAX_BITMAP_BYTES).contains(&bytes);
    (!fits).then_some(ChangeError::BitmapBytes { name, bytes })
}
