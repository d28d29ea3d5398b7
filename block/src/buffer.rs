//! Page-aligned buffers from a bounded pool, and the test whether bytes are all zero. What the buffers are used for,
//! and who may have how many, is decided elsewhere.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::oneshot;

/// The alignment of every buffer's memory, in bytes: enough for `O_DIRECT` on any device.
pub const BUFFER_ALIGN_BYTES: usize = 4096;
/// How many bytes of buffers the process-wide pool hands out before [`BufferPool::get`] waits.
pub const SHARED_POOL_BYTES: usize = 256 << 20;
/// From this capacity on, in bytes, memory is mapped from the kernel for one block alone: pages that nobody has written
/// to cost nothing, while an allocator clears them all, touching each.
const MAPPED_BLOCK_BYTES: usize = 128 << 10;
/// How many bytes of unused buffers a pool keeps for the next caller; more goes back to the system at once.
pub const RETAINED_POOL_BYTES: usize = 64 << 20;

/// A pool of aligned buffers with a bound on the bytes in use.
///
/// Two ways in: [`BufferPool::get`] waits, first come first served, while the pool is exhausted, and belongs where
/// work *enters* (a request read from a socket). [`BufferPool::get_now`] never waits and may overdraw the pool: it is
/// for code that works on something already admitted and may hold buffers of its own; if that waited, requests that
/// hold one buffer each and want another would stop each other for ever.
///
/// Buffers are initialised once, when their memory comes from the system, and not cleared between users: the content
/// of a new [`Buffer`] is unspecified (bytes of an earlier user of this process), but never uninitialised. Large memory
/// that is new takes up pages only as it is written to.
pub struct BufferPool {
    cap_bytes: usize,
    state: Mutex<PoolState>,
}

#[derive(Default)]
struct PoolState {
    in_use_bytes: usize,
    waiting: VecDeque<(usize, oneshot::Sender<Reservation>)>,
    idle: BTreeMap<usize, Vec<Block>>,
    idle_bytes: usize,
}

impl BufferPool {
    /// The pool that all devices and servers of this process share, of [`SHARED_POOL_BYTES`].
    pub fn shared() -> &'static Arc<Self> {
        static SHARED: LazyLock<Arc<BufferPool>> =
            LazyLock::new(|| BufferPool::new(SHARED_POOL_BYTES));
        &SHARED
    }

    /// A pool that lets `cap_bytes` be in use before [`BufferPool::get`] waits.
    pub fn new(cap_bytes: usize) -> Arc<Self> {
        Arc::new(Self { cap_bytes, state: Mutex::default() })
    }

    /// A buffer of exactly `len` bytes; waits its turn while the pool is exhausted.
    ///
    /// A request larger than the whole pool is served alone, when nothing else is in use: it never waits for ever.
    /// Dropping the future gives its place in the queue, or what it was granted, back.
    pub async fn get(self: &Arc<Self>, len: usize) -> Buffer {
        let capacity = capacity_for(len);
        let turn = {
            let mut state = self.state.lock();
            if state.waiting.is_empty() && state.fits(capacity, self.cap_bytes) {
                state.in_use_bytes += capacity;
                None
            } else {
                let (grant, turn) = oneshot::channel();
                state.waiting.push_back((capacity, grant));
                Some(turn)
            }
        };
        let reservation = match turn {
            None => self.reservation(capacity),
            Some(turn) => {
                let mut leaving = Leaving(Some(self));
                let answer = turn.await;
                leaving.0 = None;
                // The pool never forgets a waiter; if it did, overdraw rather than fail.
                answer.unwrap_or_else(|_| self.reserve_now(capacity))
            }
        };
        self.buffer(len, reservation)
    }

    /// A buffer of `len` bytes if it can be had without waiting and without passing anyone who waits.
    pub fn try_get(self: &Arc<Self>, len: usize) -> Option<Buffer> {
        let capacity = capacity_for(len);
        {
            let mut state = self.state.lock();
            if !state.waiting.is_empty() || !state.fits(capacity, self.cap_bytes) {
                return None;
            }
            state.in_use_bytes += capacity;
        }
        let reservation = self.reservation(capacity);
        Some(self.buffer(len, reservation))
    }

    /// A buffer of `len` bytes at once, even if the pool is exhausted: then those who wait, wait longer.
    pub fn get_now(self: &Arc<Self>, len: usize) -> Buffer {
        let reservation = self.reserve_now(capacity_for(len));
        self.buffer(len, reservation)
    }

    /// The bytes handed out now, rounded up to what their memory really takes.
    pub fn in_use_bytes(&self) -> usize {
        self.state.lock().in_use_bytes
    }

    /// The bytes kept for later callers.
    pub fn idle_bytes(&self) -> usize {
        self.state.lock().idle_bytes
    }

    fn reserve_now(self: &Arc<Self>, capacity: usize) -> Reservation {
        self.state.lock().in_use_bytes += capacity;
        self.reservation(capacity)
    }

    fn reservation(self: &Arc<Self>, bytes: usize) -> Reservation {
        Reservation { pool: Arc::clone(self), bytes }
    }

    fn buffer(&self, len: usize, reservation: Reservation) -> Buffer {
        let idle = {
            let mut state = self.state.lock();
            let block = state.idle.get_mut(&reservation.bytes).and_then(Vec::pop);
            if block.is_some() {
                state.idle_bytes -= reservation.bytes;
            }
            block
        };
        let block = idle.unwrap_or_else(|| Block::new(reservation.bytes));
        Buffer { block: Some(block), len, reservation }
    }

    /// Takes memory back: keeps it if there is room, at the cost of the size that has hoarded most.
    fn keep(&self, block: Block) {
        let capacity = block.capacity;
        let mut freed = Vec::new();
        {
            let mut state = self.state.lock();
            while state.idle_bytes + capacity > RETAINED_POOL_BYTES {
                let Some(other) = state.evict_other_than(capacity) else { break };
                freed.push(other);
            }
            if state.idle_bytes + capacity <= RETAINED_POOL_BYTES {
                state.idle_bytes += capacity;
                state.idle.entry(capacity).or_default().push(block);
            } else {
                freed.push(block);
            }
        }
        drop(freed); // Outside the lock: it is the system's allocator that works here.
    }

    fn release(self: &Arc<Self>, bytes: usize) {
        self.state.lock().in_use_bytes -= bytes;
        self.grant();
    }

    /// Gives those who wait, in order, what has become free.
    fn grant(self: &Arc<Self>) {
        let mut undeliverable = Vec::new();
        {
            let mut state = self.state.lock();
            while let Some((capacity, grant)) = state.waiting.pop_front() {
                if grant.is_closed() {
                    continue;
                }
                if !state.fits(capacity, self.cap_bytes) {
                    state.waiting.push_front((capacity, grant));
                    break;
                }
                state.in_use_bytes += capacity;
                if let Err(back) = grant.send(self.reservation(capacity)) {
                    undeliverable.push(back);
                }
            }
        }
        // Dropped without the lock, because each comes back here.
        drop(undeliverable);
    }
}

/// A place in the queue: whoever leaves it early may have been in somebody's way.
struct Leaving<'a>(Option<&'a Arc<BufferPool>>);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        // What it waited with is dropped already, so that its place counts as left.
        if let Some(pool) = self.0 {
            pool.grant();
        }
    }
}

impl PoolState {
    fn fits(&self, capacity: usize, cap_bytes: usize) -> bool {
        self.in_use_bytes == 0 || self.in_use_bytes.saturating_add(capacity) <= cap_bytes
    }

    fn evict_other_than(&mut self, capacity: usize) -> Option<Block> {
        let (&size, blocks) = self
            .idle
            .iter_mut()
            .filter(|(size, blocks)| **size != capacity && !blocks.is_empty())
            .max_by_key(|(size, blocks)| **size * blocks.len())?;
        let block = blocks.pop()?;
        self.idle_bytes -= size;
        Some(block)
    }
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BufferPool")
            .field("cap_bytes", &self.cap_bytes)
            .field("in_use_bytes", &self.in_use_bytes())
            .finish_non_exhaustive()
    }
}

/// The memory that a buffer of `len` bytes takes: whole pages, and from 32 KiB on at most an eighth too much, so that
/// a few sizes serve all.
fn capacity_for(len: usize) -> usize {
    let step =
        (len.checked_next_power_of_two().unwrap_or(BUFFER_ALIGN_BYTES) / 8).max(BUFFER_ALIGN_BYTES);
    len.max(1).checked_next_multiple_of(step).unwrap_or(len)
}

/// Bytes of the pool's budget; giving them back is dropping this.
struct Reservation {
    pool: Arc<BufferPool>,
    bytes: usize,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.pool.release(self.bytes);
    }
}

/// A piece of memory from the system, aligned to [`BUFFER_ALIGN_BYTES`] and initialised: from the allocator, or a
/// mapping of its own from [`MAPPED_BLOCK_BYTES`] on.
struct Block {
    memory: NonNull<u8>,
    capacity: usize,
}

// SAFETY: a block is the only owner of its memory, which is plain bytes; see `Block::new` and `Drop`.
unsafe impl Send for Block {}
// SAFETY: shared access to a block only ever reads its bytes (`Buffer::deref`); writing needs `&mut`.
unsafe impl Sync for Block {}

impl Block {
    fn new(capacity: usize) -> Self {
        let layout = Self::layout(capacity);
        let memory = if Self::is_mapped(capacity) {
            map(capacity)
        } else {
            // SAFETY: the layout's size is not zero, because `capacity_for` returns at least one page.
            NonNull::new(unsafe { alloc_zeroed(layout) })
        };
        match memory {
            Some(memory) => Self { memory, capacity },
            None => handle_alloc_error(layout),
        }
    }

    fn is_mapped(capacity: usize) -> bool {
        capacity >= MAPPED_BLOCK_BYTES
    }

    fn layout(capacity: usize) -> Layout {
        match Layout::from_size_align(capacity, BUFFER_ALIGN_BYTES) {
            Ok(layout) => layout,
            // Larger than the address space: what every allocation of that size would do.
            Err(_) => handle_alloc_error(Layout::new::<u8>()),
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if Self::is_mapped(self.capacity) {
            // SAFETY: `memory` came from `map` with this very length in `Block::new`, and is unmapped only here.
            // It can fail only where the kernel's bookkeeping is full, and then the pages stay ours, unused.
            let _result = unsafe { libc::munmap(self.memory.as_ptr().cast(), self.capacity) };
        } else {
            // SAFETY: `memory` came from `alloc_zeroed` with this very layout in `Block::new`, and is freed only here.
            unsafe { dealloc(self.memory.as_ptr(), Self::layout(self.capacity)) }
        }
    }
}

/// Zeroed private memory of `len` bytes straight from the kernel, whose pages are [`BUFFER_ALIGN_BYTES`] long or
/// longer; `None` where there is none.
fn map(len: usize) -> Option<NonNull<u8>> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use; its pages are zero,
    // hence initialised.
    let memory = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
    if memory == libc::MAP_FAILED { None } else { NonNull::new(memory.cast()) }
}

/// Bytes from a [`BufferPool`], at an address that is a multiple of [`BUFFER_ALIGN_BYTES`].
///
/// It is as long as was asked for. Its content is unspecified until written. Dropping it returns it to its pool.
pub struct Buffer {
    /// Always there, until `drop` hands it to the pool.
    block: Option<Block>,
    len: usize,
    reservation: Reservation,
}

impl Buffer {
    /// Keeps the first `len` bytes; does nothing where there are fewer.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Makes it shareable; the memory returns to the pool when the last of the [`Bytes`] is dropped.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.block {
            // SAFETY: the block holds at least `len` bytes (`BufferPool::buffer`; `truncate` only shrinks), all
            // initialised by `Block::new`, and `&self` keeps writers out.
            Some(block) => unsafe { std::slice::from_raw_parts(block.memory.as_ptr(), self.len) },
            None => &[],
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.block {
            // SAFETY: as in `deref`; `&mut self` makes this the only access.
            Some(block) => unsafe {
                std::slice::from_raw_parts_mut(block.memory.as_ptr(), self.len)
            },
            None => &mut [],
        }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.reservation.pool.keep(block);
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer").field("len", &self.len).finish_non_exhaustive()
    }
}

/// Whether every byte is zero; an empty slice is. Runs at the speed of memory: the inner loop has no branch, so that
/// the compiler makes vector instructions of it.
pub fn is_zero(bytes: &[u8]) -> bool {
    const STRIDE: usize = 128;
    let (strides, rest) = bytes.as_chunks::<STRIDE>();
    strides.iter().all(|stride| stride.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// The most bytes that [`zeros`] gives.
pub(crate) const ZEROS_BYTES: u64 = 1 << 20;

/// Up to [`ZEROS_BYTES`] zero bytes, aligned, from one piece of memory that all share.
pub(crate) fn zeros(len: u64) -> Bytes {
    static ZEROS: LazyLock<Bytes> = LazyLock::new(|| {
        let len = usize::try_from(ZEROS_BYTES).unwrap_or(BUFFER_ALIGN_BYTES);
        let mut buffer = BufferPool::new(len).get_now(len);
        buffer.fill(0);
        buffer.freeze()
    });
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    ZEROS.slice(..len.min(ZEROS.len()))
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn poll_once<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn a_buffer_is_aligned_and_as_long_as_asked() {
        let pool = BufferPool::new(1 << 20);
        for len in [0, 1, 511, 4096, 4097, 65_536, 1_000_001] {
            let mut buffer = pool.get_now(len);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.as_ptr() as usize % BUFFER_ALIGN_BYTES, 0);
            buffer.fill(0xA5);
            assert!(buffer.iter().all(|byte| *byte == 0xA5));
        }
        assert_eq!(pool.in_use_bytes(), 0);
    }

    #[test]
    fn an_exhausted_pool_serves_waiters_in_order() {
        let pool = BufferPool::new(8192);
        let first = pool.get_now(8192);
        let mut large = pin!(pool.get(8192));
        let mut small = pin!(pool.get(4096));
        assert!(poll_once(large.as_mut()).is_pending());
        assert!(poll_once(small.as_mut()).is_pending());
        assert!(pool.try_get(4096).is_none());
        drop(first);
        let Poll::Ready(second) = poll_once(large.as_mut()) else { panic!("the first waiter") };
        assert!(poll_once(small.as_mut()).is_pending(), "the second waiter passed the bound");
        drop(second);
        assert!(poll_once(small.as_mut()).is_ready());
        assert_eq!(pool.in_use_bytes(), 0);
    }

    #[test]
    fn a_dropped_waiter_blocks_nobody_and_loses_no_bytes() {
        let pool = BufferPool::new(8192);
        let first = pool.get_now(4096);
        let mut gone = Box::pin(pool.get(8192));
        let mut second = pin!(pool.get(4096));
        assert!(poll_once(gone.as_mut()).is_pending());
        assert!(poll_once(second.as_mut()).is_pending());
        drop(gone);
        assert!(poll_once(second.as_mut()).is_ready(), "there was room for it all the time");
        drop(first);
        assert_eq!(pool.in_use_bytes(), 0);

        let pool = BufferPool::new(4096);
        let first = pool.get_now(4096);
        let mut granted = Box::pin(pool.get(4096));
        assert!(poll_once(granted.as_mut()).is_pending());
        drop(first);
        assert_eq!(pool.in_use_bytes(), 4096, "the waiter has been granted its bytes");
        drop(granted);
        assert_eq!(pool.in_use_bytes(), 0);
    }

    #[test]
    fn a_request_larger_than_the_pool_is_served_alone() {
        let pool = BufferPool::new(4096);
        let mut large = pin!(pool.get(1 << 20));
        let Poll::Ready(buffer) = poll_once(large.as_mut()) else { panic!("nobody is in its way") };
        assert_eq!(buffer.len(), 1 << 20);
        assert!(pool.try_get(1).is_none());
    }

    #[test]
    fn frozen_bytes_return_to_the_pool_with_their_last_clone() {
        let pool = BufferPool::new(1 << 20);
        let mut buffer = pool.get_now(5000);
        buffer.fill(7);
        let address = buffer.as_ptr();
        let bytes = buffer.freeze();
        let tail = bytes.slice(4000..);
        drop(bytes);
        assert!(pool.in_use_bytes() > 0);
        assert_eq!(tail.len(), 1000);
        drop(tail);
        assert_eq!(pool.in_use_bytes(), 0);
        assert_eq!(pool.get_now(5000).as_ptr(), address, "memory is used again");
    }

    #[test]
    fn idle_memory_is_bounded_and_makes_room_for_the_sizes_in_use() {
        let pool = BufferPool::new(usize::MAX);
        let hoard: Vec<_> = (0..80).map(|_| pool.get_now(1 << 20)).collect();
        drop(hoard);
        assert_eq!(pool.idle_bytes(), RETAINED_POOL_BYTES);
        let other = pool.get_now(2 << 20);
        let address = other.as_ptr();
        drop(other);
        assert!(pool.idle_bytes() <= RETAINED_POOL_BYTES);
        assert_eq!(pool.get_now(2 << 20).as_ptr(), address);
    }

    #[test]
    fn large_memory_takes_up_pages_only_where_it_was_written() {
        let mut buffer = BufferPool::new(1 << 20).get_now(32 << 20);
        assert_eq!(resident_pages(&buffer), 0);
        buffer[5 << 20] = 1;
        // More than one where the kernel hands out huge pages.
        assert!((1..=512).contains(&resident_pages(&buffer)));
    }

    fn resident_pages(buffer: &Buffer) -> usize {
        let mut pages = vec![0; buffer.len() / BUFFER_ALIGN_BYTES];
        let address = buffer.as_ptr().cast_mut().cast();
        // SAFETY: the range is the buffer's own mapping, and there is a byte for each of its pages.
        let result = unsafe { libc::mincore(address, buffer.len(), pages.as_mut_ptr()) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        pages.iter().filter(|page| **page & 1 == 1).count()
    }

    #[test]
    fn one_set_bit_anywhere_is_not_zero() {
        assert!(is_zero(&[]));
        let mut bytes = vec![0_u8; 1000];
        assert!(is_zero(&bytes));
        for at in 0..bytes.len() {
            bytes[at] = 0x10;
            assert!(!is_zero(&bytes), "at {at}");
            bytes[at] = 0;
        }
    }
}
