//! How far a job is, in memory: counters that agents raise and that requests read. What remains after the job is in the
//! database.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::api::ProgressView;

/// How far back the rate looks.
const RATE_WINDOW: Duration = Duration::from_secs(5);

/// How close together its samples are at most.
const SAMPLE_EVERY: Duration = Duration::from_millis(200);

/// How far one disk is, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DiskProgress {
    /// Decided about, holes included.
    pub(crate) done: u64,
    /// The size of the disk.
    pub(crate) total: u64,
    /// Read from the source.
    pub(crate) read: u64,
    /// Sent as data.
    pub(crate) sent: u64,
}

/// How far a job is.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    disks: BTreeMap<u32, DiskProgress>,
    samples: VecDeque<(Instant, u64)>,
}

impl Progress {
    /// Sets how far a disk is.
    pub(crate) fn set(&self, index: u32, progress: DiskProgress, now: Instant) {
        let mut inner = self.inner.lock();
        inner.disks.insert(index, progress);
        inner.sample(now);
    }

    /// Raises how far a disk is to what the hub has seen itself, where the agent's last word is older.
    pub(crate) fn raise(&self, index: u32, done: u64, sent: u64, now: Instant) {
        let mut inner = self.inner.lock();
        let Some(disk) = inner.disks.get_mut(&index) else { return };
        disk.done = disk.done.max(done.min(disk.total));
        disk.sent = disk.sent.max(sent);
        inner.sample(now);
    }

    /// The sum over all disks, with the rate.
    pub(crate) fn view(&self, now: Instant) -> ProgressView {
        let inner = self.inner.lock();
        let all = inner.sum();
        ProgressView::new(all.done, all.total, all.sent, inner.rate(now))
    }

    /// The sum over all disks.
    pub(crate) fn sum(&self) -> DiskProgress {
        self.inner.lock().sum()
    }

    /// How far one disk is.
    pub(crate) fn disk(&self, index: u32) -> Option<DiskProgress> {
        self.inner.lock().disks.get(&index).copied()
    }
}

impl Inner {
    fn sum(&self) -> DiskProgress {
        self.disks.values().fold(DiskProgress::default(), |sum, disk| DiskProgress {
            done: sum.done.saturating_add(disk.done),
            total: sum.total.saturating_add(disk.total),
            read: sum.read.saturating_add(disk.read),
            sent: sum.sent.saturating_add(disk.sent),
        })
    }

    fn sample(&mut self, now: Instant) {
        let close = |last: &(Instant, u64)| now.saturating_duration_since(last.0) < SAMPLE_EVERY;
        if self.samples.back().is_some_and(close) {
            return;
        }
        let done = self.sum().done;
        self.samples.push_back((now, done));
        while self.samples.len() > 2
            && self
                .samples
                .front()
                .is_some_and(|first| now.saturating_duration_since(first.0) > RATE_WINDOW)
        {
            self.samples.pop_front();
        }
    }

    /// Bytes a second since the oldest sample.
    fn rate(&self, now: Instant) -> u64 {
        let Some((since, before)) = self.samples.front() else { return 0 };
        let millis = now.saturating_duration_since(*since).as_millis().max(1);
        let bytes = u128::from(self.sum().done.saturating_sub(*before));
        u64::try_from(bytes * 1000 / millis).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let progress = Progress::default();
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let disk = |done| DiskProgress { done, total: 10_000, read: done, sent: done };
        progress.set(0, disk(0), begin);
        progress.set(1, disk(0), begin);
        progress.set(0, disk(1000), at(1));
        assert_eq!(progress.view(at(1)).bytes_per_second, 1000);
        for second in 2..=20 {
            progress.set(0, disk(1000 + second * 100), at(second));
        }
        assert_eq!(progress.view(at(20)).bytes_per_second, 100);
        assert_eq!(progress.view(at(20)).bytes_total, 20_000);
        assert_eq!(progress.disk(0).map(|disk| disk.done), Some(3000));
    }
}
