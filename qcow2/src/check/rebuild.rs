//! A new refcount table with new blocks, for an image whose own cannot be used. They are written into clusters that
//! nothing references and count from one write of the header's first sector on.

use std::collections::BTreeMap;

use block::HostFile;

use crate::check::compare::scattered;
use crate::check::report::Refusal;
use crate::error::Error;
use crate::header::{Header, MAX_REFCOUNT_TABLE_BYTES};
use crate::refcount::{RefcountWidth, big_endian};
use crate::switch::switch_header;
use crate::tally::{Counts, Finding, Roots, Tally, TooScattered};
use crate::units::{ClusterGeometry, HostCluster, HostOffset, Run, index};

/// Makes the refcounts of an image anew. `old` is the tally with the old refcount structures in it.
///
/// # Errors
/// [`Error::Host`]; before the header is switched, the image is as it was.
pub(super) async fn rebuild(
    file: &HostFile,
    header: &Header,
    old: &Tally,
) -> Result<Result<Header, Refusal>, Error> {
    let mut known = |_: Finding, _: u64| {};
    let mut roots = Roots::read(file, header, &mut known).await?;
    roots.refcount_table.entries = 0;
    let tally = Tally::take(file, &roots, &mut known).await?;
    let width = RefcountWidth::new(header.refcount_order).unwrap_or(RefcountWidth::DEFAULT);
    let plan = Plan::make(header.geometry, width, tally.counts, old);
    let plan = match plan.map_err(|_| scattered(file))? {
        Ok(plan) => plan,
        Err(refusal) => return Ok(Err(refusal)),
    };
    plan.write(file).await?;
    file.sync().await?;
    let mut new = header.clone();
    let clusters = u32::try_from(plan.table.count).unwrap_or(u32::MAX);
    new.move_refcount_table(header.geometry.host_offset(plan.table.start), clusters);
    switch_header(file, header, &mut new).await?;
    Ok(Ok(new))
}

/// Where the new structures go.
struct Plan {
    geometry: ClusterGeometry,
    width: RefcountWidth,
    /// All references, with those of the new structures.
    counts: Counts,
    table: Run,
    /// The cluster of every block.
    blocks: BTreeMap<u64, HostCluster>,
}

impl Plan {
    fn make(
        geometry: ClusterGeometry,
        width: RefcountWidth,
        mut counts: Counts,
        old: &Tally,
    ) -> Result<Result<Self, Refusal>, TooScattered> {
        let per_block = width.per_block(geometry);
        let mut wanted: Vec<u64> = Vec::new();
        for (cluster, _) in counts.iter() {
            let block = cluster.0 / per_block;
            if wanted.last() != Some(&block) {
                wanted.push(block);
            }
        }
        let length = table_clusters(geometry, per_block, old.counts.end(), wanted.len() as u64);
        if length.saturating_mul(geometry.bytes()) > MAX_REFCOUNT_TABLE_BYTES {
            return Ok(Err(Refusal::NoRoom));
        }
        let fits = gaps(&old.counts).find(|gap| gap.count >= length);
        let Some(Run { start, .. }) = fits else { return Ok(Err(Refusal::NoRoom)) };
        let table = Run { start, count: length };
        counts.add(table, 1)?;
        wanted.extend(table.clusters().map(|cluster| cluster.0 / per_block));
        let mut room = gaps(&old.counts)
            .flat_map(Run::clusters)
            .filter(|cluster| !table.overlaps(Run::one(*cluster)));
        let mut blocks = BTreeMap::new();
        while let Some(block) = wanted.pop() {
            if blocks.contains_key(&block) {
                continue;
            }
            let Some(cluster) = room.next() else { return Ok(Err(Refusal::NoRoom)) };
            counts.add(Run::one(cluster), 1)?;
            blocks.insert(block, cluster);
            wanted.push(cluster.0 / per_block);
        }
        Ok(Ok(Self { geometry, width, counts, table, blocks }))
    }

    /// Writes blocks and table. Nothing on disk points at them yet.
    async fn write(&self, file: &HostFile) -> Result<(), Error> {
        let per_block = self.width.per_block(self.geometry);
        let mut table = vec![0; index(self.table.count * self.geometry.bytes() / 8)];
        for (block, cluster) in &self.blocks {
            let mut bytes = vec![0; index(self.geometry.bytes())];
            let start = block * per_block;
            let counted = self.counts.between(HostCluster(start), HostCluster(start + per_block));
            for (at, count) in counted {
                self.width.set(&mut bytes, at.0 - start, count.min(self.width.max()));
            }
            let HostOffset(at) = self.geometry.host_offset(*cluster);
            file.write(at, bytes.into(), None).await?;
            if let Some(entry) = table.get_mut(index(*block)) {
                *entry = at;
            }
        }
        let at = self.geometry.host_offset(self.table.start);
        file.write(at.0, big_endian(&table).into(), None).await?;
        Ok(())
    }
}

/// The clusters that a table needs at most, for blocks that are known to be needed and those for itself and for them.
fn table_clusters(
    geometry: ClusterGeometry,
    per_block: u64,
    end: HostCluster,
    known_blocks: u64,
) -> u64 {
    let mut length = 1;
    loop {
        // New structures may begin at the end, and then need blocks of their own.
        let more = length + known_blocks;
        let more = more + more.div_ceil(per_block - 1) + 2;
        let entries = (end.0 + more).div_ceil(per_block);
        let needed = geometry.clusters(entries * 8);
        if needed <= length {
            return length;
        }
        length = needed;
    }
}

/// The runs of clusters that nothing references; the last has no end.
fn gaps(counts: &Counts) -> impl Iterator<Item = Run> + '_ {
    let mut from = HostCluster(1);
    let last = Run { start: HostCluster(u64::MAX >> 10), count: 0 };
    let used = counts.iter().map(|(cluster, _)| cluster).chain([last.start]);
    used.filter_map(move |cluster| {
        let gap = Run { start: from, count: cluster.0.saturating_sub(from.0) };
        from = HostCluster((cluster.0 + 1).max(from.0));
        (gap.count > 0).then_some(gap)
    })
}
