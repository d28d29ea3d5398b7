//! The server's machines of the transmission phase on arbitrary requests: see `nbd-server/tests/fuzz/transmission.rs`.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[expect(dead_code, reason = "only what it says of an export is used")]
#[path = "../../nbd-server/tests/fuzz/handshake.rs"]
mod handshake;
#[path = "../../nbd-server/tests/fuzz/transmission.rs"]
mod transmission;

fuzz_target!(|data: &[u8]| transmission::run(data));
