//! What an image can refuse or fail at: one variant a rule, with the file and the numbers in it. How a protocol
//! spells an error is decided by the protocol, from [`block::DeviceError::kind`].

mod corruption;
mod feature;
mod invalid;
mod keys;
mod vmdk;

use std::path::PathBuf;
use std::sync::Arc;

use block::{CpuError, DeviceError, ErrorKind, HostError};

use crate::bitmap::BitmapError;
use crate::tally::Finding;
use crate::units::HostOffset;

pub use self::corruption::{Corruption, TableKind};
pub use self::feature::{Feature, ReferenceError};
pub use self::invalid::{InvalidOption, SnapshotError};
pub use self::keys::{KeyError, UnlockError};
pub use self::vmdk::VmdkError;

/// Why an image could not be created, opened, read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The image breaks its format. Parts that do not depend on what is broken stay readable.
    #[error("{} is corrupt at {at}: {what}", file.display())]
    Corrupt {
        /// The image.
        file: PathBuf,
        /// The offset in it.
        at: HostOffset,
        /// The rule that is broken.
        what: Corruption,
    },
    /// The image is fine and asks for more than this version does.
    #[error("{} needs what is not supported: {feature}", file.display())]
    Unsupported {
        /// The image.
        file: PathBuf,
        /// What it asks for.
        feature: Feature,
    },
    /// The host failed.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A file that an image refers to was not opened: what lies below it, its data file or an extent.
    #[error("{} refers to {name:?}: {reason}", file.display())]
    Reference {
        /// The image that refers to it.
        file: PathBuf,
        /// The name as recorded.
        name: String,
        /// Why not.
        reason: ReferenceError,
    },
    /// An encrypted image was not opened.
    #[error("{} stays locked: {reason}", file.display())]
    Locked {
        /// The image.
        file: PathBuf,
        /// Why.
        reason: UnlockError,
    },
    /// The keys of an encrypted image were not changed.
    #[error("the keys of {} stay as they are: {reason}", file.display())]
    Key {
        /// The image.
        file: PathBuf,
        /// Why.
        reason: KeyError,
    },
    /// The system has no random numbers for keys.
    #[error("no random numbers for keys: {source}")]
    NoRandomness {
        /// What the system said.
        source: std::io::Error,
    },
    /// A VMDK image was not opened.
    #[error("{} is no VMDK that can be read: {what}", file.display())]
    Vmdk {
        /// The image.
        file: PathBuf,
        /// Why not.
        what: VmdkError,
    },
    /// A path could not be resolved.
    #[error("cannot resolve {}: {source}", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The backing file failed.
    #[error("backing file of {}: {source}", file.display())]
    Backing {
        /// The image above it.
        file: PathBuf,
        /// What it answered.
        source: DeviceError,
    },
    /// A new image cannot be made like this.
    #[error("cannot create {}: {what}", file.display())]
    Invalid {
        /// The image that was to be.
        file: PathBuf,
        /// What is wrong.
        what: InvalidOption,
    },
    /// Something is wrong with the image that has to be repaired before its metadata can be written anew.
    #[error("{} must be repaired first, run check: {finding}", file.display())]
    Damaged {
        /// The image.
        file: PathBuf,
        /// What was found first.
        finding: Box<Finding>,
    },
    /// Not everything that the image refers to is understood, so that what seems free may not be.
    #[error("{} refers to clusters in a way that is not understood", file.display())]
    Uncountable {
        /// The image.
        file: PathBuf,
    },
    /// A change of the metadata was given up in the moment when it took effect.
    #[error("a change of {} was given up while its header was written", file.display())]
    Abandoned {
        /// The image.
        file: PathBuf,
    },
    /// Something cannot be done with an internal snapshot.
    #[error("{}: {what}", file.display())]
    Snapshot {
        /// The image.
        file: PathBuf,
        /// What, and why not.
        what: SnapshotError,
    },
    /// An image cannot be changed like this.
    #[error("cannot change {}: {what}", file.display())]
    Change {
        /// The image.
        file: PathBuf,
        /// What is wrong.
        what: crate::change::ChangeError,
    },
    /// A request that leaves the disk, or a change to a read-only one.
    #[error(transparent)]
    Request(DeviceError),
    /// A computation (of a compression or a key) broke down, which is a defect of ours and not of the image.
    #[error("{}: {source}", file.display())]
    Cpu {
        /// The image.
        file: PathBuf,
        /// What happened.
        source: CpuError,
    },
    /// Writing metadata failed earlier: what is on disk is consistent, what is in memory is not to be trusted.
    #[error("{} must be reopened, because writing its metadata failed: {first}", file.display())]
    Poisoned {
        /// The image.
        file: PathBuf,
        /// The first failure.
        first: Arc<Error>,
    },
    /// Something cannot be done with a bitmap.
    #[error("bitmap {name:?} of {}: {reason}", file.display())]
    Bitmap {
        /// The image.
        file: PathBuf,
        /// The name of the bitmap.
        name: String,
        /// Why not.
        reason: BitmapError,
    },
    /// The image is closed or closing.
    #[error("{} is closed", file.display())]
    Closed {
        /// The image.
        file: PathBuf,
    },
}

impl Error {
    /// The class of this error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Corrupt { .. }
            | Self::Path { .. }
            | Self::NoRandomness { .. }
            | Self::Vmdk { .. }
            | Self::Poisoned { .. }
            | Self::Cpu { .. }
            | Self::Damaged { .. }
            | Self::Uncountable { .. }
            | Self::Abandoned { .. } => ErrorKind::Io,
            Self::Unsupported { .. } => ErrorKind::NotSupported,
            Self::Host(error) => error.kind(),
            Self::Reference { .. }
            | Self::Change { .. }
            | Self::Invalid { .. }
            | Self::Locked { .. }
            | Self::Snapshot { .. }
            | Self::Bitmap { .. }
            | Self::Key { .. } => ErrorKind::Invalid,
            Self::Backing { source, .. } | Self::Request(source) => source.kind(),
            Self::Closed { .. } => ErrorKind::ShuttingDown,
        }
    }
}

impl From<Error> for DeviceError {
    fn from(error: Error) -> Self {
        match error {
            Error::Host(error) => Self::Host(error),
            Error::Request(error) => error,
            Error::Closed { .. } => Self::Closed,
            other => Self::Backend { kind: other.kind(), source: Box::new(other) },
        }
    }
}

/// What the pure core answers when it cannot go on: an [`Error`] that does not know its file yet.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The image breaks its format.
    #[error("corrupt at {at}: {what}")]
    Corrupt {
        /// The offset in the file.
        at: HostOffset,
        /// The rule that is broken.
        what: Corruption,
    },
    /// The image asks for what is not supported.
    #[error("what is not supported: {0}")]
    Unsupported(Feature),
}

impl Fault {
    /// The error for the image `file`.
    pub(crate) fn of(self, file: &std::path::Path) -> Error {
        let file = file.to_owned();
        match self {
            Self::Corrupt { at, what } => Error::Corrupt { file, at, what },
            Self::Unsupported(feature) => Error::Unsupported { file, feature },
        }
    }
}
