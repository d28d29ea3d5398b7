//! What a device can refuse or fail at: one variant a rule, with the numbers in it. How a protocol spells an error
//! is decided by the protocol, from [`DeviceError::kind`].

use std::error::Error as StdError;
use std::io;
use std::path::{Path, PathBuf};

use crate::ByteRange;

/// The class of an error, enough to choose an `errno` or an NBD error value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request itself is wrong.
    Invalid,
    /// The device may not be written.
    ReadOnly,
    /// Neither the host nor the device has room.
    NoSpace,
    /// The host has no memory for it.
    NoMemory,
    /// The device cannot do this at all, or not as fast as was asked for.
    NotSupported,
    /// The device is closing.
    ShuttingDown,
    /// The host, or what the image says of itself, failed.
    Io,
}

/// Why a [`crate::BlockDevice`] refused or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A read, or a question about extents, that leaves the device.
    #[error("{range} passes the end of the device, which has {size_bytes} bytes")]
    PastEnd {
        /// What was asked for.
        range: ByteRange,
        /// The size of the device.
        size_bytes: u64,
    },
    /// A write that leaves the device.
    #[error("no space: writing {range} passes the end of the device, which has {size_bytes} bytes")]
    WritePastEnd {
        /// What was to be written.
        range: ByteRange,
        /// The size of the device.
        size_bytes: u64,
    },
    /// A change to a device that was opened for reading.
    #[error("the device is read-only")]
    ReadOnly,
    /// Something that this device does not do.
    #[error("not supported: {what}")]
    NotSupported {
        /// What was asked for.
        what: &'static str,
    },
    /// A request after [`crate::BlockDevice::close`] began.
    #[error("the device is closed")]
    Closed,
    /// The host's file system or the kernel failed.
    #[error(transparent)]
    Host(#[from] HostError),
    /// An image format or a protocol underneath failed; the cause is its own error.
    #[error("{source}")]
    Backend {
        /// The class of the cause.
        kind: ErrorKind,
        /// The cause, in the words of the layer that found it.
        source: Box<dyn StdError + Send + Sync>,
    },
}

impl DeviceError {
    /// The class of this error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::PastEnd { .. } => ErrorKind::Invalid,
            Self::WritePastEnd { .. } => ErrorKind::NoSpace,
            Self::ReadOnly => ErrorKind::ReadOnly,
            Self::NotSupported { .. } => ErrorKind::NotSupported,
            Self::Closed => ErrorKind::ShuttingDown,
            Self::Host(error) => error.kind(),
            Self::Backend { kind, .. } => *kind,
        }
    }
}

/// What was asked of the host when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostOp {
    /// Opening or creating a file.
    Open,
    /// Taking QEMU's image locks.
    Lock,
    /// Asking for size, alignment or holes.
    Stat,
    /// Reading bytes.
    Read,
    /// Writing bytes.
    Write,
    /// Making data durable.
    Sync,
    /// Reserving space ahead.
    Allocate,
    /// Giving space back, or turning it into zeros.
    Punch,
    /// Changing the length.
    Resize,
    /// Copying from another file.
    Copy,
}

impl std::fmt::Display for HostOp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::Lock => "lock",
            Self::Stat => "stat",
            Self::Read => "read",
            Self::Write => "write",
            Self::Sync => "sync",
            Self::Allocate => "allocate",
            Self::Punch => "punch",
            Self::Resize => "resize",
            Self::Copy => "copy into",
        })
    }
}

/// A failed operation on a host file: which, where in it, and what the kernel said.
#[derive(Debug, thiserror::Error)]
#[error("cannot {op} {}{}: {source}", path.display(), Place(*.range))]
pub struct HostError {
    /// The file.
    pub path: PathBuf,
    /// The operation.
    pub op: HostOp,
    /// The bytes of the file that it was about; empty where it concerned the whole file.
    pub range: ByteRange,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

/// A range in brackets; nothing for an empty one.
struct Place(ByteRange);

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.is_empty() {
            true => Ok(()),
            false => write!(f, " ({})", self.0),
        }
    }
}

impl HostError {
    /// An error that concerns the whole file.
    pub(crate) fn whole(path: &Path, op: HostOp, source: io::Error) -> Self {
        Self { path: path.to_owned(), op, range: ByteRange::between(0, 0), source }
    }

    /// The class of this error.
    pub fn kind(&self) -> ErrorKind {
        match self.source.kind() {
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => ErrorKind::NoSpace,
            io::ErrorKind::OutOfMemory => ErrorKind::NoMemory,
            io::ErrorKind::Unsupported => ErrorKind::NotSupported,
            io::ErrorKind::ReadOnlyFilesystem => ErrorKind::ReadOnly,
            _ => ErrorKind::Io,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_about_a_whole_file_names_no_range() {
        let error = |range| HostError {
            path: "/x".into(),
            op: HostOp::Open,
            range,
            source: io::Error::other("why"),
        };
        assert_eq!(error(ByteRange::between(0, 0)).to_string(), "cannot open /x: why");
        let part = error(ByteRange::between(5, 7)).to_string();
        assert_eq!(part, "cannot open /x (2 bytes at offset 5): why");
    }
}
