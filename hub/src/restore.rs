//! Restores: a point in time written out as a raw file, with holes where the disk reads zero. What the point consists of
//! is the chain's business; the file appears under its name only when it is whole and durable.

pub(crate) mod copy;
mod publish;

use std::collections::{HashMap, VecDeque};
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use agent::{CancelToken, SourceSpec};
use block::BlockDevice;
use jiff::Timestamp;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::api::{RestoreView, StartRestore};
use crate::error::{HubError, describe};
use crate::hub::Hub;
use crate::model::Status;
use crate::names;
use crate::progress::{DiskProgress, Progress};

/// How many restores run at once.
pub const MAX_RUNNING_RESTORES: usize = 4;

/// How many restores are remembered after their end.
const REMEMBERED: usize = 256;

/// The restores of this run of the hub.
#[derive(Default)]
pub(crate) struct Restores {
    table: Arc<Mutex<Table>>,
    tasks: Mutex<JoinSet<()>>,
    stop: CancelToken,
}

#[derive(Default)]
struct Table {
    all: HashMap<String, Arc<Restore>>,
    order: VecDeque<String>,
    /// Backups that are being deleted.
    excluded: Vec<String>,
}

/// One restore.
struct Restore {
    id: String,
    backup_id: String,
    disk_index: u32,
    target: PathBuf,
    created_at: Timestamp,
    progress: Progress,
    data_bytes: AtomicU64,
    end: watch::Sender<Option<End>>,
}

/// When a restore ended, and why if it failed.
type End = (Timestamp, Result<(), String>);

/// Keeps a backup from being restored, until dropped.
pub(crate) struct Excluded {
    table: Arc<Mutex<Table>>,
    backup_id: String,
}

impl Drop for Excluded {
    fn drop(&mut self) {
        self.table.lock().excluded.retain(|id| *id != self.backup_id);
    }
}

impl Table {
    fn running(&self) -> impl Iterator<Item = &Arc<Restore>> {
        self.all.values().filter(|restore| restore.end.borrow().is_none())
    }

    fn admit(&mut self, restore: &Arc<Restore>) -> Result<(), HubError> {
        if self.excluded.contains(&restore.backup_id) {
            return Err(HubError::Conflict(format!("{} is being deleted", restore.backup_id)));
        }
        if self.running().any(|other| other.target == restore.target) {
            return Err(HubError::Conflict(format!(
                "another restore writes {}",
                restore.target.display()
            )));
        }
        if self.running().count() >= MAX_RUNNING_RESTORES {
            return Err(HubError::Unavailable(format!(
                "{MAX_RUNNING_RESTORES} restores are running; try again later"
            )));
        }
        while self.order.len() >= REMEMBERED {
            let Some(at) = self.order.iter().position(|id| {
                self.all.get(id).is_none_or(|restore| restore.end.borrow().is_some())
            }) else {
                break;
            };
            if let Some(id) = self.order.remove(at) {
                self.all.remove(&id);
            }
        }
        self.order.push_back(restore.id.clone());
        self.all.insert(restore.id.clone(), Arc::clone(restore));
        Ok(())
    }
}

impl Restores {
    /// Keeps a backup from being restored; `None` while it is.
    pub(crate) fn exclude(&self, backup_id: &str) -> Option<Excluded> {
        let mut table = self.table.lock();
        let busy = table.running().any(|restore| restore.backup_id == backup_id)
            || table.excluded.iter().any(|id| id == backup_id);
        if busy {
            return None;
        }
        table.excluded.push(backup_id.to_owned());
        Some(Excluded { table: Arc::clone(&self.table), backup_id: backup_id.to_owned() })
    }

    /// Asks all restores to end.
    pub(crate) fn stop(&self) {
        self.stop.cancel();
    }

    /// Waits, within bounds, until they have.
    pub(crate) async fn ended(&self, patience: Duration) {
        let mut tasks = std::mem::take(&mut *self.tasks.lock());
        let all = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(patience, all).await.is_err() {
            tracing::warn!("restores did not end in time");
        }
    }

    /// How a restore stands.
    pub(crate) fn view(&self, id: &str) -> Result<RestoreView, HubError> {
        let table = self.table.lock();
        let missing = || HubError::Missing(format!("there is no restore {id:?}"));
        Ok(table.all.get(id).ok_or_else(missing)?.view())
    }
}

impl Hub {
    /// Begins to write a disk of a completed backup into a new raw file.
    ///
    /// # Errors
    /// [`crate::db::Refusal::Unknown`]; [`HubError::Missing`] where the backup has no such disk;
    /// [`HubError::Conflict`] where the file exists or the backup is not completed; [`HubError::Invalid`] for a path
    /// that cannot be written to; [`HubError::Unavailable`] where the repository is offline.
    pub async fn start_restore(
        self: &Arc<Self>,
        backup_id: &str,
        wish: StartRestore,
    ) -> Result<RestoreView, HubError> {
        let (backup, disks) = self.db.backup_with_disks(backup_id).await?;
        if backup.status != Status::Completed {
            return Err(HubError::Conflict(format!(
                "{backup_id} is {}: only a completed backup can be restored",
                backup.status
            )));
        }
        let disk = disks.iter().find(|disk| disk.index == wish.disk_index).ok_or_else(|| {
            HubError::Missing(format!("{backup_id} has no disk {}", wish.disk_index))
        })?;
        let target = self.check_target(&wish).await?;
        let row = self.db.repository(&backup.repository_id).await?;
        let repository = self.repository(&row).await?;
        let restore = Arc::new(Restore {
            id: names::fresh_id("restore"),
            backup_id: backup_id.to_owned(),
            disk_index: disk.index,
            target,
            created_at: Timestamp::now(),
            progress: Progress::default(),
            data_bytes: AtomicU64::new(0),
            end: watch::Sender::new(None),
        });
        let total = disk.capacity_bytes;
        let begun = DiskProgress { total, ..DiskProgress::default() };
        restore.progress.set(disk.index, begun, Instant::now());
        self.restores.table.lock().admit(&restore)?;
        let (path, stop, running) =
            (PathBuf::from(&disk.path), self.restores.stop.clone(), Arc::clone(&restore));
        let db = self.db.clone();
        self.restores.tasks.lock().spawn(async move {
            let partial = partial_name(&running.target, &running.id);
            let done = async {
                let point = repository.open_point(&path).await.map_err(|error| describe(&error))?;
                let noted = db.note_partial(&partial, Timestamp::now()).await;
                noted.map_err(|error| describe(&error))?;
                running.write(point, &partial, wish.overwrite, stop).await
            };
            let result = done.await;
            // Still noted where it could not be removed: the next start tries again.
            if !tokio::fs::try_exists(&partial).await.unwrap_or(true)
                && let Err(error) = db.forget_partial(&partial).await
            {
                tracing::warn!(restore = running.id, %error, "a restore's file stays noted");
            }
            match &result {
                Ok(()) => tracing::info!(restore = running.id, "restored"),
                Err(error) => tracing::warn!(restore = running.id, error, "a restore failed"),
            }
            running.end.send_replace(Some((Timestamp::now(), result)));
        });
        Ok(restore.view())
    }

    /// Returns once a restore has ended, with how it did.
    ///
    /// # Errors
    /// [`HubError::Missing`].
    pub async fn restore_ended(&self, id: &str) -> Result<RestoreView, HubError> {
        let restore = self.restores.table.lock().all.get(id).map(Arc::clone);
        if let Some(restore) = restore {
            // Its sender lives as long as `restore`.
            let _ = restore.end.subscribe().wait_for(Option::is_some).await;
        }
        self.restores.view(id)
    }

    /// Where a restore may write: an absolute path in a directory that exists, outside of what the hub itself keeps.
    async fn check_target(&self, wish: &StartRestore) -> Result<PathBuf, HubError> {
        let path = Path::new(&wish.target);
        let invalid = |why: &str| HubError::Invalid(format!("{:?} {why}", wish.target));
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(invalid("does not name a file"));
        };
        if !path.is_absolute() || wish.target.contains('\0') || wish.target.ends_with('/') {
            return Err(invalid("is not the absolute path of a file"));
        }
        let parent = tokio::fs::canonicalize(parent)
            .await
            .map_err(|error| invalid(&format!("lies in no directory that can be used: {error}")))?;
        let mut kept = vec![self.config.data.clone()];
        kept.extend(self.db.repositories().await?.into_iter().map(|row| PathBuf::from(row.path)));
        for root in kept {
            let root = tokio::fs::canonicalize(&root).await.unwrap_or(root);
            if parent.starts_with(&root) {
                return Err(invalid(&format!("lies in {}, which the hub keeps", root.display())));
            }
        }
        let target = parent.join(name);
        match tokio::fs::symlink_metadata(&target).await {
            Ok(found) if !found.is_file() => Err(invalid("is there, and is not a regular file")),
            Ok(_) if !wish.overwrite => Err(HubError::Conflict(format!(
                "{} exists; add --overwrite to replace it",
                target.display()
            ))),
            Ok(found) => {
                self.check_no_source(&target, &found).await?;
                Ok(target)
            }
            Err(_) => Ok(target),
        }
    }

    /// Refuses to replace a file that a virtual machine has as its disk, by whatever name.
    async fn check_no_source(&self, target: &Path, found: &Metadata) -> Result<(), HubError> {
        for vm in self.db.vms().await? {
            for disk in &vm.disks {
                let Ok(SourceSpec::File(source)) = disk.source.parse() else { continue };
                let same = match tokio::fs::metadata(&source).await {
                    Ok(other) => (other.dev(), other.ino()) == (found.dev(), found.ino()),
                    Err(_) => source == target,
                };
                if same {
                    return Err(HubError::Conflict(format!(
                        "{} is disk {} of {:?}: a restore would replace what is being backed up; \
                         restore beside it, or move it away first",
                        target.display(),
                        disk.index,
                        vm.name
                    )));
                }
            }
        }
        Ok(())
    }
}

impl Restore {
    /// Writes the point beside the target, then gives it its name.
    async fn write(
        &self,
        point: Arc<dyn BlockDevice>,
        partial: &Path,
        overwrite: bool,
        stop: CancelToken,
    ) -> Result<(), String> {
        let total = point.limits().size_bytes;
        let mut data = 0;
        let written = tokio::select! {
            written = copy::copy(Arc::clone(&point), partial, |done, more| {
                data += more;
                self.data_bytes.store(data, Ordering::Relaxed);
                let disk = DiskProgress { done, total, read: data, sent: data };
                self.progress.set(self.disk_index, disk, Instant::now());
            }) => written,
            () = stop.cancelled() => Err("the hub was stopped".to_owned()),
        };
        if let Err(error) = point.close().await {
            tracing::debug!(%error, "a point did not close cleanly");
        }
        let published = match written {
            Ok(()) => publish::publish(partial.to_owned(), self.target.clone(), overwrite).await,
            Err(error) => Err(error),
        };
        if published.is_err() {
            // Whether there was anything to remove does not matter.
            let _ = tokio::fs::remove_file(partial).await;
        }
        published
    }

    fn view(&self) -> RestoreView {
        let end = self.end.borrow();
        let (status, error_message) = match end.as_ref() {
            None => (Status::Running, None),
            Some((_, Ok(()))) => (Status::Completed, None),
            Some((_, Err(error))) => (Status::Failed, Some(error.clone())),
        };
        RestoreView {
            restore_id: self.id.clone(),
            backup_id: self.backup_id.clone(),
            disk_index: self.disk_index,
            target: self.target.display().to_string(),
            status,
            progress: self.progress.view(Instant::now()),
            data_bytes: self.data_bytes.load(Ordering::Relaxed),
            error_message,
            created_at: self.created_at,
            completed_at: end.as_ref().map(|(at, _)| *at),
        }
    }
}

/// A name beside the target that no other restore uses.
fn partial_name(target: &Path, id: &str) -> PathBuf {
    target.with_file_name(format!(".{id}.partial"))
}
