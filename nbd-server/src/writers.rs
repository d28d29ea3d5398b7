//! Who may write to an export at once, and what becomes of it when its writer is done. Who may use it at all is decided
//! by `admission` and `access`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::access::{Identity, Protection};
use crate::census::Origin;
use crate::peer::Peer;

/// Who may have a writable export at once. NBD does not tell whether a client means to write, so that this counts
/// everybody; who only reads takes another, read-only export of the same device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Writers {
    /// Everybody who may use it.
    #[default]
    Any,
    /// One client, with any number of connections: those from one address, of one user over Unix sockets, or of one
    /// machine over vsock, and with the same certificate where they show one. Others are answered `ERR_POLICY`, with the
    /// reason.
    OneClient,
    /// One connection.
    OneConnection,
}

/// Who holds a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Writer {
    origin: Option<Origin>,
    identity: Option<Arc<Identity>>,
}

impl Writer {
    pub(crate) fn new(peer: &Peer, protection: &Protection) -> Self {
        let identity = match protection {
            Protection::Tls(identity) => identity.clone(),
            Protection::Plain => None,
        };
        Self { origin: Origin::of(peer), identity }
    }

    /// Whether they are one client. Those of whom nobody knows who they are never are.
    fn is(&self, other: &Self) -> bool {
        self.origin.is_some() && self == other
    }
}

/// The right to write to an export.
#[derive(Debug, Default)]
pub(crate) struct Lease {
    state: Mutex<State>,
    sealed: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    holder: Option<Writer>,
    connections: usize,
    /// Whether one of its connections ended otherwise than by a word of the client.
    lost: bool,
    /// Whether it was used to change or to flush anything.
    used: bool,
    sealing: bool,
}

impl State {
    fn admits(&self, writers: Writers, writer: &Writer) -> bool {
        match (&self.holder, writers) {
            (None, _) => true,
            (Some(_), _) if self.sealing => false,
            (Some(_), Writers::Any) => true,
            (Some(holder), Writers::OneClient) => holder.is(writer),
            (Some(_), Writers::OneConnection) => false,
        }
    }

    fn end(&mut self) {
        *self = Self::default();
    }
}

/// A connection's part in a lease; given back when dropped, as by a connection that was lost.
#[derive(Debug)]
pub(crate) struct LeaseHold {
    lease: Arc<Lease>,
    used: AtomicBool,
    left: AtomicBool,
}

/// The end of a lease in which nobody can take the next one.
pub(crate) struct Sealing(Arc<Lease>);

impl Lease {
    /// Whether a client would get it.
    pub(crate) fn admits(&self, writers: Writers, writer: &Writer) -> bool {
        self.state.lock().admits(writers, writer)
    }

    /// Takes it, or a part in it.
    pub(crate) fn take(self: &Arc<Self>, writers: Writers, writer: Writer) -> Option<LeaseHold> {
        let mut state = self.state.lock();
        if !state.admits(writers, &writer) {
            return None;
        }
        state.holder.get_or_insert(writer);
        state.connections += 1;
        let (used, left) = (AtomicBool::new(false), AtomicBool::new(false));
        Some(LeaseHold { lease: Arc::clone(self), used, left })
    }

    /// Whether it is given to nobody any more.
    pub(crate) fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::Acquire)
    }
}

impl LeaseHold {
    /// Something is changed or flushed.
    pub(crate) fn used(&self) {
        self.used.store(true, Ordering::Relaxed);
    }

    /// Ends the connection's part. Where it was the last one, all of them ended by a word of the client, and one did
    /// anything, the export can be sealed, and nobody gets the lease until that is done or given up.
    pub(crate) fn leave(&self, by_word: bool) -> Option<Sealing> {
        if self.left.swap(true, Ordering::AcqRel) {
            return None;
        }
        let mut state = self.lease.state.lock();
        state.lost |= !by_word;
        state.used |= self.used.load(Ordering::Relaxed);
        state.connections -= 1;
        if state.connections > 0 {
            return None;
        }
        if state.lost || !state.used {
            state.end();
            return None;
        }
        state.sealing = true;
        Some(Sealing(Arc::clone(&self.lease)))
    }
}

impl Drop for LeaseHold {
    fn drop(&mut self) {
        drop(self.leave(false));
    }
}

impl Sealing {
    /// The export takes no writer any more.
    pub(crate) fn seal(self) {
        self.0.sealed.store(true, Ordering::Release);
    }
}

impl Drop for Sealing {
    fn drop(&mut self) {
        self.0.state.lock().end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(uid: u32) -> Writer {
        Writer::new(&Peer::Unix { uid }, &Protection::Plain)
    }

    fn named(uid: u32, name: &str) -> Writer {
        let identity = Identity { names: vec![name.parse().unwrap()] };
        Writer::new(&Peer::Unix { uid }, &Protection::Tls(Some(Arc::new(identity))))
    }

    #[test]
    fn one_client_has_any_number_of_connections_and_others_have_none() {
        let lease = Arc::new(Lease::default());
        let take = |writer| lease.take(Writers::OneClient, writer);
        let (first, second) = (take(user(1)).unwrap(), take(user(1)).unwrap());
        assert!(take(user(2)).is_none() && take(named(1, "cn:x")).is_none());
        drop(first);
        assert!(take(user(2)).is_none());
        drop(second);
        let named_one = take(named(1, "cn:x")).unwrap();
        assert!(take(named(1, "cn:y")).is_none() && take(named(1, "cn:x")).is_some());
        drop(named_one);
        let stranger = Writer::new(&Peer::Unknown, &Protection::Plain);
        let _held = take(stranger.clone()).unwrap();
        assert!(take(stranger).is_none(), "two strangers are two clients");
    }

    #[test]
    fn one_connection_is_one_and_any_number_is_any() {
        let lease = Arc::new(Lease::default());
        let first = lease.take(Writers::OneConnection, user(1)).unwrap();
        assert!(lease.take(Writers::OneConnection, user(1)).is_none());
        assert!(lease.take(Writers::Any, user(2)).is_some());
        drop(first);
        assert!(lease.take(Writers::OneConnection, user(3)).is_some());
    }

    #[test]
    fn only_the_last_of_connections_that_all_said_goodbye_seals() {
        let lease = Arc::new(Lease::default());
        let take = || lease.take(Writers::OneClient, user(1)).unwrap();
        assert!(take().leave(true).is_none(), "it only looked around");
        let (one, two) = (take(), take());
        one.used();
        assert!(one.leave(true).is_none());
        let sealing = two.leave(true).unwrap();
        assert!(!lease.admits(Writers::Any, &user(1)), "nobody comes in between");
        drop(sealing);
        assert!(
            !lease.is_sealed() && lease.admits(Writers::OneClient, &user(2)),
            "it was given up"
        );
        let (one, two) = (take(), take());
        two.used();
        drop(one);
        assert!(two.leave(true).is_none(), "one was lost");
        let again = take();
        again.used();
        again.leave(true).unwrap().seal();
        assert!(lease.is_sealed());
    }
}
