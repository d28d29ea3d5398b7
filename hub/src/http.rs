//! The REST interface: routes, who may use them, and how errors look. The handlers are in the modules below, the shapes
//! in [`crate::api`]; nothing is decided here that another entry (a command line, a schedule) would have to repeat.

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
