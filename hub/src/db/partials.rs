//! The files that restores are writing. Noted before a file is made and forgotten once it is gone or has its name, so that
//! whatever a killed hub left is known at its next start.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rusqlite::params;

use super::rows::{all, sql_time};
use super::{Database, DbResult};

impl Database {
    /// Notes a file that is about to be made.
    ///
    /// # Errors
    /// Where the database fails.
    pub async fn note_partial(&self, path: &Path, now: Timestamp) -> DbResult<()> {
        let path = path.as_os_str().as_bytes().to_vec();
        self.call(move |connection| {
            connection.execute(
                "INSERT OR REPLACE INTO restore_partials (path, created_at) VALUES (?1, ?2)",
                params![path, sql_time(now)],
            )?;
            Ok(())
        })
        .await
    }

    /// Forgets a file that is no longer there under that name.
    ///
    /// # Errors
    /// Where the database fails.
    pub async fn forget_partial(&self, path: &Path) -> DbResult<()> {
        let path = path.as_os_str().as_bytes().to_vec();
        self.call(move |connection| {
            connection.execute("DELETE FROM restore_partials WHERE path = ?1", [path])?;
            Ok(())
        })
        .await
    }

    /// All files that were noted and not forgotten.
    ///
    /// # Errors
    /// Where the database fails.
    pub async fn partials(&self) -> DbResult<Vec<PathBuf>> {
        self.call(|connection| {
            all(connection, "SELECT path FROM restore_partials ORDER BY path", [], |row| {
                let path: Vec<u8> = row.get(0)?;
                Ok(PathBuf::from(OsString::from_vec(path)))
            })
        })
        .await
    }
}
