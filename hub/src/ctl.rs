//! The `sendense-ctl` program: its command line and exit codes. Talking to the hub is in `client`, what the commands do
//! in `commands`, how answers look in `show`.
//!
//! Exit codes: 0 done, 1 failed or refused, 2 wrong usage.

pub(crate) mod client;
mod commands;
mod show;
pub(crate) mod waiting;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::model::{AgentKind, BackupType};

/// Sendense command line: virtual machines, repositories, backups and restores of a hub.
#[derive(Debug, Parser)]
#[command(
    name = "sendense-ctl",
    version,
    after_help = "Exit codes: 0 done, 1 failed or refused, 2 wrong usage."
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
        default_value = "http://127.0.0.1:8082"
    )]
    hub: String,

    /// File with the token: admin.token in the hub's data directory. SENDENSE_TOKEN may hold the token itself
    #[arg(long, global = true, value_name = "FILE", env = "SENDENSE_TOKEN_FILE")]
    token_file: Option<PathBuf>,

    /// How answers are printed
    #[arg(long, global = true, value_enum, default_value_t = Output::Table)]
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
        /// by ,key=NUMBER and ,size=BYTES (repeatable; the order is the index)
        #[arg(long = "disk", value_name = "SPEC", required = true)]
        disks: Vec<String>,
        /// Who reads the disks
        #[arg(long, default_value = "local")]
        agent: AgentKind,
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
        disks: Vec<String>,
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
    Start {
        /// Of which virtual machine
        #[arg(long)]
        vm: String,
        /// full, or incremental on the latest one
        #[arg(long = "type", default_value = "incremental")]
        backup_type: BackupType,
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
            eprintln!("sendense-ctl: no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(commands::run(cli)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("sendense-ctl: {}", show::plain(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
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
