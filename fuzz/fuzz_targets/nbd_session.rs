//! A whole session of the server on arbitrary bytes: see `nbd-server/tests/fuzz/session.rs`.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../nbd-server/tests/fuzz/session.rs"]
mod session;

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    runtime.expect("a runtime").block_on(session::run(data));
});
