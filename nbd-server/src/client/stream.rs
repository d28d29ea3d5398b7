//! The two halves of a socket with everything counted that passes. The reading half keeps a small buffer for headers;
//! long payloads go past it.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader, ReadBuf};

/// The buffer for headers, in bytes: some two hundred replies to writes fit, and a payload loses no more than this to
/// a copy.
const HEADER_BUFFER_BYTES: usize = 4096;

/// The bytes on all sockets of one device.
#[derive(Debug, Default)]
pub(super) struct Counters {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Counters {
    /// Sent and received, in bytes.
    pub(super) fn get(&self) -> (u64, u64) {
        (self.sent.load(Ordering::Relaxed), self.received.load(Ordering::Relaxed))
    }
}

/// What can be read from.
type Source = Box<dyn AsyncRead + Send + Unpin>;

/// What can be written to.
type Sink = Box<dyn AsyncWrite + Send + Unpin>;

/// A connected socket, or TLS on top of one.
pub(super) struct Halves {
    /// What the server sends.
    pub(super) read: BufReader<Source>,
    /// What we send.
    pub(super) write: Sink,
}

impl Halves {
    pub(super) fn new(
        read: impl AsyncRead + Send + Unpin + 'static,
        write: impl AsyncWrite + Send + Unpin + 'static,
        counters: &Arc<Counters>,
    ) -> Self {
        Self::uncounted(
            Counted { inner: read, counters: Arc::clone(counters) },
            Counted { inner: write, counters: Arc::clone(counters) },
        )
    }

    /// Halves of something that is counted further down.
    pub(super) fn uncounted(
        read: impl AsyncRead + Send + Unpin + 'static,
        write: impl AsyncWrite + Send + Unpin + 'static,
    ) -> Self {
        let read = Box::new(read) as Source;
        Self { read: BufReader::with_capacity(HEADER_BUFFER_BYTES, read), write: Box::new(write) }
    }

    /// Sends all of `bytes`.
    pub(super) async fn send(&mut self, bytes: &mut BytesMut) -> io::Result<()> {
        self.write.write_all_buf(bytes).await?;
        self.write.flush().await
    }

    /// Both halves as one; `None` where something was read that nobody has looked at.
    #[cfg(feature = "tls")]
    pub(super) fn into_stream(self) -> Option<tokio::io::Join<Source, Sink>> {
        let is_clean = self.read.buffer().is_empty();
        is_clean.then(|| tokio::io::join(self.read.into_inner(), self.write))
    }
}

/// A half that counts.
struct Counted<S> {
    inner: S,
    counters: Arc<Counters>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(context, buffer);
        let count = buffer.filled().len() - before;
        self.counters.received.fetch_add(count as u64, Ordering::Relaxed);
        polled
    }
}

impl<S> Counted<S> {
    fn count(&self, polled: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(count)) = &polled {
            self.counters.sent.fetch_add(*count as u64, Ordering::Relaxed);
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(context, bytes);
        self.count(polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write_vectored(context, slices);
        self.count(polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}
