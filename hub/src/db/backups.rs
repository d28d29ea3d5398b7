//! Backup jobs, their disks and the chains that they extend: accepting and finding them. How a job goes on and ends is in
//! [`super::lifecycle`].

use jiff::{SignedDuration, Timestamp};
use rusqlite::{Connection, Row, params};

use super::rows::{all, first, optional_time, parsed, size, sql_time};
use super::{Database, DbResult, Refusal, events, repositories, vms};
use crate::model::{Backup, BackupDisk, BackupType, Level, Status, Vm};

const JOB: &str = "sequence, id, vm_context_id, vm_name, backup_type, status, repository_id,
    repository_path, parent_backup_id, change_id, bytes_transferred, total_bytes, error_message,
    step, stamp, created_at, started_at, completed_at";

/// A job to be accepted.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// The name of the virtual machine.
    pub vm_name: String,
    /// The id or name of the repository.
    pub repository: String,
    /// What is asked for.
    pub backup_type: BackupType,
    /// The time.
    pub now: Timestamp,
}

/// Which backups to list.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Of this virtual machine only.
    pub vm_name: Option<String>,
    /// In this state only.
    pub status: Option<Status>,
    /// At most so many.
    pub limit: u32,
}

/// A disk of a job, before its layer exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDisk {
    /// Its place.
    pub index: u32,
    /// The hypervisor's key.
    pub key: i64,
    /// What its layer will hold.
    pub kind: BackupType,
    /// Why it is a full although an incremental was asked for.
    pub full_reason: Option<String>,
    /// The backup below.
    pub parent_backup_id: Option<String>,
    /// The state of the source that the parent holds.
    pub previous_change_id: Option<String>,
    /// Its size.
    pub capacity_bytes: u64,
    /// Its layer, relative to the repository's root.
    pub path: String,
    /// Its export.
    pub export_name: String,
}

/// The latest completed layer of a disk: what an incremental may be put on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// The disk.
    pub disk_index: u32,
    /// The hypervisor's key that it had.
    pub disk_key: i64,
    /// The backup.
    pub backup_id: String,
    /// Its layer, relative to the repository's root.
    pub path: String,
    /// The size of the disk then.
    pub capacity_bytes: u64,
    /// The state of the source that it holds.
    pub change_id: String,
}

/// What became of a disk whose layer is sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOutcome {
    /// The disk.
    pub index: u32,
    /// The state of the source that it holds now.
    pub change_id: String,
    /// Why everything was sent although a parent exists.
    pub full_reason: Option<String>,
    /// Bytes that crossed the wire.
    pub bytes_transferred: u64,
    /// Bytes read from the source.
    pub bytes_read: u64,
    /// Bytes that the layer takes.
    pub stored_bytes: u64,
}

impl Database {
    /// Accepts a job: it exists from now on, pending.
    ///
    /// # Errors
    /// [`Refusal::Unknown`], [`Refusal::Active`].
    pub async fn insert_job(&self, new: NewJob) -> DbResult<Backup> {
        self.call(move |connection| {
            let tx = connection.transaction()?;
            let vm = vms::require(&tx, &new.vm_name)?;
            let repository = repositories::require(&tx, &new.repository)?;
            require_idle(&tx, &vm)?;
            let stamp = next_stamp(&tx, &vm.context_id, new.now)?;
            let id = crate::names::backup_id(&vm.name, stamp);
            tx.execute(
                "INSERT INTO backup_jobs (id, vm_context_id, vm_name, backup_type, repository_id,
                     repository_type, repository_path, compression_enabled, stamp, created_at)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 0, ?8, ?9)",
                params![
                    id,
                    vm.context_id,
                    vm.name,
                    new.backup_type.as_str(),
                    repository.id,
                    repository.kind.as_str(),
                    repository.path,
                    sql_time(stamp),
                    sql_time(new.now)
                ],
            )?;
            let message = format!("{} backup into repository {}", new.backup_type, repository.name);
            events::add(&tx, &id, new.now, None, Level::Info, &message)?;
            let job = require(&tx, &id)?;
            tx.commit()?;
            Ok(job)
        })
        .await
    }

    /// Backups, newest first. One that is being deleted is no longer listed.
    ///
    /// # Errors
    /// Where the database fails.
    pub async fn backups(&self, filter: Filter) -> DbResult<Vec<Backup>> {
        self.call(move |connection| {
            let sql = format!(
                "SELECT {JOB} FROM backup_jobs
                 WHERE deleting = 0 AND (?1 IS NULL OR vm_name = ?1) AND (?2 IS NULL OR status = ?2)
                 ORDER BY sequence DESC LIMIT ?3"
            );
            let status = filter.status.map(Status::as_str);
            all(connection, &sql, params![filter.vm_name, status, filter.limit], job)
        })
        .await
    }

    /// The backup of that id.
    ///
    /// # Errors
    /// [`Refusal::Unknown`].
    pub async fn backup(&self, id: &str) -> DbResult<Backup> {
        let id = id.to_owned();
        self.call(move |connection| require(connection, &id)).await
    }

    /// A backup with its disks, by index.
    ///
    /// # Errors
    /// [`Refusal::Unknown`].
    pub async fn backup_with_disks(&self, id: &str) -> DbResult<(Backup, Vec<BackupDisk>)> {
        let id = id.to_owned();
        self.call(move |connection| Ok((require(connection, &id)?, disks(connection, &id)?))).await
    }

    /// The completed backups of a virtual machine in the order of creation, each with its disks.
    ///
    /// # Errors
    /// [`Refusal::Unknown`] where there is no such virtual machine.
    pub async fn chain(&self, vm_name: &str) -> DbResult<Vec<(Backup, Vec<BackupDisk>)>> {
        let name = vm_name.to_owned();
        self.call(move |connection| {
            let vm = vms::require(connection, &name)?;
            let sql = format!(
                "SELECT {JOB} FROM backup_jobs
                 WHERE vm_context_id = ?1 AND status = 'completed' AND deleting = 0 ORDER BY sequence"
            );
            let jobs = all(connection, &sql, [&vm.context_id], job)?;
            jobs.into_iter()
                .map(|job| {
                    let disks = disks(connection, &job.id)?;
                    Ok((job, disks))
                })
                .collect()
        })
        .await
    }

    /// The jobs that are owed an end, oldest first: at a start of the hub, those that its last stop interrupted.
    ///
    /// # Errors
    /// Where the database fails.
    pub async fn active_jobs(&self) -> DbResult<Vec<Backup>> {
        self.call(|connection| {
            let sql = format!(
                "SELECT {JOB} FROM backup_jobs
                 WHERE status IN ('pending', 'running') ORDER BY sequence"
            );
            all(connection, &sql, [], job)
        })
        .await
    }

    /// The layers that incrementals of this virtual machine in this repository may be put on: of each disk the latest
    /// completed one of its active chain.
    ///
    /// # Errors
    /// Where the database fails.
    pub async fn parents(&self, context_id: &str, repository_id: &str) -> DbResult<Vec<Parent>> {
        let (context_id, repository_id) = (context_id.to_owned(), repository_id.to_owned());
        self.call(move |connection| {
            all(
                connection,
                "SELECT d.disk_index, d.disk_key, d.backup_id, d.path, d.capacity_bytes, d.change_id
                 FROM backup_chains c
                 JOIN backup_jobs j ON j.id = c.latest_backup_id
                 JOIN backup_disks d ON d.backup_id = j.id AND d.disk_index = c.disk_id
                 WHERE c.vm_context_id = ?1 AND c.repository_id = ?2 AND c.active = 1
                     AND j.status = 'completed' AND j.deleting = 0 AND d.status = 'completed'
                 ORDER BY d.disk_index",
                [&context_id, &repository_id],
                |row| {
                    Ok(Parent {
                        disk_index: row.get("disk_index")?,
                        disk_key: row.get("disk_key")?,
                        backup_id: row.get("backup_id")?,
                        path: row.get("path")?,
                        capacity_bytes: size(row, "capacity_bytes")?,
                        change_id: row.get("change_id")?,
                    })
                },
            )
        })
        .await
    }

    /// The layers that jobs of this repository noted and that no backup has: whatever is left of them is rubbish.
    ///
    /// # Errors
    /// Where the database fails.
    pub async fn dead_layers(&self, repository_id: &str) -> DbResult<Vec<String>> {
        let repository_id = repository_id.to_owned();
        self.call(move |connection| {
            all(
                connection,
                "SELECT d.path FROM backup_disks d JOIN backup_jobs j ON j.id = d.backup_id
                 WHERE j.repository_id = ?1 AND j.status IN ('failed', 'cancelled')
                 ORDER BY j.sequence DESC, d.disk_index",
                [&repository_id],
                |row| row.get(0),
            )
        })
        .await
    }
}

/// Refuses a virtual machine of which a backup is in work.
pub(super) fn require_idle(connection: &Connection, vm: &Vm) -> DbResult<()> {
    let active: Option<String> = first(
        connection,
        "SELECT id FROM backup_jobs WHERE vm_context_id = ?1 AND status IN ('pending', 'running')",
        [&vm.context_id],
        |row| row.get(0),
    )?;
    match active {
        Some(backup_id) => Err(Refusal::Active { vm: vm.name.clone(), backup_id }.into()),
        None => Ok(()),
    }
}

/// The second that names a job's files: now, or one after the last job's, should the clock have stood or gone back.
fn next_stamp(connection: &Connection, context_id: &str, now: Timestamp) -> DbResult<Timestamp> {
    let last: Option<Timestamp> = first(
        connection,
        "SELECT max(stamp) AS stamp FROM backup_jobs WHERE vm_context_id = ?1",
        [context_id],
        |row| optional_time(row, "stamp"),
    )?
    .flatten();
    let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
    Ok(match last {
        Some(last) if last >= now => last + SignedDuration::from_secs(1),
        _ => now,
    })
}

/// The backup of that id, or the refusal that names it.
pub(super) fn require(connection: &Connection, id: &str) -> DbResult<Backup> {
    let sql = format!("SELECT {JOB} FROM backup_jobs WHERE id = ?1");
    first(connection, &sql, [id], job)?
        .ok_or_else(|| Refusal::Unknown { what: "backup", name: id.to_owned() }.into())
}

/// The disks of a backup, by index.
pub(super) fn disks(connection: &Connection, id: &str) -> DbResult<Vec<BackupDisk>> {
    all(
        connection,
        "SELECT disk_index, disk_key, kind, full_reason, status, parent_backup_id, change_id,
             previous_change_id, capacity_bytes, path, export_name, bytes_transferred, bytes_read,
             stored_bytes
         FROM backup_disks WHERE backup_id = ?1 ORDER BY disk_index",
        [id],
        disk,
    )
}

/// Reads a job's row.
pub(super) fn job(row: &Row<'_>) -> rusqlite::Result<Backup> {
    Ok(Backup {
        id: row.get("id")?,
        sequence: row.get("sequence")?,
        vm_context_id: row.get("vm_context_id")?,
        vm_name: row.get("vm_name")?,
        repository_id: row.get("repository_id")?,
        repository_path: row.get("repository_path")?,
        backup_type: parsed(row, "backup_type")?,
        status: parsed(row, "status")?,
        parent_backup_id: row.get("parent_backup_id")?,
        change_id: row.get("change_id")?,
        bytes_transferred: size(row, "bytes_transferred")?,
        total_bytes: size(row, "total_bytes")?,
        error_message: row.get("error_message")?,
        step: row.get("step")?,
        stamp: parsed(row, "stamp")?,
        created_at: parsed(row, "created_at")?,
        started_at: optional_time(row, "started_at")?,
        completed_at: optional_time(row, "completed_at")?,
    })
}

fn disk(row: &Row<'_>) -> rusqlite::Result<BackupDisk> {
    Ok(BackupDisk {
        index: row.get("disk_index")?,
        key: row.get("disk_key")?,
        kind: parsed(row, "kind")?,
        full_reason: row.get("full_reason")?,
        status: parsed(row, "status")?,
        parent_backup_id: row.get("parent_backup_id")?,
        change_id: row.get("change_id")?,
        previous_change_id: row.get("previous_change_id")?,
        capacity_bytes: size(row, "capacity_bytes")?,
        path: row.get("path")?,
        export_name: row.get("export_name")?,
        bytes_transferred: size(row, "bytes_transferred")?,
        bytes_read: size(row, "bytes_read")?,
        stored_bytes: size(row, "stored_bytes")?,
    })
}
