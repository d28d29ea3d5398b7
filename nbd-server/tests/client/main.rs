//! The client against the servers of other people: nbdkit and qemu-nbd. A peer that is not installed fails the test.

mod nbdkit;
mod peer;
mod qemu;
