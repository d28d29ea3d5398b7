//! What brought down, or got through, other servers and clients: one test for each class of input, with the number under
//! which it became known. After each, the server serves the next client. CVE-2021-3716 (what is said in plain text before
//! TLS) is in `tls/raw.rs`, CVE-2015-0847 (signals at any moment) in the program's `storm.rs`.

use std::sync::Arc;
use std::time::Duration;

use bytes::BufMut;
use nbd_server::wire::{self, Request, command, command_flag, error, option, reply};
use nbd_server::{Admission, Export, Peer, Removal, Server, ServerConfig};
use tokio::io::AsyncWriteExt;

use crate::device::{Call, TestDevice};
use crate::raw::{Raw, go};

const SIZE: u64 = 96 << 20;

fn server() -> (Server, Arc<TestDevice>) {
    let device = TestDevice::new(SIZE);
    let server = Server::new(ServerConfig::default());
    server.add_export(Export::new("disk", Arc::clone(&device) as _)).unwrap();
    (server, device)
}

async fn greeted(server: &Server) -> Raw {
    let mut raw = Raw::new(server);
    raw.greet(3).await;
    raw
}

/// The next client is served, and nothing is left of those before.
async fn goes_on(server: &Server) {
    while server.connections() > 0 {
        tokio::task::yield_now().await;
    }
    let mut raw = Raw::entered(server).await;
    raw.request(command::FLUSH, 0, 1, 0, 0).await;
    assert_eq!(raw.reply().await.error, 0);
}

/// CVE-2017-7539: data that nobody expects during the negotiation.
#[tokio::test]
async fn unexpected_data_in_the_negotiation() {
    let (server, _) = server();
    for noise in [
        &[0xff; 4][..],
        &[0; 64],
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0\0\0\x03IHAVEOPTxxxxxxxx",
        &[0, 0, 0, 3, 0x25, 0x60, 0x95, 0x13],
    ] {
        let mut raw = Raw::new(&server);
        raw.take(18).await;
        let _ = raw.stream.write_all(noise).await;
        drop(raw);
        goes_on(&server).await;
    }
}

/// CVE-2017-9524 and CVE-2013-7441: a connection that ends at any place of the negotiation.
#[tokio::test]
async fn a_hang_up_at_any_place_of_the_negotiation() {
    let (server, _) = server();
    let mut bytes = vec![0, 0, 0, 3];
    for (option, data) in
        [(option::STRUCTURED_REPLY, &[][..]), (option::INFO, &go("disk")), (option::LIST, &[])]
    {
        bytes.put_u64(wire::IHAVEOPT);
        bytes.put_u32(option);
        bytes.put_u32(u32::try_from(data.len()).unwrap());
        bytes.put_slice(data);
    }
    for end in 0..bytes.len() {
        let mut raw = Raw::new(&server);
        // Without reading even the greeting.
        raw.stream.write_all(&bytes[..end]).await.unwrap();
        drop(raw);
    }
    goes_on(&server).await;
}

/// CVE-2017-10664, and the hang-up with replies pending that aborts a server of today: nobody is there when the replies
/// are written.
#[tokio::test]
async fn a_hang_up_while_replies_are_written() {
    let (server, device) = server();
    for held in [false, true] {
        let mut raw = Raw::with_buffer(&server, 4096);
        raw.enter(true).await;
        if held {
            device.hold(|call| matches!(call, Call::Read(..)));
        }
        for cookie in 0..16 {
            raw.request(command::READ, command_flag::DF, cookie, 0, 1 << 20).await;
        }
        if held {
            device.held(1).await;
        } else {
            raw.take(100).await;
        }
        drop(raw);
        device.release();
        goes_on(&server).await;
    }
}

/// CVE-2017-15118, CVE-2022-26496: a name of an export that is longer than any buffer for it.
#[tokio::test]
async fn names_longer_than_any_buffer() {
    let (server, _) = server();
    for len in [4095, 4096, 4097, 5000, 65_536, 200_000] {
        let name = "x".repeat(len);
        let mut raw = greeted(&server).await;
        for option in [option::INFO, option::GO] {
            let (kind, text) = raw.option(option, &go(&name)).await.remove(0);
            let expected = if len <= 4096 { reply::ERR_UNKNOWN } else { reply::ERR_INVALID };
            assert!(kind == expected || (len > 4096 && kind >> 31 == 1), "{len}: {kind:#x}");
            assert!(text.len() <= 4096, "{len}");
        }
        raw.send_option(option::EXPORT_NAME, name.as_bytes()).await;
        assert!(raw.rest().await.is_empty());
        goes_on(&server).await;
    }
}

/// CVE-2017-15119: options that announce gigabytes. Nothing of it is kept, and the client's time is that of its handshake.
#[tokio::test(start_paused = true)]
async fn options_that_announce_gigabytes() {
    let (server, _) = server();
    let mut raw = greeted(&server).await;
    for option in [option::LIST, option::INFO, option::SET_META_CONTEXT, 77] {
        raw.send_option(option, &vec![0; 300 << 10]).await;
        assert_eq!(raw.option_reply(option).await.0 >> 31, 1, "option {option}");
    }
    raw.go("disk").await;
    drop(raw);
    for option in [option::EXPORT_NAME, option::LIST, option::GO, 77] {
        let mut raw = greeted(&server).await;
        let mut header = b"IHAVEOPT".to_vec();
        header.put_u32(option);
        header.put_u32(u32::MAX);
        raw.send(&header).await;
        // It goes on sending, slowly: the time is up all the same.
        let begun = tokio::time::Instant::now();
        while raw.stream.write_all(&[0; 512]).await.is_ok() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        assert!(begun.elapsed() <= Duration::from_secs(60), "option {option}");
    }
    goes_on(&server).await;
}

/// CVE-2019-14850: a client that has not chosen an export costs the device nothing.
#[tokio::test]
async fn a_device_is_not_touched_before_an_export_is_chosen() {
    let (server, device) = server();
    let mut raw = greeted(&server).await;
    raw.option(option::LIST, &[]).await;
    raw.option(option::INFO, &go("disk")).await;
    raw.option(option::STRUCTURED_REPLY, &[]).await;
    raw.option(option::SET_META_CONTEXT, b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation")
        .await;
    drop(raw);
    goes_on(&server).await;
    assert_eq!(device.log(), [Call::Flush], "of the client behind it");
}

/// CVE-2019-14851: INFO again and again, on several exports, and GO behind it.
#[tokio::test]
async fn info_again_and_again() {
    let (server, device) = server();
    server.add_export(Export::new("other", Arc::clone(&device) as _)).unwrap();
    let mut raw = greeted(&server).await;
    for name in ["disk", "disk", "none", "other", "", "disk"] {
        let last = raw.option(option::INFO, &go(name)).await.pop().unwrap().0;
        assert_eq!(last == reply::ACK, matches!(name, "disk" | "other"), "{name}");
    }
    raw.go("other").await;
    raw.request(command::READ, 0, 1, 0, 512).await;
    assert_eq!(raw.reply_of(512).await.error, 0);
    drop(raw);
    goes_on(&server).await;
}

/// CVE-2020-10761: an error whose text would hold a long name.
#[tokio::test]
async fn errors_about_long_names_have_short_texts() {
    let (server, _) = server();
    for len in [30, 200, 255, 256, 1023, 4000, 4096] {
        for fill in ["x", "ä", "\u{1f600}"] {
            let name = fill.repeat(len / fill.len());
            let mut raw = greeted(&server).await;
            let (kind, text) = raw.option(option::GO, &go(&name)).await.remove(0);
            assert_eq!(kind, reply::ERR_UNKNOWN);
            assert!(text.len() < 200 && std::str::from_utf8(&text).is_ok());
            raw.go("disk").await;
        }
    }
    goes_on(&server).await;
}

/// CVE-2022-26495: a length of a name that wraps where something is added to it.
#[tokio::test]
async fn lengths_inside_of_options_that_wrap() {
    let (server, _) = server();
    for len in [u32::MAX, u32::MAX - 1, u32::MAX - 6, 1 << 31, (1 << 31) - 1, 7] {
        let mut raw = greeted(&server).await;
        let mut data = len.to_be_bytes().to_vec();
        data.extend(b"disk\0\0");
        for option in [option::INFO, option::GO] {
            assert_eq!(raw.option(option, &data).await[0].0, reply::ERR_INVALID, "{len}");
        }
        raw.option(option::STRUCTURED_REPLY, &[]).await;
        // The malformed SET_META_CONTEXT that aborts a server of today: of the name, of the count, of a query.
        let mut count = b"\0\0\0\x04disk".to_vec();
        count.extend(len.to_be_bytes());
        let mut query = b"\0\0\0\x04disk\0\0\0\x01".to_vec();
        query.extend(len.to_be_bytes());
        query.extend(b"base:");
        for data in [&data, &count, &query, &query[..9], &query[..3]] {
            for option in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
                let kind = raw.option(option, data).await.pop().unwrap().0;
                assert_eq!(kind >> 31, 1, "{len} {data:?}");
            }
        }
        raw.go("disk").await;
    }
    goes_on(&server).await;
}

/// CVE-2024-7409: the server goes offline while clients hold their sockets, in the handshake and behind it, and more of
/// them come.
#[tokio::test]
async fn going_offline_under_clients_that_hold_their_sockets() {
    for _ in 0..20 {
        let (server, device) = server();
        let mut half_open = greeted(&server).await;
        let mut idle = Raw::entered(&server).await;
        let mut busy = Raw::entered(&server).await;
        device.hold(|call| matches!(call, Call::Flush));
        busy.request(command::FLUSH, 0, 1, 0, 0).await;
        device.held(1).await;
        let removal = tokio::spawn({
            let server = server.clone();
            async move { server.remove_export("disk", Removal::Cut).await.map(drop) }
        });
        let stopping = tokio::spawn({
            let server = server.clone();
            async move { server.shutdown(Duration::from_secs(20)).await }
        });
        let late: Vec<_> = (0..20).map(|_| Raw::new(&server)).collect();
        tokio::task::yield_now().await;
        device.release();
        assert_eq!(busy.reply().await.error, 0);
        drop((busy.rest().await, idle.rest().await, late));
        let _ = half_open.stream.shutdown().await;
        drop((half_open, idle, busy));
        removal.await.unwrap().unwrap();
        assert_eq!(stopping.await.unwrap().dropped_connections, 0);
        assert_eq!(server.connections(), 0);
    }
}

/// CVE-2025-47711, CVE-2025-47712: block status of the longest ranges, where what is known is longer than the question.
#[tokio::test]
async fn block_status_of_the_longest_ranges() {
    let device = TestDevice::new(SIZE);
    let server = Server::new(ServerConfig::default());
    server.add_export(Export::new("disk", Arc::clone(&device) as _)).unwrap();
    let mut raw = Raw::entered(&server).await;
    for (offset, len, expected) in [
        (0, u32::try_from(SIZE).unwrap(), 0),
        (SIZE - 1, 1, 0),
        (0, u32::MAX, error::EINVAL),
        (1, u32::try_from(SIZE).unwrap(), error::EINVAL),
        (u64::MAX, u32::MAX, error::EINVAL),
        (0, 0, error::EINVAL),
    ] {
        for flags in [0, command_flag::REQ_ONE] {
            raw.request(command::BLOCK_STATUS, flags, 1, offset, len).await;
            let reply = raw.reply().await;
            assert_eq!(reply.error, expected, "{offset} {len}");
            if expected == 0 {
                let data = &reply.content[0].1[4..];
                let told: u64 = data
                    .chunks_exact(8)
                    .map(|one| u64::from(u32::from_be_bytes(one[..4].try_into().unwrap())))
                    .sum();
                assert!((1..=u64::from(len)).contains(&told), "{told}");
            }
        }
    }
    drop(raw);
    goes_on(&server).await;
}

/// CVE-2005-3534: a READ or WRITE longer than any buffer.
#[tokio::test]
async fn requests_longer_than_any_buffer() {
    let (server, device) = server();
    for len in [(32 << 20) + 1, 1 << 30, u32::MAX - 28, u32::MAX] {
        let mut raw = Raw::entered(&server).await;
        raw.request(command::READ, 0, 1, 0, len).await;
        let error = raw.reply().await.error;
        assert!([error::EINVAL, error::EOVERFLOW].contains(&error), "{len}");
        let mut simple = Raw::new(&server);
        simple.enter(false).await;
        simple.request(command::READ, 0, 1, 0, len).await;
        assert_ne!(simple.reply().await.error, 0);
        // The payload of a WRITE is still to come: whoever hangs up instead has changed nothing.
        raw.request(command::WRITE, 0, 2, 0, len).await;
        raw.send(&[1; 4096]).await;
        drop((raw, simple));
        goes_on(&server).await;
    }
    assert!(!device.log().iter().any(|call| matches!(call, Call::Read(..) | Call::Write(..))));
}

/// CVE-2011-1925, CVE-2013-7441: the name of an export that is not there.
#[tokio::test]
async fn an_export_that_is_not_there() {
    let (server, _) = server();
    for name in ["", "none", "../disk", "disk/", "DISK", "disk "] {
        let mut raw = greeted(&server).await;
        raw.send_option(option::EXPORT_NAME, name.as_bytes()).await;
        assert!(raw.rest().await.is_empty(), "{name}");
    }
    goes_on(&server).await;
}

/// CVE-2013-6410: an address that begins with the digits of one that is allowed, or the other way round.
#[tokio::test]
async fn addresses_that_share_digits_with_one_that_is_allowed() {
    let (server, _) = server();
    let allowed = ["10.0.0.1", "192.168.16.0/20"].map(|rule| rule.parse().unwrap());
    server.set_admission(Admission::default().allow(allowed));
    for (address, expected) in [
        ("10.0.0.1", true),
        ("10.0.0.10", false),
        ("10.0.0.100", false),
        ("10.0.0.11", false),
        ("110.0.0.1", false),
        ("192.168.16.1", true),
        ("192.168.31.255", true),
        ("192.168.32.0", false),
        ("192.168.15.255", false),
        ("192.168.1.6", false),
        ("::ffff:10.0.0.1", true),
        ("::10.0.0.1", false),
    ] {
        let peer = Peer::Tcp((address.parse::<std::net::IpAddr>().unwrap(), 1).into());
        let mut raw = Raw::of(&server, peer);
        let heard = if expected { raw.take(18).await } else { raw.rest().await };
        assert_eq!(heard.len(), if expected { 18 } else { 0 }, "{address}");
    }
}

/// Measured in a server of today: WRITE_ZEROES over 64 MiB that reports success and leaves data.
#[tokio::test]
async fn zeros_of_any_length_are_all_written_or_refused() {
    let (server, device) = server();
    let mut raw = Raw::entered(&server).await;
    for at in [0, 64 << 20, (64 << 20) + 512, SIZE - 512] {
        raw.request(command::WRITE, 0, 1, at, 512).await;
        raw.send(&[9; 512]).await;
        assert_eq!(raw.reply().await.error, 0);
    }
    let len = u32::try_from(SIZE).unwrap();
    raw.request(command::WRITE_ZEROES, command_flag::NO_HOLE, 1, 0, len).await;
    assert_eq!(raw.reply().await.error, 0);
    assert!(device.bytes().iter().all(|byte| *byte == 0));
    raw.request(command::WRITE_ZEROES, 0, 1, 1, len).await;
    assert_eq!(raw.reply().await.error, error::ENOSPC);
}

/// Measured in a server of today: writes that are lost because DISC comes right behind them.
#[tokio::test]
async fn writes_right_before_the_end_are_not_lost() {
    let (server, device) = server();
    for hangs_up in [false, true] {
        let mut raw = Raw::entered(&server).await;
        let mut bytes = bytes::BytesMut::new();
        for cookie in 0..64 {
            let offset = cookie * 4096;
            Request { flags: 0, command: command::WRITE, cookie, offset, len: 512 }
                .encode(&mut bytes);
            bytes.put_slice(&[if hangs_up { 2 } else { 1 }; 512]);
        }
        Request { flags: 0, command: command::DISC, cookie: 0, offset: 9, len: 9 }
            .encode(&mut bytes);
        raw.send(&bytes).await;
        if hangs_up {
            drop(raw);
        } else {
            raw.rest().await;
        }
        while server.connections() > 0 {
            tokio::task::yield_now().await;
        }
        let expected = if hangs_up { 2 } else { 1 };
        let bytes = device.bytes();
        assert!((0..64).all(|block| bytes[block * 4096] == expected));
    }
}
