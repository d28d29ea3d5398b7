//! The connections that are open, with what is known of each. What is said on them is told elsewhere.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::SystemTime;

use parking_lot::Mutex;

use crate::counters::{Counters, LastError, Tally};
use crate::peer::Peer;

/// A connection as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConnectionStatus {
    /// A number that no other connection of the server has or had; spans of `tracing` bear it.
    pub id: u64,
    /// Who is at the other end.
    pub peer: Peer,
    /// What the client's certificate says, where it showed a valid one.
    pub certificate: Option<String>,
    /// When it was accepted.
    pub since: SystemTime,
    /// The export that it entered; none in the handshake.
    pub export: Option<String>,
    /// What was done through it.
    pub counters: Counters,
    /// The last request that failed.
    pub last_error: Option<LastError>,
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Client {
    id: u64,
    pub(crate) peer: Peer,
    since: SystemTime,
    pub(crate) certificate: OnceLock<String>,
    pub(crate) export: OnceLock<String>,
    pub(crate) tally: Arc<Tally>,
    register: Arc<Clients>,
}

/// Every connection.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    next: AtomicU64,
    open: Mutex<BTreeMap<u64, Weak<Client>>>,
}

impl Clients {
    /// One more, until it is dropped.
    pub(crate) fn add(self: &Arc<Self>, peer: Peer) -> Arc<Client> {
        let client = Arc::new(Client {
            id: self.next.fetch_add(1, Ordering::Relaxed),
            peer,
            since: SystemTime::now(),
            certificate: OnceLock::new(),
            export: OnceLock::new(),
            tally: Arc::default(),
            register: Arc::clone(self),
        });
        self.open.lock().insert(client.id, Arc::downgrade(&client));
        client
    }

    pub(crate) fn status(&self) -> Vec<ConnectionStatus> {
        // Looked at without the lock, which the last one to drop a client takes.
        let open: Vec<_> = self.open.lock().values().cloned().collect();
        open.iter().filter_map(Weak::upgrade).map(|client| client.status()).collect()
    }
}

impl Client {
    /// What the log says of everything that happens on it.
    pub(crate) fn span(&self) -> tracing::Span {
        let Self { id, peer, .. } = self;
        let empty = tracing::field::Empty;
        tracing::info_span!("connection", id, %peer, certificate = empty, export = empty)
    }

    fn status(&self) -> ConnectionStatus {
        ConnectionStatus {
            id: self.id,
            peer: self.peer.clone(),
            certificate: self.certificate.get().cloned(),
            since: self.since,
            export: self.export.get().cloned(),
            counters: self.tally.snapshot(),
            last_error: self.tally.last_error(),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.register.open.lock().remove(&self.id);
    }
}
