//! The server against raw clients and real peers. The machines' own rules are tested beside them.

mod device;
mod lifecycle;
#[cfg(feature = "client")]
mod own_client;
mod peers;
mod raw;
#[cfg(feature = "client")]
mod replace;
mod stalled;
mod transmission;
