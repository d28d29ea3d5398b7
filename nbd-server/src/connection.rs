//! A connection in transmission: one side reads requests and hands each to the device as a task of its own, the other
//! writes replies as they come, and a budget keeps what lies between them bounded.
//!
//! Every request holds a [`Ticket`] from before its payload is read until its reply is on the wire. A client that
//! sends more than it reads runs out of tickets, and only its own reading stops.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use block::{ByteRange, Durability, Extent};
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::join_all;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tracing::Instrument;

use crate::counters::{InFlight, RequestKind, Tally};
use crate::execute::{broken, execute};
use crate::export::Attachment;
use crate::gauge::Gauge;
use crate::handshake::{Agreement, SelectedContext};
use crate::intake::Intake;
use crate::memory::{Account, RESERVE_BYTES, Share};
use crate::negotiate::Entered;
use crate::outlet::{Content, Outgoing, write_replies};
use crate::pace::Pace;
use crate::parts::LongRead;
use crate::reply::{Answer, Asked};
use crate::request::{Command, Refusal, Verdict, judge, judge_filter, payload_bytes};
use crate::server::Shared;
use crate::wire::{Headers, Request};

/// How long a client of a connection that closes may send nothing, with everything answered, before it counts as done:
/// longer than what is on its way takes on most networks.
const QUIET: Duration = Duration::from_millis(250);

/// Why no more requests are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The client sent DISC.
    Disconnected,
    /// The client closed or broke its end.
    Gone,
    /// The client sent something that is no request, or a request behind which no other can be found.
    NoRequest,
    /// The client began a payload and did not get on with it, or did not read its replies while others waited for the
    /// memory that they hold.
    Stalled,
    /// The client had nothing in flight for too long.
    Idle,
    /// The export is leaving, what was asked is done, and the client asks no more, or never stops to.
    Closed,
}

/// A request's share of the connection's budget; given back when dropped.
#[derive(Debug)]
pub(crate) struct Ticket {
    _request: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
    _share: Option<Share>,
    _in_flight: InFlight,
}

impl Ticket {
    /// The same, with the memory that the reply holds.
    fn with(self, share: Option<Share>) -> Self {
        Self { _share: share, ..self }
    }
}

/// What bounds the requests between reading and replying.
struct Budget {
    requests: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    max_requests: u32,
    max_bytes: u32,
}

impl Budget {
    fn new(max_requests: u32, max_bytes: u32) -> Self {
        let semaphore = |permits: u32| {
            let permits = usize::try_from(permits).unwrap_or(Semaphore::MAX_PERMITS);
            Arc::new(Semaphore::new(permits.min(Semaphore::MAX_PERMITS)))
        };
        let (requests, bytes) = (semaphore(max_requests), semaphore(max_bytes));
        Self { requests, bytes, max_requests, max_bytes }
    }

    /// Waits until nothing is in flight, and then for as long as `limit` says. Only while nothing is admitted.
    async fn idle(&self, limit: Option<Duration>) {
        match limit {
            Some(limit) => {
                // An error would mean that somebody closed it.
                drop(self.requests.acquire_many(self.max_requests).await);
                sleep(limit).await;
            }
            None => std::future::pending().await,
        }
    }

    /// Waits for room. A request that alone is over the budget takes all of it. `None` never happens: nobody closes
    /// the semaphores.
    async fn admit(&self, bytes: u32, in_flight: impl FnOnce() -> InFlight) -> Option<Ticket> {
        let request = Arc::clone(&self.requests).acquire_owned().await.ok()?;
        let bytes = bytes.min(self.max_bytes);
        let bytes = Arc::clone(&self.bytes).acquire_many_owned(bytes).await.ok()?;
        Some(Ticket { _request: request, _bytes: bytes, _share: None, _in_flight: in_flight() })
    }
}

/// What the requests of one connection share.
pub(crate) struct Session {
    shared: Arc<Shared>,
    agreement: Agreement,
    attachment: Attachment,
    budget: Budget,
    pub(crate) account: Arc<Account>,
    /// Requests that the device has not finished, or whose answer is not handed on.
    executing: Arc<Gauge>,
    pace: Pace,
    /// Whether a request was refused because the connection is to close: whoever leaves then is not done.
    cut_short: AtomicBool,
}

/// Ends a task with its owner.
struct Abort<T>(JoinHandle<T>);

impl<T> Drop for Abort<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// How the transmission with a client ended.
pub(crate) struct Ended<R, W> {
    /// Whether the client said that it leaves, and everything was done that it had asked for: not where it leaves because
    /// it was told that the server stops.
    pub(crate) by_word: bool,
    /// What is left to do, where the client could see it.
    pub(crate) farewell: Option<Farewell<R, W>>,
}

/// The end of a connection that its client does not see yet.
pub(crate) struct Farewell<R, W> {
    reader: R,
    writer: W,
    /// Whether the client may still send something.
    lingers: bool,
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Farewell<R, W> {
    /// Closes the connection.
    pub(crate) async fn say(mut self, at_most: Duration) {
        if self.lingers {
            linger(&mut self.reader, &mut self.writer, at_most).await;
        } else {
            // TLS has an end of its own, by which the client knows that nothing was cut off.
            let _: Result<io::Result<()>, _> = timeout(at_most, self.writer.shutdown()).await;
        }
    }
}

/// Serves requests until the client leaves, or the export does.
pub(crate) async fn transmit<R, W>(
    shared: &Arc<Shared>,
    entered: Entered,
    reader: R,
    writer: W,
) -> Ended<R, W>
where
    R: AsyncRead + Send + Unpin,
    W: AsyncWrite + Send + Unpin + 'static,
{
    let Entered { agreement, attachment, input, account } = entered;
    let limits = &shared.limits;
    let headers = agreement.headers;
    let session = Arc::new(Session {
        shared: Arc::clone(shared),
        account: Arc::clone(&account),
        agreement,
        attachment,
        budget: Budget::new(limits.in_flight_requests, limits.in_flight_bytes),
        executing: Arc::default(),
        pace: Pace::default(),
        cut_short: AtomicBool::new(false),
    });
    // As many places as tickets: handing a reply on never waits.
    let places = usize::try_from(limits.in_flight_requests).unwrap_or(1);
    let (replies, outgoing) = mpsc::channel(places.min(Semaphore::MAX_PERMITS));
    let replying = write_replies(writer, outgoing, headers, Arc::clone(&account));
    let mut writing = Abort(tokio::spawn(replying.in_current_span()));
    let mut intake = Intake::new(reader, input, Arc::clone(&shared.arriving), Arc::clone(&account));
    let end = tokio::select! {
        end = take_requests(&session, &mut intake, &replies) => end,
        () = session.quiet() => End::Closed,
        () = replies.closed() => End::Gone,
        () = account.evicted.raised() => {
            tracing::warn!("a client does not read its replies while others wait for their memory");
            End::Stalled
        }
    };
    tracing::debug!(?end, export = session.agreement.facts.name, "no more requests");
    drop(replies);
    let finish = async {
        session.executing.idle().await;
        (&mut writing.0).await
    };
    let overdue = async {
        if end != End::Stalled {
            tokio::select! {
                () = session.finished() => {}
                () = account.evicted.raised() => {}
            }
        }
        sleep(limits.close_timeout).await;
    };
    let writer = tokio::select! {
        written = finish => written,
        () = overdue => return Ended { by_word: false, farewell: None },
    };
    let is_bye = end == End::Disconnected;
    let listens = is_bye || matches!(end, End::Closed | End::NoRequest | End::Idle);
    let writer = writer.ok().and_then(Result::ok).filter(|_| listens);
    let reader = intake.into_inner();
    let farewell = writer.map(|writer| Farewell { reader, writer, lingers: !is_bye });
    Ended { by_word: is_bye && !session.cut_short.load(Ordering::Relaxed), farewell }
}

/// Says that no more will be sent, then reads what the client still sends, for a while: closing a TCP socket with
/// unread input would take the last replies away from the client.
pub(crate) async fn linger<R, W>(reader: &mut R, writer: &mut W, at_most: Duration)
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let draining = async {
        writer.shutdown().await?;
        tokio::io::copy(reader, &mut tokio::io::sink()).await
    };
    // Whatever goes wrong here, the connection is closed next.
    let _: Result<io::Result<u64>, _> = timeout(at_most, draining).await;
}

/// Reads and starts requests until there is a reason to end.
async fn take_requests<R: AsyncRead + Unpin>(
    session: &Arc<Session>,
    intake: &mut Intake<R>,
    replies: &mpsc::Sender<Outgoing>,
) -> End {
    loop {
        let idle = session.attachment.export.idle_timeout;
        let next = tokio::select! {
            next = session.pace.wait(next_request(intake, session.agreement.headers)) => next,
            () = session.budget.idle(idle) => {
                tracing::info!(export = session.agreement.facts.name, limit_secs = idle.map(|idle| idle.as_secs_f64()), "a client was idle for too long");
                return End::Idle;
            }
        };
        let Ok(Some(request)) = next else { return End::Gone };
        let Some(request) = request else {
            tracing::info!("a request does not begin with its magic number");
            return End::NoRequest;
        };
        let taken = match judge(&request, &session.agreement) {
            Verdict::Disconnect => return End::Disconnected,
            Verdict::Refuse(refusal) => refuse(session, intake, replies, &request, refusal).await,
            Verdict::Abandon(refusal) => {
                tracing::info!(%refusal, "a request behind which no other can be found");
                // An error means that the client is gone.
                let _ = decline(session, replies, &request, refusal).await;
                return End::NoRequest;
            }
            // Without the memory that doing it would take.
            Verdict::Execute(_) | Verdict::Filter { .. } if session.is_closing() => {
                refuse(session, intake, replies, &request, Refusal::ShuttingDown).await
            }
            Verdict::Filter { payload_bytes } => {
                filter(session, intake, replies, &request, payload_bytes).await
            }
            Verdict::Execute(command) => {
                start(session, intake, replies, &request, command, None).await
            }
        };
        match taken {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                let (export, timeout) =
                    (&session.agreement.facts.name, session.shared.limits.payload_timeout);
                tracing::warn!(
                    export,
                    ?timeout,
                    "a payload made no progress: its connection is dropped"
                );
                return End::Stalled;
            }
            Err(_) => return End::Gone,
        }
    }
}

/// Reads a request header of the kind that was negotiated; `None` inside where it is none, outside where nothing comes.
async fn next_request<R: AsyncRead + Unpin>(
    intake: &mut Intake<R>,
    headers: Headers,
) -> io::Result<Option<Option<Request>>> {
    Ok(match headers {
        Headers::Simple | Headers::Structured => {
            intake.header().await?.map(|header| Request::decode(&header))
        }
        Headers::Extended => intake.header().await?.map(|header| Request::decode_extended(&header)),
    })
}

/// Answers a request without reading on.
async fn decline(
    session: &Session,
    replies: &mpsc::Sender<Outgoing>,
    request: &Request,
    refusal: Refusal,
) -> io::Result<()> {
    let ticket = session.admit(0).await?;
    session.answer_refusal(replies, request, refusal, ticket).await
}

/// Reads the payload of a BLOCK_STATUS, which says what it asks, and starts or refuses it.
async fn filter<R: AsyncRead + Unpin>(
    session: &Arc<Session>,
    intake: &mut Intake<R>,
    replies: &mpsc::Sender<Outgoing>,
    request: &Request,
    payload_bytes: u32,
) -> io::Result<()> {
    let payload = intake.question(payload_bytes).await?;
    match judge_filter(request, &payload, &session.agreement) {
        Ok((command, contexts)) => {
            start(session, intake, replies, request, command, Some(contexts)).await
        }
        Err(refusal) => decline(session, replies, request, refusal).await,
    }
}

/// Consumes the payload of a refused request, and answers it.
async fn refuse<R: AsyncRead + Unpin>(
    session: &Session,
    intake: &mut Intake<R>,
    replies: &mpsc::Sender<Outgoing>,
    request: &Request,
    refusal: Refusal,
) -> io::Result<()> {
    let ticket = session.admit(0).await?;
    intake.discard(payload_bytes(request, session.agreement.headers)).await?;
    session.answer_refusal(replies, request, refusal, ticket).await
}

/// Reads the payload of a WRITE and lets the device work on the request, without waiting for it. A BLOCK_STATUS tells
/// of `contexts`, or of all that were selected.
async fn start<R: AsyncRead + Unpin>(
    session: &Arc<Session>,
    intake: &mut Intake<R>,
    replies: &mpsc::Sender<Outgoing>,
    request: &Request,
    command: Command,
    contexts: Option<Vec<SelectedContext>>,
) -> io::Result<()> {
    let told = contexts.as_ref().unwrap_or(&session.agreement.contexts).len();
    let mut extents = session.shared.limits.status_extents;
    let cost = cost(command, told, extents);
    let ticket = session.admit(cost).await?;
    let at_once = match command {
        Command::Write { .. } => None,
        _ if cost == 0 => None,
        _ => session.account.take(cost.into()).now_or_never(),
    };
    let (payload, share) = match command {
        Command::Write { range, durability } => {
            let len = u32::try_from(range.len()).unwrap_or(u32::MAX);
            let first = intake.piece(range.start(), len).await?;
            if (first.0.len() as u64) < range.len() {
                let write = LongWrite { request: *request, range, durability, ticket };
                return write_in_pieces(session, intake, replies, write, first).await;
            }
            first
        }
        _ if cost == 0 || at_once.is_some() => (Bytes::new(), at_once),
        Command::Read { range, whole } if cost > RESERVE_BYTES => {
            let read = LongRead { request: *request, range, whole, ticket };
            return read_in_parts(session, replies, read).await;
        }
        _ => {
            // The client asks again for extents that are left out.
            extents = extents.min(few_extents(told));
            let piece = session.account.take_piece(cost.min(RESERVE_BYTES).into()).await;
            (Bytes::new(), Some(piece))
        }
    };
    // From here to the hold nothing waits, so that a closing connection cannot miss this request.
    if session.is_closing() {
        let refusal = Refusal::ShuttingDown;
        return session.answer_refusal(replies, request, refusal, ticket).await;
    }
    let executing = session.executing.hold();
    let (session, replies, request) = (Arc::clone(session), replies.clone(), *request);
    let work = async move {
        let begun = Instant::now();
        let contexts = contexts.as_ref().unwrap_or(&session.agreement.contexts);
        let answer = session.work(command, payload, contexts, extents).await;
        session.count(&request, command, &answer, begun);
        // What was written needs no memory any more, what was read does.
        let share = share.filter(|_| !matches!(command, Command::Write { .. }));
        let ticket = ticket.with(share);
        // An error means that the client is gone; the work is done all the same.
        let content = Content::Answer(answer);
        let _ = replies.send(Outgoing { asked: Asked::from(&request), content, ticket }).await;
        // The connection holds its export no longer than it is busy.
        drop((session, executing));
    };
    tokio::spawn(work.in_current_span());
    Ok(())
}

/// Starts a READ for which there is no memory now.
async fn read_in_parts(
    session: &Arc<Session>,
    replies: &mpsc::Sender<Outgoing>,
    read: LongRead,
) -> io::Result<()> {
    // As in `start`: from here to the hold nothing waits.
    if session.is_closing() {
        let (refusal, request) = (Refusal::ShuttingDown, read.request);
        return session.answer_refusal(replies, &request, refusal, read.ticket).await;
    }
    let executing = session.executing.hold();
    let (session, replies) = (Arc::clone(session), replies.clone());
    let work = async move {
        read.work(&session, &replies).await;
        drop((session, executing));
    };
    tokio::spawn(work.in_current_span());
    Ok(())
}

/// A WRITE whose payload is taken in pieces.
struct LongWrite {
    request: Request,
    range: ByteRange,
    durability: Durability,
    ticket: Ticket,
}

/// Hands the pieces of a payload to the device as they become complete, from the `first` on, and lets the last of them
/// answer the request. What a client that leaves half way has sent by then is written.
async fn write_in_pieces<R: AsyncRead + Unpin>(
    session: &Arc<Session>,
    intake: &mut Intake<R>,
    replies: &mpsc::Sender<Outgoing>,
    write: LongWrite,
    first: (Bytes, Option<Share>),
) -> io::Result<()> {
    let LongWrite { request, range, durability, ticket } = write;
    let begun = Instant::now();
    let (mut at, (mut payload, mut share), mut pieces) = (range.start(), first, Vec::new());
    loop {
        let piece = ByteRange::between(at, at + payload.len() as u64);
        let left = u32::try_from(range.end() - piece.end()).unwrap_or(u32::MAX);
        // As in `start`: from here to the hold, and from the last piece to the answer, nothing waits.
        if session.is_closing() {
            intake.discard(left.into()).await?;
            return session.answer_refusal(replies, &request, Refusal::ShuttingDown, ticket).await;
        }
        let (executing, worker) = (session.executing.hold(), Arc::clone(session));
        let work = async move {
            let command = Command::Write { range: piece, durability: Durability::Deferred };
            let answer = worker.work(command, payload, &[], 0).await;
            drop((share, worker, executing));
            answer
        };
        pieces.push(tokio::spawn(work.in_current_span()));
        if left == 0 {
            break;
        }
        at = piece.end();
        (payload, share) = intake.piece(at, left).await?;
    }
    let executing = session.executing.hold();
    let (session, replies) = (Arc::clone(session), replies.clone());
    let work = async move {
        let done = join_all(pieces).await.into_iter();
        let mut answers =
            done.map(|done| done.unwrap_or_else(|_| broken("the write was given up")));
        let mut answer = answers.find(|answer| *answer != Answer::Done).unwrap_or(Answer::Done);
        if answer == Answer::Done && durability == Durability::Durable {
            answer = session.work(Command::Flush, Bytes::new(), &[], 0).await;
        }
        session.count(&request, Command::Write { range, durability }, &answer, begun);
        let content = Content::Answer(answer);
        let _ = replies.send(Outgoing { asked: Asked::from(&request), content, ticket }).await;
        drop((session, executing));
    };
    tokio::spawn(work.in_current_span());
    Ok(())
}

/// As many extents of each context as fit into the reserve of the connection.
fn few_extents(contexts: usize) -> usize {
    let all = usize::try_from(RESERVE_BYTES).unwrap_or(usize::MAX) / size_of::<Extent>();
    (all / contexts.max(1)).max(1)
}

/// The bytes that a request can hold in memory.
fn cost(command: Command, contexts: usize, status_extents: usize) -> u32 {
    let bytes = match command {
        Command::Read { range, .. } | Command::Write { range, .. } => range.len(),
        Command::BlockStatus { one: false, .. } => {
            let extents = status_extents.saturating_mul(contexts);
            extents.saturating_mul(size_of::<Extent>()) as u64
        }
        _ => 0,
    };
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

impl Session {
    /// Whether the export is being cut off, or the server stops; the export of a connection that drains is not among
    /// those that the server still knows.
    fn is_closing(&self) -> bool {
        self.attachment.export.closing.is_raised() || self.shared.stopping.is_raised()
    }

    /// Waits until the connection is to close and the device has finished everything.
    async fn finished(&self) {
        tokio::select! {
            () = self.attachment.export.closing.raised() => {}
            () = self.shared.stopping.raised() => {}
        }
        self.executing.idle().await;
    }

    /// Waits, further, until the client asks for nothing any more: what it had sent before it could know is answered, too.
    /// One that goes on asking is not listened to for ever.
    async fn quiet(&self) {
        self.finished().await;
        // An error means that it goes on.
        let _ = timeout(self.shared.limits.close_timeout, self.pace.rests(QUIET)).await;
    }

    async fn admit(&self, bytes: u32) -> io::Result<Ticket> {
        // One that waits to be let in is not in flight.
        let in_flight = || InFlight::new(self.tallies().map(Arc::clone));
        self.budget.admit(bytes, in_flight).await.ok_or_else(|| io::ErrorKind::BrokenPipe.into())
    }

    /// Those of the export and of the connection.
    fn tallies(&self) -> [&Arc<Tally>; 2] {
        [&self.attachment.export.tally, &self.attachment.client.tally]
    }

    async fn answer_refusal(
        &self,
        replies: &mpsc::Sender<Outgoing>,
        request: &Request,
        refusal: Refusal,
        ticket: Ticket,
    ) -> io::Result<()> {
        if refusal == Refusal::ShuttingDown {
            self.cut_short.store(true, Ordering::Relaxed);
        }
        let answer = Answer::Failed { error: refusal.error(), text: refusal.to_string() };
        for tally in self.tallies() {
            tally.answered(RequestKind::of(request.command), &answer);
        }
        let asked = Asked::from(request);
        let content = Content::Answer(answer);
        let sent = replies.send(Outgoing { asked, content, ticket }).await;
        sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    /// Executes a command, which tells at most `extents` of each context. A device that panics fails this one request.
    pub(crate) async fn work(
        &self,
        command: Command,
        payload: Bytes,
        contexts: &[SelectedContext],
        extents: usize,
    ) -> Answer {
        let work = execute(&self.attachment, command, payload, contexts, extents);
        let done = std::panic::AssertUnwindSafe(work).catch_unwind().await;
        done.unwrap_or_else(|_| broken("the device broke down"))
    }

    /// Counts a request that was worked on from `begun` on.
    pub(crate) fn count(
        &self,
        request: &Request,
        command: Command,
        answer: &Answer,
        begun: Instant,
    ) {
        for tally in self.tallies() {
            tally.worked(RequestKind::of(request.command), command, answer, begun);
        }
    }
}
