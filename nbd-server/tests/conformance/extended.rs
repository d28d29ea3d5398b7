//! The extension `EXTENDED_HEADERS` (`doc/proto.md` on the branch `extension-ext-header`): "NBD_OPT_EXTENDED_HEADERS",
//! "Request message", "Extended reply chunk message", "NBD_REPLY_TYPE_BLOCK_STATUS_EXT", the payload of
//! "NBD_CMD_BLOCK_STATUS". What every reply must keep with extended headers is judged in `peer`.

use nbd_server::wire::{Headers, chunk, command, command_flag as flag, error, option, reply};

use crate::peer::{Peer, Reply, judge_extents};
use crate::stage::{CRUMB, CRUMBS, GIANT, SIZE, STRIPE, STRIPES, Stage, Transport, Way};

fn ways() -> impl Iterator<Item = Way> {
    Way::with([Headers::Extended])
}

#[tokio::test]
async fn extended_headers_win_over_structured_replies() {
    let stage = Stage::new().await;
    for transport in Transport::ALL {
        for first in [None, Some(option::STRUCTURED_REPLY)] {
            let mut peer = Peer::fixed(&stage, transport).await;
            if let Some(first) = first {
                assert_eq!(peer.only(first, &[]).await, reply::ACK);
            }
            peer.negotiate(Headers::Extended).await;
            let late = peer.only(option::STRUCTURED_REPLY, &[]).await;
            assert_eq!(late, reply::ERR_EXT_HEADER_REQD);
            peer.go("disk").await;
            assert_eq!(peer.read(0, 512).await, [0; 512]);
        }
    }
}

#[tokio::test]
async fn export_name_is_over_with_extended_headers() {
    let stage = Stage::new().await;
    for way in ways() {
        let mut peer = Peer::haggling(&stage, way).await;
        peer.send_option(option::EXPORT_NAME, b"disk").await;
        peer.is_closed().await;
    }
}

#[tokio::test]
async fn contexts_need_no_structured_replies_beside_extended_headers() {
    let stage = Stage::new().await;
    for way in ways() {
        let mut peer = Peer::haggling(&stage, way).await;
        assert_eq!(peer.select("disk", &[STRIPES]).await.len(), 1);
        peer.go("disk").await;
        assert_eq!(peer.ask(command::BLOCK_STATUS, 0, 0, 512).await.error, 0);
    }
}

#[tokio::test]
async fn success_without_data_is_a_chunk_too() {
    let stage = Stage::new().await;
    for way in ways() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        for command in [command::TRIM, command::CACHE, command::WRITE_ZEROES] {
            let done = peer.ask(command, 0, 4096, 512).await;
            assert_eq!((done.error, &done.chunks[..]), (0, &[chunk::NONE][..]));
        }
    }
}

#[tokio::test]
async fn lengths_without_payload_reach_over_the_whole_export() {
    for way in ways() {
        let stage = Stage::new().await;
        let mut peer = Peer::entered(&stage, way, "giant").await;
        for command in [command::TRIM, command::WRITE_ZEROES, command::CACHE] {
            assert_eq!(peer.ask(command, 0, 0, GIANT).await.error, 0);
            assert_eq!(peer.ask(command, 0, 1 << 33, 1 << 45).await.error, 0);
        }
        let range = |start, len| block::ByteRange::new(start, len).unwrap();
        let (all, part) = (range(0, GIANT), range(1 << 33, 1 << 45));
        let expected = [("discard", all), ("discard", part), ("zeroes", all), ("zeroes", part)];
        assert_eq!(stage.giant.changes(), expected);
        let told = peer.ask(command::BLOCK_STATUS, 0, 0, GIANT).await;
        assert_eq!(told.status, [(1, vec![(GIANT, 3)])], "one extent of 64 TiB");
    }
}

#[tokio::test]
async fn a_status_over_terabytes_of_crumbs_ends_early_and_can_be_asked_on() {
    for way in ways() {
        let stage = Stage::new().await;
        let mut peer = Peer::haggling(&stage, way).await;
        let id = peer.select("giant", &[CRUMBS]).await[0].0;
        peer.go("giant").await;
        let told = peer.ask(command::BLOCK_STATUS, 0, 0, GIANT).await;
        let [(found, extents)] = &told.status[..] else { panic!("{told:?}") };
        assert_eq!(*found, id);
        assert_eq!(extents[..], [(stage.giant.crumbs() * CRUMB, 7)], "one extent of what is known");
        assert!(extents[0].0 < GIANT, "not all of it at once");
        let next = peer.ask(command::BLOCK_STATUS, 0, extents[0].0, 10).await;
        assert_eq!(next.status, [(id, vec![(10, 7)])]);
    }
}

#[tokio::test]
async fn lengths_past_the_end_are_refused_however_long() {
    let stage = Stage::new().await;
    for way in ways() {
        let mut peer = Peer::entered(&stage, way, "giant").await;
        for (offset, len) in [(0, GIANT + 1), (GIANT - 1, 2), (1, u64::MAX), (u64::MAX, u64::MAX)] {
            for (command, expected) in [
                (command::READ, error::EINVAL),
                (command::TRIM, error::EINVAL),
                (command::CACHE, error::EINVAL),
                (command::BLOCK_STATUS, error::EINVAL),
                (command::WRITE_ZEROES, error::ENOSPC),
            ] {
                assert_eq!(peer.ask(command, 0, offset, len).await.error, expected);
            }
        }
        let long = peer.ask(command::READ, 0, 0, 1 << 40).await;
        assert_eq!(long.error, error::EOVERFLOW);
        peer.is_in_step_again().await;
        assert_eq!(stage.giant.changes(), []);
    }
}

#[tokio::test]
async fn a_payload_where_none_belongs_is_consumed_and_invalid() {
    let stage = Stage::new().await;
    for way in ways() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        // Requests that an inattentive server would answer.
        let payload = vec![0x21; 70_000];
        for command in [command::READ, command::FLUSH, command::TRIM, command::CACHE, 6, 8, 99] {
            for len in [0, 1, 32, payload.len()] {
                let asked = peer.start(command, flag::PAYLOAD_LEN, 0, len as u64).await;
                peer.send(&payload[..len]).await;
                let (_, refused) = peer.reply(&[asked]).await;
                assert_eq!(refused.error, error::EINVAL, "command {command}, {len} bytes");
            }
        }
        peer.is_in_step_again().await;
    }
}

#[tokio::test]
async fn compact_headers_know_no_announced_payload() {
    let stage = Stage::new().await;
    for way in Way::with([Headers::Simple, Headers::Structured]) {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        for command in [command::READ, command::TRIM, command::BLOCK_STATUS] {
            let refused = peer.ask(command, flag::PAYLOAD_LEN, 0, 512).await;
            assert_eq!(refused.error, error::EINVAL);
        }
        // A write has its payload in any case.
        let refused = peer.write(flag::PAYLOAD_LEN, 0, &[1; 512]).await;
        assert_eq!(refused.error, error::EINVAL);
        assert_eq!(peer.read(0, 512).await, [0; 512]);
    }
}

#[tokio::test]
async fn a_write_that_forgets_to_announce_its_payload_has_one_all_the_same() {
    // QEMU's client is like that.
    let stage = Stage::new().await;
    for way in ways() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        let asked = peer.start(command::WRITE, 0, 4096, 512).await;
        peer.send(&[6; 512]).await;
        assert_eq!(peer.reply(&[asked]).await.1.error, 0);
        assert_eq!(peer.read(4096, 512).await, [6; 512]);
    }
}

#[tokio::test]
async fn a_payload_beyond_every_maximum_ends_the_connection() {
    let stage = Stage::new().await;
    for way in ways() {
        for command in [command::WRITE, command::READ, command::BLOCK_STATUS, 99] {
            for len in [(32 << 20) + 1, 1 << 32, u64::MAX] {
                let mut peer = Peer::entered(&stage, way, "giant").await;
                let asked = peer.start(command, flag::PAYLOAD_LEN, 0, len).await;
                assert_eq!(peer.reply(&[asked]).await.1.error, error::EINVAL);
                peer.is_closed().await;
            }
        }
    }
}

/// A BLOCK_STATUS at `offset` about `len` bytes in some of the contexts.
async fn filtered(peer: &mut Peer, flags: u16, offset: u64, len: u64, ids: &[u32]) -> Reply {
    let mut payload = len.to_be_bytes().to_vec();
    ids.iter().for_each(|id| payload.extend(id.to_be_bytes()));
    let flags = flags | flag::PAYLOAD_LEN;
    let asked = peer.start(command::BLOCK_STATUS, flags, offset, payload.len() as u64).await;
    peer.send(&payload).await;
    let reply = peer.reply(&[asked]).await.1;
    for (_, extents) in &reply.status {
        judge_extents(&asked, len, extents);
    }
    reply
}

#[tokio::test]
async fn a_status_payload_limits_the_reply_to_the_contexts_it_names() {
    let stage = Stage::new().await;
    for way in ways() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        let ids = |reply: &Reply| reply.status.iter().map(|(id, _)| *id).collect::<Vec<_>>();
        for wanted in [&[1][..], &[2], &[2, 1], &[1, 2]] {
            let told = filtered(&mut peer, 0, 0, SIZE, wanted).await;
            assert_eq!((told.error, &ids(&told)[..]), (0, wanted), "{}", told.text);
        }
        let told = filtered(&mut peer, 0, STRIPE - 4, 8, &[2]).await;
        assert_eq!(told.status, [(2, vec![(4, 0), (4, 1)])], "the length in the payload counts");
        let told = filtered(&mut peer, flag::REQ_ONE, STRIPE - 4, 8, &[2]).await;
        assert_eq!(told.status, [(2, vec![(4, 0)])]);
    }
}

#[tokio::test]
async fn a_status_payload_of_another_kind_is_consumed_and_invalid() {
    let stage = Stage::new().await;
    for way in ways() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        for ids in [&[][..], &[3], &[0], &[1, 1], &[1, 2, 3], &[1; 1000]] {
            let refused = filtered(&mut peer, 0, 0, SIZE, ids).await;
            assert_eq!(refused.error, error::EINVAL, "{ids:?}");
        }
        for (offset, len) in [(0, 0), (0, SIZE + 1), (SIZE, 1), (u64::MAX, u64::MAX)] {
            let refused = filtered(&mut peer, 0, offset, len, &[1]).await;
            assert_eq!(refused.error, error::EINVAL);
        }
        for len in [0, 1, 7, 9, 11, 13, 100_000] {
            let flags = flag::PAYLOAD_LEN;
            let asked = peer.start(command::BLOCK_STATUS, flags, 0, len as u64).await;
            peer.send(&vec![0; len]).await;
            assert_eq!(peer.reply(&[asked]).await.1.error, error::EINVAL, "{len} bytes");
        }
        peer.is_in_step_again().await;
    }
}

#[tokio::test]
async fn a_status_payload_without_a_selection_is_consumed_and_invalid() {
    let stage = Stage::new().await;
    for way in ways() {
        let mut peer = Peer::haggling(&stage, way).await;
        peer.go("disk").await;
        assert_eq!(filtered(&mut peer, 0, 0, 512, &[1]).await.error, error::EINVAL);
        peer.is_in_step_again().await;
    }
}
