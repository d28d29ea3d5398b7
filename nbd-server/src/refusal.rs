//! What a device says to clients where it fails a request that it cannot serve: the words of other errors may name files
//! of the host, and stay in the log.

use block::{DeviceError, ErrorKind};

/// Why a device does not serve a request, in words that clients may read. Within a [`DeviceError`] it reaches them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub &'static str);

impl Refusal {
    /// The error of a device, of a class that becomes the number of the NBD error.
    #[must_use]
    pub fn of_kind(self, kind: ErrorKind) -> DeviceError {
        DeviceError::Backend { kind, source: Box::new(self) }
    }

    /// What a device refused, if that is what it did.
    pub(crate) fn of(error: &DeviceError) -> Option<Self> {
        match error {
            DeviceError::Backend { source, .. } => source.downcast_ref().copied(),
            _ => None,
        }
    }
}
