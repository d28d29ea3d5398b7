//! Reading requests off a stream: headers through a small buffer, many in one system call, payloads straight into
//! their own memory. What a request means is not looked at here.
//!
//! A client can announce a payload and never send it, so that an announcement costs nothing: memory is taken when the
//! first bytes are there, for one piece at a time, and all connections together have a bound for pieces that are not
//! complete.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use block::{Buffer, BufferPool};
use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::limits::Limits;
use crate::memory::{Account, RESERVE_BYTES, Share};

/// What is read ahead for headers; at most this much of each piece of a payload is copied once more.
const AHEAD_BYTES: usize = 16 << 10;

/// The longest piece in which a payload is taken: as much as most clients send in one request, and the largest cluster
/// there is.
const PIECE_BYTES: u32 = 2 << 20;

/// How long a payload waits for its share of the process-wide pool. Within it, all connections together are slowed
/// down to the speed of the disks; beyond it somebody holds buffers without getting on, for instance a device that
/// hangs, and then the connection's own budget is the only bound. Clients cannot cause that: what stuck ones hold is
/// bounded below the pool's size.
const POOL_PATIENCE: Duration = Duration::from_millis(200);

/// Memory for payloads that are arriving, shared by all connections of a server.
#[derive(Debug)]
pub(crate) struct Arriving {
    bytes: Semaphore,
    timeout: Duration,
}

impl Arriving {
    pub(crate) fn new(limits: &Limits) -> Self {
        let bytes = usize::try_from(limits.arriving_bytes).unwrap_or(Semaphore::MAX_PERMITS);
        let bytes = Semaphore::new(bytes.min(Semaphore::MAX_PERMITS));
        Self { bytes, timeout: limits.payload_timeout }
    }

    /// Waits for progress of a payload.
    async fn progress(&self, read: impl Future<Output = io::Result<usize>>) -> io::Result<usize> {
        match timeout(self.timeout, read).await {
            Ok(Ok(0)) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => read,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

/// The reading side of a connection.
#[derive(Debug)]
pub(crate) struct Intake<R> {
    reader: R,
    ahead: BytesMut,
    arriving: Arc<Arriving>,
    account: Arc<Account>,
}

impl<R: AsyncRead + Unpin> Intake<R> {
    /// Reads `ahead`, left by the handshake, and then from `reader`. Payloads are taken on `account`.
    pub(crate) fn new(
        reader: R,
        ahead: BytesMut,
        arriving: Arc<Arriving>,
        account: Arc<Account>,
    ) -> Self {
        Self { reader, ahead, arriving, account }
    }

    /// The stream, without what was read ahead.
    pub(crate) fn into_inner(self) -> R {
        self.reader
    }

    /// The next header, of `N` bytes; `None` where the stream ends before it begins.
    pub(crate) async fn header<const N: usize>(&mut self) -> io::Result<Option<[u8; N]>> {
        while self.ahead.len() < N {
            if self.fill().await? == 0 {
                return if self.ahead.is_empty() {
                    Ok(None)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            }
        }
        let mut header = [0; N];
        self.ahead.copy_to_slice(&mut header);
        Ok(Some(header))
    }

    /// The next piece of a payload of which `left` bytes are missing, the first of them meant for the offset `at`.
    ///
    /// The piece is the whole of it, unless that is longer than [`PIECE_BYTES`] or memory is short; pieces are then cut
    /// at multiples of their length on the device. The share is to be kept as long as the bytes are.
    ///
    /// # Errors
    /// `TimedOut` where nothing comes for as long as a payload may make no progress; otherwise those of the stream.
    pub(crate) async fn piece(&mut self, at: u64, left: u32) -> io::Result<(Bytes, Option<Share>)> {
        if left == 0 {
            return Ok((Bytes::new(), None));
        }
        if self.ahead.is_empty() {
            self.fill_more().await?;
        }
        let arriving = Arc::clone(&self.arriving);
        let wanted = piece_bytes(at, left, PIECE_BYTES);
        // Those of payloads that have not arrived are held until the piece is complete.
        let (_permit, share, len) = if wanted <= RESERVE_BYTES {
            (None, self.account.take_piece(wanted.into()).await, wanted)
        } else if let Ok(permit) = arriving.bytes.try_acquire_many(wanted)
            && let Some(share) = self.account.try_take(wanted.into())
        {
            (Some(permit), share, wanted)
        } else {
            let len = piece_bytes(at, left, RESERVE_BYTES);
            (None, self.account.take_piece(len.into()).await, len)
        };
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let mut buffer = buffer(len).await;
        let (copied, mut rest) = buffer.split_at_mut(len.min(self.ahead.len()));
        self.ahead.copy_to_slice(copied);
        while !rest.is_empty() {
            let read = arriving.progress(self.reader.read(rest)).await?;
            rest = rest.get_mut(read..).unwrap_or_default();
        }
        Ok((buffer.freeze(), Some(share)))
    }

    /// A payload of `len` bytes that is part of the question; the caller bounds it.
    ///
    /// # Errors
    /// Those of [`Intake::piece`].
    pub(crate) async fn question(&mut self, len: u32) -> io::Result<Bytes> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        while self.ahead.len() < len {
            self.fill_more().await?;
        }
        Ok(self.ahead.split_to(len).freeze())
    }

    /// Consumes the next `len` bytes of a payload without keeping them.
    ///
    /// # Errors
    /// Those of [`Intake::piece`].
    pub(crate) async fn discard(&mut self, len: u64) -> io::Result<()> {
        let mut left = len;
        loop {
            let now = left.min(self.ahead.len() as u64);
            self.ahead.advance(usize::try_from(now).unwrap_or(self.ahead.len()));
            left -= now;
            if left == 0 {
                return Ok(());
            }
            self.fill_more().await?;
        }
    }

    /// Reads on in a payload.
    async fn fill_more(&mut self) -> io::Result<()> {
        let arriving = Arc::clone(&self.arriving);
        arriving.progress(self.fill()).await.map(drop)
    }

    async fn fill(&mut self) -> io::Result<usize> {
        self.ahead.reserve(AHEAD_BYTES - self.ahead.len().min(AHEAD_BYTES - 1));
        self.reader.read_buf(&mut self.ahead).await
    }
}

/// How long the next piece is that may have `longest` bytes, a power of two.
fn piece_bytes(at: u64, left: u32, longest: u32) -> u32 {
    if left <= longest {
        return left;
    }
    let beyond = u32::try_from(at % u64::from(longest)).unwrap_or(0);
    longest - beyond
}

/// Aligned memory for a piece.
async fn buffer(len: usize) -> Buffer {
    let pool = BufferPool::shared();
    if let Some(buffer) = pool.try_get(len) {
        return buffer;
    }
    match timeout(POOL_PATIENCE, pool.get(len)).await {
        Ok(buffer) => buffer,
        Err(_) => pool.get_now(len),
    }
}
