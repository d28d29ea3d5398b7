//! The task that writes requests: whatever is queued goes out in one vectored write, payloads uncopied. Also the
//! orderly end of a connection, because nothing may be sent after it.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc};

use super::{Frame, Shared};
use crate::client::error::LostCause;
use crate::wire::{EXTENDED_REQUEST_BYTES, Headers, Request, command};

/// The most requests in one vectored write: tokio hands the kernel 64 pieces, two a request.
const BATCH: usize = 32;

/// The writing half of a connection.
pub(super) struct Sender<S> {
    pub(super) socket: S,
    pub(super) frames: mpsc::UnboundedReceiver<Frame>,
    pub(super) shared: Arc<Shared>,
    /// The places in the window, `window` in all.
    pub(super) slots: Arc<Semaphore>,
    pub(super) window: usize,
    pub(super) disconnect_timeout: Duration,
}

impl<S: AsyncWrite + Unpin> Sender<S> {
    /// Runs until nobody can send any more and all is answered, or until the connection dies.
    pub(super) async fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let written = tokio::select! {
            biased;
            _ = shared.death() => return,
            written = self.write() => written,
        };
        match written {
            Ok(()) => {
                // The server hangs up now, and the reader notices; or it never does.
                let _ = tokio::time::timeout(self.disconnect_timeout, shared.death()).await;
                shared.die(LostCause::Closed);
            }
            Err(error) => shared.die(error.into()),
        }
    }

    async fn write(&mut self) -> io::Result<()> {
        let mut batch = Vec::with_capacity(BATCH);
        let mut headers = BytesMut::new();
        while self.frames.recv_many(&mut batch, BATCH).await > 0 {
            let mut pieces = Pieces::default();
            headers.reserve(batch.len() * EXTENDED_REQUEST_BYTES);
            for frame in batch.drain(..) {
                self.encode(&frame.request, &mut headers);
                pieces.push(headers.split().freeze());
                pieces.push(frame.payload);
            }
            self.socket.write_all_buf(&mut pieces).await?;
            // TLS may have kept a part.
            self.socket.flush().await?;
        }
        // Every place in the window is free only when nothing is in flight.
        let all = u32::try_from(self.window).unwrap_or(u32::MAX);
        drop(self.slots.acquire_many(all).await);
        let last = Request { flags: 0, command: command::DISC, cookie: 0, offset: 0, len: 0 };
        self.encode(&last, &mut headers);
        self.socket.write_all_buf(&mut headers).await?;
        self.socket.shutdown().await
    }

    fn encode(&self, request: &Request, out: &mut BytesMut) {
        match self.shared.headers {
            Headers::Extended => request.encode_extended(out),
            Headers::Structured | Headers::Simple => request.encode(out),
        }
    }
}

/// A queue of byte strings that is written as one.
#[derive(Default)]
struct Pieces(VecDeque<Bytes>);

impl Pieces {
    fn push(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.0.push_back(piece);
        }
    }
}

impl Buf for Pieces {
    fn remaining(&self) -> usize {
        self.0.iter().map(Bytes::len).sum()
    }

    fn chunk(&self) -> &[u8] {
        self.0.front().map_or(&[], |piece| piece.as_ref())
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut count = 0;
        for (slice, piece) in slices.iter_mut().zip(&self.0) {
            *slice = IoSlice::new(piece);
            count += 1;
        }
        count
    }

    fn advance(&mut self, mut count: usize) {
        while let Some(piece) = self.0.front_mut() {
            if count < piece.len() {
                piece.advance(count);
                return;
            }
            count -= piece.len();
            self.0.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_one_byte_string() {
        let mut pieces = Pieces::default();
        for piece in ["ab", "", "cde", "f"] {
            pieces.push(Bytes::from_static(piece.as_bytes()));
        }
        let mut slices = [IoSlice::new(&[]); 8];
        assert_eq!(pieces.chunks_vectored(&mut slices), 3);
        pieces.advance(3);
        assert_eq!(pieces.chunk(), b"de");
        assert_eq!(pieces.copy_to_bytes(3).as_ref(), b"def");
        assert_eq!(pieces.remaining(), 0);
        assert_eq!(pieces.chunk(), b"");
    }
}
