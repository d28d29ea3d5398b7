//! The NBD protocol in both directions, embeddable: an asynchronous server for any [`block::BlockDevice`] and a
//! pipelined client. Knows no image format.
//!
//! # Serving a device
//!
//! ```
//! use std::time::Duration;
//!
//! use block::MemoryDevice;
//! use nbd_server::{Export, Server, ServerConfig};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let server = Server::new(ServerConfig::default());
//! server.add_export(Export::new("scratch", MemoryDevice::new(64 << 20)).default_export(true))?;
//! let address = server.listen_tcp("127.0.0.1:0".parse()?).await?;
//! println!("try: nbdinfo nbd://{address}/scratch");
//! // ... and when it is time to go:
//! server.shutdown(Duration::from_secs(5)).await;
//! # Ok(())
//! # }
//! ```
//!
//! Exports are added, removed and replaced under clients: [`Server::replace_exports`] exchanges the whole table at one
//! stroke, or not at all, and tells what of it changed.
//!
//! # TLS
//!
//! With feature `tls`, by rustls and aws-lc-rs (no pre-shared keys: rustls has none):
//!
//! ```no_run
//! # #[cfg(feature = "tls")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use block::MemoryDevice;
//! use nbd_server::tls::{ClientCertificates, ServerTls};
//! use nbd_server::{Export, Server, ServerConfig, TlsMode};
//!
//! let tls = ServerTls::from_directory("/etc/nbd/tls".as_ref(), ClientCertificates::Required)?;
//! let server = Server::new(ServerConfig::default().tls(TlsMode::Required, tls));
//! let export = Export::new("scratch", MemoryDevice::new(64 << 20));
//! server.add_export(export.clients(["cn:agent-1".parse()?]))?;
//! // ... and when the certificate was renewed:
//! server.replace_tls(ServerTls::from_directory("/etc/nbd/tls".as_ref(), ClientCertificates::Required)?)?;
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "tls"))]
//! # fn main() {}
//! ```
//!
//! # Watching it
//!
//! [`Server::exports`] and [`Server::clients`] tell what was done through every export and connection: requests by kind,
//! bytes, errors with the last one's text, what is in flight, how long devices took. [`Server::prometheus`] is the same as
//! text; with feature `metrics`, `Server::listen_metrics` answers HTTP with it. Each connection has a span of `tracing`.
//!
//! # How it is made
//!
//! Everything that decides is a machine without I/O and without a clock: [`handshake`] takes bytes and gives replies,
//! [`request`] judges a request against what was negotiated, [`reply`] and [`block_status`] encode answers. Around them
//! a thin driver moves bytes: a connection is one task that reads requests, one that writes replies, and one for each
//! request that a device works on. Payloads are read into aligned buffers that travel to the device as they are, and
//! what a device reads travels to the socket as it is.
//!
//! # What is spoken
//!
//! `doc/proto.md` of NetworkBlockDevice/nbd, and of its experimental extensions `EXTENDED_HEADERS` as it stands on the
//! branch `extension-ext-header`, as QEMU and libnbd speak it: 32-byte headers, 64-bit lengths, block status of 64 bits
//! and of chosen contexts. A client gets it by asking for it; [`wire::Headers`] tells the kinds of headers apart. The
//! extension `RESIZE` is not spoken, because its text is not final. Which test holds which clause is told in
//! `tests/conformance/CLAUSES.md`.
//!
//! # What holds
//!
//! What one client can take is bounded by [`Limits`]. A client that is slow, silent, broken or malicious costs what its
//! own budget allows and stalls nobody else.
//!
//! Durability is the device's: a write is answered when the device says it is done, `FUA` when it says it is durable,
//! and `FLUSH` reaches the one device that all connections share, so it covers them all (`CAN_MULTI_CONN`).

mod access;
mod admission;
mod attendant;
pub mod block_status;
mod census;
#[cfg(feature = "client")]
pub mod client;
mod clients;
mod connection;
mod counters;
mod deadline;
mod departures;
mod execute;
mod export;
#[cfg(feature = "metrics")]
mod exposition;
mod extent_source;
mod failures;
mod gauge;
pub mod handshake;
mod hearing;
mod intake;
mod joined;
mod leases;
mod limits;
mod listener;
mod memory;
mod metrics;
mod negotiate;
mod outlet;
mod pace;
pub mod partition;
mod parts;
mod peer;
mod refusal;
mod replace;
pub mod reply;
pub mod request;
#[cfg(feature = "tls")]
mod secure;
mod serve;
mod server;
mod signal;
mod socket;
#[cfg(feature = "tls")]
pub mod tls;
mod window;
pub mod wire;
mod writers;

pub use access::{ClientName, ClientNameError};
pub use admission::{Admission, ClientRule, ClientRuleError};
pub use attendant::{Attendant, TurnedAway};
pub use clients::ConnectionStatus;
pub use counters::{ByKind, Counters, LastError, Latency, RequestKind};
pub use export::{Export, ExportError, ExportStatus, Removal};
pub use extent_source::{DIRTY, ExtentSource, FlaggedExtent};
pub use handshake::TlsMode;
pub use joined::Joined;
pub use limits::Limits;
pub use peer::Peer;
pub use refusal::Refusal;
pub use replace::{Replaced, Replacement, Retired};
pub use server::{Server, ServerConfig, ShutdownReport};
pub use socket::{ListeningSocket, SocketFileOptions};
pub use window::{Window, WriteThrough};
pub use writers::{Lease, Writers};
