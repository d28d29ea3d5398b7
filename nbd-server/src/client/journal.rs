//! What a server has answered and not yet made durable: the changes that must be made again where the server dies. No
//! I/O; sending is told in `links`.

use std::collections::VecDeque;

use block::ByteRange;
use bytes::Bytes;

use crate::wire::{command, command_flag};

/// What a change takes besides its payload, in bytes.
const OVERHEAD_BYTES: u64 = 128;

/// A change as it was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Change {
    /// WRITE, WRITE_ZEROES or TRIM.
    pub(super) command: u16,
    pub(super) flags: u16,
    pub(super) range: ByteRange,
    pub(super) payload: Bytes,
}

impl Change {
    fn cost_bytes(&self) -> u64 {
        OVERHEAD_BYTES + self.payload.len() as u64
    }
}

/// Whether a command changes what an export holds.
pub(super) fn is_change(command: u16) -> bool {
    matches!(command, command::WRITE | command::WRITE_ZEROES | command::TRIM)
}

/// A life of the server, as far as the client can tell: as long as one connection lasts, the next one takes over from
/// it. What was answered in an earlier life need not be there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Life(u64);

/// A place in the order of answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Mark(u64);

/// The changes that were answered and not flushed, in the order of their answers.
#[derive(Debug, Default)]
pub(super) struct Journal {
    life: Life,
    /// The mark of the first change that is kept, and of the next one to come.
    first: Mark,
    next: Mark,
    changes: VecDeque<Change>,
    bytes: u64,
}

impl Journal {
    /// What is kept, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The server's life now.
    pub(super) fn life(&self) -> Life {
        self.life
    }

    /// What a flush that is sent now will cover: everything answered before.
    pub(super) fn mark(&self) -> Mark {
        self.next
    }

    /// Notes a change that was answered in `life`. `false` where that life is over: nobody knows whether the change was
    /// made again with the others, so it counts as not answered.
    pub(super) fn record(&mut self, change: Change, life: Life) -> bool {
        if life != self.life {
            return false;
        }
        // A durable change needs no second time, unless an earlier one would be made again over it.
        let is_durable = change.flags & command_flag::FUA != 0;
        if !is_durable || !self.changes.is_empty() {
            self.bytes += change.cost_bytes();
            self.next.0 += 1;
            self.changes.push_back(change);
        }
        true
    }

    /// A flush that was sent at `mark` was answered in `life`. `false` where that life is over: then what it covered may
    /// have been made again since, and not be durable.
    pub(super) fn flushed(&mut self, mark: Mark, life: Life) -> bool {
        if life != self.life {
            return false;
        }
        while self.first < mark
            && let Some(change) = self.changes.pop_front()
        {
            self.first.0 += 1;
            self.bytes -= change.cost_bytes();
        }
        true
    }

    /// The server has begun another life. What to make again in it, in this order, before anything else.
    pub(super) fn begin_life(&mut self) -> (Life, Vec<Change>) {
        self.life.0 += 1;
        (self.life, self.changes.iter().cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(start: u64, flags: u16, content: &'static [u8]) -> Change {
        let payload = Bytes::from_static(content);
        let range = ByteRange::new(start, payload.len() as u64).unwrap();
        Change { command: command::WRITE, flags, range, payload }
    }

    #[test]
    fn a_flush_forgets_what_was_answered_before_it_was_sent() {
        let mut journal = Journal::default();
        let life = journal.life();
        assert!(journal.record(write(0, 0, b"a"), life));
        let mark = journal.mark();
        assert!(journal.record(write(1, 0, b"b"), life));
        assert!(journal.flushed(mark, life));
        assert_eq!(journal.bytes(), OVERHEAD_BYTES + 1);
        // An older flush that is answered later changes nothing.
        assert!(journal.flushed(mark, life));
        assert_eq!(journal.begin_life().1, [write(1, 0, b"b")]);
    }

    #[test]
    fn what_was_answered_in_a_life_that_is_over_does_not_count() {
        let mut journal = Journal::default();
        let life = journal.life();
        assert!(journal.record(write(0, 0, b"a"), life));
        let mark = journal.mark();
        let (next, again) = journal.begin_life();
        assert_eq!(again, [write(0, 0, b"a")]);
        assert!(!journal.record(write(1, 0, b"b"), life));
        assert!(!journal.flushed(mark, life));
        assert!(journal.flushed(mark, next));
        assert_eq!((journal.bytes(), journal.begin_life().1), (0, vec![]));
    }

    #[test]
    fn a_durable_change_is_kept_only_behind_others() {
        let mut journal = Journal::default();
        let life = journal.life();
        let durable = || write(0, command_flag::FUA, b"new");
        assert!(journal.record(durable(), life));
        assert_eq!(journal.bytes(), 0);
        assert!(journal.record(write(0, 0, b"old"), life));
        assert!(journal.record(durable(), life));
        assert_eq!(journal.begin_life().1, [write(0, 0, b"old"), durable()]);
    }
}
