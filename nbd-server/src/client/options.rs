//! What a caller may choose about a client: how wide, how deep and how patient. Each limit has a name, a unit and a default.

use std::sync::Arc;
use std::time::Duration;

use block::BufferPool;

use super::reconnect::Reconnect;
use crate::wire::Headers;

/// How a client connects and how much it keeps in flight.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// The number of connections; only one is opened where the server does not promise that several agree.
    pub connections: usize,
    /// The most requests in flight on one connection.
    pub in_flight: usize,
    /// The meta contexts to ask for, by their exact names. Those that the server lacks are left out.
    pub meta_contexts: Vec<String>,
    /// The newest headers to ask for; a server that lacks them is met with the next older ones. Block status needs
    /// structured ones at least.
    pub headers: Headers,
    /// TLS, and whom to trust in it. With it, not a word about exports is spoken before TLS has begun, and where it does
    /// not begin connecting fails; without it, TLS is never spoken.
    #[cfg(feature = "tls")]
    pub tls: Option<crate::tls::ClientTls>,
    /// The longest payload of one request, in bytes; the server's own maximum applies as well.
    pub max_payload_bytes: u32,
    /// Whether a connection that broke is replaced and what it owed sent again; without it, its requests fail.
    pub reconnect: Option<Reconnect>,
    /// How long the socket may take to connect.
    pub connect_timeout: Duration,
    /// How long the negotiation may take, TLS included.
    pub handshake_timeout: Duration,
    /// A connection that owes replies and is silent for this long counts as dead (it is noticed after at most twice
    /// the time). `None` waits for ever.
    pub stall_timeout: Option<Duration>,
    /// How long a disconnect may take before the socket is closed without ceremony.
    pub disconnect_timeout: Duration,
    /// Where the buffers of reads come from; `None` takes a pool that all clients of the process share. A read waits
    /// while the pool is exhausted: a caller that keeps all it has read cannot have more than the pool. It must not be
    /// the pool of a server in the same process that answers this client.
    pub pool: Option<Arc<BufferPool>>,
}

impl ClientOptions {
    /// The most connections of one device.
    pub const MAX_CONNECTIONS: usize = 64;
    /// The most requests in flight that one connection allows.
    pub const MAX_IN_FLIGHT: usize = 1024;
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            connections: 4,
            in_flight: 16,
            meta_contexts: vec!["base:allocation".to_owned()],
            headers: Headers::Extended,
            #[cfg(feature = "tls")]
            tls: None,
            max_payload_bytes: crate::wire::MAX_PAYLOAD_BYTES,
            reconnect: None,
            connect_timeout: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(10),
            stall_timeout: Some(Duration::from_secs(300)),
            disconnect_timeout: Duration::from_secs(5),
            pool: None,
        }
    }
}
