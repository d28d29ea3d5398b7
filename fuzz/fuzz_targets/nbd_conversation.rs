//! Our client and our server, held against a vector of bytes: see `nbd-server/tests/fuzz/conversation.rs`.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../nbd-server/tests/fuzz/conversation.rs"]
mod conversation;

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    runtime.expect("a runtime").block_on(conversation::run(data));
});
