//! Why a run failed: which disk, which end of it, where on it. The cause stays in `source()`.

use std::error::Error as StdError;
use std::fmt;
use std::path::PathBuf;

use block::ByteRange;

/// What a layer below said.
pub type Cause = Box<dyn StdError + Send + Sync>;

/// Names a disk in messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskId {
    /// [`crate::DiskJob::index`].
    pub index: u32,
    /// [`crate::DiskJob::key`].
    pub key: i64,
}

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "disk {} (key {})", self.index, self.key)
    }
}

/// Why a run failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// A run without disks.
    #[error("a run needs at least one disk")]
    NoDisks,
    /// A run without a job id: its change ids could not be recorded.
    #[error("a run needs a job id")]
    NoJobId,
    /// Two disks with one index or key.
    #[error("{disk} is named twice")]
    DuplicateDisk {
        /// The second of them.
        disk: DiskId,
    },
    /// The source does not open.
    #[error("{}cannot open the source {source_name}: {cause}", prefix(*.disk))]
    OpenSource {
        /// The disk; `None` where a source was only asked what it is.
        disk: Option<DiskId>,
        /// The source as it is spelled.
        source_name: String,
        /// Why.
        #[source]
        cause: Cause,
    },
    /// The target cannot be connected to.
    #[error("{disk}: cannot connect to the target {target}: {cause}")]
    ConnectTarget {
        /// The disk.
        disk: DiskId,
        /// The target as it is spelled.
        target: String,
        /// Why.
        #[source]
        cause: Cause,
    },
    /// The target does not take writes.
    #[error("{disk}: the target {target} is read-only")]
    TargetReadOnly {
        /// The disk.
        disk: DiskId,
        /// The target as it is spelled.
        target: String,
    },
    /// Source and target differ in size; nothing was sent.
    #[error(
        "{disk}: the source {source_name} has {source_bytes} bytes, the target {target} {target_bytes}"
    )]
    SizeMismatch {
        /// The disk.
        disk: DiskId,
        /// The source as it is spelled.
        source_name: String,
        /// The size of the source.
        source_bytes: u64,
        /// The target as it is spelled.
        target: String,
        /// The size of the target.
        target_bytes: u64,
    },
    /// The source failed while it was read or asked where its data is.
    #[error("{disk}: cannot read {range} of {source_name}: {cause}")]
    ReadSource {
        /// The disk.
        disk: DiskId,
        /// The source as it is spelled.
        source_name: String,
        /// What was asked for.
        range: ByteRange,
        /// Why.
        #[source]
        cause: Cause,
    },
    /// The target failed to take data or zeros.
    #[error("{disk}: cannot write {range} of {target}: {cause}")]
    WriteTarget {
        /// The disk.
        disk: DiskId,
        /// The target as it is spelled.
        target: String,
        /// What was to be written.
        range: ByteRange,
        /// Why.
        #[source]
        cause: Cause,
    },
    /// The target failed to make durable what it had taken.
    #[error("{disk}: cannot flush {target}: {cause}")]
    FlushTarget {
        /// The disk.
        disk: DiskId,
        /// The target as it is spelled.
        target: String,
        /// Why.
        #[source]
        cause: Cause,
    },
    /// The digests of the new state cannot be kept, or those of the old one stopped being readable half way.
    #[error("{disk}: cannot keep digests in {}: {cause}", path.display())]
    State {
        /// The disk.
        disk: DiskId,
        /// The digest file or its directory.
        path: PathBuf,
        /// Why.
        #[source]
        cause: Cause,
    },
    /// The run was asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// The task of a disk died of a bug.
    #[error("the run ended unexpectedly: {cause}")]
    Panicked {
        /// What is known.
        #[source]
        cause: Cause,
    },
    /// A part of a disk's run died of a bug.
    #[error("{disk}: the run ended unexpectedly: {cause}")]
    Died {
        /// The disk.
        disk: DiskId,
        /// What is known.
        #[source]
        cause: Cause,
    },
}

fn prefix(disk: Option<DiskId>) -> String {
    disk.map_or_else(String::new, |disk| format!("{disk}: "))
}
