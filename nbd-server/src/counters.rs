//! Counting what is done, for an export and for a connection, while it is done and without locks. Who asks for the
//! numbers is not known here.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::reply::Answer;
use crate::request::Command;
use crate::wire::command;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RequestKind {
    /// READ.
    Read,
    /// WRITE.
    Write,
    /// FLUSH.
    Flush,
    /// TRIM.
    Trim,
    /// CACHE.
    Cache,
    /// WRITE_ZEROES.
    WriteZeroes,
    /// BLOCK_STATUS.
    BlockStatus,
    /// Something that is not known.
    Other,
}

impl RequestKind {
    /// Every kind.
    pub const ALL: [Self; 8] = [
        Self::Read,
        Self::Write,
        Self::Flush,
        Self::Trim,
        Self::Cache,
        Self::WriteZeroes,
        Self::BlockStatus,
        Self::Other,
    ];

    /// As the protocol names it, in small letters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Trim => "trim",
            Self::Cache => "cache",
            Self::WriteZeroes => "write_zeroes",
            Self::BlockStatus => "block_status",
            Self::Other => "other",
        }
    }

    pub(crate) fn of(wire: u16) -> Self {
        match wire {
            command::READ => Self::Read,
            command::WRITE => Self::Write,
            command::FLUSH => Self::Flush,
            command::TRIM => Self::Trim,
            command::CACHE => Self::Cache,
            command::WRITE_ZEROES => Self::WriteZeroes,
            command::BLOCK_STATUS => Self::BlockStatus,
            _ => Self::Other,
        }
    }
}

/// What was done through an export since it was added, or through a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Connections that entered transmission.
    pub connections: u64,
    /// Requests of every kind that were answered, refused ones included.
    pub requests: u64,
    /// The same by their kinds.
    pub by_kind: ByKind,
    /// Requests that were answered with an error.
    pub errors: u64,
    /// Bytes that READ answered with, holes included.
    pub bytes_read: u64,
    /// Bytes that WRITE stored.
    pub bytes_written: u64,
    /// Bytes that WRITE_ZEROES made zero.
    pub bytes_zeroed: u64,
    /// Bytes that TRIM discarded.
    pub bytes_trimmed: u64,
    /// Requests that are under way now: begun, and their answer not yet taken by the client.
    pub in_flight: u64,
    /// How long devices took.
    pub latency: Latency,
}

/// A number for each kind of request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ByKind([u64; RequestKind::ALL.len()]);

impl ByKind {
    /// The number of a kind.
    pub fn get(&self, kind: RequestKind) -> u64 {
        self.0.get(kind as usize).copied().unwrap_or(0)
    }
}

/// How long devices worked on requests, from when a request could begin (its payload was there) until there was an
/// answer. Requests that were refused before are not among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Latency {
    /// For each of [`Latency::BOUNDS`], how many took at most so long and longer than the bound before; the last number is
    /// of those that took longer than all bounds.
    pub buckets: [u64; Latency::BOUNDS.len() + 1],
    /// All of them together.
    pub sum: Duration,
}

impl Latency {
    /// The upper ends of the buckets.
    pub const BOUNDS: [Duration; 16] = [
        Duration::from_micros(50),
        Duration::from_micros(100),
        Duration::from_micros(200),
        Duration::from_micros(500),
        Duration::from_millis(1),
        Duration::from_millis(2),
        Duration::from_millis(5),
        Duration::from_millis(10),
        Duration::from_millis(20),
        Duration::from_millis(50),
        Duration::from_millis(100),
        Duration::from_millis(200),
        Duration::from_millis(500),
        Duration::from_secs(1),
        Duration::from_secs(5),
        Duration::from_secs(30),
    ];

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }
}

/// The last request that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LastError {
    /// When it was answered.
    pub at: SystemTime,
    /// What was asked for.
    pub kind: RequestKind,
    /// One of [`crate::wire::error`].
    pub error: u32,
    /// What the client was told.
    pub text: String,
}

/// The living form of [`Counters`].
#[derive(Debug, Default)]
pub(crate) struct Tally {
    connections: AtomicU64,
    by_kind: [AtomicU64; RequestKind::ALL.len()],
    errors: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    bytes_zeroed: AtomicU64,
    bytes_trimmed: AtomicU64,
    in_flight: AtomicU64,
    latency: [AtomicU64; Latency::BOUNDS.len() + 1],
    latency_nanos: AtomicU64,
    last_error: Mutex<Option<LastError>>,
}

/// A request that is under way, until this is dropped.
#[derive(Debug)]
pub(crate) struct InFlight([Arc<Tally>; 2]);

impl InFlight {
    /// For an export and for a connection.
    pub(crate) fn new(tallies: [Arc<Tally>; 2]) -> Self {
        for tally in &tallies {
            tally.in_flight.fetch_add(1, Ordering::Relaxed);
        }
        Self(tallies)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        for tally in &self.0 {
            tally.in_flight.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Tally {
    /// One more connection.
    pub(crate) fn connected(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
    }

    /// A request is answered.
    pub(crate) fn answered(&self, kind: RequestKind, answer: &Answer) {
        if let Some(counter) = self.by_kind.get(kind as usize) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        if let Answer::Failed { error, text } = answer {
            self.errors.fetch_add(1, Ordering::Relaxed);
            let (error, text) = (*error, text.clone());
            *self.last_error.lock() = Some(LastError { at: SystemTime::now(), kind, error, text });
        }
    }

    /// A request is answered that the device worked on from `begun` on.
    pub(crate) fn worked(
        &self,
        kind: RequestKind,
        command: Command,
        answer: &Answer,
        begun: Instant,
    ) {
        self.answered(kind, answer);
        let took = begun.elapsed();
        let bucket = Latency::BOUNDS.partition_point(|bound| *bound < took);
        if let Some(counter) = self.latency.get(bucket) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.latency_nanos.fetch_add(nanos, Ordering::Relaxed);
        if matches!(answer, Answer::Failed { .. }) {
            return;
        }
        let (counter, range) = match command {
            Command::Read { range, .. } => (&self.bytes_read, range),
            Command::Write { range, .. } => (&self.bytes_written, range),
            Command::WriteZeroes { range, .. } => (&self.bytes_zeroed, range),
            Command::Trim { range, .. } => (&self.bytes_trimmed, range),
            Command::Flush | Command::Cache { .. } | Command::BlockStatus { .. } => return,
        };
        counter.fetch_add(range.len(), Ordering::Relaxed);
    }

    pub(crate) fn last_error(&self) -> Option<LastError> {
        self.last_error.lock().clone()
    }

    pub(crate) fn snapshot(&self) -> Counters {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let by_kind = ByKind(std::array::from_fn(|index| self.by_kind.get(index).map_or(0, of)));
        Counters {
            connections: of(&self.connections),
            requests: by_kind.0.iter().sum(),
            by_kind,
            errors: of(&self.errors),
            bytes_read: of(&self.bytes_read),
            bytes_written: of(&self.bytes_written),
            bytes_zeroed: of(&self.bytes_zeroed),
            bytes_trimmed: of(&self.bytes_trimmed),
            in_flight: of(&self.in_flight),
            latency: Latency {
                buckets: std::array::from_fn(|index| self.latency.get(index).map_or(0, of)),
                sum: Duration::from_nanos(of(&self.latency_nanos)),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_where_they_are_counted() {
        for (index, kind) in RequestKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, index, "{}", kind.name());
        }
        assert!(Latency::BOUNDS.is_sorted());
    }

    #[tokio::test(start_paused = true)]
    async fn times_fall_into_their_buckets() {
        let tally = Tally::default();
        for (micros, expected) in
            [(0, 0), (50, 0), (51, 1), (1000, 4), (1001, 5), (30_000_000, 15), (30_000_001, 16)]
        {
            let before = tally.snapshot().latency;
            let begun = Instant::now();
            tokio::time::advance(Duration::from_micros(micros)).await;
            tally.worked(RequestKind::Flush, Command::Flush, &Answer::Done, begun);
            let after = tally.snapshot().latency;
            let grown: Vec<_> =
                (0..17).filter(|index| after.buckets[*index] > before.buckets[*index]).collect();
            assert_eq!(grown, [expected], "{micros}");
            assert_eq!(after.sum - before.sum, Duration::from_micros(micros));
        }
        assert_eq!(tally.snapshot().latency.count(), 7);
    }
}
