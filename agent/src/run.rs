//! A run: all disks of a machine, several at once.

use crate::{
    AgentError, CancelToken, DiskJob, EventSender, RunOptions, RunReport, SourceInfo, SourceSpec,
};

/// Sends the disks of one machine.
///
/// # Errors
/// [`AgentError`]; the first disk that fails ends the run.
pub async fn run(
    disks: Vec<DiskJob>,
    options: RunOptions,
    events: EventSender,
    cancel: CancelToken,
) -> Result<RunReport, AgentError> {
    let _ = (disks, options, events, cancel);
    Err(AgentError::NoDisks)
}

/// Asks a source what it is.
///
/// # Errors
/// [`AgentError::OpenSource`].
pub async fn probe(source: &SourceSpec) -> Result<SourceInfo, AgentError> {
    let _ = source;
    Err(AgentError::NoDisks)
}
