//! Writing results: text and JSON on standard output, errors on standard error. What the results are is the commands'
//! business.

use std::io::{self, Write};

use anyhow::Context;
use serde::Serialize;

/// How a result is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Output {
    /// Lines for people
    #[default]
    Human,
    /// One JSON document
    Json,
}

/// Writes text as it is.
///
/// # Errors
/// Where nobody reads any more, or the disk is full.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .context("cannot write to standard output")
}

/// Writes a document, indented by four spaces a level.
///
/// # Errors
/// As [`print`].
pub(crate) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut bytes = Vec::new();
    let format = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, format))?;
    bytes.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&bytes).and_then(|()| out.flush()).context("cannot write to standard output")
}

/// Writes an error with its causes.
pub(crate) fn report(error: &anyhow::Error) {
    // Nobody is left to tell where standard error is closed.
    let _unheard = writeln!(io::stderr(), "qcow2: {}", text_of(error));
}

/// An error with its causes, each once.
pub(crate) fn text_of(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        // Many errors already tell their cause.
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

/// Writes a warning.
pub(crate) fn warn(text: &str) {
    let _unheard = writeln!(io::stderr(), "qcow2: warning: {text}");
}
