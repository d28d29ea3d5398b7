//! Who stands at the door of an export: told of each client that chooses it and of each that has left, and asked what the
//! client is to work on. What is said in between is not its business.

use std::sync::Arc;

use async_trait::async_trait;
use block::{BlockDevice, DeviceError};

use crate::peer::Peer;

/// Why a client is turned away; for the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TurnedAway(pub String);

/// Told of the clients of an export. See [`Export::attendant`](crate::Export::attendant).
#[async_trait]
pub trait Attendant: Send + Sync {
    /// A client has chosen the export; it is answered once this is done, within the time of its handshake. The device, if
    /// any, takes the place of the export's for this connection alone, and has the same size and abilities; it is dropped,
    /// not closed, at the end. Clients should then not be told that connections can be combined
    /// ([`CAN_MULTI_CONN`](crate::wire::transmission_flag::CAN_MULTI_CONN)).
    ///
    /// # Errors
    /// Why the client is turned away: it is answered `ERR_POLICY`, and may choose again.
    async fn arrived(&self, peer: &Peer) -> Result<Option<Arc<dyn BlockDevice>>, TurnedAway>;

    /// The writer of an export that is sealed on disconnect is done, and the device is flushed; nobody else gets in until
    /// this is done. By default nothing is to be done.
    ///
    /// # Errors
    /// What keeps the export from being sealed: it stays as it is.
    async fn sealed(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// A client that was let in has left, or its connection was dropped: told once for each, and the export has the
    /// connection until this is done. Where the server stops, what is left of its time is the bound, at which the future
    /// is dropped.
    async fn left(&self, peer: &Peer);
}
