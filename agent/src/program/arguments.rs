//! The command line. What the flags mean together is decided where the disks are put together.

use std::path::PathBuf;
use std::str::FromStr;

use agent::{SourceSpec, Target};
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Streams the changed extents of a machine's disks over NBD.
#[derive(Debug, Parser)]
#[command(name = "sendense-agent", version, about)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Sends the disks of one machine, once, and ends.
    #[command(
        after_help = "Exit codes: 0 done, 1 failed or cancelled, 2 usage, 3 done with warnings \
        (for instance: a disk was sent whole because its baseline was lost)."
    )]
    Migrate(Migrate),
}

/// The flags of `migrate`.
#[derive(Debug, Args)]
pub(crate) struct Migrate {
    /// A disk: file:PATH, nbd://HOST:PORT/EXPORT[?bitmap=NAME] or nbd+unix:///EXPORT?socket=PATH[&bitmap=NAME], with
    /// KEY= before it unless the disk's key is 2000 plus its place. nbds:// and nbds+unix:// demand TLS, and take
    /// tls-certificates=DIRECTORY, tls-hostname=NAME and tls-verify-peer=false as libnbd does. Once for each disk, in order. A bitmap must have
    /// been recording without interruption since the backup that an incremental builds on, which cannot be checked over
    /// NBD: give each chain of backups its own bitmap, and use --full after making one anew.
    #[arg(long = "source", value_name = "[KEY=]SPEC")]
    pub(crate) sources: Vec<Keyed<SourceSpec>>,

    /// The export that takes a disk. Once for each source, in order.
    #[arg(long = "export", value_name = "NAME")]
    pub(crate) exports: Vec<String>,

    /// The host of the NBD server [default: 127.0.0.1, or what the hub says].
    #[arg(long, value_name = "HOST")]
    pub(crate) nbd_host: Option<String>,

    /// The port of the NBD server [default: 10808, or what the hub says].
    #[arg(long, value_name = "PORT")]
    pub(crate) nbd_port: Option<u16>,

    /// The Unix socket of the NBD server, instead of host and port.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["nbd_host", "nbd_port"])]
    pub(crate) nbd_socket: Option<PathBuf>,

    /// Targets by key, each a whole URI, with commas between: 2000:nbd://HOST:PORT/EXPORT,2001:…
    #[arg(long, value_name = "KEY:URI,…", value_delimiter = ',',
          conflicts_with_all = ["exports", "nbd_host", "nbd_port", "nbd_socket", "hub"])]
    pub(crate) nbd_targets: Vec<KeyedTarget>,

    /// The job that the change ids are recorded under [env: SENDENSE_JOB_ID, MIGRATEKIT_JOB_ID].
    #[arg(long, value_name = "ID")]
    pub(crate) job_id: Option<String>,

    /// The change id of a disk's last backup: only what changed since is sent. In the order of the disks, or with KEY=.
    #[arg(long = "previous-change-id", value_name = "[KEY=]ID", conflicts_with = "hub")]
    pub(crate) previous_change_ids: Vec<Keyed<String>>,

    /// Send everything, whatever is known of the last backup.
    #[arg(long)]
    pub(crate) full: bool,

    /// Where the digests of the last state are kept [default: $XDG_STATE_HOME/sendense/agent if that is set, else
    /// /var/lib/sendense/agent].
    #[arg(long, value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,

    /// Connections to each NBD server and disk.
    #[arg(long, value_name = "N", default_value_t = agent::DEFAULT_CONNECTIONS, value_parser = connections)]
    pub(crate) connections: usize,

    /// How progress is shown: a bar on standard error (auto: if that is a terminal), JSON lines on standard output, or
    /// not at all.
    #[arg(long, value_name = "HOW", value_enum, default_value_t = ProgressStyle::Auto)]
    pub(crate) progress: ProgressStyle,

    /// Write the report of the run as JSON to a file, or to standard output for `-`.
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,

    /// Ask this hub what to send where, and tell it how it goes [env: SENDENSE_HUB, OMA_API_URL].
    #[arg(long, value_name = "URL")]
    pub(crate) hub: Option<String>,

    /// The file that holds the hub's token.
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
}

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProgressStyle {
    /// A bar on a terminal, else nothing.
    Auto,
    /// A bar on standard error.
    Bar,
    /// An event a line on standard output.
    Json,
    /// Nothing.
    None,
}

/// Something that may name the key of its disk: `KEY=VALUE` or `VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Keyed<T> {
    pub(crate) key: Option<i64>,
    pub(crate) value: T,
}

impl<T: FromStr> FromStr for Keyed<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> Result<Self, T::Err> {
        let named = text.split_once('=').and_then(|(key, value)| Some((key.parse().ok()?, value)));
        let (key, value) = match named {
            Some((key, value)) => (Some(key), value),
            None => (None, text),
        };
        Ok(Self { key, value: value.parse()? })
    }
}

/// `KEY:URI`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeyedTarget {
    pub(crate) key: i64,
    pub(crate) target: Target,
}

impl FromStr for KeyedTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (key, uri) = text.split_once(':').ok_or("a target is KEY:URI")?;
        let key = key.trim().parse().map_err(|_| format!("'{key}' is no disk key"))?;
        let target = uri.parse().map_err(|error: agent::SpecError| error.to_string())?;
        Ok(Self { key, target })
    }
}

fn connections(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=64) => Ok(count),
        _ => Err("1 to 64 connections".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }

    #[test]
    fn the_help_tells_what_a_bitmap_must_have_done() {
        use clap::CommandFactory;
        let mut command = Arguments::command();
        let help = command.find_subcommand_mut("migrate").unwrap().render_help().to_string();
        assert!(help.contains("recording without interruption"), "{help}");
    }

    #[test]
    fn a_key_is_only_what_is_a_number_before_an_equals_sign() {
        let keyed: Keyed<SourceSpec> = "2001=file:/a=b".parse().unwrap();
        assert_eq!((keyed.key, keyed.value.to_string()), (Some(2001), "file:/a=b".to_owned()));
        let plain: Keyed<SourceSpec> = "file:/7=b".parse().unwrap();
        assert_eq!((plain.key, plain.value.to_string()), (None, "file:/7=b".to_owned()));
        assert!("x=file:/b".parse::<Keyed<SourceSpec>>().is_err());
    }

    #[test]
    fn targets_by_key_are_separated_by_commas() {
        let command = [
            "sendense-agent",
            "migrate",
            "--nbd-targets",
            "2000:nbd://h:1/e0,2016:nbd://[::1]:2/e1",
        ];
        let Command::Migrate(migrate) = Arguments::try_parse_from(command).unwrap().command;
        let found: Vec<_> =
            migrate.nbd_targets.iter().map(|one| (one.key, one.target.to_string())).collect();
        assert_eq!(
            found,
            [(2000, "nbd://h:1/e0".to_owned()), (2016, "nbd://[::1]:2/e1".to_owned())]
        );
        for wrong in ["nbd://h:1/e", "2000", "2000:file:/x"] {
            let command = ["sendense-agent", "migrate", "--nbd-targets", wrong];
            assert!(Arguments::try_parse_from(command).is_err(), "{wrong}");
        }
    }
}
