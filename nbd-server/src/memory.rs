//! The memory of a server for what its connections have in flight: bounded, and shared so that nobody can take it all.
//! What is held, and when it is let go of, is known to the connections.
//!
//! A connection that holds something may take more only as long as at least as much is left for others as it holds then.
//! So however greedy some are, one that holds nothing finds something; where that is too little, it is served before
//! those that hold some. A part of the memory is kept for connections that hold little: as long as they have not used it
//! up, such a request waits for nobody, however many stand in line for more. Besides, each connection has reserves that
//! nobody else can take, and does what it finds no memory for in parts that fit in there. Only clients that do not read
//! their replies hold memory for ever: where somebody finds none, those that have been at it for too long lose their
//! connections.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{Instant, sleep};

use crate::limits::Limits;
use crate::signal::Signal;

/// What each connection can hold besides, in bytes, one request or piece at a time, and once more for parts of one READ.
pub(crate) const RESERVE_BYTES: u32 = 64 << 10;

/// A connection that holds at most this in all, in bytes, holds little.
const LITTLE_BYTES: u64 = 1 << 20;

/// The part of the memory that is kept for those that hold little: one in so many.
const KEPT_PART: u64 = 4;

/// A client that reads less than this of its replies, in bytes, in the time that others wait for memory, is stuck.
const STUCK_BYTES: u64 = 256 << 10;

/// The memory of a server.
#[derive(Debug)]
pub(crate) struct Memory {
    limit: u64,
    /// How long somebody waits before those that are stuck have to go.
    patience: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    free: u64,
    /// What only those may take that hold little; of `free`, so much is left as they have not taken.
    kept: u64,
    /// What was taken by those that held little with it.
    little: u64,
    waiting: VecDeque<Waiter>,
    accounts: HashMap<u64, Weak<Account>>,
    next: u64,
}

#[derive(Debug)]
struct Waiter {
    account: Weak<Account>,
    bytes: u64,
    granted: oneshot::Sender<Share>,
}

/// What one connection holds.
#[derive(Debug)]
pub(crate) struct Account {
    id: u64,
    memory: Arc<Memory>,
    /// Changed under the lock of `memory` alone.
    held: AtomicU64,
    reserve: Arc<Semaphore>,
    /// For the one READ of the connection whose parts are on their way: another [`RESERVE_BYTES`], because parts must
    /// not wait for replies that stand behind them.
    parts: Arc<Semaphore>,
    reading: Mutex<Reading>,
    /// Raised where the connection has to go.
    pub(crate) evicted: Signal,
}

/// How the client of a connection gets on with its replies.
#[derive(Debug, Default)]
struct Reading {
    /// Since when it has some to take, or has taken [`STUCK_BYTES`].
    since: Option<Instant>,
    /// What it has taken since then, in bytes.
    taken: u64,
}

impl Reading {
    fn is_stuck(&self, patience: Duration) -> bool {
        self.since.is_some_and(|since| since.elapsed() >= patience)
    }
}

/// Memory that is held until this is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    account: Arc<Account>,
    bytes: u64,
    /// Whether the connection held little with it.
    little: bool,
    _reserve: Option<OwnedSemaphorePermit>,
}

impl Memory {
    pub(crate) fn new(limits: &Limits) -> Self {
        // The longest request fits in beside it, and the longest option.
        let longest = limits.max_payload_bytes.max(limits.option_bytes);
        let beside = limits.memory_bytes.saturating_sub(longest.into());
        let kept = beside.min(limits.memory_bytes / KEPT_PART);
        let state = State { free: limits.memory_bytes, kept, ..State::default() };
        Self {
            limit: limits.memory_bytes,
            patience: limits.payload_timeout,
            state: Mutex::new(state),
        }
    }

    /// How much is held, in bytes, reserves not included.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.limit - self.state.lock().free
    }

    /// For one more connection.
    pub(crate) fn account(self: &Arc<Self>) -> Arc<Account> {
        let mut state = self.state.lock();
        let id = state.next;
        state.next += 1;
        let account = Arc::new(Account {
            id,
            memory: Arc::clone(self),
            held: AtomicU64::new(0),
            reserve: Arc::new(Semaphore::new(1)),
            parts: Arc::new(Semaphore::new(1)),
            reading: Mutex::default(),
            evicted: Signal::default(),
        });
        state.accounts.insert(id, Arc::downgrade(&account));
        account
    }

    /// Ends the connections that hold memory and have been waiting for their clients to read for too long.
    fn evict(&self) {
        let accounts: Vec<_> = self.state.lock().accounts.values().cloned().collect();
        for account in accounts.iter().filter_map(Weak::upgrade) {
            let stuck = account.reading.lock().is_stuck(self.patience);
            if stuck && account.held.load(Ordering::Relaxed) > 0 {
                account.evicted.raise();
            }
        }
    }
}

impl State {
    /// What is left of what is kept. At least as much is always free: nobody else may take it.
    fn unused(&self) -> u64 {
        self.kept.saturating_sub(self.little)
    }

    /// Whether a connection that holds so much may take so much more whoever waits, from what is kept.
    fn entitles(&self, held: u64, bytes: u64) -> bool {
        is_little(held, bytes) && bytes <= self.unused()
    }

    /// Whether a connection that holds so much may take so much more once it is its turn.
    fn permits(&self, held: u64, bytes: u64) -> bool {
        let untouched = if is_little(held, bytes) { 0 } else { self.unused() };
        let Some(left) = self.free.checked_sub(untouched + bytes) else { return false };
        held == 0 || held + bytes <= left
    }

    /// Takes it. The lock is held around this and [`State::permits`].
    fn grant(&mut self, account: &Arc<Account>, bytes: u64) -> Share {
        let held = account.held.fetch_add(bytes, Ordering::Relaxed);
        let little = is_little(held, bytes);
        self.free -= bytes;
        self.little += if little { bytes } else { 0 };
        Share { account: Arc::clone(account), bytes, little, _reserve: None }
    }

    /// Hands out what came back, in the order of asking. Whoever holds nothing is overtaken only by what comes from what is
    /// kept, which is not for the rest anyway.
    fn settle(&mut self) -> Leftovers {
        let mut leftovers = Leftovers::default();
        let mut kept = VecDeque::with_capacity(self.waiting.len());
        let mut first_waits = false;
        while let Some(waiter) = self.waiting.pop_front() {
            if waiter.granted.is_closed() {
                continue;
            }
            let Some(account) = waiter.account.upgrade() else { continue };
            let held = account.held.load(Ordering::Relaxed);
            let turn = !first_waits && self.permits(held, waiter.bytes);
            if turn || self.entitles(held, waiter.bytes) {
                let share = self.grant(&account, waiter.bytes);
                leftovers.unclaimed.extend(waiter.granted.send(share).err());
            } else {
                first_waits |= held == 0;
                kept.push_back(waiter);
            }
            leftovers.accounts.push(account);
        }
        self.waiting = kept;
        leftovers
    }
}

/// Whether a connection that holds so much holds little with so much more, too.
fn is_little(held: u64, bytes: u64) -> bool {
    held.saturating_add(bytes) <= LITTLE_BYTES
}

/// What takes the lock when it is dropped, and so must outlive it.
#[derive(Default)]
struct Leftovers {
    /// Of those who gave up waiting meanwhile.
    unclaimed: Vec<Share>,
    accounts: Vec<Arc<Account>>,
}

impl Account {
    /// Takes memory at once: from what is kept, or where nobody waits and enough is left for others.
    pub(crate) fn try_take(self: &Arc<Self>, bytes: u64) -> Option<Share> {
        let mut state = self.memory.state.lock();
        let held = self.held.load(Ordering::Relaxed);
        let turn = state.waiting.is_empty() && state.permits(held, bytes);
        (turn || state.entitles(held, bytes)).then(|| state.grant(self, bytes))
    }

    /// Takes memory for a piece of at most [`RESERVE_BYTES`]; waits for nobody else, at most for an earlier such piece
    /// of this connection.
    pub(crate) async fn take_piece(self: &Arc<Self>, bytes: u64) -> Share {
        match self.try_take(bytes) {
            Some(share) => share,
            None => self.reserved().await,
        }
    }

    /// Takes memory for a request, and waits for it where it must.
    pub(crate) async fn take(self: &Arc<Self>, bytes: u64) -> Share {
        let bytes = bytes.min(self.memory.limit);
        if let Some(share) = self.try_take(bytes) {
            return share;
        }
        let (granted, mut share) = oneshot::channel();
        let leftovers = {
            let mut state = self.memory.state.lock();
            let account = Arc::downgrade(self);
            state.waiting.push_back(Waiter { account, bytes, granted });
            state.settle()
        };
        drop(leftovers);
        loop {
            self.memory.evict();
            tokio::select! {
                biased;
                granted = &mut share => return match granted {
                    Ok(share) => share,
                    // Never: who waits is not forgotten.
                    Err(_) => self.reserved().await,
                },
                share = self.reserved(), if bytes <= RESERVE_BYTES.into() => return share,
                () = sleep(self.memory.patience) => {}
            }
        }
    }

    /// Takes the reserve; waits for nobody but this connection.
    pub(crate) async fn reserved(self: &Arc<Self>) -> Share {
        // Nobody closes the semaphore.
        let reserve = Arc::clone(&self.reserve).acquire_owned().await.ok();
        Share { account: Arc::clone(self), bytes: 0, little: true, _reserve: reserve }
    }

    /// Takes the reserve for parts of a READ; waits for earlier such READs of this connection.
    pub(crate) async fn parts(&self) -> Option<OwnedSemaphorePermit> {
        // Nobody closes the semaphore.
        Arc::clone(&self.parts).acquire_owned().await.ok()
    }

    /// Replies are on their way, and the client has yet to take them.
    pub(crate) fn writes(&self) {
        *self.reading.lock() = Reading { since: Some(Instant::now()), taken: 0 };
    }

    /// The client took some of them.
    pub(crate) fn wrote(&self, bytes: usize) {
        let mut reading = self.reading.lock();
        reading.taken += bytes as u64;
        if reading.taken >= STUCK_BYTES {
            *reading = Reading { since: Some(Instant::now()), taken: 0 };
        }
    }

    /// The client took all of them.
    pub(crate) fn rests(&self) {
        *self.reading.lock() = Reading::default();
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.memory.state.lock().accounts.remove(&self.id);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        let leftovers = {
            let mut state = self.account.memory.state.lock();
            state.free += self.bytes;
            state.little -= if self.little { self.bytes } else { 0 };
            self.account.held.fetch_sub(self.bytes, Ordering::Relaxed);
            state.settle()
        };
        drop(leftovers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    const MIB: u64 = 1 << 20;

    fn memory(mib: u64) -> Arc<Memory> {
        let limits = Limits {
            memory_bytes: mib * MIB,
            payload_timeout: Duration::from_secs(30),
            ..Limits::default()
        };
        Arc::new(Memory::new(&limits))
    }

    #[test]
    fn a_greedy_connection_leaves_as_much_as_it_takes() {
        let memory = memory(64);
        let greedy: Vec<_> = (0..4).map(|_| memory.account()).collect();
        let mut shares = Vec::new();
        for account in &greedy {
            while let Some(share) = account.try_take(MIB) {
                shares.push(share);
            }
        }
        // About the half of what is not kept, a half of the rest, and so on; what each took first is of what is kept.
        let held: Vec<_> = greedy.iter().map(|one| one.held.load(Ordering::Relaxed)).collect();
        assert_eq!(held, [24 * MIB, 13 * MIB, 7 * MIB, 4 * MIB]);
        assert_eq!(memory.held_bytes(), 48 * MIB);
        assert!(memory.account().try_take(4 * MIB).is_some(), "somebody new finds something");
        drop(shares);
        assert_eq!(memory.held_bytes(), 0);
    }

    #[tokio::test]
    async fn who_holds_nothing_is_served_before_those_that_hold_some() {
        let memory = memory(8);
        let (greedy, first, second) = (memory.account(), memory.account(), memory.account());
        let (one, other) = (greedy.take(4 * MIB).await, first.take(2 * MIB).await);
        let mut more = Box::pin(greedy.take(2 * MIB));
        let mut fresh = Box::pin(second.take(4 * MIB));
        assert!(more.as_mut().now_or_never().is_none() && fresh.as_mut().now_or_never().is_none());
        assert!(first.try_take(MIB).is_none(), "nobody overtakes those who wait");
        drop(other);
        // What is free now is enough for whoever holds nothing, not for more.
        let fresh = fresh.now_or_never().unwrap();
        assert!(more.as_mut().now_or_never().is_none());
        drop(fresh);
        drop(one);
        let more = more.now_or_never().unwrap();
        assert_eq!(memory.held_bytes(), 2 * MIB);
        drop(more);
    }

    #[tokio::test]
    async fn little_is_there_at_once_however_many_stand_in_line_for_much() {
        for crowd in [18, 50, 100] {
            let memory = Arc::new(Memory::new(&Limits::default()));
            let limit = Limits::default().memory_bytes;
            let greedy: Vec<_> = (0..crowd).map(|_| memory.account()).collect();
            let (mut shares, mut line) = (Vec::new(), Vec::new());
            for account in &greedy {
                for _ in 0..2 {
                    let mut taking = Box::pin(account.take(32 * MIB));
                    match taking.as_mut().now_or_never() {
                        Some(share) => shares.push(share),
                        None => line.push(taking),
                    }
                }
            }
            assert!(!line.is_empty(), "nobody of {crowd} has to wait");
            let modest = memory.account();
            for bytes in [MIB, 128 << 10, 8192 * 24, 1] {
                assert!(modest.take(bytes).now_or_never().is_some(), "{bytes} behind {crowd}");
            }
            let mut held = Vec::new();
            for _ in 0..128 {
                let modest = memory.account();
                held.push(modest.take(MIB).now_or_never().unwrap());
            }
            assert!(memory.held_bytes() <= limit);
            // What others give back is for the line, and what is kept stays kept.
            shares.truncate(1);
            assert!(line.iter_mut().any(|one| one.as_mut().now_or_never().is_some()));
            assert!(memory.held_bytes() <= limit);
            assert!(modest.take(MIB).now_or_never().is_some());
        }
    }

    #[tokio::test]
    async fn many_that_hold_little_do_not_starve_one_that_wants_much() {
        let memory = memory(64);
        let little: Vec<_> = (0..64).map(|_| memory.account()).collect();
        let take = |account: &Arc<Account>| account.take(MIB).now_or_never();
        let mut shares: Vec<_> = little.iter().map(|one| take(one).unwrap()).collect();
        let wants = memory.account();
        let mut waiting = Box::pin(wants.take(32 * MIB));
        assert!(waiting.as_mut().now_or_never().is_none());
        // Each that is done wants more at once: it gets it while it is of what is kept.
        let mut granted = None;
        for account in &little {
            drop(shares.remove(0));
            granted = granted.or_else(|| waiting.as_mut().now_or_never());
            shares.extend(take(account));
        }
        assert!(granted.is_some());
        assert!(memory.held_bytes() <= 64 * MIB);
    }

    #[tokio::test]
    async fn one_who_gives_up_waiting_is_forgotten_and_gives_back_what_it_was_given() {
        let memory = memory(4);
        let (holder, waiter, other) = (memory.account(), memory.account(), memory.account());
        let held = holder.take(4 * MIB).await;
        let mut given_up = Box::pin(waiter.take(4 * MIB));
        assert!(given_up.as_mut().now_or_never().is_none());
        drop(held);
        drop(given_up);
        assert_eq!(memory.held_bytes(), 0);
        let held = holder.take(4 * MIB).await;
        let mut given_up = Box::pin(waiter.take(MIB));
        assert!(given_up.as_mut().now_or_never().is_none());
        drop(given_up);
        drop(waiter);
        drop(held);
        assert!(other.take(4 * MIB).now_or_never().is_some());
        assert_eq!(memory.state.lock().accounts.len(), 2);
    }

    #[tokio::test]
    async fn there_is_always_a_reserve_for_one_small_request_of_each_connection() {
        let memory = memory(4);
        let (holder, small) = (memory.account(), memory.account());
        let _held = holder.take(4 * MIB).await;
        let first = small.take(RESERVE_BYTES.into()).now_or_never().unwrap();
        assert!(small.take(512).now_or_never().is_none(), "one at a time");
        assert!(memory.account().take_piece(512).now_or_never().is_some());
        drop(first);
        assert!(small.take(512).now_or_never().is_some());
        assert_eq!(memory.held_bytes(), 4 * MIB);
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_read_has_to_go_once_somebody_waited_long_enough() {
        let (memory, begun) = (memory(4), Instant::now());
        let [stuck, slow, busy] = [(); 3].map(|()| memory.account());
        let held = [stuck.take(2 * MIB).await, slow.take(MIB).await, busy.take(MIB).await];
        stuck.writes();
        slow.writes();
        let waiter = memory.account();
        let mut waiting = Box::pin(waiter.take(2 * MIB));
        tokio::select! {
            _ = &mut waiting => panic!("there is none"),
            () = sleep(Duration::from_secs(29)) => {}
        }
        assert!(!stuck.evicted.is_raised());
        slow.wrote(300 << 10);
        tokio::select! {
            _ = &mut waiting => panic!("there is none"),
            () = stuck.evicted.raised() => {}
        }
        assert!(begun.elapsed() < Duration::from_secs(31), "on the clock that stands still");
        assert!(!slow.evicted.is_raised() && !busy.evicted.is_raised());
        drop(held);
        assert!(waiting.now_or_never().is_some());
    }
}
