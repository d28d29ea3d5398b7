//! A limit on the rate of a copy. It spreads what is read evenly, and needs no runtime: a thread of its own waits.

use std::num::NonZeroU64;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

/// Hands out moments at which reads may begin.
pub(super) struct Pace {
    schedule: Schedule,
    start: Instant,
    alarms: Option<mpsc::Sender<(Instant, oneshot::Sender<()>)>>,
}

/// The moment at which a read may begin.
pub(super) struct Due(oneshot::Receiver<()>);

impl Due {
    /// Waits for it.
    pub(super) async fn wait(self) {
        // Without the thread there is no limit.
        let _rung = self.0.await;
    }
}

impl Pace {
    /// At most so many bytes in a second.
    pub(super) fn new(bytes_per_sec: NonZeroU64) -> Self {
        let (alarms, due) = mpsc::channel::<(Instant, oneshot::Sender<()>)>();
        let ring = move || {
            // They come in the order of their moments.
            for (moment, bell) in due {
                thread::sleep(moment.saturating_duration_since(Instant::now()));
                // Who waited may be gone.
                let _gone = bell.send(());
            }
        };
        let started = thread::Builder::new().name("convert-pace".to_owned()).spawn(ring);
        if let Err(error) = &started {
            tracing::warn!(%error, "cannot start a thread to limit the rate");
        }
        let schedule = Schedule { bytes_per_sec, granted_bytes: 0 };
        Self { schedule, start: Instant::now(), alarms: started.is_ok().then_some(alarms) }
    }

    /// When the next `bytes` may be read.
    pub(super) fn due(&mut self, bytes: u64) -> Due {
        let (bell, due) = oneshot::channel();
        let moment = self.start.checked_add(self.schedule.after(bytes));
        if let (Some(alarms), Some(moment)) = (&self.alarms, moment) {
            // The thread lives as long as this.
            let _sent = alarms.send((moment, bell));
        }
        Due(due)
    }
}

/// Which byte is due when, from the beginning.
struct Schedule {
    bytes_per_sec: NonZeroU64,
    granted_bytes: u64,
}

impl Schedule {
    /// When the next `bytes` may be read: when all before them have had their time.
    fn after(&mut self, bytes: u64) -> Duration {
        let rate = self.bytes_per_sec.get();
        let (secs, rest) = (self.granted_bytes / rate, self.granted_bytes % rate);
        self.granted_bytes = self.granted_bytes.saturating_add(bytes);
        let nanos = u128::from(rest) * 1_000_000_000 / u128::from(rate);
        Duration::new(secs, u32::try_from(nanos).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(bytes_per_sec: u64) -> NonZeroU64 {
        NonZeroU64::new(bytes_per_sec).expect("a rate")
    }

    #[test]
    fn bytes_are_due_when_those_before_have_had_their_time() {
        let mut schedule = Schedule { bytes_per_sec: rate(1000), granted_bytes: 0 };
        assert_eq!(schedule.after(500), Duration::ZERO);
        assert_eq!(schedule.after(2000), Duration::from_millis(500));
        assert_eq!(schedule.after(u64::MAX), Duration::from_millis(2500));
        let mut slow = Schedule { bytes_per_sec: rate(1), granted_bytes: u64::MAX };
        assert_eq!(slow.after(1).as_secs(), u64::MAX);
        let mut fast = Schedule { bytes_per_sec: rate(u64::MAX), granted_bytes: u64::MAX - 1 };
        assert!(fast.after(1) < Duration::from_secs(1));
    }

    #[tokio::test]
    async fn whoever_is_due_goes_on() {
        let mut pace = Pace::new(rate(1 << 40));
        for due in [pace.due(1 << 20), pace.due(1 << 20)] {
            due.wait().await;
        }
    }
}
