//! `/repositories`: where backups are kept, with what the file system says of itself now.

use std::path::PathBuf;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use jiff::Timestamp;

use super::Shared;
use super::extract::Body;
use super::problem::Refused;
use crate::api::{AddRepository, RepositoryList, RepositoryView};
use crate::hub::Hub;
use crate::model::RepositoryRow;
use crate::stores;

/// `POST /repositories`
pub(super) async fn add(
    State(hub): Shared,
    Body(wish): Body<AddRepository>,
) -> Result<(StatusCode, Json<RepositoryView>), Refused> {
    let row = hub.add_repository(wish).await?;
    Ok((StatusCode::CREATED, Json(view(&hub, row).await)))
}

/// `GET /repositories`
pub(super) async fn list(State(hub): Shared) -> Result<Json<RepositoryList>, Refused> {
    let mut repositories = Vec::new();
    for row in hub.db.repositories().await? {
        repositories.push(view(&hub, row).await);
    }
    Ok(Json(RepositoryList { repositories }))
}

async fn view(hub: &Hub, row: RepositoryRow) -> RepositoryView {
    let trouble = hub.repository(&row).await.err().map(|error| error.to_string());
    let space = stores::space(PathBuf::from(&row.path)).await;
    if let Ok(space) = &space {
        let now = Timestamp::now();
        let noted = hub.db.set_repository_space(&row.id, space.total, space.available, now).await;
        if let Err(error) = noted {
            tracing::warn!(repository = row.name, %error, "its space was not noted");
        }
    }
    RepositoryView {
        total_bytes: space.as_ref().ok().map(|space| space.total),
        available_bytes: space.as_ref().ok().map(|space| space.available),
        online: trouble.is_none() && space.is_ok(),
        message: trouble.or(space.err()),
        id: row.id,
        name: row.name,
        kind: row.kind,
        path: row.path,
        created_at: row.created_at,
    }
}
