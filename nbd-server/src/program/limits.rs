//! The limits of a server as the command line and files set them. What each bounds is told in the library.

use std::num::{NonZeroU32, NonZeroUsize};
use std::time::Duration;

use clap::Args;
use nbd_server::Limits;

/// Limits that were said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub(crate) struct LimitOptions {
    /// Connections at once over all listeners [default: 1024]
    #[arg(long = "max-connections", value_name = "N")]
    pub(crate) connections: Option<NonZeroUsize>,

    /// Connections at once to each export that does not say otherwise [default: any number]
    #[arg(long = "max-connections-per-export", value_name = "N")]
    pub(crate) connections_per_export: Option<NonZeroUsize>,

    /// Connections at once of each client: from one address, of one local user, of one virtual machine [default: any
    /// number]
    #[arg(long = "max-connections-per-client", value_name = "N")]
    pub(crate) connections_per_client: Option<NonZeroUsize>,

    /// How long a client may take to choose an export [default: 30]
    #[arg(long = "handshake-timeout", value_name = "SECONDS")]
    pub(crate) handshake_secs: Option<NonZeroU32>,

    /// How long a client may ask for nothing before its connection is closed, unless the export says otherwise
    /// [default: for ever]
    #[arg(long = "idle-timeout", value_name = "SECONDS")]
    pub(crate) idle_secs: Option<NonZeroU32>,

    /// How long the data of a write may make no progress, and how long clients that do not read their replies may keep
    /// memory for which others wait [default: 30]
    #[arg(long = "payload-timeout", value_name = "SECONDS")]
    pub(crate) payload_secs: Option<NonZeroU32>,

    /// Memory for what all clients together have in flight, in bytes, or in K, M, G; at least 32M [default: 1G]
    #[arg(long = "memory-limit", value_name = "BYTES", value_parser = super::options::bytes)]
    pub(crate) memory_bytes: Option<u64>,

    /// How long clients may take to end after SIGTERM; images take as much again at most [default: 20]
    #[arg(long = "shutdown-timeout", value_name = "SECONDS")]
    pub(crate) shutdown_secs: Option<NonZeroU32>,
}

/// How long connections may take to end, and devices to flush, after a signal.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(20);

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
}
