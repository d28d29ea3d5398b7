//! The REST interface: routes, who may use them, and how errors look. The handlers are in the modules below, the shapes
//! in [`crate::api`]; nothing is decided here that another entry (a command line, a schedule) would have to repeat.
//!
//! # Endpoints
//!
//! All but `/health` lie under `/api/v1` and want `Authorization: Bearer TOKEN`. Bodies and answers are JSON in the shapes
//! of [`crate::api`]; a refusal is an [`api::Problem`](crate::api::Problem) as `application/problem+json`: 400 for what
//! cannot be read, 401 without the token, 404, 409 for what contradicts the state of things, 413, 422 for what makes no
//! sense, 503 for what may work later. Times are RFC 3339 in UTC, sizes are bytes; segments of paths are percent-encoded.
//!
//! | method and path | what it does | body | answer |
//! | --- | --- | --- | --- |
//! | `GET /health` | whether the hub works; without a token | | `status`, `version`, `degraded`, `running_jobs` |
//! | `GET /vms` | lists virtual machines | | `vms`: [`VmView`](crate::api::VmView) |
//! | `POST /vms` | adds one | [`AddVm`](crate::api::AddVm): `name`, `agent` (`local`, `external`), `disks` of `source`, `key`, `capacity_bytes` | 201 [`VmView`](crate::api::VmView), with `warnings` |
//! | `GET /vms/{name}` | shows one | | [`VmView`](crate::api::VmView) |
//! | `PATCH /vms/{name}` | takes note of disks that moved or grew | [`ChangeVm`](crate::api::ChangeVm): `disks` | [`VmView`](crate::api::VmView) |
//! | `DELETE /vms/{name}` | forgets one without backups | | 204 |
//! | `GET /repositories` | lists repositories with their free space | | `repositories`: [`RepositoryView`](crate::api::RepositoryView) |
//! | `POST /repositories` | adds a local directory | [`AddRepository`](crate::api::AddRepository): `name`, `type` (`local`), `path` | 201 [`RepositoryView`](crate::api::RepositoryView) |
//! | `GET /backups` | lists backups, newest first; `?vm_name=`, `?status=`, `?limit=` | | `backups`: [`BackupSummary`](crate::api::BackupSummary) |
//! | `POST /backups` | starts a backup | [`StartBackup`](crate::api::StartBackup): `vm_name`, `repository_id` (or name), `backup_type` (`full`, `incremental`) | 202 [`StartedBackup`](crate::api::StartedBackup): `backup_id`, `status` |
//! | `GET /backups/{id}` | shows one: disks, progress, log, where an agent connects | | [`BackupView`](crate::api::BackupView) |
//! | `DELETE /backups/{id}` | deletes one that no other stands on | | 204 |
//! | `GET /backups/{id}/events` | its log, oldest first | | `events`: [`EventView`](crate::api::EventView) |
//! | `POST /backups/{id}/cancel` | asks one in work to stop | | 202 [`StartedBackup`](crate::api::StartedBackup) |
//! | `GET /backups/chain/{vm_name}` | the completed backups of a virtual machine, in order | | [`ChainView`](crate::api::ChainView) |
//! | `POST /backups/{id}/restore` | writes a disk into a raw file on the hub's host | [`StartRestore`](crate::api::StartRestore): `disk_index`, `target`, `overwrite` | 202 [`RestoreView`](crate::api::RestoreView): `restore_id` |
//! | `GET /restores/{id}` | how a restore stands | | [`RestoreView`](crate::api::RestoreView) |
//! | `POST /backups/{id}/progress` | an external agent's events; its sign of life | an [`agent::Event`], or an array of them | [`AgentAnswer`](crate::api::AgentAnswer): `status`, `cancel` |
//! | `POST /backups/{id}/complete` | an external agent has sent and flushed everything, or one disk | [`AgentCompletion`](crate::api::AgentCompletion): an [`agent::RunReport`], or `change_id`, `disk_id`, `bytes` | 202 [`AgentAnswer`](crate::api::AgentAnswer) |
//! | `POST /backups/{id}/fail` | an external agent gives up | `error` | 202 [`AgentAnswer`](crate::api::AgentAnswer) |
//!
//! Older spellings of the same: `POST /backup/start`, `GET /backup/list`, `GET /backup/chain?vm_name=`,
//! `GET` and `DELETE /backup/{id}`, `POST /backup/{id}/complete`.

mod agents;
pub mod auth;
mod backups;
mod extract;
mod problem;
mod repositories;
mod restores;
mod views;
mod vms;

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use axum::{Json, Router};

use crate::api::Health;
use crate::hub::Hub;
use auth::Auth;
use problem::Refused;

/// The most bytes that the body of a request may have.
pub const MAX_BODY_BYTES: usize = 1 << 20;

type Shared = State<Arc<Hub>>;

/// Every route, with authentication in front of all but `/health`.
pub fn router(hub: Arc<Hub>, auth: Auth) -> Router {
    let api = Router::new()
        .route("/vms", get(vms::list).post(vms::add))
        .route("/vms/{name}", get(vms::show).patch(vms::change).delete(vms::delete))
        .route("/repositories", get(repositories::list).post(repositories::add))
        .route("/backups", get(backups::list).post(backups::start))
        .route("/backups/chain/{vm_name}", get(backups::chain))
        .route("/backups/{id}", get(backups::show).delete(backups::delete))
        .route("/backups/{id}/events", get(backups::events))
        .route("/backups/{id}/cancel", post(backups::cancel))
        .route("/backups/{id}/restore", post(restores::start))
        .route("/backups/{id}/progress", post(agents::progress))
        .route("/backups/{id}/complete", post(agents::complete))
        .route("/backups/{id}/fail", post(agents::fail))
        .route("/restores/{id}", get(restores::show))
        // The older spellings, through the same handlers.
        .route("/backup/start", post(backups::start))
        .route("/backup/list", get(backups::list))
        .route("/backup/chain", get(backups::chain_by_query))
        .route("/backup/{id}", get(backups::show).delete(backups::delete))
        .route("/backup/{id}/complete", post(agents::complete));
    Router::new()
        .nest("/api/v1", api)
        .fallback(missing)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(auth, auth::require))
        .route("/health", get(health))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(hub)
}

async fn missing() -> Refused {
    Refused::new(StatusCode::NOT_FOUND, "there is nothing at this address")
}

async fn wrong_method() -> Refused {
    Refused::new(StatusCode::METHOD_NOT_ALLOWED, "this address does not take this method")
}

/// Whether the hub works: answered without a token, so that it says nothing about what it holds.
async fn health(State(hub): Shared) -> (StatusCode, Json<Health>) {
    let mut degraded = Vec::new();
    if hub.db.ping().await.is_err() {
        degraded.push("the database does not answer".to_owned());
    }
    let status = match degraded.is_empty() {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    let health = Health {
        status: if degraded.is_empty() { "ok" } else { "degraded" }.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        degraded,
        running_jobs: hub.active_jobs(),
    };
    (status, Json(health))
}
