//! How many files and connections the process may have open. What is open, and how many of it are served, is decided
//! elsewhere.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the limit on descriptors as far as the process may: the usual one is too small for the connections that the
/// program allows. It was meant for programs that use select(2), which this one does not.
pub(super) fn raise_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(%error, limit = limit.current, "cannot raise the limit on open files");
    }
}
