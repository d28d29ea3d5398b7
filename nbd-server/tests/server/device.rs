//! A device in memory that logs what reaches it, can hold calls back and can fail on demand.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use block::{
    BlockDevice, ByteRange, DeviceError, Durability, Extent, HostError, HostOp, Limits, Segment,
    Segments, ZeroMode,
};
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;

const BLOCK: u64 = 4096;

/// A call that reached the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Read(u64, u64),
    Write(u64, u64, Durability),
    Zeroes(u64, u64, ZeroMode, Durability),
    Discard(u64, u64, Durability),
    Flush,
    Extents(u64, u64),
}

#[derive(Default)]
struct Gates {
    /// Calls for which this is true wait.
    holds: Option<fn(&Call) -> bool>,
    waiting: usize,
}

pub(crate) struct TestDevice {
    limits: Limits,
    state: Mutex<State>,
    gates: watch::Sender<Gates>,
}

struct State {
    bytes: Vec<u8>,
    allocated: Vec<bool>,
    log: Vec<Call>,
    failure: Option<io::ErrorKind>,
    extents_at_once: usize,
}

impl TestDevice {
    pub(crate) fn new(size_bytes: u64) -> Arc<Self> {
        Self::with(size_bytes, false)
    }

    pub(crate) fn with(size_bytes: u64, read_only: bool) -> Arc<Self> {
        let size = usize::try_from(size_bytes).unwrap();
        let blocks = usize::try_from(size_bytes.div_ceil(BLOCK)).unwrap();
        Arc::new(Self {
            limits: Limits {
                size_bytes,
                read_only,
                preferred_bytes: 65_536,
                can_discard: true,
                fast_zeroes: true,
            },
            state: Mutex::new(State {
                bytes: vec![0; size],
                allocated: vec![false; blocks],
                log: Vec::new(),
                failure: None,
                // Ending early is allowed, so it is tried.
                extents_at_once: 3,
            }),
            gates: watch::Sender::new(Gates::default()),
        })
    }

    /// What reached the device so far.
    pub(crate) fn log(&self) -> Vec<Call> {
        self.state.lock().log.clone()
    }

    /// The bytes it holds now.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.state.lock().bytes.clone()
    }

    /// From now on, calls that `which` chooses wait for [`Self::release`].
    pub(crate) fn hold(&self, which: fn(&Call) -> bool) {
        self.gates.send_modify(|gates| gates.holds = Some(which));
    }

    /// Lets every waiting and every later call go on.
    pub(crate) fn release(&self) {
        self.gates.send_modify(|gates| gates.holds = None);
    }

    /// Waits until `count` calls are held back.
    pub(crate) async fn held(&self, count: usize) {
        self.gates.subscribe().wait_for(|gates| gates.waiting >= count).await.unwrap();
    }

    /// How many calls are held back.
    pub(crate) fn held_now(&self) -> usize {
        self.gates.borrow().waiting
    }

    /// From now on, tells up to so many extents at once.
    pub(crate) fn tell_extents(&self, count: usize) {
        self.state.lock().extents_at_once = count;
    }

    /// Every later call fails like this.
    pub(crate) fn fail(&self, kind: io::ErrorKind) {
        self.state.lock().failure = Some(kind);
    }

    /// Later calls succeed again.
    #[cfg(feature = "client")]
    pub(crate) fn mend(&self) {
        self.state.lock().failure = None;
    }

    async fn pass(&self, call: Call) -> Result<(), DeviceError> {
        self.state.lock().log.push(call);
        let mut seen = self.gates.subscribe();
        if seen.borrow().holds.is_some_and(|which| which(&call)) {
            self.gates.send_modify(|gates| gates.waiting += 1);
            seen.wait_for(|gates| gates.holds.is_none()).await.unwrap();
            self.gates.send_modify(|gates| gates.waiting -= 1);
        }
        match self.state.lock().failure {
            Some(kind) => Err(DeviceError::Host(HostError {
                path: PathBuf::from("/secret/path"),
                op: HostOp::Write,
                range: ByteRange::between(0, 0),
                source: kind.into(),
            })),
            None => Ok(()),
        }
    }

    fn span(range: ByteRange) -> std::ops::Range<usize> {
        usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap()
    }
}

impl State {
    /// Marks the blocks of a range; a block only partly in it is never deallocated.
    fn mark(&mut self, range: ByteRange, allocated: bool) {
        for piece in range.pieces(BLOCK) {
            if allocated || piece.len() == BLOCK {
                self.allocated[usize::try_from(piece.start() / BLOCK).unwrap()] = allocated;
            }
        }
    }

    fn is_allocated(&self, at: u64) -> bool {
        self.allocated[usize::try_from(at / BLOCK).unwrap()]
    }
}

#[async_trait]
impl BlockDevice for TestDevice {
    fn limits(&self) -> Limits {
        self.limits
    }

    async fn read(&self, range: ByteRange) -> Result<Segments, DeviceError> {
        self.limits.check_read(range)?;
        self.pass(Call::Read(range.start(), range.len())).await?;
        let state = self.state.lock();
        let mut segments = Segments::default();
        for piece in range.pieces(BLOCK) {
            segments.push(if state.is_allocated(piece.start()) {
                Segment::Data(Bytes::copy_from_slice(&state.bytes[Self::span(piece)]))
            } else {
                Segment::Zero(piece.len())
            });
        }
        Ok(segments)
    }

    async fn write(
        &self,
        offset: u64,
        data: Bytes,
        durability: Durability,
    ) -> Result<(), DeviceError> {
        let range = ByteRange::new(offset, data.len() as u64).unwrap();
        self.limits.check_write(range)?;
        self.pass(Call::Write(offset, range.len(), durability)).await?;
        let mut state = self.state.lock();
        state.bytes[Self::span(range)].copy_from_slice(&data);
        state.mark(range, true);
        Ok(())
    }

    async fn write_zeroes(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        durability: Durability,
    ) -> Result<(), DeviceError> {
        self.limits.check_write(range)?;
        self.pass(Call::Zeroes(range.start(), range.len(), mode, durability)).await?;
        // Whole blocks are cheap, the rest is not.
        if mode.fast_only && !range.is_aligned(BLOCK) {
            return Err(DeviceError::NotSupported { what: "fast zeros of part of a block" });
        }
        let mut state = self.state.lock();
        state.bytes[Self::span(range)].fill(0);
        state.mark(range, mode.keep_allocated);
        Ok(())
    }

    async fn discard(&self, range: ByteRange, durability: Durability) -> Result<(), DeviceError> {
        self.limits.check_write(range)?;
        self.pass(Call::Discard(range.start(), range.len(), durability)).await?;
        let mut state = self.state.lock();
        for piece in range.pieces(BLOCK).filter(|piece| piece.len() == BLOCK) {
            state.bytes[Self::span(piece)].fill(0);
            state.mark(piece, false);
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        self.pass(Call::Flush).await
    }

    async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, DeviceError> {
        self.limits.check_read(range)?;
        self.pass(Call::Extents(range.start(), range.len())).await?;
        let state = self.state.lock();
        let mut extents: Vec<Extent> = Vec::new();
        for piece in range.pieces(BLOCK) {
            let allocated = state.is_allocated(piece.start());
            let is_long = extents.len() == state.extents_at_once;
            match extents.last_mut() {
                Some(last) if last.allocated == allocated => {
                    last.range = ByteRange::between(last.range.start(), piece.end());
                }
                Some(_) if is_long => break,
                _ => extents.push(Extent { range: piece, allocated, zero: !allocated }),
            }
        }
        Ok(extents)
    }

    async fn close(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}
