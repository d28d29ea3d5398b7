//! The client against a server that says anything: see `nbd-server/tests/fuzz/client.rs`.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../nbd-server/tests/fuzz/client.rs"]
mod client;

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let _answered = runtime.expect("a runtime").block_on(client::run(data));
});
