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
    /// How many of its connections ended otherwise than by a word of the client.
    losses: usize,
    /// How many of those were followed by another connection, each by one of its own, that changed or flushed something.
    /// Never more than there were losses.
    returns: usize,
    /// Whether a FLUSH succeeded that began when every loss was followed by a return, and none came since.
    confirmed: bool,
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

    /// Why the writer is not done although nobody is connected.
    fn unfinished(&self) -> Option<Unfinished> {
        if self.losses == 0 {
            None
        } else if self.returns < self.losses {
            Some(Unfinished::Lost)
        } else if !self.confirmed {
            Some(Unfinished::Unconfirmed)
        } else {
            None
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
    /// How many connections were lost before it came.
    losses_before: usize,
}

/// Why an export is not sealed although its last writer is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unfinished {
    /// Nobody came in the place of a connection that was lost.
    #[error("a connection was lost, and none that came later wrote in its place")]
    Lost,
    /// The client came back and did not say that all was well then.
    #[error("a connection was lost, and no FLUSH came after its return")]
    Unconfirmed,
}

/// What follows from the end of a connection.
pub(crate) enum Parting {
    /// Nothing: others are there, or nobody did anything.
    Nothing,
    /// The last one is gone, and the writer is not done.
    Unfinished(Unfinished),
    /// The writer is done.
    Done(Sealing),
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
        Some(LeaseHold { lease: Arc::clone(self), used, left, losses_before: state.losses })
    }

    /// Whether it is given to nobody any more.
    pub(crate) fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::Acquire)
    }
}

impl LeaseHold {
    /// Something is changed or flushed. The first time makes good for a connection that was lost before this one came.
    pub(crate) fn used(&self) {
        if self.used.swap(true, Ordering::AcqRel) {
            return;
        }
        let mut state = self.lease.state.lock();
        if self.can_replace(&state) {
            state.returns += 1;
        }
    }

    /// Whether a connection was lost before this one came that nobody has made good for.
    fn can_replace(&self, state: &State) -> bool {
        state.returns < self.losses_before
    }

    /// A FLUSH begins; to be handed to [`Self::flushed`] once it has succeeded. `None` where it confirms nothing.
    pub(crate) fn flushing(&self) -> Option<Flushing> {
        let state = self.lease.state.lock();
        let confirms = state.losses > 0 && state.returns == state.losses;
        confirms.then_some(Flushing { losses: state.losses })
    }

    /// A FLUSH has succeeded.
    pub(crate) fn flushed(&self, flushing: Flushing) {
        let mut state = self.lease.state.lock();
        if state.losses == flushing.losses {
            state.confirmed = true;
        }
    }

    /// Ends the connection's part. Where it was the last one and somebody did anything, the writer is done if all of them
    /// ended by a word of the client, or if for each that was lost another one came later and wrote, and a FLUSH behind
    /// all that succeeded: a client that goes on in this way has sent again what it had no answer to. The export can be
    /// sealed then, and nobody gets the lease until that is done or given up.
    ///
    /// A connection that comes back before the server knows that the old one is lost is not seen as its successor.
    pub(crate) fn leave(&self, by_word: bool) -> Parting {
        if self.left.swap(true, Ordering::AcqRel) {
            return Parting::Nothing;
        }
        let mut state = self.lease.state.lock();
        let used = self.used.load(Ordering::Acquire);
        state.used |= used;
        state.connections -= 1;
        // One that came for a lost one and is lost before it did anything leaves that one to the next.
        let never_began = !used && self.can_replace(&state);
        if !by_word && (!never_began || state.connections == 0) {
            state.losses += 1;
            state.confirmed = false;
        }
        if state.connections > 0 {
            return Parting::Nothing;
        }
        let unfinished = state.unfinished();
        if unfinished.is_some() || !state.used {
            let was_used = state.used;
            state.end();
            return match unfinished {
                Some(why) if was_used => Parting::Unfinished(why),
                _ => Parting::Nothing,
            };
        }
        state.sealing = true;
        Parting::Done(Sealing(Arc::clone(&self.lease)))
    }
}

/// A FLUSH that is under way, and how many connections had been lost when it began.
#[derive(Debug)]
pub(crate) struct Flushing {
    losses: usize,
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

    fn lease() -> (Arc<Lease>, impl Fn() -> LeaseHold) {
        let lease = Arc::new(Lease::default());
        let same = Arc::clone(&lease);
        (lease, move || same.take(Writers::OneClient, user(1)).unwrap())
    }

    fn flush(hold: &LeaseHold) {
        hold.used();
        if let Some(flushing) = hold.flushing() {
            hold.flushed(flushing);
        }
    }

    impl Parting {
        fn why(self) -> Option<Unfinished> {
            match self {
                Self::Unfinished(why) => Some(why),
                Self::Done(_) => None,
                Self::Nothing => panic!("nothing followed"),
            }
        }

        fn is_nothing(&self) -> bool {
            matches!(self, Self::Nothing)
        }
    }

    #[test]
    fn only_the_last_of_connections_that_all_said_goodbye_seals() {
        let (lease, take) = lease();
        assert!(take().leave(true).is_nothing(), "it only looked around");
        let (one, two) = (take(), take());
        one.used();
        assert!(one.leave(true).is_nothing());
        let parting = two.leave(true);
        assert!(!lease.admits(Writers::Any, &user(1)), "nobody comes in between");
        assert_eq!(parting.why(), None);
        assert!(
            !lease.is_sealed() && lease.admits(Writers::OneClient, &user(2)),
            "it was given up"
        );
        let (one, two) = (take(), take());
        flush(&two);
        drop(one);
        flush(&two);
        assert_eq!(two.leave(true).why(), Some(Unfinished::Lost));
        let again = take();
        again.used();
        let Parting::Done(sealing) = again.leave(true) else { panic!() };
        sealing.seal();
        assert!(lease.is_sealed());
    }

    #[test]
    fn who_came_back_for_each_lost_connection_and_flushed_then_is_done() {
        let (_, take) = lease();
        let (lost, also_lost, stays) = (take(), take(), take());
        lost.used();
        drop((lost, also_lost));
        let (one, other) = (take(), take());
        one.used();
        flush(&stays);
        drop(take());
        flush(&other);
        assert!(one.leave(true).is_nothing() && other.leave(true).is_nothing());
        assert_eq!(stays.leave(true).why(), None);
        let (lost, stays) = (take(), take());
        lost.used();
        drop(lost);
        let unlucky = take();
        drop(unlucky);
        let back = take();
        back.used();
        flush(&stays);
        assert!(back.leave(true).is_nothing());
        assert_eq!(stays.leave(true).why(), None);
    }

    #[test]
    fn a_return_without_a_flush_behind_it_does_not_end_the_writing() {
        let (_, take) = lease();
        let (lost, stays) = (take(), take());
        lost.used();
        drop(lost);
        let back = take();
        flush(&stays);
        back.used();
        assert!(stays.leave(true).is_nothing());
        assert_eq!(back.leave(true).why(), Some(Unfinished::Unconfirmed));
    }

    #[test]
    fn a_flush_does_not_confirm_what_is_lost_while_it_is_under_way() {
        let (_, take) = lease();
        let (lost, also_lost, stays) = (take(), take(), take());
        drop(lost);
        let back = take();
        back.used();
        let flushing = stays.flushing().unwrap();
        drop(also_lost);
        stays.flushed(flushing);
        let again = take();
        again.used();
        assert!(again.leave(true).is_nothing() && back.leave(true).is_nothing());
        assert_eq!(stays.leave(true).why(), Some(Unfinished::Unconfirmed));
    }

    #[test]
    fn who_only_looks_around_does_not_stand_in_for_a_lost_connection() {
        let (_, take) = lease();
        let (lost, stays) = (take(), take());
        lost.used();
        drop(lost);
        assert!(take().leave(true).is_nothing());
        flush(&stays);
        assert_eq!(stays.leave(true).why(), Some(Unfinished::Lost));
        let last = take();
        flush(&last);
        assert_eq!(last.leave(false).why(), Some(Unfinished::Lost));
    }
}
