//! The server against raw clients and real peers. The machines' own rules are tested beside them.

#[cfg(all(feature = "client", feature = "tls"))]
#[path = "../certificates/mod.rs"]
mod certificates;
mod counters;
mod crowd;
mod cves;
mod device;
mod lifecycle;
mod limits;
#[cfg(feature = "client")]
mod own_client;
mod parts;
mod peers;
mod raw;
#[cfg(feature = "client")]
mod replace;
mod sealing;
mod stalled;
#[cfg(all(feature = "client", feature = "tls"))]
mod tls;
mod transmission;
mod writers;
