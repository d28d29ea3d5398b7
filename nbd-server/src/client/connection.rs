//! One connection in transmission: a task that writes requests, a task that reads replies, and between them the table
//! of what is in flight. What replies mean is decided in `reply`; which connection a request takes, in `device`.

mod receive;
mod send;

use std::collections::HashMap;
use std::sync::Arc;

use block::ByteRange;
use bytes::{BufMut, Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::Instant;

use super::address::Address;
use super::error::{ClientError, LostCause};
use super::handshake::{Context, Goal, Handshake, Negotiated, Outcome};
use super::memory::Destination;
use super::options::ClientOptions;
use super::reply::{Answer, Assembly, Failure, Wants};
use super::security::Security;
use super::stream::{Counters, Halves};
use crate::wire::{Headers, Request, command, command_flag, error};

/// One request as the device hands it over.
#[derive(Clone, Debug)]
pub(super) struct Call {
    /// [`crate::wire::command`].
    pub(super) command: u16,
    /// [`crate::wire::command_flag`] bits.
    pub(super) flags: u16,
    /// The bytes it is about; the length fits the header.
    pub(super) range: ByteRange,
    /// What a WRITE writes.
    pub(super) payload: Bytes,
    /// What a BLOCK_STATUS asks about, by the places of the contexts in what was negotiated.
    pub(super) contexts: Vec<usize>,
}

impl Call {
    /// A request without payload.
    pub(super) fn new(command: u16, flags: u16, range: ByteRange) -> Self {
        Self { command, flags, range, payload: Bytes::new(), contexts: Vec::new() }
    }
}

/// A request and its payload on the way to the socket.
struct Frame {
    request: Request,
    payload: Bytes,
}

/// A request whose reply has not come. It owns its memory and its place in the window, whoever still waits for it.
struct InFlight {
    assembly: Assembly,
    destination: Destination,
    answer: oneshot::Sender<Result<Answer, Failure>>,
    since: Instant,
    _slot: OwnedSemaphorePermit,
}

/// What the two tasks and the callers share.
struct Shared {
    in_flight: Mutex<Table>,
    /// Why the connection is dead; set once.
    lost: watch::Sender<Option<Arc<LostCause>>>,
    /// The headers that were negotiated.
    headers: Headers,
    /// Whether a BLOCK_STATUS may choose among the contexts.
    filters_status: bool,
}

#[derive(Default)]
struct Table {
    requests: HashMap<u64, InFlight>,
    next_cookie: u64,
}

impl Shared {
    /// Declares the connection dead. All in flight fail; later calls fail at once.
    fn die(&self, cause: LostCause) {
        let mut cause = Some(cause);
        self.lost.send_if_modified(|lost| match (&lost, cause.take()) {
            (None, Some(cause)) => {
                tracing::debug!(%cause, "an NBD connection is lost");
                *lost = Some(Arc::new(cause));
                true
            }
            _ => false,
        });
        let orphans = std::mem::take(&mut self.in_flight.lock().requests);
        // Outside the lock: each wakes its caller.
        drop(orphans);
    }

    /// The cause, once there is one.
    async fn death(&self) -> Arc<LostCause> {
        let mut lost = self.lost.subscribe();
        let seen = lost.wait_for(Option::is_some).await.ok().and_then(|cause| cause.clone());
        seen.unwrap_or_else(|| Arc::new(LostCause::Closed))
    }

    /// A request taken out while its reply is read.
    fn take(&self, cookie: u64) -> Option<InFlight> {
        self.in_flight.lock().requests.remove(&cookie)
    }

    /// A request of whose reply more will come.
    fn put_back(&self, cookie: u64, request: InFlight) {
        let mut table = self.in_flight.lock();
        if self.lost.borrow().is_none() {
            table.requests.insert(cookie, request);
        }
    }

    /// Whether a reply is owed since `instant` or longer.
    fn owes_since(&self, instant: Instant) -> bool {
        self.in_flight.lock().requests.values().any(|request| request.since <= instant)
    }
}

/// A connection in transmission. Dropped, it ends in order once everything in flight is answered.
pub(super) struct Connection {
    shared: Arc<Shared>,
    slots: Arc<Semaphore>,
    frames: Mutex<Option<mpsc::UnboundedSender<Frame>>>,
    contexts: Vec<Context>,
    ended: watch::Receiver<bool>,
}

impl Connection {
    /// Connects and negotiates.
    pub(super) async fn open(
        address: &Address,
        export: &str,
        options: &ClientOptions,
        counters: &Arc<Counters>,
    ) -> Result<(Self, Negotiated), ClientError> {
        let security = Security::of(Some(address), options)?;
        let halves = address.connect(options.connect_timeout, counters).await?;
        Self::over(halves, &address.to_string(), security, export, options).await
    }

    /// Negotiates on a socket; `address` is for errors.
    pub(super) async fn over(
        halves: Halves,
        address: &str,
        security: Option<Security>,
        export: &str,
        options: &ClientOptions,
    ) -> Result<(Self, Negotiated), ClientError> {
        let goal = Goal::Connect {
            export: export.to_owned(),
            contexts: options.meta_contexts.clone(),
            headers: options.headers,
        };
        let negotiating = negotiate(halves, goal, security);
        let outcome = tokio::time::timeout(options.handshake_timeout, negotiating).await;
        let outcome = outcome.map_err(|_| ClientError::Timeout {
            address: address.to_owned(),
            what: "negotiating",
            after: options.handshake_timeout,
        })??;
        match outcome {
            (halves, Outcome::Transmission(negotiated)) => {
                Ok((Self::start(halves, &negotiated, options), negotiated))
            }
            (_, Outcome::Listed(_) | Outcome::StartTls) => {
                Err(ClientError::NotSupported { what: "opening the export" })
            }
        }
    }

    /// Starts the two tasks on a socket whose negotiation is over.
    pub(super) fn start(halves: Halves, negotiated: &Negotiated, options: &ClientOptions) -> Self {
        let shared = Arc::new(Shared {
            in_flight: Mutex::new(Table::default()),
            lost: watch::Sender::new(None),
            headers: negotiated.export.headers,
            filters_status: negotiated.export.filters_status(),
        });
        let window = options.in_flight.clamp(1, ClientOptions::MAX_IN_FLIGHT);
        let slots = Arc::new(Semaphore::new(window));
        let (frames, queue) = mpsc::unbounded_channel();
        let (end, ended) = watch::channel(false);
        let sender = send::Sender {
            socket: halves.write,
            frames: queue,
            shared: Arc::clone(&shared),
            slots: Arc::clone(&slots),
            window,
            disconnect_timeout: options.disconnect_timeout,
        };
        tokio::spawn(sender.run());
        tokio::spawn(receive::run(halves.read, Arc::clone(&shared), options.stall_timeout, end));
        Self {
            shared,
            slots,
            frames: Mutex::new(Some(frames)),
            contexts: negotiated.contexts.clone(),
            ended,
        }
    }

    /// The free places in the window; none on a connection that is dead or takes its leave.
    pub(super) fn free_slots(&self) -> Option<usize> {
        let is_open = self.shared.lost.borrow().is_none() && self.frames.lock().is_some();
        is_open.then(|| self.slots.available_permits())
    }

    /// Why it is dead, if it is.
    pub(super) fn lost(&self) -> Option<Arc<LostCause>> {
        self.shared.lost.borrow().clone()
    }

    /// Sends a request and waits for its reply; what a READ brings goes to `destination`.
    ///
    /// A dropped future leaves the stream in order: before the request is queued nothing was sent, afterwards the
    /// reply is received all the same.
    pub(super) async fn call(
        &self,
        call: Call,
        destination: Destination,
    ) -> Result<Answer, ClientError> {
        let slot = tokio::select! {
            biased;
            cause = self.shared.death() => return Err(self.gone(cause)),
            slot = Arc::clone(&self.slots).acquire_owned() => slot.map_err(|_| ClientError::Closed)?,
        };
        let (command, range) = (call.command, call.range);
        let reply = self.submit(call, destination, slot)?;
        match reply.await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(failure)) => {
                let Failure { error, text } = failure;
                if error == error::ESHUTDOWN {
                    // The client is to leave then ("Terminating the transmission phase").
                    self.frames.lock().take();
                }
                Err(ClientError::Server { command, range, error, text })
            }
            // Whoever drops a request unanswered has a reason, and tells it.
            Err(_) => Err(ClientError::Lost(self.shared.death().await)),
        }
    }

    /// Why nothing new can be asked: the owner's wish comes before the server's.
    fn gone(&self, cause: Arc<LostCause>) -> ClientError {
        if self.frames.lock().is_none() { ClientError::Closed } else { ClientError::Lost(cause) }
    }

    fn submit(
        &self,
        call: Call,
        destination: Destination,
        slot: OwnedSemaphorePermit,
    ) -> Result<oneshot::Receiver<Result<Answer, Failure>>, ClientError> {
        let extended = self.shared.headers == Headers::Extended;
        if !extended && u32::try_from(call.range.len()).is_err() {
            return Err(ClientError::NotSupported { what: "requests of 4 GiB" });
        }
        let wants = self.wants(&call)?;
        let payload = match &wants {
            Wants::Status { contexts } if self.chooses(contexts) => filter(call.range, contexts),
            _ => call.payload,
        };
        // An extended header tells whether a payload follows, and of what length.
        let (flags, len) = match payload.is_empty() {
            false if extended => (call.flags | command_flag::PAYLOAD_LEN, payload.len() as u64),
            _ => (call.flags, call.range.len()),
        };
        let (answer, reply) = oneshot::channel();
        let frames = self.frames.lock();
        let frames = frames.as_ref().ok_or(ClientError::Closed)?;
        let mut table = self.shared.in_flight.lock();
        if let Some(cause) = self.lost() {
            return Err(ClientError::Lost(cause));
        }
        let cookie = table.next_cookie;
        table.next_cookie = cookie.wrapping_add(1);
        let request = InFlight {
            assembly: Assembly::new(call.range, wants, self.shared.headers),
            destination,
            answer,
            since: Instant::now(),
            _slot: slot,
        };
        table.requests.insert(cookie, request);
        let offset = call.range.start();
        let request = Request { flags, command: call.command, cookie, offset, len };
        // Should the writer be gone already, the connection is about to be declared dead.
        let _ = frames.send(Frame { request, payload });
        Ok(reply)
    }

    /// What the reply must bring. The contexts of a status have numbers of their own on each connection.
    fn wants(&self, call: &Call) -> Result<Wants, ClientError> {
        Ok(match call.command {
            command::READ => Wants::Data,
            command::BLOCK_STATUS => {
                let id = |place: &usize| self.contexts.get(*place).map(|context| context.id);
                let contexts: Option<Vec<u32>> = call.contexts.iter().map(id).collect();
                let unknown = ClientError::NotSupported { what: "a context that was asked about" };
                Wants::Status { contexts: contexts.ok_or(unknown)? }
            }
            _ => Wants::Success,
        })
    }

    /// Whether the server is told which contexts are meant. Where all are, it need not be.
    fn chooses(&self, contexts: &[u32]) -> bool {
        self.shared.filters_status && contexts.len() < self.contexts.len()
    }

    /// Refuses new requests, waits for those in flight, says DISC and waits for the server to hang up; gives up after
    /// the time that the options allow for it.
    pub(super) async fn disconnect(&self) {
        self.frames.lock().take();
        let mut ended = self.ended.clone();
        // Both outcomes of the wait mean that the reader is through.
        let _ = ended.wait_for(|ended| *ended).await;
    }
}

/// The payload of a BLOCK_STATUS about some of the contexts.
fn filter(range: ByteRange, contexts: &[u32]) -> Bytes {
    let mut payload = BytesMut::new();
    payload.put_u64(range.len());
    for context in contexts {
        payload.put_u32(*context);
    }
    payload.freeze()
}

/// Lists the exports of the server at `address`.
pub(super) async fn list(
    address: &Address,
    options: &ClientOptions,
) -> Result<Vec<super::ExportListing>, ClientError> {
    let security = Security::of(Some(address), options)?;
    let halves = address.connect(options.connect_timeout, &Arc::default()).await?;
    let negotiating = negotiate(halves, Goal::List, security);
    match tokio::time::timeout(options.handshake_timeout, negotiating).await {
        Ok(Ok((_, Outcome::Listed(exports)))) => Ok(exports),
        Ok(Ok((_, Outcome::Transmission(_) | Outcome::StartTls))) => {
            Err(ClientError::NotSupported { what: "listing its exports" })
        }
        Ok(Err(error)) => Err(error),
        Err(_) => Err(ClientError::Timeout {
            address: address.to_string(),
            what: "listing its exports",
            after: options.handshake_timeout,
        }),
    }
}

/// Negotiates, by TLS where `security` demands it.
async fn negotiate(
    mut halves: Halves,
    goal: Goal,
    security: Option<Security>,
) -> Result<(Halves, Outcome), ClientError> {
    let handshake = Handshake::new(goal)?;
    let Some(security) = security else {
        let (_, outcome) = haggle(&mut halves, handshake).await?;
        return Ok((halves, outcome));
    };
    let (handshake, outcome) = haggle(&mut halves, handshake.with_tls()).await?;
    match outcome {
        Outcome::StartTls => {}
        // The machine goes nowhere else, and nothing else would do.
        _ => return Err(ClientError::NotSupported { what: "TLS" }),
    }
    let mut halves = security.begin(halves).await?;
    let (_, outcome) = haggle(&mut halves, handshake.secured()?).await?;
    Ok((halves, outcome))
}

/// Moves the bytes of a negotiation.
async fn haggle(
    halves: &mut Halves,
    mut handshake: Handshake,
) -> Result<(Handshake, Outcome), ClientError> {
    use tokio::io::AsyncReadExt;

    let mut output = handshake.take_output();
    halves.send(&mut output).await.map_err(|source| ClientError::HandshakeIo { source })?;
    loop {
        let mut bytes = vec![0; handshake.wants()];
        halves.read.read_exact(&mut bytes).await.map_err(|source| match source.kind() {
            std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::ConnectionReset => {
                ClientError::HandshakeClosed { during: handshake.during() }
            }
            _ => ClientError::HandshakeIo { source },
        })?;
        let fed = handshake.feed(&bytes);
        let mut output = handshake.take_output();
        let sent = halves.send(&mut output).await;
        match fed {
            Ok(None) => sent.map_err(|source| ClientError::HandshakeIo { source })?,
            // The outcome stands, whether or not the last ABORT got through.
            Ok(Some(outcome)) => return Ok((handshake, outcome)),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests;
