//! The words of the control plane: what a virtual machine, a repository and a backup are, as every module sees them.
//! No SQL, no HTTP and no behaviour beyond spelling and parsing.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// A word that is not one of those that a field may hold.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{word:?} is not a {what}; use one of: {choices}")]
pub struct UnknownWord {
    /// The field.
    pub what: &'static str,
    /// What was found in it.
    pub word: String,
    /// What may stand there.
    pub choices: &'static str,
}

/// Gives a fieldless enum its one spelling: in SQL, JSON, on the command line and in messages.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $what:literal, $($(#[$variant_doc:meta])* $variant:ident = $word:literal),+ $(,)?) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$variant_doc])* #[serde(rename = $word)] $variant,)+
        }

        impl $name {
            /// Every value, in the order of declaration.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// How it is spelt everywhere.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = UnknownWord;

            fn from_str(word: &str) -> Result<Self, UnknownWord> {
                match word {
                    $($word => Ok(Self::$variant),)+
                    _ => Err(UnknownWord {
                        what: $what,
                        word: word.to_owned(),
                        choices: concat!($($word, " "),+).trim_ascii_end(),
                    }),
                }
            }
        }
    };
}

words! {
    /// What a backup holds.
    BackupType, "backup type",
    /// Everything, standing alone.
    Full = "full",
    /// What changed since the latest point.
    Incremental = "incremental",
    /// What changed since the full.
    Differential = "differential",
}

words! {
    /// Where a backup, or one disk of it, stands.
    Status, "status",
    /// Accepted, waiting for its turn.
    Pending = "pending",
    /// In work, or cleaning up after a failure.
    Running = "running",
    /// Durable and committed: the only state in which it may become a parent.
    Completed = "completed",
    /// Given up, with a reason; nothing of it is left.
    Failed = "failed",
    /// Given up because somebody asked; nothing of it is left.
    Cancelled = "cancelled",
}

words! {
    /// Who moves the data of a virtual machine.
    AgentKind, "kind of agent",
    /// The agent's library inside the hub.
    Local = "local",
    /// An agent elsewhere that connects to the hub.
    External = "external",
}

words! {
    /// Where a repository keeps its files.
    RepositoryType, "repository type",
    /// A directory of this host.
    Local = "local",
    /// An NFS share.
    Nfs = "nfs",
    /// An SMB share.
    Cifs = "cifs",
    /// An S3 bucket.
    S3 = "s3",
    /// An Azure container.
    Azure = "azure",
}

words! {
    /// How much an entry of the job log matters.
    Level, "level",
    /// What happened.
    Info = "info",
    /// Something was not as expected, and the job went on.
    Warning = "warning",
    /// Why the job ended.
    Error = "error",
}

impl Status {
    /// Whether the job is still owed an end.
    pub const fn is_active(self) -> bool {
        matches!(self, Self::Pending | Self::Running)
    }
}

/// A virtual machine that the hub knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vm {
    /// Its identity in the database.
    pub context_id: String,
    /// Its name: any text, unique.
    pub name: String,
    /// Who reads its disks.
    pub agent: AgentKind,
    /// When it was added.
    pub created_at: Timestamp,
    /// Its disks, by index.
    pub disks: Vec<VmDisk>,
}

/// A disk of a virtual machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmDisk {
    /// Its place, from 0.
    pub index: u32,
    /// The hypervisor's key of the disk.
    pub key: i64,
    /// Where the agent reads it, as [`agent::SourceSpec`] spells it.
    pub source: String,
    /// Its size, where it is known before an agent looks.
    pub capacity_bytes: Option<u64>,
}

/// A place that keeps backups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryRow {
    /// Its identity.
    pub id: String,
    /// Its name, unique.
    pub name: String,
    /// What kind of place.
    pub kind: RepositoryType,
    /// The root directory of a local one.
    pub path: String,
    /// When it was added.
    pub created_at: Timestamp,
}

/// A backup of a virtual machine: one row of the jobs' table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backup {
    /// Its identity, opaque.
    pub id: String,
    /// Grows with every job: the order of creation, whatever the clock did.
    pub sequence: i64,
    /// The virtual machine.
    pub vm_context_id: String,
    /// Its name.
    pub vm_name: String,
    /// Where it is kept.
    pub repository_id: String,
    /// The root of that place when the job began.
    pub repository_path: String,
    /// What was asked for.
    pub backup_type: BackupType,
    /// Where it stands.
    pub status: Status,
    /// The backup that it was put on, where disk 0 has one.
    pub parent_backup_id: Option<String>,
    /// The change id of disk 0, a mirror of its row.
    pub change_id: Option<String>,
    /// Bytes that crossed the wire.
    pub bytes_transferred: u64,
    /// Bytes of all disks.
    pub total_bytes: u64,
    /// Why it failed or was cancelled.
    pub error_message: Option<String>,
    /// The last step that began.
    pub step: Option<String>,
    /// The second that names its files, unique within the virtual machine.
    pub stamp: Timestamp,
    /// When it was accepted.
    pub created_at: Timestamp,
    /// When its work began.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub completed_at: Option<Timestamp>,
}

/// One disk of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupDisk {
    /// The disk's place, from 0.
    pub index: u32,
    /// The hypervisor's key of the disk.
    pub key: i64,
    /// What its layer holds: may be a full in an incremental backup.
    pub kind: BackupType,
    /// Why it is a full although an incremental was asked for, or why everything was sent.
    pub full_reason: Option<String>,
    /// Where it stands.
    pub status: Status,
    /// The backup whose layer of this disk lies below.
    pub parent_backup_id: Option<String>,
    /// The state of the source that it holds.
    pub change_id: Option<String>,
    /// The state of the source that its parent holds.
    pub previous_change_id: Option<String>,
    /// The size of the disk.
    pub capacity_bytes: u64,
    /// The layer, relative to the repository's root.
    pub path: String,
    /// The name of the export that it was written through.
    pub export_name: String,
    /// Bytes that crossed the wire.
    pub bytes_transferred: u64,
    /// Bytes read from the source.
    pub bytes_read: u64,
    /// Bytes that the layer takes in the repository.
    pub stored_bytes: u64,
}

/// An entry of the job log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobEvent {
    /// Grows with every entry.
    pub id: i64,
    /// When.
    pub at: Timestamp,
    /// During which step.
    pub step: Option<String>,
    /// How much it matters.
    pub level: Level,
    /// What happened.
    pub message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read_back_as_it_is_spelt() {
        for status in Status::ALL {
            assert_eq!(status.as_str().parse(), Ok(*status));
            assert_eq!(serde_json::to_value(status).unwrap(), status.as_str());
        }
        for kind in BackupType::ALL {
            assert_eq!(kind.as_str().parse(), Ok(*kind));
        }
    }

    #[test]
    fn an_unknown_word_is_refused_with_the_choices() {
        let error = "complete".parse::<Status>().unwrap_err();
        assert!(error.to_string().contains("pending running completed failed cancelled"));
    }
}
