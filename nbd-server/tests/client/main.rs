//! The client against the servers of other people: nbdkit and qemu-nbd. A peer that is not installed fails the test.

#[cfg(feature = "tls")]
#[path = "../certificates/mod.rs"]
mod certificates;
mod nbdkit;
mod peer;
mod qemu;
#[cfg(feature = "tls")]
mod tls;
