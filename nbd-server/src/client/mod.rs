//! The client side of NBD: a pipelined [`NbdDevice`] over one connection or several. What the server says is decoded by
//! two machines without I/O (`handshake`, `reply`); `connection` moves the bytes for them, `links` keeps connections up.

mod address;
mod connection;
mod device;
mod error;
mod export;
#[cfg(test)]
mod fake;
mod handshake;
mod journal;
mod links;
mod memory;
mod options;
mod reconnect;
mod reply;
mod security;
mod stream;
mod uri;

pub use address::Address;
pub use device::NbdDevice;
pub use error::{ClientError, HandshakeFault, LostCause, ReplyFault};
pub use export::{BlockSizes, ExportInfo, ExportListing, StatusExtent};
pub use options::ClientOptions;
pub use reconnect::Reconnect;
pub use uri::{NbdUri, UriError};
