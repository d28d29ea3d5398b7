//! Errors as `application/problem+json`. What the hub failed at internally goes to its log; the peer learns only that
//! it did.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::api::Problem;
use crate::db::Refusal;
use crate::error::HubError;

/// An answer that is an error.
#[derive(Debug)]
pub(super) struct Refused {
    status: StatusCode,
    detail: String,
}

impl Refused {
    pub(super) fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status, detail: detail.into() }
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let problem = Problem {
            kind: "about:blank".to_owned(),
            title: self.status.canonical_reason().unwrap_or("Error").to_owned(),
            status: self.status.as_u16(),
            detail: self.detail,
        };
        let mut response = (self.status, Json(problem)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<HubError> for Refused {
    fn from(error: HubError) -> Self {
        let status = match &error {
            HubError::Refused(Refusal::Unknown { .. }) | HubError::Missing(_) => {
                StatusCode::NOT_FOUND
            }
            HubError::Refused(_) | HubError::Conflict(_) => StatusCode::CONFLICT,
            HubError::Invalid(_) => StatusCode::UNPROCESSABLE_ENTITY,
            HubError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            HubError::Internal(_) => {
                tracing::error!(%error, "a request failed");
                return Self::new(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "the hub failed; its log says more",
                );
            }
        };
        Self::new(status, error.to_string())
    }
}

impl From<crate::db::DbError> for Refused {
    fn from(error: crate::db::DbError) -> Self {
        HubError::from(error).into()
    }
}
