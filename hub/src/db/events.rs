//! The job log: what happened to each backup, in order. Entries are only ever added.

use jiff::Timestamp;
use rusqlite::{Connection, params};

use super::rows::{all, parsed, sql_time};
use super::{Database, DbResult};
use crate::model::{JobEvent, Level};

/// The most entries of one backup that an answer holds.
const EVENTS_LISTED: i64 = 10_000;

impl Database {
    /// Adds an entry to a backup's log.
    ///
    /// # Errors
    /// Where the database fails.
    pub async fn add_event(
        &self,
        backup_id: &str,
        at: Timestamp,
        step: Option<&'static str>,
        level: Level,
        message: &str,
    ) -> DbResult<()> {
        let (backup_id, message) = (backup_id.to_owned(), message.to_owned());
        self.call(move |connection| add(connection, &backup_id, at, step, level, &message)).await
    }

    /// The log of a backup, oldest first.
    ///
    /// # Errors
    /// Where the database fails.
    pub async fn events(&self, backup_id: &str) -> DbResult<Vec<JobEvent>> {
        let backup_id = backup_id.to_owned();
        self.call(move |connection| {
            all(
                connection,
                "SELECT id, at, step, level, message FROM job_events
                 WHERE backup_id = ?1 ORDER BY id LIMIT ?2",
                params![backup_id, EVENTS_LISTED],
                |row| {
                    Ok(JobEvent {
                        id: row.get("id")?,
                        at: parsed(row, "at")?,
                        step: row.get("step")?,
                        level: parsed(row, "level")?,
                        message: row.get("message")?,
                    })
                },
            )
        })
        .await
    }
}

/// Adds an entry, inside whatever transaction the caller has open.
pub(super) fn add(
    connection: &Connection,
    backup_id: &str,
    at: Timestamp,
    step: Option<&str>,
    level: Level,
    message: &str,
) -> DbResult<()> {
    connection
        .prepare_cached(
            "INSERT INTO job_events (backup_id, at, step, level, message) VALUES (?1, ?2, ?3, ?4, ?5)",
        )?
        .execute(params![backup_id, sql_time(at), step, level.as_str(), message])?;
    Ok(())
}
