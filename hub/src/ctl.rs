//! The `sendense-ctl` program: its command line and exit codes. Talking to the hub is in `client`, what the commands do
//! in `commands`, how answers look in `show`.
//!
//! Exit codes: 0 done, 1 failed or refused, 2 wrong usage, 3 done with warnings; 130 where Ctrl-C ended the wait.

pub(crate) mod client;
mod commands;
mod disk_spec;
mod show;
mod start;
pub(crate) mod waiting;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::error::describe;
use crate::model::{AgentKind, BackupType};
use disk_spec::DiskSpec;

/// Wrong usage; what the parser of the command line exits with, too.
const EXIT_USAGE: u8 = 2;

/// A backup that was made, but not as it was asked for.
const EXIT_WARNINGS: u8 = 3;

/// Ctrl-C, as shells count it: 128 and the number of the signal.
const EXIT_INTERRUPTED: u8 = 130;

/// Sendense command line: virtual machines, repositories, backups and restores of a hub.
#[derive(Debug, Parser)]
#[command(
    name = "sendense-ctl",
    version,
    after_help = "Exit codes: 0 done, 1 failed or refused, 2 wrong usage, 3 done with warnings (backup start: they are \
        told on standard error), 130 interrupted."
)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Global {
    /// Where the hub listens
    #[arg(
        long,
        global = true,
        value_name = "URL",
        env = "SENDENSE_HUB",
        default_value = "http://127.0.0.1:8082",
        help_heading = "Global"
    )]
    hub: String,

    /// File with the token: admin.token in the hub's data directory. SENDENSE_TOKEN may hold the token itself
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "SENDENSE_TOKEN_FILE",
        help_heading = "Global"
    )]
    token_file: Option<PathBuf>,

    /// How answers are printed
    #[arg(long, global = true, value_enum, default_value_t = Output::Table, help_heading = "Global")]
    output: Output,
}

/// How answers are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    Table,
    /// For programs: the hub's own JSON
    Json,
}

/// Who reads the disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Reader {
    /// The hub itself
    Local,
    /// sendense-agent, wherever it is run
    External,
}

impl From<Reader> for AgentKind {
    fn from(reader: Reader) -> Self {
        match reader {
            Reader::Local => Self::Local,
            Reader::External => Self::External,
        }
    }
}

/// What a backup holds, as far as it can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Wanted {
    /// Everything, standing alone
    Full,
    /// What changed since the latest backup; everything where there is none
    Incremental,
}

impl From<Wanted> for BackupType {
    fn from(wanted: Wanted) -> Self {
        match wanted {
            Wanted::Full => Self::Full,
            Wanted::Incremental => Self::Incremental,
        }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Virtual machines
    #[command(subcommand)]
    Vm(VmCommand),
    /// Places that keep backups
    #[command(subcommand)]
    Repository(RepositoryCommand),
    /// Backups: make, look at, restore, delete
    #[command(subcommand)]
    Backup(BackupCommand),
}

#[derive(Debug, Subcommand)]
enum VmCommand {
    /// Add a virtual machine
    Add {
        /// Its name: any text
        name: String,
        /// A disk: file:/absolute/path, nbd://host:port/export or nbd+unix:///export?socket=PATH, optionally followed
        /// by ,key=NUMBER and ,size=BYTES (K, M, G or T may follow the number). A comma that belongs to the source is
        /// doubled. Repeatable; the order is the index
        #[arg(long = "disk", value_name = "SPEC", required = true)]
        disks: Vec<DiskSpec>,
        /// Who reads the disks
        #[arg(long, value_enum, default_value_t = Reader::Local)]
        agent: Reader,
    },
    /// List virtual machines
    List,
    /// Show one
    Show {
        /// Its name
        name: String,
    },
    /// Tell what changed about disks: where they are, how large they are
    Update {
        /// Its name
        name: String,
        /// A disk as in add: found by its key, or by its place among these options where it names none (repeatable)
        #[arg(long = "disk", value_name = "SPEC", required = true)]
        disks: Vec<DiskSpec>,
    },
    /// Forget one that has no backups
    Delete {
        /// Its name
        name: String,
    },
}

#[derive(Debug, Subcommand)]
enum RepositoryCommand {
    /// Add a local directory as a repository
    Add {
        /// Its name
        name: String,
        /// Its directory on the hub's host
        path: PathBuf,
    },
    /// List repositories with their free space
    List,
}

#[derive(Debug, Subcommand)]
enum BackupCommand {
    /// Make a backup
    #[command(
        after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done with warnings (for instance: a disk was \
        sent whole although there was a backup to stand on), 130 interrupted: the backup goes on."
    )]
    Start {
        /// Of which virtual machine
        #[arg(long)]
        vm: String,
        /// What it shall hold
        #[arg(long = "type", value_name = "TYPE", value_enum, default_value_t = Wanted::Incremental)]
        backup_type: Wanted,
        /// Into which repository, by name or id; may be left out where there is only one
        #[arg(long)]
        repository: Option<String>,
        /// Wait until it has ended (this is the default)
        #[arg(long, overrides_with = "no_wait")]
        wait: bool,
        /// Return as soon as it is accepted
        #[arg(long, overrides_with = "wait")]
        no_wait: bool,
    },
    /// List backups, newest first
    List {
        /// Of one virtual machine only
        #[arg(long)]
        vm: Option<String>,
    },
    /// Show a backup with its disks and its log
    Show {
        /// The backup
        id: String,
    },
    /// Show the completed backups of a virtual machine in order
    Chain {
        /// Which virtual machine
        #[arg(long)]
        vm: String,
    },
    /// Write a disk of a backup into a new raw file on the hub's host
    Restore {
        /// The backup
        #[arg(long)]
        backup_id: String,
        /// Which disk, from 0
        #[arg(long, default_value_t = 0)]
        disk: u32,
        /// The file
        #[arg(long, value_name = "FILE")]
        target: PathBuf,
        /// Replace a file that is there
        #[arg(long)]
        overwrite: bool,
    },
    /// Stop a backup in work
    Cancel {
        /// The backup
        id: String,
    },
    /// Delete a backup that no other stands on
    Delete {
        /// The backup
        id: String,
    },
}

/// The whole program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tell(&format!("sendense-ctl: no runtime: {error}"));
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(commands::run(cli)) {
        Ok(code) => code,
        Err(error) => {
            tell(&format!("sendense-ctl: {}", describe(error.as_ref())));
            match error.is::<Usage>() {
                true => ExitCode::from(EXIT_USAGE),
                false => ExitCode::FAILURE,
            }
        }
    }
}

/// A command line that can be parsed, but means nothing.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// Says something to people. Who closed standard error does not want to hear it.
fn tell(text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{}", show::plain(text));
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_start_waits_unless_told_otherwise() {
        let parse = |extra: &[&str]| {
            let words = ["sendense-ctl", "backup", "start", "--vm", "a b"];
            match Cli::parse_from(words.iter().chain(extra)).command {
                Command::Backup(BackupCommand::Start { no_wait, .. }) => no_wait,
                other => panic!("{other:?}"),
            }
        };
        assert!(!parse(&[]));
        assert!(!parse(&["--wait"]));
        assert!(parse(&["--no-wait"]));
    }
}
