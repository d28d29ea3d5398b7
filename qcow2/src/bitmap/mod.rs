//! Bitmaps that an image keeps: which parts of the disk changed since they were made or cleared. What they look like
//! on disk is told in `codec`, what is done with them in the other modules here.

mod api;
pub(crate) mod codec;
mod dirty;
mod load;
mod resize;
mod store;
mod track;

pub use api::{BitmapError, BitmapInfo};
pub use codec::{
    MAX_BITMAP_BYTES, MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAP_GRANULARITY_BITS,
    MAX_BITMAP_NAME_BYTES, MAX_BITMAP_TABLE_ENTRIES, MAX_BITMAPS, MIN_BITMAP_GRANULARITY_BITS,
};
pub use dirty::{DirtyExtent, MAX_BITMAP_MEMORY_BYTES};
pub(crate) use track::Bitmaps;
