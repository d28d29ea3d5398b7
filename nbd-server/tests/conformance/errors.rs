//! "Error values", and what the request types say of errors.

use std::io;

use nbd_server::wire::{Headers, command, command_flag as flag, error};

use crate::device::Call;
use crate::peer::Peer;
use crate::stage::{SIZE, Stage, Way};

#[tokio::test]
async fn past_the_end_reading_is_invalid_and_writing_has_no_space() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        for (offset, len) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1), (u64::MAX - 511, 512)] {
            for (command, expected) in [
                (command::READ, error::EINVAL),
                (command::TRIM, error::EINVAL),
                (command::CACHE, error::EINVAL),
                (command::BLOCK_STATUS, error::EINVAL),
                (command::WRITE_ZEROES, error::ENOSPC),
            ] {
                let refused = peer.ask(command, 0, offset, len).await;
                assert_eq!(refused.error, expected, "{command} of {len} at {offset}");
            }
            let data = vec![1; usize::try_from(len).unwrap()];
            assert_eq!(peer.write(0, offset, &data).await.error, error::ENOSPC);
        }
        peer.is_in_step_again().await;
    }
    assert!(stage.disk.log().iter().all(|call| *call == Call::Flush), "judged at the border");
}

#[tokio::test]
async fn a_read_only_export_permits_no_change() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::entered(&stage, way, "fixed").await;
        for (offset, len) in [(0, 512), (SIZE - 512, 512), (SIZE, 512), (0, 0)] {
            for command in [command::TRIM, command::WRITE_ZEROES] {
                assert_eq!(peer.ask(command, 0, offset, len).await.error, error::EPERM);
            }
            let data = vec![1; usize::try_from(len).unwrap()];
            assert_eq!(peer.write(0, offset, &data).await.error, error::EPERM);
        }
        assert_eq!(peer.read(0, 512).await, [0; 512]);
    }
}

#[tokio::test]
async fn an_unknown_command_is_invalid_and_has_no_payload() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        for unknown in [command::RESIZE, 9, 1 << 15, u16::MAX] {
            for len in [0, 512, u64::from(u32::MAX)] {
                assert_eq!(peer.ask(unknown, 0, 0, len).await.error, error::EINVAL);
            }
        }
        peer.is_in_step_again().await;
    }
}

#[tokio::test]
async fn the_payload_of_a_refused_write_is_consumed() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        // As long as a request, and made of requests: whoever reads on in it would answer them.
        let payload = vec![0x25; 200_000];
        for (flags, offset) in [(flag::DF, 0), (0, SIZE), (0, u64::MAX), (1 << 15, 0)] {
            assert_ne!(peer.write(flags, offset, &payload).await.error, 0);
            peer.is_in_step_again().await;
        }
    }
}

#[tokio::test]
async fn errors_of_the_host_become_the_nearest_of_the_protocol() {
    for (kind, expected) in [
        (io::ErrorKind::StorageFull, error::ENOSPC),
        (io::ErrorKind::QuotaExceeded, error::ENOSPC),
        (io::ErrorKind::FileTooLarge, error::ENOSPC),
        (io::ErrorKind::Other, error::EIO),
    ] {
        let stage = Stage::new().await;
        for way in Way::all() {
            let mut peer = Peer::entered(&stage, way, "disk").await;
            stage.disk.fail(kind);
            let failed = peer.write(0, 0, &[1; 512]).await;
            assert_eq!(failed.error, expected, "{kind}");
            assert_eq!(failed.text.is_empty(), way.headers == Headers::Simple);
            assert!(!failed.text.contains("secret"));
        }
    }
}
