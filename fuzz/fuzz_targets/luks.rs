//! An encrypted image of whose LUKS header arbitrary bits are flipped, opened with the right passphrase. Whatever they
//! make of it, nothing panics or works without end.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tokio::runtime::Runtime;

#[path = "../../qcow2/tests/hostile/locked.rs"]
mod locked;

static LOCKED: LazyLock<locked::Locked> =
    LazyLock::new(|| runtime().block_on(locked::Locked::new()));

fuzz_target!(|flips: &[u8]| {
    runtime().block_on(LOCKED.exercise(flips));
});

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime")
}
