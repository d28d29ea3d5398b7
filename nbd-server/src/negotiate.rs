//! Drives the handshake machine over a stream, within the time it may take, before TLS and after it. What the bytes
//! mean is told by [`crate::handshake`].

use std::io;
use std::sync::Arc;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::sleep;

use crate::clients::Client;
use crate::deadline::Deadline;
use crate::export::Attachment;
use crate::handshake::{Agreement, Close, Handshake, Progress};
use crate::hearing::Hearing;
use crate::memory::Account;
use crate::peer::Peer;
use crate::server::{Shared, Visitor};

/// A connection that enters transmission.
#[derive(Debug)]
pub(crate) struct Entered {
    pub(crate) agreement: Agreement,
    pub(crate) attachment: Attachment,
    /// Bytes that came behind the last option: requests already.
    pub(crate) input: BytesMut,
    pub(crate) account: Arc<Account>,
}

/// What comes after the negotiation.
#[derive(Debug)]
pub(crate) enum Next {
    Enter(Box<Entered>),
    /// TLS, and the negotiation again.
    StartTls,
    Close,
}

/// The negotiation with one client.
pub(crate) struct Negotiation {
    shared: Arc<Shared>,
    machine: Handshake,
    visitor: Visitor,
    /// What is to be sent first.
    greeting: BytesMut,
    account: Arc<Account>,
    /// When all of it must be over, TLS included.
    deadline: Deadline,
}

impl Negotiation {
    /// Begins now.
    pub(crate) fn new(shared: &Arc<Shared>, client: &Arc<Client>) -> Self {
        let mut greeting = BytesMut::new();
        Handshake::greet(&mut greeting);
        Self {
            machine: Handshake::new(&shared.limits).with_tls(shared.tls_mode),
            visitor: Visitor::new(shared, client),
            greeting,
            account: shared.memory.account(),
            deadline: Deadline::after(shared.limits.handshake_timeout),
            shared: Arc::clone(shared),
        }
    }

    /// Goes on after TLS has begun with a client, whose identity may be known.
    #[cfg(feature = "tls")]
    pub(crate) fn secured(self, identity: Option<Arc<crate::access::Identity>>) -> Self {
        let machine = self.machine.secured(&self.shared.limits);
        Self { machine, visitor: self.visitor.secured(identity), ..self }
    }

    /// Who the client is, as far as the kernel tells.
    #[cfg(feature = "tls")]
    pub(crate) fn peer(&self) -> &Peer {
        self.visitor.peer()
    }

    /// Tells who asks and who reads the log what the client's certificate says.
    #[cfg(feature = "tls")]
    pub(crate) fn named(&self, certificate: &str) {
        // There is one TLS on a connection.
        let _ = self.visitor.client().certificate.set(certificate.to_owned());
        tracing::Span::current().record("certificate", certificate);
    }

    /// Negotiates up to the end, or up to TLS.
    pub(crate) async fn run<R, W>(&mut self, reader: &mut R, writer: &mut W) -> io::Result<Next>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let (shared, peer) = (Arc::clone(&self.shared), self.visitor.peer().clone());
        let deadline = self.deadline;
        let haggling = self.haggle(reader, writer);
        let next = within(&shared, &peer, deadline, haggling).await.unwrap_or(Ok(Next::Close));
        self.visitor.leave().await;
        next
    }

    /// The outcome of something that is part of the negotiation; `None` where its time is over.
    #[cfg(feature = "tls")]
    pub(crate) async fn within<T>(&self, part: impl Future<Output = T>) -> Option<T> {
        within(&self.shared, self.peer(), self.deadline, part).await
    }

    async fn haggle<R, W>(&mut self, reader: &mut R, writer: &mut W) -> io::Result<Next>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut hearing = Hearing::new(Arc::clone(&self.account));
        let mut out = self.greeting.split();
        loop {
            let progress = self.machine.step(hearing.bytes(), &mut self.visitor, &mut out);
            if !out.is_empty() {
                writer.write_all_buf(&mut out).await?;
                writer.flush().await?;
            }
            match progress {
                Progress::Again => {}
                Progress::Wait => self.visitor.wait().await,
                Progress::Need(more) => hearing.fill(reader, more).await?,
                Progress::StartTls => return Ok(Next::StartTls),
                Progress::Transmission(agreement) => {
                    let (agreement, input) = (*agreement, hearing.into_rest());
                    let account = Arc::clone(&self.account);
                    let entered = self.visitor.begin().map(|attachment| {
                        Next::Enter(Box::new(Entered { agreement, attachment, input, account }))
                    });
                    return Ok(entered.unwrap_or(Next::Close));
                }
                Progress::Close(Close::Aborted) => return Ok(Next::Close),
                Progress::Close(why) => {
                    tracing::info!(peer = %self.visitor.peer(), %why, "closing a connection in the handshake");
                    return Ok(Next::Close);
                }
            }
        }
    }
}

/// Bounds `part` by the deadline, and by the time that a stopping server allows.
async fn within<T>(
    shared: &Shared,
    peer: &Peer,
    deadline: Deadline,
    part: impl Future<Output = T>,
) -> Option<T> {
    let stopped = async {
        shared.stopping.raised().await;
        let _ = shared.unless_dropped(sleep(shared.limits.close_timeout)).await;
    };
    tokio::select! {
        done = deadline.within(part) => {
            if done.is_none() {
                tracing::info!(%peer, limit_secs = shared.limits.handshake_timeout.as_secs_f64(), "a handshake took too long");
            }
            done
        }
        () = stopped => None,
    }
}
