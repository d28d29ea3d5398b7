//! "NBD_OPT_INFO and NBD_OPT_GO", "NBD_REP_INFO", "NBD_INFO_BLOCK_SIZE".

use nbd_server::wire::{Fields, info, option, reply};

use crate::peer::{OptionReply, Peer, go, told};
use crate::stage::{SIZE, STRIPES, Stage, Transport, Way};

/// The data of the information of one type, which must be there exactly once.
fn item(replies: &[OptionReply], kind: u16) -> &[u8] {
    let of_kind =
        |(reply, data): &&OptionReply| *reply == reply::INFO && data[..2] == kind.to_be_bytes();
    let found: Vec<_> = replies.iter().filter(of_kind).collect();
    let [(_, data)] = found[..] else { panic!("not once {kind}: {replies:?}") };
    &data[2..]
}

#[tokio::test]
async fn size_and_flags_are_told_whether_asked_for_or_not() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::haggling(&stage, way).await;
        for wanted in [&[][..], &[info::EXPORT], &[info::NAME], &[99, 0xffff]] {
            let replies = peer.option(option::INFO, &go("disk", wanted)).await;
            assert_eq!(replies.last().unwrap().0, reply::ACK);
            assert_eq!(told(&replies).size_bytes, SIZE);
        }
    }
}

#[tokio::test]
async fn every_item_can_be_asked_for_and_unknown_ones_are_ignored() {
    let stage = Stage::new().await;
    let wanted = [4096, info::BLOCK_SIZE, info::DESCRIPTION, 77, info::NAME, info::EXPORT];
    for transport in Transport::ALL {
        let mut peer = Peer::fixed(&stage, transport).await;
        // The default export has a name of its own.
        for name in ["disk", ""] {
            let replies = peer.option(option::INFO, &go(name, &wanted)).await;
            assert_eq!(replies.last().unwrap().0, reply::ACK);
            assert_eq!(item(&replies, info::NAME), b"disk");
            assert_eq!(item(&replies, info::DESCRIPTION), b"a disk");
            let mut sizes = Fields(item(&replies, info::BLOCK_SIZE));
            let mut next = || sizes.u32().unwrap();
            let (minimum, preferred, maximum) = (next(), next(), next());
            sizes.finish().unwrap();
            assert!(minimum.is_power_of_two() && minimum <= 1 << 16);
            assert!(preferred.is_power_of_two() && preferred >= minimum.max(512));
            assert!(maximum >= preferred && maximum >= 1 << 20);
            assert_eq!(SIZE % u64::from(minimum), 0);
        }
    }
}

#[tokio::test]
async fn go_tells_what_info_told() {
    let stage = Stage::new().await;
    let data = go("", &[info::NAME, info::DESCRIPTION, info::BLOCK_SIZE]);
    for way in Way::all() {
        for selects in [false, true] {
            let mut peer = Peer::haggling(&stage, way).await;
            if selects && way.headers.has_chunks() {
                peer.select("", &["base:allocation", STRIPES]).await;
            }
            let mut before = peer.option(option::INFO, &data).await;
            let mut entered = peer.option(option::GO, &data).await;
            before.sort();
            entered.sort();
            assert_eq!(before, entered);
            peer.is_in_step_again().await;
        }
    }
}

#[tokio::test]
async fn no_zeroes_follow_go() {
    let stage = Stage::new().await;
    for flags in [1, 3] {
        let mut peer = Peer::connect(&stage, Transport::Unix).await;
        peer.greet(flags).await;
        peer.go("disk").await;
        peer.is_in_step_again().await;
    }
}

#[tokio::test]
async fn an_export_that_is_not_there_is_unknown_and_haggling_goes_on() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::haggling(&stage, way).await;
        for asked in [option::INFO, option::GO, option::INFO] {
            assert_eq!(peer.only(asked, &go("none", &[info::NAME])).await, reply::ERR_UNKNOWN);
        }
        peer.go("fixed").await;
        peer.is_in_step_again().await;
    }
}

#[tokio::test]
async fn info_does_not_enter_transmission() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::haggling(&stage, way).await;
        for name in ["disk", "fixed", ""] {
            let replies = peer.option(option::INFO, &go(name, &[])).await;
            assert_eq!(replies.last().unwrap().0, reply::ACK);
            peer.is_in_step().await;
        }
    }
}

#[tokio::test]
async fn block_sizes_are_not_required() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::haggling(&stage, way).await;
        peer.go("disk").await;
        assert_eq!(peer.write(0, 511, &[3; 3]).await.error, 0);
        assert_eq!(peer.read(510, 5).await, [0, 3, 3, 3, 0]);
    }
}
