//! What is known of an image: the values that each sector had and since when they are durable, the sizes of the disk,
//! the snapshots and the bitmap. It says what may be found after a power cut; nothing is done to images here.

use std::ops::Range;

use super::setup::Setup;
use crate::crowd::Value;

/// Something that became so.
#[derive(Clone, Debug)]
pub(super) struct Event<T> {
    pub value: T,
    /// How many things had happened when the request that made it began.
    pub began: usize,
    /// The time when that request returned.
    pub returned: u64,
    /// How many things had happened when it was known to be durable; `usize::MAX` if it never was.
    pub durable: usize,
}

impl<T> Event<T> {
    fn first(value: T) -> Self {
        Self { value, began: 0, returned: 0, durable: 0 }
    }
}

/// Those of the events that a power cut after `now` things may leave: the last that was durable, and all that had begun
/// since.
pub(super) fn allowed<T>(events: &[Event<T>], now: usize) -> impl Iterator<Item = &T> {
    let first = events.iter().rposition(|event| event.durable <= now).unwrap_or(0);
    let later = events.iter().skip(first).enumerate();
    later.filter(move |(nth, event)| *nth == 0 || event.began < now).map(|(_, event)| &event.value)
}

/// A flush that succeeded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flush {
    /// The time when it began.
    pub began: u64,
    pub durable: usize,
}

/// An internal snapshot.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    pub name: String,
    pub content: Vec<Value>,
    pub began: usize,
    pub durable: usize,
    /// When deleting it began, and when that was durable.
    pub leaving: usize,
    pub gone: usize,
}

/// The bitmap since it was made or cleared.
#[derive(Clone, Debug)]
pub(super) struct Baseline {
    pub began: usize,
    pub durable: usize,
    /// What each sector may have held: several values where it changed at the same time.
    pub content: Vec<Vec<Value>>,
}

/// How much was known at a moment.
#[derive(Clone, Debug)]
pub(super) struct Mark {
    size: u64,
    events: Vec<usize>,
}

#[derive(Clone, Debug)]
pub(super) struct Ledger {
    pub sectors: Vec<Vec<Event<Value>>>,
    /// In sectors.
    pub sizes: Vec<Event<u64>>,
    pub flushes: Vec<Flush>,
    pub snapshots: Vec<Kept>,
    pub baselines: Vec<Baseline>,
}

impl Ledger {
    pub(super) fn new(setup: &Setup) -> Self {
        let first = |sector| vec![Event::first(setup.below(sector))];
        Self {
            sectors: (0..setup.sectors()).map(first).collect(),
            sizes: vec![Event::first(setup.sectors())],
            flushes: Vec::new(),
            snapshots: Vec::new(),
            baselines: Vec::new(),
        }
    }

    pub(super) fn size(&self) -> u64 {
        self.sizes.last().unwrap().value
    }

    pub(super) fn last(&self, sector: u64) -> Value {
        self.sectors[usize::try_from(sector).unwrap()].last().unwrap().value
    }

    /// What the disk reads like now.
    pub(super) fn content(&self) -> Vec<Value> {
        (0..self.size()).map(|sector| self.last(sector)).collect()
    }

    /// The present, to come back to with [`Ledger::since`].
    pub(super) fn mark(&self) -> Mark {
        Mark { size: self.size(), events: self.sectors.iter().map(Vec::len).collect() }
    }

    /// What the sectors that were always there held at a mark, and all that they have held since.
    pub(super) fn since(&self, mark: &Mark) -> Vec<Vec<Value>> {
        let size = usize::try_from(mark.size.min(self.size())).unwrap();
        let known = self.sectors.iter().zip(&mark.events).take(size);
        known
            .map(|(all, events)| all[events - 1..].iter().map(|event| event.value).collect())
            .collect()
    }

    pub(super) fn push(&mut self, sector: u64, event: Event<Value>) {
        self.sectors[usize::try_from(sector).unwrap()].push(event);
    }

    /// The disk has another size: what it gained, and what it lost, holds zeros.
    pub(super) fn resized(&mut self, event: Event<u64>) {
        let (from, to) = (self.size(), event.value);
        let changed: Range<u64> = from.min(to)..from.max(to);
        while (self.sectors.len() as u64) < to {
            self.sectors.push(vec![Event::first(Value::Zero)]);
        }
        for sector in changed {
            let Event { began, returned, durable, .. } = event;
            self.push(sector, Event { value: Value::Zero, began, returned, durable });
        }
        self.sizes.push(event);
    }

    /// Notes of each value since when it is durable: a flush that began when its request had returned has returned.
    pub(super) fn settle(&mut self) {
        let flushes = std::mem::take(&mut self.flushes);
        for event in self.sectors.iter_mut().flatten() {
            let after = flushes.iter().filter(|flush| flush.began > event.returned);
            let durable = after.map(|flush| flush.durable).min().unwrap_or(usize::MAX);
            event.durable = event.durable.min(durable);
        }
    }
}
