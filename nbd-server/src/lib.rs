//! The NBD protocol in both directions, embeddable: an asynchronous server for any [`block::BlockDevice`] and a
//! pipelined client. Knows no image format.

pub mod wire;
