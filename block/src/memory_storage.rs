//! A host file in memory for tests: deterministic, with faults, held operations, a log, and the images that a power
//! cut may leave. Nothing outside tests should use it: every byte is kept, and every write is kept twice.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::copy::Origin;
use crate::storage::{Finish, Op, OpKind, Outcome, Request, Storage, StorageFacts};
use crate::{Buffer, ByteRange, CopySource};

/// The unit that a power cut leaves whole, in bytes: a torn write is old or new in each of these.
pub const TEAR_BYTES: u64 = 512;
/// How many operations may be in flight on one memory storage.
const MEMORY_SLOTS: usize = 1024;

/// A host file in memory. Clones are the same file.
///
/// Operations complete inside `submit`, in order, unless a hold applies: then they wait, without effect, until
/// released. A declared alignment is enforced: a misaligned read or write fails with `EINVAL`, as `O_DIRECT` would.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use block::{HostFile, MemoryStorage, OpKind};
/// use bytes::Bytes;
///
/// # tokio::runtime::Builder::new_current_thread().build()?.block_on(async {
/// let storage = MemoryStorage::new();
/// let file = HostFile::from_storage("test.img".as_ref(), storage.clone().into_dyn())?;
/// file.write(0, Bytes::from_static(b"durable"), None).await?;
/// file.sync().await?;
/// file.write(0, Bytes::from_static(b"in doubt"), None).await?;
///
/// // A power cut now may leave the second write out …
/// let ops = storage.log().len();
/// assert_eq!(storage.crash_image(ops, |_| false).snapshot(), b"durable");
/// // … or the disk may fail at the next write.
/// storage.fail_nth(0, std::io::ErrorKind::StorageFull, |op| op.kind == OpKind::Write);
/// assert!(file.write(0, Bytes::from_static(b"x"), None).await.is_err());
/// # Ok(()) })
/// # }
/// ```
#[derive(Clone)]
pub struct MemoryStorage {
    shared: Arc<Shared>,
}

struct Shared {
    facts: StorageFacts,
    slots: Arc<Semaphore>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    base: Vec<u8>,
    bytes: Vec<u8>,
    /// Which parts a map reports as data: sorted, apart from each other.
    data: Vec<ByteRange>,
    log: Vec<LoggedOp>,
    /// When each entry of the log was made, on a clock that other storages may share.
    stamps: Vec<u64>,
    clock: Arc<AtomicU64>,
    cap_bytes: Option<u64>,
    faults: Vec<Fault>,
    holds: Vec<(u64, Matcher)>,
    held: VecDeque<(u64, Op, Finish)>,
    next_hold: u64,
    no_fallocate: bool,
}

type Matcher = Box<dyn Fn(&OpView) -> bool + Send>;

struct Fault {
    skip: usize,
    kind: FaultKind,
    matches: Matcher,
    sticky: bool,
    /// How many bytes of an allocation or a zeroing are done nevertheless.
    done_bytes: u64,
}

#[derive(Clone, Copy)]
enum FaultKind {
    Kind(io::ErrorKind),
    Os(i32),
}

impl FaultKind {
    fn error(self) -> io::Error {
        match self {
            Self::Kind(kind) => kind.into(),
            Self::Os(errno) => io::Error::from_raw_os_error(errno),
        }
    }
}

/// What a predicate sees of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpView {
    /// Its kind.
    pub kind: OpKind,
    /// The bytes that it is about.
    pub range: ByteRange,
}

/// An operation that took effect, as the log keeps it. Reads and maps are not logged; a copy from another file is a
/// write of what it copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoggedOp {
    /// Bytes were written.
    Write {
        /// Where.
        at: u64,
        /// Which.
        data: Bytes,
    },
    /// A range was punched or zeroed in place.
    Zero {
        /// Where.
        range: ByteRange,
        /// Whether the file grew to the end of the range (it does not for a punched hole).
        grows: bool,
    },
    /// Space was allocated: the file grew to at least this length.
    Allocate {
        /// The least length.
        end: u64,
    },
    /// The length was set.
    SetLen {
        /// The new length.
        len: u64,
    },
    /// Everything before became durable.
    Sync,
}

impl Default for MemoryStorage {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStorage {
    /// An empty file without demands on alignment.
    pub fn new() -> Self {
        Self::with_alignment(1)
    }

    /// An empty file that refuses reads and writes whose offset, length or memory address is not a multiple of
    /// `align` bytes, a power of two up to 4096.
    pub fn with_alignment(align: u16) -> Self {
        Self::from_bytes(Vec::new(), align)
    }

    /// A file with this durable content.
    pub fn from_bytes(bytes: Vec<u8>, align: u16) -> Self {
        Self::on_clock(bytes, align, Arc::default())
    }

    /// As [`MemoryStorage::from_bytes`], with a clock that counts what takes effect in several storages.
    pub(crate) fn on_clock(bytes: Vec<u8>, align: u16, clock: Arc<AtomicU64>) -> Self {
        let data = vec![ByteRange::between(0, bytes.len() as u64)];
        let state = State { base: bytes.clone(), bytes, data, clock, ..State::default() };
        Self {
            shared: Arc::new(Shared {
                facts: StorageFacts {
                    memory_align: usize::from(align),
                    offset_align: u64::from(align),
                    read_only: false,
                    fixed_len: false,
                    id: None,
                },
                slots: Arc::new(Semaphore::new(MEMORY_SLOTS)),
                state: Mutex::new(state),
            }),
        }
    }

    /// The same, as what [`crate::HostFile::from_storage`] takes.
    pub fn into_dyn(self) -> Arc<dyn Storage> {
        Arc::new(self)
    }

    /// The same in the eyes of those who ask for its facts: read-only, or of a fixed length like a block device. It does
    /// what it did.
    pub fn with_facts(self, facts: StorageFacts) -> Arc<dyn Storage> {
        Arc::new(StandIn { storage: self, facts })
    }

    /// The bytes now, synced or not.
    pub fn snapshot(&self) -> Vec<u8> {
        self.shared.state.lock().bytes.clone()
    }

    /// The length now, in bytes.
    pub(crate) fn len_now(&self) -> u64 {
        self.shared.state.lock().bytes.len() as u64
    }

    /// Reads what there is at `at`, without faults, holds or a log.
    pub(crate) fn read_now(&self, at: u64, buffer: &mut [u8]) -> usize {
        let state = self.shared.state.lock();
        let found = usize::try_from(at).ok().and_then(|at| state.bytes.get(at..));
        let found = found.unwrap_or_default();
        let len = found.len().min(buffer.len());
        buffer[..len].copy_from_slice(&found[..len]);
        len
    }

    /// What took effect since creation, in order.
    pub fn log(&self) -> Vec<LoggedOp> {
        self.shared.state.lock().log.clone()
    }

    /// The number of entries of [`MemoryStorage::log`], without copying them.
    pub fn log_len(&self) -> usize {
        self.shared.state.lock().log.len()
    }

    /// How many entries of the log were made by the time that the clock showed `stamp`.
    pub(crate) fn ops_by(&self, stamp: u64) -> usize {
        self.shared.state.lock().stamps.partition_point(|made| *made <= stamp)
    }

    /// From now on the file cannot pass `bytes`: what would lengthen it further fails with `ENOSPC`.
    pub fn limit_len(&self, bytes: u64) {
        self.shared.state.lock().cap_bytes = Some(bytes);
    }

    /// From now on allocating, punching and zeroing ranges fail with `EOPNOTSUPP`, as on file systems without them.
    pub fn without_fallocate(&self) {
        self.shared.state.lock().no_fallocate = true;
    }

    /// The `n`-th (from 0) future operation that `matches` fails with `kind` and has no effect; others go on.
    pub fn fail_nth(
        &self,
        n: usize,
        kind: io::ErrorKind,
        matches: impl Fn(&OpView) -> bool + Send + 'static,
    ) {
        self.add_fault(n, FaultKind::Kind(kind), false, matches);
    }

    /// As [`MemoryStorage::fail_nth`], with an `errno`.
    pub fn fail_nth_errno(
        &self,
        n: usize,
        errno: i32,
        matches: impl Fn(&OpView) -> bool + Send + 'static,
    ) {
        self.add_fault(n, FaultKind::Os(errno), false, matches);
    }

    /// From the `n`-th (from 0) operation that `matches`, it and all later ones that match fail.
    pub fn fail_from(
        &self,
        n: usize,
        kind: io::ErrorKind,
        matches: impl Fn(&OpView) -> bool + Send + 'static,
    ) {
        self.add_fault(n, FaultKind::Kind(kind), true, matches);
    }

    /// The `n`-th (from 0) future operation that `matches`, which allocates or zeroes a range, finds no more room behind
    /// the first `done_bytes` of it, and leaves those done, as file systems do.
    pub fn fill_up_nth(
        &self,
        n: usize,
        done_bytes: u64,
        matches: impl Fn(&OpView) -> bool + Send + 'static,
    ) {
        let kind = FaultKind::Kind(io::ErrorKind::StorageFull);
        let fault = Fault { skip: n, kind, matches: Box::new(matches), sticky: false, done_bytes };
        self.shared.state.lock().faults.push(fault);
    }

    /// Forgets every fault that has not happened.
    pub fn clear_faults(&self) {
        self.shared.state.lock().faults.clear();
    }

    fn add_fault(
        &self,
        skip: usize,
        kind: FaultKind,
        sticky: bool,
        matches: impl Fn(&OpView) -> bool + Send + 'static,
    ) {
        let fault = Fault { skip, kind, matches: Box::new(matches), sticky, done_bytes: 0 };
        self.shared.state.lock().faults.push(fault);
    }

    /// From now on operations that match wait, without effect, until the answer is released or dropped.
    pub fn hold(&self, matches: impl Fn(&OpView) -> bool + Send + 'static) -> HeldOps {
        let mut state = self.shared.state.lock();
        let id = state.next_hold;
        state.next_hold += 1;
        state.holds.push((id, Box::new(matches)));
        HeldOps { storage: self.clone(), id }
    }

    /// What a power cut may leave after the first `ops` entries of the log.
    ///
    /// Everything up to the last sync among them is there. `survives` is asked once for every 512-byte sector of
    /// every later write (and once for each later zeroing, allocation or change of length); what it denies is lost.
    /// The new storage's content is durable, its log empty, its alignment the same.
    pub fn crash_image(
        &self,
        ops: usize,
        mut survives: impl FnMut(&CrashChoice<'_>) -> bool,
    ) -> Self {
        let state = self.shared.state.lock();
        let ops = ops.min(state.log.len());
        let durable = state.log[..ops].iter().rposition(|op| *op == LoggedOp::Sync).unwrap_or(0);
        let mut bytes = state.base.clone();
        for (index, op) in state.log[..ops].iter().enumerate() {
            if index < durable {
                apply(&mut bytes, op);
                continue;
            }
            apply_partly(&mut bytes, op, &mut |sector| {
                survives(&CrashChoice { index, op, sector })
            });
        }
        let align = u16::try_from(self.shared.facts.offset_align).unwrap_or(1);
        Self::from_bytes(bytes, align)
    }

    /// [`MemoryStorage::crash_image`] with choices from a seed: the same seed, the same image. Seeds 0 and 1 lose
    /// all and keep all; others lose or tear about half of what was not synced.
    pub fn crash_image_seeded(&self, ops: usize, seed: u64) -> Self {
        let mut random = SplitMix(seed);
        let mut last = None;
        let mut mode = 0;
        self.crash_image(ops, |choice| {
            if seed < 2 {
                return seed == 1;
            }
            if last != Some(choice.index) {
                last = Some(choice.index);
                mode = random.next() % 4;
            }
            match mode {
                0 => false,
                1 | 2 => true,
                _ => random.next().is_multiple_of(2),
            }
        })
    }
}

/// What [`MemoryStorage::crash_image`] asks about.
#[derive(Debug)]
pub struct CrashChoice<'a> {
    /// The operation's place in the log.
    pub index: usize,
    /// The operation.
    pub op: &'a LoggedOp,
    /// The offset of the sector in the file, for a write; `None` for what happens whole or not at all.
    pub sector: Option<u64>,
}

/// Sebastiano Vigna's generator: small, and the same everywhere.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

/// Operations that wait. Dropping this releases them and stops holding.
#[derive(Debug)]
#[must_use = "dropping it releases what is held"]
pub struct HeldOps {
    storage: MemoryStorage,
    id: u64,
}

impl HeldOps {
    /// How many wait now.
    pub fn count(&self) -> usize {
        let state = self.storage.shared.state.lock();
        state.held.iter().filter(|(id, ..)| *id == self.id).count()
    }

    /// Lets the one that has waited longest go on; `false` if none waits.
    pub fn release_one(&self) -> bool {
        let next = {
            let mut state = self.storage.shared.state.lock();
            let at = state.held.iter().position(|(id, ..)| *id == self.id);
            at.and_then(|at| state.held.remove(at))
        };
        match next {
            Some((_, op, finish)) => {
                self.storage.execute(op, finish);
                true
            }
            None => false,
        }
    }
}

impl Drop for HeldOps {
    fn drop(&mut self) {
        self.storage.shared.state.lock().holds.retain(|(id, _)| *id != self.id);
        while self.release_one() {}
    }
}

impl MemoryStorage {
    fn execute(&self, op: Op, finish: Finish) {
        // Read before anything is locked: it may be this file itself.
        let copied = match &op {
            Op::Copy { source: CopySource(Origin::Memory(source)), from, range } => {
                source.shared.state.lock().part(*from, range.len())
            }
            _ => None,
        };
        let result = self.shared.state.lock().run(op, copied, &self.shared.facts);
        finish.complete(result);
    }
}

impl Storage for MemoryStorage {
    fn submit(&self, request: Request) {
        let (op, finish) = request.into_parts();
        let view = OpView { kind: op.kind(), range: op.range() };
        let mut state = self.shared.state.lock();
        let hold = state.holds.iter().find(|(_, matches)| matches(&view)).map(|(id, _)| *id);
        if let Some(id) = hold {
            state.held.push_back((id, op, finish));
            return;
        }
        drop(state);
        self.execute(op, finish);
    }

    fn facts(&self) -> StorageFacts {
        self.shared.facts
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.shared.state.lock().bytes.len() as u64)
    }

    fn slots(&self) -> &Arc<Semaphore> {
        &self.shared.slots
    }

    fn copy_source(&self) -> Option<CopySource> {
        Some(CopySource(Origin::Memory(self.clone())))
    }
}

impl State {
    /// `copied` is what a copy reads.
    fn run(&mut self, op: Op, copied: Option<Bytes>, facts: &StorageFacts) -> io::Result<Outcome> {
        let view = OpView { kind: op.kind(), range: op.range() };
        if let Some((error, done_bytes)) = self.fault(&view) {
            self.run_part(&op, done_bytes)?;
            return Err(error);
        }
        check_alignment(&op, facts)?;
        self.check_room(&op)?;
        match op {
            Op::Read { at, buffer } => Ok(Outcome::Read(self.read(at, buffer))),
            Op::Map { range, max } => Ok(Outcome::Ranges(self.map(range, max))),
            Op::Write { at, data } => self.change(LoggedOp::Write { at, data }),
            Op::Copy { range, .. } => match copied {
                Some(data) => self.change(LoggedOp::Write { at: range.start(), data }),
                None => Err(io::ErrorKind::Unsupported.into()),
            },
            Op::Punch { range } => self.change(LoggedOp::Zero { range, grows: false }),
            Op::ZeroRange { range } => self.change(LoggedOp::Zero { range, grows: true }),
            Op::Allocate { range } => self.change(LoggedOp::Allocate { end: range.end() }),
            Op::SetLen { len } => self.change(LoggedOp::SetLen { len }),
            Op::Sync => self.change(LoggedOp::Sync),
        }
    }

    /// What is left of an operation that failed behind so many bytes.
    fn run_part(&mut self, op: &Op, done_bytes: u64) -> io::Result<()> {
        let start = op.range().start();
        let done = op.range().intersection(ByteRange::between(start, start + done_bytes));
        match op {
            _ if done.is_empty() => {}
            Op::Allocate { .. } => drop(self.change(LoggedOp::Allocate { end: done.end() })?),
            Op::ZeroRange { .. } => {
                drop(self.change(LoggedOp::Zero { range: done, grows: true })?);
            }
            _ => {}
        }
        Ok(())
    }

    /// What the operation fails with, and how much of it is done.
    fn fault(&mut self, view: &OpView) -> Option<(io::Error, u64)> {
        for (index, fault) in self.faults.iter_mut().enumerate() {
            if !(fault.matches)(view) {
                continue;
            }
            if fault.skip > 0 {
                fault.skip -= 1;
                continue;
            }
            let failed = (fault.kind.error(), fault.done_bytes);
            if !fault.sticky {
                self.faults.remove(index);
            }
            return Some(failed);
        }
        None
    }

    fn check_room(&self, op: &Op) -> io::Result<()> {
        let fallocates =
            matches!(op, Op::Allocate { .. } | Op::Punch { .. } | Op::ZeroRange { .. });
        if fallocates && self.no_fallocate {
            return Err(rustix::io::Errno::OPNOTSUPP.into());
        }
        let grows = !matches!(op, Op::Punch { .. } | Op::Read { .. } | Op::Map { .. } | Op::Sync);
        let end = op.range().end();
        if grows && end > self.bytes.len() as u64 && self.cap_bytes.is_some_and(|cap| end > cap) {
            return Err(rustix::io::Errno::NOSPC.into());
        }
        Ok(())
    }

    /// Bytes that are all there.
    fn part(&self, at: u64, len: u64) -> Option<Bytes> {
        let range = ByteRange::new(at, len)?;
        let bytes = self.bytes.get(index(range.start())..index(range.end()))?;
        Some(Bytes::copy_from_slice(bytes))
    }

    fn read(&self, at: u64, mut buffer: Buffer) -> Buffer {
        let start = usize::try_from(at).unwrap_or(usize::MAX).min(self.bytes.len());
        let found = &self.bytes[start..];
        let len = found.len().min(buffer.len());
        let (filled, rest) = buffer.split_at_mut(len);
        filled.copy_from_slice(&found[..len]);
        rest.fill(0);
        buffer
    }

    fn map(&self, range: ByteRange, max: usize) -> Vec<ByteRange> {
        let inside = self.data.iter().filter(|data| data.overlaps(range));
        let told =
            inside.map(|data| ByteRange::between(data.start().max(range.start()), data.end()));
        told.take(max).collect()
    }

    fn change(&mut self, op: LoggedOp) -> io::Result<Outcome> {
        apply(&mut self.bytes, &op);
        match &op {
            LoggedOp::Write { at, data } => {
                self.mark(ByteRange::between(*at, at + data.len() as u64));
            }
            LoggedOp::Zero { range, .. } => self.unmark(*range),
            LoggedOp::SetLen { len } => self.unmark(ByteRange::between(*len, u64::MAX)),
            LoggedOp::Allocate { .. } | LoggedOp::Sync => {}
        }
        self.log.push(op);
        self.stamps.push(self.clock.fetch_add(1, Ordering::SeqCst) + 1);
        Ok(Outcome::Done)
    }

    fn mark(&mut self, range: ByteRange) {
        let (mut start, mut end) = (range.start(), range.end());
        self.data.retain(|data| {
            let touches = data.start() <= end && start <= data.end();
            if touches {
                start = start.min(data.start());
                end = end.max(data.end());
            }
            !touches
        });
        let at = self.data.partition_point(|data| data.start() < start);
        self.data.insert(at, ByteRange::between(start, end));
    }

    fn unmark(&mut self, range: ByteRange) {
        let cut = |data: &ByteRange| {
            [
                ByteRange::between(data.start(), data.end().min(range.start())),
                ByteRange::between(data.start().max(range.end()), data.end()),
            ]
        };
        let left: Vec<_> = self.data.iter().flat_map(cut).filter(|d| !d.is_empty()).collect();
        self.data = left;
    }
}

fn check_alignment(op: &Op, facts: &StorageFacts) -> io::Result<()> {
    let address = match op {
        Op::Read { buffer, .. } => buffer.as_ptr() as usize,
        Op::Write { data, .. } => data.as_ptr() as usize,
        _ => return Ok(()),
    };
    let in_memory = address.is_multiple_of(facts.memory_align);
    if in_memory && op.range().is_aligned(facts.offset_align) {
        return Ok(());
    }
    Err(rustix::io::Errno::INVAL.into())
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

fn ensure_len(bytes: &mut Vec<u8>, len: u64) {
    let len = index(len);
    if bytes.len() < len {
        bytes.resize(len, 0);
    }
}

fn apply(bytes: &mut Vec<u8>, op: &LoggedOp) {
    apply_partly(bytes, op, &mut |_| true);
}

fn apply_partly(bytes: &mut Vec<u8>, op: &LoggedOp, survives: &mut dyn FnMut(Option<u64>) -> bool) {
    match op {
        LoggedOp::Write { at, data } => {
            let range = ByteRange::between(*at, at + data.len() as u64);
            for piece in range.pieces(TEAR_BYTES) {
                if !survives(Some(piece.start())) {
                    continue;
                }
                ensure_len(bytes, piece.end());
                let from = index(piece.start() - at);
                let len = index(piece.len());
                bytes[index(piece.start())..index(piece.end())]
                    .copy_from_slice(&data[from..from + len]);
            }
        }
        LoggedOp::Sync => {}
        _ if !survives(None) => {}
        LoggedOp::Zero { range, grows } => {
            if *grows {
                ensure_len(bytes, range.end());
            }
            let end = index(range.end()).min(bytes.len());
            let start = index(range.start()).min(end);
            bytes[start..end].fill(0);
        }
        LoggedOp::Allocate { end } => ensure_len(bytes, *end),
        LoggedOp::SetLen { len } => bytes.resize(index(*len), 0),
    }
}

impl fmt::Debug for MemoryStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.shared.state.lock();
        f.debug_struct("MemoryStorage")
            .field("len", &state.bytes.len())
            .field("log", &state.log.len())
            .field("held", &state.held.len())
            .finish_non_exhaustive()
    }
}

/// A storage with other facts.
struct StandIn {
    storage: MemoryStorage,
    facts: StorageFacts,
}

impl Storage for StandIn {
    fn submit(&self, request: Request) {
        self.storage.submit(request);
    }

    fn facts(&self) -> StorageFacts {
        self.facts
    }

    fn len(&self) -> io::Result<u64> {
        self.storage.len()
    }

    fn slots(&self) -> &Arc<Semaphore> {
        self.storage.slots()
    }

    fn copy_source(&self) -> Option<CopySource> {
        self.storage.copy_source()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BufferPool;

    fn write(storage: &MemoryStorage, at: u64, data: &'static [u8]) {
        let op = Op::Write { at, data: Bytes::from_static(data) };
        run(storage, op).expect("the write");
    }

    fn run(storage: &MemoryStorage, op: Op) -> io::Result<Outcome> {
        let (request, mut answer) = Request::new(op, None);
        storage.submit(request);
        answer.try_recv().expect("completed inside submit")
    }

    #[test]
    fn what_was_synced_survives_and_the_rest_is_chosen_by_sector() {
        static NEW: [u8; 1536] = [2; 1536];
        let storage = MemoryStorage::new();
        write(&storage, 0, &[1; 1024]);
        run(&storage, Op::Sync).expect("sync");
        write(&storage, 256, &NEW);
        let image = storage.crash_image(3, |choice| choice.sector == Some(512)).snapshot();
        let mut expected = vec![1; 1024];
        expected[512..].fill(2);
        assert_eq!(image, expected);
        assert_eq!(storage.crash_image(3, |_| true).snapshot(), storage.snapshot());
        assert_eq!(storage.crash_image(1, |_| false).snapshot(), b"");
    }

    #[test]
    fn a_seed_names_an_image() {
        let storage = MemoryStorage::new();
        for at in 0..20 {
            write(&storage, at * 700, &[9; 1000]);
        }
        let images: Vec<_> = (0..20).map(|seed| storage.crash_image_seeded(20, seed)).collect();
        assert_eq!(images[0].snapshot(), b"");
        assert_eq!(images[1].snapshot(), storage.snapshot());
        for (seed, image) in (0..).zip(&images) {
            assert_eq!(image.snapshot(), storage.crash_image_seeded(20, seed).snapshot());
        }
        assert!(images[2..].windows(2).any(|pair| pair[0].snapshot() != pair[1].snapshot()));
    }

    #[test]
    fn the_chosen_operation_fails_and_no_other() {
        let storage = MemoryStorage::new();
        storage.fail_nth(1, io::ErrorKind::StorageFull, |op| op.kind == OpKind::Write);
        write(&storage, 0, b"a");
        let op = Op::Write { at: 1, data: Bytes::from_static(b"b") };
        assert_eq!(run(&storage, op).unwrap_err().kind(), io::ErrorKind::StorageFull);
        write(&storage, 2, b"c");
        assert_eq!(storage.snapshot(), b"a\0c");
    }

    #[test]
    fn held_operations_have_no_effect_until_released() {
        let storage = MemoryStorage::new();
        let held = storage.hold(|op| op.kind == OpKind::Write);
        let op = Op::Write { at: 0, data: Bytes::from_static(b"late") };
        let (request, mut answer) = Request::new(op, None);
        storage.submit(request);
        assert_eq!((held.count(), storage.snapshot().len()), (1, 0));
        assert!(answer.try_recv().is_err());
        assert!(held.release_one());
        assert!(!held.release_one());
        assert!(answer.try_recv().expect("released").is_ok());
        assert_eq!(storage.snapshot(), b"late");
    }

    #[test]
    fn misaligned_reads_are_refused_and_the_cap_is_enospc() {
        let storage = MemoryStorage::with_alignment(512);
        let pool = BufferPool::new(1 << 20);
        let buffer = pool.get_now(100);
        let error = run(&storage, Op::Read { at: 0, buffer }).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        storage.limit_len(1000);
        let error = run(&storage, Op::SetLen { len: 1001 }).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn a_map_tells_written_from_punched_and_allocated() {
        let storage = MemoryStorage::new();
        run(&storage, Op::Allocate { range: ByteRange::between(0, 10_000) }).expect("allocate");
        write(&storage, 1000, &[1; 1000]);
        write(&storage, 2000, &[1; 1000]);
        run(&storage, Op::Punch { range: ByteRange::between(1500, 1600) }).expect("punch");
        let op = Op::Map { range: ByteRange::between(0, 10_000), max: 10 };
        let Ok(Outcome::Ranges(ranges)) = run(&storage, op) else { panic!("a map") };
        let ends: Vec<_> = ranges.iter().map(|r| (r.start(), r.end())).collect();
        assert_eq!(ends, [(1000, 1500), (1600, 3000)]);
    }
}
