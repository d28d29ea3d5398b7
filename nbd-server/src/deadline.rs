//! The moment by which something must be over. How long that is, and what comes after it, is decided by who waits.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

/// A moment that comes, or never does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline(Option<Instant>);

impl Deadline {
    /// The moment when `limit` has passed from now on; never, where that is beyond what the clock can tell.
    pub(crate) fn after(limit: Duration) -> Self {
        Self(Instant::now().checked_add(limit))
    }

    /// The outcome of `part`; `None` where it is not over in time.
    pub(crate) async fn within<T>(self, part: impl Future<Output = T>) -> Option<T> {
        match self.0 {
            Some(moment) => timeout_at(moment, part).await.ok(),
            None => Some(part.await),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_limit_beyond_the_clock_never_ends() {
        let nap = || tokio::time::sleep(Duration::from_secs(3600));
        assert_eq!(Deadline::after(Duration::MAX).within(nap()).await, Some(()));
        assert_eq!(Deadline::after(Duration::from_secs(60)).within(nap()).await, None);
        assert_eq!(Deadline::after(Duration::ZERO).within(nap()).await, None);
    }
}
