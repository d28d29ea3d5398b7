//! What a hub does about its predecessor's jobs, and about one whose driver died: they end with a reason and their layers
//! go, and so do files that restores left half written. Completed backups are not touched.

use std::io::ErrorKind;
use std::path::Path;

use jiff::Timestamp;

use super::{Hub, StartError};
use crate::db::DbError;
use crate::error::describe;
use crate::model::{Backup, BackupDisk, Level, Status};
use crate::runner;

impl Hub {
    /// Ends what a stop of the hub interrupted: jobs in work, deletions half done. What was completed is not touched.
    pub(super) async fn recover(&self) -> Result<(), StartError> {
        for row in self.db.repositories().await? {
            if let Err(error) = self.repository(&row).await {
                tracing::warn!(repository = row.name, %error, "a repository is offline");
            }
        }
        for job in self.db.active_jobs().await? {
            let doing = match &job.step {
                Some(step) => format!("its step {step} was in work"),
                None => "it was waiting".to_owned(),
            };
            // One whose end had been announced keeps its own reason.
            let reason = match &job.error_message {
                Some(reason) => reason.clone(),
                None => format!("the hub stopped while {doing}"),
            };
            self.bury(&job, &reason).await?;
        }
        for partial in self.db.partials().await? {
            self.remove_partial(&partial).await?;
        }
        for backup in self.db.half_deleted().await? {
            if let Err(error) = self.delete_backup(&backup.id).await {
                tracing::warn!(backup = %backup.id, %error, "a deletion is still not finished");
            }
        }
        Ok(())
    }

    /// Removes what a restore left half written. What cannot be removed now is tried again at the next start.
    async fn remove_partial(&self, path: &Path) -> Result<(), DbError> {
        match tokio::fs::remove_file(path).await {
            Ok(()) => tracing::info!("removed {}, which a restore left behind", path.display()),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                tracing::warn!(%error, "{} stays behind from a restore", path.display());
                return Ok(());
            }
        }
        self.db.forget_partial(path).await
    }

    /// Ends a job that has no driver any more, and removes its layers.
    pub(super) async fn bury(&self, job: &Backup, reason: &str) -> Result<(), DbError> {
        self.db.announce_end(&job.id, reason).await?;
        let (_, disks) = self.db.backup_with_disks(&job.id).await?;
        if let Err(error) = self.remove_files(job, &disks).await {
            let message = format!("layers are left until the repository is opened again: {error}");
            self.log(&job.id, None, Level::Warning, &message).await;
        }
        self.db.end(&job.id, Status::Failed, reason, 0, Timestamp::now()).await
    }

    async fn remove_files(&self, job: &Backup, disks: &[BackupDisk]) -> Result<(), String> {
        let row = self.db.repository(&job.repository_id).await.map_err(|error| describe(&error))?;
        let repository = self.repository(&row).await.map_err(|error| describe(&error))?;
        for disk in disks {
            // The export of a driver that died may still hold the layer open.
            if let Ok(device) =
                self.server.remove_export(&disk.export_name, nbd_server::Removal::Cut).await
            {
                let _ = device.close().await;
            }
        }
        runner::remove_layers(&repository, disks).await
    }
}
