//! Plans: which host bytes a write goes to, what must be filled around it, and which entries change when all of that
//! is on its way to the disk. A plan is made and published under the core's lock; between the two nothing is locked.

use block::ByteRange;

use crate::core::Core;
use crate::entry::{Hosted, L2Entry};
use crate::error::{Fault, Feature, TableKind};
use crate::mapping::{Place, Step, TableState};
use crate::units::{GuestOffset, HostCluster, HostOffset, Run, index};

/// Where the bytes of a partly written new cluster come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fill {
    /// Zeros.
    Zero,
    /// The backing file, and zeros behind its end.
    Backing,
    /// The shared cluster that held them.
    Copy(HostOffset),
}

/// One piece of I/O of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Move {
    /// Guest bytes of the request go straight to `host`.
    Payload { guest: ByteRange, host: HostOffset },
    /// A whole cluster: the request's bytes `payload`, and around them what `fill` says.
    Patch { payload: ByteRange, cluster: ByteRange, host: HostOffset, fill: Fill },
}

/// An entry that changes when a plan is published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Link {
    l2: u64,
    entry: L2Entry,
    drops: Option<HostOffset>,
}

/// What a plan holds until it is published or undone.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Reservation {
    l1: u64,
    fresh: Option<Run>,
    links: Vec<Link>,
}

/// A planned write.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct WritePlan {
    pub moves: Vec<Move>,
    pub reservation: Reservation,
}

/// What clearing clusters leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Clear {
    /// Zeros; space is given back.
    Zeroes,
    /// Zeros; every cluster keeps or gets a host cluster.
    AllocatedZeroes,
    /// What was allocated reads as zeros, what was not stays as it is; space is given back.
    Discard,
}

/// What a write does with one cluster.
enum Intent {
    /// Nothing: it reads like that already.
    Skip,
    InPlace(HostOffset),
    /// It becomes a zero cluster.
    Zero {
        drops: Option<HostOffset>,
    },
    /// It needs a host cluster: a new one, or the one that is reserved for it.
    Fresh {
        reserved: Option<HostOffset>,
        fill: Fill,
        drops: Option<HostOffset>,
    },
}

impl Core {
    /// Whether a write to `range` would only overwrite what is there, as far as that is known without loading.
    pub(crate) fn is_in_place(&mut self, range: ByteRange) -> bool {
        matches!(self.plan_in_place(range), Ok(Step::Ready(Some(_))))
    }

    /// Plans a write that changes no metadata; `None` where it must. `range` lies within one L2 table.
    pub(crate) fn plan_in_place(
        &mut self,
        range: ByteRange,
    ) -> Result<Step<Option<Vec<Move>>>, Fault> {
        let extents = match self.map.lookup(range, usize::MAX)? {
            Step::Ready(extents) => extents,
            Step::Load(table) => return Ok(Step::Load(table)),
            Step::Grow(to) => return Ok(Step::Grow(to)),
        };
        let mut moves = Vec::new();
        let mut at = range.start();
        for extent in extents {
            let Place::Data { host, exclusive: true } = extent.place else {
                return Ok(Step::Ready(None));
            };
            let first = self.geometry.host_cluster(host);
            let last = self.geometry.host_cluster(HostOffset(host.0 + extent.range.len() - 1));
            let run = Run { start: first, count: last.0 - first.0 + 1 };
            if self.is_metadata(run) {
                self.check_target(TableKind::L2, host, host)?;
            }
            at = extent.range.end();
            moves.push(Move::Payload { guest: extent.range, host });
        }
        Ok(Step::Ready((at == range.end()).then_some(moves)))
    }

    /// Plans a write to `range`, which lies within one L2 table and whose clusters are locked exclusively.
    /// `zeros` says of each cluster that the range touches whether the bytes for it are all zero.
    pub(crate) fn plan_write(
        &mut self,
        range: ByteRange,
        zeros: &[bool],
    ) -> Result<Step<WritePlan>, Fault> {
        let l1 = self.geometry.l1_index(GuestOffset(range.start()));
        let intents = match self.intents(l1, range, zeros)? {
            Step::Ready(intents) => intents,
            Step::Load(table) => return Ok(Step::Load(table)),
            Step::Grow(to) => return Ok(Step::Grow(to)),
        };
        let needed = intents.iter().filter(|(_, intent)| intent.needs_cluster()).count() as u64;
        let changes = intents.iter().any(|(_, intent)| intent.changes_metadata());
        if changes {
            match self.own_table(l1)? {
                Step::Ready(()) => {}
                Step::Load(table) => return Ok(Step::Load(table)),
                Step::Grow(to) => return Ok(Step::Grow(to)),
            }
        }
        let fresh = if needed == 0 {
            None
        } else {
            match self.reserve(needed)? {
                Step::Ready(fresh) => Some(fresh),
                Step::Load(table) => return Ok(Step::Load(table)),
                Step::Grow(to) => return Ok(Step::Grow(to)),
            }
        };
        let (moves, links) = self.lay_out(&intents, fresh);
        self.map.pin(l1);
        let reservation = Reservation { l1, fresh: fresh.map(|(run, _)| run), links };
        Ok(Step::Ready(WritePlan { moves, reservation }))
    }

    fn intents(
        &mut self,
        l1: u64,
        range: ByteRange,
        zeros: &[bool],
    ) -> Result<Step<Vec<(ByteRange, Intent)>>, Fault> {
        if let Step::Load(table) = self.map.load_state(l1)? {
            return Ok(Step::Load(table));
        }
        let mut intents = Vec::new();
        for (piece, zero) in range.pieces(self.geometry.bytes()).zip(zeros) {
            intents.push((piece, self.intent(l1, piece, *zero)?));
        }
        Ok(Step::Ready(intents))
    }

    fn intent(&self, l1: u64, piece: ByteRange, zero: bool) -> Result<Intent, Fault> {
        let l2 = self.geometry.l2_index(GuestOffset(piece.start()));
        let cluster = self.geometry.guest_range(l1, l2);
        let whole =
            piece.start() == cluster.start() && piece.end() >= cluster.end().min(self.size_bytes);
        let entry = self.map.entry(l1, l2)?;
        if let Some(host) = entry.host() {
            self.check_target(TableKind::L2, host.at, self.map.entry_at(l1, l2))?;
        }
        Ok(match entry {
            L2Entry::Compressed { .. } => {
                return Err(Fault::Unsupported(Feature::CompressedClusters));
            }
            L2Entry::Data(Hosted { at, exclusive: true }) => {
                Intent::InPlace(HostOffset(at.0 + (piece.start() - cluster.start())))
            }
            L2Entry::Data(Hosted { at, .. }) if whole && zero => Intent::Zero { drops: Some(at) },
            L2Entry::Data(Hosted { at, .. }) => {
                Intent::Fresh { reserved: None, fill: Fill::Copy(at), drops: Some(at) }
            }
            L2Entry::Zero { .. } if zero => Intent::Skip,
            L2Entry::Zero { host: Some(Hosted { at, exclusive: true }) } => {
                Intent::Fresh { reserved: Some(at), fill: Fill::Zero, drops: None }
            }
            L2Entry::Zero { host } => {
                let drops = host.map(|host| host.at);
                Intent::Fresh { reserved: None, fill: Fill::Zero, drops }
            }
            L2Entry::Unallocated if self.reads_zero_from(cluster.start()) => {
                if zero {
                    Intent::Skip
                } else {
                    Intent::Fresh { reserved: None, fill: Fill::Zero, drops: None }
                }
            }
            L2Entry::Unallocated if whole && zero => Intent::Zero { drops: None },
            L2Entry::Unallocated => {
                Intent::Fresh { reserved: None, fill: Fill::Backing, drops: None }
            }
        })
    }

    /// Gives every cluster its place; consecutive pieces become one move.
    fn lay_out(
        &self,
        intents: &[(ByteRange, Intent)],
        fresh: Option<(Run, bool)>,
    ) -> (Vec<Move>, Vec<Link>) {
        let (mut moves, mut links) = (Vec::new(), Vec::new());
        // Zeros of the host are no zeros of the guest where a cipher stands between them.
        let plain = self.header.crypt_method == 0;
        let virgin_run = plain && fresh.is_some_and(|(_, virgin)| virgin);
        let mut next = fresh.map_or(HostCluster(0), |(run, _)| run.start);
        for (piece, intent) in intents {
            let l2 = self.geometry.l2_index(GuestOffset(piece.start()));
            match *intent {
                Intent::Skip => {}
                Intent::InPlace(host) => push(&mut moves, *piece, host),
                Intent::Zero { drops } => {
                    links.push(Link { l2, entry: L2Entry::Zero { host: None }, drops });
                }
                Intent::Fresh { reserved, fill, drops } => {
                    let host = reserved.unwrap_or_else(|| {
                        let cluster = next;
                        next = HostCluster(cluster.0 + 1);
                        self.geometry.host_offset(cluster)
                    });
                    let virgin = reserved.is_none() && virgin_run;
                    self.place(&mut moves, *piece, host, fill, virgin);
                    let entry = L2Entry::Data(Hosted::exclusive(host));
                    links.push(Link { l2, entry, drops });
                }
            }
        }
        (moves, links)
    }

    fn place(
        &self,
        moves: &mut Vec<Move>,
        piece: ByteRange,
        host: HostOffset,
        fill: Fill,
        virgin: bool,
    ) {
        let cluster = piece.widen(self.geometry.bytes());
        if piece == cluster || (virgin && fill == Fill::Zero) {
            push(moves, piece, HostOffset(host.0 + (piece.start() - cluster.start())));
        } else {
            moves.push(Move::Patch { payload: piece, cluster, host, fill });
        }
    }

    /// Makes a plan's entries visible. Its bytes must be with the host.
    pub(crate) fn publish(&mut self, reservation: &Reservation) {
        for link in &reservation.links {
            self.map.set_entry(reservation.l1, link.l2, link.entry);
            if let Some(host) = link.drops {
                self.drop_reference(self.geometry.host_cluster(host));
            }
        }
        self.map.unpin(reservation.l1);
    }

    /// Gives back what an unpublished plan held.
    pub(crate) fn undo(&mut self, reservation: &Reservation) {
        self.give_back(reservation.fresh.as_slice());
        self.map.unpin(reservation.l1);
    }

    /// Sees to it that L1 entry `l1` has a table in memory that may be changed.
    fn own_table(&mut self, l1: u64) -> Result<Step<()>, Fault> {
        let state = match self.map.load_state(l1)? {
            Step::Ready(state) => state,
            Step::Load(table) => return Ok(Step::Load(table)),
            Step::Grow(to) => return Ok(Step::Grow(to)),
        };
        if state == TableState::Owned {
            return Ok(Step::Ready(()));
        }
        let (run, _) = match self.reserve(1)? {
            Step::Ready(fresh) => fresh,
            Step::Load(table) => return Ok(Step::Load(table)),
            Step::Grow(to) => return Ok(Step::Grow(to)),
        };
        self.map.insert_new(l1, self.geometry.host_offset(run.start));
        self.tables.insert(run.start);
        if let TableState::Shared(old) = state {
            self.tables.remove(&self.geometry.host_cluster(old));
            self.drop_reference(self.geometry.host_cluster(old));
        }
        Ok(Step::Ready(()))
    }

    /// Clears whole clusters, which are locked exclusively: `range` lies within one L2 table and is aligned to
    /// clusters, but for the end of the disk.
    pub(crate) fn clear(&mut self, range: ByteRange, how: Clear) -> Result<Step<()>, Fault> {
        let l1 = self.geometry.l1_index(GuestOffset(range.start()));
        if let Step::Load(table) = self.map.load_state(l1)? {
            return Ok(Step::Load(table));
        }
        if self.clears_nothing(l1, range, how) {
            return Ok(Step::Ready(()));
        }
        let first = self.geometry.l2_index(GuestOffset(range.start()));
        let count = self.geometry.clusters(range.len());
        let mut changes: Vec<(u64, Option<HostOffset>, Option<L2Entry>)> = Vec::new();
        for l2 in first..first + count {
            let change = self.clear_one(l1, l2, how)?;
            if let Some((entry, drops)) = change {
                changes.push((l2, drops, entry));
            }
        }
        if changes.is_empty() {
            return Ok(Step::Ready(()));
        }
        match self.own_table(l1)? {
            Step::Ready(()) => {}
            other => return Ok(other),
        }
        let needed = changes.iter().filter(|(.., entry)| entry.is_none()).count() as u64;
        let mut next = HostCluster(0);
        if needed > 0 {
            match self.reserve(needed)? {
                Step::Ready((run, _)) => next = run.start,
                Step::Load(table) => return Ok(Step::Load(table)),
                Step::Grow(to) => return Ok(Step::Grow(to)),
            }
        }
        for (l2, drops, entry) in changes {
            let entry = entry.unwrap_or_else(|| {
                let host = Hosted::exclusive(self.geometry.host_offset(next));
                next = HostCluster(next.0 + 1);
                L2Entry::Zero { host: Some(host) }
            });
            self.map.set_entry(l1, l2, entry);
            if let Some(host) = drops {
                self.drop_reference(self.geometry.host_cluster(host));
            }
        }
        Ok(Step::Ready(()))
    }

    /// Whether an absent table says that all is clear already.
    fn clears_nothing(&self, l1: u64, range: ByteRange, how: Clear) -> bool {
        self.map.is_absent(l1)
            && match how {
                Clear::Discard => true,
                Clear::Zeroes => self.reads_zero_from(range.start()),
                Clear::AllocatedZeroes => false,
            }
    }

    /// How one cluster changes, if it does: its new entry (`None`: zeros in a new cluster) and the host cluster that
    /// it leaves.
    #[expect(clippy::type_complexity, reason = "used in one place, next to it")]
    fn clear_one(
        &self,
        l1: u64,
        l2: u64,
        how: Clear,
    ) -> Result<Option<(Option<L2Entry>, Option<HostOffset>)>, Fault> {
        let entry = self.map.entry(l1, l2)?;
        let start = self.geometry.guest_range(l1, l2).start();
        if let Some(host) = entry.host() {
            self.check_target(TableKind::L2, host.at, self.map.entry_at(l1, l2))?;
        }
        let zero = L2Entry::Zero { host: None };
        Ok(match (entry, how) {
            (L2Entry::Compressed { .. }, _) => {
                return Err(Fault::Unsupported(Feature::CompressedClusters));
            }
            (L2Entry::Data(Hosted { at, exclusive: true }), Clear::AllocatedZeroes) => {
                Some((Some(L2Entry::Zero { host: Some(Hosted::exclusive(at)) }), None))
            }
            (
                L2Entry::Zero { host: Some(Hosted { exclusive: true, .. }) },
                Clear::AllocatedZeroes,
            ) => None,
            (L2Entry::Unallocated, Clear::AllocatedZeroes) => Some((None, None)),
            (entry, Clear::AllocatedZeroes) => Some((None, entry.host().map(|host| host.at))),
            (L2Entry::Unallocated, Clear::Discard) => None,
            (L2Entry::Unallocated, Clear::Zeroes) => {
                (!self.reads_zero_from(start)).then_some((Some(zero), None))
            }
            (L2Entry::Zero { host: None }, _) => None,
            (L2Entry::Data(host) | L2Entry::Zero { host: Some(host) }, _) => {
                // Without a backing file nothing can show through: an absent cluster is zero, too.
                let gone = if self.backing_bytes.is_none() { L2Entry::Unallocated } else { zero };
                Some((Some(gone), Some(host.at)))
            }
        })
    }
}

impl Intent {
    fn needs_cluster(&self) -> bool {
        matches!(self, Self::Fresh { reserved: None, .. })
    }

    fn changes_metadata(&self) -> bool {
        matches!(self, Self::Fresh { .. } | Self::Zero { .. })
    }
}

impl L2Entry {
    /// The host cluster that a standard entry holds.
    fn host(self) -> Option<Hosted> {
        match self {
            Self::Data(host) | Self::Zero { host: Some(host) } => Some(host),
            Self::Unallocated | Self::Zero { host: None } | Self::Compressed { .. } => None,
        }
    }
}

fn push(moves: &mut Vec<Move>, guest: ByteRange, host: HostOffset) {
    if let Some(Move::Payload { guest: last, host: last_host }) = moves.last_mut()
        && last.end() == guest.start()
        && last_host.0 + last.len() == host.0
    {
        *last = ByteRange::between(last.start(), guest.end());
        return;
    }
    moves.push(Move::Payload { guest, host });
}

/// The part of a request's bytes that a guest range stands for; `start` is where the request starts.
pub(crate) fn slice_of(data: &bytes::Bytes, start: u64, range: ByteRange) -> bytes::Bytes {
    data.slice(index(range.start() - start)..index(range.end() - start))
}
