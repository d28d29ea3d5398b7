//! What a check found and what a repair did about it. The numbers are those that `qemu-img check` gives.

use std::mem::{Discriminant, discriminant};

use crate::tally::{Finding, Severity};

/// The most findings of each kind that a report lists one by one, so that many of one kind do not hide another; all
/// are counted.
pub const MAX_LISTED_FINDINGS: usize = 100;

/// Why nothing, or not all, was repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Some references could not be counted: what seems free may be in use.
    #[error("not all references could be counted, so that nothing can be called free")]
    Incomplete,
    /// The refcount table must be made anew, which is more than repairing leaks.
    #[error("the refcount structures must be rebuilt, which only a full repair does")]
    NeedsRebuild,
    /// A table of guest data cannot be found: clusters that nothing seems to use may be what it led to, and stay.
    #[error("a table of guest data leads astray, and what it led to would be freed as leaked")]
    LostTable,
    /// There is no room for new refcount structures within their limits.
    #[error("new refcount structures would pass the limits of the format")]
    NoRoom,
}

/// What a check found. After a repair: what is still wrong, and what no longer is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// What is wrong, the first [`MAX_LISTED_FINDINGS`] of each kind.
    pub findings: Vec<Finding>,
    /// What a repair put right, the first [`MAX_LISTED_FINDINGS`] of each kind.
    pub repaired: Vec<Finding>,
    /// Clusters whose refcount is too high.
    pub leaks: u64,
    /// Errors that cost data, or will.
    pub corruptions: u64,
    /// Parts of the image that could not be checked.
    pub check_errors: u64,
    /// Leaks that a repair put right.
    pub leaks_fixed: u64,
    /// Corruptions that a repair put right.
    pub corruptions_fixed: u64,
    /// Why a repair was not done, or not completely.
    pub refused: Option<Refusal>,
    /// The end of the last cluster in use, in bytes.
    pub image_end_bytes: u64,
    /// The clusters of the virtual disk.
    pub total_clusters: u64,
    /// Clusters of the virtual disk that have a place.
    pub allocated_clusters: u64,
    /// Of these, those that do not lie behind the one before, and all that are compressed.
    pub fragmented_clusters: u64,
    /// Of these, the compressed ones.
    pub compressed_clusters: u64,
    /// How many of each kind are listed.
    listed: Vec<(Discriminant<Finding>, usize)>,
    repaired_listed: Vec<(Discriminant<Finding>, usize)>,
}

impl CheckReport {
    /// Whether nothing is wrong.
    pub const fn is_clean(&self) -> bool {
        self.leaks == 0 && self.is_consistent()
    }

    /// Whether nothing is wrong but leaks.
    pub const fn is_consistent(&self) -> bool {
        self.corruptions == 0 && self.check_errors == 0 && self.refused.is_none()
    }

    /// Counts a finding that is met so often.
    pub(super) fn add(&mut self, finding: Finding, times: u64) {
        let count = match finding.severity() {
            Severity::Leak => &mut self.leaks,
            Severity::Corruption => &mut self.corruptions,
            Severity::Unchecked => &mut self.check_errors,
        };
        *count = count.saturating_add(times);
        self.list(finding);
    }

    /// Lists a finding whose harm is counted by another.
    pub(super) fn list(&mut self, finding: Finding) {
        push(&mut self.findings, &mut self.listed, finding);
    }

    /// Counts a finding that was put right.
    pub(super) fn fixed(&mut self, finding: Finding) {
        let count = match finding.severity() {
            Severity::Leak => &mut self.leaks_fixed,
            Severity::Corruption | Severity::Unchecked => &mut self.corruptions_fixed,
        };
        *count += 1;
        push(&mut self.repaired, &mut self.repaired_listed, finding);
    }
}

fn push(
    list: &mut Vec<Finding>,
    counts: &mut Vec<(Discriminant<Finding>, usize)>,
    finding: Finding,
) {
    let kind = discriminant(&finding);
    let place = counts.iter().position(|(other, _)| *other == kind).unwrap_or_else(|| {
        counts.push((kind, 0));
        counts.len() - 1
    });
    if let Some((_, count)) = counts.get_mut(place)
        && *count < MAX_LISTED_FINDINGS
    {
        *count += 1;
        list.push(finding);
    }
}
