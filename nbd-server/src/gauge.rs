//! Counting what is open, and waiting until nothing is. Limits on the count are kept by who opens.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// A number of open things.
#[derive(Debug, Default)]
pub(crate) struct Gauge {
    count: AtomicUsize,
    idle: Notify,
    refused: Notify,
}

/// One open thing; dropping it closes it.
#[derive(Debug)]
pub(crate) struct Held(Arc<Gauge>);

impl Gauge {
    /// How many are open.
    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Opens one.
    pub(crate) fn hold(self: &Arc<Self>) -> Held {
        self.count.fetch_add(1, Ordering::AcqRel);
        Held(Arc::clone(self))
    }

    /// Opens one where fewer than `limit` are open.
    pub(crate) fn try_hold(self: &Arc<Self>, limit: usize) -> Option<Held> {
        let below = |count| (count < limit).then_some(count + 1);
        if self.count.fetch_update(Ordering::AcqRel, Ordering::Acquire, below).is_err() {
            self.refuse();
            return None;
        }
        Some(Held(Arc::clone(self)))
    }

    /// Tells whoever is [`Self::refused`].
    pub(crate) fn refuse(&self) {
        self.refused.notify_waiters();
    }

    /// Waits until somebody finds no place.
    pub(crate) async fn refused(&self) {
        self.refused.notified().await;
    }

    /// Waits until none is open.
    pub(crate) async fn idle(&self) {
        loop {
            let mut notified = std::pin::pin!(self.idle.notified());
            // Registered before the count is read, so that no last drop is missed.
            notified.as_mut().enable();
            if self.count() == 0 {
                return;
            }
            notified.await;
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn idle_comes_with_the_last_drop() {
        let gauge = Arc::new(Gauge::default());
        gauge.idle().await;
        let (first, second) = (gauge.hold(), gauge.try_hold(2).unwrap());
        assert!(gauge.try_hold(2).is_none());
        let waiting = tokio::spawn({
            let gauge = Arc::clone(&gauge);
            async move { gauge.idle().await }
        });
        drop(first);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(second);
        waiting.await.unwrap();
        assert_eq!(gauge.count(), 0);
    }
}
