//! "Transmission flags", "Command flags".

use nbd_server::wire::{Headers, command, command_flag as flag, error, transmission_flag as told};

use crate::device::Call;
use crate::peer::Peer;
use crate::stage::{STRIPES, Stage, Way};

#[tokio::test]
async fn flags_offer_what_works_in_this_mode_and_nothing_else() {
    let stage = Stage::new().await;
    for way in Way::all() {
        for export in ["disk", "fixed"] {
            let mut peer = Peer::haggling(&stage, way).await;
            let flags = peer.go(export).await.flags;
            let has = |bit| flags & bit != 0;
            let fixed = export == "fixed";
            assert!(has(told::HAS_FLAGS) && has(told::SEND_FLUSH) && has(told::SEND_FUA));
            assert!(has(told::SEND_CACHE) && has(told::CAN_MULTI_CONN));
            assert_eq!(has(told::READ_ONLY), fixed);
            assert_eq!(has(told::SEND_TRIM), !fixed);
            assert_eq!(has(told::SEND_WRITE_ZEROES), !fixed);
            assert_eq!(has(told::SEND_FAST_ZERO), !fixed, "only with WRITE_ZEROES");
            assert_eq!(has(told::SEND_DF), way.headers.has_chunks());
            assert!(!has(told::SEND_RESIZE), "an experiment that is not built");
            assert!(!has(told::BLOCK_STATUS_PAYLOAD), "nothing is selected");
            assert_eq!(flags >> 13, 0, "bits that mean nothing");
        }
    }
}

#[tokio::test]
async fn a_payload_for_block_status_is_offered_with_extended_headers_and_contexts() {
    let stage = Stage::new().await;
    for way in Way::with_chunks() {
        let mut peer = Peer::haggling(&stage, way).await;
        peer.select("disk", &[STRIPES]).await;
        let offered = peer.go("disk").await.flags & told::BLOCK_STATUS_PAYLOAD != 0;
        assert_eq!(offered, way.headers == Headers::Extended);
    }
}

/// Every command with a length that it takes.
const COMMANDS: [(u16, u64); 6] = [
    (command::READ, 512),
    (command::FLUSH, 0),
    (command::TRIM, 512),
    (command::CACHE, 512),
    (command::WRITE_ZEROES, 512),
    (command::BLOCK_STATUS, 512),
];

#[tokio::test]
async fn fua_is_taken_on_every_command() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        for (command, len) in COMMANDS {
            if command == command::BLOCK_STATUS && !way.headers.has_chunks() {
                continue;
            }
            assert_eq!(peer.ask(command, flag::FUA, 0, len).await.error, 0, "command {command}");
        }
        assert_eq!(peer.write(flag::FUA, 0, &[1; 512]).await.error, 0);
    }
}

#[tokio::test]
async fn fua_reaches_the_device_with_what_it_is_about() {
    use block::Durability::{Deferred, Durable};
    for way in Way::all() {
        let stage = Stage::new().await;
        let mut peer = Peer::entered(&stage, way, "disk").await;
        for flags in [0, flag::FUA] {
            assert_eq!(peer.write(flags, 0, &[1; 512]).await.error, 0);
            assert_eq!(peer.ask(command::WRITE_ZEROES, flags, 0, 512).await.error, 0);
            assert_eq!(peer.ask(command::TRIM, flags, 0, 512).await.error, 0);
        }
        let mode = block::ZeroMode::default();
        let expected = [
            Call::Write(0, 512, Deferred),
            Call::Zeroes(0, 512, mode, Deferred),
            Call::Discard(0, 512, Deferred),
            Call::Write(0, 512, Durable),
            Call::Zeroes(0, 512, mode, Durable),
            Call::Discard(0, 512, Durable),
        ];
        assert_eq!(stage.disk.log(), expected);
    }
}

#[tokio::test]
async fn a_flag_that_is_unknown_or_of_another_command_is_invalid() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        for (command, len) in COMMANDS {
            let own = match command {
                command::READ if way.headers.has_chunks() => flag::DF,
                command::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
                command::BLOCK_STATUS => flag::REQ_ONE,
                _ => 0,
            };
            let allowed = own | flag::FUA;
            // PAYLOAD_LEN has a module of its own.
            for bit in (0..16).map(|bit| 1 << bit).filter(|bit| bit & flag::PAYLOAD_LEN == 0) {
                if allowed & bit == 0 {
                    let refused = peer.ask(command, bit, 0, len).await;
                    assert_eq!(refused.error, error::EINVAL, "{command} with {bit:#x}");
                }
            }
        }
        for bit in [flag::NO_HOLE, flag::DF, flag::REQ_ONE, flag::FAST_ZERO, 1 << 15] {
            assert_eq!(peer.write(bit, 0, &[1; 512]).await.error, error::EINVAL);
        }
        peer.is_in_step_again().await;
    }
    assert!(stage.disk.bytes().iter().all(|byte| *byte == 0), "what is refused has no effect");
}

#[tokio::test]
async fn a_flush_on_one_connection_covers_what_another_was_told_is_done() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut writer = Peer::entered(&stage, way, "disk").await;
        let mut other = Peer::entered(&stage, way, "disk").await;
        assert_eq!(writer.write(0, 0, &[1; 512]).await.error, 0);
        assert_eq!(other.read(0, 512).await, [1; 512]);
        let before = stage.disk.log().len();
        other.is_in_step_again().await;
        assert_eq!(stage.disk.log()[before..], [Call::Flush], "of the device that they share");
    }
}
