//! Clients that announce payloads and do not send them, beside one that does.

use std::sync::Arc;
use std::time::Duration;

use block::{BufferPool, Durability};
use nbd_server::wire::{command, command_flag};
use nbd_server::{Export, Limits, Server, ServerConfig};
use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, advance};

use crate::device::{Call, TestDevice};
use crate::raw::Raw;

const SIZE: u64 = 32 << 20;
const MIB: usize = 1 << 20;

fn with_limits(limits: Limits) -> (Server, Arc<TestDevice>) {
    let device = TestDevice::new(SIZE);
    let server = Server::new(ServerConfig::with_limits(limits));
    server.add_export(Export::new("disk", Arc::clone(&device) as _)).unwrap();
    (server, device)
}

/// A client that announces 32 MiB and sends `bytes` of them.
async fn stalled(server: &Server, bytes: usize) -> Raw {
    let mut raw = Raw::entered(server).await;
    raw.request(command::WRITE, 0, 1, 0, 32 << 20).await;
    raw.send(&vec![7; bytes]).await;
    raw
}

/// Lets the server take in what was sent: only a runtime with nothing left to do reaches the next moment.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}

/// Bytes that differ from one write to the next.
fn content(number: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from((at / 4096 + number) % 251).unwrap()).collect()
}

/// 64 writes of 1 MiB, over the first half of the disk again and again, each answered before the next.
async fn write_on(raw: &mut Raw) {
    for number in 0..64 {
        let offset = u64::try_from((number % 16) * MIB).unwrap();
        raw.request(command::WRITE, 0, 1000, offset, 1 << 20).await;
        raw.send(&content(number, MIB)).await;
        let reply = raw.reply().await;
        assert_eq!((reply.cookie, reply.error), (1000, 0));
    }
}

/// Whether the disk holds what [`write_on`] left.
async fn holds_the_last_writes(raw: &mut Raw) {
    for number in 48..64 {
        let offset = u64::try_from((number % 16) * MIB).unwrap();
        raw.request(command::READ, command_flag::DF, 2000, offset, 1 << 20).await;
        let reply = raw.reply().await;
        assert_eq!(reply.error, 0);
        assert!(reply.content[0].1[8..] == content(number, MIB), "write {number}");
    }
}

#[tokio::test(start_paused = true)]
async fn clients_that_only_announce_hold_little_and_delay_nobody() {
    let (server, device) = with_limits(Limits::default());
    let mut others = Vec::new();
    for _ in 0..12 {
        others.push(stalled(&server, 100).await);
    }
    settle().await;
    let held = BufferPool::shared().in_use_bytes();
    assert!(held <= 12 * 2 * MIB, "{held} bytes for 1200 that came");
    let mut raw = Raw::entered(&server).await;
    let begun = Instant::now();
    write_on(&mut raw).await;
    assert_eq!(begun.elapsed(), Duration::ZERO, "a write waited for a timer");
    let log = device.log();
    assert_eq!(log.len(), 64, "each write in one piece");
    assert!(log.iter().all(|call| matches!(call, Call::Write(_, 0x10_0000, _))), "{log:?}");
    holds_the_last_writes(&mut raw).await;
    assert_eq!(server.connections(), 13);
}

#[tokio::test(start_paused = true)]
async fn what_has_not_arrived_is_bounded_and_others_go_on_in_smaller_pieces() {
    let mut limits = Limits::default();
    limits.arriving_bytes = 8 << 20;
    let (server, device) = with_limits(limits);
    let mut others = Vec::new();
    for _ in 0..40 {
        others.push(stalled(&server, 40_000).await);
    }
    settle().await;
    let held = BufferPool::shared().in_use_bytes();
    assert!(held <= 8 * MIB + 40 * (64 << 10), "{held} bytes");
    let mut raw = Raw::entered(&server).await;
    let begun = Instant::now();
    write_on(&mut raw).await;
    assert_eq!(begun.elapsed(), Duration::ZERO, "a write waited for a timer");
    assert_eq!(device.log().len(), 64 * 16);
    holds_the_last_writes(&mut raw).await;
    drop(others);
    settle().await;
    raw.request(command::WRITE, 0, 1, 0, 1 << 20).await;
    raw.send(&content(1, MIB)).await;
    assert_eq!(raw.reply().await.error, 0);
    let last = device.log().last().copied();
    assert_eq!(last, Some(Call::Write(0, 1 << 20, Durability::Deferred)), "memory is back");
}

#[tokio::test(start_paused = true)]
async fn a_payload_without_progress_ends_its_connection_and_one_that_trickles_does_not() {
    let mut limits = Limits::default();
    limits.payload_timeout = Duration::from_secs(30);
    let (server, device) = with_limits(limits);
    let mut stuck = stalled(&server, 100).await;
    let mut refused = Raw::entered(&server).await;
    refused.request(command::WRITE, 0, 1, SIZE, 4096).await;
    let mut slow = Raw::entered(&server).await;
    slow.request(command::WRITE, 0, 5, 0, 4).await;
    for byte in 1..=4 {
        settle().await;
        advance(Duration::from_secs(20)).await;
        slow.send(&[byte]).await;
    }
    assert_eq!(slow.reply().await.error, 0);
    assert!(stuck.rest().await.is_empty());
    assert!(refused.rest().await.is_empty());
    assert_eq!(device.log(), [Call::Write(0, 4, Durability::Deferred)]);
    settle().await;
    assert_eq!(server.connections(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_client_without_a_request_under_way_may_be_silent() {
    let (server, _) = with_limits(Limits::default());
    let mut raw = Raw::entered(&server).await;
    advance(Duration::from_secs(3600)).await;
    raw.request(command::FLUSH, 0, 1, 0, 0).await;
    assert_eq!(raw.reply().await.error, 0);
}

#[tokio::test]
async fn a_long_durable_write_reaches_the_device_in_pieces_and_is_flushed_once() {
    let (server, device) = with_limits(Limits::default());
    let mut raw = Raw::entered(&server).await;
    let (at, len) = (4096, 5 * MIB);
    raw.request(command::WRITE, command_flag::FUA, 9, at, u32::try_from(len).unwrap()).await;
    raw.send(&content(3, len)).await;
    let reply = raw.reply().await;
    assert_eq!((reply.cookie, reply.error), (9, 0));
    let two = 2 << 20;
    let mut log = device.log();
    assert_eq!(log.pop(), Some(Call::Flush));
    log.sort_by_key(|call| if let Call::Write(at, ..) = call { *at } else { u64::MAX });
    let write = |at, end| Call::Write(at, end - at, Durability::Deferred);
    assert_eq!(log, [write(at, two), write(two, 2 * two), write(2 * two, at + len as u64)]);
    assert_eq!(server.exports()[0].counters.requests, 1);
    assert_eq!(server.exports()[0].counters.bytes_written, len as u64);
}

#[tokio::test]
async fn a_long_write_fails_with_any_of_its_pieces() {
    let (server, device) = with_limits(Limits::default());
    let mut raw = Raw::entered(&server).await;
    device.fail(std::io::ErrorKind::StorageFull);
    raw.request(command::WRITE, command_flag::FUA, 9, 0, 5 << 20).await;
    raw.send(&content(3, 5 * MIB)).await;
    assert_eq!(raw.reply().await.error, nbd_server::wire::error::ENOSPC);
    assert!(!device.log().contains(&Call::Flush));
    let counters = server.exports()[0].counters;
    assert_eq!((counters.requests, counters.errors, counters.bytes_written), (1, 1, 0));
}

#[tokio::test]
async fn an_export_is_cut_from_a_client_in_the_middle_of_a_payload() {
    let (server, device) = with_limits(Limits::default());
    let mut raw = stalled(&server, 3 * MIB).await;
    while device.log().is_empty() {
        tokio::task::yield_now().await;
    }
    server.remove_export("disk", nbd_server::Removal::Cut).await.map(drop).unwrap();
    // It may still send, and hears the end.
    let _ = raw.stream.write_all(&[0; 100]).await;
    assert!(raw.rest().await.is_empty());
    assert_eq!(device.log(), [Call::Write(0, 2 << 20, Durability::Deferred)]);
}
