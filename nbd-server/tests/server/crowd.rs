//! Crowds of clients that do little, and single ones that do it badly: whatever they do, others go on as if they were
//! alone.

use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use nbd_server::wire::{self, Request, command, command_flag, error, option};
use nbd_server::{Export, Server, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

use crate::device::{Call, TestDevice};
use crate::raw::{Raw, go};

const SIZE: u64 = 8 << 20;
const MIB: u32 = 1 << 20;

fn server() -> (Server, Arc<TestDevice>) {
    let device = TestDevice::new(SIZE);
    let server = Server::new(ServerConfig::default());
    server.add_export(Export::new("disk", Arc::clone(&device) as _)).unwrap();
    (server, device)
}

/// A client that does a day's work, and has to wait for nobody. Time stands still unless everybody waits for it.
async fn works_undisturbed(server: &Server) {
    let begun = Instant::now();
    let mut raw = Raw::entered(server).await;
    for cookie in 0..20 {
        raw.request(command::WRITE, 0, cookie, cookie * 4096, 70_000).await;
        raw.send(&vec![7; 70_000]).await;
        assert_eq!(raw.reply().await.error, 0);
        raw.request(command::READ, command_flag::DF, cookie, cookie * 4096, 70_000).await;
        assert_eq!(raw.reply().await.content[0].1[8..], [7; 70_000]);
    }
    raw.request(command::FLUSH, 0, 99, 0, 0).await;
    assert_eq!(raw.reply().await.error, 0);
    assert_eq!(begun.elapsed(), Duration::ZERO, "it waited for a timer");
    raw.request(command::DISC, 0, 0, 0, 0).await;
    assert!(raw.rest().await.is_empty());
}

/// Waits until all connections but so many are gone.
async fn down_to(server: &Server, count: usize) {
    while server.connections() > count {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_thousand_idle_clients_and_a_hundred_in_the_handshake_are_not_noticed() {
    let mut limits = nbd_server::Limits::default();
    limits.connections = 1101;
    let server = Server::new(ServerConfig::with_limits(limits));
    server.add_export(Export::new("disk", TestDevice::new(SIZE) as _)).unwrap();
    let mut idle = Vec::new();
    for _ in 0..1000 {
        let mut raw = Raw::with_buffer(&server, 1024);
        raw.enter(false).await;
        idle.push(raw);
    }
    let mut half_open = Vec::new();
    for number in 0..100 {
        let mut raw = Raw::with_buffer(&server, 1024);
        // Some have said nothing, some are in the middle of an option, some have been answered.
        if number % 3 > 0 {
            raw.greet(3).await;
            raw.send(b"IHAVEOPT\0\0\0\x07\0\0").await;
        }
        if number % 3 > 1 {
            raw.send(&[0, 0]).await;
            assert_eq!(raw.option_reply(option::GO).await.0, wire::reply::ERR_INVALID);
        }
        half_open.push(raw);
    }
    assert_eq!(server.connections(), 1100);
    works_undisturbed(&server).await;
    for raw in idle.iter_mut().step_by(111) {
        raw.request(command::FLUSH, 0, 5, 0, 0).await;
        assert_eq!(raw.reply().await.cookie, 5);
    }
    // Handshakes end in their time, whatever is idle stays.
    tokio::time::sleep(Duration::from_secs(40)).await;
    down_to(&server, 1000).await;
    assert_eq!(server.clients().len(), 1000);
    drop((idle, half_open));
    down_to(&server, 0).await;
}

#[tokio::test(start_paused = true)]
async fn clients_that_never_read_their_replies_are_not_noticed() {
    let (server, _) = server();
    let mut deaf = Vec::new();
    for _ in 0..12 {
        let mut raw = Raw::with_buffer(&server, 4096);
        raw.enter(true).await;
        for cookie in 0..100 {
            raw.request(command::READ, command_flag::DF, cookie, 0, MIB).await;
        }
        deaf.push(raw);
    }
    works_undisturbed(&server).await;
    assert_eq!(server.connections(), 12);
    drop(deaf);
    down_to(&server, 0).await;
    assert_eq!(server.memory_in_use(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_comes_byte_by_byte_is_understood() {
    let (server, device) = server();
    let mut raw = Raw::new(&server);
    let mut bytes = BytesMut::new();
    bytes.put_u32(3);
    for (option, data) in [(77, &b"nobody knows"[..]), (option::GO, &go("disk"))] {
        bytes.put_u64(wire::IHAVEOPT);
        bytes.put_u32(option);
        bytes.put_u32(u32::try_from(data.len()).unwrap());
        bytes.put_slice(data);
    }
    let write =
        |flags, cookie, offset| Request { flags, command: command::WRITE, cookie, offset, len: 5 };
    for request in [write(0, 1, 0), write(0, 2, SIZE), write(1 << 9, 3, 0)] {
        request.encode(&mut bytes);
        bytes.put_slice(b"abcde");
    }
    for byte in bytes {
        raw.stream.write_all(&[byte]).await.unwrap();
        for _ in 0..5 {
            tokio::task::yield_now().await;
        }
    }
    raw.take(18).await;
    assert_eq!(raw.option_reply(77).await.0, wire::reply::ERR_UNSUP);
    while raw.option_reply(option::GO).await.0 != wire::reply::ACK {}
    let mut errors = Vec::new();
    for _ in 0..3 {
        let reply = raw.reply().await;
        errors.push((reply.cookie, reply.error));
    }
    errors.sort_unstable();
    assert_eq!(errors, [(1, 0), (2, error::ENOSPC), (3, error::EINVAL)]);
    assert_eq!(&device.bytes()[..6], b"abcde\0");
    works_undisturbed(&server).await;
}

#[tokio::test]
async fn a_client_killed_at_any_byte_leaves_nothing_behind() {
    let (server, device) = server();
    let mut bytes = BytesMut::new();
    Request { flags: 0, command: command::WRITE, cookie: 1, offset: 0, len: 6 }.encode(&mut bytes);
    bytes.put_slice(b"whole!");
    Request { flags: 0, command: command::WRITE, cookie: 2, offset: 4096, len: 70_000 }
        .encode(&mut bytes);
    let begun = bytes.len();
    bytes.put_slice(&[9; 70_000]);
    // In the header, in a payload, between two requests, and in a payload of several pieces.
    let ends = (0..begun).chain([begun + 1, begun + 65_535, begun + 65_536, begun + 69_999]);
    for end in ends {
        let mut raw = Raw::entered(&server).await;
        raw.send(&bytes[..end]).await;
        drop(raw);
        down_to(&server, 0).await;
    }
    assert!(
        device.log().iter().all(|call| matches!(call, Call::Write(0, 6, _))),
        "{:?}",
        device.log()
    );
    assert_eq!(server.memory_in_use(), 0);
    assert_eq!(server.exports()[0].counters.in_flight, 0);
    Raw::entered(&server).await;
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_options_ends_whether_or_not_anybody_reads_the_answers() {
    let (server, _) = server();
    let mut flood = BytesMut::new();
    flood.put_u32(3);
    for _ in 0..10_000 {
        flood.put_u64(wire::IHAVEOPT);
        flood.put_u32(option::LIST);
        flood.put_u32(0);
    }
    // One who reads hears as many answers as it may have options.
    let mut reads = Raw::new(&server);
    let (mut reader, mut writer) = tokio::io::split(reads.stream);
    let sending = tokio::spawn({
        let flood = flood.clone();
        async move {
            let sent = writer.write_all(&flood).await;
            drop(writer);
            sent.is_ok()
        }
    });
    let mut heard = Vec::new();
    let _ = reader.read_to_end(&mut heard).await;
    let _ = sending.await;
    let answers =
        heard.windows(8).filter(|bytes| *bytes == wire::OPTION_REPLY_MAGIC.to_be_bytes()).count();
    assert_eq!(answers, 2 * 8192, "one for the export, and the end, of each");
    // One who does not is closed with the time of its handshake.
    reads = Raw::with_buffer(&server, 1024);
    let deaf = tokio::spawn(async move {
        let _ = reads.stream.write_all(&flood).await;
        reads
    });
    works_undisturbed(&server).await;
    tokio::time::sleep(Duration::from_secs(40)).await;
    down_to(&server, 0).await;
    drop(deaf);
}

#[tokio::test(start_paused = true)]
async fn a_crowd_leaves_no_task_behind() {
    let (server, _) = server();
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let before = tasks();
    for _ in 0..3 {
        let mut crowd = Vec::new();
        for number in 0..60 {
            let mut raw = Raw::with_buffer(&server, 4096);
            // Some come no further than to the handshake, some leave properly, some never read.
            if number % 4 == 0 {
                raw.send(b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0").await;
            } else {
                raw.enter(true).await;
            }
            if number % 4 > 1 {
                for cookie in 0..10 {
                    raw.request(command::READ, command_flag::DF, cookie, 0, MIB).await;
                }
            }
            if number % 2 == 1 {
                raw.request(command::DISC, 0, 0, 0, 0).await;
            }
            crowd.push(raw);
        }
        assert!(tasks() >= before + 60);
        drop(crowd);
        down_to(&server, 0).await;
        let mut patience = 10_000;
        while tasks() > before && patience > 0 {
            tokio::task::yield_now().await;
            patience -= 1;
        }
        assert_eq!(tasks(), before);
        assert_eq!(server.memory_in_use(), 0);
    }
    server.shutdown(Duration::from_secs(5)).await;
    assert_eq!(tasks(), before);
}
