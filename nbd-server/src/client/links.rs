//! The connections of one device, and how they are kept up: which one takes a request, what becomes of requests whose
//! connection broke, and what a server is told that came back. How requests are cut is told in `device`.

mod repair;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use block::{BufferPool, ByteRange};
use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::address::Address;
use super::connection::{Call, Connection};
use super::error::{ClientError, LostCause};
use super::export::ExportInfo;
use super::journal::{Change, Journal, Life, Mark, is_change};
use super::memory::{Destination, client_pool};
use super::options::ClientOptions;
use super::reconnect::Reconnect;
use super::reply::Answer;
use super::stream::Counters;
use crate::wire::{command, command_flag, error, transmission_flag};

/// Where a device's connections lead.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) address: Address,
    pub(super) export: String,
}

/// A connection, and the life of the server in which it began.
#[derive(Clone)]
struct Link {
    connection: Arc<Connection>,
    life: Life,
}

impl Link {
    fn is_alive(&self) -> bool {
        self.connection.free_slots().is_some()
    }
}

struct State {
    /// One for each connection that was opened at first; those that broke are replaced.
    links: Vec<Link>,
    /// A task is at work on those that broke.
    repairing: bool,
    /// How many repairs ended without any connection, and what the last one failed at.
    outages: u64,
    outage: Option<Arc<ClientError>>,
    /// Why no later connection would do.
    verdict: Option<Arc<ClientError>>,
    /// By the owner's wish.
    closed: bool,
}

/// The connections of one device.
pub(super) struct Links {
    export: ExportInfo,
    options: ClientOptions,
    counters: Arc<Counters>,
    /// Where further connections come from, if from anywhere.
    target: Option<Target>,
    state: Mutex<State>,
    /// Told whenever there is something new in the state.
    news: watch::Sender<()>,
    journal: Mutex<Journal>,
    /// One flush of our own at a time.
    flushing: tokio::sync::Mutex<()>,
    /// Where the search for a free connection begins.
    turn: AtomicUsize,
    /// Attempts to connect since the server has answered anything.
    failures: AtomicU32,
}

impl Links {
    pub(super) fn new(
        export: ExportInfo,
        connections: Vec<Connection>,
        options: ClientOptions,
        counters: Arc<Counters>,
        target: Option<Target>,
    ) -> Arc<Self> {
        let journal = Journal::default();
        let link = |connection| Link { connection: Arc::new(connection), life: journal.life() };
        let state = State {
            links: connections.into_iter().map(link).collect(),
            repairing: false,
            outages: 0,
            outage: None,
            verdict: None,
            closed: false,
        };
        Arc::new(Self {
            export,
            options,
            counters,
            target,
            state: Mutex::new(state),
            news: watch::Sender::new(()),
            journal: Mutex::new(journal),
            flushing: tokio::sync::Mutex::default(),
            turn: AtomicUsize::new(0),
            failures: AtomicU32::new(0),
        })
    }

    /// What was negotiated.
    pub(super) fn export(&self) -> &ExportInfo {
        &self.export
    }

    pub(super) fn options(&self) -> &ClientOptions {
        &self.options
    }

    pub(super) fn pool(&self) -> &Arc<BufferPool> {
        self.options.pool.as_ref().unwrap_or_else(|| client_pool())
    }

    /// The number of connections that there are, or are to be again.
    pub(super) fn len(&self) -> usize {
        self.state.lock().links.len()
    }

    /// Sent and received on all of them, in bytes.
    pub(super) fn wire_bytes(&self) -> (u64, u64) {
        self.counters.get()
    }

    /// What those that are broken broke of.
    pub(super) fn lost(&self) -> Vec<Arc<LostCause>> {
        self.state.lock().links.iter().filter_map(|link| link.connection.lost()).collect()
    }

    /// Sends one request, whose reply goes to `destination`; again where its connection breaks, if the options say so.
    pub(super) async fn call(
        self: &Arc<Self>,
        call: Call,
        destination: Destination,
    ) -> Result<Answer, ClientError> {
        let Some((policy, _)) = self.policy() else {
            let link = self.pick()?;
            return link.connection.call(call, destination).await;
        };
        if is_change(call.command) {
            self.make_room(policy).await?;
        }
        self.send(policy, call, destination).await
    }

    /// Waits for what is in flight, then disconnects. Nothing is connected again.
    pub(super) async fn disconnect(&self) {
        self.close();
        let links = self.state.lock().links.clone();
        join_all(links.iter().map(|link| link.connection.disconnect())).await;
    }

    /// Begins no further request, and no further connection.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.news.send_replace(());
    }

    /// How broken connections are replaced, if at all.
    fn policy(&self) -> Option<(&Reconnect, &Target)> {
        self.options.reconnect.as_ref().zip(self.target.as_ref())
    }

    /// Whether it is known which changes the server has made durable. Of one without FLUSH it never is: what would have to
    /// be made again grew without end, so that nothing is.
    fn is_cached(&self) -> bool {
        !self.export.is_read_only() && self.export.has(transmission_flag::SEND_FLUSH)
    }

    async fn send(
        self: &Arc<Self>,
        policy: &Reconnect,
        call: Call,
        destination: Destination,
    ) -> Result<Answer, ClientError> {
        let mut destination = Some(destination);
        let mut sent = 0;
        loop {
            let link = self.link().await?;
            let mark = self.journal.lock().mark();
            // The first one went with the connection.
            let memory = destination.take().unwrap_or_else(|| self.memory_for(&call));
            let failed = match link.connection.call(call.clone(), memory).await {
                Ok(answer) => {
                    self.failures.store(0, Ordering::Relaxed);
                    if self.counts(&call, mark, link.life) {
                        return Ok(answer);
                    }
                    ClientError::Lost(Arc::new(LostCause::Closed))
                }
                // Closed, but not by us: the server is taking its leave.
                Err(ClientError::Closed) => ClientError::Lost(Arc::new(LostCause::Closed)),
                Err(failed) if failed.is_loss() => failed,
                Err(failed) => return Err(failed),
            };
            sent += 1;
            if sent > policy.resends {
                return Err(failed);
            }
        }
    }

    /// Whether an answer that was given in `life` still holds, and a note of what it promised.
    fn counts(&self, call: &Call, mark: Mark, life: Life) -> bool {
        let mut journal = self.journal.lock();
        match call.command {
            command::FLUSH => journal.flushed(mark, life),
            command if is_change(command) && self.is_cached() => {
                // Zeros that were fast once need not be so again.
                let flags = call.flags & !command_flag::FAST_ZERO;
                let (range, payload) = (call.range, call.payload.clone());
                journal.record(Change { command, flags, range, payload }, life)
            }
            _ => true,
        }
    }

    fn memory_for(&self, call: &Call) -> Destination {
        let len = usize::try_from(call.range.len()).unwrap_or_default();
        match call.command {
            command::READ => Destination::now(self.pool(), len),
            _ => Destination::none(),
        }
    }

    /// Waits until no more is kept than the options allow.
    async fn make_room(self: &Arc<Self>, policy: &Reconnect) -> Result<(), ClientError> {
        let is_full = || self.journal.lock().bytes() > policy.unflushed_bytes;
        while is_full() {
            let _turn = self.flushing.lock().await;
            if is_full() {
                let nothing = ByteRange::between(0, 0);
                let flush = Call::new(command::FLUSH, 0, nothing);
                self.send(policy, flush, Destination::none()).await?;
            }
        }
        Ok(())
    }

    /// A connection that lives, waited for where one can come back.
    async fn link(self: &Arc<Self>) -> Result<Link, ClientError> {
        let mut outages_before = None;
        loop {
            let mut news = self.news.subscribe();
            {
                let mut state = self.state.lock();
                if state.closed {
                    return Err(ClientError::Closed);
                }
                if let Some(verdict) = &state.verdict {
                    return Err(ClientError::Gone(Arc::clone(verdict)));
                }
                if !state.repairing && !state.links.iter().all(Link::is_alive) {
                    state.repairing = true;
                    tokio::spawn(Arc::clone(self).repair());
                }
                if let Some(link) = self.best(&state) {
                    return Ok(link);
                }
                let before = *outages_before.get_or_insert(state.outages);
                if let Some(outage) = &state.outage
                    && state.outages > before
                {
                    return Err(ClientError::Gone(Arc::clone(outage)));
                }
            }
            // The sender is our own.
            let _ = news.changed().await;
        }
    }

    /// A connection that lives; where none does, the first one, which says what of it died.
    fn pick(&self) -> Result<Link, ClientError> {
        let state = self.state.lock();
        let first = || state.links.first().cloned().ok_or(ClientError::Closed);
        self.best(&state).map_or_else(first, Ok)
    }

    /// The live connection with the most room.
    fn best(&self, state: &State) -> Option<Link> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % state.links.len().max(1);
        let (before, from) = state.links.split_at_checked(turn).unwrap_or((&[], &[]));
        let mut best: Option<(usize, &Link)> = None;
        for link in from.iter().chain(before) {
            if let Some(free) = link.connection.free_slots()
                && best.is_none_or(|(most, _)| free > most)
            {
                best = Some((free, link));
            }
        }
        best.map(|(_, link)| link.clone())
    }
}

impl ClientError {
    /// Whether the request may be sent again by another connection.
    fn is_loss(&self) -> bool {
        matches!(self, Self::Lost(_) | Self::Server { error: error::ESHUTDOWN, .. })
    }
}
