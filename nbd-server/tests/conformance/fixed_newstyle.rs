//! "Fixed newstyle negotiation", "Conventions" (strings), "NOTLS mode", "Baseline".

use nbd_server::wire::{self, Headers, MAX_STRING_BYTES, option, reply};

use crate::peer::{Peer, go, queries, sized};
use crate::stage::{Stage, Transport, Way};

#[tokio::test]
async fn an_unknown_option_is_unsupported_and_the_next_is_understood() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::haggling(&stage, way).await;
        for unknown in [0, option::PEEK_EXPORT, 12, 0x7fff_ffff, u32::MAX] {
            for data in [&b""[..], b"data", &[7; 300_000]] {
                assert_eq!(peer.only(unknown, data).await, reply::ERR_UNSUP);
            }
            peer.is_in_step().await;
        }
    }
}

#[tokio::test]
async fn what_is_no_option_ends_the_connection() {
    let stage = Stage::new().await;
    for transport in Transport::ALL {
        let mut peer = Peer::fixed(&stage, transport).await;
        let mut header = wire::OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        header.extend([0; 8]);
        peer.send(&header).await;
        peer.is_closed().await;
    }
}

#[tokio::test]
async fn data_where_none_belongs_is_invalid_and_without_effect() {
    let stage = Stage::new().await;
    for transport in Transport::ALL {
        let mut peer = Peer::fixed(&stage, transport).await;
        for bare in [option::LIST, option::STRUCTURED_REPLY, option::EXTENDED_HEADERS] {
            for data in [&b"x"[..], &[0; 100_000]] {
                assert_eq!(peer.only(bare, data).await, reply::ERR_INVALID);
            }
        }
        // Simple replies are what the peer expects now.
        peer.go("disk").await;
        assert_eq!(peer.read(0, 4096).await, [0; 4096]);
    }
}

#[tokio::test]
async fn options_may_come_twice_and_in_any_order() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::haggling(&stage, way).await;
        peer.negotiate(way.headers).await;
        for _ in 0..2 {
            peer.is_in_step().await;
            let info = peer.option(option::INFO, &go("fixed", &[])).await;
            assert_eq!(info.last().unwrap().0, reply::ACK);
        }
        peer.go("disk").await;
        peer.is_in_step_again().await;
    }
}

#[tokio::test]
async fn lengths_that_lie_are_invalid_and_exactly_the_option_is_consumed() {
    let stage = Stage::new().await;
    let mut beyond = go("disk", &[1, 2]);
    beyond[..4].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut many = go("disk", &[1, 2]);
    many[8..10].copy_from_slice(&u16::MAX.to_be_bytes());
    let mut few = go("disk", &[1, 2]);
    few[8..10].copy_from_slice(&[0, 1]);
    let mut countless = queries("disk", &["base:allocation"]);
    countless[8..12].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut short = queries("disk", &["base:allocation"]);
    short[12..16].copy_from_slice(&[0, 0, 0, 1]);
    let mut long = queries("disk", &["base:allocation"]);
    long[12..16].copy_from_slice(&[0, 0, 0, 200]);
    for way in Way::with_chunks() {
        let mut peer = Peer::haggling(&stage, way).await;
        for asked in [option::INFO, option::GO] {
            for data in [&b""[..], &[0; 5], &beyond, &many, &few] {
                assert_eq!(peer.only(asked, data).await, reply::ERR_INVALID);
            }
        }
        for asked in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
            for data in [&b""[..], &[0; 7], &beyond, &countless, &short, &long] {
                assert_eq!(peer.only(asked, data).await, reply::ERR_INVALID);
            }
        }
        peer.is_in_step().await;
    }
}

#[tokio::test]
async fn strings_are_utf_8_without_nul_of_at_most_4096_bytes() {
    let stage = Stage::new().await;
    let longest = [b'x'; MAX_STRING_BYTES];
    let too_long = [b'x'; MAX_STRING_BYTES + 1];
    for transport in Transport::ALL {
        let mut peer = Peer::fixed(&stage, transport).await;
        for asked in [option::INFO, option::GO] {
            let named = |name: &[u8]| [sized(name), vec![0, 0]].concat();
            for broken in [&b"a\0b"[..], b"\0", b"disk\0", b"\xff", b"\xc3", &too_long] {
                assert_eq!(peer.only(asked, &named(broken)).await, reply::ERR_INVALID);
            }
            for unknown in [&longest[..], "böse".as_bytes(), b"Disk", b" "] {
                assert_eq!(peer.only(asked, &named(unknown)).await, reply::ERR_UNKNOWN);
            }
        }
        peer.is_in_step().await;
    }
}

#[tokio::test]
async fn an_option_may_come_byte_by_byte() {
    let stage = Stage::new().await;
    let mut peer = Peer::fixed(&stage, Transport::Tcp).await;
    let mut bytes = wire::IHAVEOPT.to_be_bytes().to_vec();
    bytes.extend(option::INFO.to_be_bytes());
    let data = go("disk", &[1]);
    bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend(data);
    for byte in bytes {
        peer.send(&[byte]).await;
    }
    assert_eq!(peer.option_replies(option::INFO).await.last().unwrap().0, reply::ACK);
}

#[tokio::test]
async fn without_tls_starttls_is_refused_and_tls_is_never_required() {
    let stage = Stage::new().await;
    for transport in Transport::ALL {
        let mut peer = Peer::fixed(&stage, transport).await;
        let refused = peer.only(option::STARTTLS, &[]).await;
        assert!([reply::ERR_UNSUP, reply::ERR_POLICY].contains(&refused));
        for other in (2..14).filter(|one| ![option::ABORT, option::GO].contains(one)) {
            let replies = peer.option(other, &[]).await;
            assert_ne!(replies.last().unwrap().0, reply::ERR_TLS_REQD);
        }
        // They were among the options.
        peer.headers = Headers::Extended;
        peer.go("disk").await;
        peer.is_in_step_again().await;
    }
}
