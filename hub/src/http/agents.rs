//! What external agents tell about their jobs: progress, which is also their sign of life, and how it ended.

use agent::DiskReport;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::Shared;
use super::extract::{Body, Segments};
use super::problem::Refused;
use crate::api::{AgentAnswer, AgentCompletion, AgentEvents, AgentFailure};
use crate::error::HubError;
use crate::hub::Hub;
use crate::model::{AgentKind, Status};
use crate::runner::{self, JobHandle, Message};

/// The most characters of an agent's reason that are kept.
const REASON_CHARS: usize = 4096;

/// `POST /backups/{id}/progress`
pub(super) async fn progress(
    State(hub): Shared,
    Segments(id): Segments<String>,
    Body(events): Body<AgentEvents>,
) -> Result<Json<AgentAnswer>, Refused> {
    let handle = external(&hub, &id).await?;
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
    Segments(id): Segments<String>,
    Body(completion): Body<AgentCompletion>,
) -> Result<(StatusCode, Json<AgentAnswer>), Refused> {
    let handle = external(&hub, &id).await?;
    let (_, disks) = hub.db.backup_with_disks(&id).await?;
    let reports = match completion {
        AgentCompletion::Run(report) => report.disks,
        AgentCompletion::Disk { change_id, disk_id, bytes } => {
            let disk = disks
                .iter()
                .find(|disk| disk.index == disk_id)
                .ok_or_else(|| HubError::Missing(format!("the backup has no disk {disk_id}")))?;
            vec![DiskReport {
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
            }]
        }
    };
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
    hub.tell(&handle, Message::Finished(reports)).await?;
    Ok((StatusCode::ACCEPTED, Json(answer(&handle))))
}

/// `POST /backups/{id}/fail`
pub(super) async fn fail(
    State(hub): Shared,
    Segments(id): Segments<String>,
    Body(failure): Body<AgentFailure>,
) -> Result<(StatusCode, Json<AgentAnswer>), Refused> {
    let handle = external(&hub, &id).await?;
    let reason = failure.error.chars().take(REASON_CHARS).collect();
    hub.tell(&handle, Message::GaveUp(reason)).await?;
    Ok((StatusCode::ACCEPTED, Json(answer(&handle))))
}

/// The job, if it is in work and waits for an external agent.
async fn external(hub: &Hub, id: &str) -> Result<JobHandle, HubError> {
    let backup = hub.db.backup(id).await?;
    match hub.job(id) {
        Some(handle) if handle.agent == AgentKind::External => Ok(handle),
        Some(_) => Err(HubError::Conflict("the hub's own agent has this job".to_owned())),
        None => Err(HubError::Conflict(format!("the job is {}", backup.status))),
    }
}

fn answer(handle: &JobHandle) -> AgentAnswer {
    AgentAnswer { status: Status::Running, cancel: handle.stop.is_cancelled() }
}
