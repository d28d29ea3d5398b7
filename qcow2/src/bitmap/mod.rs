//! Bitmaps that an image keeps: which parts of the disk changed since they were made or cleared. What they look like
//! on disk is told in `codec`.

pub(crate) mod codec;

pub use codec::{
    MAX_BITMAP_BYTES, MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAP_GRANULARITY_BITS,
    MAX_BITMAP_NAME_BYTES, MAX_BITMAP_TABLE_ENTRIES, MAX_BITMAPS, MIN_BITMAP_GRANULARITY_BITS,
};
