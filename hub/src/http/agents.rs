//! What external agents tell about their jobs: progress, which is also their sign of life, and how it ended.

use agent::DiskReport;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::Shared;
use super::extract::{AgentRun, Body, Segments};
use super::problem::Refused;
use crate::api::{AgentAnswer, AgentCompletion, AgentEvents, AgentFailure};
use crate::error::HubError;
use crate::hub::Hub;
use crate::model::{AgentKind, BackupDisk, Status};
use crate::runner::{self, JobHandle, Message};

/// The most characters of an agent's reason that are kept.
const REASON_CHARS: usize = 4096;

/// `POST /backups/{id}/progress`
pub(super) async fn progress(
    State(hub): Shared,
    AgentRun(run): AgentRun,
    Segments(id): Segments<String>,
    Body(events): Body<AgentEvents>,
) -> Result<Json<AgentAnswer>, Refused> {
    let handle = external(&hub, &id, &run).await?;
    let events = match events {
        AgentEvents::One(event) => vec![event],
        AgentEvents::Many(events) => events,
    };
    let warnings =
        events.iter().filter_map(|event| runner::note(&handle.progress, event)).collect();
    hub.tell(&handle, Message::Spoke(warnings)).await?;
    Ok(Json(answer(&handle)))
}

/// `POST /backups/{id}/complete`
pub(super) async fn complete(
    State(hub): Shared,
    AgentRun(run): AgentRun,
    Segments(id): Segments<String>,
    Body(completion): Body<AgentCompletion>,
) -> Result<(StatusCode, Json<AgentAnswer>), Refused> {
    let (_, disks) = hub.db.backup_with_disks(&id).await?;
    let reports = reports(completion, &disks)?;
    for report in &reports {
        let Some(disk) = disks.iter().find(|disk| disk.index == report.disk_index) else {
            let unknown = format!("the backup has no disk {}", report.disk_index);
            return Err(HubError::Missing(unknown).into());
        };
        if report.change_id.is_empty() || report.capacity_bytes != disk.capacity_bytes {
            return Err(HubError::Invalid(format!(
                "disk {} needs a change id and {} bytes",
                disk.index, disk.capacity_bytes
            ))
            .into());
        }
    }
    let told = match external(&hub, &id, &run).await {
        Ok(handle) => {
            let told = hub.tell(&handle, Message::Finished(reports.clone())).await;
            told.map(|()| answer(&handle))
        }
        Err(refused) => Err(refused),
    };
    match told {
        Ok(answer) => Ok((StatusCode::ACCEPTED, Json(answer))),
        // The answer to an earlier try may have been lost on its way.
        Err(_) if completed_so(&hub, &id, &reports).await? => {
            let answer = AgentAnswer { status: Status::Completed, cancel: false };
            Ok((StatusCode::OK, Json(answer)))
        }
        Err(refused) => Err(refused.into()),
    }
}

/// The reports of a completion, each of one disk.
fn reports(completion: AgentCompletion, disks: &[BackupDisk]) -> Result<Vec<DiskReport>, HubError> {
    let (change_id, disk_id, bytes) = match completion {
        AgentCompletion::Run(report) => return Ok(report.disks),
        AgentCompletion::Disk { change_id, disk_id, bytes } => (change_id, disk_id, bytes),
    };
    let disk = disks
        .iter()
        .find(|disk| disk.index == disk_id)
        .ok_or_else(|| HubError::Missing(format!("the backup has no disk {disk_id}")))?;
    Ok(vec![DiskReport {
        disk_index: disk_id,
        disk_key: disk.key,
        source: String::new(),
        capacity_bytes: disk.capacity_bytes,
        change_id,
        incremental: disk.previous_change_id.is_some(),
        full_reason: None,
        read_bytes: bytes,
        changed_bytes: bytes,
        data_bytes_sent: bytes,
        zero_bytes_sent: 0,
        wire_bytes: bytes,
        elapsed_ms: 0,
    }])
}

/// Whether the backup is completed, with just what these reports say.
async fn completed_so(hub: &Hub, id: &str, reports: &[DiskReport]) -> Result<bool, HubError> {
    let (backup, disks) = hub.db.backup_with_disks(id).await?;
    let same = |report: &DiskReport| {
        disks.iter().any(|disk| {
            disk.index == report.disk_index && disk.change_id.as_ref() == Some(&report.change_id)
        })
    };
    Ok(backup.status == Status::Completed && !reports.is_empty() && reports.iter().all(same))
}

/// `POST /backups/{id}/fail`
pub(super) async fn fail(
    State(hub): Shared,
    AgentRun(run): AgentRun,
    Segments(id): Segments<String>,
    Body(failure): Body<AgentFailure>,
) -> Result<(StatusCode, Json<AgentAnswer>), Refused> {
    let handle = external(&hub, &id, &run).await?;
    let reason = failure.error.chars().take(REASON_CHARS).collect();
    hub.tell(&handle, Message::GaveUp(reason)).await?;
    Ok((StatusCode::ACCEPTED, Json(answer(&handle))))
}

/// The job, if it is in work and waits for an external agent. The first run that asks has it to the end: two that write
/// to one layer would make a backup of neither.
async fn external(hub: &Hub, id: &str, run: &str) -> Result<JobHandle, HubError> {
    let backup = hub.db.backup(id).await?;
    match hub.job(id) {
        Some(handle) if handle.agent == AgentKind::External && handle.belongs_to(run) => Ok(handle),
        Some(handle) if handle.agent == AgentKind::External => Err(HubError::Conflict(
            "another agent does this job already: wait for its end, or cancel the job and start a new one"
                .to_owned(),
        )),
        Some(_) => Err(HubError::Conflict("the hub's own agent has this job".to_owned())),
        None => Err(HubError::Conflict(match backup.error_message {
            Some(why) => format!("the job is {}: {why}", backup.status),
            None => format!("the job is {}", backup.status),
        })),
    }
}

fn answer(handle: &JobHandle) -> AgentAnswer {
    AgentAnswer { status: Status::Running, cancel: handle.stop.is_cancelled() }
}
