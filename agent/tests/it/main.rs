//! Runs of the agent against real NBD servers. What is decided without I/O is tested beside its code.

mod bitmap;
#[path = "../../../nbd-server/tests/certificates/mod.rs"]
mod certificates;
mod changes;
mod failures;
#[cfg(feature = "program")]
mod fake_hub;
#[cfg(feature = "program")]
mod program;
mod support;
mod tls;
