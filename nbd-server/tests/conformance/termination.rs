//! "Termination of the session during option haggling", "Terminating the transmission phase", "NBD_CMD_DISC".

use std::time::Duration;

use nbd_server::wire::{Headers, command, command_flag as flag, error, option, reply};
use nbd_server::{Limits, ServerConfig};

use crate::device::Call;
use crate::peer::{Asked, Peer, go};
use crate::stage::{SIZE, Stage, Transport, Way};

/// Longer than any test.
const GRACE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_stopping_server_refuses_options_but_acknowledges_an_abort() {
    for transport in Transport::ALL {
        let stage = Stage::new().await;
        let mut peer = Peer::fixed(&stage, transport).await;
        let server = stage.server.clone();
        let stopping = tokio::spawn(async move { server.shutdown(GRACE).await });
        while peer.option(option::LIST, &[]).await.last().unwrap().0 == reply::ACK {
            tokio::task::yield_now().await;
        }
        for (asked, data) in [
            (option::LIST, Vec::new()),
            (option::STRUCTURED_REPLY, Vec::new()),
            (option::EXTENDED_HEADERS, Vec::new()),
            (option::INFO, go("disk", &[])),
            (option::GO, go("disk", &[])),
        ] {
            assert_eq!(peer.only(asked, &data).await, reply::ERR_SHUTDOWN);
        }
        assert_eq!(peer.only(option::ABORT, &[]).await, reply::ACK);
        peer.is_closed().await;
        assert_eq!(stopping.await.unwrap().dropped_connections, 0);
    }
}

#[tokio::test]
async fn a_client_that_hangs_up_anywhere_hurts_nobody() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut stays = Peer::entered(&stage, way, "disk").await;
        drop(Peer::connect(&stage, way.transport).await);
        drop(Peer::fixed(&stage, way.transport).await);
        let mut half = Peer::fixed(&stage, way.transport).await;
        half.send(b"IHAVEOPT\0\0").await;
        drop(half);
        let mut owed = Peer::entered(&stage, way, "disk").await;
        for _ in 0..64 {
            owed.start(command::READ, 0, 0, SIZE).await;
        }
        drop(owed);
        let mut payload = Peer::entered(&stage, way, "disk").await;
        payload.start(command::WRITE, write_flags(way), 0, 4096).await;
        payload.send(&[7; 100]).await;
        drop(payload);
        stays.is_in_step_again().await;
        assert_eq!(stays.read(0, 4096).await, [0; 4096], "half a payload is not written");
    }
}

fn write_flags(way: Way) -> u16 {
    if way.headers == Headers::Extended { flag::PAYLOAD_LEN } else { 0 }
}

#[tokio::test]
async fn disc_finishes_what_was_asked_before_it_and_has_no_reply_of_its_own() {
    for way in Way::all() {
        let stage = Stage::new().await;
        let mut peer = Peer::entered(&stage, way, "disk").await;
        let mut pending = Vec::new();
        for at in 0..32 {
            pending.push(peer.start_write(0, at * 4096, &[9; 4096]).await);
        }
        peer.start(command::DISC, 0, 0, 0).await;
        while !pending.is_empty() {
            let (index, reply) = peer.reply(&pending).await;
            assert_eq!(reply.error, 0);
            pending.swap_remove(index);
        }
        peer.is_closed().await;
        assert!(stage.disk.bytes()[..32 * 4096].iter().all(|byte| *byte == 9));
    }
}

#[tokio::test]
async fn nothing_else_in_a_disc_matters() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        let odd = Asked {
            command: command::DISC,
            flags: flag::FUA | 1 << 15,
            cookie: u64::MAX,
            offset: u64::MAX,
            len: u64::from(u32::MAX),
        };
        peer.send_header(&odd).await;
        peer.is_closed().await;
    }
}

#[tokio::test]
async fn what_is_no_request_ends_the_connection() {
    let stage = Stage::new().await;
    for way in Way::all() {
        // The historic magic number, and that of the other kind of headers.
        for magic in [0x1256_0953_u32, 0x2560_9514, 0] {
            let mut peer = Peer::entered(&stage, way, "disk").await;
            peer.send(&[&magic.to_be_bytes()[..], &[0; 28]].concat()).await;
            peer.is_closed().await;
        }
        let mut peer = Peer::entered(&stage, way, "disk").await;
        peer.headers = match way.headers {
            Headers::Extended => Headers::Structured,
            _ => Headers::Extended,
        };
        peer.start(command::READ, 0, 0, 512).await;
        peer.send(&[0; 32]).await;
        peer.is_closed().await;
    }
}

#[tokio::test]
async fn what_was_sent_before_a_stop_gets_one_reply_each() {
    for way in Way::all() {
        // One request at a time is let in: the others have been sent, but not read.
        let mut limits = Limits::default();
        limits.in_flight_requests = 1;
        let stage = Stage::with(ServerConfig::with_limits(limits)).await;
        let mut peer = Peer::entered(&stage, way, "disk").await;
        stage.disk.hold(|call| matches!(call, Call::Write(..)));
        let mut pending = vec![peer.start_write(0, 0, &[5; 512]).await];
        stage.disk.held(1).await;
        for at in 0..100 {
            pending.push(peer.start(command::READ, 0, at * 512, 512).await);
        }
        let server = stage.server_of(way.transport).await;
        let mut haggling = Peer::fixed(&stage, way.transport).await;
        let stopping = tokio::spawn(async move { server.shutdown(GRACE).await });
        while haggling.option(option::LIST, &[]).await.last().unwrap().0 != reply::ERR_SHUTDOWN {}
        stage.disk.release();
        while !pending.is_empty() {
            let (index, reply) = peer.reply(&pending).await;
            let was_begun = pending.swap_remove(index).command == command::WRITE;
            assert_eq!(reply.error, if was_begun { 0 } else { error::ESHUTDOWN });
        }
        peer.is_closed().await;
        drop(haggling);
        assert_eq!(stopping.await.unwrap().dropped_connections, 0);
    }
}

#[tokio::test]
async fn a_stopping_server_answers_what_it_has_and_refuses_the_rest() {
    for way in Way::all() {
        let stage = Stage::new().await;
        let mut peer = Peer::entered(&stage, way, "disk").await;
        stage.disk.hold(|call| matches!(call, Call::Write(..)));
        let held = peer.start_write(0, 0, &[5; 512]).await;
        stage.disk.held(1).await;
        let server = stage.server_of(way.transport).await;
        let stopping = tokio::spawn(async move { server.shutdown(GRACE).await });
        loop {
            let late = peer.start(command::READ, 0, 0, 512).await;
            let (index, reply) = peer.reply(&[held, late]).await;
            assert_eq!(index, 1, "the write is held");
            if reply.error != 0 {
                assert_eq!(reply.error, error::ESHUTDOWN);
                break;
            }
        }
        stage.disk.release();
        let (_, written) = peer.reply(&[held]).await;
        assert_eq!(written.error, 0);
        peer.is_closed().await;
        assert_eq!(stopping.await.unwrap().dropped_connections, 0);
    }
}
