//! Arbitrary bytes as an image: looked at, checked, read, written, repaired and closed. Whatever they say, nothing
//! panics, memory is bounded, and an image that was sound before is sound when it is closed.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../qcow2/tests/hostile/exercise.rs"]
mod exercise;

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    runtime.expect("a runtime").block_on(exercise::exercise(data, &[]));
});
