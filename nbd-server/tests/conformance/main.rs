//! The protocol document, clause by clause: what it demands of a server, over Unix sockets, TCP and TLS, with simple,
//! structured and extended headers. Each module names the sections that it is about, each test the clause;
//! `CLAUSES.md` tells which test stands for which clause, and of which there is none.

mod against_qemu;
mod block_status;
#[cfg(feature = "tls")]
#[path = "../certificates/mod.rs"]
mod certificates;
mod change;
mod clauses;
#[path = "../server/device.rs"]
#[expect(dead_code, reason = "the server's own tests hold devices back, which here nothing needs")]
mod device;
mod errors;
mod extended;
mod fixed_newstyle;
mod flags;
mod info;
mod libnbd;
mod messages;
mod metadata;
mod newstyle;
mod option_types;
mod peer;
mod read;
#[cfg(feature = "tls")]
mod secure;
mod size_constraints;
mod stage;
mod termination;
