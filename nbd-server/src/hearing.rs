//! What a client says in the handshake, as far as it is not yet understood, and the memory that it holds. What it means
//! is told by [`crate::handshake`].
//!
//! A few KiB cost nothing, and up to 64 KiB are the reserve of the connection. Beyond that an option holds memory of the
//! server, from when so much of it has come: an announcement costs nothing, and who waits for memory holds none.

use std::io;
use std::sync::Arc;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::memory::{Account, RESERVE_BYTES, Share};

/// What each connection can hold besides: room for all but the longest options.
const SMALL_BYTES: usize = 4096;

/// Bytes of options, in a buffer of a size that is accounted for.
#[derive(Debug)]
pub(crate) struct Hearing {
    bytes: BytesMut,
    /// The size of the buffer.
    room: usize,
    account: Arc<Account>,
    /// Where the buffer is not a small one.
    share: Option<Share>,
}

impl Hearing {
    /// Nothing yet, of a connection that has this account.
    pub(crate) fn new(account: Arc<Account>) -> Self {
        Self { bytes: BytesMut::new(), room: 0, account, share: None }
    }

    /// What is there.
    pub(crate) fn bytes(&mut self) -> &mut BytesMut {
        &mut self.bytes
    }

    /// What is left behind the last option, in a buffer of its own size.
    pub(crate) fn into_rest(self) -> BytesMut {
        BytesMut::from(&self.bytes[..])
    }

    /// Reads until `more` bytes have come, and what comes with them where that costs nothing.
    ///
    /// # Errors
    /// Those of the stream, and its end.
    pub(crate) async fn fill<R>(&mut self, reader: &mut R, more: usize) -> io::Result<()>
    where
        R: AsyncRead + Unpin,
    {
        let wanted = self.bytes.len().saturating_add(more);
        while self.bytes.len() < wanted {
            self.make_room(wanted).await;
            if reader.read_buf(&mut self.bytes).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    /// Makes room for more, of the `wanted` bytes that there are to be. Waits for memory where it must.
    async fn make_room(&mut self, wanted: usize) {
        let room = room(wanted, self.bytes.len());
        if room <= SMALL_BYTES {
            if self.share.is_some() || self.bytes.len() == self.bytes.capacity() {
                self.move_to(SMALL_BYTES, None);
            }
        } else if room != self.room {
            let share = if room <= reserve_bytes() {
                self.account.reserved().await
            } else {
                self.account.take(room as u64).await
            };
            self.move_to(room, Some(share));
        }
    }

    fn move_to(&mut self, room: usize, share: Option<Share>) {
        let mut bytes = BytesMut::with_capacity(room);
        bytes.extend_from_slice(&self.bytes);
        (self.bytes, self.room, self.share) = (bytes, room, share);
    }
}

/// The size of the buffer in which so many bytes of the `wanted` ones are followed by more.
fn room(wanted: usize, there: usize) -> usize {
    match wanted {
        0..=SMALL_BYTES => SMALL_BYTES,
        _ if there < reserve_bytes() => wanted.min(reserve_bytes()),
        _ => wanted,
    }
}

fn reserve_bytes() -> usize {
    usize::try_from(RESERVE_BYTES).unwrap_or(usize::MAX)
}
