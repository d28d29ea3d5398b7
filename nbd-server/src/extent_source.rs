//! What an export can tell of its device beside `base:allocation`: named sources of extents with flags. Where they know
//! it from is the embedder's; how a client asks for them stands in the handshake.

use async_trait::async_trait;
use block::{ByteRange, DeviceError};

/// The flag of a part that changed, in contexts named `qemu:dirty-bitmap:NAME`.
pub const DIRTY: u32 = 1;

/// A part of a device with the flags that a metadata context gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlaggedExtent {
    /// The part.
    pub range: ByteRange,
    /// Its flags, or its value: the context defines them.
    pub flags: u32,
}

/// Tells the flags of a device in one metadata context. See [`Export::context`](crate::Export::context).
#[async_trait]
pub trait ExtentSource: Send + Sync {
    /// The flags of `range`, which lies in the device: extents in order, without gaps, the first from the start of
    /// `range` on, at least one. They may end before or behind the end of `range`.
    ///
    /// # Errors
    /// Whatever keeps it from knowing; the client gets an error for its request.
    async fn extents(&self, range: ByteRange) -> Result<Vec<FlaggedExtent>, DeviceError>;
}
