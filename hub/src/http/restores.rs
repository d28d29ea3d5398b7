//! Restores: begun from a backup, watched under their own id.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::Shared;
use super::extract::{Body, Segments};
use super::problem::Refused;
use crate::api::{RestoreView, StartRestore};

/// `POST /backups/{id}/restore`
pub(super) async fn start(
    State(hub): Shared,
    Segments(id): Segments<String>,
    Body(wish): Body<StartRestore>,
) -> Result<(StatusCode, Json<RestoreView>), Refused> {
    let restore = hub.start_restore(&id, wish).await?;
    Ok((StatusCode::ACCEPTED, Json(restore)))
}

/// `GET /restores/{id}`
pub(super) async fn show(
    State(hub): Shared,
    Segments(id): Segments<String>,
) -> Result<Json<RestoreView>, Refused> {
    Ok(Json(hub.restores.view(&id)?))
}
