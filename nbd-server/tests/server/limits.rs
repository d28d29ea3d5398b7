//! The limits of a server, each reached by somebody: what they get for an answer, and that others go on.

use std::sync::Arc;
use std::time::Duration;

use nbd_server::wire::{self, command, command_flag, option};
use nbd_server::{Export, Limits, Peer, Removal, Server, ServerConfig};
use tokio::time::{Instant, advance, sleep};

use crate::device::{Call, TestDevice};
use crate::raw::{Raw, go};

const SIZE: u64 = 64 << 20;
const MIB: u32 = 1 << 20;

fn with_limits(change: impl FnOnce(&mut Limits)) -> (Server, Arc<TestDevice>) {
    let mut limits = Limits::default();
    change(&mut limits);
    let device = TestDevice::new(SIZE);
    let server = Server::new(ServerConfig::with_limits(limits));
    server.add_export(Export::new("disk", Arc::clone(&device) as _)).unwrap();
    (server, device)
}

/// What a client is told that wants one connection too many to an export, by each option that could give it one.
async fn is_full(server: &Server, export: &str) {
    let mut raw = Raw::new(server);
    raw.greet(3).await;
    for option in [option::INFO, option::GO] {
        let replies = raw.option(option, &go(export)).await;
        let [(kind, text)] = &replies[..] else { panic!("{replies:?}") };
        assert_eq!(*kind, wire::reply::ERR_POLICY);
        assert_eq!(text, b"the export has as many connections as it may have");
    }
    raw.send_option(option::EXPORT_NAME, export.as_bytes()).await;
    assert!(raw.rest().await.is_empty());
}

#[tokio::test]
async fn an_export_has_as_many_connections_as_it_may_have_and_places_come_back() {
    let (server, device) = with_limits(|limits| limits.connections_per_export = Some(2));
    let export = |name: &str| Export::new(name, Arc::clone(&device) as _);
    server.add_export(export("one").max_connections(1)).unwrap();
    server.add_export(export("any").max_connections(usize::MAX)).unwrap();
    let enter = |name: &'static str| {
        let server = server.clone();
        async move {
            let mut raw = Raw::new(&server);
            raw.greet(3).await;
            raw.go(name).await;
            raw
        }
    };
    let mut held = Vec::new();
    for name in ["disk", "disk", "one", "any", "any", "any"] {
        held.push(enter(name).await);
    }
    is_full(&server, "disk").await;
    is_full(&server, "one").await;
    // One that was refused takes another export instead, and its connection.
    let mut raw = Raw::new(&server);
    raw.greet(3).await;
    assert_eq!(raw.option(option::GO, &go("one")).await[0].0, wire::reply::ERR_POLICY);
    raw.go("any").await;
    drop(held);
    while server.connections() > 1 {
        tokio::task::yield_now().await;
    }
    enter("one").await;
    drop((enter("disk").await, enter("disk").await));
}

#[tokio::test]
async fn connections_from_before_a_change_of_their_export_count() {
    let (server, device) = with_limits(|limits| limits.connections_per_export = Some(2));
    let mut held = Vec::new();
    for text in ["one", "two"] {
        let export = Export::new("disk", Arc::clone(&device) as _).description(text);
        server.replace_exports([export], Removal::Drain).unwrap();
        held.push(Raw::entered(&server).await);
    }
    let export = || Export::new("disk", Arc::clone(&device) as _).description("three");
    server.replace_exports([export()], Removal::Drain).unwrap();
    is_full(&server, "disk").await;
    // Whichever of them goes leaves its place.
    drop(held.remove(0));
    while server.connections() > 1 {
        tokio::task::yield_now().await;
    }
    held.push(Raw::entered(&server).await);
    is_full(&server, "disk").await;
    let one = export().max_connections(1);
    server.replace_exports([one], Removal::Drain).unwrap();
    is_full(&server, "disk").await;
}

#[tokio::test]
async fn a_client_has_as_many_connections_as_it_may_have_and_others_have_theirs() {
    let (server, _) = with_limits(|limits| limits.connections_per_client = Some(2));
    let tcp = |port: u16| Peer::Tcp(([10, 0, 0, 1], port).into());
    let mut first = Raw::of(&server, tcp(1));
    first.enter(true).await;
    let mut half_open = Raw::of(&server, tcp(2));
    assert_eq!(half_open.take(18).await.len(), 18);
    // Not even a greeting.
    assert!(Raw::of(&server, tcp(3)).rest().await.is_empty());
    for other in [Peer::Tcp(([10, 0, 0, 2], 1).into()), Peer::Unix { uid: 7 }, Peer::Unknown] {
        Raw::of(&server, other).enter(true).await;
    }
    drop(half_open);
    let mut places = 0;
    for _ in 0..10_000 {
        let mut again = Raw::of(&server, tcp(4));
        use tokio::io::AsyncReadExt;
        places += usize::from(again.stream.read_exact(&mut [0; 18]).await.is_ok());
        if places > 0 {
            break;
        }
        tokio::task::yield_now().await;
    }
    assert_eq!(places, 1, "the place of whoever left");
    first.request(command::FLUSH, 0, 1, 0, 0).await;
    assert_eq!(first.reply().await.error, 0);
}

#[tokio::test(start_paused = true)]
async fn who_comes_before_the_server_knows_that_the_last_one_left_has_its_place() {
    let (server, _) = with_limits(|limits| limits.connections_per_client = Some(1));
    let client = || Raw::of(&server, Peer::Unix { uid: 7 });
    let begun = Instant::now();
    let mut first = client();
    first.enter(true).await;
    let (mut second, mut other) = (client(), Raw::of(&server, Peer::Unix { uid: 8 }));
    other.greet(3).await;
    first.request(command::DISC, 0, 0, 0, 0).await;
    second.greet(3).await;
    assert_eq!(begun.elapsed(), Duration::ZERO);
    assert!(client().rest().await.is_empty());
    assert_eq!(begun.elapsed(), Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn who_finds_no_place_waits_for_a_second_and_for_nobody_who_waits_before_it() {
    let (server, _) = with_limits(|limits| limits.connections = 2);
    let (mut first, mut second) = (Raw::new(&server), Raw::new(&server));
    first.greet(3).await;
    second.greet(3).await;
    for _ in 0..2 {
        // The first that is refused uses up nobody else's patience.
        let begun = Instant::now();
        let crowd: Vec<_> = (0..2).map(|_| Raw::new(&server)).collect();
        assert!(Raw::new(&server).rest().await.is_empty());
        assert_eq!(begun.elapsed(), Duration::ZERO, "as many wait as are served");
        for mut one in crowd {
            assert!(one.rest().await.is_empty());
        }
        assert_eq!(begun.elapsed(), Duration::from_secs(1));
    }
    let (begun, mut next) = (Instant::now(), Raw::new(&server));
    drop(first);
    next.greet(3).await;
    assert_eq!(begun.elapsed(), Duration::ZERO);
    // Who waits does not keep the server from stopping.
    let mut last = Raw::new(&server);
    let stopped = server.shutdown(Duration::from_secs(20));
    let (rest, _) = tokio::join!(last.rest(), stopped);
    assert!(rest.is_empty());
    assert!(begun.elapsed() < Duration::from_secs(5));
    drop((next, second));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_waits_for_itself_is_in_nobody_elses_way() {
    let (server, _) = with_limits(|limits| {
        limits.connections = 3;
        limits.connections_per_client = Some(1);
    });
    let user = |uid| Raw::of(&server, Peer::Unix { uid });
    let begun = Instant::now();
    let mut first = user(7);
    first.greet(3).await;
    let crowd: Vec<_> = (0..10).map(|_| user(7)).collect();
    for uid in [8, 9] {
        let mut other = user(uid);
        other.greet(3).await;
        drop(other);
    }
    assert_eq!(begun.elapsed(), Duration::ZERO);
    drop(crowd);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_idle_for_too_long_is_closed_and_a_busy_one_is_not() {
    let limit = Duration::from_secs(60);
    let (server, device) = with_limits(|limits| limits.idle_timeout = Some(limit));
    let export = Export::new("patient", Arc::clone(&device) as _).idle_timeout(Duration::MAX);
    server.add_export(export).unwrap();
    let mut patient = Raw::new(&server);
    patient.greet(3).await;
    patient.go("patient").await;
    // One in the middle of a header, one whose request takes long, one that asks now and then, one that does nothing.
    let mut halfway = Raw::entered(&server).await;
    halfway.send(&[0; 5]).await;
    let mut waits = Raw::entered(&server).await;
    device.hold(|call| matches!(call, Call::Flush));
    waits.request(command::FLUSH, 0, 7, 0, 0).await;
    device.held(1).await;
    let mut asks = Raw::entered(&server).await;
    let mut idle = Raw::entered(&server).await;
    let begun = Instant::now();
    for _ in 0..10 {
        sleep(limit / 2).await;
        asks.request(command::READ, command_flag::DF, 1, 0, 512).await;
        assert_eq!(asks.reply().await.error, 0);
    }
    assert!(begun.elapsed() > 4 * limit);
    assert!(idle.rest().await.is_empty() && halfway.rest().await.is_empty());
    device.release();
    assert_eq!(waits.reply().await.cookie, 7);
    let answered = Instant::now();
    assert!(waits.rest().await.is_empty());
    assert!(answered.elapsed() >= limit, "its time begins with the answer");
    patient.request(command::FLUSH, 0, 1, 0, 0).await;
    assert_eq!(patient.reply().await.error, 0);
}

/// A client with a request in flight whose reply it does not read, of one MiB times `count`.
async fn deaf(server: &Server, count: u64) -> Raw {
    let mut raw = Raw::with_buffer(server, 4096);
    raw.enter(true).await;
    for cookie in 0..count {
        raw.request(command::READ, command_flag::DF, cookie, 0, MIB).await;
    }
    raw
}

async fn settle() {
    for _ in 0..2000 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn memory_is_bounded_over_all_clients_and_nobody_takes_all_of_it() {
    let (server, device) = with_limits(|limits| limits.memory_bytes = 64 << 20);
    let mut greedy = Vec::new();
    for _ in 0..4 {
        greedy.push(deaf(&server, 64).await);
    }
    settle().await;
    // The first leaves a half, the next a half of that, and so on; what each has of its own comes besides.
    let held = server.memory_in_use() >> 20;
    assert!((32..=32 + 16 + 8 + 4).contains(&held), "{held} MiB are in flight");
    let read = device.log().into_iter().map(|call| match call {
        Call::Read(_, len) => len,
        other => panic!("{other:?}"),
    });
    let reserves = 4 * (64 << 10);
    assert!(read.sum::<u64>() <= server.memory_in_use() + reserves);
    // A modest client does not notice.
    let begun = Instant::now();
    let mut modest = Raw::entered(&server).await;
    for cookie in 0..100 {
        modest.request(command::READ, command_flag::DF, cookie, 0, MIB).await;
        assert_eq!(modest.reply().await.content[0].1.len(), 8 + (1 << 20));
        modest.request(command::WRITE, 0, cookie, 0, MIB).await;
        modest.send(&vec![1; 1 << 20]).await;
        assert_eq!(modest.reply().await.error, 0);
    }
    assert_eq!(begun.elapsed(), Duration::ZERO, "it waited for a timer");
    assert_eq!(server.connections(), 5, "and nobody had to go");
}

#[tokio::test(start_paused = true)]
async fn requests_for_little_wait_behind_no_crowd_that_stands_in_line_for_much() {
    // The proportions of the default limits, with a fraction of the memory.
    let much = 2 * MIB;
    for crowd in [18, 50, 100] {
        let (server, _) = with_limits(|limits| {
            limits.memory_bytes = 64 << 20;
            limits.max_payload_bytes = much;
            limits.in_flight_bytes = 2 * much;
            limits.payload_timeout = Duration::from_secs(3600);
        });
        let mut greedy = Vec::new();
        for _ in 0..crowd {
            let mut raw = Raw::with_buffer(&server, 4096);
            raw.enter(true).await;
            for cookie in 0..4 {
                raw.request(command::READ, command_flag::DF, cookie, 0, much).await;
            }
            greedy.push(raw);
            settle().await;
            assert!(server.memory_in_use() <= 48 << 20, "the rest is kept");
        }
        // Another that wants much has to wait now.
        let mut line = Raw::entered(&server).await;
        line.request(command::READ, command_flag::DF, 0, 0, much).await;
        let mut modest = Raw::entered(&server).await;
        let begun = Instant::now();
        for cookie in 0..10 {
            for len in [MIB, 128 << 10, 512] {
                modest.request(command::READ, command_flag::DF, cookie, 0, len).await;
                let data = &modest.reply().await.content[0].1;
                assert_eq!(data.len(), 8 + usize::try_from(len).unwrap());
            }
            modest.request(command::WRITE, 0, cookie, 0, MIB).await;
            modest.send(&vec![1; 1 << 20]).await;
            assert_eq!(modest.reply().await.error, 0);
            modest.request(command::BLOCK_STATUS, 0, cookie, 0, MIB).await;
            assert_eq!(modest.reply().await.content.len(), 1);
            modest.request(command::FLUSH, 0, cookie, 0, 0).await;
            assert_eq!(modest.reply().await.error, 0);
            assert!(server.memory_in_use() <= 64 << 20);
        }
        assert_eq!(begun.elapsed(), Duration::ZERO, "it waited behind {crowd}");
        assert_eq!(server.connections(), crowd + 2, "and nobody had to go");
    }
}

#[tokio::test(start_paused = true)]
async fn clients_that_do_not_read_lose_their_connections_where_others_wait_for_their_memory() {
    let (server, _) = with_limits(|limits| limits.memory_bytes = 32 << 20);
    let mut stuck = Vec::new();
    for _ in 0..32 {
        let mut raw = Raw::with_buffer(&server, 4096);
        raw.enter(true).await;
        raw.request(command::READ, command_flag::DF, 1, 0, MIB).await;
        stuck.push(raw);
    }
    settle().await;
    advance(Duration::from_secs(3600)).await;
    settle().await;
    assert_eq!(server.connections(), 32, "while nobody wants it, they may keep it");
    let mut wants = Raw::entered(&server).await;
    // What is small goes on at once.
    let begun = Instant::now();
    wants.request(command::READ, command_flag::DF, 1, 0, 512).await;
    assert_eq!(wants.reply().await.error, 0);
    wants.request(command::WRITE, 0, 2, 0, MIB).await;
    wants.send(&vec![1; 1 << 20]).await;
    assert_eq!(wants.reply().await.error, 0);
    assert_eq!(begun.elapsed(), Duration::ZERO);
    assert_eq!(server.connections(), 33, "that needs nothing of theirs");
    wants.request(command::READ, command_flag::DF, 3, 0, 2 * MIB).await;
    assert_eq!(wants.reply().await.content[0].1.len(), 8 + (2 << 20));
    assert_eq!(begun.elapsed(), Duration::ZERO);
    settle().await;
    sleep(Duration::from_secs(10)).await;
    assert_eq!(server.connections(), 1);
}

/// A client that has sent so much of a query for contexts, which is as long as an option may be.
async fn asking(server: &Server, sent: usize) -> (Raw, Vec<u8>) {
    // Sending waits for nobody.
    let mut raw = Raw::with_buffer(server, 1 << 20);
    raw.greet(3).await;
    assert_eq!(raw.option(option::STRUCTURED_REPLY, &[]).await[0].0, wire::reply::ACK);
    let mut option = Vec::new();
    for (value, len) in [(wire::IHAVEOPT, 8), (option::LIST_META_CONTEXT.into(), 4), (OPTION, 4)] {
        option.extend_from_slice(&value.to_be_bytes()[8 - len..]);
    }
    // The export, and queries of 4 KiB as far as they go.
    let mut data = b"\0\0\0\x04disk\0\0\0\x3f".to_vec();
    for _ in 0..0x3f {
        data.extend_from_slice(&4096_u32.to_be_bytes());
        data.extend_from_slice(&[b'x'; 4096]);
    }
    option.extend_from_slice(&data);
    option.resize(16 + usize::try_from(OPTION).unwrap(), 0);
    let rest = option.split_off(16 + sent);
    raw.send(&option).await;
    settle().await;
    (raw, rest)
}

/// The length of an option, in bytes.
const OPTION: u64 = 256 << 10;

#[tokio::test(start_paused = true)]
async fn options_of_the_handshake_take_of_the_memory_what_has_come_of_them() {
    let limit = 4 << 20;
    let (server, _) = with_limits(|limits| {
        limits.memory_bytes = limit;
        limits.max_payload_bytes = MIB;
    });
    // What is announced costs nothing, and what has a place in the reserve.
    for (sent, held) in [(0, 0), (60 << 10, 0), (100 << 10, OPTION), (255 << 10, OPTION)] {
        let (raw, _) = asking(&server, sent).await;
        assert_eq!(server.memory_in_use(), held, "{sent}");
        drop(raw);
        settle().await;
        assert_eq!(server.memory_in_use(), 0, "{sent}");
    }
    // More than there is memory for: some wait, and nobody else notices.
    let mut crowd = Vec::new();
    for _ in 0..100 {
        crowd.push(asking(&server, 255 << 10).await);
        assert!(server.memory_in_use() <= limit);
    }
    assert!(server.memory_in_use() >= limit / 2);
    let begun = Instant::now();
    let mut modest = Raw::entered(&server).await;
    for cookie in 0..10 {
        modest.request(command::READ, command_flag::DF, cookie, 0, 64 << 10).await;
        assert_eq!(modest.reply().await.error, 0);
    }
    // Whoever is done makes room for the next, and holds nothing any more.
    for (raw, rest) in &mut crowd {
        raw.send(rest).await;
        let answer = raw.option_reply(option::LIST_META_CONTEXT).await;
        assert_eq!(answer.0, wire::reply::ERR_INVALID, "there are zeros behind the queries");
    }
    assert_eq!(begun.elapsed(), Duration::ZERO, "somebody waited for a timer");
    assert_eq!(server.memory_in_use(), 0);
    for (raw, _) in &mut crowd {
        raw.go("disk").await;
    }
    drop(crowd);
    // Whoever does not get on loses its connection, and with it what it held.
    let mut crowd = Vec::new();
    for _ in 0..100 {
        crowd.push(asking(&server, 255 << 10).await);
    }
    sleep(Duration::from_secs(40)).await;
    settle().await;
    assert_eq!((server.connections(), server.memory_in_use()), (1, 0));
}

#[tokio::test]
async fn one_connection_too_many_in_all_gets_not_even_a_greeting() {
    let (server, _) = with_limits(|limits| limits.connections = 2);
    let mut held = [Raw::entered(&server).await, Raw::entered(&server).await];
    assert!(Raw::new(&server).rest().await.is_empty());
    held[0].request(command::FLUSH, 0, 1, 0, 0).await;
    assert_eq!(held[0].reply().await.error, 0);
}

#[tokio::test(start_paused = true)]
async fn times_beyond_the_clock_never_come() {
    let (server, device) = with_limits(|limits| limits.handshake_timeout = Duration::MAX);
    let mut raw = Raw::new(&server);
    sleep(Duration::from_secs(3600)).await;
    raw.greet(3).await;
    raw.go("disk").await;
    let report = server.shutdown(Duration::MAX).await;
    assert_eq!((report.dropped_connections, report.unflushed.len()), (0, 0));
    assert_eq!(device.log(), [Call::Flush]);
}
