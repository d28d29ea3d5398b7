//! Requests and replies against a raw client in memory.

use std::io::ErrorKind;
use std::sync::Arc;

use block::{Durability, ZeroMode};
use nbd_server::wire::{Fields, chunk, command, command_flag as flag, error};
use nbd_server::{Export, Limits, Server, ServerConfig};

use crate::device::{Call, TestDevice};
use crate::raw::Raw;

const SIZE: u64 = 1 << 20;

fn server_of(device: &Arc<TestDevice>) -> Server {
    server_with(device, Limits::default())
}

fn server_with(device: &Arc<TestDevice>, limits: Limits) -> Server {
    let server = Server::new(ServerConfig::with_limits(limits));
    server.add_export(Export::new("disk", Arc::clone(device) as _)).unwrap();
    server
}

#[tokio::test]
async fn what_was_written_is_read_and_the_rest_is_holes() {
    let device = TestDevice::new(SIZE);
    let mut raw = Raw::entered(&server_of(&device)).await;
    raw.request(command::WRITE, 0, 1, 4096, 4096).await;
    raw.send(&[7; 4096]).await;
    assert_eq!((raw.reply().await.error, device.bytes()[4096..8192].to_vec()), (0, vec![7; 4096]));
    raw.request(command::READ, 0, 2, 0, 16_384).await;
    let reply = raw.reply().await;
    let kinds: Vec<u16> = reply.content.iter().map(|one| one.0).collect();
    assert_eq!(kinds, [chunk::OFFSET_HOLE, chunk::OFFSET_DATA, chunk::OFFSET_HOLE]);
    assert_eq!(reply.content[1].1[8..], [7; 4096]);
    raw.request(command::READ, flag::DF, 3, 0, 16_384).await;
    let reply = raw.reply().await;
    assert_eq!(reply.content.len(), 1);
    assert_eq!(reply.content[0].1[8..], device.bytes()[..16_384]);
}

#[tokio::test]
async fn without_structured_replies_everything_is_simple() {
    let device = TestDevice::new(SIZE);
    let server = server_of(&device);
    let mut raw = Raw::new(&server);
    raw.enter(false).await;
    raw.request(command::WRITE, 0, u64::MAX, 10, 3).await;
    raw.send(b"abc").await;
    assert_eq!(raw.reply().await.cookie, u64::MAX);
    raw.request(command::READ, 0, 0, 9, 5).await;
    assert_eq!(raw.reply_of(5).await.content[0].1, b"\0abc\0");
    for (command, flags) in [(command::BLOCK_STATUS, 0), (command::READ, flag::DF)] {
        raw.request(command, flags, 0, 0, 512).await;
        assert_eq!(raw.reply_of(512).await.error, error::EINVAL);
    }
}

#[tokio::test]
async fn a_refused_write_still_has_its_payload_consumed() {
    let device = TestDevice::with(SIZE, true);
    let mut raw = Raw::entered(&server_of(&device)).await;
    for len in [512, 100_000] {
        raw.request(command::WRITE, 0, 1, 0, len).await;
        raw.send(&vec![0x25; len as usize]).await;
        let reply = raw.reply().await;
        assert_eq!(reply.error, error::EPERM);
        assert!(!reply.text.is_empty());
    }
    raw.request(command::READ, 0, 2, 0, 512).await;
    assert_eq!(raw.reply().await.error, 0);
    assert_eq!(device.log(), [Call::Read(0, 512)]);
}

#[tokio::test]
async fn errors_name_the_rule_that_was_broken() {
    let device = TestDevice::new(SIZE);
    let mut raw = Raw::entered(&server_of(&device)).await;
    for (command, flags, offset, len, expected) in [
        (command::READ, 0, SIZE - 1, 2, error::EINVAL),
        (command::READ, 0, u64::MAX, 512, error::EINVAL),
        (command::TRIM, 0, SIZE, 1, error::EINVAL),
        (command::BLOCK_STATUS, 0, SIZE, 1, error::EINVAL),
        (command::WRITE_ZEROES, 0, SIZE - 1, 2, error::ENOSPC),
        (command::READ, flag::DF, 0, u32::MAX, error::EINVAL),
        (command::READ, 0, 0, u32::MAX, error::EINVAL),
        (command::READ, 1 << 15, 0, 512, error::EINVAL),
        (command::RESIZE, 0, 0, 512, error::EINVAL),
        (99, 0, 0, u32::MAX, error::EINVAL),
        (command::WRITE_ZEROES, flag::FAST_ZERO, 1, 1, error::ENOTSUP),
    ] {
        raw.request(command, flags, 5, offset, len).await;
        let reply = raw.reply().await;
        assert_eq!(reply.error, expected, "command {command} at {offset}: {}", reply.text);
        assert!(!reply.text.is_empty());
    }
    raw.request(command::WRITE, 0, 6, SIZE - 1, 2).await;
    raw.send(b"ab").await;
    assert_eq!(raw.reply().await.error, error::ENOSPC);
}

#[tokio::test]
async fn a_device_error_becomes_one_of_the_protocol_without_the_hosts_paths() {
    for (kind, expected) in [
        (ErrorKind::StorageFull, error::ENOSPC),
        (ErrorKind::QuotaExceeded, error::ENOSPC),
        (ErrorKind::FileTooLarge, error::ENOSPC),
        (ErrorKind::OutOfMemory, error::ENOMEM),
        (ErrorKind::Other, error::EIO),
        (ErrorKind::Unsupported, error::EINVAL),
    ] {
        let device = TestDevice::new(SIZE);
        let mut raw = Raw::entered(&server_of(&device)).await;
        device.fail(kind);
        raw.request(command::READ, 0, 1, 0, 512).await;
        let reply = raw.reply().await;
        assert_eq!(reply.error, expected, "{kind}");
        assert!(!reply.text.contains("secret"));
        raw.request(command::FLUSH, 0, 2, 0, 0).await;
        assert_eq!(raw.reply().await.error, expected);
    }
}

#[tokio::test]
async fn durability_and_modes_reach_the_device() {
    let device = TestDevice::new(SIZE);
    let mut raw = Raw::entered(&server_of(&device)).await;
    let both = flag::NO_HOLE | flag::FAST_ZERO;
    for (command, flags) in [
        (command::WRITE, flag::FUA),
        (command::WRITE, 0),
        (command::TRIM, flag::FUA),
        (command::WRITE_ZEROES, flag::FUA),
        (command::WRITE_ZEROES, both),
        (command::FLUSH, flag::FUA),
        (command::READ, flag::FUA),
    ] {
        let len = if command == command::FLUSH { 0 } else { 4096 };
        raw.request(command, flags, 1, 0, len).await;
        if command == command::WRITE {
            raw.send(&[1; 4096]).await;
        }
        assert_eq!(raw.reply().await.error, 0, "command {command}");
    }
    let fast = ZeroMode { keep_allocated: true, fast_only: true };
    let expected = [
        Call::Write(0, 4096, Durability::Durable),
        Call::Write(0, 4096, Durability::Deferred),
        Call::Discard(0, 4096, Durability::Durable),
        Call::Zeroes(0, 4096, ZeroMode::default(), Durability::Durable),
        Call::Zeroes(0, 4096, fast, Durability::Deferred),
        Call::Flush,
        Call::Read(0, 4096),
    ];
    assert_eq!(device.log(), expected);
}

/// Lengths and flags of the only chunk of a status.
fn descriptors(reply: &crate::raw::Reply) -> Vec<(u32, u32)> {
    assert_eq!((reply.error, reply.content.len()), (0, 1), "{reply:?}");
    let (kind, payload) = &reply.content[0];
    assert_eq!(*kind, chunk::BLOCK_STATUS);
    let mut fields = Fields(payload);
    assert_eq!(fields.u32(), Some(1));
    let mut all = Vec::new();
    while let (Some(len), Some(flags)) = (fields.u32(), fields.u32()) {
        all.push((len, flags));
    }
    all
}

#[tokio::test]
async fn status_tells_holes_merges_and_stays_inside_the_request() {
    let device = TestDevice::new(SIZE);
    let server = server_with(&device, {
        let mut l = Limits::default();
        l.status_extents = 5;
        l
    });
    let mut raw = Raw::entered(&server).await;
    for at in (0..16).step_by(2) {
        raw.request(command::WRITE, 0, 1, at * 4096, 4096).await;
        raw.send(&[1; 4096]).await;
        raw.reply().await;
    }
    raw.request(command::BLOCK_STATUS, 0, 2, 1000, 8000).await;
    assert_eq!(descriptors(&raw.reply().await), [(3096, 0), (4096, 3), (808, 0)]);
    raw.request(command::BLOCK_STATUS, flag::REQ_ONE, 2, 1000, 8000).await;
    assert_eq!(descriptors(&raw.reply().await), [(3096, 0)]);
    raw.request(command::BLOCK_STATUS, flag::REQ_ONE, 2, 1000, 100).await;
    assert_eq!(descriptors(&raw.reply().await), [(100, 0)]);
    // The limit of five ends the reply early; the device itself stops after three.
    raw.request(command::BLOCK_STATUS, 0, 2, 0, 1 << 20).await;
    let expected = [(4096, 0), (4096, 3), (4096, 0), (4096, 3), (4096, 0)];
    assert_eq!(descriptors(&raw.reply().await), expected);
    raw.request(command::WRITE_ZEROES, 0, 3, 0, 1 << 20).await;
    assert_eq!(raw.reply().await.error, 0);
    raw.request(command::BLOCK_STATUS, 0, 2, 0, 1 << 20).await;
    assert_eq!(descriptors(&raw.reply().await), [(1 << 20, 3)]);
}

#[tokio::test]
async fn zero_lengths_are_answered() {
    let device = TestDevice::new(SIZE);
    let mut raw = Raw::entered(&server_of(&device)).await;
    for command in 0..=8 {
        if command != command::DISC {
            raw.request(command, 0, u64::from(command), 0, 0).await;
            assert_eq!(raw.reply().await.cookie, u64::from(command));
        }
    }
}

#[tokio::test]
async fn replies_overtake_a_request_that_the_device_holds() {
    let device = TestDevice::new(SIZE);
    let mut raw = Raw::entered(&server_of(&device)).await;
    device.hold(|call| matches!(call, Call::Read(0, _)));
    raw.request(command::READ, 0, 1, 0, 512).await;
    raw.request(command::READ, 0, 2, 512, 512).await;
    assert_eq!(raw.reply().await.cookie, 2);
    device.held(1).await;
    device.release();
    assert_eq!(raw.reply().await.cookie, 1);
}

#[tokio::test]
async fn a_disconnect_finishes_and_answers_what_is_in_flight() {
    let device = TestDevice::new(SIZE);
    let mut raw = Raw::entered(&server_of(&device)).await;
    device.hold(|_| true);
    raw.request(command::WRITE, flag::FUA, 1, 0, 512).await;
    raw.send(&[9; 512]).await;
    raw.request(command::DISC, u16::MAX, 2, 77, 77).await;
    device.held(1).await;
    device.release();
    assert_eq!(raw.reply().await.cookie, 1);
    assert!(raw.rest().await.is_empty());
    assert_eq!(device.bytes()[..512], [9; 512]);
}

#[tokio::test]
async fn a_client_that_vanishes_loses_no_write_that_the_server_had_whole() {
    let device = TestDevice::new(SIZE);
    let server = server_of(&device);
    let mut raw = Raw::entered(&server).await;
    device.hold(|_| true);
    raw.request(command::WRITE, 0, 1, 0, 512).await;
    raw.send(&[9; 512]).await;
    device.held(1).await;
    drop(raw);
    device.release();
    server.remove_export("disk", nbd_server::Removal::Drain).await.unwrap();
    assert_eq!(device.bytes()[..512], [9; 512]);
}

#[tokio::test]
async fn a_request_without_its_magic_closes_after_the_replies() {
    let device = TestDevice::new(SIZE);
    let mut raw = Raw::entered(&server_of(&device)).await;
    raw.request(command::FLUSH, 0, 1, 0, 0).await;
    raw.send(&[0; 28]).await;
    assert_eq!(raw.reply().await.cookie, 1);
    assert!(raw.rest().await.is_empty());
}

#[tokio::test]
async fn reading_stops_while_the_budget_of_requests_is_full() {
    let device = TestDevice::new(SIZE);
    let limits = {
        let mut l = Limits::default();
        l.in_flight_requests = 4;
        l
    };
    let server = server_with(&device, limits);
    let mut raw = Raw::entered(&server).await;
    let mut other = Raw::entered(&server).await;
    device.hold(|call| matches!(call, Call::Write(..)));
    for cookie in 0..10 {
        raw.request(command::WRITE, 0, cookie, 0, 1).await;
        raw.send(b"x").await;
    }
    device.held(4).await;
    // Another client gets on all the same, and by then a fifth write would have come through.
    other.request(command::READ, 0, 1, 0, 512).await;
    assert_eq!(other.reply().await.error, 0);
    assert_eq!(device.held_now(), 4);
    device.release();
    let mut cookies = Vec::new();
    for _ in 0..10 {
        cookies.push(raw.reply().await.cookie);
    }
    cookies.sort_unstable();
    assert_eq!(cookies, (0..10).collect::<Vec<_>>());
}

#[tokio::test]
async fn reading_stops_while_the_budget_of_bytes_is_full() {
    let device = TestDevice::new(SIZE);
    let limits = {
        let mut l = Limits::default();
        l.in_flight_bytes = 8192;
        l
    };
    let server = server_with(&device, limits);
    let mut raw = Raw::entered(&server).await;
    device.hold(|_| true);
    for cookie in 0..4 {
        raw.request(command::READ, 0, cookie, 0, 4096).await;
    }
    device.held(2).await;
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(device.held_now(), 2);
    device.release();
    // One request over the whole budget is let in alone.
    raw.request(command::READ, 0, 4, 0, 100_000).await;
    for _ in 0..5 {
        assert_eq!(raw.reply().await.error, 0);
    }
}

#[tokio::test]
async fn a_client_that_reads_no_replies_stalls_only_itself() {
    let device = TestDevice::new(SIZE);
    let limits = {
        let mut l = Limits::default();
        l.in_flight_bytes = 1 << 20;
        l
    };
    let server = server_with(&device, limits);
    let mut greedy = Raw::with_buffer(&server, 4096);
    greedy.enter(true).await;
    greedy.request(command::WRITE_ZEROES, flag::NO_HOLE, 0, 0, 1 << 20).await;
    assert_eq!(greedy.reply().await.error, 0);
    for cookie in 0..8 {
        greedy.request(command::READ, 0, cookie, 0, 1 << 20).await;
    }
    let mut other = Raw::entered(&server).await;
    for cookie in 0..50 {
        other.request(command::READ, 0, cookie, 0, 65_536).await;
        assert_eq!(other.reply().await.error, 0);
    }
    for _ in 0..8 {
        assert_eq!(greedy.reply().await.error, 0);
    }
}

#[tokio::test]
async fn a_flush_covers_writes_of_every_connection() {
    let device = TestDevice::new(SIZE);
    let server = server_of(&device);
    let (mut one, mut two) = (Raw::entered(&server).await, Raw::entered(&server).await);
    one.request(command::WRITE, 0, 1, 0, 1).await;
    one.send(b"x").await;
    one.reply().await;
    two.request(command::FLUSH, 0, 1, 0, 0).await;
    assert_eq!(two.reply().await.error, 0);
    assert_eq!(device.log(), [Call::Write(0, 1, Durability::Deferred), Call::Flush]);
}

#[tokio::test]
async fn requests_sent_together_with_the_last_option_are_served() {
    let device = TestDevice::new(SIZE);
    let mut raw = Raw::new(&server_of(&device));
    raw.greet(3).await;
    let mut bytes = bytes::BytesMut::new();
    nbd_server::wire::Request { flags: 0, command: command::FLUSH, cookie: 3, offset: 0, len: 0 }
        .encode(&mut bytes);
    let mut option = b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk".to_vec();
    option.extend_from_slice(&bytes);
    raw.send(&option).await;
    raw.take(10).await;
    assert_eq!(raw.reply().await.cookie, 3);
}

#[tokio::test]
async fn holes_of_a_raw_file_are_told_as_holes_except_in_one_piece() {
    let dir = tempfile::tempdir().unwrap();
    let device = block::RawDevice::create(&dir.path().join("disk"), 4 << 20).await.unwrap();
    let server = Server::new(ServerConfig::default());
    server.add_export(Export::new("disk", device)).unwrap();
    let mut raw = Raw::entered(&server).await;
    raw.request(command::WRITE, 0, 1, 1 << 20, 1 << 20).await;
    raw.send(&[7; 1 << 20]).await;
    assert_eq!(raw.reply().await.error, 0);
    raw.request(command::READ, 0, 2, 0, 4 << 20).await;
    let reply = raw.reply().await;
    let chunks = reply.content.iter().map(|(kind, payload)| (*kind, payload.len()));
    let hole = (chunk::OFFSET_HOLE, 12);
    let data = (chunk::OFFSET_DATA, 8 + (1 << 20));
    assert_eq!(chunks.collect::<Vec<_>>(), [hole, data, hole]);
    let lens = |index: usize| Fields(&reply.content[index].1[8..]).u32().unwrap();
    assert_eq!((lens(0), lens(2)), (1 << 20, 2 << 20));
    assert!(reply.content[1].1[8..].iter().all(|byte| *byte == 7));
    raw.request(command::READ, flag::DF, 3, 0, 4 << 20).await;
    let reply = raw.reply().await;
    let [(chunk::OFFSET_DATA, whole)] = &reply.content[..] else { panic!("{:?}", reply.error) };
    assert_eq!(whole.len(), 8 + (4 << 20));
    assert_eq!(whole[8..].iter().filter(|byte| **byte == 7).count(), 1 << 20);
    // Where simple replies are all there is, zeros are spelt out.
    let mut simple = Raw::new(&server);
    simple.enter(false).await;
    simple.request(command::READ, 0, 4, 0, 1 << 20).await;
    assert_eq!(simple.reply_of(1 << 20).await.content[0].1, vec![0; 1 << 20]);
}
