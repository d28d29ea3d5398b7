//! The task that replaces broken connections: it connects with growing pauses, makes sure that the export is the same,
//! and that a server which began anew holds what the old one had answered, before anybody else speaks to it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::ByteRange;
use futures_util::future::join_all;
use tokio::time::Instant;

use super::{Link, Links};
use crate::client::connection::{Call, Connection};
use crate::client::error::{ClientError, LostCause};
use crate::client::journal::Change;
use crate::client::memory::Destination;
use crate::wire::command;

impl Links {
    /// Works until all connections are there again or patience is over.
    pub(super) async fn repair(self: Arc<Self>) {
        let restored = tokio::select! {
            biased;
            () = self.closing() => Ok(()),
            restored = self.restore() => restored,
        };
        let mut state = self.state.lock();
        state.repairing = false;
        match restored {
            Ok(()) => {}
            Err(error) if error.is_final() => {
                tracing::error!(%error, "an NBD export cannot be used any more");
                state.verdict = Some(Arc::new(error));
            }
            Err(error) => {
                state.outages += 1;
                state.outage = Some(Arc::new(error));
            }
        }
        drop(state);
        self.news.send_replace(());
    }

    async fn closing(&self) {
        loop {
            let mut news = self.news.subscribe();
            if self.state.lock().closed {
                return;
            }
            let _ = news.changed().await;
        }
    }

    async fn restore(&self) -> Result<(), ClientError> {
        let Some((policy, _)) = self.policy() else { return Ok(()) };
        // A patience beyond what the clock can tell has no end.
        let over = Instant::now().checked_add(policy.patience);
        let mut last = None;
        loop {
            let pause = policy.delay(self.failures.fetch_add(1, Ordering::Relaxed));
            let next = Instant::now().checked_add(pause);
            if over.is_some_and(|over| next.is_none_or(|next| next > over)) {
                let lost = self.lost().pop().unwrap_or_else(|| Arc::new(LostCause::Closed));
                return match self.survivor() {
                    // The others do without it; the next request begins anew.
                    Some(_) => Ok(()),
                    None => Err(last.unwrap_or(ClientError::Lost(lost))),
                };
            }
            tokio::time::sleep(pause).await;
            match self.replace_broken().await {
                Ok(()) => return Ok(()),
                Err(error) if error.is_final() => return Err(error),
                Err(error) => {
                    tracing::debug!(%error, "an NBD connection is not back yet");
                    last = Some(error);
                }
            }
        }
    }

    /// Replaces what is broken, one after another, until nothing is.
    async fn replace_broken(&self) -> Result<(), ClientError> {
        let Some((_, target)) = self.policy() else { return Ok(()) };
        loop {
            let broken = self.state.lock().links.iter().position(|link| !link.is_alive());
            let Some(index) = broken else { return Ok(()) };
            let opening =
                Connection::open(&target.address, &target.export, &self.options, &self.counters);
            let (connection, negotiated) = opening.await?;
            if let Some(what) = self.export.difference(&negotiated.export) {
                return Err(ClientError::Changed { what });
            }
            self.admit(index, connection).await?;
        }
    }

    /// Puts a new connection in the place of a broken one, as soon as nobody can miss there what was answered before.
    async fn admit(&self, index: usize, connection: Connection) -> Result<(), ClientError> {
        let connection = Arc::new(connection);
        loop {
            let Some(survivor) = self.survivor() else {
                let (life, changes) = self.journal.lock().begin_life();
                self.make_again(&connection, changes).await?;
                self.put(index, Link { connection, life });
                return Ok(());
            };
            let is_at_stake = self.journal.lock().bytes() > 0;
            if !is_at_stake || self.answers(&survivor.connection).await? {
                self.put(index, Link { connection, life: survivor.life });
                return Ok(());
            }
        }
    }

    /// A connection from before, as far as we know.
    fn survivor(&self) -> Option<Link> {
        self.state.lock().links.iter().find(|link| link.is_alive()).cloned()
    }

    /// Whether the server at the other end lives: what answers now has not died before the new connection began. A
    /// connection can look alive long after its server is gone.
    async fn answers(&self, survivor: &Connection) -> Result<bool, ClientError> {
        let least = u64::from(self.export.block_sizes.minimum).min(self.export.size_bytes);
        let call = Call::new(command::READ, 0, ByteRange::between(0, least));
        let memory = self.memory_for(&call);
        let limit = self.options.handshake_timeout;
        match tokio::time::timeout(limit, survivor.call(call, memory)).await {
            Ok(Err(error)) if error.is_loss() || matches!(error, ClientError::Closed) => Ok(false),
            Ok(_) => Ok(true),
            Err(_) => Err(ClientError::Lost(Arc::new(LostCause::Stalled(limit)))),
        }
    }

    /// Makes changes again, in order where they overlap.
    async fn make_again(
        &self,
        connection: &Connection,
        changes: Vec<Change>,
    ) -> Result<(), ClientError> {
        if !changes.is_empty() {
            tracing::info!(changes = changes.len(), "unflushed changes are sent again");
        }
        let mut rest = changes.into_iter().peekable();
        while rest.peek().is_some() {
            let mut batch: Vec<Change> = Vec::new();
            while let Some(next) = rest.next_if(|next| {
                batch.len() < self.options.in_flight.max(1)
                    && batch.iter().all(|one| one.range.intersection(next.range).is_empty())
            }) {
                batch.push(next);
            }
            let made = batch.into_iter().map(|change| async move {
                let Change { command, flags, range, payload } = change;
                let call = Call { payload, ..Call::new(command, flags, range) };
                let made = connection.call(call, Destination::none()).await;
                made.map_err(|error| match error {
                    error if error.is_loss() || matches!(error, ClientError::Closed) => error,
                    error => ClientError::NotRestored { range, source: Box::new(error) },
                })
            });
            for made in join_all(made).await {
                made?;
            }
        }
        Ok(())
    }

    fn put(&self, index: usize, link: Link) {
        if let Some(place) = self.state.lock().links.get_mut(index) {
            *place = link;
        }
        self.news.send_replace(());
    }
}

impl ClientError {
    /// Whether trying again is of no use.
    fn is_final(&self) -> bool {
        matches!(self, Self::Changed { .. } | Self::NotRestored { .. })
    }
}
