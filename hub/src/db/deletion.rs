//! Deleting a backup in two transactions around the removal of its files, so that a crash between them is finished at
//! the next start. A backup that another stands on is never deleted.

use jiff::Timestamp;
use rusqlite::{Connection, params};

use super::backups::{disks, job, require};
use super::rows::{all, first, sql_size, sql_time};
use super::{Database, DbResult, Refusal};
use crate::model::{Backup, BackupDisk, BackupType, Status};

impl Database {
    /// Takes a backup out of its chains and marks it: from now on it is no parent and is no longer listed. Returns what
    /// has to be removed. Calling it again for a marked backup returns the same.
    ///
    /// # Errors
    /// [`Refusal::Unknown`]; [`Refusal::WrongState`] while it is in work; [`Refusal::HasChildren`].
    pub async fn begin_delete(
        &self,
        id: &str,
        now: Timestamp,
    ) -> DbResult<(Backup, Vec<BackupDisk>)> {
        let id = id.to_owned();
        self.call(move |connection| {
            let tx = connection.transaction()?;
            let backup = require(&tx, &id)?;
            let found = disks(&tx, &id)?;
            if backup.status.is_active() {
                return Err(Refusal::WrongState { backup_id: id, status: backup.status }.into());
            }
            if let Some(child) = child_of(&tx, &id)? {
                return Err(Refusal::HasChildren { backup_id: id, child }.into());
            }
            if backup.status == Status::Completed && !is_deleting(&tx, &id)? {
                for disk in &found {
                    shorten_chain(&tx, &backup, disk, now)?;
                }
                tx.execute("UPDATE backup_jobs SET deleting = 1 WHERE id = ?1", [&id])?;
            }
            tx.commit()?;
            Ok((backup, found))
        })
        .await
    }

    /// Forgets a backup whose files are gone.
    ///
    /// # Errors
    /// Where the database fails.
    pub async fn finish_delete(&self, id: &str) -> DbResult<()> {
        let id = id.to_owned();
        self.call(move |connection| {
            connection.execute(
                "DELETE FROM backup_jobs
                 WHERE id = ?1 AND (deleting = 1 OR status IN ('failed', 'cancelled'))",
                [&id],
            )?;
            Ok(())
        })
        .await
    }

    /// The backups whose deletion began and has not finished.
    ///
    /// # Errors
    /// Where the database fails.
    pub async fn half_deleted(&self) -> DbResult<Vec<Backup>> {
        self.call(|connection| {
            all(
                connection,
                "SELECT * FROM backup_jobs WHERE deleting = 1 ORDER BY sequence DESC",
                [],
                job,
            )
        })
        .await
    }
}

fn is_deleting(connection: &Connection, id: &str) -> DbResult<bool> {
    Ok(connection
        .prepare_cached("SELECT 1 FROM backup_jobs WHERE id = ?1 AND deleting = 1")?
        .exists([id])?)
}

fn child_of(connection: &Connection, id: &str) -> DbResult<Option<String>> {
    first(
        connection,
        "SELECT backup_id FROM backup_disks
         WHERE parent_backup_id = ?1 AND status IN ('pending', 'running', 'completed') LIMIT 1",
        [id],
        |row| row.get(0),
    )
}

/// Moves the end of a disk's chain to the parent, or ends the chain with its full.
fn shorten_chain(
    connection: &Connection,
    backup: &Backup,
    disk: &BackupDisk,
    now: Timestamp,
) -> DbResult<()> {
    if disk.kind == BackupType::Full {
        connection.execute(
            "DELETE FROM backup_chains WHERE full_backup_id = ?1 AND disk_id = ?2",
            params![backup.id, disk.index],
        )?;
    } else {
        connection.execute(
            "UPDATE backup_chains SET latest_backup_id = ?3, total_backups = total_backups - 1,
                 total_size_bytes = max(0, total_size_bytes - ?4), updated_at = ?5
             WHERE latest_backup_id = ?1 AND disk_id = ?2",
            params![
                backup.id,
                disk.index,
                disk.parent_backup_id,
                sql_size(disk.stored_bytes),
                sql_time(now)
            ],
        )?;
    }
    Ok(())
}
