//! Where backups are kept, as rows. Their files and their free space are the business of others.

use jiff::Timestamp;
use rusqlite::{Connection, Row, params};

use super::rows::{all, first, parsed, sql_size, sql_time};
use super::{Database, DbResult, Refusal};
use crate::model::RepositoryRow;

const COLUMNS: &str =
    "id, name, repository_type, json_extract(config, '$.path') AS path, created_at";

impl Database {
    /// Adds a repository.
    ///
    /// # Errors
    /// [`Refusal::Exists`] where the name or the path is taken.
    pub async fn insert_repository(&self, new: RepositoryRow) -> DbResult<()> {
        self.call(move |connection| {
            let tx = connection.transaction()?;
            let taken = tx
                .prepare(
                    "SELECT 1 FROM backup_repositories
                     WHERE name = ?1 OR id = ?1 OR json_extract(config, '$.path') = ?2",
                )?
                .exists([&new.name, &new.path])?;
            if taken {
                let name = format!("{} at {}", new.name, new.path);
                return Err(Refusal::Exists { what: "repository", name }.into());
            }
            tx.execute(
                "INSERT INTO backup_repositories
                     (id, name, repository_type, config, created_at, updated_at)
                 VALUES (?1, ?2, ?3, json_object('path', ?4), ?5, ?5)",
                params![new.id, new.name, new.kind.as_str(), new.path, sql_time(new.created_at)],
            )?;
            tx.commit()?;
            Ok(())
        })
        .await
    }

    /// All repositories, by name.
    ///
    /// # Errors
    /// Where the database fails.
    pub async fn repositories(&self) -> DbResult<Vec<RepositoryRow>> {
        self.call(|connection| {
            let sql = format!("SELECT {COLUMNS} FROM backup_repositories ORDER BY name");
            all(connection, &sql, [], repository)
        })
        .await
    }

    /// The repository of that id or name.
    ///
    /// # Errors
    /// [`Refusal::Unknown`].
    pub async fn repository(&self, id_or_name: &str) -> DbResult<RepositoryRow> {
        let wanted = id_or_name.to_owned();
        self.call(move |connection| require(connection, &wanted)).await
    }

    /// Notes how large a repository is and how much of it is free.
    ///
    /// # Errors
    /// Where the database fails.
    pub async fn set_repository_space(
        &self,
        id: &str,
        total_bytes: u64,
        available_bytes: u64,
        now: Timestamp,
    ) -> DbResult<()> {
        let id = id.to_owned();
        self.call(move |connection| {
            connection.execute(
                "UPDATE backup_repositories
                 SET total_size_bytes = ?2, available_size_bytes = ?3, updated_at = ?4 WHERE id = ?1",
                params![id, sql_size(total_bytes), sql_size(available_bytes), sql_time(now)],
            )?;
            Ok(())
        })
        .await
    }
}

/// The repository of that id or name, or the refusal that names it.
pub(super) fn require(connection: &Connection, wanted: &str) -> DbResult<RepositoryRow> {
    let sql = format!("SELECT {COLUMNS} FROM backup_repositories WHERE id = ?1 OR name = ?1");
    first(connection, &sql, [wanted], repository)?
        .ok_or_else(|| Refusal::Unknown { what: "repository", name: wanted.to_owned() }.into())
}

fn repository(row: &Row<'_>) -> rusqlite::Result<RepositoryRow> {
    Ok(RepositoryRow {
        id: row.get("id")?,
        name: row.get("name")?,
        kind: parsed(row, "repository_type")?,
        path: row.get("path")?,
        created_at: parsed(row, "created_at")?,
    })
}
