//! Async block devices over host files: the seam that every other crate stands on, and the only place with I/O
//! system calls. No image format and no network protocol lives here.
//!
//! From the bottom up:
//!
//! - [`BufferPool`] gives aligned memory, within a bound, that becomes [`bytes::Bytes`] without a copy.
//! - [`Storage`] is the small door to one file: a handful of operations ([`Op`]) that an [`Engine`] carries out by
//!   io_uring or by a pool of threads, and [`MemoryStorage`] in memory, with faults and power cuts, for tests.
//! - [`HostFile`] takes requests of any alignment on top of it, with direct I/O, growth and QEMU's image locks.
//! - [`BlockDevice`] is a disk. [`RawDevice`] and [`MemoryDevice`] are two; image formats and network clients in other
//!   crates are more.
//!
//! The futures are `Send` and need no certain runtime. Dropping one never stops, or takes memory and locks from, an
//! operation that the kernel works on.
//!
//! ```
//! use block::{BlockDevice, ByteRange, Durability, RawDevice};
//! use bytes::Bytes;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("disk.raw");
//! # tokio::runtime::Builder::new_current_thread().build()?.block_on(async {
//! let disk = RawDevice::create(&path, 1 << 20).await?;
//! disk.write(1000, Bytes::from_static(b"hello"), Durability::Durable).await?;
//! let read = disk.read(ByteRange::between(998, 1005)).await?;
//! assert_eq!(read.to_vec(), b"\0\0hello");
//! disk.close().await?;
//! # Ok(())
//! # })
//! # }
//! ```

mod beneath;
mod blocking;
mod buffer;
mod copy;
mod cpu;
mod descriptor;
mod device;
mod engine;
mod error;
mod holders;
mod host;
mod inline;
mod join;
mod lock;
mod memory;
mod memory_files;
mod memory_storage;
mod open_files;
mod patience;
mod range;
mod range_lock;
mod raw;
mod reader;
mod rehearsal;
mod size_limit;
mod storage;
mod stretches;
mod unfinished;
mod uring;

pub use beneath::Root;
pub use blocking::{BLOCKING_THREADS, ENGINE_SLOTS};
pub use buffer::{
    BUFFER_ALIGN_BYTES, Buffer, BufferPool, RETAINED_POOL_BYTES, SHARED_POOL_BYTES, is_zero,
};
pub use copy::CopySource;
pub use cpu::{CPU_JOBS_PER_THREAD, CpuError, cpu_threads, on_cpu};
pub use device::{
    BlockDevice, Durability, Extent, Limits, MAX_EXTENTS, Segment, Segments, ZeroMode,
};
pub use engine::{ENGINE_VARIABLE, Engine};
pub use error::{DeviceError, ErrorKind, HostError, HostOp};
pub use holders::Holder;
pub use host::{Create, HostFile, OpenOptions};
pub use join::{InFlight, TryJoinAll, try_join_all};
pub use lock::{ImageLocked, LockConflict, Permission};
pub use memory::MemoryDevice;
pub use memory_files::MemoryFiles;
pub use memory_storage::{CrashChoice, HeldOps, LoggedOp, MemoryStorage, OpView, TEAR_BYTES};
pub use open_files::wait_until_closed;
pub use range::ByteRange;
pub use range_lock::{RangeGuard, RangeLock};
pub use raw::RawDevice;
pub use reader::FileReader;
pub use size_limit::survive_size_limit;
pub use storage::{Finish, Hold, Op, OpKind, Outcome, Request, Storage, StorageFacts};
pub use uring::URING_THREADS;
