//! "NBD_CMD_BLOCK_STATUS", "NBD_REPLY_TYPE_BLOCK_STATUS", "base:allocation metadata context". What holds for every reply
//! is judged in `peer`.

use nbd_server::wire::{allocation, command, command_flag as flag, error};

use crate::peer::{Peer, Reply};
use crate::stage::{SIZE, STRIPE, STRIPES, Stage, Way};

const HOLE: u64 = (allocation::HOLE | allocation::ZERO) as u64;

/// The extents of one context.
fn of(reply: &Reply, id: u32) -> &[(u64, u64)] {
    &reply.status.iter().find(|(found, _)| *found == id).unwrap().1
}

#[tokio::test]
async fn allocation_tells_holes_and_data_as_they_are_now() {
    for way in Way::with_chunks() {
        let stage = Stage::new().await;
        let mut peer = Peer::entered(&stage, way, "disk").await;
        let all = peer.ask(command::BLOCK_STATUS, 0, 0, SIZE).await;
        assert_eq!(of(&all, 1), [(SIZE, HOLE)]);
        assert_eq!(peer.write(0, 8192, &[1; 4096]).await.error, 0);
        let all = peer.ask(command::BLOCK_STATUS, 0, 0, SIZE).await;
        assert_eq!(of(&all, 1), [(8192, HOLE), (4096, 0), (SIZE - 12_288, HOLE)]);
        assert_eq!(peer.ask(command::TRIM, 0, 8192, 4096).await.error, 0);
        let all = peer.ask(command::BLOCK_STATUS, 0, 0, SIZE).await;
        assert_eq!(of(&all, 1), [(SIZE, HOLE)]);
    }
}

#[tokio::test]
async fn each_selected_context_is_told_and_no_other() {
    let stage = Stage::new().await;
    for way in Way::with_chunks() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        let both = peer.ask(command::BLOCK_STATUS, 0, 0, SIZE).await;
        assert_eq!(of(&both, 2).len() as u64, SIZE / STRIPE);
        assert!(of(&both, 2).iter().zip(0..).all(|(one, at)| *one == (STRIPE, at % 2)));
        let mut peer = Peer::haggling(&stage, way).await;
        let id = peer.select("disk", &[STRIPES]).await[0].0;
        peer.go("disk").await;
        let one = peer.ask(command::BLOCK_STATUS, 0, STRIPE - 10, 20).await;
        assert_eq!(one.status, [(id, vec![(10, 0), (10, 1)])]);
    }
}

#[tokio::test]
async fn req_one_gets_one_extent_that_does_not_pass_the_request() {
    let stage = Stage::new().await;
    for way in Way::with_chunks() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        for (offset, len, expected) in
            [(0, SIZE, STRIPE), (STRIPE - 1, SIZE / 2, 1), (10, 100, 100)]
        {
            let told = peer.ask(command::BLOCK_STATUS, flag::REQ_ONE, offset, len).await;
            assert_eq!(of(&told, 2).len(), 1);
            assert_eq!(of(&told, 2)[0].0, expected);
        }
    }
}

#[tokio::test]
async fn whoever_asks_on_from_the_end_of_an_answer_comes_to_the_end() {
    let stage = Stage::new().await;
    for way in Way::with_chunks() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        // Every other block, so that the device itself answers in parts.
        for block in (0..64).step_by(2) {
            assert_eq!(peer.write(0, block * 4096, &[1; 4096]).await.error, 0);
        }
        for flags in [0, flag::REQ_ONE] {
            let (mut at, mut data) = (0, 0);
            while at < SIZE {
                let told = peer.ask(command::BLOCK_STATUS, flags, at, SIZE - at).await;
                for (len, status) in of(&told, 1) {
                    at += len;
                    data += if *status == 0 { *len } else { 0 };
                }
            }
            assert_eq!((at, data), (SIZE, 32 * 4096));
        }
    }
}

#[tokio::test]
async fn a_status_of_nothing_or_past_the_end_is_invalid() {
    let stage = Stage::new().await;
    for way in Way::with_chunks() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        for (offset, len) in [(0, 0), (SIZE, 0), (SIZE, 1), (0, SIZE + 1), (u64::MAX, 2)] {
            let refused = peer.ask(command::BLOCK_STATUS, 0, offset, len).await;
            assert_eq!(refused.error, error::EINVAL, "{len} at {offset}");
        }
        peer.is_in_step_again().await;
    }
}
