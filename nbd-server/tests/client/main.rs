//! The client against the servers of other people: qemu-nbd, qemu-storage-daemon, nbdkit and the reference nbd-server. A
//! peer that is not installed fails the test.

#[cfg(feature = "tls")]
#[path = "../certificates/mod.rs"]
mod certificates;
mod foreign;
mod nbdkit;
mod peer;
mod qemu;
mod reconnect;
#[cfg(feature = "tls")]
mod tls;
