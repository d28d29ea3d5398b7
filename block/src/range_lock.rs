//! Locks on byte ranges, shared or exclusive, that can travel with an operation. Which ranges need locking, and at
//! what granularity, is the caller's business.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::ByteRange;

/// Locks on ranges of something. Clones are the same lock.
///
/// Fair: a request waits for every overlapping request that came before it, granted or not, unless both are shared.
/// Empty ranges conflict with nothing. Holding one guard while waiting for an overlapping one never ends.
#[derive(Clone, Default)]
pub struct RangeLock {
    state: Arc<Mutex<LockState>>,
}

#[derive(Default)]
struct LockState {
    held: BTreeMap<u64, Claim>,
    exclusive_held: usize,
    waiting: VecDeque<(Claim, oneshot::Sender<RangeGuard>)>,
    next_id: u64,
}

#[derive(Clone, Copy)]
struct Claim {
    range: ByteRange,
    exclusive: bool,
}

impl Claim {
    fn conflicts(self, other: Self) -> bool {
        (self.exclusive || other.exclusive) && self.range.overlaps(other.range)
    }
}

impl RangeLock {
    /// A lock that nobody holds.
    pub fn new() -> Self {
        Self::default()
    }

    /// Waits until nobody else has any part of `range`.
    pub async fn lock_exclusive(&self, range: ByteRange) -> RangeGuard {
        self.lock(Claim { range, exclusive: true }).await
    }

    /// Waits until nobody has any part of `range` exclusively.
    pub async fn lock_shared(&self, range: ByteRange) -> RangeGuard {
        self.lock(Claim { range, exclusive: false }).await
    }

    async fn lock(&self, claim: Claim) -> RangeGuard {
        let turn = {
            let mut state = self.state.lock();
            if state.is_free(claim) && !state.waiting.iter().any(|(w, _)| w.conflicts(claim)) {
                let id = state.hold(claim);
                return self.guard(id);
            }
            let (grant, turn) = oneshot::channel();
            state.waiting.push_back((claim, grant));
            turn
        };
        let mut leaving = Leaving(Some(self));
        let answer = turn.await;
        leaving.0 = None;
        match answer {
            Ok(guard) => guard,
            // Waiters are only ever taken out of the queue to be granted, and this one still listens.
            Err(_) => unreachable!("a waiter was forgotten while its lock lives"),
        }
    }

    fn guard(&self, id: u64) -> RangeGuard {
        RangeGuard { lock: self.clone(), id }
    }

    fn release(&self, id: u64) {
        self.state.lock().let_go(id);
        self.grant();
    }

    /// Gives everybody who waits, in order, what has become free.
    fn grant(&self) {
        let mut undeliverable = Vec::new();
        {
            let mut state = self.state.lock();
            if state.waiting.is_empty() {
                return;
            }
            let mut still_waiting: VecDeque<(Claim, oneshot::Sender<RangeGuard>)> = VecDeque::new();
            for (claim, grant) in std::mem::take(&mut state.waiting) {
                if grant.is_closed() {
                    continue;
                }
                if !state.is_free(claim) || still_waiting.iter().any(|(w, _)| w.conflicts(claim)) {
                    still_waiting.push_back((claim, grant));
                    continue;
                }
                let id = state.hold(claim);
                if let Err(back) = grant.send(self.guard(id)) {
                    undeliverable.push(back);
                }
            }
            state.waiting = still_waiting;
        }
        // Dropped without the lock, because each comes back here.
        drop(undeliverable);
    }
}

/// A place in the queue: whoever leaves it early may have been in somebody's way.
struct Leaving<'a>(Option<&'a RangeLock>);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        // What it waited with is dropped already, so that its place counts as left.
        if let Some(lock) = self.0 {
            lock.grant();
        }
    }
}

impl LockState {
    fn is_free(&self, claim: Claim) -> bool {
        if !claim.exclusive && self.exclusive_held == 0 {
            return true;
        }
        !self.held.values().any(|held| held.conflicts(claim))
    }

    fn hold(&mut self, claim: Claim) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.exclusive_held += usize::from(claim.exclusive);
        self.held.insert(id, claim);
        id
    }

    fn let_go(&mut self, id: u64) {
        if let Some(claim) = self.held.remove(&id) {
            self.exclusive_held -= usize::from(claim.exclusive);
        }
    }
}

impl fmt::Debug for RangeLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.lock();
        f.debug_struct("RangeLock")
            .field("held", &state.held.len())
            .field("waiting", &state.waiting.len())
            .finish()
    }
}

/// A locked range. Dropping it unlocks; it borrows nothing, so that it can be the hold of an operation.
#[derive(Debug)]
#[must_use = "dropping the guard unlocks the range"]
pub struct RangeGuard {
    lock: RangeLock,
    id: u64,
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        self.lock.release(self.id);
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::{Pin, pin};
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn poll_once<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    fn take<F: Future<Output = RangeGuard>>(future: Pin<&mut F>) -> RangeGuard {
        match poll_once(future) {
            Poll::Ready(guard) => guard,
            Poll::Pending => panic!("nothing is in the way of this lock"),
        }
    }

    const LOW: ByteRange = ByteRange::between(0, 100);
    const MIDDLE: ByteRange = ByteRange::between(50, 150);
    const HIGH: ByteRange = ByteRange::between(100, 200);

    #[test]
    fn shared_locks_share_and_exclusive_ones_do_not() {
        let lock = RangeLock::new();
        let one = take(pin!(lock.lock_shared(LOW)));
        let two = take(pin!(lock.lock_shared(MIDDLE)));
        let mut writer = pin!(lock.lock_exclusive(LOW));
        assert!(poll_once(writer.as_mut()).is_pending());
        let elsewhere = take(pin!(lock.lock_exclusive(ByteRange::between(150, 300))));
        drop(one);
        assert!(poll_once(writer.as_mut()).is_pending());
        drop(two);
        let writer = take(writer);
        assert!(poll_once(pin!(lock.lock_shared(MIDDLE))).is_pending());
        drop((writer, elsewhere));
        drop(take(pin!(lock.lock_exclusive(ByteRange::between(0, u64::MAX)))));
    }

    #[test]
    fn a_waiting_writer_is_not_overtaken_by_later_readers() {
        let lock = RangeLock::new();
        let reader = take(pin!(lock.lock_shared(LOW)));
        let mut writer = pin!(lock.lock_exclusive(MIDDLE));
        assert!(poll_once(writer.as_mut()).is_pending());
        let mut late = pin!(lock.lock_shared(HIGH));
        assert!(poll_once(late.as_mut()).is_pending());
        drop(reader);
        let writer = take(writer);
        assert!(poll_once(late.as_mut()).is_pending());
        drop(writer);
        drop(take(late));
    }

    #[test]
    fn a_waiter_that_gave_up_is_in_nobodys_way() {
        let lock = RangeLock::new();
        let holder = take(pin!(lock.lock_shared(LOW)));
        let mut gone = Box::pin(lock.lock_exclusive(LOW));
        assert!(poll_once(gone.as_mut()).is_pending());
        let mut late = pin!(lock.lock_shared(LOW));
        assert!(poll_once(late.as_mut()).is_pending());
        drop(gone);
        drop(take(late));
        drop(holder);

        let holder = take(pin!(lock.lock_shared(LOW)));
        let mut granted = Box::pin(lock.lock_exclusive(LOW));
        assert!(poll_once(granted.as_mut()).is_pending());
        drop(holder);
        drop(granted); // Granted, but never looked at.
        drop(take(pin!(lock.lock_exclusive(LOW))));
    }
}
