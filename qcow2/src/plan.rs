//! Plans: which host bytes a write goes to, what must be filled around it, and which entries change when all of that
//! is on its way to the disk. A plan is made and published under the core's lock; between the two nothing is locked.

use block::ByteRange;

use crate::core::Core;
use crate::entry::{Cluster, Hosted, L2Entry, Mask, Stream, mask};
use crate::error::Fault;
use crate::mapping::{Place, Step, TableState};
use crate::units::{GuestOffset, HostCluster, HostOffset, Run, index};

/// Where bytes around those of a request come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Zeros.
    Zero,
    /// The backing file, and zeros behind its end.
    Backing,
    /// The host cluster, starting here, that holds the guest cluster until now.
    Copy(HostOffset),
    /// The compressed cluster that the guest cluster is until now.
    Inflate(Stream),
}

/// One piece of I/O of a write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Move {
    /// Guest bytes of the request go straight to `host`.
    Payload {
        /// Which.
        guest: ByteRange,
        /// Where to.
        host: HostOffset,
    },
    /// Guest bytes of the request and what lies around them go to `host`.
    Patch {
        /// Which.
        area: Area,
        /// Where to.
        host: HostOffset,
    },
}

/// A part of one guest cluster that is written at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Area {
    /// The part.
    pub range: ByteRange,
    /// What the request says of it; may be empty.
    pub payload: ByteRange,
    /// What the rest of it is, in order.
    pub fills: Vec<(ByteRange, Fill)>,
}

/// An entry that changes when a plan is published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub l2: u64,
    pub entry: L2Entry,
    /// The host clusters that the entry leaves.
    pub drops: Option<Run>,
}

/// What a plan holds until it is published or undone.
#[derive(Debug, PartialEq, Eq)]
pub struct Reservation {
    pub(crate) l1: u64,
    pub(crate) fresh: Option<Run>,
    pub(crate) links: Vec<Link>,
}

/// A planned write.
#[derive(Debug, PartialEq, Eq)]
pub struct WritePlan {
    /// What to write, in any order.
    pub moves: Vec<Move>,
    /// What to publish or undo afterwards.
    pub reservation: Reservation,
}

/// Where a write to a cluster goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// Nowhere: entries alone change, if anything.
    Nowhere,
    /// The host cluster that it has.
    Here(HostOffset),
    /// A new host cluster.
    New,
}

/// What a write does with one cluster.
struct Intent {
    l2: u64,
    cluster: ByteRange,
    target: Target,
    areas: Vec<Area>,
    /// The entry afterwards, if it changes; a new host cluster is filled in when it is known.
    entry: Option<Cluster>,
    drops: Option<Run>,
}

/// How a cluster is stored before a change.
#[derive(Clone, Copy)]
pub(crate) struct Stored {
    /// The host cluster, compressed clusters apart.
    pub host: Option<Hosted>,
    pub alloc: Mask,
    pub zero: Mask,
    /// How what is in `alloc` is read.
    fill: Fill,
    /// What is left when another cluster takes its place.
    pub drops: Option<Run>,
    pub is_compressed: bool,
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
            self.check_target(run, host)?;
            if !self.has_own_clusters(run, host)? {
                return Ok(Step::Ready(None));
            }
            at = extent.range.end();
            moves.push(Move::Payload { guest: extent.range, host });
        }
        Ok(Step::Ready((at == range.end()).then_some(moves)))
    }

    /// Plans a write to `range`, which lies within one L2 table and whose clusters are locked exclusively.
    /// `zeros` says of each subcluster that the range touches whether the bytes for it are all zero.
    pub(crate) fn plan_write(
        &mut self,
        range: ByteRange,
        zeros: &[bool],
    ) -> Result<Step<WritePlan>, Fault> {
        let l1 = self.geometry.l1_index(GuestOffset(range.start()));
        if let Step::Load(table) = self.map.load_state(l1)? {
            return Ok(Step::Load(table));
        }
        let mut intents = Vec::new();
        let mut zeros = zeros.iter();
        for piece in range.pieces(self.geometry.bytes()) {
            let (first, end) = self.touched(piece);
            let zero = (first..end)
                .filter(|_| zeros.next() == Some(&true))
                .fold(0, |zero, sub| zero | mask(sub, sub + 1));
            intents.push(self.intent(l1, piece, zero)?);
        }
        if intents.iter().any(|intent| intent.entry.is_some()) {
            match self.own_table(l1)? {
                Step::Ready(()) => {}
                Step::Load(table) => return Ok(Step::Load(table)),
                Step::Grow(to) => return Ok(Step::Grow(to)),
            }
        }
        let needed = intents.iter().filter(|intent| intent.target == Target::New).count() as u64;
        let fresh = match self.reserve_data(needed)? {
            Step::Ready(fresh) => fresh,
            Step::Load(table) => return Ok(Step::Load(table)),
            Step::Grow(to) => return Ok(Step::Grow(to)),
        };
        let (moves, links) = self.lay_out(intents, fresh);
        self.map.pin(l1);
        let reservation = Reservation { l1, fresh: fresh.map(|(run, _)| run), links };
        Ok(Step::Ready(WritePlan { moves, reservation }))
    }

    /// Takes host clusters for guest data, where they have to be taken: those of a data file are the guest's.
    pub(crate) fn reserve_data(&mut self, count: u64) -> Result<Step<Option<(Run, bool)>>, Fault> {
        if count == 0 || self.map.format().external_data {
            return Ok(Step::Ready(None));
        }
        Ok(match self.reserve(count)? {
            Step::Ready(fresh) => Step::Ready(Some(fresh)),
            Step::Load(table) => Step::Load(table),
            Step::Grow(to) => Step::Grow(to),
        })
    }

    /// The subclusters that a part of one cluster touches, as first and end.
    pub(crate) fn touched(&self, piece: ByteRange) -> (u32, u32) {
        let sub_bytes = self.geometry.subcluster_bytes();
        let within = piece.start() & (self.geometry.bytes() - 1);
        let narrow = |sub| u32::try_from(sub).unwrap_or(u32::MAX);
        (narrow(within / sub_bytes), narrow((within + piece.len()).div_ceil(sub_bytes)))
    }

    /// The subclusters that lie in `piece`, a part of one cluster, as a whole. What lies behind the end of the disk
    /// counts as part of a piece that reaches the end.
    pub(crate) fn whole(&self, piece: ByteRange) -> Mask {
        let sub_bytes = self.geometry.subcluster_bytes();
        let within = piece.start() & (self.geometry.bytes() - 1);
        let narrow = |sub| u32::try_from(sub).unwrap_or(u32::MAX);
        let first = narrow(within.div_ceil(sub_bytes));
        let end = if piece.end() >= self.size_bytes {
            self.geometry.subclusters()
        } else {
            narrow((within + piece.len()) / sub_bytes)
        };
        mask(first, end)
    }

    /// The subclusters of the cluster at `start` that read as zeros where this file says nothing of them.
    pub(crate) fn zero_below(&self, start: u64) -> Mask {
        let Some(below) = self.backing_bytes else { return self.map.format().all() };
        let covered = below.saturating_sub(start).min(self.geometry.bytes());
        let first = covered.div_ceil(self.geometry.subcluster_bytes());
        mask(u32::try_from(first).unwrap_or(u32::MAX), self.geometry.subclusters())
    }

    /// How a cluster is stored, which is refused if that is where metadata lives.
    pub(crate) fn stored(&self, l1: u64, l2: u64) -> Result<Stored, Fault> {
        let entry = self.map.entry(l1, l2)?;
        let drops = self.host_run(entry);
        if let Some(run) = drops {
            self.check_target(run, self.map.entry_at(l1, l2))?;
        }
        Ok(match entry {
            L2Entry::Cluster(Cluster { mut host, alloc, zero }) => {
                if let (Some(host), Some(run)) = (&mut host, drops)
                    && host.exclusive
                {
                    host.exclusive = self.has_own_clusters(run, self.map.entry_at(l1, l2))?;
                }
                let fill = host.map_or(Fill::Zero, |host| Fill::Copy(host.at));
                Stored { host, alloc, zero, fill, drops, is_compressed: false }
            }
            L2Entry::Compressed(stream) => {
                let alloc = self.map.format().all();
                let fill = Fill::Inflate(stream);
                Stored { host: None, alloc, zero: 0, fill, drops, is_compressed: true }
            }
        })
    }

    /// The clusters of the image file that an entry counts in.
    pub(crate) fn host_run(&self, entry: L2Entry) -> Option<Run> {
        if self.map.format().external_data {
            return None;
        }
        match entry {
            L2Entry::Cluster(Cluster { host, .. }) => {
                host.map(|host| Run::one(self.geometry.host_cluster(host.at)))
            }
            L2Entry::Compressed(stream) => Some(stream.clusters(self.geometry)),
        }
    }

    fn intent(&self, l1: u64, piece: ByteRange, zeros: Mask) -> Result<Intent, Fault> {
        let l2 = self.geometry.l2_index(GuestOffset(piece.start()));
        let cluster = self.geometry.guest_range(l1, l2);
        let old = self.stored(l1, l2)?;
        let has_zero_flag = self.map.format().version >= 3;
        let below = self.zero_below(cluster.start());
        let (first, end) = self.touched(piece);
        let touched = mask(first, end);
        let keep = old.host.filter(|host| host.exclusive);
        // What reads like that already, and what becomes zero by its entry alone.
        let skipped = touched & zeros & (old.zero | below & !old.alloc);
        let in_place = if keep.is_some() { old.alloc } else { 0 };
        let can_be_zero = if has_zero_flag { Mask::MAX } else { below };
        let zeroed = touched & zeros & self.whole(piece) & can_be_zero & !skipped & !in_place;
        let written = touched & !skipped & !zeroed;
        let flagged = old.zero | if has_zero_flag { zeroed } else { 0 };
        let mut intent = Intent {
            l2,
            cluster,
            target: Target::Nowhere,
            areas: Vec::new(),
            entry: None,
            drops: None,
        };
        if let Some(host) = keep {
            let alloc = old.alloc | written;
            let zero = flagged & !written;
            if (alloc, zero) != (old.alloc, old.zero) {
                intent.entry = Some(Cluster { host: Some(host), alloc, zero });
            }
            intent.target = Target::Here(host.at);
            intent.areas = self.areas(old, piece, written, written & in_place);
            return Ok(intent);
        }
        let left = old.alloc & !zeroed;
        if written == 0 && (left == 0 || !old.is_compressed) {
            if zeroed != 0 {
                let host = old.host.filter(|_| left != 0);
                intent.entry = Some(Cluster { host, alloc: left, zero: flagged });
                intent.drops = old.drops.filter(|_| left == 0);
            }
            return Ok(intent);
        }
        let disk = ByteRange::between(0, self.size_bytes).intersection(cluster);
        let copied = old.alloc & mask(0, self.touched(disk).1) & !touched;
        let alloc = written | copied;
        intent.target = Target::New;
        intent.areas = self.areas(old, piece, alloc, 0);
        intent.entry = Some(Cluster { host: None, alloc, zero: flagged & !alloc });
        intent.drops = old.drops;
        Ok(intent)
    }

    /// The runs of subclusters in `written` with what is in them: bytes of the request's `piece`, and around them what
    /// was there. Subclusters `in_place` keep what the request does not change.
    fn areas(&self, old: Stored, piece: ByteRange, written: Mask, in_place: Mask) -> Vec<Area> {
        let sub_bytes = self.geometry.subcluster_bytes();
        let start = piece.start() & !(self.geometry.bytes() - 1);
        let below = self.zero_below(start);
        let fill_of = |sub: u32| match mask(sub, sub + 1) {
            bit if old.alloc & bit != 0 => old.fill,
            bit if (old.zero | below) & bit != 0 => Fill::Zero,
            _ => Fill::Backing,
        };
        let mut areas = Vec::new();
        let mut next = 0;
        while let Some(first) = (next..32).find(|sub| written & mask(*sub, sub + 1) != 0) {
            let end = (first..32).find(|sub| written & mask(*sub, sub + 1) == 0).unwrap_or(32);
            next = end;
            let range = ByteRange::between(
                start + u64::from(first) * sub_bytes,
                start + u64::from(end) * sub_bytes,
            );
            let payload = range.intersection(piece);
            let mut area = Area { range, payload, fills: Vec::new() };
            for sub in first..end {
                let part = start + u64::from(sub) * sub_bytes;
                let part = ByteRange::between(part, part + sub_bytes);
                let bit = mask(sub, sub + 1);
                let head = ByteRange::between(part.start(), part.end().min(payload.start()));
                let tail = ByteRange::between(part.start().max(payload.end()), part.end());
                if payload.is_empty() {
                    area.fill(part, fill_of(sub));
                } else if in_place & bit != 0 {
                    area.leave_out(head, tail);
                } else {
                    area.fill(head, fill_of(sub));
                    area.fill_tail(tail, fill_of(sub), self.size_bytes);
                }
            }
            areas.push(area);
        }
        areas
    }

    /// Gives every cluster its place; consecutive pieces become one move.
    fn lay_out(&self, intents: Vec<Intent>, fresh: Option<(Run, bool)>) -> (Vec<Move>, Vec<Link>) {
        let (mut moves, mut links) = (Vec::new(), Vec::new());
        let reads_zero = self.fresh_reads_zero && fresh.is_some_and(|(_, virgin)| virgin);
        let mut next = fresh.map_or(HostCluster(0), |(run, _)| run.start);
        for intent in intents {
            let host = match intent.target {
                Target::Nowhere => HostOffset(0),
                Target::Here(host) => host,
                Target::New => self.next_host(&mut next, intent.cluster),
            };
            for mut area in intent.areas {
                if intent.target == Target::New && reads_zero {
                    area.trim_zeros();
                }
                let at = HostOffset(host.0 + (area.range.start() - intent.cluster.start()));
                if area.fills.is_empty() {
                    push(&mut moves, area.payload, at);
                } else {
                    moves.push(Move::Patch { area, host: at });
                }
            }
            if let Some(mut entry) = intent.entry {
                if intent.target == Target::New {
                    entry.host = Some(Hosted::exclusive(host));
                }
                let entry = L2Entry::Cluster(entry);
                links.push(Link { l2: intent.l2, entry, drops: intent.drops });
            }
        }
        (moves, links)
    }

    /// The host cluster for a guest cluster that gets one: the next of those reserved, or the guest's in a data file.
    pub(crate) fn next_host(&self, next: &mut HostCluster, guest: ByteRange) -> HostOffset {
        if self.map.format().external_data {
            return HostOffset(guest.start());
        }
        let cluster = *next;
        *next = HostCluster(cluster.0 + 1);
        self.geometry.host_offset(cluster)
    }

    /// Makes a plan's entries visible: its bytes are on their way, no reader comes before.
    pub(crate) fn publish(&mut self, reservation: &Reservation) {
        for link in &reservation.links {
            self.map.set_entry(reservation.l1, link.l2, link.entry);
            self.drop_references(link.drops);
        }
        self.map.unpin(reservation.l1);
    }

    /// Notes that the references to a run are gone in memory.
    pub(crate) fn drop_references(&mut self, run: Option<Run>) {
        let Some(run) = run else { return };
        self.forget_streams(run);
        for cluster in run.clusters() {
            self.drop_reference(cluster);
        }
    }

    /// Gives back what an unpublished plan held.
    pub(crate) fn undo(&mut self, reservation: &Reservation) {
        self.give_back(reservation.fresh.as_slice());
        self.map.unpin(reservation.l1);
    }

    /// Sees to it that L1 entry `l1` has a table in memory that may be changed.
    pub(crate) fn own_table(&mut self, l1: u64) -> Result<Step<()>, Fault> {
        let state = match self.map.load_state(l1)? {
            Step::Ready(state) => state,
            Step::Load(table) => return Ok(Step::Load(table)),
            Step::Grow(to) => return Ok(Step::Grow(to)),
        };
        let state = match state {
            TableState::Owned(at) => match self.doubt(l1, at)? {
                Step::Ready(true) => TableState::Shared(at),
                Step::Ready(false) => return Ok(Step::Ready(())),
                Step::Load(table) => return Ok(Step::Load(table)),
                Step::Grow(to) => return Ok(Step::Grow(to)),
            },
            other => other,
        };
        let (run, _) = match self.reserve(1)? {
            Step::Ready(fresh) => fresh,
            Step::Load(table) => return Ok(Step::Load(table)),
            Step::Grow(to) => return Ok(Step::Grow(to)),
        };
        self.map.insert_new(l1, self.geometry.host_offset(run.start));
        self.tables.insert(run.start);
        if let TableState::Shared(old) = state {
            self.tables.remove(self.geometry.host_cluster(old));
            self.drop_reference(self.geometry.host_cluster(old));
        }
        Ok(Step::Ready(()))
    }
}

impl Area {
    fn fill(&mut self, range: ByteRange, fill: Fill) {
        if range.is_empty() {
            return;
        }
        match self.fills.last_mut() {
            Some((last, same)) if *same == fill && last.end() == range.start() => {
                *last = ByteRange::between(last.start(), range.end());
            }
            _ => self.fills.push((range, fill)),
        }
    }

    /// As [`Area::fill`]; zeros behind the end of the disk, whatever lies there elsewhere.
    fn fill_tail(&mut self, range: ByteRange, fill: Fill, disk_end: u64) {
        let end = disk_end.clamp(range.start(), range.end().max(range.start()));
        if !range.is_empty() {
            self.fill(ByteRange::between(range.start(), end), fill);
            self.fill(ByteRange::between(end, range.end()), Fill::Zero);
        }
    }

    /// Leaves what lies before and behind the payload as it is.
    fn leave_out(&mut self, head: ByteRange, tail: ByteRange) {
        let start = if head.is_empty() { self.range.start() } else { head.end() };
        let end = if tail.is_empty() { self.range.end() } else { tail.start() };
        self.range = ByteRange::between(start, end);
    }

    /// Leaves out zeros at both ends: they are there already.
    fn trim_zeros(&mut self) {
        if let Some((range, Fill::Zero)) = self.fills.first().copied()
            && range.start() == self.range.start()
            && !self.payload.is_empty()
        {
            self.range = ByteRange::between(range.end(), self.range.end());
            self.fills.remove(0);
        }
        if let Some((range, Fill::Zero)) = self.fills.last().copied()
            && range.end() == self.range.end()
            && !self.payload.is_empty()
        {
            self.range = ByteRange::between(self.range.start(), range.start());
            self.fills.pop();
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
    // Nothing may lie anywhere: parts of a cluster that moves need not touch what is written into it.
    if range.is_empty() {
        return bytes::Bytes::new();
    }
    data.slice(index(range.start() - start)..index(range.end() - start))
}
