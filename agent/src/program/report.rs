//! The last word of a run, as JSON in a file or on standard output.

use std::io::{ErrorKind, Write};
use std::path::Path;

use agent::RunReport;
use anyhow::{Context, Result};
use serde::Serialize;

/// The last word of a run that failed.
#[derive(Serialize)]
struct Failure<'a> {
    job_id: &'a str,
    error: &'a str,
}

/// Writes what became of the run to `path`, or to standard output for `-`.
pub(crate) fn write(path: &Path, job_id: &str, outcome: Result<&RunReport, &str>) -> Result<()> {
    let mut text = match outcome {
        Ok(report) => serde_json::to_vec(report),
        Err(error) => serde_json::to_vec(&Failure { job_id, error }),
    }
    .context("the report")?;
    text.push(b'\n');
    let written = match path.to_str() {
        Some("-") => match std::io::stdout().lock().write_all(&text) {
            // A reader that is gone does not undo what was sent.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            written => written,
        },
        _ => std::fs::write(path, text),
    };
    written.with_context(|| format!("--report {}", path.display()))
}
