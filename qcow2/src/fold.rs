//! Folding chains: what layers hold is moved into the layer below ([`commit`]), increments into the oldest image
//! ([`merge`]), and images get other backing files ([`rebase`]). How a range is copied is `convert`'s business; here
//! stands the order in which files change, so that at every moment each chain reads as before.

mod chain;
mod commit;
mod losses;
mod merge;
mod names;
mod plan;
mod rebase;

use std::num::NonZeroU64;
use std::path::PathBuf;

use block::DeviceError;

use crate::convert::{ConvertError, ConvertOptions};
use crate::create::BackingFormat;
use crate::error::Error;
use crate::open::OpenOptions;

pub use commit::{CommitOptions, commit, plan_commit};
pub use losses::{LayerLoss, MergeLosses, merge_losses};
pub use merge::{MergeOptions, merge, plan_merge};
pub use plan::{FoldPlan, LayerPlan};
pub use rebase::{RebaseOptions, plan_rebase, rebase};

/// What folding copies with.
#[derive(Clone, Debug)]
pub struct FoldOptions {
    /// How the files are opened. Whether for writing is decided by what is done.
    pub open: OpenOptions,
    /// How many chunks are in flight.
    pub requests: usize,
    /// The most bytes that are read in a second.
    pub bytes_per_sec: Option<NonZeroU64>,
}

impl Default for FoldOptions {
    fn default() -> Self {
        let requests = ConvertOptions::default().requests;
        Self { open: OpenOptions::reading(), requests, bytes_per_sec: None }
    }
}

impl FoldOptions {
    fn convert(&self) -> ConvertOptions {
        ConvertOptions {
            requests: self.requests,
            bytes_per_sec: self.bytes_per_sec,
            ..ConvertOptions::default()
        }
    }
}

/// What was folded, in bytes of the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Folded {
    /// Written as data.
    pub written_bytes: u64,
    /// Written as zeros.
    pub zeroed_bytes: u64,
    /// Of what was written as data: copied, or shared, by the host alone.
    pub by_host_bytes: u64,
}

/// Why a chain was not folded. Until the last step each of its images that stays reads as before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FoldError {
    /// An image could not be opened, changed or closed.
    #[error(transparent)]
    Image(#[from] Error),
    /// Bytes could not be moved.
    #[error(transparent)]
    Copy(#[from] ConvertError),
    /// A device below an image failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// There is nothing below the image.
    #[error("{} has no backing file", file.display())]
    NoBacking {
        /// The image.
        file: PathBuf,
    },
    /// The new backing file of an image cannot be found. Its name is seen from the folder of the image.
    #[error("the new backing file {} cannot be found: {source}", file.display())]
    NewBacking {
        /// Where it would be.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// There is no layer between the top of a chain and its base.
    #[error(
        "nothing to merge: {} lies directly over {} (commit folds the top itself)",
        file.display(), base.display()
    )]
    NothingBetween {
        /// The top of the chain.
        file: PathBuf,
        /// Its base.
        base: PathBuf,
    },
    /// The image that was named is not below the top.
    #[error("{} is not in the chain of {}", base.display(), file.display())]
    NotInChain {
        /// The top of the chain.
        file: PathBuf,
        /// The image that was named.
        base: PathBuf,
    },
    /// The layers that were named are in no order that can be folded.
    #[error(
        "{} is not between {} and {}: only layers between the top of a chain and the base are folded",
        last.display(), file.display(), base.display()
    )]
    Order {
        /// The top of the chain.
        file: PathBuf,
        /// What should be folded into.
        base: PathBuf,
        /// The last layer that should be folded.
        last: PathBuf,
    },
    /// Somebody changed the chain before it was locked. Nothing has been written.
    #[error(
        "{} was replaced, or put over another backing file, while its chain was opened; nothing was written, try again",
        file.display()
    )]
    Moved {
        /// The image.
        file: PathBuf,
    },
    /// Nothing can be written to an image of this format.
    #[error("{} is in {}, which is for reading only", file.display(), format.name())]
    ReadOnlyFormat {
        /// The image.
        file: PathBuf,
        /// Its format.
        format: BackingFormat,
    },
    /// The base cannot get as large as what is folded into it.
    #[error("{} has {size_bytes} bytes and cannot grow to {needed_bytes}", file.display())]
    TooSmall {
        /// The base.
        file: PathBuf,
        /// Its size.
        size_bytes: u64,
        /// The size that it needs.
        needed_bytes: u64,
    },
    /// A file of the host could not be removed.
    #[error("{} was folded and cannot be removed: {source}", file.display())]
    Remove {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}
