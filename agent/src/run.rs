//! A run: all disks of a machine, several at once. The first failure, or a request to stop, ends all of them.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use crate::disk::{DiskOutcome, DiskRun};
use crate::source::Source;
use crate::{
    AgentError, CancelToken, DiskId, DiskJob, Event, EventSender, RunOptions, RunReport,
    SourceInfo, SourceSpec,
};

/// Sends the disks of one machine, each to its target, and keeps what the next run needs to send changes only.
///
/// A disk counts as finished once its target has flushed and its new state is durable in the state directory. The
/// last event is [`Event::RunFinished`] or [`Event::RunFailed`]. Needs a tokio runtime with time and I/O; when it
/// returns, nothing of the run is left running.
///
/// # Errors
/// The first disk that fails ends the run with its error; [`AgentError::Cancelled`] where `cancel` did.
pub async fn run(
    disks: Vec<DiskJob>,
    options: RunOptions,
    events: EventSender,
    cancel: CancelToken,
) -> Result<RunReport, AgentError> {
    let ended = run_disks(disks, options, &events, &cancel).await;
    let event = match &ended {
        Ok(report) => Event::RunFinished { report: report.clone() },
        Err(error) => Event::RunFailed { error: error.to_string() },
    };
    events.tell(event).await;
    ended
}

/// Asks a source what it is. Reads none of its content.
///
/// # Errors
/// [`AgentError::OpenSource`].
pub async fn probe(source: &SourceSpec) -> Result<SourceInfo, AgentError> {
    let failed =
        |cause| AgentError::OpenSource { disk: None, source_name: source.to_string(), cause };
    let opened = Source::open(source, 1).await.map_err(failed)?;
    let info = opened.info().await;
    opened.close().await;
    info.map_err(failed)
}

async fn run_disks(
    disks: Vec<DiskJob>,
    options: RunOptions,
    events: &EventSender,
    cancel: &CancelToken,
) -> Result<RunReport, AgentError> {
    let started = Instant::now();
    check(&disks, &options)?;
    let at_once = Arc::new(Semaphore::new(options.disks_at_once.clamp(1, Semaphore::MAX_PERMITS)));
    let (alive, mut dead) = mpsc::channel(1);
    let mut tasks = JoinSet::new();
    for job in disks {
        let disk = DiskId { index: job.index, key: job.key };
        let (options, events) = (options.clone(), events.clone());
        let run = DiskRun { job, options, events, alive: alive.clone() };
        let at_once = Arc::clone(&at_once);
        tasks.spawn(async move {
            // The semaphore is never closed.
            let _turn = at_once.acquire_owned().await.ok();
            (disk, run.run().await)
        });
    }
    drop(alive);
    let gathered = tokio::select! {
        biased;
        () = cancel.cancelled() => Err(AgentError::Cancelled),
        gathered = gather(&mut tasks) => gathered,
    };
    tasks.shutdown().await;
    // Threads that keep the books notice that nobody is there any more, and take their half-written files along.
    let _ = dead.recv().await;
    let mut outcomes = gathered?;
    outcomes.sort_by_key(|outcome| outcome.report.disk_index);
    let (mut reports, mut warnings) = (Vec::new(), Vec::new());
    for outcome in outcomes {
        reports.push(outcome.report);
        warnings.extend(outcome.warnings);
    }
    let elapsed_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(RunReport { job_id: options.job_id, disks: reports, warnings, elapsed_ms })
}

/// Refuses what could not be reported or recorded.
fn check(disks: &[DiskJob], options: &RunOptions) -> Result<(), AgentError> {
    if disks.is_empty() {
        return Err(AgentError::NoDisks);
    }
    if options.job_id.trim().is_empty() {
        return Err(AgentError::NoJobId);
    }
    let (mut indexes, mut keys) = (HashSet::new(), HashSet::new());
    for job in disks {
        if !indexes.insert(job.index) || !keys.insert(job.key) {
            let disk = DiskId { index: job.index, key: job.key };
            return Err(AgentError::DuplicateDisk { disk });
        }
    }
    Ok(())
}

async fn gather(
    tasks: &mut JoinSet<(DiskId, Result<DiskOutcome, AgentError>)>,
) -> Result<Vec<DiskOutcome>, AgentError> {
    let mut outcomes = Vec::new();
    while let Some(joined) = tasks.join_next().await {
        match joined {
            Ok((_, outcome)) => outcomes.push(outcome?),
            Err(error) => return Err(AgentError::Panicked { cause: error.into() }),
        }
    }
    Ok(outcomes)
}
