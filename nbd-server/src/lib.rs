//! The NBD protocol in both directions, embeddable: an asynchronous server for any [`block::BlockDevice`] and a
//! pipelined client. Knows no image format.

#[cfg(feature = "client")]
pub mod client;
pub mod wire;
