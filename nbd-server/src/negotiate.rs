//! Drives the handshake machine over a stream, within the time it may take. What the bytes mean is told by
//! [`crate::handshake`].

use std::io;
use std::sync::Arc;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{sleep, timeout};

use crate::export::Attachment;
use crate::handshake::{Agreement, Close, Handshake, Progress};
use crate::peer::Peer;
use crate::server::{Shared, Visitor};

/// Room for input beyond what the machine asks for: an option is small.
const INPUT_BYTES: usize = 4096;

/// A connection that enters transmission.
#[derive(Debug)]
pub(crate) struct Entered {
    pub(crate) agreement: Agreement,
    pub(crate) attachment: Attachment,
    /// Bytes that came behind the last option: requests already.
    pub(crate) input: BytesMut,
}

/// Negotiates; `None` where the connection is to be closed.
pub(crate) async fn negotiate<R, W>(
    shared: &Arc<Shared>,
    peer: &Peer,
    reader: &mut R,
    writer: &mut W,
) -> io::Result<Option<Entered>>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let stopped = async {
        shared.stopping.raised().await;
        sleep(shared.limits.close_timeout).await;
    };
    let haggling = timeout(shared.limits.handshake_timeout, haggle(shared, peer, reader, writer));
    tokio::select! {
        done = haggling => done.unwrap_or_else(|_| {
            tracing::info!(%peer, limit = ?shared.limits.handshake_timeout, "a handshake took too long");
            Ok(None)
        }),
        () = stopped => Ok(None),
    }
}

async fn haggle<R, W>(
    shared: &Arc<Shared>,
    peer: &Peer,
    reader: &mut R,
    writer: &mut W,
) -> io::Result<Option<Entered>>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut machine = Handshake::new(&shared.limits);
    let mut visitor = Visitor::new(shared, peer);
    let (mut input, mut out) = (BytesMut::new(), BytesMut::new());
    Handshake::greet(&mut out);
    loop {
        let progress = machine.step(&mut input, &mut visitor, &mut out);
        if !out.is_empty() {
            writer.write_all_buf(&mut out).await?;
            writer.flush().await?;
        }
        match progress {
            Progress::Again => {}
            Progress::Need(more) => {
                let wanted = input.len() + more;
                while input.len() < wanted {
                    input.reserve((wanted - input.len()).max(INPUT_BYTES));
                    if reader.read_buf(&mut input).await? == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
            }
            Progress::Transmission(agreement) => {
                let entered = visitor.entered.take();
                return Ok(entered.map(|attachment| Entered {
                    agreement: *agreement,
                    attachment,
                    input,
                }));
            }
            Progress::Close(Close::Aborted) => return Ok(None),
            Progress::Close(why) => {
                tracing::info!(%peer, %why, "closing a connection in the handshake");
                return Ok(None);
            }
        }
    }
}
