//! Who may write to an export at once, and what becomes of it when its writer is done. Who may use it at all is decided
//! by `admission` and `access`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::ByteRange;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::access::{Identity, Protection};
use crate::census::Origin;
use crate::handshake::Unavailable;
use crate::peer::Peer;

/// Who may have a writable export at once, and whatever else it shows of what it writes: see [`Lease`]. NBD does not tell
/// whether a client means to write, so that this counts everybody; who only reads takes another, read-only export of the
/// same device.
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

/// A connection that has the right to write, or asks for it.
#[derive(Clone, Debug)]
pub(crate) struct Claim {
    /// Whom it tolerates beside it.
    pub(crate) writers: Writers,
    pub(crate) writer: Writer,
    /// What it writes of all that the lease is for.
    pub(crate) part: ByteRange,
    /// Whether the end of the writing is to be followed by sealing.
    pub(crate) seals: bool,
}

impl Claim {
    /// Whether both may write at once. The narrower of their demands counts.
    fn goes_with(&self, other: &Self) -> bool {
        if !self.part.overlaps(other.part) {
            return true;
        }
        match (self.writers, other.writers) {
            (Writers::OneConnection, _) | (_, Writers::OneConnection) => false,
            (Writers::OneClient, _) | (_, Writers::OneClient) => self.writer.is(&other.writer),
            (Writers::Any, Writers::Any) => true,
        }
    }
}

/// The right to write to one thing: a device, an image, a file. It outlives reloads, and does not care for names.
///
/// Exports of one device (the very same [`Arc`]) share one, as long as one of them is in the table or has connections.
/// Exports that show one thing through different devices, for instance through [`Window`](crate::Window)s, are given the
/// same one by [`Export::lease`](crate::Export::lease).
#[derive(Debug, Default)]
pub struct Lease {
    state: Mutex<State>,
    sealed: AtomicBool,
    sealing_over: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// The connections that have a part in it, by their numbers.
    claims: BTreeMap<u64, Claim>,
    /// The number of the next one.
    next: u64,
    /// How many connections ended otherwise than by a word of the client.
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
    fn judge(&self, claim: &Claim) -> Result<(), Unavailable> {
        if self.sealing {
            Err(Unavailable::Sealing)
        } else if self.claims.values().all(|held| held.goes_with(claim)) {
            Ok(())
        } else {
            Err(Unavailable::Leased)
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
        *self = Self { next: self.next, ..Self::default() };
    }
}

/// A connection's part in a lease; given back when dropped, as by a connection that was lost.
#[derive(Debug)]
pub(crate) struct LeaseHold {
    lease: Arc<Lease>,
    number: u64,
    /// Whether its connection came as far as to requests.
    began: AtomicBool,
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

/// The end of a lease in which nobody can take the next one, until this is dropped.
pub(crate) struct Sealing(Arc<Lease>);

impl Lease {
    /// One that nobody has.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Whether it is given to nobody any more, because the writer of an export that is sealed on disconnect is done.
    pub fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::Acquire)
    }

    /// Whether a client would get it.
    pub(crate) fn judge(&self, claim: &Claim) -> Result<(), Unavailable> {
        self.state.lock().judge(claim)
    }

    /// Whether what it is for is being sealed.
    pub(crate) fn is_sealing(&self) -> bool {
        self.state.lock().sealing
    }

    /// Waits until it is not.
    pub(crate) async fn settled(&self) {
        loop {
            let mut over = std::pin::pin!(self.sealing_over.notified());
            // Registered before the state is read, so that no end is missed.
            over.as_mut().enable();
            if !self.is_sealing() {
                return;
            }
            over.await;
        }
    }

    /// Takes it, or a part in it.
    pub(crate) fn take(self: &Arc<Self>, claim: Claim) -> Result<LeaseHold, Unavailable> {
        let mut state = self.state.lock();
        state.judge(&claim)?;
        let number = state.next;
        state.next += 1;
        state.claims.insert(number, claim);
        let no = || AtomicBool::new(false);
        let (lease, losses_before) = (Arc::clone(self), state.losses);
        Ok(LeaseHold { lease, number, began: no(), used: no(), left: no(), losses_before })
    }
}

impl LeaseHold {
    /// What it is a part of.
    pub(crate) fn lease(&self) -> &Arc<Lease> {
        &self.lease
    }

    /// Its connection takes requests from now on.
    pub(crate) fn begin(&self) {
        self.began.store(true, Ordering::Release);
    }

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
    /// sealed then, and nobody gets the lease until that is done or given up. A connection that never took requests was
    /// not lost, however it ended.
    ///
    /// A connection that comes back before the server knows that the old one is lost is not seen as its successor.
    pub(crate) fn leave(&self, by_word: bool) -> Parting {
        if self.left.swap(true, Ordering::AcqRel) {
            return Parting::Nothing;
        }
        let mut state = self.lease.state.lock();
        let used = self.used.load(Ordering::Acquire);
        state.used |= used;
        let seals = state.claims.remove(&self.number).is_some_and(|claim| claim.seals);
        // One that came for a lost one and is lost before it did anything leaves that one to the next.
        let came_in_vain = !used && self.can_replace(&state);
        let is_lost = !by_word && self.began.load(Ordering::Acquire);
        if is_lost && (!came_in_vain || state.claims.is_empty()) {
            state.losses += 1;
            state.confirmed = false;
        }
        if !state.claims.is_empty() {
            return Parting::Nothing;
        }
        let unfinished = state.unfinished();
        if !seals || unfinished.is_some() || !state.used {
            let was_used = state.used;
            state.end();
            return match unfinished {
                Some(why) if was_used && seals => Parting::Unfinished(why),
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
    /// Nothing that has the lease takes a writer any more.
    pub(crate) fn seal(&self) {
        self.0.sealed.store(true, Ordering::Release);
    }
}

impl Drop for Sealing {
    fn drop(&mut self) {
        self.0.state.lock().end();
        self.0.sealing_over.notify_waiters();
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

    fn claim(writers: Writers, writer: Writer) -> Claim {
        Claim { writers, writer, part: ByteRange::between(0, 100), seals: true }
    }

    fn part(writers: Writers, uid: u32, part: ByteRange) -> Claim {
        Claim { part, ..claim(writers, user(uid)) }
    }

    #[test]
    fn one_client_has_any_number_of_connections_and_others_have_none() {
        let lease = Lease::new();
        let take = |writer| lease.take(claim(Writers::OneClient, writer));
        let (first, second) = (take(user(1)).unwrap(), take(user(1)).unwrap());
        assert!(take(user(2)).is_err() && take(named(1, "cn:x")).is_err());
        drop(first);
        assert!(take(user(2)).is_err());
        drop(second);
        let named_one = take(named(1, "cn:x")).unwrap();
        assert!(take(named(1, "cn:y")).is_err() && take(named(1, "cn:x")).is_ok());
        drop(named_one);
        let stranger = Writer::new(&Peer::Unknown, &Protection::Plain);
        let _held = take(stranger.clone()).unwrap();
        assert!(take(stranger).is_err(), "two strangers are two clients");
    }

    #[test]
    fn of_two_demands_the_narrower_counts_whichever_came_first() {
        let (any, client, connection) = (Writers::Any, Writers::OneClient, Writers::OneConnection);
        for (one, other, same, another) in [
            (any, any, true, true),
            (any, client, true, false),
            (client, client, true, false),
            (any, connection, false, false),
            (client, connection, false, false),
            (connection, connection, false, false),
        ] {
            for (first, second) in [(one, other), (other, one)] {
                for (uid, fits) in [(1, same), (2, another)] {
                    let lease = Lease::new();
                    let held = lease.take(claim(first, user(1))).unwrap();
                    let asked = claim(second, user(uid));
                    let told = (lease.judge(&asked).is_ok(), lease.take(asked.clone()).is_ok());
                    assert_eq!(told, (fits, fits), "{first:?}, {second:?} of {uid}");
                    drop(held);
                    assert!(lease.take(asked).is_ok());
                }
            }
        }
        // All who are there count, not the first of them alone.
        let lease = Lease::new();
        let take = |writers, uid| lease.take(claim(writers, user(uid)));
        let (first, second) = (take(any, 1).unwrap(), take(any, 2).unwrap());
        assert!(take(client, 1).is_err());
        drop(second);
        let _third = take(client, 1).unwrap();
        drop(first);
        assert!(take(any, 2).is_err());
    }

    #[test]
    fn only_parts_that_overlap_keep_each_other_out() {
        let lease = Lease::new();
        let take = |uid, start, end| {
            lease.take(part(Writers::OneConnection, uid, ByteRange::between(start, end)))
        };
        let (_first, second) = (take(1, 0, 50).unwrap(), take(2, 50, 100).unwrap());
        for (start, end) in [(0, 1), (49, 51), (0, 100), (99, 100)] {
            assert!(take(1, start, end).is_err(), "{start} to {end}");
        }
        drop(second);
        assert!(take(3, 99, 100).is_ok() && take(3, 49, 51).is_err());
    }

    #[test]
    fn the_end_of_a_writing_that_seals_nothing_keeps_nobody_out() {
        let lease = Lease::new();
        let unsealed = Claim { seals: false, ..claim(Writers::OneClient, user(1)) };
        let hold = lease.take(unsealed.clone()).unwrap();
        hold.used();
        let parting = hold.leave(true);
        assert!(lease.judge(&unsealed).is_ok());
        assert!(parting.is_nothing());
    }

    fn lease() -> (Arc<Lease>, impl Fn() -> LeaseHold) {
        let lease = Lease::new();
        let same = Arc::clone(&lease);
        let take = move || {
            let hold = same.take(claim(Writers::OneClient, user(1))).unwrap();
            hold.begin();
            hold
        };
        (lease, take)
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
        assert!(lease.judge(&claim(Writers::Any, user(1))).is_err(), "nobody comes in between");
        assert_eq!(parting.why(), None);
        assert!(
            !lease.is_sealed() && lease.judge(&claim(Writers::OneClient, user(2))).is_ok(),
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
    fn a_connection_that_never_took_requests_is_not_lost_and_can_be_the_last() {
        let (lease, take) = lease();
        let unbegun = || lease.take(claim(Writers::OneClient, user(1))).unwrap();
        let (one, turned_away) = (take(), unbegun());
        one.used();
        drop(turned_away);
        assert_eq!(one.leave(true).why(), None);
        let (one, turned_away) = (take(), unbegun());
        one.used();
        assert!(one.leave(true).is_nothing(), "another one may begin yet");
        assert_eq!(turned_away.leave(false).why(), None);
        let (lost, turned_away) = (take(), unbegun());
        lost.used();
        drop(lost);
        assert_eq!(turned_away.leave(false).why(), Some(Unfinished::Lost));
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
