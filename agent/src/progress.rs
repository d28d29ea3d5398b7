//! How far a disk is, counted by the parts of its pipeline, and told at a bounded rate. Decides nothing.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::{DiskId, Event, EventSender};

/// How often progress is told, at least, while there is some.
const INTERVAL: Duration = Duration::from_millis(200);

/// Progress by this part of the disk is told at once.
const STEPS: u64 = 100;

/// The counters of one disk, in bytes.
#[derive(Debug)]
pub(crate) struct Progress {
    disk: DiskId,
    total: u64,
    done: AtomicU64,
    read: AtomicU64,
    data_sent: AtomicU64,
    zero_sent: AtomicU64,
    last: Mutex<(Instant, u64)>,
    events: EventSender,
}

impl Progress {
    /// Counters of a disk of `total` bytes.
    pub(crate) fn new(disk: DiskId, total: u64, events: EventSender) -> Self {
        Self {
            disk,
            total,
            done: AtomicU64::new(0),
            read: AtomicU64::new(0),
            data_sent: AtomicU64::new(0),
            zero_sent: AtomicU64::new(0),
            last: Mutex::new((Instant::now(), 0)),
            events,
        }
    }

    /// Everything before `end` has been decided about.
    pub(crate) fn booked(&self, end: u64) {
        self.done.store(end, Relaxed);
    }

    /// So much was read.
    pub(crate) fn read(&self, bytes: u64) {
        self.read.fetch_add(bytes, Relaxed);
    }

    /// So much was written as data.
    pub(crate) fn data_sent(&self, bytes: u64) {
        self.data_sent.fetch_add(bytes, Relaxed);
    }

    /// So much was declared zero.
    pub(crate) fn zero_sent(&self, bytes: u64) {
        self.zero_sent.fetch_add(bytes, Relaxed);
    }

    /// Read, written as data, and declared zero so far.
    pub(crate) fn totals(&self) -> (u64, u64, u64) {
        (self.read.load(Relaxed), self.data_sent.load(Relaxed), self.zero_sent.load(Relaxed))
    }

    /// Tells how far the disk is, if it is time to.
    pub(crate) fn tell_if_due(&self) {
        let done = self.done.load(Relaxed);
        {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            let step = done.saturating_sub(last.1) >= (self.total / STEPS).max(1);
            if !step && last.0.elapsed() < INTERVAL {
                return;
            }
            *last = (Instant::now(), done);
        }
        self.events.tell_if_room(self.event(done));
    }

    /// Tells that the disk is through.
    pub(crate) fn tell_end(&self) {
        self.events.tell_if_room(self.event(self.total));
    }

    fn event(&self, bytes_done: u64) -> Event {
        let (read_bytes, data_bytes_sent, zero_bytes_sent) = self.totals();
        Event::Progress {
            disk_index: self.disk.index,
            disk_key: self.disk.key,
            bytes_done,
            bytes_total: self.total,
            read_bytes,
            data_bytes_sent,
            zero_bytes_sent,
        }
    }
}
