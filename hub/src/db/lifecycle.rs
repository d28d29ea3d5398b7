//! The life of a job in the database, from its first step to its end. A backup becomes a possible parent in exactly one
//! place, [`Database::complete`], in one transaction.

use jiff::Timestamp;
use rusqlite::{Connection, params};

use super::backups::{DiskOutcome, NewDisk, disks, require};
use super::rows::{first, sql_size, sql_time};
use super::{Database, DbResult, Refusal, events};
use crate::model::{Backup, BackupDisk, Level, Status};

impl Database {
    /// Notes that a job's work began.
    ///
    /// # Errors
    /// [`Refusal::WrongState`] unless it is pending.
    pub async fn begin(&self, id: &str, now: Timestamp) -> DbResult<()> {
        let id = id.to_owned();
        self.call(move |connection| {
            let changed = connection.execute(
                "UPDATE backup_jobs SET status = 'running', started_at = ?2
                 WHERE id = ?1 AND status = 'pending'",
                params![id, sql_time(now)],
            )?;
            expect_one(connection, &id, changed)
        })
        .await
    }

    /// Notes that a step began, in the job and in its log.
    ///
    /// # Errors
    /// Where the database fails.
    pub async fn enter_step(&self, id: &str, step: &'static str, now: Timestamp) -> DbResult<()> {
        let id = id.to_owned();
        self.call(move |connection| {
            let tx = connection.transaction()?;
            tx.execute("UPDATE backup_jobs SET step = ?2 WHERE id = ?1", params![id, step])?;
            events::add(&tx, &id, now, Some(step), Level::Info, "begun")?;
            tx.commit()?;
            Ok(())
        })
        .await
    }

    /// Notes a disk of a job, before its layer is made: a crash afterwards knows what to remove, and from now on its
    /// parent is not deleted. Replaces what was noted of the same disk before.
    ///
    /// # Errors
    /// [`Refusal::ParentGone`].
    pub async fn put_disk(&self, id: &str, disk: NewDisk) -> DbResult<()> {
        let id = id.to_owned();
        self.call(move |connection| {
            let tx = connection.transaction()?;
            if let Some(parent) = &disk.parent_backup_id {
                require_parent(&tx, parent)?;
            }
            replace_disk(&tx, &id, &disk)?;
            tx.execute(
                "UPDATE backup_jobs SET
                     total_bytes = (SELECT coalesce(sum(capacity_bytes), 0)
                         FROM backup_disks WHERE backup_id = ?1),
                     parent_backup_id = (SELECT parent_backup_id FROM backup_disks
                         WHERE backup_id = ?1 ORDER BY disk_index LIMIT 1)
                 WHERE id = ?1",
                [&id],
            )?;
            tx.commit()?;
            Ok(())
        })
        .await
    }

    /// Makes a backup of a job whose layers are all sealed: status, change ids and chains in one transaction.
    ///
    /// # Errors
    /// [`Refusal::WrongState`] unless it is running, [`Refusal::NoChangeId`] where a disk is missing from `outcomes`,
    /// [`Refusal::ChainMoved`]; nothing has changed then.
    pub async fn complete(
        &self,
        id: &str,
        outcomes: Vec<DiskOutcome>,
        now: Timestamp,
    ) -> DbResult<()> {
        let id = id.to_owned();
        self.call(move |connection| {
            let tx = connection.transaction()?;
            let job = require(&tx, &id)?;
            for disk in disks(&tx, &id)? {
                let outcome = outcomes
                    .iter()
                    .find(|outcome| outcome.index == disk.index)
                    .ok_or(Refusal::NoChangeId { disk_index: disk.index })?;
                complete_disk(&tx, &job, &disk, outcome, now)?;
            }
            let changed = tx.execute(
                "UPDATE backup_jobs SET status = 'completed', completed_at = ?2, error_message = NULL,
                     change_id = (SELECT change_id FROM backup_disks
                         WHERE backup_id = ?1 ORDER BY disk_index LIMIT 1),
                     bytes_transferred = (SELECT coalesce(sum(bytes_transferred), 0)
                         FROM backup_disks WHERE backup_id = ?1)
                 WHERE id = ?1 AND status = 'running'",
                params![id, sql_time(now)],
            )?;
            expect_one(&tx, &id, changed)?;
            events::add(&tx, &id, now, Some("complete"), Level::Info, "completed")?;
            tx.commit()?;
            Ok(())
        })
        .await
    }

    /// Notes why a job is about to be undone, while it still counts as active. Only after this may its files go: from
    /// here on no completed state of it can come back.
    ///
    /// # Errors
    /// [`Refusal::WrongState`] where it is no longer active.
    pub async fn announce_end(&self, id: &str, reason: &str) -> DbResult<()> {
        let (id, reason) = (id.to_owned(), reason.to_owned());
        self.call(move |connection| {
            let changed = connection.execute(
                "UPDATE backup_jobs SET error_message = ?2
                 WHERE id = ?1 AND status IN ('pending', 'running')",
                params![id, reason],
            )?;
            expect_one(connection, &id, changed)
        })
        .await
    }

    /// Ends a job without a backup.
    ///
    /// # Errors
    /// [`Refusal::WrongState`] where it has ended already.
    pub async fn end(
        &self,
        id: &str,
        status: Status,
        reason: &str,
        bytes_transferred: u64,
        now: Timestamp,
    ) -> DbResult<()> {
        let (id, reason) = (id.to_owned(), reason.to_owned());
        self.call(move |connection| {
            let tx = connection.transaction()?;
            let changed = tx.execute(
                "UPDATE backup_jobs SET status = ?2, error_message = ?3, bytes_transferred = ?4,
                     completed_at = ?5, parent_backup_id = NULL
                 WHERE id = ?1 AND status IN ('pending', 'running')",
                params![id, status.as_str(), reason, sql_size(bytes_transferred), sql_time(now)],
            )?;
            expect_one(&tx, &id, changed)?;
            // What has no layer has no parent either: the parent may be deleted one day.
            tx.execute(
                "UPDATE backup_disks SET status = ?2, parent_backup_id = NULL WHERE backup_id = ?1",
                params![id, status.as_str()],
            )?;
            events::add(&tx, &id, now, None, Level::Error, &reason)?;
            tx.commit()?;
            Ok(())
        })
        .await
    }
}

/// Refuses a parent that is not, or no longer, a backup.
fn require_parent(connection: &Connection, parent: &str) -> DbResult<()> {
    let there = connection
        .prepare_cached(
            "SELECT 1 FROM backup_jobs WHERE id = ?1 AND status = 'completed' AND deleting = 0",
        )?
        .exists([parent])?;
    match there {
        true => Ok(()),
        false => Err(Refusal::ParentGone { backup_id: parent.to_owned() }.into()),
    }
}

fn replace_disk(connection: &Connection, id: &str, disk: &NewDisk) -> DbResult<()> {
    connection.execute(
        "INSERT OR REPLACE INTO backup_disks (backup_id, disk_index, disk_key, kind, full_reason, status,
             parent_backup_id, previous_change_id, capacity_bytes, path, export_name)
         VALUES (?1, ?2, ?3, ?4, ?5, 'running', ?6, ?7, ?8, ?9, ?10)",
        params![
            id,
            disk.index,
            disk.key,
            disk.kind.as_str(),
            disk.full_reason,
            disk.parent_backup_id,
            disk.previous_change_id,
            sql_size(disk.capacity_bytes),
            disk.path,
            disk.export_name
        ],
    )?;
    Ok(())
}

fn complete_disk(
    connection: &Connection,
    job: &Backup,
    disk: &BackupDisk,
    outcome: &DiskOutcome,
    now: Timestamp,
) -> DbResult<()> {
    let chain_id = extend_chain(connection, job, disk, outcome.stored_bytes, now)?;
    connection.execute(
        "UPDATE backup_disks SET status = 'completed', change_id = ?3, bytes_transferred = ?4,
             bytes_read = ?5, stored_bytes = ?6, chain_id = ?7, full_reason = coalesce(?8, full_reason)
         WHERE backup_id = ?1 AND disk_index = ?2",
        params![
            job.id,
            disk.index,
            outcome.change_id,
            sql_size(outcome.bytes_transferred),
            sql_size(outcome.bytes_read),
            sql_size(outcome.stored_bytes),
            chain_id,
            outcome.full_reason
        ],
    )?;
    Ok(())
}

/// Begins a chain with a full, or moves the end of the active one from the parent to this backup.
fn extend_chain(
    connection: &Connection,
    job: &Backup,
    disk: &BackupDisk,
    stored_bytes: u64,
    now: Timestamp,
) -> DbResult<i64> {
    let (now, stored) = (sql_time(now), sql_size(stored_bytes));
    let Some(parent) = &disk.parent_backup_id else {
        connection.execute(
            "UPDATE backup_chains SET active = 0, updated_at = ?4
             WHERE vm_context_id = ?1 AND disk_id = ?2 AND repository_id = ?3 AND active = 1",
            params![job.vm_context_id, disk.index, job.repository_id, now],
        )?;
        connection.execute(
            "INSERT INTO backup_chains (vm_context_id, disk_id, repository_id, full_backup_id,
                 latest_backup_id, total_size_bytes, created_at, updated_at)
             VALUES (?1, ?2, ?3, ?4, ?4, ?5, ?6, ?6)",
            params![job.vm_context_id, disk.index, job.repository_id, job.id, stored, now],
        )?;
        return Ok(connection.last_insert_rowid());
    };
    first(
        connection,
        "UPDATE backup_chains SET latest_backup_id = ?4, total_backups = total_backups + 1,
             total_size_bytes = total_size_bytes + ?5, updated_at = ?6
         WHERE vm_context_id = ?1 AND disk_id = ?2 AND repository_id = ?3 AND active = 1
             AND latest_backup_id = ?7
         RETURNING id",
        params![job.vm_context_id, disk.index, job.repository_id, job.id, stored, now, parent],
        |row| row.get(0),
    )?
    .ok_or_else(|| Refusal::ChainMoved { disk_index: disk.index }.into())
}

/// An update of a job that has to concern exactly one row.
fn expect_one(connection: &Connection, id: &str, changed: usize) -> DbResult<()> {
    if changed == 1 {
        return Ok(());
    }
    let job = require(connection, id)?;
    Err(Refusal::WrongState { backup_id: job.id, status: job.status }.into())
}
