//! Writing results: text and JSON on standard output, errors on standard error. What the results are is the commands'
//! business.

use std::io::{self, Write};
use std::path::Path;

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
/// Where it cannot be written, as on a full disk. A reader who is gone is none.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    write_out(text.as_bytes())
}

fn write_out(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        // Whoever reads has seen enough, which is no failure of the work.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        done => done.context("cannot write to standard output"),
    }
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
    write_out(&bytes)
}

/// Writes an error with its causes.
pub(crate) fn report(error: &anyhow::Error) {
    // Nobody is left to tell where standard error is closed.
    let _unheard = writeln!(io::stderr(), "{}: {}", own_name(), text_of(error));
}

/// Writes what is wrong with the command line, which begins as every error does.
pub(crate) fn report_misuse(error: &clap::Error) {
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let _unheard = write!(io::stderr(), "{}: {text}", own_name());
}

/// The name under which the program was called: a link named `qemu-img` answers as scripts expect of that.
pub(crate) fn own_name() -> String {
    let called = std::env::args_os().next();
    let name = called.as_deref().and_then(|called| Path::new(called).file_name());
    name.map_or_else(|| "qcow2".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// An error with its causes, each once.
pub(crate) fn text_of(error: &anyhow::Error) -> String {
    let mut text = String::new();
    let causes: Vec<String> =
        error.chain().map(|cause| without_number(&cause.to_string())).collect();
    for (number, cause) in causes.iter().enumerate() {
        // A name before an error that begins with it.
        let named_below =
            causes.get(number + 1).and_then(|below| below.strip_prefix(cause.as_str()));
        if named_below.is_some_and(|rest| rest.starts_with(": ")) {
            continue;
        }
        // Many errors already tell their cause.
        if text.is_empty() {
            text.push_str(cause);
        } else if !text.contains(cause.as_str()) {
            text.push_str(": ");
            text.push_str(cause);
        }
    }
    text
}

/// An error of the system in words only.
fn without_number(text: &str) -> String {
    const BEGIN: &str = " (os error ";
    let mut words = String::new();
    let mut rest = text;
    while let Some((before, behind)) = rest.split_once(BEGIN) {
        words.push_str(before);
        rest = match behind.split_once(')') {
            Some((number, after)) if number.bytes().all(|digit| digit.is_ascii_digit()) => after,
            _ => {
                words.push_str(BEGIN);
                behind
            }
        };
    }
    words.push_str(rest);
    words
}

/// Writes a warning.
pub(crate) fn warn(text: &str) {
    let _unheard = writeln!(io::stderr(), "{}: warning: {text}", own_name());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_system_are_told_in_words() {
        let error = anyhow::Error::new(io::Error::from_raw_os_error(2)).context("cannot open a");
        assert_eq!(text_of(&error), "cannot open a: No such file or directory");
        assert_eq!(without_number("a (os error x) b (os error 28), c"), "a (os error x) b, c");
    }

    #[test]
    fn a_name_stands_before_an_error_once() {
        let error = anyhow::anyhow!("no room").context("a.q: error while creating").context("a.q");
        assert_eq!(text_of(&error), "a.q: error while creating: no room");
        let error = anyhow::anyhow!("a.qcow2 is wrong").context("a.q");
        assert_eq!(text_of(&error), "a.q: a.qcow2 is wrong");
    }
}
