//! "NBD_CMD_WRITE", "NBD_CMD_FLUSH", "NBD_CMD_TRIM", "NBD_CMD_CACHE", "NBD_CMD_WRITE_ZEROES", "Ordering of messages and
//! writes".

use block::ZeroMode;
use nbd_server::wire::{Headers, command, command_flag as flag, error};

use crate::device::Call;
use crate::peer::Peer;
use crate::stage::{SIZE, Stage, Way};

#[tokio::test]
async fn a_write_is_in_place_when_it_is_answered() {
    for way in Way::all() {
        let stage = Stage::new().await;
        let mut peer = Peer::entered(&stage, way, "disk").await;
        for (at, len) in [(0, 1), (4095, 2), (100_000, 70_000), (1 << 20, 0)] {
            let data: Vec<u8> = (0..len).map(|i: u32| u8::try_from(i % 251 + 1).unwrap()).collect();
            assert_eq!(peer.write(0, at, &data).await.error, 0);
            let from = usize::try_from(at).unwrap();
            assert!(stage.disk.bytes()[from..from + data.len()] == data);
        }
    }
}

#[tokio::test]
async fn a_request_about_nothing_is_answered() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        assert_eq!(peer.write(0, 0, &[]).await.error, 0);
        for command in [command::TRIM, command::CACHE, command::WRITE_ZEROES] {
            assert_eq!(peer.ask(command, 0, 0, 0).await.error, 0);
        }
        peer.is_in_step_again().await;
    }
}

#[tokio::test]
async fn replies_may_overtake_but_carry_the_cookie_of_their_request() {
    for way in Way::all() {
        let stage = Stage::new().await;
        let mut peer = Peer::entered(&stage, way, "disk").await;
        stage.disk.hold(|call| matches!(call, Call::Write(..)));
        let first = peer.start_write(0, 0, &[1; 512]).await;
        let second = peer.start(command::READ, 0, 4096, 512).await;
        assert_ne!(first.cookie, second.cookie);
        let (index, read) = peer.reply(&[first, second]).await;
        assert_eq!((index, read.error), (1, 0));
        stage.disk.release();
        assert_eq!(peer.reply(&[first]).await.1.error, 0);
    }
}

#[tokio::test]
async fn a_cookie_is_opaque() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        for cookie in [0, 1, u64::MAX, 0x6744_6698_0000_0000] {
            let asked = peer.start(command::READ, 0, 0, 512).await;
            assert_eq!(peer.reply(&[asked]).await.1.error, 0);
            let asked = crate::peer::Asked { cookie, ..asked };
            peer.send_header(&asked).await;
            assert_eq!(peer.reply(&[asked]).await.1.data, [0; 512]);
        }
    }
}

#[tokio::test]
async fn a_flush_waits_for_every_write_that_was_answered() {
    for way in Way::all() {
        let stage = Stage::new().await;
        let mut peer = Peer::entered(&stage, way, "disk").await;
        assert_eq!(peer.write(0, 0, &[1; 512]).await.error, 0);
        assert_eq!(peer.ask(command::WRITE_ZEROES, 0, 4096, 512).await.error, 0);
        stage.disk.hold(|call| *call == Call::Flush);
        let flush = peer.start(command::FLUSH, 0, 0, 0).await;
        stage.disk.held(1).await;
        // Until the device is through, nothing is said of it.
        let read = peer.start(command::READ, 0, 0, 512).await;
        assert_eq!(peer.reply(&[flush, read]).await.0, 1);
        stage.disk.release();
        assert_eq!(peer.reply(&[flush]).await.1.error, 0);
        assert!(matches!(stage.disk.log()[..3], [Call::Write(..), Call::Zeroes(..), Call::Flush]));
    }
}

#[tokio::test]
async fn a_flush_takes_no_range() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        for (offset, len) in [(512, 0), (0, 512), (u64::MAX, 1)] {
            assert_eq!(peer.ask(command::FLUSH, 0, offset, len).await.error, error::EINVAL);
        }
        peer.is_in_step_again().await;
    }
}

#[tokio::test]
async fn zeroes_read_as_zeroes_whatever_their_flags() {
    for way in Way::all() {
        let stage = Stage::new().await;
        let mut peer = Peer::entered(&stage, way, "disk").await;
        for (flags, keep_allocated, fast_only) in [
            (0, false, false),
            (flag::NO_HOLE, true, false),
            (flag::FAST_ZERO, false, true),
            (flag::NO_HOLE | flag::FAST_ZERO, true, true),
        ] {
            assert_eq!(peer.write(0, 0, &[9; 16 << 10]).await.error, 0);
            assert_eq!(peer.ask(command::WRITE_ZEROES, flags, 4096, 8192).await.error, 0);
            let expected = [[9; 4096], [0; 4096], [0; 4096], [9; 4096]].concat();
            assert!(peer.read(0, 16 << 10).await == expected);
            let asked = stage.disk.log().into_iter().rev().find_map(|call| match call {
                Call::Zeroes(_, _, mode, _) => Some(mode),
                _ => None,
            });
            assert_eq!(asked, Some(ZeroMode { keep_allocated, fast_only }));
        }
    }
}

#[tokio::test]
async fn fast_zeroes_that_would_be_slow_change_nothing() {
    for way in Way::all() {
        let stage = Stage::new().await;
        let mut peer = Peer::entered(&stage, way, "disk").await;
        assert_eq!(peer.write(0, 0, &[9; 8192]).await.error, 0);
        // The device is slow at less than a block.
        let refused = peer.ask(command::WRITE_ZEROES, flag::FAST_ZERO, 100, 1000).await;
        assert_eq!(refused.error, error::ENOTSUP);
        assert_eq!(peer.read(0, 8192).await, [9; 8192]);
        // Without the flag that is no error.
        assert_eq!(peer.ask(command::WRITE_ZEROES, 0, 100, 1000).await.error, 0);
        assert_eq!(peer.read(99, 1002).await, [&[9][..], &[0; 1000], &[9]].concat());
    }
}

#[tokio::test]
async fn fast_zeroes_are_never_too_long() {
    for way in Way::all() {
        let stage = Stage::new().await;
        let mut peer = Peer::entered(&stage, way, "giant").await;
        let len = if way.headers == Headers::Extended { 1 << 45 } else { u64::from(u32::MAX) };
        let reply = peer.ask(command::WRITE_ZEROES, flag::FAST_ZERO, 4096, len).await;
        assert_eq!(reply.error, 0, "the device is fast at it");
        assert_eq!(stage.giant.changes().len(), 1);
    }
}

#[tokio::test]
async fn a_cache_request_changes_nothing_but_speed() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        assert_eq!(peer.write(0, 0, &[3; 512]).await.error, 0);
        assert_eq!(peer.ask(command::CACHE, 0, 0, SIZE).await.error, 0);
        assert_eq!(peer.read(0, 512).await, [3; 512]);
    }
}

#[tokio::test]
async fn a_trim_leaves_what_lies_beside_it() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        assert_eq!(peer.write(0, 0, &[3; 16 << 10]).await.error, 0);
        assert_eq!(peer.ask(command::TRIM, 0, 4000, 8000).await.error, 0);
        let read = peer.read(0, 16 << 10).await;
        assert!(read[..4000].iter().chain(&read[12_000..]).all(|byte| *byte == 3));
    }
}
