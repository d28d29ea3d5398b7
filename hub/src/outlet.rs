//! Lines for whoever started a program. A reader that has left is no error: `println!` would panic, and take a backup with
//! it.

use std::io::Write;

/// Writes a line to standard output, where somebody still reads it.
pub(crate) fn say(line: &str) {
    // Nobody is left who could be told.
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Writes a line to standard error, where somebody still reads it.
pub(crate) fn complain(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
