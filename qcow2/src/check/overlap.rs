//! Clusters that cannot stay shared as they are: metadata that lies over other metadata or over guest data, and what
//! more entries name than a refcount can say. Most of it shows in the refcounts; what does not is told here.

use crate::check::compare::Compared;
use crate::check::report::CheckReport;
use crate::error::TableKind;
use crate::tally::{Counts, Finding, TableUse, Tally, TooScattered};
use crate::units::{ClusterGeometry, HostCluster, Run};

/// The clusters of metadata that are used for something else, too, and all that are used too often to be counted.
#[derive(Debug, Default)]
pub(super) struct Overlaps {
    clusters: Counts,
    /// Those in which no table can stay: of more than one kind, or used too often.
    mixed: Counts,
    /// Whether refcount structures are among them.
    pub refcounts: bool,
}

impl Overlaps {
    /// Finds them, and reports them. Where the refcount is wrong, too, that has been counted already.
    pub(super) fn find(
        tally: &mut Tally,
        geometry: ClusterGeometry,
        compared: &Compared,
        report: &mut CheckReport,
    ) -> Result<Self, TooScattered> {
        let mut found = Self::default();
        let mut metadata = std::mem::take(&mut tally.metadata);
        metadata.sort_by_key(|(run, ..)| run.start);
        let mut others = metadata.into_iter().peekable();
        let mut tables = tally.tables.iter().map(|table| piece_of(*table, geometry)).peekable();
        // Both come in the order of the file.
        let mut pieces = std::iter::from_fn(|| match (others.peek(), tables.peek()) {
            (Some((other, ..)), Some((table, ..))) if other.start <= table.start => others.next(),
            (Some(_), None) => others.next(),
            _ => tables.next(),
        })
        .peekable();
        // Pieces of metadata that begin no later than the cluster at hand and end behind it.
        let mut open: Vec<(Run, TableKind, u64)> = Vec::new();
        let mut at = HostCluster(0);
        loop {
            if open.is_empty() {
                let Some((run, ..)) = pieces.peek() else { break };
                at = run.start;
            }
            while let Some(piece) = pieces.next_if(|(run, ..)| run.start == at) {
                open.push(piece);
            }
            // Up to the next start or end, all clusters have the same pieces.
            let ends = open.iter().map(|(run, ..)| run.end());
            let next = ends.chain(pieces.peek().map(|(run, ..)| run.start)).min().unwrap_or(at);
            found.judge(at, next, &open, tally, geometry, compared, report)?;
            at = next;
            open.retain(|(run, ..)| run.end() > at);
        }
        for (cluster, _) in tally.counts.iter().filter(|(_, count)| *count > compared.max) {
            found.clusters.add(Run::one(cluster), 1)?;
            found.mixed.add(Run::one(cluster), 1)?;
        }
        Ok(found)
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.clusters.bytes() == 0
    }

    /// Whether a cluster is one of them.
    pub(super) fn contains(&self, cluster: HostCluster) -> bool {
        self.clusters.get(cluster) != 0
    }

    /// Whether a table in a cluster has to go elsewhere.
    pub(super) fn is_mixed(&self, cluster: HostCluster) -> bool {
        self.mixed.get(cluster) != 0
    }

    #[expect(clippy::too_many_arguments, reason = "one step of one loop")]
    fn judge(
        &mut self,
        start: HostCluster,
        end: HostCluster,
        open: &[(Run, TableKind, u64)],
        tally: &Tally,
        geometry: ClusterGeometry,
        compared: &Compared,
        report: &mut CheckReport,
    ) -> Result<(), TooScattered> {
        let Some((_, kind, _)) = open.first().copied() else { return Ok(()) };
        let known = open.iter().fold(0u64, |sum, (_, _, times)| sum.saturating_add(*times));
        let mixed = open.iter().any(|(_, other, _)| *other != kind);
        for (cluster, references) in tally.counts.between(start, end) {
            if references <= known && !mixed {
                continue;
            }
            self.clusters.add(Run::one(cluster), 1)?;
            if mixed {
                self.mixed.add(Run::one(cluster), 1)?;
            }
            self.refcounts |= open.iter().any(|(_, kind, _)| {
                matches!(kind, TableKind::RefcountTable | TableKind::RefcountBlock)
            });
            let at = geometry.host_offset(cluster);
            let finding = Finding::Overlap { at, table: kind };
            if compared.differs(cluster) {
                report.list(finding);
            } else {
                report.add(finding, 1);
            }
        }
        Ok(())
    }
}

/// The clusters of an L2 table.
fn piece_of(table: TableUse, geometry: ClusterGeometry) -> (Run, TableKind, u64) {
    let start = geometry.host_cluster(table.at);
    let end = geometry.clusters(table.at.0 + geometry.bytes());
    (Run { start, count: end - start.0 }, TableKind::L2, table.all)
}
