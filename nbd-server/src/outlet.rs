//! Writing replies to a stream, many in one system call. Their order is the order in which they are handed over.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::Arc;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::connection::Ticket;
use crate::memory::Account;
use crate::reply::{Answer, Asked, Encoder};
use crate::wire::Headers;

/// Replies that are encoded together.
const BATCH: usize = 64;

/// Buffers in one vectored write.
const SLICES: usize = 64;

/// A reply on its way; the ticket goes back to the connection's budget when it is written.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) asked: Asked,
    pub(crate) answer: Answer,
    pub(crate) ticket: Ticket,
}

/// Writes replies until every sender is gone, and gives the stream back. A client that has hung up hears no more of them,
/// but what it asked for before is on its way to us and done all the same: so nobody is told before there is no more.
pub(crate) async fn write_replies<W: AsyncWrite + Unpin>(
    mut writer: W,
    mut replies: mpsc::Receiver<Outgoing>,
    headers: Headers,
    account: Arc<Account>,
) -> io::Result<W> {
    let mut encoder = Encoder::new(headers);
    let mut batch = Vec::with_capacity(BATCH);
    let mut tickets = Vec::with_capacity(BATCH);
    while replies.recv_many(&mut batch, BATCH).await > 0 {
        for Outgoing { asked, answer, ticket } in batch.drain(..) {
            encoder.push(asked, answer);
            tickets.push(ticket);
        }
        let mut queue = encoder.take();
        if let Err(error) = write_all(&mut writer, &mut queue, &account).await {
            drop(queue);
            tickets.clear();
            while replies.recv_many(&mut batch, BATCH).await > 0 {
                batch.clear();
            }
            return Err(error);
        }
        encoder.reuse(queue);
        tickets.clear();
    }
    writer.flush().await?;
    Ok(writer)
}

/// Writes all of `queue`, letting go of each buffer as soon as it is written.
async fn write_all<W: AsyncWrite + Unpin>(
    writer: &mut W,
    queue: &mut VecDeque<Bytes>,
    account: &Account,
) -> io::Result<()> {
    while !queue.is_empty() {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let mut used = 0;
        for (slice, bytes) in slices.iter_mut().zip(queue.iter()) {
            *slice = IoSlice::new(bytes);
            used += 1;
        }
        account.writes();
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
    writer.flush().await
}
