//! From what the database holds to what answers show, with the live counters of a job in work laid over it.

use std::path::Path;
use std::time::Instant;

use crate::api::{
    BackupSummary, BackupView, ChainLink, ChainView, DiskView, EventView, NbdView, ProgressView,
    VmDiskView, VmView,
};
use crate::db::DbResult;
use crate::hub::Hub;
use crate::model::{Backup, BackupDisk, BackupType, JobEvent, Status, Vm};
use crate::progress::Progress;

pub(super) fn vm(vm: Vm) -> VmView {
    VmView {
        name: vm.name,
        context_id: vm.context_id,
        agent: vm.agent,
        created_at: vm.created_at,
        disks: vm
            .disks
            .into_iter()
            .map(|disk| VmDiskView {
                disk_index: disk.index,
                key: disk.key,
                source: disk.source,
                capacity_bytes: disk.capacity_bytes,
            })
            .collect(),
        warnings: Vec::new(),
    }
}

pub(super) fn summary(backup: &Backup) -> BackupSummary {
    BackupSummary {
        backup_id: backup.id.clone(),
        vm_name: backup.vm_name.clone(),
        backup_type: backup.backup_type,
        status: backup.status,
        repository_id: backup.repository_id.clone(),
        parent_backup_id: backup.parent_backup_id.clone(),
        change_id: backup.change_id.clone(),
        bytes_transferred: backup.bytes_transferred,
        total_bytes: backup.total_bytes,
        error_message: backup.error_message.clone(),
        created_at: backup.created_at,
        started_at: backup.started_at,
        completed_at: backup.completed_at,
    }
}

/// A backup with its disks, log and progress.
pub(super) async fn backup(hub: &Hub, id: &str) -> DbResult<BackupView> {
    let handle = hub.job(id);
    let (backup, disks) = hub.db.backup_with_disks(id).await?;
    let events = hub.db.events(id).await?.into_iter().map(event).collect();
    let live = handle.as_ref().map(|handle| handle.progress.as_ref());
    let live = live.filter(|_| backup.status.is_active());
    if let Some(live) = live {
        refresh(hub, live, &disks);
    }
    let progress = match live {
        Some(live) => live.view(Instant::now()),
        None => {
            let done = if backup.status == Status::Completed { backup.total_bytes } else { 0 };
            ProgressView::new(done, backup.total_bytes, backup.bytes_transferred, 0)
        }
    };
    let nbd = hub
        .nbd_address()
        .map(|address| NbdView { host: address.ip().to_string(), port: address.port() });
    let sources = hub.db.vm(&backup.vm_name).await.map(|vm| vm.disks).unwrap_or_default();
    let source = |key| sources.iter().find(|disk| disk.key == key).map(|disk| disk.source.clone());
    let disks = disks
        .into_iter()
        .map(|one| DiskView { source: source(one.key), ..disk(&backup, one, live) })
        .collect();
    Ok(BackupView { summary: summary(&backup), step: backup.step, progress, nbd, disks, events })
}

/// Agents tell how far they are now and then; what arrived through the exports is known at any moment.
fn refresh(hub: &Hub, live: &Progress, disks: &[BackupDisk]) {
    for export in hub.server.exports() {
        if let Some(disk) = disks.iter().find(|disk| disk.export_name == export.name) {
            let counted = export.counters;
            let done = counted.bytes_written.saturating_add(counted.bytes_zeroed);
            live.raise(disk.index, done, counted.bytes_written, Instant::now());
        }
    }
}

pub(super) fn event(event: JobEvent) -> EventView {
    EventView {
        id: event.id,
        at: event.at,
        step: event.step,
        level: event.level,
        message: event.message,
    }
}

/// The completed backups of a virtual machine.
pub(super) fn chain(vm_name: String, links: Vec<(Backup, Vec<BackupDisk>)>) -> ChainView {
    let backups: Vec<_> = links
        .into_iter()
        .map(|(backup, disks)| ChainLink {
            summary: summary(&backup),
            stored_bytes: disks.iter().map(|disk| disk.stored_bytes).sum(),
            disks: disks.into_iter().map(|one| disk(&backup, one, None)).collect(),
        })
        .collect();
    ChainView {
        vm_name,
        total_stored_bytes: backups.iter().map(|link| link.stored_bytes).sum(),
        total_backups: backups.len() as u64,
        backups,
    }
}

fn disk(backup: &Backup, disk: BackupDisk, live: Option<&Progress>) -> DiskView {
    let live = live.and_then(|progress| progress.disk(disk.index));
    let done = if disk.status == Status::Completed { disk.capacity_bytes } else { 0 };
    DiskView {
        disk_index: disk.index,
        disk_key: disk.key,
        source: None,
        kind: disk.kind,
        full: disk.kind == BackupType::Full,
        full_reason: disk.full_reason,
        status: disk.status,
        parent_backup_id: disk.parent_backup_id,
        change_id: disk.change_id,
        previous_change_id: disk.previous_change_id,
        capacity_bytes: disk.capacity_bytes,
        path: Path::new(&backup.repository_path).join(disk.path).display().to_string(),
        export_name: disk.export_name,
        bytes_done: live.map_or(done, |live| live.done),
        bytes_transferred: live.map_or(disk.bytes_transferred, |live| live.sent),
        bytes_read: live.map_or(disk.bytes_read, |live| live.read),
        stored_bytes: disk.stored_bytes,
    }
}
