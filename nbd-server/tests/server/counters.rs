//! What the server tells of itself while clients work: of exports, of connections, and as Prometheus reads it.

use std::sync::Arc;
use std::time::Duration;

use nbd_server::wire::{command, error};
use nbd_server::{Export, Latency, Peer, RequestKind, Server, ServerConfig};
use tokio::time::advance;

use crate::device::{Call, TestDevice};
use crate::raw::Raw;

const SIZE: u64 = 1 << 20;

fn server() -> (Server, Arc<TestDevice>) {
    let device = TestDevice::new(SIZE);
    let server = Server::new(ServerConfig::default());
    server.add_export(Export::new("disk", Arc::clone(&device) as _)).unwrap();
    (server, device)
}

#[tokio::test(start_paused = true)]
async fn requests_are_counted_by_kind_with_what_is_in_flight_and_how_long_it_took() {
    let (server, device) = server();
    let mut raw = Raw::entered(&server).await;
    let mut other = Raw::entered(&server).await;
    device.hold(|call| matches!(call, Call::Flush));
    raw.request(command::FLUSH, 0, 1, 0, 0).await;
    device.held(1).await;
    for (command, offset) in [
        (command::READ, 0),
        (command::TRIM, 0),
        (command::CACHE, 0),
        (99, 0),
        (command::READ, SIZE),
    ] {
        other.request(command, 0, 1, offset, 512).await;
        other.reply().await;
    }
    let status = server.exports().remove(0);
    assert_eq!((status.counters.in_flight, status.counters.requests), (1, 5));
    advance(Duration::from_millis(3)).await;
    device.release();
    raw.reply().await;
    let counters = server.exports()[0].counters;
    let of = |kind| counters.by_kind.get(kind);
    assert_eq!((of(RequestKind::Read), of(RequestKind::Flush)), (2, 1));
    assert_eq!((of(RequestKind::Trim), of(RequestKind::Cache), of(RequestKind::Other)), (1, 1, 1));
    assert_eq!(of(RequestKind::Write), 0);
    assert_eq!((counters.requests, counters.errors), (6, 2));
    // Four reached the device, one of them for three milliseconds.
    assert_eq!((counters.latency.count(), counters.latency.buckets[0]), (4, 3));
    let slow = Latency::BOUNDS.iter().position(|bound| *bound == Duration::from_millis(5)).unwrap();
    assert_eq!(counters.latency.buckets[slow], 1);
    assert_eq!(counters.latency.sum, Duration::from_millis(3));
    while server.exports()[0].counters.in_flight > 0 {
        tokio::task::yield_now().await;
    }
    let [first, second] = &server.clients()[..] else { panic!("two are open") };
    assert_eq!((first.counters.requests, second.counters.requests), (1, 5));
    assert_eq!(first.export.as_deref(), Some("disk"));
    assert!(first.id < second.id && first.last_error.is_none());
    assert_eq!(second.last_error.as_ref().unwrap().error, error::EINVAL);
}

#[tokio::test]
async fn the_last_error_is_kept_as_the_client_was_told_it() {
    let (server, device) = server();
    assert_eq!(server.exports()[0].last_error, None);
    let mut raw = Raw::entered(&server).await;
    device.fail(std::io::ErrorKind::StorageFull);
    let before = std::time::SystemTime::now();
    raw.request(command::WRITE, 0, 1, 0, 3).await;
    raw.send(b"abc").await;
    let told = raw.reply().await;
    let last = server.exports()[0].last_error.clone().unwrap();
    assert_eq!((last.error, last.kind), (error::ENOSPC, RequestKind::Write));
    assert_eq!(last.text, told.text);
    assert!(last.at >= before);
    raw.request(command::READ, 0, 1, SIZE, 1).await;
    raw.reply().await;
    assert_eq!(server.exports()[0].last_error.clone().unwrap().kind, RequestKind::Read);
}

#[tokio::test]
async fn connections_are_told_from_their_greeting_to_their_end() {
    let (server, _) = server();
    let mut raw = Raw::of(&server, Peer::Unix { uid: 7 });
    raw.greet(3).await;
    let status = server.clients().remove(0);
    assert_eq!((status.peer, status.export), (Peer::Unix { uid: 7 }, None));
    raw.go("disk").await;
    while server.clients()[0].export.is_none() {
        tokio::task::yield_now().await;
    }
    drop(raw);
    while !server.clients().is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(server.exports()[0].counters.connections, 1);
}

#[tokio::test]
async fn prometheus_is_told_the_same() {
    let (server, device) = server();
    server.add_export(Export::new("a \"b\"\\\n", Arc::clone(&device) as _)).unwrap();
    let mut raw = Raw::of(&server, Peer::Unix { uid: 7 });
    raw.enter(true).await;
    raw.request(command::WRITE, 0, 1, 0, 5).await;
    raw.send(b"abcde").await;
    raw.reply().await;
    raw.request(command::READ, 0, 1, SIZE, 1).await;
    raw.reply().await;
    while server.exports().iter().any(|one| one.counters.in_flight > 0) {
        tokio::task::yield_now().await;
    }
    let text = server.prometheus();
    for line in [
        "nbd_connections 1",
        "nbd_memory_bytes 0",
        "nbd_export_requests_total{export=\"disk\",kind=\"write\"} 1",
        "nbd_export_requests_total{export=\"a \\\"b\\\"\\\\\\n\",kind=\"write\"} 0",
        "nbd_export_bytes_total{export=\"disk\",kind=\"write\"} 5",
        "nbd_export_errors_total{export=\"disk\"} 1",
        "nbd_export_in_flight{export=\"disk\"} 0",
        "nbd_export_request_duration_seconds_bucket{export=\"disk\",le=\"+Inf\"} 1",
        "nbd_export_request_duration_seconds_count{export=\"disk\"} 1",
        "nbd_connection_requests_total{connection=\"0\",peer=\"unix:uid=7\",export=\"disk\"} 2",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    assert!(text.contains("nbd_export_last_error_timestamp_seconds{export=\"disk\"} 1"), "{text}");
    // Every line is a value or belongs to a family that is told once.
    let mut families = std::collections::BTreeSet::new();
    for line in text.lines() {
        match line.strip_prefix("# TYPE ") {
            Some(family) => assert!(families.insert(family.to_owned()), "{line}"),
            None => assert!(line.starts_with("# HELP ") || line.starts_with("nbd_"), "{line}"),
        }
    }
}
