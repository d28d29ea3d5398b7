//! Every bound of the server, named, with its unit and default. Nothing here enforces them: each is enforced in one
//! place, which names it.

use std::time::Duration;

use crate::wire;

/// What one server allows its clients. Construct by [`Limits::default`] and change fields.
///
/// Memory for what is in flight, and for options of the handshake, is at most `memory_bytes`, and 128 KiB for each
/// connection, of which payloads that have not arrived hold at most `arriving_bytes`. Besides, a client holds a few tens of
/// KiB, in the handshake or idle.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Limits {
    /// Connections at once over all listeners. One more is closed without a greeting, after it has waited for a place for a
    /// second; as many may wait as may be served. Default 1024.
    pub connections: usize,
    /// Connections at once to each export that has no limit of its own
    /// ([`Export::max_connections`](crate::Export::max_connections)); who asks for one more is answered `ERR_POLICY`, with
    /// the reason. Default none.
    pub connections_per_export: Option<usize>,
    /// Connections at once of each client: from one address, of one user over Unix sockets, of one machine over vsock.
    /// One more is closed, a second later as above. Default none, because gateways have many clients behind one address.
    pub connections_per_client: Option<usize>,
    /// From the first byte of the greeting until the export is chosen, TLS included. Default 30 s. Half of it is the
    /// longest that a client waits for an export to be sealed: to be let in, or, where it was the writer, to see the end of
    /// its connection.
    pub handshake_timeout: Duration,
    /// How long a client may have nothing in flight before its connection is closed, unless the export says otherwise
    /// ([`Export::idle_timeout`](crate::Export::idle_timeout)). Default none: a disk may be unused for days.
    pub idle_timeout: Option<Duration>,
    /// Options that one client may send before it chooses an export. Default 8192: `qemu-nbd --list` sends two for
    /// each export.
    pub options: u32,
    /// The data of one option in bytes; longer data is discarded and answered `ERR_TOO_BIG`. Default 256 KiB: room
    /// for GO with every information type there can be. At least 4 KiB, for a name, at most `memory_bytes`: what an option
    /// holds beyond 4 KiB is part of that.
    pub option_bytes: u32,
    /// Requests of one connection that are read but whose reply is not yet written. Default 128.
    pub in_flight_requests: u32,
    /// Payload bytes of those requests, in either direction. Default 64 MiB. One request is always let in.
    pub in_flight_bytes: u32,
    /// The longest READ or WRITE in bytes, also told to clients. Default and maximum 32 MiB, minimum 64 KiB.
    pub max_payload_bytes: u32,
    /// Memory of all connections together, in bytes, for payloads of which a part has arrived. A connection that finds
    /// it used up takes its payloads in pieces of at most 64 KiB, for which there is always memory. Default 128 MiB:
    /// half of the pool that devices and servers of a process share, so that stuck clients cannot exhaust that.
    pub arriving_bytes: u32,
    /// Memory of all connections together, in bytes, for payloads that have arrived, for replies until they are written,
    /// and for options of the handshake; at least `max_payload_bytes`. Default 1 GiB. A connection that holds some of it can take more only as long
    /// as that leaves at least as much for others as it holds then. A quarter, or less where the longest request would not
    /// fit in beside it, is kept for connections that hold at most 1 MiB, whose requests wait for nobody until it is used up.
    /// A request that finds too little is done in parts of 64 KiB, which each connection has besides; clients that have not
    /// read their replies for `payload_timeout` lose their connections then.
    pub memory_bytes: u64,
    /// How long a payload that has begun may make no progress before its connection is dropped. Default 30 s.
    pub payload_timeout: Duration,
    /// How long a client that comes over TCP may acknowledge nothing before its connection breaks: one that is idle, and
    /// has vanished, or one that takes none of its replies, be it gone or not. Whole seconds, from 2 s to 18 h. Default
    /// 120 s. The kernel keeps it; Unix sockets and vsock need none.
    pub peer_timeout: Duration,
    /// Extents in one reply to BLOCK_STATUS, for each context. Default 8192.
    pub status_extents: usize,
    /// How long a connection that the server closes may go on to ask, and then how long it may take to accept its last
    /// replies. Default 2 s each.
    pub close_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            connections_per_export: None,
            connections_per_client: None,
            handshake_timeout: Duration::from_secs(30),
            idle_timeout: None,
            options: 8192,
            option_bytes: 256 << 10,
            in_flight_requests: 128,
            in_flight_bytes: 64 << 20,
            max_payload_bytes: wire::MAX_PAYLOAD_BYTES,
            arriving_bytes: 128 << 20,
            memory_bytes: 1 << 30,
            payload_timeout: Duration::from_secs(30),
            peer_timeout: Duration::from_secs(120),
            status_extents: block::MAX_EXTENTS,
            close_timeout: Duration::from_secs(2),
        }
    }
}

impl Limits {
    /// These limits with impossible values replaced by the nearest that works.
    pub(crate) fn clamped(mut self) -> Self {
        self.max_payload_bytes = self.max_payload_bytes.clamp(64 << 10, wire::MAX_PAYLOAD_BYTES);
        // A power of two, so that it is a multiple of every block size in force.
        self.max_payload_bytes = 1 << self.max_payload_bytes.ilog2();
        self.in_flight_requests = self.in_flight_requests.max(1);
        self.in_flight_bytes = self.in_flight_bytes.max(1);
        self.status_extents = self.status_extents.max(1);
        self.connections = self.connections.max(1);
        self.memory_bytes = self.memory_bytes.max(self.max_payload_bytes.into());
        let memory_bytes = u32::try_from(self.memory_bytes).unwrap_or(u32::MAX);
        self.option_bytes = self.option_bytes.min(memory_bytes);
        self
    }

    /// How long clients wait for the places of others, who may have closed their connections without the server having
    /// come to know: many do not wait for an answer to DISC.
    pub(crate) fn leaving_patience(&self) -> Duration {
        Duration::from_secs(1).min(self.sealing_patience())
    }

    /// How long clients wait for an export to be sealed.
    pub(crate) fn sealing_patience(&self) -> Duration {
        self.handshake_timeout / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_limit_stays_a_power_of_two_that_the_protocol_allows() {
        let of = |bytes| Limits { max_payload_bytes: bytes, ..Limits::default() }.clamped();
        assert_eq!(of(0).max_payload_bytes, 64 << 10);
        assert_eq!(of(u32::MAX).max_payload_bytes, 32 << 20);
        assert_eq!(of(100_000).max_payload_bytes, 65_536);
    }

    #[test]
    fn an_option_has_no_more_than_all_of_the_memory() {
        let of = |memory_bytes| {
            let limits = Limits { memory_bytes, option_bytes: u32::MAX, ..Limits::default() };
            limits.clamped().option_bytes
        };
        assert_eq!(of(0), 32 << 20);
        assert_eq!(of(40 << 20), 40 << 20);
        assert_eq!(of(u64::MAX), u32::MAX);
    }
}
