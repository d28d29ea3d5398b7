//! What the program adds to the library: its command line, the hub's REST calls, and what people see.

mod arguments;
mod disks;
mod hub;
mod migrate;
mod report;
mod show;
mod telemetry;

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

pub(crate) use arguments::Arguments;
use arguments::Command;

/// Everything was done as asked for.
const DONE: u8 = 0;
/// The run failed or was cancelled.
const FAILED: u8 = 1;
/// The command line does not say what to do.
const USAGE: u8 = 2;
/// The run is complete, but something went otherwise than asked for: a disk was sent whole, for instance.
const DONE_WITH_WARNINGS: u8 = 3;

/// Runs the program.
pub(crate) fn main(arguments: Arguments) -> ExitCode {
    let runtime = block::survive_size_limit()
        .and_then(|()| tokio::runtime::Builder::new_multi_thread().enable_all().build());
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            say(format_args!("sendense-agent: cannot start: {error}"));
            return ExitCode::from(FAILED);
        }
    };
    let Command::Migrate(arguments) = arguments.command;
    let code = runtime.block_on(migrate::migrate(&arguments));
    // Nothing of a run is left; what else may hang (a name being resolved) is not worth waiting for.
    runtime.shutdown_background();
    ExitCode::from(code)
}

/// Prints a line for people. Nobody being there to read it decides nothing: who hung up does not stop a backup.
fn say(line: fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}
