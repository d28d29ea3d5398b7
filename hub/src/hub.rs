//! The hub: the database, the repositories, the NBD server and the jobs in work, and what may be asked of them. It knows
//! neither HTTP nor command lines, and leaves what a job does to [`crate::runner`].

mod checks;
pub(crate) mod data;
mod recovery;
mod sources;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use chain::Repository;
use jiff::Timestamp;
use nbd_server::{Counters, Server, ServerConfig};
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::db::{Database, DbError, NewJob, Refusal};
use crate::error::HubError;
use crate::job::{Ending, Step};
use crate::model::{AgentKind, Backup, BackupType, Level, RepositoryRow, RepositoryType, Vm};
use crate::restore::Restores;
use crate::runner::{self, JobHandle, Message};
use crate::stores::{self, Stores};
use crate::{api, names};

/// How many backups by the agent in this process are made at once; the others wait, pending.
pub const MAX_RUNNING_JOBS: usize = 8;

/// How many backups by external agents are served at once, those that still wait for their agent included. They have
/// slots of their own: an agent that does not come must not keep the hub's own work waiting.
pub const MAX_EXTERNAL_JOBS: usize = 64;

/// How many jobs are accepted at once, in work and waiting.
pub const MAX_ACTIVE_JOBS: usize = 1000;

/// How long an external agent may be silent unless told otherwise.
pub const AGENT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the agent in this process may go without moving a byte unless told otherwise.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(300);

/// How long an external agent may take to connect.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(600);

/// The most disks of one virtual machine.
pub const MAX_DISKS: usize = 256;

/// The most bytes of a name.
pub const MAX_NAME_BYTES: usize = 1024;

/// How long jobs may take to end when the hub stops.
const JOBS_STOP: Duration = Duration::from_secs(20);

/// How long the NBD server may take to close its connections.
const NBD_STOP: Duration = Duration::from_secs(5);

/// How a hub is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the database, the sockets and the agent's digests live.
    pub data: PathBuf,
    /// Where external agents connect; `None` for nowhere.
    pub nbd_listen: Option<SocketAddr>,
    /// How long an external agent may be silent.
    pub agent_timeout: Duration,
    /// How long it may take to connect.
    pub connect_timeout: Duration,
    /// How long the agent in this process may go without moving a byte.
    pub stall_timeout: Duration,
}

impl Config {
    /// The defaults, for a data directory, without a TCP port.
    pub fn new(data: impl Into<PathBuf>) -> Self {
        Self {
            data: data.into(),
            nbd_listen: None,
            agent_timeout: AGENT_TIMEOUT,
            connect_timeout: CONNECT_TIMEOUT,
            stall_timeout: STALL_TIMEOUT,
        }
    }
}

/// Why a hub does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The data directory cannot be made or used.
    #[error("the data directory {} cannot be used: {source}", path.display())]
    Data {
        /// The directory or a file in it.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// Another hub works there.
    #[error("another hub works in {}: stop it, or give this one its own --data", .0.display())]
    InUse(PathBuf),
    /// The database does not open.
    #[error(transparent)]
    Database(#[from] DbError),
    /// The NBD server cannot listen.
    #[error("cannot listen for NBD on {at}: {source}")]
    Listen {
        /// Where.
        at: String,
        /// What the host said.
        source: io::Error,
    },
}

/// The hub.
pub struct Hub {
    pub(crate) config: Config,
    pub(crate) db: Database,
    pub(crate) server: Server,
    slots: Arc<Semaphore>,
    external_slots: Arc<Semaphore>,
    pub(crate) restores: Restores,
    stores: Stores,
    nbd_address: Option<SocketAddr>,
    /// Every job that has not ended, by id.
    jobs: Mutex<HashMap<String, JobHandle>>,
    tasks: Mutex<JoinSet<()>>,
    stopping: agent::CancelToken,
    /// Held as long as the hub lives: one hub a data directory.
    _lock: File,
}

impl Hub {
    /// Opens the data directory, ends what the last stop interrupted, and listens for NBD.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(config: Config) -> Result<Arc<Self>, StartError> {
        let lock = data::open(&config.data)?;
        let path = config.data.join("hub.db");
        let db = tokio::task::spawn_blocking(move || Database::open(&path))
            .await
            .map_err(|_| DbError::Closed)??;
        let server = Server::new(ServerConfig::default());
        let socket = config.data.join("nbd.sock");
        let failed = |at: String| move |source| StartError::Listen { at, source };
        server.listen_unix(&socket).await.map_err(failed(socket.display().to_string()))?;
        let nbd_address = match config.nbd_listen {
            Some(address) => {
                Some(server.listen_tcp(address).await.map_err(failed(address.to_string()))?)
            }
            None => None,
        };
        let hub = Arc::new(Self {
            config,
            db,
            server,
            slots: Arc::new(Semaphore::new(MAX_RUNNING_JOBS)),
            external_slots: Arc::new(Semaphore::new(MAX_EXTERNAL_JOBS)),
            restores: Restores::default(),
            stores: Stores::default(),
            nbd_address,
            jobs: Mutex::default(),
            tasks: Mutex::default(),
            stopping: agent::CancelToken::new(),
            _lock: lock,
        });
        hub.recover().await?;
        Ok(hub)
    }

    /// Where external agents connect.
    pub fn nbd_address(&self) -> Option<SocketAddr> {
        self.nbd_address
    }

    /// The Unix socket of the NBD server.
    pub(crate) fn nbd_socket(&self) -> PathBuf {
        self.config.data.join("nbd.sock")
    }

    /// Where the agent in this process keeps the digests of a virtual machine.
    pub(crate) fn state_dir(&self, context_id: &str) -> PathBuf {
        self.config.data.join("agent").join(context_id)
    }

    /// Opens a repository, and on its first opening removes what dead jobs left in it.
    ///
    /// # Errors
    /// As [`Stores::get`].
    pub(crate) async fn repository(
        &self,
        row: &RepositoryRow,
    ) -> Result<Arc<Repository>, HubError> {
        if let Some(repository) = self.stores.opened(&row.id).await {
            return Ok(repository);
        }
        let repository = self.stores.get(row).await?;
        for path in self.db.dead_layers(&row.id).await? {
            if let Err(error) = repository.remove_layer(Path::new(&path)).await {
                tracing::warn!(layer = path, %error, "a dead layer stays behind");
            }
        }
        Ok(repository)
    }

    /// Adds an entry to a backup's log, and to the hub's own.
    pub(crate) async fn log(&self, id: &str, step: Option<Step>, level: Level, message: &str) {
        match level {
            Level::Info => tracing::info!(backup = id, "{message}"),
            Level::Warning => tracing::warn!(backup = id, "{message}"),
            Level::Error => tracing::error!(backup = id, "{message}"),
        }
        let step = step.map(Step::as_str);
        let added = self.db.add_event(id, Timestamp::now(), step, level, message).await;
        if let Err(error) = added {
            tracing::error!(backup = id, %error, "an entry of the job log was lost");
        }
    }

    /// Adds a virtual machine; with it, what is odd about its sources.
    ///
    /// # Errors
    /// [`HubError::Invalid`] for what breaks a rule, [`Refusal::Exists`].
    pub async fn add_vm(&self, wish: api::AddVm) -> Result<(Vm, Vec<String>), HubError> {
        let new = checks::vm(wish)?;
        let warnings = sources::look(&new).await?;
        Ok((self.db.insert_vm(new).await?, warnings))
    }

    /// Forgets a virtual machine that has no backups, and the digests that were kept for it.
    ///
    /// # Errors
    /// [`Refusal::Unknown`], [`Refusal::HasBackups`].
    pub async fn delete_vm(&self, name: &str) -> Result<(), HubError> {
        let vm = self.db.vm(name).await?;
        self.db.delete_vm(name).await?;
        let digests = self.state_dir(&vm.context_id);
        match tokio::fs::remove_dir_all(&digests).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %digests.display(), %error, "digests stay behind");
            }
            _ => {}
        }
        Ok(())
    }

    /// Takes note of what changed about the disks of a virtual machine: where they are, how large they are.
    ///
    /// # Errors
    /// [`Refusal::Unknown`]; [`HubError::Invalid`] for what breaks a rule; [`Refusal::Active`] while a backup of it is
    /// in work.
    pub async fn change_vm(&self, name: &str, wish: api::ChangeVm) -> Result<Vm, HubError> {
        let vm = self.db.vm(name).await?;
        let changes = checks::changed(&vm, wish)?;
        Ok(self.db.change_vm(&vm.context_id, name, changes, Timestamp::now()).await?)
    }

    /// Adds a repository: its directory must be there, writable, and nobody else's.
    ///
    /// # Errors
    /// [`HubError::Invalid`], [`HubError::Conflict`], [`HubError::Unavailable`], [`Refusal::Exists`].
    pub async fn add_repository(
        &self,
        wish: api::AddRepository,
    ) -> Result<RepositoryRow, HubError> {
        checks::name("a repository", &wish.name)?;
        if wish.kind != RepositoryType::Local {
            return Err(HubError::Invalid(format!(
                "repositories of type {} cannot be used yet; only local",
                wish.kind
            )));
        }
        let path = Path::new(&wish.path);
        if !path.is_absolute() {
            return Err(HubError::Invalid(format!("{:?} is not an absolute path", wish.path)));
        }
        self.check_untaken(&wish.name, path).await?;
        if matches!(tokio::fs::try_exists(path).await, Ok(false)) {
            return Err(HubError::Invalid(format!(
                "{} does not exist on the hub's host; make the folder first: mkdir -p {}",
                wish.path, wish.path
            )));
        }
        let repository = stores::open_root(path).await.map_err(|error| match error {
            HubError::Unavailable(why) => HubError::Invalid(why),
            error => error,
        })?;
        let root = repository.root().to_str().map(str::to_owned);
        let row = RepositoryRow {
            id: names::fresh_id("repository"),
            name: wish.name,
            kind: wish.kind,
            path: root.ok_or_else(|| HubError::Invalid("the path is not UTF-8".to_owned()))?,
            created_at: Timestamp::now(),
        };
        self.db.insert_repository(row.clone()).await?;
        self.stores.keep(&row.id, repository).await;
        Ok(row)
    }

    /// Refuses a name or a directory that another repository has. Asked first, because opening it a second time would
    /// only say that its lease is taken: by this hub.
    async fn check_untaken(&self, name: &str, path: &Path) -> Result<(), HubError> {
        let canonical = tokio::fs::canonicalize(path).await.unwrap_or_else(|_| path.to_owned());
        let all = self.db.repositories().await?;
        let conflict = |text| Err(HubError::Conflict(text));
        if let Some(row) = all.iter().find(|row| row.name == name || row.id == name) {
            return conflict(format!(
                "the name {name:?} is taken: by the repository at {}",
                row.path
            ));
        }
        if let Some(row) = all.iter().find(|row| Path::new(&row.path) == canonical) {
            return conflict(format!("{} is the repository {:?} already", row.path, row.name));
        }
        Ok(())
    }

    /// Accepts a backup; it is made in the background.
    ///
    /// # Errors
    /// [`Refusal::Unknown`], [`Refusal::Active`], [`HubError::Invalid`], [`HubError::Unavailable`].
    pub async fn start_backup(
        self: &Arc<Self>,
        wish: api::StartBackup,
    ) -> Result<Backup, HubError> {
        if wish.backup_type == BackupType::Differential {
            return Err(HubError::Invalid(
                "differential backups cannot be made yet; ask for full or incremental".to_owned(),
            ));
        }
        if self.stopping.is_cancelled() {
            return Err(HubError::Unavailable("the hub is stopping".to_owned()));
        }
        if self.jobs.lock().len() >= MAX_ACTIVE_JOBS {
            let full = format!("{MAX_ACTIVE_JOBS} jobs are in work or waiting; try again later");
            return Err(HubError::Unavailable(full));
        }
        let vm = self.db.vm(&wish.vm_name).await?;
        if vm.agent == AgentKind::External && self.nbd_address.is_none() {
            return Err(HubError::Invalid(
                "the virtual machine has an external agent, but the hub listens on no port for it; \
                 start the hub with --nbd-listen"
                    .to_owned(),
            ));
        }
        let repository = self.choose_repository(wish.repository_id).await?;
        let job = self
            .db
            .insert_job(NewJob {
                vm_name: wish.vm_name,
                repository,
                backup_type: wish.backup_type,
                now: Timestamp::now(),
            })
            .await?;
        self.drive(job.clone(), vm.agent);
        Ok(job)
    }

    /// The id of the repository that was named, or of the only one there is.
    async fn choose_repository(&self, wanted: Option<String>) -> Result<String, HubError> {
        if let Some(wanted) = wanted {
            return Ok(wanted);
        }
        match self.db.repositories().await?.as_slice() {
            [only] => Ok(only.id.clone()),
            [] => Err(HubError::Invalid("there is no repository yet; add one first".to_owned())),
            _ => Err(HubError::Invalid("there are several repositories; name one".to_owned())),
        }
    }

    /// Gives a job its driver, under watch: one that dies of a bug is ended like one that a crash interrupted.
    fn drive(self: &Arc<Self>, job: Backup, agent: AgentKind) {
        let (driver, handle) = runner::prepare(self, job.clone(), agent);
        if self.stopping.is_cancelled() {
            stop_handle(&handle);
        }
        self.jobs.lock().insert(job.id.clone(), handle);
        let hub = Arc::clone(self);
        let mut tasks = self.tasks.lock();
        while tasks.try_join_next().is_some() {}
        tasks.spawn(async move {
            if tokio::spawn(driver.run()).await.is_err() {
                tracing::error!(backup = %job.id, "the driver of a job died");
                let reason = "the hub made a mistake; its log says more";
                if let Err(error) = hub.bury(&job, reason).await {
                    tracing::error!(backup = %job.id, %error, "a dead job was not cleaned up");
                }
            }
            hub.jobs.lock().remove(&job.id);
        });
    }

    /// The turns that jobs with this kind of agent wait for.
    pub(crate) fn slots(&self, agent: AgentKind) -> Arc<Semaphore> {
        match agent {
            AgentKind::Local => Arc::clone(&self.slots),
            AgentKind::External => Arc::clone(&self.external_slots),
        }
    }

    /// Returns once the hub was told to stop.
    pub(crate) async fn stopping(&self) {
        self.stopping.cancelled().await;
    }

    /// The hold on a job that has not ended.
    pub(crate) fn job(&self, id: &str) -> Option<JobHandle> {
        self.jobs.lock().get(id).cloned()
    }

    /// Returns once a job has ended; at once where it has, or never was.
    pub async fn backup_ended(&self, id: &str) {
        if let Some(handle) = self.job(id) {
            handle.mailbox.closed().await;
        }
    }

    /// The names of what the NBD server serves now.
    pub fn export_names(&self) -> Vec<String> {
        self.server.exports().into_iter().map(|export| export.name).collect()
    }

    /// What was done through an export so far; nothing where it is not there.
    pub(crate) fn counters(&self, export: &str) -> Counters {
        let all = self.server.exports();
        all.iter().find(|one| one.name == export).map(|one| one.counters).unwrap_or_default()
    }

    /// How many jobs have not ended.
    pub(crate) fn active_jobs(&self) -> usize {
        self.jobs.lock().len()
    }

    /// Asks a job to stop. It ends cancelled, unless its commit is on its way.
    ///
    /// # Errors
    /// [`Refusal::Unknown`], [`Refusal::WrongState`] where it has ended.
    pub async fn cancel_backup(&self, id: &str) -> Result<Backup, HubError> {
        let backup = self.db.backup(id).await?;
        let refuse = || Refusal::WrongState { backup_id: backup.id.clone(), status: backup.status };
        let handle = self.job(id).ok_or_else(refuse)?;
        let reason = "cancelled on request".to_owned();
        self.tell(&handle, Message::Stop(Ending { cancelled: true, reason })).await?;
        Ok(backup)
    }

    /// Leaves a message in a job's mailbox.
    pub(crate) async fn tell(&self, handle: &JobHandle, message: Message) -> Result<(), HubError> {
        let gone = |_| HubError::Conflict("the job has ended".to_owned());
        handle.mailbox.send(message).await.map_err(gone)
    }

    /// Deletes a backup that no other stands on, with its layers.
    ///
    /// # Errors
    /// [`Refusal::Unknown`], [`Refusal::WrongState`], [`Refusal::HasChildren`]; [`HubError::Conflict`] while it is
    /// restored; [`HubError::Unavailable`] where its repository is offline.
    pub async fn delete_backup(&self, id: &str) -> Result<(), HubError> {
        let backup = self.db.backup(id).await?;
        let _alone = self.restores.exclude(id).ok_or_else(|| {
            HubError::Conflict(format!("{id} is being restored; wait until that has ended"))
        })?;
        let row = self.db.repository(&backup.repository_id).await?;
        let repository = self.repository(&row).await?;
        let (_, disks) = self.db.begin_delete(id, Timestamp::now()).await?;
        runner::remove_layers(&repository, &disks).await.map_err(HubError::Unavailable)?;
        self.db.finish_delete(id).await?;
        tracing::info!(backup = id, "deleted");
        Ok(())
    }

    /// Stops: accepts no jobs, ends those in work with a reason, closes all connections. Bounded in time.
    pub async fn stop(&self) {
        self.stopping.cancel();
        let handles: Vec<_> = self.jobs.lock().values().cloned().collect();
        for handle in &handles {
            stop_handle(handle);
        }
        self.restores.stop();
        let mut tasks = std::mem::take(&mut *self.tasks.lock());
        let ended = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(JOBS_STOP, ended).await.is_err() {
            tracing::error!("jobs did not end in time; the next start ends them");
        }
        self.restores.ended(NBD_STOP).await;
        let report = self.server.shutdown(NBD_STOP).await;
        if report.dropped_connections > 0 {
            tracing::warn!(connections = report.dropped_connections, "NBD connections were cut");
        }
    }
}

fn stop_handle(handle: &JobHandle) {
    let ending = Ending { cancelled: false, reason: "the hub was stopped".to_owned() };
    if handle.mailbox.try_send(Message::Stop(ending)).is_err() {
        // A full mailbox: the step in work gives up, and the job fails with its words.
        handle.stop.cancel();
    }
}
