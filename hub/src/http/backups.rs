//! `/backups`: start, list, show, chain, cancel, delete.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;

use super::extract::{Body, Query, Segments};
use super::problem::Refused;
use super::{Shared, views};
use crate::api::{BackupList, BackupView, ChainView, EventList, StartBackup, StartedBackup};
use crate::db::Filter;
use crate::model::{Backup, Status};

/// The most backups that a list holds unless told otherwise.
const LISTED: u32 = 1000;

/// The most that it may be told.
const MOST_LISTED: u32 = 10_000;

/// What a list may be narrowed by.
#[derive(Debug, Deserialize)]
pub(super) struct ListQuery {
    vm_name: Option<String>,
    status: Option<Status>,
    limit: Option<u32>,
}

/// The older way to name a virtual machine.
#[derive(Debug, Deserialize)]
pub(super) struct ChainQuery {
    vm_name: String,
}

/// `POST /backups`
pub(super) async fn start(
    State(hub): Shared,
    Body(wish): Body<StartBackup>,
) -> Result<(StatusCode, Json<StartedBackup>), Refused> {
    let backup = hub.start_backup(wish).await?;
    let message = format!("{} backup of {} accepted", backup.backup_type, backup.vm_name);
    Ok((StatusCode::ACCEPTED, Json(started(backup, message))))
}

/// `GET /backups`
pub(super) async fn list(
    State(hub): Shared,
    Query(query): Query<ListQuery>,
) -> Result<Json<BackupList>, Refused> {
    let limit = query.limit.unwrap_or(LISTED).min(MOST_LISTED);
    let filter = Filter { vm_name: query.vm_name, status: query.status, limit };
    let backups = hub.db.backups(filter).await?.iter().map(views::summary).collect();
    Ok(Json(BackupList { backups }))
}

/// `GET /backups/{id}`
pub(super) async fn show(
    State(hub): Shared,
    Segments(id): Segments<String>,
) -> Result<Json<BackupView>, Refused> {
    Ok(Json(views::backup(&hub, &id).await?))
}

/// `GET /backups/chain/{vm_name}`
pub(super) async fn chain(
    State(hub): Shared,
    Segments(vm_name): Segments<String>,
) -> Result<Json<ChainView>, Refused> {
    let links = hub.db.chain(&vm_name).await?;
    Ok(Json(views::chain(vm_name, links)))
}

/// `GET /backup/chain?vm_name=`
pub(super) async fn chain_by_query(
    hub: Shared,
    Query(query): Query<ChainQuery>,
) -> Result<Json<ChainView>, Refused> {
    chain(hub, Segments(query.vm_name)).await
}

/// `GET /backups/{id}/events`
pub(super) async fn events(
    State(hub): Shared,
    Segments(id): Segments<String>,
) -> Result<Json<EventList>, Refused> {
    hub.db.backup(&id).await?;
    let events = hub.db.events(&id).await?.into_iter().map(views::event).collect();
    Ok(Json(EventList { events }))
}

/// `POST /backups/{id}/cancel`
pub(super) async fn cancel(
    State(hub): Shared,
    Segments(id): Segments<String>,
) -> Result<(StatusCode, Json<StartedBackup>), Refused> {
    let backup = hub.cancel_backup(&id).await?;
    Ok((StatusCode::ACCEPTED, Json(started(backup, "asked to stop".to_owned()))))
}

/// `DELETE /backups/{id}`
pub(super) async fn delete(
    State(hub): Shared,
    Segments(id): Segments<String>,
) -> Result<StatusCode, Refused> {
    hub.delete_backup(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn started(backup: Backup, message: String) -> StartedBackup {
    StartedBackup {
        backup_id: backup.id,
        vm_name: backup.vm_name,
        backup_type: backup.backup_type,
        status: backup.status,
        change_id: backup.change_id,
        message,
    }
}
