//! Clearing: what zeros and discards do to entries, subcluster by subcluster, without touching data. What only data can
//! say (parts of compressed clusters, zeros over a backing file in version 2) is handed back to be written.

use block::ByteRange;

use crate::core::Core;
use crate::entry::{Cluster, Hosted, L2Entry, Mask};
use crate::error::Fault;
use crate::mapping::Step;
use crate::plan::{Link, Stored};
use crate::units::{GuestOffset, HostCluster};

/// What clearing leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Clear {
    /// Zeros; space is given back.
    Zeroes,
    /// Zeros; every cluster keeps or gets a host cluster.
    AllocatedZeroes,
    /// What was allocated reads as zeros, what was not stays as it is; space is given back.
    Discard,
    /// Nothing: what lies below shows; space is given back. For whole clusters only.
    Reveal,
}

/// What becomes of one cluster.
enum Change {
    Nothing,
    /// Its entry cannot say it.
    Write,
    /// Another entry.
    Entry(Link),
    /// Another entry, in a new host cluster.
    Moved(Link),
}

impl Core {
    /// Clears whole subclusters, whose clusters are locked exclusively: `range` lies within one L2 table and is aligned
    /// to subclusters, but for the end of the disk. Gives the parts that have to be written with zeros instead.
    pub(crate) fn clear(
        &mut self,
        range: ByteRange,
        how: Clear,
    ) -> Result<Step<Vec<ByteRange>>, Fault> {
        let l1 = self.geometry.l1_index(GuestOffset(range.start()));
        if let Step::Load(table) = self.map.load_state(l1)? {
            return Ok(Step::Load(table));
        }
        if self.clears_nothing(l1, range, how) {
            return Ok(Step::Ready(Vec::new()));
        }
        let (mut rest, mut changes): (Vec<ByteRange>, Vec<(Link, bool)>) = Default::default();
        for piece in range.pieces(self.geometry.bytes()) {
            match self.clear_one(l1, piece, how)? {
                Change::Nothing => {}
                Change::Entry(link) => changes.push((link, false)),
                Change::Moved(link) => changes.push((link, true)),
                Change::Write => match rest.last_mut() {
                    Some(last) if last.end() == piece.start() => {
                        *last = ByteRange::between(last.start(), piece.end());
                    }
                    _ => rest.push(piece),
                },
            }
        }
        if changes.is_empty() {
            return Ok(Step::Ready(rest));
        }
        match self.own_table(l1)? {
            Step::Ready(()) => {}
            Step::Load(table) => return Ok(Step::Load(table)),
            Step::Grow(to) => return Ok(Step::Grow(to)),
        }
        let needed = changes.iter().filter(|(_, moved)| *moved).count() as u64;
        let fresh = match self.reserve_data(needed)? {
            Step::Ready(fresh) => fresh,
            Step::Load(table) => return Ok(Step::Load(table)),
            Step::Grow(to) => return Ok(Step::Grow(to)),
        };
        let mut next = fresh.map_or(HostCluster(0), |(run, _)| run.start);
        for (Link { l2, mut entry, drops }, moved) in changes {
            if moved && let L2Entry::Cluster(cluster) = &mut entry {
                let host = self.next_host(&mut next, self.geometry.guest_range(l1, l2));
                cluster.host = Some(Hosted::exclusive(host));
            }
            self.map.set_entry(l1, l2, entry);
            self.drop_references(drops);
        }
        Ok(Step::Ready(rest))
    }

    /// Whether clearing would have to write data somewhere. Parts of clusters are at the ends of a range alone.
    pub(crate) fn clearing_writes(
        &mut self,
        range: ByteRange,
        how: Clear,
    ) -> Result<Step<bool>, Fault> {
        if self.map.format().version < 3 {
            let writes = how == Clear::AllocatedZeroes || !self.reads_zero_from(range.start());
            return Ok(Step::Ready(writes));
        }
        let cluster = self.geometry.bytes();
        let last = ByteRange::between(range.end().saturating_sub(1), range.end());
        let last = last.widen(cluster).intersection(range);
        for piece in range.pieces(cluster).take(1).chain([last]) {
            let l1 = self.geometry.l1_index(GuestOffset(piece.start()));
            if let Step::Load(table) = self.map.load_state(l1)? {
                return Ok(Step::Load(table));
            }
            if matches!(self.clear_one(l1, piece, how)?, Change::Write) {
                return Ok(Step::Ready(true));
            }
        }
        Ok(Step::Ready(false))
    }

    /// Whether an absent table says that all is clear already.
    fn clears_nothing(&self, l1: u64, range: ByteRange, how: Clear) -> bool {
        self.map.is_absent(l1)
            && match how {
                Clear::Discard | Clear::Reveal => true,
                Clear::Zeroes => self.reads_zero_from(range.start()),
                Clear::AllocatedZeroes => false,
            }
    }

    fn clear_one(&self, l1: u64, piece: ByteRange, how: Clear) -> Result<Change, Fault> {
        let l2 = self.geometry.l2_index(GuestOffset(piece.start()));
        let start = self.geometry.guest_range(l1, l2).start();
        let old = self.stored(l1, l2)?;
        let cleared = self.whole(piece);
        let all = self.map.format().all();
        if how == Clear::Reveal {
            if (old.drops, old.alloc, old.zero) == (None, 0, 0) {
                return Ok(Change::Nothing);
            }
            let entry = L2Entry::Cluster(Cluster::default());
            return Ok(Change::Entry(Link { l2, entry, drops: old.drops }));
        }
        if old.is_compressed && cleared != all {
            return Ok(if how == Clear::Discard { Change::Nothing } else { Change::Write });
        }
        if self.map.format().version < 3 {
            return Ok(self.clear_old(l2, old, start, how));
        }
        if how == Clear::AllocatedZeroes {
            return Ok(keep_space(l2, old, cleared));
        }
        let absent = cleared & !old.alloc & !old.zero;
        // Without a backing file nothing can show through: an absent subcluster is zero, too.
        let mut zero = old.zero & !cleared;
        if self.backing_bytes.is_some() {
            zero |= cleared & (old.alloc | old.zero);
        }
        if how == Clear::Zeroes {
            zero |= absent & !self.zero_below(start);
        }
        let alloc = old.alloc & !cleared;
        // A part of a cluster that is only kept leaves it kept.
        let leaves = alloc == 0 && (cleared == all || old.alloc != 0);
        let host = old.host.filter(|_| !leaves);
        if (host, alloc, zero) == (old.host, old.alloc, old.zero) {
            return Ok(Change::Nothing);
        }
        if old.host.is_none() && old.alloc == 0 && self.backing_bytes.is_none() {
            // A zero cluster without space reads as an absent one does.
            return Ok(Change::Nothing);
        }
        let entry = L2Entry::Cluster(Cluster { host, alloc, zero });
        Ok(Change::Entry(Link { l2, entry, drops: old.drops.filter(|_| leaves) }))
    }

    /// Version 2 has no flag for zeros: a cluster is data, or it is absent.
    fn clear_old(&self, l2: u64, old: Stored, start: u64, how: Clear) -> Change {
        let absent = old.alloc == 0;
        match how {
            Clear::AllocatedZeroes => Change::Write,
            _ if self.zero_below(start) == self.map.format().all() => {
                if absent {
                    return Change::Nothing;
                }
                let entry = L2Entry::Cluster(Cluster::default());
                Change::Entry(Link { l2, entry, drops: old.drops })
            }
            Clear::Zeroes => Change::Write,
            Clear::Discard | Clear::Reveal => Change::Nothing,
        }
    }
}

/// Zeros in the host cluster that is there, or in a new one where there is none of its own.
fn keep_space(l2: u64, old: Stored, cleared: Mask) -> Change {
    let (alloc, zero) = (old.alloc & !cleared, old.zero | cleared);
    let host = old.host.filter(|host| host.exclusive || alloc != 0);
    let entry = L2Entry::Cluster(Cluster { host, alloc, zero });
    if host.is_none() {
        return Change::Moved(Link { l2, entry, drops: old.drops });
    }
    if (alloc, zero) == (old.alloc, old.zero) {
        return Change::Nothing;
    }
    Change::Entry(Link { l2, entry, drops: None })
}
