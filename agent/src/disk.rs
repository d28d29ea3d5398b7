//! One disk of a run, from opening its two ends to its report. The bytes go through the pipeline.

use std::sync::Arc;
use std::time::Instant;

use block::BlockDevice;
use nbd_server::client::{ClientError, ClientOptions, NbdDevice};
use tokio::sync::mpsc;

use crate::change_id::{ChangeId, StateId};
use crate::compare::{Baseline, Comparison};
use crate::digest_file::{DigestError, DigestReader, DigestWriter, DiskIdentity, Finished, Header};
use crate::ledger::Ledger;
use crate::pipeline::{Pipeline, PipelineError};
use crate::plan::{Ask, FullReason, Plan, Record, Start, plan};
use crate::progress::Progress;
use crate::source::Source;
use crate::sweep::sweep;
use crate::{AgentError, DiskId, DiskJob, DiskReport, Event, EventSender, RunOptions, tls};

/// What one disk's task knows.
pub(crate) struct DiskRun {
    /// What is to be done.
    pub(crate) job: DiskJob,
    /// How.
    pub(crate) options: RunOptions,
    /// Who is told.
    pub(crate) events: EventSender,
    /// Held by threads of this disk that may outlive its future for a moment.
    pub(crate) alive: mpsc::Sender<()>,
}

/// A disk that is through: its report, and what went otherwise than asked for.
pub(crate) struct DiskOutcome {
    pub(crate) report: DiskReport,
    pub(crate) warnings: Vec<String>,
}

/// What the disk is compared with, opened, and what is kept of its new state.
struct Prepared {
    dirty_only: bool,
    comparison: Comparison<DigestReader>,
    full_reason: Option<FullReason>,
    incremental: bool,
    change_id: ChangeId,
    /// The header of the digest file that is kept, if one is.
    header: Option<Header>,
}

impl DiskRun {
    /// Sends the disk.
    pub(crate) async fn run(self) -> Result<DiskOutcome, AgentError> {
        let started = Instant::now();
        let (source, target) = tokio::try_join!(self.open_source(), self.connect_target())?;
        self.check_sizes(&source, &target)?;
        let plan = plan(&Ask {
            previous: self.job.previous_change_id.as_deref(),
            full: self.job.full,
            bitmap: source.bitmap(),
        });
        let prepared = self.prepare(&plan, source.size_bytes()).await?;
        self.events.tell(self.started(&source, &prepared)).await;
        let mut warnings = self.warn(&source, &prepared).await;

        let (full_reason, incremental) = (prepared.full_reason.clone(), prepared.incremental);
        let (change_id, header) = (prepared.change_id.clone(), prepared.header);
        let progress = Progress::new(self.id(), source.size_bytes(), self.events.clone());
        let progress = Arc::new(progress);
        let kept = self.transfer(&source, &target, prepared, &progress).await?;
        target.flush().await.map_err(|cause| AgentError::FlushTarget {
            disk: self.id(),
            target: self.job.target.to_string(),
            cause: cause.into(),
        })?;
        warnings.extend(self.check_source_size(&source).await?);
        self.publish(kept, header, plan.previous).await?;
        progress.tell_end();
        tokio::join!(source.close(), target.disconnect());

        let (read_bytes, data_bytes_sent, zero_bytes_sent) = progress.totals();
        let report = DiskReport {
            disk_index: self.job.index,
            disk_key: self.job.key,
            source: self.job.source.to_string(),
            capacity_bytes: source.size_bytes(),
            change_id: change_id.to_string(),
            incremental,
            full_reason: full_reason.map(|reason| reason.to_string()),
            read_bytes,
            changed_bytes: data_bytes_sent + zero_bytes_sent,
            data_bytes_sent,
            zero_bytes_sent,
            wire_bytes: target.wire_bytes().0,
            elapsed_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        };
        self.events.tell(Event::DiskFinished { report: report.clone() }).await;
        Ok(DiskOutcome { report, warnings })
    }

    fn id(&self) -> DiskId {
        DiskId { index: self.job.index, key: self.job.key }
    }

    async fn open_source(&self) -> Result<Source, AgentError> {
        let opened = Source::open(&self.job.source, self.options.connections).await;
        opened.map_err(|cause| AgentError::OpenSource {
            disk: Some(self.id()),
            source_name: self.job.source.to_string(),
            cause,
        })
    }

    async fn connect_target(&self) -> Result<Arc<NbdDevice>, AgentError> {
        let target = &self.job.target;
        let options = ClientOptions {
            connections: self.options.connections,
            meta_contexts: Vec::new(),
            ..ClientOptions::default()
        };
        let connecting =
            tls::connect(&target.address, &target.export, target.tls.as_ref(), options);
        let connected = connecting.await;
        connected.map_err(|cause: ClientError| AgentError::ConnectTarget {
            disk: self.id(),
            target: target.to_string(),
            cause: cause.into(),
        })
    }

    fn check_sizes(&self, source: &Source, target: &NbdDevice) -> Result<(), AgentError> {
        let limits = target.limits();
        if limits.read_only {
            return Err(AgentError::TargetReadOnly {
                disk: self.id(),
                target: self.job.target.to_string(),
            });
        }
        if limits.size_bytes != source.size_bytes() {
            return Err(AgentError::SizeMismatch {
                disk: self.id(),
                source_name: self.job.source.to_string(),
                source_bytes: source.size_bytes(),
                target: self.job.target.to_string(),
                target_bytes: limits.size_bytes,
            });
        }
        Ok(())
    }

    /// Opens the baseline, where the plan names one, and falls back to a full where it is not usable.
    async fn prepare(&self, plan: &Plan, disk_bytes: u64) -> Result<Prepared, AgentError> {
        let (mut baseline, mut full_reason) = (None, None);
        match &plan.start {
            Start::Bitmap => {}
            Start::Full { reason } => full_reason.clone_from(reason),
            Start::Digests(state) => match self.open_baseline(*state, disk_bytes).await? {
                Ok(reader) => baseline = Some(reader),
                Err(reason) => full_reason = Some(reason),
            },
        }
        let state = StateId::following(plan.previous);
        let lineage = baseline.as_ref().map_or(state.uuid, |baseline| baseline.header().lineage);
        let change_id = match (plan.record, source_bitmap(&self.job)) {
            (Record::Bitmap, Some(name)) => ChangeId::Bitmap { name: name.to_owned(), state },
            _ => ChangeId::Digests(state),
        };
        let kept = matches!(change_id, ChangeId::Digests(_));
        let dirty_only = plan.start == Start::Bitmap;
        let incremental = dirty_only || baseline.is_some();
        let comparison = match baseline {
            None => Comparison::Everything,
            Some(reader) => {
                let old_bytes = reader.header().disk_bytes;
                Comparison::Against(Baseline::new(reader, old_bytes, disk_bytes))
            }
        };
        let header = kept.then(|| Header { disk_bytes, state, lineage, disk: identity(&self.job) });
        Ok(Prepared { dirty_only, comparison, full_reason, incremental, change_id, header })
    }

    async fn open_baseline(
        &self,
        state: StateId,
        disk_bytes: u64,
    ) -> Result<Result<DigestReader, FullReason>, AgentError> {
        let directory = self.options.state_dir.clone();
        let opened = self.blocking(move || DigestReader::open(&directory, state));
        Ok(match opened.await? {
            Ok(reader) if reader.header().disk_bytes > disk_bytes => {
                Err(FullReason::Shrunk { old_bytes: reader.header().disk_bytes, disk_bytes })
            }
            Ok(reader) => Ok(reader),
            Err(error) => Err(FullReason::Baseline { why: error.to_string() }),
        })
    }

    fn started(&self, source: &Source, prepared: &Prepared) -> Event {
        Event::DiskStarted {
            disk_index: self.job.index,
            disk_key: self.job.key,
            source: self.job.source.to_string(),
            capacity_bytes: source.size_bytes(),
            incremental: prepared.incremental,
        }
    }

    /// Tells what goes otherwise than asked for.
    async fn warn(&self, source: &Source, prepared: &Prepared) -> Vec<String> {
        let mut warnings = Vec::new();
        if let Some(reason) = &prepared.full_reason {
            warnings.push(format!("{}: everything is sent: {reason}", self.id()));
        }
        if let Some((name, false)) = source.bitmap() {
            warnings.push(format!(
                "{}: the source does not offer the dirty bitmap '{name}'; digests are kept instead",
                self.id()
            ));
        }
        // A source that cannot be read says so when its blocks are.
        if let Ok(true) = source.looks_like_qcow2().await {
            warnings.push(format!(
                "{}: {} begins like a qcow2 image, but its raw bytes are backed up; to back up the disk inside, serve \
                 it (qemu-nbd --read-only --format=qcow2) and name that export",
                self.id(),
                self.job.source
            ));
        }
        for message in &warnings {
            self.tell_warning(message).await;
        }
        warnings
    }

    async fn tell_warning(&self, message: &str) {
        let (disk_index, message) = (Some(self.job.index), message.to_owned());
        self.events.tell(Event::Warning { disk_index, message }).await;
    }

    /// The last look at the source before its state is believed: one that lost its end fails the disk, one that grew
    /// is worth a warning.
    async fn check_source_size(&self, source: &Source) -> Result<Option<String>, AgentError> {
        let opened_bytes = source.size_bytes();
        let checked = source.check_size().await;
        let now_bytes = checked.map_err(|error| self.pipeline_error(error.into()))?;
        if now_bytes == opened_bytes {
            return Ok(None);
        }
        let warning = format!(
            "{}: the source {} grew from {opened_bytes} to {now_bytes} bytes while it was read; what is behind its \
             old end was not sent",
            self.id(),
            self.job.source
        );
        self.tell_warning(&warning).await;
        Ok(Some(warning))
    }

    async fn transfer(
        &self,
        source: &Source,
        target: &Arc<NbdDevice>,
        prepared: Prepared,
        progress: &Arc<Progress>,
    ) -> Result<Option<Finished>, AgentError> {
        let writer = match prepared.header {
            None => None,
            Some(header) => {
                let directory = self.options.state_dir.clone();
                let created = self.blocking(move || DigestWriter::create(&directory, &header));
                Some(created.await?.map_err(|error| self.state_error(error))?)
            }
        };
        let device: Arc<dyn BlockDevice> = target.clone();
        let needs_digests =
            writer.is_some() || matches!(prepared.comparison, Comparison::Against(_));
        let pipeline = Pipeline {
            source,
            dirty_only: prepared.dirty_only,
            digests: needs_digests,
            extent_bytes: self.options.extent_bytes_in_blocks(),
            target: &device,
            connections: self.options.connections,
            progress,
        };
        let ledger = Ledger::new(
            prepared.comparison,
            writer,
            source.size_bytes(),
            self.options.extent_bytes_in_blocks(),
        );
        let moved = pipeline.run(ledger, self.alive.clone()).await;
        moved.map_err(|error| self.pipeline_error(error))
    }

    /// Gives the digest file its name, now that the target is durable, and removes what it replaces.
    async fn publish(
        &self,
        kept: Option<Finished>,
        header: Option<Header>,
        previous: Option<StateId>,
    ) -> Result<(), AgentError> {
        let (Some(kept), Some(header)) = (kept, header) else { return Ok(()) };
        let directory = self.options.state_dir.clone();
        let published = self.blocking(move || {
            kept.publish()?;
            sweep(&directory, &header, previous);
            Ok(())
        });
        published.await?.map_err(|error| self.state_error(error))
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, AgentError> {
        // Where nobody takes what was done, a new file for instance, it is dropped before this is.
        let alive = self.alive.clone();
        let done = tokio::task::spawn_blocking(move || (work(), alive)).await;
        let done = done.map(|(done, _alive)| done);
        done.map_err(|error| AgentError::Died { disk: self.id(), cause: error.into() })
    }

    fn state_error(&self, error: DigestError) -> AgentError {
        let path = self.options.state_dir.clone();
        AgentError::State { disk: self.id(), path, cause: error.into() }
    }

    fn pipeline_error(&self, error: PipelineError) -> AgentError {
        let disk = self.id();
        match error {
            PipelineError::Read { range, cause } => {
                let source_name = self.job.source.to_string();
                AgentError::ReadSource { disk, source_name, range, cause }
            }
            PipelineError::Write { range, cause } => {
                let target = self.job.target.to_string();
                AgentError::WriteTarget { disk, target, range, cause }
            }
            PipelineError::Digests(error) => self.state_error(error),
            PipelineError::Died(cause) => AgentError::Died { disk, cause },
        }
    }
}

/// The bitmap that a job's source names.
fn source_bitmap(job: &DiskJob) -> Option<&str> {
    match &job.source {
        crate::SourceSpec::Nbd { bitmap, .. } => bitmap.as_deref(),
        crate::SourceSpec::File(_) => None,
    }
}

/// Which disk it is, as far as this agent can tell: the source as it is spelled, and the disk's key.
fn identity(job: &DiskJob) -> DiskIdentity {
    let mut hash = blake3::Hasher::new();
    hash.update(&job.key.to_le_bytes());
    hash.update(job.source.to_string().as_bytes());
    DiskIdentity(*hash.finalize().as_bytes())
}
