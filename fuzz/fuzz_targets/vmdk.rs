//! Arbitrary bytes as a VMDK: opened, read and mapped. Whatever they say, nothing panics, hangs or writes, and memory is
//! bounded.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

#[path = "../../qcow2/tests/hostile/disguised.rs"]
mod disguised;

static VMDKS: LazyLock<disguised::Vmdks> = LazyLock::new(disguised::Vmdks::new);

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    runtime.expect("a runtime").block_on(VMDKS.exercise(data));
});
