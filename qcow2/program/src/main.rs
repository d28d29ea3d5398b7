//! The `qcow2` program: what qemu-img does, by our own engine. Only the frame is here, with exit codes and signals;
//! each command has a file of its own.

mod cache;
mod chain;
mod cli;
mod command;
mod facts;
mod folding;
mod format;
mod making;
mod open;
mod options;
mod output;
mod place;
mod progress;
mod secret;
mod settings;
mod size;
mod splice;
mod stop;
mod target;
mod tuning;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

/// How long the last operations on files may take when the program ends.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(20);
/// For everything that went wrong and has no code of its own.
const FAILURE: u8 = 1;
/// As [`FAILURE`], for `compare`, where 1 says that images differ.
const COMPARE_FAILURE: u8 = 2;

fn main() -> ExitCode {
    let cli = match cli::Cli::read() {
        Ok(cli) => cli,
        Err(error) => return misuse(&error),
    };
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into()),
        )
        .without_time()
        .with_target(false)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    match run(cli) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            output::report(&error);
            let interrupted = error.downcast_ref::<stop::Interrupted>();
            ExitCode::from(interrupted.map_or(FAILURE, stop::Interrupted::exit_code))
        }
    }
}

fn run(cli: cli::Cli) -> anyhow::Result<u8> {
    block::survive_size_limit()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(cli.run());
    // What still hangs somewhere is not waited for.
    runtime.shutdown_background();
    // What is in flight keeps its file locked: whoever comes next must find it free.
    block::wait_until_closed(CLOSE_TIMEOUT);
    done
}

/// Prints help, or what is wrong with the command line.
fn misuse(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // Nobody is left to tell where the output is closed.
        let _unheard = error.print();
        return ExitCode::SUCCESS;
    }
    output::report_misuse(error);
    let compares = std::env::args().nth(1).is_some_and(|command| command == "compare");
    ExitCode::from(if compares { COMPARE_FAILURE } else { FAILURE })
}
