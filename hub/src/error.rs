//! Why the hub refused or failed a request, sorted by whose fault it is. How a status code spells it is decided in
//! [`crate::http`].

use crate::db::{DbError, Refusal};

/// Why a request was refused or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// The request contradicts what is stored.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The request can be read, but asks for something that makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The request is right, but something else is in the way.
    #[error("{0}")]
    Conflict(String),
    /// Something that is asked for is not there.
    #[error("{0}")]
    Missing(String),
    /// The hub cannot serve it now.
    #[error("{0}")]
    Unavailable(String),
    /// The hub failed. The cause is for the log, not for the peer.
    #[error("{0}")]
    Internal(String),
}

impl From<DbError> for HubError {
    fn from(error: DbError) -> Self {
        match error {
            DbError::Refused(refusal) => Self::Refused(refusal),
            DbError::Closed => Self::Unavailable("the hub is stopping".to_owned()),
            error => Self::Internal(error.to_string()),
        }
    }
}

/// An error and all its causes, outermost first; causes that the text before already repeats are left out.
pub(crate) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer: {0}")]
    struct Outer(#[source] std::io::Error);

    #[derive(Debug, thiserror::Error)]
    #[error("outermost")]
    struct Outermost(#[source] Outer);

    #[test]
    fn causes_are_told_once() {
        let error = Outermost(Outer(std::io::Error::other("inner")));
        assert_eq!(describe(&error), "outermost: outer: inner");
    }
}
