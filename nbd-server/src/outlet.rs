//! Writing replies to a stream, many in one system call. Their order is the order in which they are handed over.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::Arc;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::connection::Ticket;
use crate::memory::Account;
use crate::parts::Parts;
use crate::reply::{self, Answer, Asked, Encoder};
use crate::wire::Headers;

/// Replies that are encoded together.
const BATCH: usize = 64;

/// Buffers in one vectored write.
const SLICES: usize = 64;

/// A reply on its way; the ticket goes back to the connection's budget when it is written.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) asked: Asked,
    pub(crate) content: Content,
    pub(crate) ticket: Ticket,
}

/// What is replied.
#[derive(Debug)]
pub(crate) enum Content {
    Answer(Answer),
    /// What is read while it is written.
    Parts(Parts),
}

/// Writes replies until every sender is gone, and gives the stream back. A client that has hung up hears no more of them,
/// but what it asked for before is on its way to us and done all the same: so nobody is told before there is no more.
pub(crate) async fn write_replies<W: AsyncWrite + Unpin>(
    writer: W,
    mut replies: mpsc::Receiver<Outgoing>,
    headers: Headers,
    account: Arc<Account>,
) -> io::Result<W> {
    let mut outlet = Outlet { writer, encoder: Encoder::new(headers), account };
    let mut batch = Vec::with_capacity(BATCH);
    let mut tickets = Vec::with_capacity(BATCH);
    while replies.recv_many(&mut batch, BATCH).await > 0 {
        let written = outlet.write_batch(&mut batch, &mut tickets).await;
        tickets.clear();
        if let Err(stop) = written {
            if matches!(stop, Stop::HalfWay) {
                // The client is there, but has to go: nothing more is read from it.
                replies.close();
            }
            while replies.recv_many(&mut batch, BATCH).await > 0 {
                batch.clear();
            }
            return Err(stop.into());
        }
    }
    outlet.writer.flush().await?;
    Ok(outlet.writer)
}

/// Why no more replies are written.
enum Stop {
    Stream(io::Error),
    /// A read failed, or was given up, when a part of it was sent already.
    HalfWay,
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Stream(error)
    }
}

impl From<Stop> for io::Error {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Stream(error) => error,
            Stop::HalfWay => Self::other("a read failed half way"),
        }
    }
}

/// The writing side of a connection.
struct Outlet<W> {
    writer: W,
    encoder: Encoder,
    account: Arc<Account>,
}

impl<W: AsyncWrite + Unpin> Outlet<W> {
    /// Writes replies together, as far as they are there.
    async fn write_batch(
        &mut self,
        batch: &mut Vec<Outgoing>,
        tickets: &mut Vec<Ticket>,
    ) -> Result<(), Stop> {
        for Outgoing { asked, content, ticket } in batch.drain(..) {
            tickets.push(ticket);
            match content {
                Content::Answer(answer) => self.encoder.push(asked, answer),
                Content::Parts(parts) => {
                    self.write_parts(asked, parts).await?;
                    tickets.clear();
                }
            }
        }
        Ok(self.send().await?)
    }

    /// Writes a reply as its parts come, behind what is encoded already.
    async fn write_parts(&mut self, asked: Asked, mut parts: Parts) -> Result<(), Stop> {
        let Parts { read, whole, .. } = parts;
        let mut offset = read.start();
        self.send().await?;
        while offset < read.end() {
            let Some(part) = parts.coming.recv().await else {
                return Err(Stop::HalfWay);
            };
            match part.content {
                Ok(segments) => {
                    let end = offset.saturating_add(segments.len());
                    self.encoder.push_part(asked, reply::Part { read, whole, offset, segments });
                    offset = end;
                }
                Err(failed) if offset == read.start() || self.encoder.can_fail_later(whole) => {
                    self.encoder.push(asked, failed);
                    offset = read.end();
                }
                Err(failed) => {
                    tracing::warn!(%read, offset, ?failed, "a read failed when a part of it was sent");
                    return Err(Stop::HalfWay);
                }
            }
            self.send().await?;
        }
        Ok(())
    }

    async fn send(&mut self) -> io::Result<()> {
        let mut queue = self.encoder.take();
        write_all(&mut self.writer, &mut queue, &self.account).await?;
        self.encoder.reuse(queue);
        Ok(())
    }
}

/// Writes all of `queue`, letting go of each buffer as soon as it is written.
async fn write_all<W: AsyncWrite + Unpin>(
    writer: &mut W,
    queue: &mut VecDeque<Bytes>,
    account: &Account,
) -> io::Result<()> {
    if queue.is_empty() {
        return Ok(());
    }
    account.writes();
    while !queue.is_empty() {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let mut used = 0;
        for (slice, bytes) in slices.iter_mut().zip(queue.iter()) {
            *slice = IoSlice::new(bytes);
            used += 1;
        }
        let mut written = writer.write_vectored(slices.get(..used).unwrap_or_default()).await?;
        account.wrote(written);
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        while let Some(front) = queue.front_mut() {
            if written < front.len() {
                front.advance(written);
                break;
            }
            written -= front.len();
            queue.pop_front();
        }
    }
    writer.flush().await?;
    account.rests();
    Ok(())
}
