//! READs for which there is no memory: they come in parts, in every form of reply, and wait for nobody.

use std::io::ErrorKind;
use std::sync::Arc;

#[cfg(feature = "client")]
use block::{BlockDevice, ByteRange};
#[cfg(feature = "client")]
use nbd_server::client::{ClientOptions, NbdDevice};
#[cfg(feature = "client")]
use nbd_server::wire::Headers;
use nbd_server::wire::{chunk, command, command_flag, error};
use nbd_server::{Export, Limits, Server, ServerConfig};
use tokio::time::{Duration, Instant};

use crate::device::{Call, TestDevice};
use crate::raw::{Raw, Reply};

const SIZE: u64 = 64 << 20;
const MIB: u32 = 1 << 20;
/// All the memory that there is, in bytes.
const ALL: u32 = 32 << 20;
/// What a connection has of its own, in bytes.
const RESERVE: u64 = 64 << 10;

/// A form of reply to READ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Simple,
    Chunks,
    /// With the flag DF.
    Whole,
}

const FORMS: [Form; 3] = [Form::Simple, Form::Chunks, Form::Whole];

impl Form {
    async fn enter(self, server: &Server, buffer_bytes: usize) -> Raw {
        let mut raw = Raw::with_buffer(server, buffer_bytes);
        raw.enter(self != Self::Simple).await;
        raw
    }

    async fn ask(self, raw: &mut Raw, cookie: u64, offset: u64, len: u32) {
        let flags = if self == Self::Whole { command_flag::DF } else { 0 };
        raw.request(command::READ, flags, cookie, offset, len).await;
    }
}

/// A server, and a client that holds all of its memory.
async fn full() -> (Server, Arc<TestDevice>, Raw) {
    let mut limits = Limits::default();
    limits.memory_bytes = ALL.into();
    let device = TestDevice::new(SIZE);
    let server = Server::new(ServerConfig::with_limits(limits));
    server.add_export(Export::new("disk", Arc::clone(&device) as _)).unwrap();
    let mut writer = Raw::entered(&server).await;
    for (cookie, at) in [100_u32 << 10, 900 << 10, 2000 << 10].into_iter().enumerate() {
        writer.request(command::WRITE, 0, cookie as u64, at.into(), 300_000).await;
        let data: Vec<_> =
            (at..at + 300_000).map(|at| u8::try_from(at % 251).unwrap() + 1).collect();
        writer.send(&data).await;
        assert_eq!(writer.reply().await.error, 0);
    }
    let mut deaf = Raw::with_buffer(&server, 4096);
    deaf.enter(true).await;
    deaf.request(command::READ, command_flag::DF, 1, 0, ALL).await;
    while server.memory_in_use() < ALL.into() {
        tokio::task::yield_now().await;
    }
    (server, device, deaf)
}

fn index(at: u64) -> usize {
    usize::try_from(at).unwrap()
}

/// The bytes that a reply tells for a READ of `len` bytes at `offset`.
fn bytes(reply: &Reply, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    let mut told = 0;
    for (kind, payload) in &reply.content {
        if *kind == u16::MAX {
            return payload.clone();
        }
        let (at, rest) = payload.split_at(8);
        let at = index(u64::from_be_bytes(at.try_into().unwrap()) - offset);
        assert_eq!(at, told, "parts come in order");
        if *kind == chunk::OFFSET_HOLE {
            told += u32::from_be_bytes(rest.try_into().unwrap()) as usize;
        } else {
            bytes[at..at + rest.len()].copy_from_slice(rest);
            told += rest.len();
        }
    }
    assert_eq!(told, bytes.len());
    bytes
}

#[tokio::test(start_paused = true)]
async fn a_read_without_memory_waits_for_nobody_and_gives_the_same_bytes() {
    let (server, device, _deaf) = full().await;
    let begun = Instant::now();
    for form in FORMS {
        let mut raw = form.enter(&server, 64 << 10).await;
        for (cookie, (offset, len)) in
            [(0, 3 * MIB), (70_001, 2 * MIB + 77), (1 << 20, 65_537)].into_iter().enumerate()
        {
            let before = device.log().len();
            form.ask(&mut raw, cookie as u64, offset, len).await;
            let (mut left, mut simple) = (1, len as usize);
            if form != Form::Simple {
                // What comes behind it is answered, too.
                form.ask(&mut raw, 77, 0, 512).await;
                raw.request(command::FLUSH, 0, 99, 0, 0).await;
                (left, simple) = (3, 0);
            }
            for _ in 0..left {
                let reply = raw.reply_of(simple).await;
                assert_eq!(reply.error, 0);
                if reply.cookie == cookie as u64 {
                    let at = index(offset);
                    assert!(bytes(&reply, offset, len) == device.bytes()[at..at + len as usize]);
                }
            }
            let reads = device.log().split_off(before);
            let longest = reads.iter().map(|call| match call {
                Call::Read(_, len) => *len,
                _ => 0,
            });
            assert!(longest.max() <= Some(RESERVE), "{form:?}: {reads:?}");
            assert_eq!(server.memory_in_use(), ALL.into());
        }
    }
    assert_eq!(begun.elapsed(), Duration::ZERO, "it waited for a timer");
    assert_eq!(server.connections(), 2, "nobody had to go, but those who left");
}

#[cfg(feature = "client")]
#[tokio::test]
async fn our_client_reads_the_same_in_parts_by_every_kind_of_headers() {
    let (server, device, _deaf) = full().await;
    let content = device.bytes();
    for headers in [Headers::Simple, Headers::Structured, Headers::Extended] {
        let (ours, theirs) = tokio::io::duplex(16 << 10);
        server.serve_stream(theirs);
        let options = ClientOptions { headers, ..ClientOptions::default() };
        let client = NbdDevice::over_stream(ours, "disk", options).await.unwrap();
        let before = device.log().len();
        for (at, len) in [(0, 3 * MIB), (70_001, 2 * MIB + 77), (99 << 10, 65_537), (900 << 10, 9)]
        {
            let range = ByteRange::new(at, len.into()).unwrap();
            let read = client.read(range).await.unwrap().to_vec();
            assert!(read == content[index(at)..index(range.end())], "{headers:?}: {range}");
        }
        // A part that fails is an error of the whole, and the next request is understood.
        if headers != Headers::Simple {
            device.hold(|call| matches!(call, Call::Read(at, _) if *at >= 1 << 20));
            let range = ByteRange::new(100 << 10, 2 << 20).unwrap();
            let breaking = async {
                while device.held_now() == 0 {
                    tokio::task::yield_now().await;
                }
                device.fail(ErrorKind::Other);
                device.release();
            };
            let (read, ()) = tokio::join!(client.read(range), breaking);
            assert!(read.is_err(), "{headers:?}");
            device.mend();
        }
        let end = client.read(ByteRange::new(2000 << 10, 300_000).unwrap()).await.unwrap();
        assert!(end.to_vec() == content[2000 << 10..(2000 << 10) + 300_000], "{headers:?}");
        let reads = device.log().split_off(before);
        assert!(reads.iter().all(|call| !matches!(call, Call::Read(_, len) if *len > RESERVE)));
        client.close().await.unwrap();
    }
}

async fn settle() {
    for _ in 0..2000 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn where_memory_comes_back_the_rest_comes_at_once() {
    for form in FORMS {
        let (server, device, deaf) = full().await;
        let mut raw = form.enter(&server, 4096).await;
        let before = device.log().len();
        // Data, of which none is told in few bytes.
        form.ask(&mut raw, 5, 100 << 10, MIB).await;
        settle().await;
        assert_eq!(device.log().len() - before, 1, "one part, until it is read");
        drop(deaf);
        while server.memory_in_use() >= ALL.into() {
            tokio::task::yield_now().await;
        }
        let reply = raw.reply_of(1 << 20).await;
        assert!(
            bytes(&reply, 100 << 10, MIB) == device.bytes()[100 << 10..(100 << 10) + (1 << 20)]
        );
        let reads = device.log().split_off(before);
        assert!(reads.len() <= 3, "{form:?}: {reads:?}");
        settle().await;
        assert_eq!(server.memory_in_use(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_part_that_fails_is_told_where_that_can_be_and_else_ends_the_connection() {
    for form in FORMS {
        let (server, device, _deaf) = full().await;
        let mut raw = form.enter(&server, 4096).await;
        form.ask(&mut raw, 5, 100 << 10, MIB).await;
        settle().await;
        device.fail(ErrorKind::Other);
        if form == Form::Chunks {
            let reply = raw.reply().await;
            assert_eq!((reply.cookie, reply.error), (5, error::EIO));
            assert_eq!(reply.content.len(), 1, "the part that was there");
        } else {
            let told = raw.rest().await.len();
            assert!((1 << 16..1 << 20).contains(&told), "{form:?}: {told}");
            continue;
        }
        // And where the first of them fails.
        for form in FORMS {
            let mut raw = form.enter(&server, 4096).await;
            for cookie in [6, 7] {
                form.ask(&mut raw, cookie, 0, MIB).await;
                let reply = raw.reply().await;
                assert_eq!((reply.cookie, reply.error), (cookie, error::EIO), "{form:?}");
                assert!(reply.content.is_empty());
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_half_way_leaves_nothing_behind() {
    for form in FORMS {
        let (server, _, deaf) = full().await;
        let mut raw = form.enter(&server, 4096).await;
        for cookie in 0..10 {
            form.ask(&mut raw, cookie, 0, 2 * MIB).await;
        }
        raw.take(5000).await;
        drop(raw);
        while server.connections() > 1 {
            tokio::task::yield_now().await;
        }
        assert_eq!(server.memory_in_use(), ALL.into());
        drop(deaf);
        while server.memory_in_use() > 0 {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn block_status_without_memory_tells_less_at_a_time() {
    let (server, device, _deaf) = full().await;
    device.tell_extents(10_000);
    let mut raw = Raw::entered(&server).await;
    for cookie in 0..3000 {
        raw.request(command::WRITE, 0, cookie, (32 << 20) + cookie * 8192, 1).await;
        raw.send(b"x").await;
        assert_eq!(raw.reply().await.error, 0);
    }
    let begun = Instant::now();
    let (mut at, mut replies) = (32_u64 << 20, 0);
    while at < (32 << 20) + 3000 * 8192 {
        let len = u32::try_from(SIZE - at).unwrap();
        raw.request(command::BLOCK_STATUS, 0, 1, at, len).await;
        let reply = raw.reply().await;
        assert_eq!(reply.error, 0);
        let extents = &reply.content[0].1[4..];
        assert!(extents.len() / 8 <= 2730, "more than the reserve holds");
        at += extents
            .chunks(8)
            .map(|one| u64::from(u32::from_be_bytes(one[..4].try_into().unwrap())))
            .sum::<u64>();
        replies += 1;
    }
    assert_eq!(replies, 3);
    assert_eq!(begun.elapsed(), Duration::ZERO);
}
