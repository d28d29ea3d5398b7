//! "Size constraints".

use nbd_server::wire::{Headers, command, command_flag as flag, error};
use nbd_server::{Limits, ServerConfig};

use crate::peer::Peer;
use crate::stage::{GIANT, SIZE, Stage, Way};

const MAX: u64 = 32 << 20;

#[tokio::test]
async fn a_payload_of_the_default_maximum_works_in_both_directions() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::entered(&stage, way, "giant").await;
        let payload = vec![1; usize::try_from(MAX).unwrap()];
        assert_eq!(peer.write(0, 12_345, &payload).await.error, 0);
        assert_eq!(peer.read(GIANT - MAX, MAX).await.len() as u64, MAX);
    }
}

#[tokio::test]
async fn a_read_over_the_maximum_is_refused_and_the_session_goes_on() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::entered(&stage, way, "giant").await;
        // Who negotiated chunks is told to ask for less.
        let expected =
            if way.headers == Headers::Simple { error::EINVAL } else { error::EOVERFLOW };
        for len in [MAX + 1, u64::from(u32::MAX)] {
            assert_eq!(peer.ask(command::READ, 0, 0, len).await.error, expected);
        }
        if way.headers.has_chunks() {
            assert_eq!(peer.ask(command::READ, flag::DF, 0, MAX + 1).await.error, expected);
        }
        peer.is_in_step_again().await;
    }
}

#[tokio::test]
async fn a_write_over_the_advertised_maximum_is_consumed_and_refused() {
    let limits = limits(1 << 20);
    let stage = Stage::with(ServerConfig::with_limits(limits)).await;
    for way in Way::all() {
        let mut peer = Peer::entered(&stage, way, "giant").await;
        let payload = vec![1; (1 << 20) + 1];
        assert_eq!(peer.write(0, 0, &payload).await.error, error::EINVAL);
        peer.is_in_step_again().await;
        assert_eq!(peer.write(0, 0, &payload[1..]).await.error, 0);
    }
}

fn limits(max_payload_bytes: u32) -> Limits {
    let mut limits = Limits::default();
    limits.max_payload_bytes = max_payload_bytes;
    limits
}

#[tokio::test]
async fn what_has_no_payload_may_be_longer_than_the_maximum() {
    for way in Way::all() {
        let stage = Stage::new().await;
        let mut peer = Peer::entered(&stage, way, "giant").await;
        let len = u64::from(u32::MAX);
        for command in [command::TRIM, command::WRITE_ZEROES, command::CACHE] {
            assert_eq!(peer.ask(command, 0, 1 << 40, len).await.error, 0, "command {command}");
        }
        // All of it, not a part.
        let done: Vec<_> = stage.giant.changes().iter().map(|(what, r)| (*what, r.len())).collect();
        assert_eq!(done, [("discard", len), ("zeroes", len)]);
    }
}

#[tokio::test]
async fn the_last_byte_can_be_had() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        assert_eq!(peer.write(0, SIZE - 1, &[8]).await.error, 0);
        assert_eq!(peer.read(SIZE - 2, 2).await, [0, 8]);
    }
}
