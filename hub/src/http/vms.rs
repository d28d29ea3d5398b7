//! `/vms`: what is backed up.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::extract::{Body, Segments};
use super::problem::Refused;
use super::{Shared, views};
use crate::api::{AddVm, ChangeVm, VmList, VmView};

/// `POST /vms`
pub(super) async fn add(
    State(hub): Shared,
    Body(wish): Body<AddVm>,
) -> Result<(StatusCode, Json<VmView>), Refused> {
    let (vm, warnings) = hub.add_vm(wish).await?;
    Ok((StatusCode::CREATED, Json(VmView { warnings, ..views::vm(vm) })))
}

/// `GET /vms`
pub(super) async fn list(State(hub): Shared) -> Result<Json<VmList>, Refused> {
    let vms = hub.db.vms().await?.into_iter().map(views::vm).collect();
    Ok(Json(VmList { vms }))
}

/// `GET /vms/{name}`
pub(super) async fn show(
    State(hub): Shared,
    Segments(name): Segments<String>,
) -> Result<Json<VmView>, Refused> {
    Ok(Json(views::vm(hub.db.vm(&name).await?)))
}

/// `PATCH /vms/{name}`
pub(super) async fn change(
    State(hub): Shared,
    Segments(name): Segments<String>,
    Body(wish): Body<ChangeVm>,
) -> Result<Json<VmView>, Refused> {
    Ok(Json(views::vm(hub.change_vm(&name, wish).await?)))
}

/// `DELETE /vms/{name}`
pub(super) async fn delete(
    State(hub): Shared,
    Segments(name): Segments<String>,
) -> Result<StatusCode, Refused> {
    hub.delete_vm(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}
