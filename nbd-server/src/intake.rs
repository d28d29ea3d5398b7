//! Reading requests off a stream: headers through a small buffer, many in one system call, payloads straight into
//! their own memory. What a request means is not looked at here.

use std::io;
use std::time::Duration;

use block::{Buffer, BufferPool};
use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::timeout;

use crate::wire::REQUEST_BYTES;

/// What is read ahead for headers; at most this much of a payload is copied once more.
const AHEAD_BYTES: usize = 16 << 10;

/// How long a payload waits for its share of the process-wide pool. Within it, all connections together are slowed
/// down to the speed of the disks; beyond it somebody holds buffers without getting on, for instance clients that
/// stopped in the middle of a payload, and then the connection's own budget is the only bound.
const POOL_PATIENCE: Duration = Duration::from_millis(200);

/// The reading side of a connection.
#[derive(Debug)]
pub(crate) struct Intake<R> {
    reader: R,
    ahead: BytesMut,
}

impl<R: AsyncRead + Unpin> Intake<R> {
    /// Reads `ahead`, left by the handshake, and then from `reader`.
    pub(crate) fn new(reader: R, ahead: BytesMut) -> Self {
        Self { reader, ahead }
    }

    /// The stream, without what was read ahead.
    pub(crate) fn get_mut(&mut self) -> &mut R {
        &mut self.reader
    }

    /// The next header; `None` where the stream ends before it begins.
    pub(crate) async fn header(&mut self) -> io::Result<Option<[u8; REQUEST_BYTES]>> {
        while self.ahead.len() < REQUEST_BYTES {
            if self.fill().await? == 0 {
                return if self.ahead.is_empty() {
                    Ok(None)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            }
        }
        let mut header = [0; REQUEST_BYTES];
        self.ahead.copy_to_slice(&mut header);
        Ok(Some(header))
    }

    /// The next `len` bytes.
    pub(crate) async fn payload(&mut self, len: u32) -> io::Result<Bytes> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let mut buffer = buffer(len).await;
        let (copied, rest) = buffer.split_at_mut(len.min(self.ahead.len()));
        self.ahead.copy_to_slice(copied);
        self.reader.read_exact(rest).await?;
        Ok(buffer.freeze())
    }

    /// Consumes the next `len` bytes without keeping them.
    pub(crate) async fn discard(&mut self, len: u32) -> io::Result<()> {
        let mut left = usize::try_from(len).unwrap_or(usize::MAX);
        loop {
            let now = left.min(self.ahead.len());
            self.ahead.advance(now);
            left -= now;
            if left == 0 {
                return Ok(());
            }
            if self.fill().await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    async fn fill(&mut self) -> io::Result<usize> {
        self.ahead.reserve(AHEAD_BYTES - self.ahead.len().min(AHEAD_BYTES - 1));
        self.reader.read_buf(&mut self.ahead).await
    }
}

/// Aligned memory for a payload.
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
