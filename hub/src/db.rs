//! The hub's memory: SQLite behind one thread that owns the connection, so that no async worker ever waits for a disk.
//! The only module that knows SQL; everything else sees the types of [`crate::model`].

mod backups;
mod deletion;
mod events;
mod lifecycle;
mod partials;
mod repositories;
mod rows;
mod schema;
mod vms;

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;

use jiff::Timestamp;
use rusqlite::Connection;
use rusqlite_migration::{Migrations, SchemaVersion};
use tokio::sync::{mpsc, oneshot};

pub use backups::{DiskOutcome, Filter, NewDisk, NewJob, Parent};
pub use vms::{ChangedDisk, NewVm, NewVmDisk};

/// Calls that may wait for the database's thread before a caller has to wait to queue one.
const QUEUED_CALLS: usize = 256;

/// Why the database refused or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DbError {
    /// The request does not fit what is stored; nothing was changed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// SQLite failed.
    #[error("the database failed: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// The schema could not be brought to this program's version.
    #[error("the database could not be migrated: {0}")]
    Migration(#[from] rusqlite_migration::Error),
    /// The file was written by a newer program.
    #[error("the database {} is from a newer version of this program", .0.display())]
    Newer(PathBuf),
    /// The copy that precedes a migration could not be made.
    #[error("the database could not be copied to {} before its migration: {source}", path.display())]
    Copy {
        /// Where the copy was to be.
        path: PathBuf,
        /// What went wrong.
        source: rusqlite::Error,
    },
    /// The file cannot be made or opened.
    #[error("the database {} cannot be opened: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// The thread could not be started.
    #[error("no thread for the database: {0}")]
    Thread(std::io::Error),
    /// The database's thread is gone.
    #[error("the database is closed")]
    Closed,
}

/// Why a request does not fit what is stored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// A name that is taken.
    #[error("a {what} named {name:?} exists already")]
    Exists {
        /// Of what kind.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// Something that is not there.
    #[error("there is no {what} {name:?}")]
    Unknown {
        /// Of what kind.
        what: &'static str,
        /// How it was asked for.
        name: String,
    },
    /// A virtual machine that already has a job.
    #[error("a backup of {vm:?} is already in work: {backup_id}")]
    Active {
        /// The virtual machine.
        vm: String,
        /// Its job.
        backup_id: String,
    },
    /// A virtual machine that backups belong to.
    #[error("{vm:?} has {backups} backups or a job in work; delete those first")]
    HasBackups {
        /// The virtual machine.
        vm: String,
        /// How many.
        backups: u64,
    },
    /// A backup that others stand on.
    #[error("{backup_id} is the parent of {child}; delete that one first")]
    HasChildren {
        /// The backup.
        backup_id: String,
        /// One that stands on it.
        child: String,
    },
    /// A backup in a state that does not allow it.
    #[error("{backup_id} is {status}")]
    WrongState {
        /// The backup.
        backup_id: String,
        /// Its state.
        status: crate::model::Status,
    },
    /// A chain that no longer ends where this backup was put on it.
    #[error("the chain of disk {disk_index} no longer ends at the parent of this backup")]
    ChainMoved {
        /// The disk.
        disk_index: u32,
    },
    /// A parent that was deleted meanwhile.
    #[error("{backup_id} is no longer there to be built on")]
    ParentGone {
        /// The parent.
        backup_id: String,
    },
    /// A completion that lacks a disk's change id.
    #[error("disk {disk_index} has no change id")]
    NoChangeId {
        /// The disk.
        disk_index: u32,
    },
}

/// The outcome of a database call.
pub type DbResult<T> = Result<T, DbError>;

type Call = Box<dyn FnOnce(&mut Connection) + Send>;

/// A handle on the database; clones share the one connection, and its thread ends with the last of them.
#[derive(Clone)]
pub struct Database {
    calls: mpsc::Sender<Call>,
}

impl Database {
    /// Opens, and where needed creates or migrates, the database at `path`. Blocks: call it before the runtime is busy.
    ///
    /// # Errors
    /// [`DbError`] where the file cannot be opened, belongs to a newer program, or cannot be copied or migrated.
    pub fn open(path: &Path) -> DbResult<Self> {
        let connection = prepare(path, &schema::migrations())?;
        let (calls, mut inbox) = mpsc::channel::<Call>(QUEUED_CALLS);
        thread::Builder::new()
            .name("hub-database".to_owned())
            .spawn(move || {
                let mut connection = connection;
                while let Some(call) = inbox.blocking_recv() {
                    call(&mut connection);
                }
            })
            .map_err(DbError::Thread)?;
        Ok(Self { calls })
    }

    /// Runs `work` on the database's thread. Dropping the future does not stop it.
    async fn call<T, F>(&self, work: F) -> DbResult<T>
    where
        T: Send + 'static,
        F: FnOnce(&mut Connection) -> DbResult<T> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let call: Call = Box::new(move |connection| {
            // A caller that went away has no use for the answer.
            let _ = reply.send(work(connection));
        });
        self.calls.send(call).await.map_err(|_| DbError::Closed)?;
        answer.await.map_err(|_| DbError::Closed)?
    }

    /// Whether the database answers.
    ///
    /// # Errors
    /// [`DbError`] where it does not.
    pub async fn ping(&self) -> DbResult<()> {
        self.call(|connection| Ok(connection.query_row("SELECT 1", [], |_| Ok(()))?)).await
    }
}

/// Opens the file, sets what every connection needs, and brings the schema up to date after a copy.
fn prepare(path: &Path, migrations: &Migrations<'_>) -> DbResult<Connection> {
    // Made here where it is missing, for its owner only; SQLite gives its other files the same mode.
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
    file.map_err(|source| DbError::File { path: path.to_owned(), source })?;
    let mut connection = Connection::open(path)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", "ON")?;
    connection.pragma_update(None, "trusted_schema", "OFF")?;
    connection.busy_timeout(std::time::Duration::from_secs(10))?;
    match migrations.pending_migrations(&connection)? {
        0 => {}
        pending if pending < 0 => return Err(DbError::Newer(path.to_owned())),
        _ => {
            if let SchemaVersion::Inside(version) = migrations.current_version(&connection)? {
                copy_before_migration(&connection, path, version.get())?;
            }
            migrations.to_latest(&mut connection)?;
            verify(&connection)?;
        }
    }
    Ok(connection)
}

/// Makes a copy of the whole database beside it, named by its version and the time.
fn copy_before_migration(connection: &Connection, path: &Path, version: usize) -> DbResult<()> {
    let stamp = Timestamp::now().strftime("%Y%m%dT%H%M%S%6f");
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".v{version}-{stamp}.bak"));
    let copy = PathBuf::from(name);
    connection.backup("main", &copy, None).map_err(|source| DbError::Copy { path: copy, source })
}

/// Asks SQLite whether the migrated file is whole.
fn verify(connection: &Connection) -> DbResult<()> {
    let answer: String = connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
    let broken_reference = connection.prepare("PRAGMA foreign_key_check")?.exists([])?;
    if answer != "ok" || broken_reference {
        return Err(DbError::Sqlite(rusqlite::Error::InvalidQuery));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
