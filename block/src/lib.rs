//! Async block devices over host files: the seam that every other crate stands on, and the only place with I/O
//! system calls. No image format and no network protocol lives here.

mod blocking;
mod buffer;
mod descriptor;
mod device;
mod engine;
mod error;
mod host;
mod memory;
mod memory_storage;
mod range;
mod range_lock;
mod raw;
mod storage;
mod uring;

pub use blocking::{BLOCKING_THREADS, ENGINE_SLOTS};
pub use buffer::{
    BUFFER_ALIGN_BYTES, Buffer, BufferPool, RETAINED_POOL_BYTES, SHARED_POOL_BYTES, is_zero,
};
pub use device::{
    BlockDevice, Durability, Extent, Limits, MAX_EXTENTS, Segment, Segments, ZeroMode,
};
pub use engine::{ENGINE_VARIABLE, Engine};
pub use error::{DeviceError, ErrorKind, HostError, HostOp};
pub use host::{Create, HostFile, OpenOptions};
pub use memory::MemoryDevice;
pub use memory_storage::{CrashChoice, HeldOps, LoggedOp, MemoryStorage, OpView, TEAR_BYTES};
pub use range::ByteRange;
pub use range_lock::{RangeGuard, RangeLock};
pub use raw::RawDevice;
pub use storage::{Finish, Hold, Op, OpKind, Outcome, Request, Storage, StorageFacts};
pub use uring::URING_THREADS;
