//! Zero flags that a new state of the metadata cannot have, because its version knows none: they become data where a
//! backing file would show through, and nothing elsewhere. In the tables of the disk and in those of snapshots.

use block::ByteRange;
use bytes::Bytes;

use super::{NewState, Work};
use crate::change::ChangeError;
use crate::cipher::CIPHER_SECTOR_BYTES;
use crate::data::write_data;
use crate::error::{Error, Fault, Feature, TableKind};
use crate::fields::{EntryFields, EntryKind, HOST_OFFSET, ZERO, halves};
use crate::mapping::from_big_endian;
use crate::refcount::big_endian;
use crate::snapshot::SnapshotEntry;
use crate::tally::{TablePlace, TableUse};
use crate::units::{HostCluster, HostOffset, Run, index};

/// The longest write of encrypted zeros, in bytes.
const ZEROS_BYTES: u64 = 1 << 20;

/// The most bytes of L1 tables, those of all snapshots together, that are gone through.
const MAX_EXPANDED_L1_BYTES: u64 = 1 << 30;

/// The L2 entries of a state that loses its zero flags.
const FIELDS: EntryFields = EntryFields { extended: false, external_data: false };

/// How zero flags are expanded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Expand {
    /// The backing file may show through up to here, in guest bytes; 0 where there is none.
    pub below_bytes: u64,
    /// How compressed clusters are compressed: the version to come knows 0 alone.
    pub compression_type: u8,
}

impl Work<'_> {
    /// Makes sure that every L2 table maps one part of the disk, so that it is expanded once, and that all L1 tables
    /// together are of a size that can be gone through.
    ///
    /// # Errors
    /// [`Feature::TableAtTwoPlaces`] and [`Feature::TableTooLarge`].
    pub(super) async fn check_places(&self, state: &NewState) -> Result<(), Error> {
        let place = |entry: &SnapshotEntry| TablePlace {
            at: entry.l1_at,
            entries: u64::from(entry.l1_entries),
        };
        let trees: Vec<_> = state.snapshots.iter().map(place).chain([state.tree]).collect();
        let bytes = trees.iter().fold(0u64, |sum, tree| sum.saturating_add(tree.bytes()));
        if bytes > MAX_EXPANDED_L1_BYTES {
            let (table, limit) = (TableKind::SnapshotL1, MAX_EXPANDED_L1_BYTES);
            let feature = Feature::TableTooLarge { table, bytes, limit };
            return Err(self.inner.fault(Fault::Unsupported(feature)));
        }
        let mut places: Vec<Option<u32>> = vec![None; self.tables.len()];
        for tree in trees {
            let range = ByteRange::between(tree.at.0, tree.at.0.saturating_add(tree.bytes()));
            for (number, entry) in (0u32..).zip(from_big_endian(&self.live.file.read(range).await?))
            {
                let Some((table, TableUse { at, .. })) = self.table(entry) else { continue };
                let Some(known) = places.get_mut(table) else { continue };
                if known.is_some_and(|known| known != number) {
                    let feature = Feature::TableAtTwoPlaces { at };
                    return Err(self.inner.fault(Fault::Unsupported(feature)));
                }
                *known = Some(number);
            }
        }
        Ok(())
    }

    /// Expands the tables of all snapshots, whose L1 tables get new places where they change.
    pub(super) async fn expand_snapshots(
        &mut self,
        snapshots: &mut [SnapshotEntry],
        expand: Expand,
    ) -> Result<(), Error> {
        for snapshot in snapshots {
            let bytes = u64::from(snapshot.l1_entries) * 8;
            let range =
                ByteRange::between(snapshot.l1_at.0, snapshot.l1_at.0.saturating_add(bytes));
            let old = from_big_endian(&self.live.file.read(range).await?);
            let mut l1 = old.clone();
            for (number, entry) in (0u64..).zip(&mut l1) {
                if self.table(*entry).is_none() {
                    continue;
                }
                let (at, bytes) = self.read_table(*entry).await?;
                let (place, bytes, is_new) = self.expanded(number, at, bytes, expand).await?;
                let place = if is_new {
                    let copy = self.take(1)?;
                    self.inner.check(self.ledger.remove(Run::one(place)))?;
                    self.write(vec![(self.at(copy), bytes)]).await?;
                    self.copies.insert((at, number), copy.start);
                    copy.start
                } else {
                    place
                };
                if place != at {
                    *entry = self.at(Run::one(place));
                }
            }
            if l1 != old {
                let clusters = self.geometry.clusters(bytes);
                let left =
                    Run { start: self.geometry.host_cluster(snapshot.l1_at), count: clusters };
                let run = self.take(clusters)?;
                self.inner.check(self.ledger.remove(left))?;
                self.write(vec![(self.at(run), Bytes::from(big_endian(&l1)))]).await?;
                snapshot.l1_at = self.geometry.host_offset(run.start);
            }
        }
        Ok(())
    }

    /// The L2 table at `old`, for L1 entry `l1`, without zero flags: where it lies, what it holds, and whether that is
    /// still to be written elsewhere. What it names is counted.
    pub(super) async fn expanded(
        &mut self,
        l1: u64,
        old: HostCluster,
        bytes: Bytes,
        expand: Expand,
    ) -> Result<(HostCluster, Bytes, bool), Error> {
        if let Some(copy) = self.copies.get(&(old, l1)).copied() {
            // Another snapshot has it, too: they share what it became.
            let (_, new) = self.read_table(self.at(Run::one(copy))).await?;
            self.recount(&bytes, &new)?;
            self.inner.check(self.ledger.remove(Run::one(old)))?;
            self.inner.check(self.ledger.add(Run::one(copy)))?;
            return Ok((copy, new, false));
        }
        let cluster = self.geometry.bytes();
        let first = l1 * self.geometry.l2_entries() * cluster;
        let mut entries = from_big_endian(&bytes);
        let mut needed = Vec::new();
        let mut any = false;
        for (place, entry) in entries.iter_mut().enumerate() {
            if FIELDS.kind(*entry) == EntryKind::Compressed {
                if expand.compression_type != 0 {
                    let what = "compressed clusters of a later kind";
                    return Err(self.inner.refuse(ChangeError::NotInVersion2 { what }));
                }
                continue;
            }
            if *entry & ZERO == 0 {
                continue;
            }
            any = true;
            *entry = 0;
            if first.saturating_add(place as u64 * cluster) < expand.below_bytes {
                needed.push(place);
            }
        }
        if !any {
            return Ok((old, bytes, false));
        }
        if !needed.is_empty() {
            let run = self.inner.check(self.room.take(needed.len() as u64))?;
            self.write_zeros(run).await?;
            for (place, cluster) in needed.into_iter().zip(run.clusters()) {
                if let Some(entry) = entries.get_mut(place) {
                    *entry = self.geometry.host_offset(cluster).0;
                }
            }
        }
        let new = Bytes::from(big_endian(&entries));
        self.recount(&bytes, &new)?;
        Ok((old, new, true))
    }

    /// Counts what one more user of a table names that had zero flags, and has none.
    fn recount(&mut self, old: &Bytes, new: &Bytes) -> Result<(), Error> {
        for (old, new) in old.chunks_exact(8).zip(new.chunks_exact(8)) {
            let ((old, _), (new, _)) = (halves(old), halves(new));
            if FIELDS.kind(old) == EntryKind::Compressed || old & ZERO == 0 {
                continue;
            }
            if let EntryKind::Hosted(host) = FIELDS.kind(old) {
                let cluster = self.geometry.host_cluster(HostOffset(host));
                self.inner.check(self.ledger.remove(Run::one(cluster)))?;
            }
            if new != 0 {
                let cluster = self.geometry.host_cluster(HostOffset(new & HOST_OFFSET));
                self.inner.check(self.ledger.add(Run::one(cluster)))?;
            }
        }
        Ok(())
    }

    /// Fills clusters that were taken with guest data that reads as zeros.
    async fn write_zeros(&self, run: Run) -> Result<(), Error> {
        // Makes room, and tells how far the file is written.
        self.write(Vec::new()).await?;
        let range = self.geometry.host_range(run);
        if self.live.cipher.is_none() {
            return Ok(self.live.file.write_zeroes(range, self.hold.clone()).await?);
        }
        for piece in range.pieces(ZEROS_BYTES.next_multiple_of(CIPHER_SECTOR_BYTES)) {
            let zeros = Bytes::from(vec![0; index(piece.len())]);
            write_data(self.live, HostOffset(piece.start()), zeros, &self.hold).await?;
        }
        Ok(())
    }
}
