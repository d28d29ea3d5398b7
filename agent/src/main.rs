//! The `sendense-agent` program: reads its command line, and leaves the work to the library. What it prints for people
//! goes to standard error, what it prints for programs to standard output.

mod program;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let arguments = program::Arguments::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // It would panic where standard error is a pipe that nobody reads any more.
        .log_internal_errors(false)
        .init();
    program::main(arguments)
}
