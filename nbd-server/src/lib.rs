//! The NBD protocol in both directions, embeddable: an asynchronous server for any [`block::BlockDevice`] and a
//! pipelined client. Knows no image format.

pub mod block_status;
#[cfg(feature = "client")]
pub mod client;
mod connection;
mod execute;
mod export;
mod gauge;
pub mod handshake;
mod intake;
mod limits;
mod listener;
mod negotiate;
mod outlet;
pub mod reply;
pub mod request;
mod server;
mod signal;
pub mod wire;

pub use export::{Counters, Export, ExportError, ExportStatus, Removal};
pub use limits::Limits;
pub use server::{Server, ServerConfig, ShutdownReport};
