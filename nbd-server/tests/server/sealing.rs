//! What clients see while an export is being sealed: the writer the end of its connection only behind it, and others
//! what is sealed.

use std::sync::Arc;
use std::time::Duration;

use nbd_server::wire::{self, command, error, option, transmission_flag};
use nbd_server::{Export, Limits, Peer, Server, ServerConfig};
use tokio::io::AsyncReadExt;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::device::{Call, TestDevice};
use crate::raw::{Raw, go};

const SIZE: u64 = 1 << 20;

fn server(shape: impl FnOnce(Export) -> Export) -> (Server, Arc<TestDevice>) {
    let device = TestDevice::new(SIZE);
    let server = Server::new(ServerConfig::with_limits(Limits::default()));
    let export = Export::new("disk", Arc::clone(&device) as _).seal_on_disconnect(true);
    server.add_export(shape(export)).unwrap();
    (server, device)
}

async fn greeted(server: &Server) -> Raw {
    let mut raw = Raw::of(server, Peer::Unix { uid: 1 });
    raw.greet(3).await;
    raw
}

/// A client that has written, and said goodbye, while the device does not flush.
async fn leaving(server: &Server, device: &TestDevice) -> Raw {
    let mut raw = greeted(server).await;
    raw.go("disk").await;
    raw.request(command::WRITE, 0, 1, 0, 3).await;
    raw.send(b"abc").await;
    assert_eq!(raw.reply().await.error, 0);
    device.hold(|call| *call == Call::Flush);
    raw.request(command::DISC, 0, 0, 0, 0).await;
    device.held(1).await;
    raw
}

/// A client that reads what was written, of an export that it must find sealed.
async fn reads_sealed(mut raw: Raw) {
    let entered = raw.go("disk").await;
    assert_ne!(entered.flags & transmission_flag::READ_ONLY, 0);
    raw.request(command::READ, 0, 1, 0, 3).await;
    assert_eq!(raw.reply_of(3).await.content[0].1, b"abc");
    raw.request(command::WRITE, 0, 2, 0, 3).await;
    raw.send(b"xyz").await;
    assert_eq!(raw.reply().await.error, error::EPERM);
}

fn end_of(mut raw: Raw) -> JoinHandle<()> {
    tokio::spawn(async move {
        assert!(raw.rest().await.is_empty());
    })
}

async fn settle() {
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_writer_that_has_seen_its_end_finds_the_export_sealed() {
    // Where there is one place, it is free then.
    for places in [1, 5] {
        let (server, device) = server(|export| export.max_connections(places));
        let end = end_of(leaving(&server, &device).await);
        settle().await;
        assert!(!end.is_finished(), "the client was told before it was done");
        device.release();
        end.await.unwrap();
        assert!(server.exports()[0].is_sealed);
        reads_sealed(greeted(&server).await).await;
    }
}

#[tokio::test]
async fn who_comes_while_an_export_is_being_sealed_waits_for_it() {
    for places in [1, 5] {
        let (server, device) = server(|export| export.max_connections(places));
        // One that does not wait for its end.
        drop(leaving(&server, &device).await);
        let name = b"\0\0\0\x04disk\0\0\0\0";
        let mut newcomers = Vec::new();
        // The first of them alone where there is one place.
        for (option, data) in [
            (option::GO, &go("disk")[..]),
            (option::INFO, &go("disk")),
            (option::LIST_META_CONTEXT, name),
            (option::SET_META_CONTEXT, name),
        ]
        .into_iter()
        .take(places)
        {
            let mut raw = greeted(&server).await;
            raw.option(option::STRUCTURED_REPLY, &[]).await;
            raw.send_option(option, data).await;
            newcomers.push((option, raw));
        }
        // What is sent behind the option is not lost.
        let mut pipelined = greeted(&server).await;
        if places > 1 {
            pipelined.send_option(option::EXPORT_NAME, b"disk").await;
            pipelined.request(command::FLUSH, 0, 77, 0, 0).await;
        }
        settle().await;
        assert_eq!(server.exports()[0].connections, 1, "only the one that seals it");
        device.release();
        for (option, mut raw) in newcomers {
            loop {
                let (kind, text) = raw.option_reply(option).await;
                assert_eq!(kind >> 31, 0, "{option}: {}", String::from_utf8_lossy(&text));
                if kind == wire::reply::ACK {
                    break;
                }
            }
        }
        if places > 1 {
            pipelined.take(10).await;
            assert_eq!(pipelined.reply().await.cookie, 77);
        }
        drop(pipelined);
        while server.exports()[0].connections > 0 {
            tokio::task::yield_now().await;
        }
        reads_sealed(greeted(&server).await).await;
    }
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_for_ever_for_an_export_to_be_sealed() {
    let (server, device) = server(|export| export);
    let begun = Instant::now();
    let patience = Limits::default().handshake_timeout / 2;
    let mut writer = leaving(&server, &device).await;
    let mut other = greeted(&server).await;
    let replies = other.option(option::GO, &go("disk")).await;
    assert_eq!(replies[0].0, wire::reply::ERR_POLICY);
    assert_eq!(replies[0].1, b"the export is being sealed behind its writer; try again");
    assert!(begun.elapsed() >= patience);
    // From now on it is told at once.
    let again = Instant::now();
    assert_eq!(other.option(option::INFO, &go("disk")).await[0].0, wire::reply::ERR_POLICY);
    assert_eq!(again.elapsed(), Duration::ZERO);
    assert_eq!(writer.stream.read(&mut [0]).await.unwrap(), 0);
    assert!(begun.elapsed() < 2 * patience);
    // What was begun is done all the same.
    device.release();
    settle().await;
    assert!(server.exports()[0].is_sealed);
    reads_sealed(other).await;
}

#[tokio::test(start_paused = true)]
async fn a_server_that_stops_waits_for_the_seal_no_longer_than_it_may() {
    let (server, device) = server(|export| export);
    let writer = leaving(&server, &device).await;
    let mut other = greeted(&server).await;
    other.send_option(option::GO, &go("disk")).await;
    settle().await;
    let begun = Instant::now();
    let stopping = tokio::spawn({
        let server = server.clone();
        async move { server.shutdown(Duration::from_secs(20)).await }
    });
    sleep(Duration::from_secs(5)).await;
    // Who waits for the seal is told, and let go of.
    assert_eq!(other.option_reply(option::GO).await.0, wire::reply::ERR_SHUTDOWN);
    assert!(other.rest().await.is_empty());
    assert_eq!(server.connections(), 1);
    let report = stopping.await.unwrap();
    assert_eq!(report.dropped_connections, 1);
    assert!(begun.elapsed() <= Duration::from_secs(20));
    end_of(writer).await.unwrap();
    device.release();
}
