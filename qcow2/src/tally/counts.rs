//! How often every host cluster is referenced: sparse, and small where references lie beside each other. What the
//! references are is known to the walk that counts them.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::refcount::RefcountWidth;
use crate::units::{HostCluster, Run, index};

/// The most memory that the counts of one image take, in bytes: enough for 64 TiB of 64 KiB clusters with a few
/// snapshots. Only references that are scattered on purpose need more.
pub(crate) const MAX_COUNTS_BYTES: u64 = 320 << 20;
/// Clusters that are counted together.
const CHUNK_CLUSTERS: u64 = 4096;
/// A chunk with more references than this is packed.
const MAX_SINGLE_COUNTS: usize = 64;
/// What a chunk costs beside its counts, about, in bytes.
const CHUNK_OVERHEAD_BYTES: u64 = 96;

/// The references are scattered so widely that counting them takes more memory than they may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooScattered;

/// Counts by host cluster; 0 where nothing was added.
#[derive(Debug)]
pub(crate) struct Counts {
    chunks: BTreeMap<u64, Chunk>,
    bytes: u64,
    limit_bytes: u64,
}

impl Default for Counts {
    fn default() -> Self {
        Self::within(MAX_COUNTS_BYTES)
    }
}

/// The counts of [`CHUNK_CLUSTERS`] clusters.
#[derive(Debug)]
enum Chunk {
    /// Place in the chunk and count, sorted.
    Few(Vec<(u16, u64)>),
    /// All of them, in the narrowest width that holds the largest.
    Packed { width: RefcountWidth, bytes: Vec<u8> },
}

impl Counts {
    /// No counts yet, which may take so much memory.
    pub(crate) const fn within(limit_bytes: u64) -> Self {
        Self { chunks: BTreeMap::new(), bytes: 0, limit_bytes }
    }

    /// Adds `times` to every cluster of a run. Counts saturate.
    ///
    /// # Errors
    /// [`TooScattered`]; then some of the run may have been added.
    pub(crate) fn add(&mut self, run: Run, times: u64) -> Result<(), TooScattered> {
        let mut at = run.start.0;
        while at < run.end().0 {
            let chunk_at = at / CHUNK_CLUSTERS;
            let end = run.end().0.min((chunk_at + 1) * CHUNK_CLUSTERS);
            let chunk = self.chunks.entry(chunk_at).or_insert_with(|| {
                self.bytes += CHUNK_OVERHEAD_BYTES;
                Chunk::Few(Vec::with_capacity(1))
            });
            let before = chunk.heap_bytes();
            if end - at == CHUNK_CLUSTERS && times == 1 && chunk.is_empty() {
                *chunk = Chunk::all_once();
            } else {
                for slot in at % CHUNK_CLUSTERS..at % CHUNK_CLUSTERS + (end - at) {
                    chunk.add(u16::try_from(slot).unwrap_or(u16::MAX), times);
                }
            }
            self.bytes = self.bytes + chunk.heap_bytes() - before;
            if self.bytes > self.limit_bytes {
                return Err(TooScattered);
            }
            at = end;
        }
        Ok(())
    }

    /// The count of a cluster.
    pub(crate) fn get(&self, cluster: HostCluster) -> u64 {
        let slot = u16::try_from(cluster.0 % CHUNK_CLUSTERS).unwrap_or(u16::MAX);
        self.chunks.get(&(cluster.0 / CHUNK_CLUSTERS)).map_or(0, |chunk| chunk.get(slot))
    }

    /// The clusters from `start` up to `end` whose count is not 0, in order, with their counts.
    pub(crate) fn between(
        &self,
        start: HostCluster,
        end: HostCluster,
    ) -> impl Iterator<Item = (HostCluster, u64)> + '_ {
        let chunks = start.0 / CHUNK_CLUSTERS..end.0.div_ceil(CHUNK_CLUSTERS);
        // An empty range must not reach the map with its ends crossed.
        let chunks = chunks.start..chunks.end.max(chunks.start);
        self.chunks.range(chunks).flat_map(move |(at, chunk)| {
            let first = at * CHUNK_CLUSTERS;
            let slots = start.0.saturating_sub(first)..end.0.saturating_sub(first);
            let slots = slots.start.min(CHUNK_CLUSTERS)..slots.end.min(CHUNK_CLUSTERS);
            chunk.between(slots).map(move |(slot, count)| (HostCluster(first + slot), count))
        })
    }

    /// All clusters whose count is not 0, in order, with their counts.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (HostCluster, u64)> + '_ {
        self.between(HostCluster(0), HostCluster(u64::MAX))
    }

    /// The cluster behind the last whose count is not 0.
    pub(crate) fn end(&self) -> HostCluster {
        let last = self.chunks.iter().next_back();
        let end = last.and_then(|(at, chunk)| {
            chunk.between(0..CHUNK_CLUSTERS).last().map(|(slot, _)| at * CHUNK_CLUSTERS + slot + 1)
        });
        HostCluster(end.unwrap_or(0))
    }

    /// The memory that the counts take, about, in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Chunk {
    /// One for every cluster.
    fn all_once() -> Self {
        let width = RefcountWidth::SMALLEST;
        Self::Packed { width, bytes: vec![0xff; packed_bytes(width)] }
    }

    fn is_empty(&self) -> bool {
        matches!(self, Self::Few(counts) if counts.is_empty())
    }

    fn add(&mut self, slot: u16, times: u64) {
        match self {
            Self::Few(counts) => match counts.binary_search_by_key(&slot, |(at, _)| *at) {
                Ok(place) => {
                    if let Some((_, count)) = counts.get_mut(place) {
                        *count = count.saturating_add(times);
                    }
                }
                Err(place) if counts.len() < MAX_SINGLE_COUNTS => {
                    counts.insert(place, (slot, times));
                }
                Err(_) => {
                    self.pack();
                    self.add(slot, times);
                }
            },
            Self::Packed { width, bytes } => {
                let slot = u64::from(slot);
                let count = width.get(bytes, slot).saturating_add(times);
                while !width.set(bytes, slot, count) {
                    let Some(wider) = RefcountWidth::new(width.order() + 1) else { return };
                    *bytes = repack(bytes, *width, wider);
                    *width = wider;
                }
            }
        }
    }

    fn pack(&mut self) {
        let Self::Few(counts) = self else { return };
        let counts = std::mem::take(counts);
        let width = RefcountWidth::SMALLEST;
        *self = Self::Packed { width, bytes: vec![0; packed_bytes(width)] };
        for (slot, count) in counts {
            self.add(slot, count);
        }
    }

    fn get(&self, slot: u16) -> u64 {
        match self {
            Self::Few(counts) => {
                let place = counts.binary_search_by_key(&slot, |(at, _)| *at).ok();
                place.and_then(|place| counts.get(place)).map_or(0, |(_, count)| *count)
            }
            Self::Packed { width, bytes } => width.get(bytes, u64::from(slot)),
        }
    }

    /// The slots of a range that are not 0, with their counts.
    fn between(&self, slots: Range<u64>) -> Box<dyn Iterator<Item = (u64, u64)> + Send + '_> {
        match self {
            Self::Few(counts) => {
                let counts = counts.iter().map(|(slot, count)| (u64::from(*slot), *count));
                Box::new(counts.filter(move |(slot, _)| slots.contains(slot)))
            }
            Self::Packed { width, bytes } => {
                let counts = slots.map(|slot| (slot, width.get(bytes, slot)));
                Box::new(counts.filter(|(_, count)| *count != 0))
            }
        }
    }

    fn heap_bytes(&self) -> u64 {
        match self {
            Self::Few(counts) => counts.capacity() as u64 * 16,
            Self::Packed { bytes, .. } => bytes.len() as u64,
        }
    }
}

fn packed_bytes(width: RefcountWidth) -> usize {
    index((CHUNK_CLUSTERS << width.order()) / 8)
}

fn repack(bytes: &[u8], from: RefcountWidth, to: RefcountWidth) -> Vec<u8> {
    let mut wider = vec![0; packed_bytes(to)];
    for slot in 0..CHUNK_CLUSTERS {
        to.set(&mut wider, slot, from.get(bytes, slot));
    }
    wider
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(start: u64, count: u64) -> Run {
        Run { start: HostCluster(start), count }
    }

    #[test]
    fn a_dense_image_takes_a_bit_a_cluster() {
        let mut counts = Counts::default();
        counts.add(run(0, 1 << 24), 1).unwrap();
        assert!(counts.bytes() < (1 << 24) / 8 + (1 << 19), "{}", counts.bytes());
        assert_eq!(counts.get(HostCluster(12345)), 1);
        assert_eq!(counts.end(), HostCluster(1 << 24));
    }

    #[test]
    fn references_that_are_scattered_on_purpose_end_at_the_limit() {
        let mut counts = Counts::default();
        let far = (0u64..1 << 24).map(|at| counts.add(run(at << 20, 1), 1));
        assert!(far.into_iter().any(|added| added == Err(TooScattered)));
        assert!(counts.bytes() <= MAX_COUNTS_BYTES + (1 << 20));
    }

    proptest! {
        #[test] // Whatever is added, the counts are those of a plain map.
        fn counts_are_sums(
            adds in prop::collection::vec((0u64..20_000, 1u64..300, prop_oneof![1u64..4, 1u64..1 << 40, Just(u64::MAX)]), 0..60),
        ) {
            let mut counts = Counts::default();
            let mut model = BTreeMap::<u64, u64>::new();
            for (start, len, times) in adds {
                prop_assert_eq!(counts.add(run(start, len), times), Ok(()));
                for cluster in start..start + len {
                    let count = model.entry(cluster).or_default();
                    *count = count.saturating_add(times);
                }
            }
            let all: Vec<_> = counts.iter().map(|(cluster, count)| (cluster.0, count)).collect();
            prop_assert_eq!(&all, &model.iter().map(|(at, count)| (*at, *count)).collect::<Vec<_>>());
            let part: Vec<_> = counts.between(HostCluster(4000), HostCluster(9000)).collect();
            prop_assert!(part.iter().all(|(cluster, count)| model.get(&cluster.0) == Some(count)));
            prop_assert_eq!(part.len(), model.range(4000..9000).count());
            prop_assert_eq!(counts.end().0, model.keys().last().map_or(0, |last| last + 1));
        }
    }
}
