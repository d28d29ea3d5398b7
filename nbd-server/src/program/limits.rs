//! The limits of a server as the command line and files set them. What each bounds is told in the library.

use std::num::{NonZeroU32, NonZeroUsize};
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use nbd_server::Limits;

/// Limits that were said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub(crate) struct LimitOptions {
    /// Connections at once over all listeners [default: 1024]
    #[arg(long = "max-connections", value_name = "N", value_parser = count::<NonZeroUsize>)]
    pub(crate) connections: Option<NonZeroUsize>,

    /// Connections at once to each export that does not say otherwise [default: any number]
    #[arg(long = "max-connections-per-export", value_name = "N", value_parser = count::<NonZeroUsize>)]
    pub(crate) connections_per_export: Option<NonZeroUsize>,

    /// Connections at once of each client: from one address, of one local user, of one virtual machine [default: any
    /// number]
    #[arg(long = "max-connections-per-client", value_name = "N", value_parser = count::<NonZeroUsize>)]
    pub(crate) connections_per_client: Option<NonZeroUsize>,

    /// How long a client may take to choose an export [default: 30]
    #[arg(long = "handshake-timeout", value_name = "SECONDS", value_parser = whole_seconds)]
    pub(crate) handshake_secs: Option<NonZeroU32>,

    /// How long a client may ask for nothing before its connection is closed, unless the export says otherwise
    /// [default: for ever]
    #[arg(long = "idle-timeout", value_name = "SECONDS", value_parser = whole_seconds)]
    pub(crate) idle_secs: Option<NonZeroU32>,

    /// How long the data of a write may make no progress, and how long clients that do not read their replies may keep
    /// memory for which others wait [default: 30]
    #[arg(long = "payload-timeout", value_name = "SECONDS", value_parser = whole_seconds)]
    pub(crate) payload_secs: Option<NonZeroU32>,

    /// How long a client that comes over TCP may acknowledge nothing, neither probes nor replies, before it counts as gone
    /// [default: 120]
    #[arg(long = "peer-timeout", value_name = "SECONDS", value_parser = whole_seconds)]
    pub(crate) peer_secs: Option<NonZeroU32>,

    /// Options that a client may send before it chooses an export [default: 8192]
    #[arg(long = "max-options", value_name = "N", value_parser = count::<NonZeroU32>)]
    pub(crate) options: Option<NonZeroU32>,

    /// The data of one such option, in bytes, or in K, M, G; at least 4K [default: 256K]
    #[arg(long = "max-option-bytes", value_name = "BYTES", value_parser = option_length)]
    pub(crate) option_bytes: Option<NonZeroU32>,

    /// Requests of one connection that are read and not answered [default: 128]
    #[arg(long = "max-in-flight", value_name = "N", value_parser = count::<NonZeroU32>)]
    pub(crate) in_flight: Option<NonZeroU32>,

    /// What these requests read and write together, in bytes, or in K, M, G; one request may be longer [default: 64M]
    #[arg(long = "max-in-flight-bytes", value_name = "BYTES", value_parser = length)]
    pub(crate) in_flight_bytes: Option<NonZeroU32>,

    /// Memory for what all clients together have in flight, in bytes, or in K, M, G; at least 32M [default: 1G]
    #[arg(long = "memory-limit", value_name = "BYTES", value_parser = memory)]
    pub(crate) memory_bytes: Option<u64>,

    /// How long clients may take to end after SIGTERM; images take as much again at most [default: 20]
    #[arg(long = "shutdown-timeout", value_name = "SECONDS", value_parser = whole_seconds)]
    pub(crate) shutdown_secs: Option<NonZeroU32>,
}

/// How long connections may take to end, and devices to flush, after a signal.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(20);

/// A number from 1 on.
pub(super) fn count<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| "it is a number from 1 on".to_owned())
}

/// A time in seconds from 1 on.
pub(super) fn whole_seconds(text: &str) -> Result<NonZeroU32, String> {
    text.parse().map_err(|_| "it is a whole number of seconds from 1 on, without a unit".to_owned())
}

/// A number of bytes from 1 to 4G - 1.
pub(super) fn length(text: &str) -> Result<NonZeroU32, String> {
    let bytes = super::options::bytes(text)?;
    let length = u32::try_from(bytes).ok().and_then(NonZeroU32::new);
    length.ok_or_else(|| {
        "it is a number of bytes, or of K, M or G, from 1 to less than 4G".to_owned()
    })
}

/// The least room for the data of an option, in bytes: that of the longest name.
const LEAST_OPTION_BYTES: u32 = 4 << 10;

/// The data of an option, in bytes.
pub(super) fn option_length(text: &str) -> Result<NonZeroU32, String> {
    let length = length(text)?;
    let enough = length.get() >= LEAST_OPTION_BYTES;
    enough.then_some(length).ok_or_else(|| "it is at least 4K".to_owned())
}

/// The least memory for what is in flight, in bytes: room for the longest request.
const LEAST_MEMORY_BYTES: u64 = 32 << 20;

/// Memory for what is in flight, in bytes.
pub(super) fn memory(text: &str) -> Result<u64, String> {
    let bytes = super::options::bytes(text)?;
    let enough = bytes >= LEAST_MEMORY_BYTES;
    enough.then_some(bytes).ok_or_else(|| "it is at least 32M".to_owned())
}

fn seconds(number: NonZeroU32) -> Duration {
    Duration::from_secs(number.get().into())
}

impl LimitOptions {
    /// These, and those of `others` that are not said here.
    pub(super) fn or(self, others: &Self) -> Self {
        Self {
            connections: self.connections.or(others.connections),
            connections_per_export: self.connections_per_export.or(others.connections_per_export),
            connections_per_client: self.connections_per_client.or(others.connections_per_client),
            handshake_secs: self.handshake_secs.or(others.handshake_secs),
            idle_secs: self.idle_secs.or(others.idle_secs),
            payload_secs: self.payload_secs.or(others.payload_secs),
            peer_secs: self.peer_secs.or(others.peer_secs),
            options: self.options.or(others.options),
            option_bytes: self.option_bytes.or(others.option_bytes),
            in_flight: self.in_flight.or(others.in_flight),
            in_flight_bytes: self.in_flight_bytes.or(others.in_flight_bytes),
            memory_bytes: self.memory_bytes.or(others.memory_bytes),
            shutdown_secs: self.shutdown_secs.or(others.shutdown_secs),
        }
    }

    /// As the library takes them.
    pub(super) fn of_server(&self) -> Limits {
        let mut limits = Limits::default();
        limits.connections = self.connections.map_or(limits.connections, NonZeroUsize::get);
        limits.connections_per_export = self.connections_per_export.map(NonZeroUsize::get);
        limits.connections_per_client = self.connections_per_client.map(NonZeroUsize::get);
        limits.handshake_timeout = self.handshake_secs.map_or(limits.handshake_timeout, seconds);
        limits.idle_timeout = self.idle_secs.map(seconds);
        limits.payload_timeout = self.payload_secs.map_or(limits.payload_timeout, seconds);
        limits.peer_timeout = self.peer_secs.map_or(limits.peer_timeout, seconds);
        limits.options = self.options.map_or(limits.options, NonZeroU32::get);
        limits.option_bytes = self.option_bytes.map_or(limits.option_bytes, NonZeroU32::get);
        limits.in_flight_requests =
            self.in_flight.map_or(limits.in_flight_requests, NonZeroU32::get);
        limits.in_flight_bytes =
            self.in_flight_bytes.map_or(limits.in_flight_bytes, NonZeroU32::get);
        limits.memory_bytes = self.memory_bytes.unwrap_or(limits.memory_bytes);
        limits
    }

    /// How long a shutdown may take.
    pub(super) fn shutdown_grace(&self) -> Duration {
        self.shutdown_secs.map_or(SHUTDOWN_GRACE, seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_command_line_says_counts_before_what_files_say() {
        let of_files = LimitOptions {
            connections: NonZeroUsize::new(5),
            idle_secs: NonZeroU32::new(7),
            memory_bytes: Some(64 << 20),
            ..LimitOptions::default()
        };
        let said = LimitOptions {
            connections: NonZeroUsize::new(6),
            connections_per_client: NonZeroUsize::new(2),
            ..LimitOptions::default()
        };
        let limits = said.or(&of_files).of_server();
        assert_eq!((limits.connections, limits.connections_per_client), (6, Some(2)));
        assert_eq!(limits.idle_timeout, Some(Duration::from_secs(7)));
        assert_eq!((limits.memory_bytes, limits.connections_per_export), (64 << 20, None));
        assert_eq!(limits.handshake_timeout, Limits::default().handshake_timeout);
        assert_eq!(LimitOptions::default().shutdown_grace(), SHUTDOWN_GRACE);
    }

    #[test]
    fn what_one_connection_may_is_said_by_options_and_reaches_the_server() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            limits: LimitOptions,
        }
        let parse = |arguments: &[&str]| {
            <Line as clap::Parser>::try_parse_from(["x"].iter().chain(arguments))
        };
        let said = [
            "--max-options=3",
            "--max-option-bytes=8K",
            "--max-in-flight=4",
            "--max-in-flight-bytes=1M",
            "--peer-timeout=5",
        ];
        let said = parse(&said).unwrap().limits;
        for limits in [said.clone().or(&LimitOptions::default()), LimitOptions::default().or(&said)]
        {
            let limits = limits.of_server();
            assert_eq!((limits.options, limits.option_bytes), (3, 8192));
            assert_eq!((limits.in_flight_requests, limits.in_flight_bytes), (4, 1 << 20));
            assert_eq!(limits.peer_timeout, Duration::from_secs(5));
        }
        for wrong in [
            "--max-options=0",
            "--max-option-bytes=0",
            "--max-option-bytes=4095",
            "--max-in-flight-bytes=4G",
            "--memory-limit=31M",
        ] {
            assert!(parse(&[wrong]).is_err(), "{wrong}");
        }
    }
}
