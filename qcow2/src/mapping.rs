//! The mapping of guest clusters to host clusters: the L1 table and the L2 tables that are in memory. It answers
//! where things lie or which table must be loaded first; it allocates nothing and does no I/O.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use block::ByteRange;

use crate::cache::{Age, L2_TABLES, Share};
use crate::entry::{Cluster, EntryFormat, Hosted, L1Entry, L2Entry, Stream, Sub};
use crate::error::{Corruption, Fault};
use crate::refcount::{MetaWrite, big_endian, entry_writes, join, write_units};
use crate::units::{ClusterGeometry, GuestOffset, HostOffset, index};

/// What a question to the core needs: its answer, or something of the driver first.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<T> {
    /// The answer.
    Ready(T),
    /// Load this table, then ask again.
    Load(Table),
    /// Make the file at least this long in bytes, then ask again.
    Grow(u64),
}

/// A table on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Table {
    /// An L2 table.
    L2 {
        /// The L1 entry that names it.
        l1: u64,
        /// Where it lies.
        at: HostOffset,
    },
    /// A refcount block.
    Refcounts {
        /// Its number.
        block: u64,
        /// Where it lies.
        at: HostOffset,
    },
}

impl Table {
    /// Where it lies.
    pub const fn at(self) -> HostOffset {
        match self {
            Self::L2 { at, .. } | Self::Refcounts { at, .. } => at,
        }
    }
}

/// How a run of guest bytes is stored in this file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Not here: the backing file answers.
    Unallocated {
        /// Where its place in a host cluster is that is kept for it.
        host: Option<HostOffset>,
    },
    /// Zeros.
    Zero {
        /// The same.
        host: Option<HostOffset>,
    },
    /// Bytes.
    Data {
        /// Where the first lies, in the image file or the external data file.
        host: HostOffset,
        /// They may be overwritten in place.
        exclusive: bool,
    },
    /// A part of one compressed cluster: which part, the guest range tells.
    Compressed(Stream),
}

/// A run of guest bytes that are stored alike, and contiguously.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The bytes of the disk.
    pub range: ByteRange,
    /// How they are stored.
    pub place: Place,
}

/// Whether a table is there for the clusters of an L1 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TableState {
    Absent,
    /// In memory, and this L1 entry says that it is its only user.
    Owned(HostOffset),
    /// In memory, and shared: a copy must be changed instead.
    Shared(HostOffset),
}

#[derive(Debug)]
struct L2Table {
    at: HostOffset,
    exclusive: bool,
    entries: Vec<u64>,
    /// The bytes that differ from the disk and from what a flush is writing.
    dirty: Option<Range<usize>>,
    /// What a flush is writing now.
    writing: Option<Range<usize>>,
    /// The L1 entry on disk does not point here yet.
    fresh: bool,
    /// Plans that will change it.
    pins: u32,
    age: Age,
}

impl L2Table {
    fn is_clean(&self) -> bool {
        self.dirty.is_none() && self.writing.is_none() && !self.fresh && self.pins == 0
    }
}

/// What a flush took from the mapping, by L1 index.
#[derive(Debug, Default)]
pub(crate) struct CapturedMapping {
    tables: Vec<u64>,
    l1: BTreeSet<u64>,
}

/// The L1 table and the L2 tables in memory.
#[derive(Debug)]
pub(crate) struct Mapping {
    format: EntryFormat,
    geometry: ClusterGeometry,
    l1_at: HostOffset,
    l1: Vec<u64>,
    dirty_l1: BTreeSet<u64>,
    tables: HashMap<u64, L2Table>,
    share: Share,
}

impl Mapping {
    pub(crate) fn new(format: EntryFormat, l1_at: HostOffset, l1: Vec<u64>) -> Self {
        let geometry = format.geometry;
        Self {
            format,
            geometry,
            l1_at,
            l1,
            dirty_l1: BTreeSet::new(),
            tables: HashMap::new(),
            share: Share::new(&L2_TABLES, format.geometry.bytes()),
        }
    }

    /// Finds where `range` lives in this file, or names the table that must be loaded first.
    ///
    /// Extents come in guest order without gaps and may end before `range` does: at `most`, or where a table is not
    /// in memory. Pure: nothing changes but the order of eviction.
    pub(crate) fn lookup(
        &mut self,
        range: ByteRange,
        most: usize,
    ) -> Result<Step<Vec<Extent>>, Fault> {
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = range.start();
        while at < range.end() && extents.len() < most {
            let l1 = self.geometry.l1_index(GuestOffset(at));
            let covered = self.table_range(l1).intersection(range);
            let here = ByteRange::between(at, covered.end());
            match self.load_state(l1) {
                Ok(Step::Ready(TableState::Absent)) => {
                    push(
                        &mut extents,
                        Extent { range: here, place: Place::Unallocated { host: None } },
                    );
                }
                Ok(Step::Ready(_)) => match self.lookup_table(l1, here, most, &mut extents) {
                    Err(fault) if extents.is_empty() => return Err(fault),
                    Err(_) => break,
                    Ok(()) => {}
                },
                Ok(needs) if extents.is_empty() => return Ok(forward(needs)),
                Err(fault) if extents.is_empty() => return Err(fault),
                Ok(_) | Err(_) => break,
            }
            at = extents.last().map_or(range.end(), |last| last.range.end());
        }
        Ok(Step::Ready(extents))
    }

    fn lookup_table(
        &mut self,
        l1: u64,
        range: ByteRange,
        most: usize,
        extents: &mut Vec<Extent>,
    ) -> Result<(), Fault> {
        for piece in range.pieces(self.geometry.bytes()) {
            let l2 = self.geometry.l2_index(GuestOffset(piece.start()));
            match self.entry(l1, l2)? {
                L2Entry::Cluster(cluster) => self.push_cluster(cluster, piece, extents),
                L2Entry::Compressed(stream) => {
                    push(extents, Extent { range: piece, place: Place::Compressed(stream) });
                }
            }
            if extents.len() > most {
                extents.truncate(most);
                return Ok(());
            }
        }
        Ok(())
    }

    /// Tells the part `range` of a cluster that is not compressed, subcluster by subcluster.
    fn push_cluster(&self, cluster: Cluster, range: ByteRange, extents: &mut Vec<Extent>) {
        let start = range.start() & !(self.geometry.bytes() - 1);
        let sub_bytes = self.geometry.subcluster_bytes();
        let mut at = range.start();
        while at < range.end() {
            // At most 32 subclusters.
            let first = u32::try_from((at - start) / sub_bytes).unwrap_or(0);
            let (sub, count) = cluster.run_at(first);
            let end = (start + u64::from(first + count) * sub_bytes).min(range.end());
            let kept = cluster.host.map(|host| HostOffset(host.at.0 + (at - start)));
            let place = match (sub, cluster.host) {
                (Sub::Data, Some(Hosted { at: host, exclusive })) => {
                    Place::Data { host: HostOffset(host.0 + (at - start)), exclusive }
                }
                (Sub::Zero, _) => Place::Zero { host: kept },
                (Sub::Unallocated, _) | (Sub::Data, None) => Place::Unallocated { host: kept },
            };
            push(extents, Extent { range: ByteRange::between(at, end), place });
            at = end;
        }
    }

    /// The guest bytes that the table of an L1 entry maps.
    pub(crate) fn table_range(&self, l1: u64) -> ByteRange {
        let start = self.geometry.guest_range(l1, 0).start();
        ByteRange::between(start, start.saturating_add(self.geometry.l2_coverage()))
    }

    /// The state of a table that is in memory or nowhere, or the order to load it.
    pub(crate) fn load_state(&mut self, l1: u64) -> Result<Step<TableState>, Fault> {
        if let Some(table) = self.tables.get_mut(&l1) {
            table.age.touch();
            let (owned, shared) = (TableState::Owned(table.at), TableState::Shared(table.at));
            return Ok(Step::Ready(if table.exclusive { owned } else { shared }));
        }
        Ok(match self.l1_entry(l1)? {
            L1Entry::Absent => Step::Ready(TableState::Absent),
            L1Entry::Table(Hosted { at, .. }) => Step::Load(Table::L2 { l1, at }),
        })
    }

    /// The L1 table as it is in memory.
    pub(crate) fn l1_bytes(&self) -> Vec<u8> {
        big_endian(&self.l1)
    }

    /// An L1 entry points at no table any more, and its table, which was in memory, is forgotten. Gives its place.
    pub(crate) fn forget_table(&mut self, l1: u64) -> Option<HostOffset> {
        let at = self.tables.remove(&l1)?.at;
        self.share.set(self.tables.len());
        if let Some(entry) = self.l1.get_mut(index(l1)) {
            *entry = L1Entry::Absent.encode();
            self.dirty_l1.insert(l1);
        }
        Some(at)
    }

    /// The L1 table lies at `at` now, with room for `entries`: as it is, and nothing behind.
    pub(crate) fn move_l1(&mut self, at: HostOffset, entries: u64) {
        self.l1_at = at;
        self.l1.resize(index(entries).max(self.l1.len()), 0);
    }

    /// Whether the L1 entry points at no table.
    pub(crate) fn is_absent(&self, l1: u64) -> bool {
        self.l1.get(index(l1)).is_none_or(|raw| *raw == 0)
    }

    /// Whether the table of an L1 entry lies at `at` and is not in memory.
    pub(crate) fn is_missing(&self, l1: u64, at: HostOffset) -> bool {
        !self.tables.contains_key(&l1)
            && matches!(self.l1_entry(l1), Ok(L1Entry::Table(hosted)) if hosted.at == at)
    }

    fn l1_entry(&self, l1: u64) -> Result<L1Entry, Fault> {
        let raw = self.l1.get(index(l1)).copied().unwrap_or(0);
        L1Entry::decode(raw, self.geometry)
            .map_err(|what| Fault::Corrupt { at: HostOffset(self.l1_at.0 + l1 * 8), what })
    }

    /// Where the L2 tables lie, as far as the entries make sense.
    pub(crate) fn table_places(&self) -> impl Iterator<Item = HostOffset> {
        let set = self.l1.iter().filter(|raw| **raw != 0);
        set.filter_map(|raw| match L1Entry::decode(*raw, self.geometry) {
            Ok(L1Entry::Table(hosted)) => Some(hosted.at),
            Ok(L1Entry::Absent) | Err(_) => None,
        })
    }

    /// How entries are read and written.
    pub(crate) fn format(&self) -> EntryFormat {
        self.format
    }

    /// Where an L1 entry lies, for messages.
    pub(crate) fn l1_entry_at(&self, l1: u64) -> HostOffset {
        HostOffset(self.l1_at.0 + l1 * 8)
    }

    /// Where an entry of a table in memory lies, for messages.
    pub(crate) fn entry_at(&self, l1: u64, l2: u64) -> HostOffset {
        let start = self.tables.get(&l1).map_or(0, |table| table.at.0);
        HostOffset(start + l2 * self.geometry.l2_entry_bytes())
    }

    /// An entry of a table that is in memory; unallocated where it is not.
    pub(crate) fn entry(&self, l1: u64, l2: u64) -> Result<L2Entry, Fault> {
        let fault = |what| Fault::Corrupt { at: self.entry_at(l1, l2), what };
        let at = index(l2) * self.format.words();
        let word = |at: usize| {
            let entries = self.tables.get(&l1).map(|table| table.entries.as_slice());
            entries.and_then(|entries| entries.get(at)).copied().unwrap_or(0)
        };
        let bitmap = if self.format.words() > 1 { word(at + 1) } else { 0 };
        let entry = self.format.decode(word(at), bitmap).map_err(fault)?;
        if self.format.external_data
            && let L2Entry::Cluster(Cluster { host: Some(Hosted { at: host, .. }), .. }) = entry
        {
            let guest = self.geometry.guest_range(l1, l2).start();
            if host.0 != guest {
                return Err(fault(Corruption::NotAtGuestOffset { host, guest }));
            }
        }
        Ok(entry)
    }

    /// Changes an entry of a table that is in memory.
    pub(crate) fn set_entry(&mut self, l1: u64, l2: u64, entry: L2Entry) {
        let Some(table) = self.tables.get_mut(&l1) else { return };
        let words = self.format.words();
        let at = index(l2) * words;
        if let Some(slot) = table.entries.get_mut(at..at + words) {
            slot.copy_from_slice(&self.format.encode(entry)[..words]);
            table.dirty = Some(join(table.dirty.take(), at * 8..(at + words) * 8));
        }
    }

    /// Puts a table that was read from disk into memory, unless it is there.
    ///
    /// # Errors
    /// [`Corruption::Truncated`] for bytes that are no whole table.
    pub(crate) fn insert_loaded(
        &mut self,
        l1: u64,
        at: HostOffset,
        bytes: &[u8],
    ) -> Result<(), Fault> {
        let entries: Vec<u64> = from_big_endian(bytes);
        if entries.len() as u64 * 8 != self.geometry.bytes() {
            return Err(Fault::Corrupt { at, what: Corruption::Truncated { what: "an L2 table" } });
        }
        let L1Entry::Table(hosted) = self.l1_entry(l1)? else { return Ok(()) };
        self.tables.entry(l1).or_insert(L2Table {
            at,
            exclusive: hosted.exclusive,
            entries,
            dirty: None,
            writing: None,
            fresh: false,
            pins: 0,
            age: Age::loaded(),
        });
        self.share.set(self.tables.len());
        Ok(())
    }

    /// Gives an L1 entry a table of its own at `at`: empty, or a copy of the shared one that is in memory.
    pub(crate) fn insert_new(&mut self, l1: u64, at: HostOffset) {
        let empty = || vec![0; index(self.geometry.bytes() / 8)];
        let (mut entries, pins) =
            self.tables.remove(&l1).map_or_else(|| (empty(), 0), |old| (old.entries, old.pins));
        // What a shared table points at is shared, too; clusters of a data file have one user whatever happens.
        if !self.format.external_data {
            for words in entries.chunks_exact_mut(self.format.words()) {
                let bitmap = words.get(1).copied().unwrap_or(0);
                let decoded = words.first().map(|raw| self.format.decode(*raw, bitmap));
                if let Some(Ok(L2Entry::Cluster(mut cluster))) = decoded
                    && let Some(host) = &mut cluster.host
                {
                    host.exclusive = false;
                    let encoded = self.format.encode(L2Entry::Cluster(cluster));
                    words.copy_from_slice(&encoded[..words.len()]);
                }
            }
        }
        let dirty = Some(0..entries.len() * 8);
        let table = L2Table {
            at,
            exclusive: true,
            entries,
            dirty,
            writing: None,
            fresh: true,
            pins,
            age: Age::loaded(),
        };
        self.tables.insert(l1, table);
        self.share.set(self.tables.len());
        if let Some(entry) = self.l1.get_mut(index(l1)) {
            *entry = L1Entry::Table(Hosted::exclusive(at)).encode();
            self.dirty_l1.insert(l1);
        }
    }

    /// Keeps a table in memory until [`Mapping::unpin`].
    pub(crate) fn pin(&mut self, l1: u64) {
        if let Some(table) = self.tables.get_mut(&l1) {
            table.pins += 1;
        }
    }

    /// The counterpart of [`Mapping::pin`].
    pub(crate) fn unpin(&mut self, l1: u64) {
        if let Some(table) = self.tables.get_mut(&l1) {
            table.pins = table.pins.saturating_sub(1);
        }
    }

    /// Whether a flush has something to write.
    pub(crate) fn is_dirty(&self) -> bool {
        !self.dirty_l1.is_empty() || self.tables.values().any(|table| table.dirty.is_some())
    }

    /// The bytes of tables that may not be forgotten.
    pub(crate) fn dirty_bytes(&self) -> u64 {
        let dirty = self.tables.values().filter(|table| !table.is_clean()).count() as u64;
        dirty * self.geometry.bytes()
    }

    /// Takes what must be written: tables that nothing on disk points at yet first, then, after a sync, changes of
    /// tables in place and the L1 entries.
    pub(crate) fn capture(&mut self) -> (Vec<MetaWrite>, Vec<MetaWrite>, CapturedMapping) {
        let (mut first, mut last) = (Vec::new(), Vec::new());
        let mut captured = CapturedMapping::default();
        for (l1, table) in &mut self.tables {
            let Some(dirty) = table.dirty.take() else { continue };
            let dirty = write_units(dirty, table.entries.len() * 8);
            let entries = &table.entries[dirty.start / 8..dirty.end / 8];
            let write = MetaWrite {
                at: HostOffset(table.at.0 + dirty.start as u64),
                bytes: big_endian(entries),
            };
            if table.fresh {
                first.push(write)
            } else {
                last.push(write)
            }
            table.writing = Some(dirty);
            captured.tables.push(*l1);
        }
        captured.l1 = std::mem::take(&mut self.dirty_l1);
        last.extend(entry_writes(self.l1_at, &self.l1, captured.l1.iter().copied()));
        (first, last, captured)
    }

    /// What was captured is on disk.
    pub(crate) fn landed(&mut self, captured: &CapturedMapping) {
        for l1 in &captured.tables {
            if let Some(table) = self.tables.get_mut(l1) {
                table.writing = None;
                table.fresh &= self.dirty_l1.contains(l1);
            }
        }
    }

    /// What was captured may or may not be on disk: it has to be written again. If new tables are `linked`, they are
    /// there, and entries on disk may point at them: from now on they are changed as others are, after all that they
    /// name.
    pub(crate) fn revert(&mut self, captured: &mut CapturedMapping, linked: bool) {
        for l1 in &captured.tables {
            if let Some(table) = self.tables.get_mut(l1)
                && let Some(writing) = table.writing.take()
            {
                table.dirty = Some(join(table.dirty.take(), writing));
                table.fresh &= !linked || self.dirty_l1.contains(l1);
            }
        }
        self.dirty_l1.append(&mut captured.l1);
    }

    /// The tables that may be forgotten, with their ranks.
    pub(crate) fn oldest(&mut self) -> Vec<(u64, u64)> {
        let clean = self.tables.iter_mut().filter(|(_, table)| table.is_clean());
        clean.filter_map(|(l1, table)| Some((table.age.rank()?, *l1))).collect()
    }

    /// Forgets a table, if it may be forgotten.
    pub(crate) fn forget(&mut self, l1: u64) {
        if self.tables.get(&l1).is_some_and(L2Table::is_clean) {
            self.tables.remove(&l1);
            self.share.set(self.tables.len());
        }
    }
}

/// The same need, for another answer.
pub(crate) fn forward<T, U>(step: Step<T>) -> Step<Vec<U>> {
    match step {
        Step::Ready(_) => Step::Ready(Vec::new()),
        Step::Load(table) => Step::Load(table),
        Step::Grow(to) => Step::Grow(to),
    }
}

/// A table as it lies in memory; a last incomplete entry is left out.
pub(crate) fn from_big_endian(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect()
}

fn push(extents: &mut Vec<Extent>, next: Extent) {
    if let Some(last) = extents.last_mut()
        && continues(last, next.place)
    {
        last.range = ByteRange::between(last.range.start(), next.range.end());
        return;
    }
    extents.push(next);
}

fn continues(last: &Extent, next: Place) -> bool {
    match (last.place, next) {
        (
            Place::Data { host, exclusive },
            Place::Data { host: next_host, exclusive: next_exclusive },
        ) => exclusive == next_exclusive && host.0 + last.range.len() == next_host.0,
        (Place::Unallocated { host }, Place::Unallocated { host: next })
        | (Place::Zero { host }, Place::Zero { host: next }) => match (host, next) {
            (None, None) => true,
            (Some(host), Some(next)) => host.0 + last.range.len() == next.0,
            _ => false,
        },
        // Two clusters may have one stream, and each begins at its own start.
        _ => false,
    }
}
