//! The server's handshake machine on arbitrary bytes: see `nbd-server/tests/fuzz/handshake.rs`.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../nbd-server/tests/fuzz/handshake.rs"]
mod handshake;

fuzz_target!(|data: &[u8]| handshake::run(data));
