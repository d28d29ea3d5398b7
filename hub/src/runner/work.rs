//! The steps of a job, performed: layers made, exports added, the agent run, layers sealed, the backup committed; and all
//! of it undone. Their order and what follows a failure is the machine's business.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::{Address, AgentError, CancelToken, DiskJob, DiskReport, RunOptions, RunReport, Target};
use chain::{Repository, SealFacts};
use jiff::Timestamp;
use nbd_server::{Export, Removal};
use tokio::task::JoinHandle;

use super::arrival;
use super::disk::{DiskWork, look_at};
use crate::db::DbError;
use crate::error::describe;
use crate::fault::Remembering;
use crate::hub::Hub;
use crate::job::{Ending, Step};
use crate::model::{AgentKind, Backup, BackupDisk, Level, VmDisk};
use crate::progress::{DiskProgress, Progress};

/// How long the agent in this process may take to stop before it is dropped.
const AGENT_STOP: Duration = Duration::from_secs(10);

/// How long to wait before the database is told again what it did not take.
const INSIST_EVERY: Duration = Duration::from_secs(2);

/// A reason, in words for people.
pub(super) type Reason = String;

/// What the steps of one job work on.
pub(super) struct Work {
    pub(super) hub: Arc<Hub>,
    pub(super) job: Backup,
    pub(super) progress: Arc<Progress>,
    pub(super) stop: CancelToken,
    pub(super) agent: AgentKind,
    pub(super) repository: Option<Arc<Repository>>,
    pub(super) disks: Vec<DiskWork>,
    pub(super) run: Option<JoinHandle<Result<RunReport, AgentError>>>,
}

impl Work {
    pub(super) fn new(
        hub: Arc<Hub>,
        job: Backup,
        progress: Arc<Progress>,
        stop: CancelToken,
    ) -> Self {
        let (disks, agent) = (Vec::new(), AgentKind::Local);
        Self { hub, job, progress, stop, agent, repository: None, disks, run: None }
    }

    /// Makes one step.
    ///
    /// # Errors
    /// Why it failed, in words for people.
    pub(super) async fn perform(&mut self, step: Step) -> Result<(), Reason> {
        match step {
            Step::Validate => self.validate().await,
            Step::Repository => self.open_repository().await,
            Step::Layers => self.make_layers().await,
            Step::Exports => self.add_exports(),
            Step::Agent => self.start_agent(),
            Step::Monitor => self.await_agent().await,
            Step::Durable => self.seal().await,
            Step::Complete => self.complete().await,
        }
    }

    /// Takes what an external agent reported so far; whether every disk has been.
    pub(super) fn take_reports(&mut self, reports: &BTreeMap<u32, DiskReport>) -> bool {
        for disk in &mut self.disks {
            disk.report = reports.get(&disk.index).cloned();
        }
        !self.disks.is_empty() && self.disks.iter().all(|disk| disk.report.is_some())
    }

    async fn validate(&mut self) -> Result<(), Reason> {
        let vm = self.hub.db.vm(&self.job.vm_name).await.map_err(|error| describe(&error))?;
        self.agent = vm.agent;
        if vm.disks.is_empty() {
            return Err("the virtual machine has no disks".to_owned());
        }
        let patience = self.hub.config.stall_timeout;
        for disk in &vm.disks {
            let found = tokio::select! {
                found = tokio::time::timeout(patience, look_at(vm.agent, disk)) => {
                    found.map_err(|_| silent(disk, patience))??
                }
                () = self.stop.cancelled() => return Err("stopped".to_owned()),
            };
            let total = found.size_bytes;
            self.progress.set(
                disk.index,
                DiskProgress { total, ..DiskProgress::default() },
                Instant::now(),
            );
            self.disks.push(found);
        }
        Ok(())
    }

    async fn open_repository(&mut self) -> Result<(), Reason> {
        let row = self.hub.db.repository(&self.job.repository_id).await;
        let row = row.map_err(|error| describe(&error))?;
        let repository = self.hub.repository(&row).await.map_err(|error| describe(&error))?;
        self.repository = Some(repository);
        Ok(())
    }

    fn add_exports(&mut self) -> Result<(), Reason> {
        for disk in &mut self.disks {
            let (Some(layer), Some(plan)) = (&disk.layer, &disk.plan) else {
                return Err(format!("disk {} has no layer", disk.index));
            };
            let device = Arc::new(Remembering::new(layer.device(), disk.fault.clone()));
            let export = Export::new(plan.export_name.clone(), device)
                .description(format!("{} disk {}", self.job.vm_name, disk.index));
            self.hub.server.add_export(export).map_err(|error| error.to_string())?;
            disk.export = Some(plan.export_name.clone());
        }
        Ok(())
    }

    fn start_agent(&mut self) -> Result<(), Reason> {
        let disks = self.disks.iter().map(|disk| self.disk_job(disk)).collect::<Result<_, _>>()?;
        let options = RunOptions::new(self.hub.state_dir(&self.job.vm_context_id), &self.job.id);
        let (sender, mut events) = agent::event_channel();
        let (hub, id) = (Arc::clone(&self.hub), self.job.id.clone());
        let progress = Arc::clone(&self.progress);
        // Ends by itself: the run drops its end of the channel.
        let noting = async move {
            while let Some(event) = events.recv().await {
                if let Some(warning) = note(&progress, &event) {
                    hub.log(&id, Some(Step::Monitor), Level::Warning, &warning).await;
                }
            }
        };
        let run = agent::run(disks, options, sender, self.stop.clone());
        // The run is over when its last warning is in the log: whoever sees the end of the job sees them all.
        self.run = Some(tokio::spawn(async move { tokio::join!(run, noting).0 }));
        Ok(())
    }

    fn disk_job(&self, disk: &DiskWork) -> Result<DiskJob, Reason> {
        let export = disk.export.clone().ok_or("a disk has no export")?;
        let address = Address::Unix(self.hub.nbd_socket());
        Ok(DiskJob {
            index: disk.index,
            key: disk.key,
            source: disk.source.clone(),
            target: Target { address, export, tls: None },
            previous_change_id: disk.parent.as_ref().map(|parent| parent.change_id.clone()),
            full: disk.parent.is_none(),
        })
    }

    async fn await_agent(&mut self) -> Result<(), Reason> {
        let mut run = self.run.take().ok_or("the agent was not started")?;
        let ended = tokio::select! {
            ended = &mut run => ended,
            why = self.stalled() => {
                // Whoever undoes the job stops it.
                self.run = Some(run);
                return Err(why);
            }
            () = overdue(&self.stop) => {
                run.abort();
                self.run = Some(run);
                return Err("the agent did not stop in time".to_owned());
            }
        };
        let report = match ended {
            Ok(Ok(report)) => report,
            Ok(Err(error)) => return Err(self.why(describe(&error))),
            Err(_) => return Err("the agent died of a bug; the log says more".to_owned()),
        };
        for disk in &mut self.disks {
            disk.report = report.disks.iter().find(|one| one.disk_index == disk.index).cloned();
        }
        Ok(())
    }

    /// The reason of a failure: what the repository said, where it was the repository that failed.
    fn why(&self, told: Reason) -> Reason {
        match self.disks.iter().find_map(|disk| disk.fault.first().map(|fault| (disk.index, fault)))
        {
            Some((index, fault)) => format!("disk {index}: the repository failed: {fault}"),
            None => told,
        }
    }

    async fn seal(&mut self) -> Result<(), Reason> {
        let repository = self.repository.clone().ok_or("the repository is not open")?;
        for disk in &mut self.disks {
            let report = disk
                .report
                .as_ref()
                .ok_or_else(|| format!("the agent did not report disk {}", disk.index))?;
            if report.change_id.is_empty() {
                return Err(format!("the agent reported no change id for disk {}", disk.index));
            }
            if let Some(name) = disk.export.take() {
                let counters = self.hub.counters(&name);
                let removed = self.hub.server.remove_export(&name, Removal::Cut).await;
                removed.map_err(|error| error.to_string())?;
                arrival::check(report, &counters, disk.parent.is_none(), &name)
                    .map_err(|why| format!("disk {}: {why}", disk.index))?;
            }
            // Nobody writes any more: a fault from here back means that something sent is not there.
            if let Some(fault) = disk.fault.first() {
                return Err(format!("disk {}: the repository failed: {fault}", disk.index));
            }
            let layer = disk.layer.take().ok_or("a disk has no layer")?;
            let facts = SealFacts {
                change_id: Some(report.change_id.clone()),
                bytes_transferred: report.wire_bytes,
                sealed_at: Some(Timestamp::now()),
            };
            let sealed = repository.seal_layer(layer, facts).await;
            let reason = |error| format!("disk {}: {}", disk.index, describe(&error));
            disk.manifest = Some(sealed.map_err(reason)?);
        }
        Ok(())
    }

    async fn complete(&mut self) -> Result<(), Reason> {
        let outcomes = self.disks.iter().filter_map(DiskWork::outcome).collect();
        let done = self.hub.db.complete(&self.job.id, outcomes, Timestamp::now()).await;
        done.map_err(|error| describe(&error))
    }

    /// Removes every trace of the job but its rows, then ends it. The end is announced before files go: a commit
    /// whose failure was reported wrongly would be found there, and then they stay.
    pub(super) async fn undo(&mut self, ending: &Ending) {
        if let Some(mut run) = self.run.take() {
            self.stop.cancel();
            if tokio::time::timeout(AGENT_STOP, &mut run).await.is_err() {
                run.abort();
                let _ = run.await;
            }
        }
        for disk in &mut self.disks {
            if let Some(name) = disk.export.take() {
                // It can only be missing already, which is what is wanted.
                let _ = self.hub.server.remove_export(&name, Removal::Cut).await;
            }
        }
        let id = &self.job.id;
        if let Err(error) = self.insist(|| self.hub.db.announce_end(id, &ending.reason)).await {
            tracing::error!(backup = %id, %error, "a job cannot be ended; its files are left for the next start");
            return;
        }
        for disk in &mut self.disks {
            if let Some(layer) = disk.layer.take() {
                // Whatever it says, the layer is removed below.
                if let Some(repository) = &self.repository {
                    let _ = repository.abandon_layer(layer).await;
                }
            }
        }
        if let Some(repository) = &self.repository {
            for disk in &self.disks {
                let Some(plan) = &disk.plan else { continue };
                if let Err(error) = repository.remove_layer(&plan.path).await {
                    let message = format!("a layer is left behind: {}", describe(&error));
                    self.hub.log(id, None, Level::Warning, &message).await;
                }
            }
        }
        let sent = self.progress.sum().sent;
        let (status, now) = (ending.status(), Timestamp::now());
        let ended = self.insist(|| self.hub.db.end(id, status, &ending.reason, sent, now)).await;
        if let Err(error) = ended {
            tracing::error!(backup = %id, %error, "the end of a job was not noted");
        }
    }

    /// Tells the database until it takes it, refuses it, or the hub stops: a full disk must not leave a job in work for
    /// ever.
    async fn insist<F>(&self, mut tell: impl FnMut() -> F) -> Result<(), DbError>
    where
        F: Future<Output = Result<(), DbError>>,
    {
        loop {
            let error = match tell().await {
                Err(error) if !matches!(error, DbError::Refused(_) | DbError::Closed) => error,
                told => return told,
            };
            tracing::error!(backup = %self.job.id, %error, "the database does not take the end of a job; trying again");
            tokio::select! {
                () = tokio::time::sleep(INSIST_EVERY) => {}
                () = self.hub.stopping() => return Err(error),
            }
        }
    }

    pub(super) async fn log(&self, step: Step, level: Level, message: &str) {
        self.hub.log(&self.job.id, Some(step), level, message).await;
    }
}

/// Takes note of what an agent tells; the text of a warning, if it is one.
pub(crate) fn note(progress: &Progress, event: &agent::Event) -> Option<String> {
    use agent::Event;
    let now = Instant::now();
    match event {
        Event::DiskStarted { disk_index, capacity_bytes, .. } => {
            let total = *capacity_bytes;
            progress.set(*disk_index, DiskProgress { total, ..DiskProgress::default() }, now);
            None
        }
        Event::Progress {
            disk_index,
            bytes_done,
            bytes_total,
            read_bytes,
            data_bytes_sent,
            ..
        } => {
            let disk = DiskProgress {
                done: *bytes_done,
                total: *bytes_total,
                read: *read_bytes,
                sent: *data_bytes_sent,
            };
            progress.set(*disk_index, disk, now);
            None
        }
        Event::DiskFinished { report } => {
            let disk = DiskProgress {
                done: report.capacity_bytes,
                total: report.capacity_bytes,
                read: report.read_bytes,
                sent: report.data_bytes_sent,
            };
            progress.set(report.disk_index, disk, now);
            None
        }
        Event::Warning { disk_index, message } => Some(match disk_index {
            Some(index) => format!("disk {index}: {message}"),
            None => message.clone(),
        }),
        Event::RunFinished { .. } | Event::RunFailed { .. } => None,
    }
}

/// Removes the layers of a job that is no backup, newest disk first; what is missing is fine.
pub(crate) async fn remove_layers(
    repository: &Repository,
    disks: &[BackupDisk],
) -> Result<(), Reason> {
    for disk in disks.iter().rev() {
        let removed = repository.remove_layer(Path::new(&disk.path)).await;
        removed.map_err(|error| describe(&error))?;
    }
    Ok(())
}

fn silent(disk: &VmDisk, patience: Duration) -> Reason {
    format!("disk {}: {} does not answer for {patience:?}", disk.index, disk.source)
}

/// Returns a while after the wish to stop.
async fn overdue(stop: &CancelToken) {
    stop.cancelled().await;
    tokio::time::sleep(AGENT_STOP).await;
}
