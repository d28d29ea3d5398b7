//! What the fuzzer does with an input, and a test that does it with every input that was kept. `fuzz/fuzz_targets`
//! includes these files; nothing here knows of a fuzzer.

mod client;
mod conversation;
mod handshake;
mod seeds;
mod session;
mod transmission;

use std::path::PathBuf;

/// Runs `exercise` on every input that is kept for a target.
fn replay(target: &str, exercise: impl Fn(&[u8])) {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus")).join(target);
    let inputs = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
    let mut count = 0;
    for input in inputs {
        let path = input.unwrap().path();
        println!("{}", path.display());
        exercise(&std::fs::read(&path).unwrap());
        count += 1;
    }
    assert!(count >= 4, "{folder:?} holds {count} inputs");
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(future)
}

#[test]
fn the_handshake_stands_every_input_that_was_kept() {
    replay("nbd_handshake", handshake::run);
}

#[test]
fn the_transmission_stands_every_input_that_was_kept() {
    replay("nbd_transmission", transmission::run);
}

#[test]
fn the_server_stands_every_session_that_was_kept() {
    replay("nbd_session", |data| block_on(session::run(data)));
}

#[test]
fn the_client_stands_every_server_that_was_kept() {
    replay("nbd_client", |data| {
        block_on(client::run(data));
    });
}

#[test]
fn a_server_that_tells_the_truth_gets_through_the_fuzzers_client() {
    for (name, answered) in [("structured", 6), ("extended", 6), ("extended_errors", 0)] {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/nbd_client");
        let input = std::fs::read(format!("{folder}/{name}")).unwrap();
        assert_eq!(block_on(client::run(&input)), answered, "{name}");
    }
}

#[test]
fn every_conversation_that_was_kept_agrees_with_its_model() {
    replay("nbd_conversation", |data| block_on(conversation::run(data)));
}
