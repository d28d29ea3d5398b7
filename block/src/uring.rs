//! The io_uring engine: rings on threads of their own, fed through mailboxes, so that callers need no certain runtime.
//! Operations other than reading, writing and syncing are left to the thread pool.

use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, Probe, opcode, squeue};
use parking_lot::Mutex;
use rustix::event::EventfdFlags;
use rustix::io::Errno;
use tokio::sync::Semaphore;

use crate::CopySource;
use crate::blocking::BlockingEngine;
use crate::copy::Origin;
use crate::descriptor::Descriptor;
use crate::storage::{Finish, Op, Outcome, Request, Storage, StorageFacts};

/// The most rings, each with its thread; fewer where the machine has fewer processors.
pub const URING_THREADS: usize = 2;
/// The most operations that one ring has in the kernel; more wait in its backlog.
const RING_ENTRIES: u32 = 256;
/// The most bytes of one submission; longer operations are continued.
const SUBMISSION_BYTES: usize = 1 << 30;
/// What the completion of the mailbox's own read is marked with; operations are marked with their place.
const WAKE: u64 = u64::MAX;

/// Rings on their own threads. The threads end, when nothing is in flight, after the last owner is gone.
#[derive(Debug)]
pub(crate) struct UringEngine {
    mailboxes: Vec<Arc<Mailbox>>,
    next: AtomicUsize,
}

impl UringEngine {
    /// Sets rings up, or says why the machine does not want them.
    pub(crate) fn new(threads: usize, pool: &Arc<BlockingEngine>) -> io::Result<Self> {
        let mut engine = Self { mailboxes: Vec::new(), next: AtomicUsize::new(0) };
        for index in 0..threads.max(1) {
            let mailbox = Arc::new(Mailbox::new()?);
            let (ready, set_up) = mpsc::channel();
            let (owned, pool) = (Arc::clone(&mailbox), Arc::clone(pool));
            thread::Builder::new().name(format!("block-uring-{index}")).spawn(move || {
                // On this thread, because a ring with a single issuer belongs to the thread that makes it.
                match Ring::new(owned, pool) {
                    Ok(ring) => {
                        let _gone = ready.send(Ok(()));
                        ring.work();
                    }
                    Err(error) => {
                        let _gone = ready.send(Err(error));
                    }
                }
            })?;
            set_up.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))?;
            engine.mailboxes.push(mailbox);
        }
        Ok(engine)
    }

    /// Puts a file on one of the rings.
    pub(crate) fn attach(
        self: &Arc<Self>,
        descriptor: Descriptor,
        pool: &Arc<BlockingEngine>,
    ) -> Arc<dyn Storage> {
        let index = self.next.fetch_add(1, Ordering::Relaxed) % self.mailboxes.len();
        Arc::new(UringStorage {
            mailbox: Arc::clone(&self.mailboxes[index]),
            descriptor: Arc::new(descriptor),
            pool: Arc::clone(pool),
            _engine: Arc::clone(self),
        })
    }
}

impl Drop for UringEngine {
    fn drop(&mut self) {
        for mailbox in &self.mailboxes {
            mailbox.state.lock().stop = true;
            mailbox.wake();
        }
    }
}

struct UringStorage {
    mailbox: Arc<Mailbox>,
    descriptor: Arc<Descriptor>,
    pool: Arc<BlockingEngine>,
    /// Its rings go on while it lives.
    _engine: Arc<UringEngine>,
}

impl Storage for UringStorage {
    fn submit(&self, request: Request) {
        let rest = match request.op {
            Op::Read { .. } | Op::Write { .. } | Op::Sync => {
                let (op, finish) = request.into_parts();
                let descriptor = Arc::clone(&self.descriptor);
                self.mailbox.post(Flight { op, finish, descriptor, done: 0 })
            }
            _ => Some(request),
        };
        if let Some(request) = rest {
            self.pool.submit(Arc::clone(&self.descriptor), request);
        }
    }

    fn facts(&self) -> StorageFacts {
        self.descriptor.facts
    }

    fn len(&self) -> io::Result<u64> {
        self.descriptor.len()
    }

    fn slots(&self) -> &Arc<Semaphore> {
        self.pool.slots()
    }

    fn copy_source(&self) -> Option<CopySource> {
        Some(CopySource(Origin::File(Arc::clone(&self.descriptor))))
    }
}

/// An operation with everything the kernel touches: from here until its completion nobody else owns the buffer.
struct Flight {
    op: Op,
    finish: Finish,
    descriptor: Arc<Descriptor>,
    /// How many bytes are done.
    done: usize,
}

/// Where other threads leave work for a ring.
#[derive(Debug)]
struct Mailbox {
    state: Mutex<Mail>,
    wake: OwnedFd,
}

#[derive(Default)]
struct Mail {
    posted: Vec<Flight>,
    /// The ring waits for completions, of which one must be our wake-up.
    sleeping: bool,
    stop: bool,
    /// The ring has failed; its thread is gone.
    dead: bool,
}

impl std::fmt::Debug for Mail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mail")
            .field("posted", &self.posted.len())
            .field("sleeping", &self.sleeping)
            .field("dead", &self.dead)
            .finish_non_exhaustive()
    }
}

impl Mailbox {
    fn new() -> io::Result<Self> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(Self { state: Mutex::default(), wake })
    }

    /// Leaves an operation for the ring, or hands it back if the ring is no more.
    fn post(&self, flight: Flight) -> Option<Request> {
        let asleep = {
            let mut mail = self.state.lock();
            if mail.dead {
                return Some(Request::from_parts(flight.op, flight.finish));
            }
            mail.posted.push(flight);
            std::mem::take(&mut mail.sleeping)
        };
        if asleep {
            self.wake();
        }
        None
    }

    fn wake(&self) {
        // It can only fail if the counter is full: then the ring has 2^64 reasons to wake up.
        let _full = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

/// One ring, on the thread that made it.
struct Ring {
    ring: IoUring,
    mailbox: Arc<Mailbox>,
    pool: Arc<BlockingEngine>,
    /// What the kernel works on, by place. Leaked if this thread ever unwinds: the kernel would not know.
    in_flight: ManuallyDrop<Vec<Option<Flight>>>,
    free: Vec<usize>,
    backlog: VecDeque<Flight>,
    /// Where the kernel puts the mailbox's counter; leaked likewise.
    wake_count: ManuallyDrop<Box<[u8; 8]>>,
    wake_armed: bool,
}

/// What to do next with an operation that the kernel has answered.
enum Next {
    Complete(io::Result<()>),
    Continue,
    UsePool,
}

impl Ring {
    fn new(mailbox: Arc<Mailbox>, pool: Arc<BlockingEngine>) -> io::Result<Self> {
        let ring = build_ring()?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [opcode::Read::CODE, opcode::Write::CODE, opcode::Fsync::CODE];
        if !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let places = usize::try_from(RING_ENTRIES).unwrap_or(1);
        Ok(Self {
            ring,
            mailbox,
            pool,
            in_flight: ManuallyDrop::new((0..places).map(|_| None).collect()),
            free: (0..places).collect(),
            backlog: VecDeque::new(),
            wake_count: ManuallyDrop::new(Box::default()),
            wake_armed: false,
        })
    }

    fn work(mut self) {
        loop {
            self.arm_wake();
            let Some(sleep) = self.collect() else {
                // Nothing is in flight any more, not even the wake-up: what was kept from dropping may go.
                ManuallyDrop::into_inner(self.in_flight);
                ManuallyDrop::into_inner(self.wake_count);
                return;
            };
            self.fill();
            let result = self.ring.submit_and_wait(usize::from(sleep));
            self.reap();
            match result.map_err(|error| error.raw_os_error().map(Errno::from_raw_os_error)) {
                Ok(_) | Err(Some(Errno::INTR | Errno::AGAIN | Errno::BUSY | Errno::NOMEM)) => {}
                Err(error) => return self.give_up(error),
            }
        }
    }

    /// Takes what was posted; tells whether to wait for completions, or `None` when all is done for ever.
    fn collect(&mut self) -> Option<bool> {
        let mut mail = self.mailbox.state.lock();
        let idle = self.free.len() == self.in_flight.len() && self.backlog.is_empty();
        if mail.stop && idle && mail.posted.is_empty() && !self.wake_armed {
            mail.dead = true;
            return None;
        }
        mail.sleeping = mail.posted.is_empty();
        self.backlog.extend(mail.posted.drain(..));
        Some(mail.sleeping || self.free.is_empty())
    }

    /// Makes sure that a posted operation ends our sleep.
    fn arm_wake(&mut self) {
        if self.wake_armed || self.mailbox.state.lock().stop {
            return;
        }
        let fd = Fd(self.mailbox.wake.as_raw_fd());
        let entry = opcode::Read::new(fd, self.wake_count.as_mut_ptr(), 8).build().user_data(WAKE);
        // SAFETY: `wake_count` and the mailbox with its descriptor belong to `self`, which lives until the read has
        // completed (`collect` ends the work only then) or is leaked.
        self.wake_armed = unsafe { self.ring.submission().push(&entry) }.is_ok();
    }

    /// Moves operations from the backlog into the ring, as many as there are places.
    fn fill(&mut self) {
        while let Some(flight) = self.backlog.pop_front() {
            let Some(place) = self.free.pop() else {
                self.backlog.push_front(flight);
                return;
            };
            let flight = self.in_flight[place].insert(flight);
            let entry = flight.entry().user_data(place as u64);
            // SAFETY: `entry` points into the buffer of `flight`, whose memory does not move with it, and names its
            // descriptor. The flight stays in `in_flight` until the CQE with this place (`reap`), even if this thread
            // unwinds (`ManuallyDrop`).
            if unsafe { self.ring.submission().push(&entry) }.is_err() {
                // The submission queue is full: nothing was handed over, so the flight may go back.
                self.backlog.extend(self.in_flight[place].take());
                self.free.push(place);
                return;
            }
        }
    }

    fn reap(&mut self) {
        // Taken one by one, because completing needs the rest of `self`.
        while let Some(entry) = { self.ring.completion().next() } {
            if entry.user_data() == WAKE {
                self.wake_armed = false;
                continue;
            }
            let place = usize::try_from(entry.user_data()).ok();
            let slot = place.and_then(|place| self.in_flight.get_mut(place).map(|s| (place, s)));
            let Some((place, Some(mut flight))) = slot.map(|(place, s)| (place, s.take())) else {
                tracing::error!(mark = entry.user_data(), "a completion of no operation");
                continue;
            };
            self.free.push(place);
            match flight.advance(entry.result()) {
                Next::Complete(result) => flight.complete(result),
                Next::Continue => self.backlog.push_front(flight),
                Next::UsePool => {
                    let request = Request::from_parts(flight.op, flight.finish);
                    self.pool.submit(flight.descriptor, request);
                }
            }
        }
    }

    /// The ring is broken in a way that nothing here can repair. What was not handed over goes to the pool; what the
    /// kernel may still work on is answered with an error, and its memory and locks are kept for ever.
    fn give_up(mut self, error: Option<Errno>) {
        tracing::error!(?error, "an io_uring has failed; the thread pool takes over");
        let posted = {
            let mut mail = self.mailbox.state.lock();
            mail.dead = true;
            std::mem::take(&mut mail.posted)
        };
        for flight in self.backlog.drain(..).chain(posted) {
            self.pool.submit(flight.descriptor, Request::from_parts(flight.op, flight.finish));
        }
        for flight in self.in_flight.iter_mut().filter_map(Option::take) {
            std::mem::forget((flight.op, flight.descriptor));
            flight.finish.abandon(io::ErrorKind::Other.into());
        }
    }
}

/// A ring with as many of the flags that save interrupts as this kernel has.
fn build_ring() -> io::Result<IoUring> {
    let mut modern = IoUring::builder();
    modern.setup_single_issuer().setup_coop_taskrun().setup_taskrun_flag().setup_defer_taskrun();
    let mut older = IoUring::builder();
    older.setup_coop_taskrun().setup_taskrun_flag();
    let plain = IoUring::builder();
    let entries = RING_ENTRIES * 2; // All operations at once, and the wake-up.
    modern.build(entries).or_else(|_| older.build(entries)).or_else(|_| plain.build(entries))
}

impl Flight {
    /// The next submission for what is left to do.
    fn entry(&mut self) -> squeue::Entry {
        let fd = Fd(self.descriptor.file.as_raw_fd());
        match &mut self.op {
            Op::Read { at, buffer } => {
                let offset = *at + self.done as u64;
                let rest = buffer.get_mut(self.done..).unwrap_or_default();
                opcode::Read::new(fd, rest.as_mut_ptr(), clamp(rest.len())).offset(offset).build()
            }
            Op::Write { at, data } => {
                let offset = *at + self.done as u64;
                let rest = data.get(self.done..).unwrap_or_default();
                opcode::Write::new(fd, rest.as_ptr(), clamp(rest.len())).offset(offset).build()
            }
            // Only syncs are left: `UringStorage::submit` lets nothing else in.
            _ => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        }
    }

    /// Takes the kernel's answer in.
    fn advance(&mut self, result: i32) -> Next {
        let Ok(moved) = usize::try_from(result) else {
            let errno = Errno::from_raw_os_error(result.saturating_neg());
            return match errno {
                Errno::INTR => Next::Continue,
                Errno::AGAIN => Next::UsePool,
                _ => Next::Complete(Err(errno.into())),
            };
        };
        match &mut self.op {
            Op::Read { at, buffer } => {
                self.done = (self.done + moved).min(buffer.len());
                let rest = buffer.get_mut(self.done..).unwrap_or_default();
                if !rest.is_empty() && !self.descriptor.is_end(moved, *at + self.done as u64) {
                    return Next::Continue;
                }
                rest.fill(0);
            }
            Op::Write { data, .. } => {
                self.done += moved;
                if moved == 0 && self.done < data.len() {
                    return Next::Complete(Err(io::ErrorKind::WriteZero.into()));
                }
                if self.done < data.len() {
                    return Next::Continue;
                }
            }
            _ => {}
        }
        Next::Complete(Ok(()))
    }

    fn complete(self, result: io::Result<()>) {
        let outcome = match self.op {
            Op::Read { buffer, .. } => Outcome::Read(buffer),
            _ => Outcome::Done,
        };
        // The file first: whoever hears of the completion may want it closed.
        drop(self.descriptor);
        self.finish.complete(result.map(|()| outcome));
    }
}

fn clamp(len: usize) -> u32 {
    u32::try_from(len.min(SUBMISSION_BYTES)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{BufferPool, OpenOptions};

    /// An operation on a direct file of unknown content, of which the kernel's answers are invented.
    fn flight(op: Op) -> Flight {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let options = OpenOptions { lock: false, ..OpenOptions::writing() };
        let mut descriptor = Descriptor::open(None, file.path(), &options).expect("open");
        descriptor.facts.offset_align = 512;
        let (op, finish) = Request::new(op, None).0.into_parts();
        Flight { op, finish, descriptor: Arc::new(descriptor), done: 0 }
    }

    fn read() -> Flight {
        let mut buffer = BufferPool::shared().get_now(4096);
        buffer.fill(7);
        flight(Op::Read { at: 8192, buffer })
    }

    fn bytes(flight: &Flight) -> &[u8] {
        match &flight.op {
            Op::Read { buffer, .. } => buffer,
            _ => &[],
        }
    }

    #[test]
    fn a_short_read_goes_on_until_the_end_of_the_file() {
        let mut flight = read();
        assert!(matches!(flight.advance(512), Next::Continue));
        assert!(matches!(flight.advance(1024), Next::Continue));
        assert!(matches!(flight.advance(0), Next::Complete(Ok(()))));
        assert!(bytes(&flight)[..1536].iter().all(|byte| *byte == 7));
        assert!(crate::is_zero(&bytes(&flight)[1536..]));
    }

    #[test]
    fn a_direct_read_that_ends_off_the_alignment_met_the_end() {
        let mut flight = read();
        assert!(matches!(flight.advance(700), Next::Complete(Ok(()))));
        assert!(crate::is_zero(&bytes(&flight)[700..]));
        assert_eq!(bytes(&flight)[699], 7);
    }

    #[test]
    fn a_short_write_goes_on_and_one_of_nothing_fails() {
        let mut flight = flight(Op::Write { at: 0, data: Bytes::from_static(&[1; 1024]) });
        assert!(matches!(flight.advance(512), Next::Continue));
        assert_eq!(flight.done, 512);
        let Next::Complete(Err(error)) = flight.advance(0) else { panic!("it would never end") };
        assert_eq!(error.kind(), io::ErrorKind::WriteZero);
        assert!(matches!(flight.advance(512), Next::Complete(Ok(()))));
    }

    #[test]
    fn interruptions_are_repeated_and_other_errors_are_told() {
        let mut flight = read();
        assert!(matches!(flight.advance(-Errno::INTR.raw_os_error()), Next::Continue));
        assert!(matches!(flight.advance(-Errno::AGAIN.raw_os_error()), Next::UsePool));
        let Next::Complete(Err(error)) = flight.advance(-Errno::NOSPC.raw_os_error()) else {
            panic!("an error is final")
        };
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
}
