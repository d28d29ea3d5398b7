//! One disk on its way through a job, from its source to its sealed layer. The steps that move it are in
//! [`super::work`] and [`super::layers`].

use agent::{DiskReport, SourceSpec};
use chain::{LayerPlan, Manifest, OpenLayer};

use super::work::Reason;
use crate::db::{DiskOutcome, NewDisk, Parent};
use crate::error::describe;
use crate::fault::Fault;
use crate::model::{AgentKind, BackupType, VmDisk};

/// The size of a sector, in bytes: disks end at one.
const SECTOR_BYTES: u64 = 512;

/// One disk of a job.
pub(super) struct DiskWork {
    pub(super) index: u32,
    pub(super) key: i64,
    pub(super) source: SourceSpec,
    pub(super) size_bytes: u64,
    pub(super) parent: Option<Parent>,
    pub(super) plan: Option<LayerPlan>,
    pub(super) layer: Option<OpenLayer>,
    pub(super) export: Option<String>,
    pub(super) fault: Fault,
    pub(super) report: Option<DiskReport>,
    pub(super) manifest: Option<Manifest>,
}

impl DiskWork {
    /// What the database is told of it, once it is sealed.
    pub(super) fn outcome(&self) -> Option<DiskOutcome> {
        let (report, manifest) = (self.report.as_ref()?, self.manifest.as_ref()?);
        Some(DiskOutcome {
            index: self.index,
            change_id: report.change_id.clone(),
            full_reason: report.full_reason.clone(),
            bytes_transferred: report.wire_bytes,
            bytes_read: report.read_bytes,
            stored_bytes: manifest.allocated_bytes,
        })
    }
}

/// Opens a disk's source, where it can be reached from here, to learn its size.
pub(super) async fn look_at(agent: AgentKind, disk: &VmDisk) -> Result<DiskWork, Reason> {
    let source: SourceSpec =
        disk.source.parse().map_err(|error| format!("disk {}: {error}", disk.index))?;
    let size_bytes = match (agent, disk.capacity_bytes) {
        (AgentKind::Local, _) => {
            let found = agent::probe(&source).await;
            found.map_err(|error| format!("disk {}: {}", disk.index, describe(&error)))?.size_bytes
        }
        (AgentKind::External, Some(size_bytes)) => size_bytes,
        (AgentKind::External, None) => {
            return Err(format!("disk {}: its size is not known", disk.index));
        }
    };
    if size_bytes == 0 {
        return Err(format!("disk {}: {} is empty", disk.index, disk.source));
    }
    if !size_bytes.is_multiple_of(SECTOR_BYTES)
        && let SourceSpec::File(path) = &source
    {
        return Err(format!(
            "disk {}: {} has {size_bytes} bytes, which are no whole sectors of {SECTOR_BYTES}; grow it: \
             truncate -s %{SECTOR_BYTES} {}",
            disk.index,
            path.display(),
            path.display()
        ));
    }
    Ok(DiskWork {
        index: disk.index,
        key: disk.key,
        source,
        size_bytes,
        parent: None,
        plan: None,
        layer: None,
        export: None,
        fault: Fault::default(),
        report: None,
        manifest: None,
    })
}

/// What the database is told of it before its layer is made.
pub(super) fn new_disk(
    disk: &DiskWork,
    parent: Option<&Parent>,
    full_reason: Option<String>,
    plan: &LayerPlan,
) -> NewDisk {
    NewDisk {
        index: disk.index,
        key: disk.key,
        kind: if parent.is_some() { BackupType::Incremental } else { BackupType::Full },
        full_reason,
        parent_backup_id: parent.map(|parent| parent.backup_id.clone()),
        previous_change_id: parent.map(|parent| parent.change_id.clone()),
        capacity_bytes: disk.size_bytes,
        path: plan.path.to_string(),
        export_name: plan.export_name.clone(),
    }
}
