//! Async block devices over host files: the seam that every other crate stands on, and the only place with I/O
//! system calls. No image format and no network protocol lives here.

mod device;
mod error;
mod range;

pub use device::{
    BlockDevice, Durability, Extent, Limits, MAX_EXTENTS, Segment, Segments, ZeroMode,
};
pub use error::{DeviceError, ErrorKind, HostError, HostOp};
pub use range::ByteRange;
