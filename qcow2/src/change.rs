//! Changes of an image that are one write of its header, and why a change is refused. What changes is decided in
//! `resize` and `amend`; whole new states of the metadata are `republish`'s.

use std::sync::Arc;

use block::Hold;

use crate::bitmap::MAX_BITMAP_BYTES;
use crate::error::Error;
use crate::header::Header;
use crate::image::{Inner, Live};
use crate::republish::{Quiet, Stage};
use crate::switch::write_stages;

/// Why an image is not changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChangeError {
    /// A smaller disk, without permission to cut off data.
    #[error("the disk would shrink from {from_bytes} to {to_bytes} bytes and lose what is behind")]
    Shrinks {
        /// Its size.
        from_bytes: u64,
        /// The size asked for.
        to_bytes: u64,
    },
    /// A disk larger than clusters of this size can map.
    #[error("a disk of {size_bytes} bytes (at most {limit_bytes} with this cluster size)")]
    SizeBytes {
        /// The size asked for.
        size_bytes: u64,
        /// The largest size.
        limit_bytes: u64,
    },
    /// In version 2 snapshots do not know the size of their disk.
    #[error("the size of a version 2 image that has snapshots cannot change")]
    SnapshotsInVersion2,
    /// A bitmap whose content is not known cannot change with the disk.
    #[error("the bitmap {name:?} is inconsistent and would no longer fit: remove it first")]
    InconsistentBitmap {
        /// Its name.
        name: String,
    },
    /// A bitmap would have too many bits for the disk, or none.
    #[error(
        "the bitmap {name:?} would have {bytes} bytes of bits (1 to {MAX_BITMAP_BYTES}): remove it first"
    )]
    BitmapBytes {
        /// Its name.
        name: String,
        /// The bytes of bits that it would have.
        bytes: u64,
    },
    /// There is nothing to make in advance where a disk shrinks.
    #[error("preallocation of a disk that does not grow")]
    PreallocationWithoutGrowth,
    /// Something that version 2 has not.
    #[error("the image has {what}, and version 2 (compat=0.10) has not")]
    NotInVersion2 {
        /// What.
        what: &'static str,
    },
    /// No power of two from 1 to 64.
    #[error("refcounts of {0} bits (a power of two from 1 to 64 is needed)")]
    RefcountBits(u32),
    /// A data file that reads like the disk cannot read like the backing file.
    #[error("a backing file below an image whose data file is raw")]
    BackingFileOfRawData,
    /// Only a new image can promise that its data file reads like the disk.
    #[error("an existing data file cannot become raw")]
    MakeRaw,
    /// A data file has its place from the start.
    #[error("the image has no external data file")]
    NoDataFile,
    /// A name that is empty, too long or not plain text.
    #[error("a file name of {len} bytes (1 to {limit}, without NUL)")]
    Name {
        /// Its length in bytes.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// A name that no opening follows.
    #[error(
        "the name {0:?}: only plain paths are followed, not protocols or json: names (./ before a path)"
    )]
    Protocol(String),
}

impl Inner {
    pub(crate) fn refuse(&self, what: ChangeError) -> Error {
        Error::Change { file: self.path.clone(), what }
    }

    /// Changes the header, durably, while nobody else uses the image.
    ///
    /// # Errors
    /// What `change` refuses, and a header that gets too large; nothing has changed then. [`Error::Poisoned`] where
    /// writing fails.
    pub(crate) async fn change_header(
        self: &Arc<Self>,
        change: impl FnOnce(&mut Header) -> Result<(), Error> + Send,
    ) -> Result<(), Error> {
        let (live, quiet) = self.quiet().await?;
        let mut new = self.core.lock().header.clone();
        change(&mut new)?;
        self.switch_quietly(&live, &quiet, new).await
    }

    /// Puts `new` in the place of the header, on disk and in memory.
    pub(crate) async fn switch_quietly(
        &self,
        live: &Live,
        quiet: &Arc<Quiet>,
        mut new: Header,
    ) -> Result<(), Error> {
        let hold: Hold = Some(Arc::clone(quiet) as _);
        let old = self.core.lock().header.clone();
        let stages = old.rewrite(&mut new).map_err(|fault| self.fault(fault))?;
        *quiet.stage.lock() = Stage::Switching;
        let written = write_stages(&live.file, stages, &hold).await;
        written.map_err(|error| self.poison(Error::Host(error)))?;
        {
            let mut core = self.core.lock();
            core.size_bytes = new.size_bytes;
            core.header = new;
        }
        *quiet.stage.lock() = Stage::Done;
        Ok(())
    }
}
