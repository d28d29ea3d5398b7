//! Where the payload of a read goes. Decides between the pool and plain memory; moves no bytes.

use bytes::Bytes;

/// The memory of one read: owned by the connection from the request to the last byte of the reply.
#[derive(Debug)]
pub(super) struct Destination(Vec<u8>);

impl Destination {
    /// For a request without content in its reply.
    pub(super) fn none() -> Self {
        Self(Vec::new())
    }

    /// `len` bytes.
    pub(super) async fn wait(len: usize) -> Self {
        Self(vec![0; len])
    }

    /// The bytes at `at`, where they exist.
    pub(super) fn get_mut(&mut self, at: usize, len: usize) -> Option<&mut [u8]> {
        self.0.get_mut(at..)?.get_mut(..len)
    }

    /// Everything, shared from now on.
    pub(super) fn freeze(self) -> Bytes {
        self.0.into()
    }
}
