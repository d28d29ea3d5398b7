//! Where the payload of a read goes: a pool buffer, owned by the connection from the request to the last byte of the
//! reply. Decides who waits for memory; moves no bytes.

use std::sync::{Arc, LazyLock};

use block::{Buffer, BufferPool, SHARED_POOL_BYTES};
use bytes::Bytes;

/// The pool of all clients in this process, as large as the one that servers and images share but apart from it: a
/// server here must not wait for the buffers of a client here, whose caller may hold them until that server answers.
pub(super) fn client_pool() -> &'static Arc<BufferPool> {
    static POOL: LazyLock<Arc<BufferPool>> = LazyLock::new(|| BufferPool::new(SHARED_POOL_BYTES));
    &POOL
}

/// The memory of one request; none for requests whose replies have no content.
#[derive(Debug)]
pub(super) struct Destination(Option<Buffer>);

impl Destination {
    /// For a request without content in its reply.
    pub(super) fn none() -> Self {
        Self(None)
    }

    /// `len` bytes, once the pool has them. The one who asks waits, never a connection.
    pub(super) async fn wait(pool: &Arc<BufferPool>, len: usize) -> Self {
        Self(Some(pool.get(len).await))
    }

    /// `len` bytes at once, for a further piece of a read that holds memory already: one that waited could wait for
    /// itself.
    pub(super) fn now(pool: &Arc<BufferPool>, len: usize) -> Self {
        Self(Some(pool.get_now(len)))
    }

    /// The bytes at `at`, where they exist.
    pub(super) fn get_mut(&mut self, at: usize, len: usize) -> Option<&mut [u8]> {
        self.0.as_deref_mut()?.get_mut(at..)?.get_mut(..len)
    }

    /// Everything, shared from now on.
    pub(super) fn freeze(self) -> Bytes {
        self.0.map_or_else(Bytes::new, Buffer::freeze)
    }
}
