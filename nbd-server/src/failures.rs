//! Failures to accept connections: they come often, for instance while no file descriptor is left, and are told seldom.
//! What is accepted, and for what, is not known here.

use std::io;
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// How long accepting rests after it failed.
const PAUSE: Duration = Duration::from_millis(100);
/// How far apart failures are told at least.
const TELL_PAUSE: Duration = Duration::from_secs(1);

/// The failures of one listener.
#[derive(Debug)]
pub(crate) struct Failures {
    /// What fails.
    what: &'static str,
    told: Option<Instant>,
    untold: u64,
}

impl Failures {
    /// None so far.
    pub(crate) fn of(what: &'static str) -> Self {
        Self { what, told: None, untold: 0 }
    }

    /// Tells of one more, unless others were told just now, and waits a little before the next attempt.
    pub(crate) async fn rest(&mut self, error: &io::Error) {
        if let Some(failures) = self.add(Instant::now()) {
            tracing::warn!(%error, failures, "{}", self.what);
        }
        sleep(PAUSE).await;
    }

    /// One more, now; where it is to be told, how many there were since the last that was.
    fn add(&mut self, now: Instant) -> Option<u64> {
        self.untold += 1;
        let is_fresh = |told: Instant| now.saturating_duration_since(told) < TELL_PAUSE;
        if self.told.is_some_and(is_fresh) {
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_told_once_a_second_at_most_and_counted() {
        let (mut failures, begin) = (Failures::of("x"), Instant::now());
        let told = |tenths: u32| failures.add(begin + PAUSE * tenths);
        let told: Vec<u64> = (0..=25).filter_map(told).collect();
        assert_eq!(told, [1, 10, 10]);
    }
}
