//! The `nbd-server` program: opens images, serves them by name, and leaves them clean. Only this program of the crate
//! knows image formats.

mod program;

use std::io::IsTerminal;
use std::process::ExitCode;

fn main() -> ExitCode {
    let wishes = program::catch_signals();
    let options = program::Options::of_process();
    let filter =
        tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // It would panic where standard error takes no more.
    let log = log.log_internal_errors(false);
    match options.log_format {
        program::LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).init(),
        program::LogFormat::Json => log.json().init(),
    }
    let format = options.log_format;
    let done = wishes.map_err(Into::into).and_then(|wishes| program::run(options, wishes));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let why = program::text_of(&error);
            match format {
                program::LogFormat::Text => eprintln!("nbd-server: {why}"),
                program::LogFormat::Json => tracing::error!("{why}"),
            }
            ExitCode::FAILURE
        }
    }
}
