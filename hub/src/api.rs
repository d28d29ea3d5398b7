//! What the hub says over HTTP: the shapes of requests and answers, shared by the server and by `sendense-ctl`. Which
//! route gives which is in [`crate::http`].

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::model::{AgentKind, BackupType, Level, RepositoryType, Status};

/// A virtual machine to be added.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddVm {
    /// Any text, unique among virtual machines.
    pub name: String,
    /// Who reads the disks; the hub itself where it is left out.
    #[serde(default = "local_agent")]
    pub agent: AgentKind,
    /// The disks; their order is their index.
    pub disks: Vec<AddDisk>,
}

fn local_agent() -> AgentKind {
    AgentKind::Local
}

/// A disk of a virtual machine to be added.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddDisk {
    /// `file:/absolute/path`, `nbd://host:port/export` or `nbd+unix:///export?socket=PATH`.
    pub source: String,
    /// The hypervisor's key of the disk; 2000 plus its index where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<i64>,
    /// Its size; needed where an external agent reads it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity_bytes: Option<u64>,
}

/// What changed about a virtual machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeVm {
    /// The disks that changed: each is found by its key, or by its place in this list where it names none. Sources are
    /// replaced, and sizes that are given; the other disks stay as they are.
    pub disks: Vec<AddDisk>,
}

/// A virtual machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmView {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub context_id: String,
    /// Who reads its disks.
    pub agent: AgentKind,
    /// When it was added.
    pub created_at: Timestamp,
    /// Its disks.
    pub disks: Vec<VmDiskView>,
    /// What was found odd when it was added; left out where there is nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// A disk of a virtual machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmDiskView {
    /// Its place, from 0.
    pub disk_index: u32,
    /// The hypervisor's key.
    pub key: i64,
    /// Where it is read.
    pub source: String,
    /// Its size, where it was given.
    pub capacity_bytes: Option<u64>,
}

/// All virtual machines.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmList {
    /// By name.
    pub vms: Vec<VmView>,
}

/// A repository to be added.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddRepository {
    /// Any text, unique among repositories.
    pub name: String,
    /// What kind of place.
    #[serde(rename = "type", default = "local_repository")]
    pub kind: RepositoryType,
    /// The root directory, absolute.
    pub path: String,
}

fn local_repository() -> RepositoryType {
    RepositoryType::Local
}

/// A repository.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RepositoryView {
    /// Its identity.
    pub id: String,
    /// Its name.
    pub name: String,
    /// What kind of place.
    #[serde(rename = "type")]
    pub kind: RepositoryType,
    /// The root directory.
    pub path: String,
    /// The size of the file system, now.
    pub total_bytes: Option<u64>,
    /// What of it is free, now.
    pub available_bytes: Option<u64>,
    /// Whether backups can be made into it.
    pub online: bool,
    /// Why not, or what should be known about it.
    pub message: Option<String>,
    /// When it was added.
    pub created_at: Timestamp,
}

/// All repositories.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RepositoryList {
    /// By name.
    pub repositories: Vec<RepositoryView>,
}

/// A wish for a backup.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartBackup {
    /// Of which virtual machine.
    pub vm_name: String,
    /// Into which repository, by id or name; may be left out where there is only one.
    #[serde(default, alias = "repository", skip_serializing_if = "Option::is_none")]
    pub repository_id: Option<String>,
    /// What it shall hold.
    pub backup_type: BackupType,
}

/// An accepted backup.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StartedBackup {
    /// Its identity.
    pub backup_id: String,
    /// The virtual machine.
    pub vm_name: String,
    /// What it shall hold.
    pub backup_type: BackupType,
    /// Where it stands.
    pub status: Status,
    /// The state of disk 0 that it holds: known once it is completed.
    pub change_id: Option<String>,
    /// For people.
    pub message: String,
}

/// A backup in a list.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BackupSummary {
    /// Its identity.
    pub backup_id: String,
    /// The virtual machine.
    pub vm_name: String,
    /// What was asked for.
    pub backup_type: BackupType,
    /// Where it stands.
    pub status: Status,
    /// Where it is kept.
    pub repository_id: String,
    /// What disk 0 stands on.
    pub parent_backup_id: Option<String>,
    /// The state of disk 0 that it holds.
    pub change_id: Option<String>,
    /// Bytes that crossed the wire.
    pub bytes_transferred: u64,
    /// Bytes of all disks.
    pub total_bytes: u64,
    /// Why it ended without a backup.
    pub error_message: Option<String>,
    /// When it was accepted.
    pub created_at: Timestamp,
    /// When its work began.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub completed_at: Option<Timestamp>,
}

/// Backups, newest first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BackupList {
    /// Newest first.
    pub backups: Vec<BackupSummary>,
}

/// A backup with everything that is known about it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BackupView {
    /// What a list shows, too.
    #[serde(flatten)]
    pub summary: BackupSummary,
    /// The last step that began.
    pub step: Option<String>,
    /// How far it is.
    pub progress: ProgressView,
    /// Where an external agent connects.
    pub nbd: Option<NbdView>,
    /// Its disks.
    pub disks: Vec<DiskView>,
    /// Its log.
    pub events: Vec<EventView>,
}

/// How far a backup is.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct ProgressView {
    /// Bytes of all disks that have been decided about.
    pub bytes_done: u64,
    /// Bytes of all disks.
    pub bytes_total: u64,
    /// Bytes of data that crossed the wire.
    pub bytes_transferred: u64,
    /// How fast `bytes_done` grows, over the last seconds.
    pub bytes_per_second: u64,
    /// Of 100, one decimal.
    pub percent: f64,
    /// How long it will take at this rate.
    pub eta_seconds: Option<u64>,
}

/// Where the hub's NBD server listens.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NbdView {
    /// Its address.
    pub host: String,
    /// Its port.
    pub port: u16,
}

/// A disk of a backup.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DiskView {
    /// Its place, from 0.
    pub disk_index: u32,
    /// The hypervisor's key.
    pub disk_key: i64,
    /// Where it is read, as far as the virtual machine still has it.
    pub source: Option<String>,
    /// What its layer holds.
    pub kind: BackupType,
    /// Whether everything has to be sent.
    pub full: bool,
    /// Why it is a full although an incremental was asked for.
    pub full_reason: Option<String>,
    /// Where it stands.
    pub status: Status,
    /// The backup whose layer lies below.
    pub parent_backup_id: Option<String>,
    /// The state of the source that it holds.
    pub change_id: Option<String>,
    /// The state of the source that its parent holds.
    pub previous_change_id: Option<String>,
    /// The size of the disk.
    pub capacity_bytes: u64,
    /// The layer's file on the hub's host.
    pub path: String,
    /// The export that it is written through.
    pub export_name: String,
    /// Bytes that have been decided about.
    pub bytes_done: u64,
    /// Bytes of data that crossed the wire.
    pub bytes_transferred: u64,
    /// Bytes read from the source.
    pub bytes_read: u64,
    /// Bytes that the layer takes in the repository.
    pub stored_bytes: u64,
}

/// An entry of a backup's log.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EventView {
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

/// A backup's log, oldest first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EventList {
    /// Oldest first.
    pub events: Vec<EventView>,
}

/// The completed backups of a virtual machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChainView {
    /// The virtual machine.
    pub vm_name: String,
    /// What all layers together take.
    pub total_stored_bytes: u64,
    /// How many backups.
    pub total_backups: u64,
    /// In order of creation.
    pub backups: Vec<ChainLink>,
}

/// A completed backup of a chain.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChainLink {
    /// What a list shows, too.
    #[serde(flatten)]
    pub summary: BackupSummary,
    /// What its layers take.
    pub stored_bytes: u64,
    /// Its disks.
    pub disks: Vec<DiskView>,
}

/// The answer to an agent's report.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct AgentAnswer {
    /// Where the job stands.
    pub status: Status,
    /// Whether the agent shall stop.
    pub cancel: bool,
}

/// An agent's reports: one or several.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum AgentEvents {
    /// Several, oldest first.
    Many(Vec<agent::Event>),
    /// One.
    One(agent::Event),
}

/// An agent's word that its data is sent and flushed.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum AgentCompletion {
    /// All disks at once.
    Run(agent::RunReport),
    /// One disk; the job goes on once every disk was named.
    Disk {
        /// The state of the source that was sent.
        change_id: String,
        /// The disk's index.
        disk_id: u32,
        /// Bytes that crossed the wire.
        #[serde(default)]
        bytes: u64,
    },
}

/// An agent's word that it gave up.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AgentFailure {
    /// Why.
    pub error: String,
}

/// A wish for a restore.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartRestore {
    /// Which disk.
    #[serde(default)]
    pub disk_index: u32,
    /// The raw file to be made, absolute, on the hub's host.
    pub target: String,
    /// Whether a file that is there may be replaced.
    #[serde(default)]
    pub overwrite: bool,
}

/// A restore.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RestoreView {
    /// Its identity.
    pub restore_id: String,
    /// The backup that is read.
    pub backup_id: String,
    /// The disk.
    pub disk_index: u32,
    /// The file that is made.
    pub target: String,
    /// Where it stands.
    pub status: Status,
    /// How far it is.
    pub progress: ProgressView,
    /// Bytes that were written as data; the rest are holes.
    pub data_bytes: u64,
    /// Why it failed.
    pub error_message: Option<String>,
    /// When it began.
    pub created_at: Timestamp,
    /// When it ended.
    pub completed_at: Option<Timestamp>,
}

/// Whether the hub works.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Health {
    /// `ok` or `degraded`.
    pub status: String,
    /// The version of the program.
    pub version: String,
    /// What is degraded.
    pub degraded: Vec<String>,
    /// Jobs in work.
    pub running_jobs: usize,
}

/// An error as `application/problem+json` shows it.
///
/// Source: RFC 9457, "Problem Details for HTTP APIs".
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Problem {
    /// What kind; always `about:blank`: the title is that of the status.
    #[serde(rename = "type", default = "about_blank")]
    pub kind: String,
    /// The status in words.
    pub title: String,
    /// The status.
    pub status: u16,
    /// What is wrong here and what to do.
    pub detail: String,
}

fn about_blank() -> String {
    "about:blank".to_owned()
}

impl ProgressView {
    /// A view of these numbers, with the derived ones filled in.
    pub fn new(done: u64, total: u64, transferred: u64, per_second: u64) -> Self {
        let permille = match total {
            0 => 0,
            total => u128::from(done.min(total)) * 1000 / u128::from(total),
        };
        Self {
            bytes_done: done,
            bytes_total: total,
            bytes_transferred: transferred,
            bytes_per_second: per_second,
            percent: f64::from(u32::try_from(permille).unwrap_or(1000)) / 10.0,
            eta_seconds: total.saturating_sub(done).checked_div(per_second),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_a_percentage_with_one_decimal_and_an_estimate() {
        let view = ProgressView::new(1, 3, 1, 2);
        assert!((view.percent - 33.3).abs() < 1e-9);
        assert_eq!(view.eta_seconds, Some(1));
        assert_eq!(ProgressView::new(0, 0, 0, 0).eta_seconds, None);
        assert!((ProgressView::new(5, 4, 0, 0).percent - 100.0).abs() < 1e-9);
    }

    #[test]
    fn a_repository_may_be_called_by_either_name() {
        let old: StartBackup =
            serde_json::from_str(r#"{"vm_name":"a","repository":"r","backup_type":"full"}"#)
                .unwrap();
        assert_eq!(old.repository_id.as_deref(), Some("r"));
    }

    #[test]
    fn an_agent_may_report_one_event_or_several() {
        let one = r#"{"event":"warning","message":"slow"}"#;
        assert!(matches!(serde_json::from_str(one), Ok(AgentEvents::One(_))));
        let many = format!("[{one},{one}]");
        assert!(
            matches!(serde_json::from_str(&many), Ok(AgentEvents::Many(all)) if all.len() == 2)
        );
    }
}
