//! The small door to one host file: the operations that every engine executes, and what travels with them. Alignment
//! is declared here and obeyed by `HostFile`; engines pass on what they are given.

use std::any::Any;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore, oneshot};

use crate::{Buffer, ByteRange, CopySource, RangeGuard};

/// Something that an operation keeps until it has completed: a lock, a reservation. Dropping the future that waits
/// for the operation does not drop it.
pub type Hold = Option<Arc<dyn Any + Send + Sync>>;

/// One thing to do to a file. Offsets and lengths are bytes.
#[derive(Debug)]
pub enum Op {
    /// Fill `buffer` from offset `at`; what lies behind the end of the file becomes zeros.
    Read {
        /// The first byte.
        at: u64,
        /// What to fill, whole.
        buffer: Buffer,
    },
    /// Write all of `data` at offset `at`; the file grows where needed.
    Write {
        /// The first byte.
        at: u64,
        /// What to write, whole.
        data: Bytes,
    },
    /// Copy from another file inside the host: by sharing extents, or as its file system copies. "Unsupported" where it
    /// does not; then any part of the range may be done.
    Copy {
        /// The other file.
        source: CopySource,
        /// The first byte there.
        from: u64,
        /// Where the copy goes.
        range: ByteRange,
    },
    /// Make completed writes, and the metadata to find them, durable (`fdatasync`).
    Sync,
    /// Allocate space; the file grows to the end of the range, new bytes read as zeros (`fallocate` with mode 0).
    Allocate {
        /// What to allocate.
        range: ByteRange,
    },
    /// Deallocate; the range then reads as zeros, the length stays (`FALLOC_FL_PUNCH_HOLE`).
    Punch {
        /// What to deallocate.
        range: ByteRange,
    },
    /// Make it read as zeros but stay, or become, allocated; the file grows where needed (`FALLOC_FL_ZERO_RANGE`).
    ZeroRange {
        /// What to zero.
        range: ByteRange,
    },
    /// Cut the file or lengthen it by a hole.
    SetLen {
        /// The new length.
        len: u64,
    },
    /// Tell which parts of the range hold data, in order, at most `max` of them (`SEEK_DATA`, `SEEK_HOLE`). The last may
    /// be told as far as it goes.
    Map {
        /// What to look at.
        range: ByteRange,
        /// The most ranges to answer.
        max: usize,
    },
}

impl Op {
    /// Its kind, without the data.
    pub fn kind(&self) -> OpKind {
        match self {
            Self::Read { .. } => OpKind::Read,
            Self::Write { .. } => OpKind::Write,
            Self::Copy { .. } => OpKind::Copy,
            Self::Sync => OpKind::Sync,
            Self::Allocate { .. } => OpKind::Allocate,
            Self::Punch { .. } => OpKind::Punch,
            Self::ZeroRange { .. } => OpKind::ZeroRange,
            Self::SetLen { .. } => OpKind::SetLen,
            Self::Map { .. } => OpKind::Map,
        }
    }

    /// The bytes of the file that it is about; empty for those that concern all of it.
    pub fn range(&self) -> ByteRange {
        match self {
            Self::Read { at, buffer } => span(*at, buffer.len()),
            Self::Write { at, data } => span(*at, data.len()),
            Self::Allocate { range }
            | Self::Punch { range }
            | Self::ZeroRange { range }
            | Self::Copy { range, .. }
            | Self::Map { range, .. } => *range,
            Self::SetLen { len } => ByteRange::between(*len, *len),
            Self::Sync => ByteRange::between(0, 0),
        }
    }
}

fn span(at: u64, len: usize) -> ByteRange {
    ByteRange::between(at, at.saturating_add(len as u64))
}

/// The kinds of [`Op`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each is the `Op` of the same name")]
pub enum OpKind {
    Read,
    Write,
    Copy,
    Sync,
    Allocate,
    Punch,
    ZeroRange,
    SetLen,
    Map,
}

/// What a completed operation hands back.
#[derive(Debug)]
pub enum Outcome {
    /// It is done; nothing comes back.
    Done,
    /// The buffer of a read, filled to its end.
    Read(Buffer),
    /// The data ranges that a map found.
    Ranges(Vec<ByteRange>),
}

/// The two lengths of a file, as far as its `HostFile` knows. Updated by completions, so that a dropped future leaves
/// them right.
#[derive(Debug)]
pub(crate) struct Lengths {
    /// The end of what was written or set.
    pub(crate) logical: AtomicU64,
    /// The length of the file on the host, with what was allocated ahead.
    pub(crate) physical: AtomicU64,
    /// Held by who takes one for the other.
    gate: Mutex<()>,
}

/// How a successful operation changes the lengths.
#[derive(Debug)]
pub(crate) enum Effect {
    /// Both are at least this.
    Grows { logical: u64, physical: u64 },
    /// Both are this.
    Sets(u64),
    /// The host's is this.
    Physical(u64),
}

/// Everything that an operation keeps until its completion.
#[derive(Default)]
#[expect(dead_code, reason = "what is kept only has to be dropped at the right time")]
pub(crate) struct Keep {
    pub(crate) hold: Hold,
    pub(crate) guard: Option<Arc<RangeGuard>>,
    pub(crate) resize: Option<Arc<OwnedMutexGuard<()>>>,
    pub(crate) slot: Option<OwnedSemaphorePermit>,
    pub(crate) effect: Option<(Arc<Lengths>, Effect)>,
}

/// An operation on its way through an engine, with what it keeps alive and the place to answer.
///
/// An engine owns the request until [`Request::complete`]; that is what makes buffers and locks outlive the kernel's
/// use of them. A request that is dropped without completion answers "interrupted".
pub struct Request {
    /// What to do.
    pub op: Op,
    finish: Finish,
}

/// A request without its operation: what an engine keeps while it takes the operation apart.
pub struct Finish {
    keep: Keep,
    reply: oneshot::Sender<io::Result<Outcome>>,
}

impl Finish {
    /// Answers the caller and lets go of everything that the operation kept.
    pub fn complete(self, result: io::Result<Outcome>) {
        if let (Ok(_), Some((lengths, effect))) = (&result, &self.keep.effect) {
            lengths.apply(effect);
        }
        // Locks first: who hears of the completion must find the range free.
        drop(self.keep);
        // The caller may be gone; then the result interests nobody.
        let _gone = self.reply.send(result);
    }

    /// Answers with an error but never lets go of what was kept: for an operation that may go on behind our back.
    pub fn abandon(self, error: io::Error) {
        std::mem::forget(self.keep);
        let _gone = self.reply.send(Err(error));
    }
}

impl Lengths {
    /// Those of a file of this length.
    pub(crate) fn new(len: u64) -> Self {
        Self { logical: len.into(), physical: len.into(), gate: Mutex::default() }
    }

    /// Makes the file as long as this where the host's is; whether it is.
    pub(crate) fn reach(&self, end: u64) -> bool {
        let _gate = self.gate.lock();
        let is_there = end <= self.physical.load(Ordering::Acquire);
        if is_there {
            self.logical.fetch_max(end, Ordering::AcqRel);
        }
        is_there
    }

    /// The host's file is to be cut to `len`, or to what the file has reached meanwhile: to which. From here on nobody
    /// reaches into what goes.
    pub(crate) fn begin_cut(&self, len: u64) -> u64 {
        let _gate = self.gate.lock();
        let len = len.max(self.logical.load(Ordering::Acquire));
        self.physical.store(len, Ordering::Release);
        len
    }

    fn apply(&self, effect: &Effect) {
        match *effect {
            Effect::Grows { logical, physical } => {
                self.physical.fetch_max(physical.max(logical), Ordering::AcqRel);
                self.logical.fetch_max(logical, Ordering::AcqRel);
            }
            Effect::Sets(len) => {
                self.logical.store(len, Ordering::Release);
                self.physical.store(len, Ordering::Release);
            }
            Effect::Physical(len) => self.physical.store(len, Ordering::Release),
        }
    }
}

impl Request {
    /// A request that keeps `hold` until it completes, and where its answer will arrive.
    pub fn new(op: Op, hold: Hold) -> (Self, oneshot::Receiver<io::Result<Outcome>>) {
        Self::keeping(op, Keep { hold, ..Keep::default() })
    }

    pub(crate) fn keeping(op: Op, keep: Keep) -> (Self, oneshot::Receiver<io::Result<Outcome>>) {
        let (reply, answer) = oneshot::channel();
        (Self { op, finish: Finish { keep, reply } }, answer)
    }

    /// Puts together what [`Request::into_parts`] took apart.
    pub fn from_parts(op: Op, finish: Finish) -> Self {
        Self { op, finish }
    }

    /// Separates what to do from what to do afterwards.
    pub fn into_parts(self) -> (Op, Finish) {
        (self.op, self.finish)
    }

    /// Answers the caller and lets go of everything that the operation kept.
    pub fn complete(self, result: io::Result<Outcome>) {
        self.finish.complete(result);
    }
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Request").field(&self.op).finish()
    }
}

/// What a file demands and is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageFacts {
    /// What the address of memory must be a multiple of, in bytes: a power of two, at most 4096.
    pub memory_align: usize,
    /// What offsets and lengths of reads and writes must be multiples of, in bytes: a power of two. 1 for buffered I/O.
    pub offset_align: u64,
    /// Whether nothing may be changed.
    pub read_only: bool,
    /// Whether it is a block device: its length is fixed.
    pub fixed_len: bool,
    /// Device and inode number of a real file.
    pub id: Option<(u64, u64)>,
}

/// One open file in the hands of an engine.
pub trait Storage: Send + Sync {
    /// Starts an operation. Never blocks and never refuses: failure arrives as the answer.
    ///
    /// Reads and writes obey [`StorageFacts`]; operations that overlap run in any order.
    fn submit(&self, request: Request);

    /// What the file demands and is. Constant.
    fn facts(&self) -> StorageFacts;

    /// Whether there is so much room for so many bytes more that reserving some is not worth its time. `false` is never
    /// wrong.
    fn has_ample_room(&self, _bytes: u64) -> bool {
        false
    }

    /// The length of the file now, in bytes; the size of a block device.
    ///
    /// # Errors
    /// What the kernel says.
    fn len(&self) -> io::Result<u64>;

    /// Whether the file has no byte.
    ///
    /// # Errors
    /// As [`Storage::len`].
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// The places for operations in flight; each request takes one along. This is what bounds every queue below.
    fn slots(&self) -> &Arc<Semaphore>;

    /// The file as what [`Op::Copy`] into another one reads; `None` where it cannot be that.
    fn copy_source(&self) -> Option<CopySource> {
        None
    }
}
