//! "NBD_CMD_READ", "Structured reply types", "Simple reply message". What holds for every reply is judged in `peer`.

use std::io;

use nbd_server::wire::{Headers, chunk, command, command_flag as flag, error};

use crate::peer::Peer;
use crate::stage::{SIZE, Stage, Way};

/// Data in the middle of a hole.
async fn content(stage: &Stage, way: Way) -> (Peer, Vec<u8>) {
    let mut peer = Peer::entered(stage, way, "disk").await;
    assert_eq!(peer.write(0, 64 << 10, &[7; 32 << 10]).await.error, 0);
    let expected = stage.disk.bytes();
    (peer, expected)
}

#[tokio::test]
async fn what_was_written_is_read_at_every_offset_and_length() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let (mut peer, expected) = content(&stage, way).await;
        for (at, len) in [(0, SIZE), (SIZE - 1, 1), (65_535, 2), (60_000, 50_001), (1, 4095)] {
            let range = usize::try_from(at).unwrap()..usize::try_from(at + len).unwrap();
            assert!(peer.read(at, len).await == expected[range], "{len} bytes at {at}");
        }
    }
}

#[tokio::test]
async fn holes_are_holes_where_chunks_can_tell_them() {
    let stage = Stage::new().await;
    for way in Way::with_chunks() {
        let (mut peer, _) = content(&stage, way).await;
        let read = peer.ask(command::READ, 0, 0, SIZE).await;
        let expected = [chunk::OFFSET_HOLE, chunk::OFFSET_DATA, chunk::OFFSET_HOLE];
        assert_eq!(read.chunks, expected, "as few chunks as can be");
    }
}

#[tokio::test]
async fn df_sends_one_chunk_with_the_holes_spelt_out() {
    let stage = Stage::new().await;
    for way in Way::with_chunks() {
        let (mut peer, expected) = content(&stage, way).await;
        // 64 KiB must work; this server has no other limit than for all reads.
        for (at, len) in [(0, 65_536), (32 << 10, 65_536), (0, SIZE)] {
            let read = peer.ask(command::READ, flag::DF, at, len).await;
            assert_eq!((read.error, &read.chunks[..]), (0, &[chunk::OFFSET_DATA][..]));
            let range = usize::try_from(at).unwrap()..usize::try_from(at + len).unwrap();
            assert!(read.data == expected[range]);
        }
    }
}

#[tokio::test]
async fn a_read_of_nothing_is_answered() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        for at in [0, 512, SIZE] {
            assert_eq!(peer.read(at, 0).await, []);
        }
        peer.is_in_step_again().await;
    }
}

#[tokio::test]
async fn a_read_that_fails_brings_an_error_and_no_data() {
    for way in Way::all() {
        let stage = Stage::new().await;
        let mut peer = Peer::entered(&stage, way, "disk").await;
        stage.disk.fail(io::ErrorKind::Other);
        let failed = peer.ask(command::READ, 0, 0, 4096).await;
        assert_eq!(failed.error, error::EIO);
        assert!(failed.data.is_empty());
        let is_told = way.headers != Headers::Simple;
        assert_eq!(failed.chunks, if is_told { vec![chunk::ERROR] } else { Vec::new() });
        assert_eq!(!failed.text.is_empty(), is_told, "chunks tell why");
        assert!(!failed.text.contains("secret"), "but nothing of the host");
        let again = peer.ask(command::READ, 0, 4096, 4096).await;
        assert_eq!(again.error, error::EIO, "the session goes on");
    }
}
