//! How far the reading side of a connection is, for who watches from beside it. What is read is not known here.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::yield_now;
use tokio::time::sleep;

/// Counts the steps between waiting for a request and having one; while it waits, the number is odd.
#[derive(Debug, Default)]
pub(crate) struct Pace(AtomicU64);

impl Pace {
    /// Waits for a request by `next`.
    pub(crate) async fn wait<T>(&self, next: impl Future<Output = T>) -> T {
        self.0.fetch_add(1, Ordering::Relaxed);
        let next = next.await;
        self.0.fetch_add(1, Ordering::Relaxed);
        next
    }

    /// Waits until one and the same request was waited for, for `limit` at least. Time in which requests are worked on
    /// does not count.
    pub(crate) async fn rests(&self, limit: Duration) {
        loop {
            let seen = self.0.load(Ordering::Relaxed);
            sleep(limit).await;
            // What has come meanwhile, and could not be taken yet, counts.
            yield_now().await;
            if seen % 2 == 1 && self.0.load(Ordering::Relaxed) == seen {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_a_wait_for_one_request_is_rest() {
        const LIMIT: Duration = Duration::from_secs(1);
        let pace = Pace::default();
        let busy = async {
            for _ in 0..10 {
                pace.wait(sleep(LIMIT / 2)).await;
                sleep(LIMIT * 3).await;
            }
        };
        tokio::select! {
            () = pace.rests(LIMIT) => panic!("it never waited for so long"),
            () = busy => {}
        }
        tokio::select! {
            () = pace.rests(LIMIT) => {}
            () = pace.wait(std::future::pending()) => {}
        }
    }
}
