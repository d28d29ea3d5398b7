//! How many connections each client has open, by where they come from. Whether a client may connect at all is decided by
//! `admission`.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::peer::Peer;

/// What makes two connections those of one client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Origin {
    Address(IpAddr),
    User(u32),
    Context(u32),
}

impl Origin {
    /// `None` where nobody told.
    pub(crate) fn of(peer: &Peer) -> Option<Self> {
        match peer {
            Peer::Tcp(_) => peer.address().map(Self::Address),
            Peer::Unix { uid } => Some(Self::User(*uid)),
            Peer::Vsock { cid, .. } => Some(Self::Context(*cid)),
            Peer::Unknown => None,
        }
    }
}

/// The connections of every client that has some.
#[derive(Debug, Default)]
pub(crate) struct Census {
    counts: Mutex<HashMap<Origin, usize>>,
}

/// A connection that is counted until this is dropped.
#[derive(Debug)]
pub(crate) struct Counted {
    census: Arc<Census>,
    origin: Option<Origin>,
}

impl Census {
    /// Counts one more connection of a client; `None` where it has `limit` of them. Those of whom nobody knows who they
    /// are have no limit.
    pub(crate) fn admit(self: &Arc<Self>, peer: &Peer, limit: Option<usize>) -> Option<Counted> {
        let origin = limit.and(Origin::of(peer));
        if let (Some(origin), Some(limit)) = (origin, limit) {
            let mut counts = self.counts.lock();
            let count = counts.entry(origin).or_default();
            if *count >= limit {
                return None;
            }
            *count += 1;
        }
        Some(Counted { census: Arc::clone(self), origin })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let Some(origin) = self.origin else { return };
        let mut counts = self.census.counts.lock();
        if let Some(count) = counts.get_mut(&origin) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&origin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(text: &str) -> Peer {
        Peer::Tcp(text.parse().unwrap())
    }

    #[test]
    fn each_client_has_a_count_of_its_own_that_goes_down_again() {
        let census = Arc::new(Census::default());
        let admit = |peer: &Peer| census.admit(peer, Some(1));
        let first = admit(&tcp("10.0.0.1:5")).unwrap();
        assert!(admit(&tcp("10.0.0.1:6")).is_none());
        assert!(admit(&tcp("[::ffff:10.0.0.1]:7")).is_none(), "the same address");
        let others = [
            tcp("10.0.0.2:5"),
            Peer::Unix { uid: 1 },
            Peer::Unix { uid: 2 },
            Peer::Vsock { cid: 1, port: 9 },
        ];
        let held: Vec<_> = others.iter().map(|peer| admit(peer).unwrap()).collect();
        assert!(others.iter().all(|peer| admit(peer).is_none()));
        assert!(admit(&Peer::Vsock { cid: 1, port: 8 }).is_none());
        drop((first, held));
        assert!(census.counts.lock().is_empty(), "nothing is kept of those who left");
        assert!(admit(&tcp("10.0.0.1:6")).is_some());
        let unknown: Vec<_> = (0..9).map(|_| admit(&Peer::Unknown).unwrap()).collect();
        drop(unknown);
        assert!(census.admit(&tcp("10.0.0.1:6"), None).is_some());
    }
}
