//! The command line: its commands and what holds for all of them. The options of each command stand with it.

use clap::error::{ContextKind, ErrorKind};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::command::{
    amend, bench, bitmap, check, commit, compare, completions, convert, create, dd, info, map,
    measure, merge, rebase, resize, snapshot,
};
use crate::output::own_name;
use crate::stop::Stop;

/// What a link named `qemu-img` answers to `--version`: scripts look for the version whose command line they get.
const AS_QEMU_IMG: &str =
    concat!("version 10.0.2 (answered by qcow2 ", env!("CARGO_PKG_VERSION"), ")");

/// Creates, inspects, converts and repairs disk images
///
/// Options, results and exit codes are those of qemu-img; long options may be cut short. Images are paths, or exports of NBD servers: nbd://HOST/EXPORT,
/// nbd+unix:///EXPORT?socket=PATH.
#[derive(Debug, Parser)]
#[command(
    name = "qcow2",
    version,
    infer_long_args = true,
    subcommand_required = true,
    arg_required_else_help = true,
    // As getopt does it: the last one counts, so that wrappers can append theirs.
    args_override_self = true,
    after_help = "Supported image formats:\n\n  qcow2 raw vmdk\n\nvmdk is only read."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Create(create::Options),
    Info(info::Options),
    Check(check::Options),
    Convert(convert::Options),
    Compare(compare::Options),
    Map(map::Options),
    Measure(measure::Options),
    Snapshot(snapshot::Options),
    Bitmap(bitmap::Options),
    Resize(resize::Options),
    Rebase(rebase::Options),
    Commit(commit::Options),
    Merge(merge::Options),
    Amend(amend::Options),
    Dd(dd::Options),
    Bench(bench::Options),
    Completions(completions::Options),
    /// Print the manual page
    Man,
}

impl Cli {
    /// Reads the command line.
    ///
    /// # Errors
    /// Help that was asked for, and what is wrong.
    pub(crate) fn read() -> Result<Self, clap::Error> {
        let mut command = Self::command();
        if own_name() == "qemu-img" {
            command = command.name("qemu-img").version(AS_QEMU_IMG);
        }
        let matches = command.clone().try_get_matches().map_err(without_tip)?;
        Self::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
    }

    /// Does what was asked for; the number is the exit code.
    pub(crate) async fn run(self) -> anyhow::Result<u8> {
        let stop = Stop::watch()?;
        match self.command {
            Command::Create(options) => create::run(options, &stop).await,
            Command::Info(options) => info::run(options, &stop).await,
            Command::Snapshot(options) => snapshot::run(options, &stop).await,
            Command::Bitmap(options) => bitmap::run(options, &stop).await,
            Command::Resize(options) => resize::run(options, &stop).await,
            Command::Amend(options) => amend::run(options, &stop).await,
            Command::Map(options) => map::run(options, &stop).await,
            Command::Rebase(options) => rebase::run(options, &stop).await,
            Command::Commit(options) => commit::run(options, &stop).await,
            Command::Merge(options) => merge::run(options, &stop).await,
            Command::Dd(options) => dd::run(options, &stop).await,
            Command::Check(options) => check::run(options, &stop).await,
            Command::Convert(options) => convert::run(options, &stop).await,
            Command::Compare(options) => compare::run(options, &stop).await,
            Command::Measure(options) => measure::run(options, &stop).await,
            Command::Bench(options) => bench::run(options, &stop).await,
            Command::Completions(options) => completions::run(&options),
            Command::Man => completions::manual(),
        }
    }
}

/// Without the advice to take an unknown option for a file's name, which nobody means.
fn without_tip(mut error: clap::Error) -> clap::Error {
    if error.kind() == ErrorKind::UnknownArgument {
        error.remove(ContextKind::Suggested);
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
