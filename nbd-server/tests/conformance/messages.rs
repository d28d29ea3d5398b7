//! "Transmission", "Request message", "Simple reply message", "Structured reply chunk message".

use bytes::BytesMut;
use nbd_server::wire::{Headers, Request, command, command_flag as flag};

use crate::peer::{Asked, Peer};
use crate::stage::{Stage, Way};

/// Requests as bytes, for sending in other ways than one by one.
fn bytes_of(way: Way, asked: &Asked, payload: &[u8]) -> Vec<u8> {
    let Asked { command, flags, cookie, offset, len } = *asked;
    let request = Request { flags, command, cookie, offset, len };
    let mut bytes = BytesMut::new();
    match way.headers {
        Headers::Extended => request.encode_extended(&mut bytes),
        _ => request.encode(&mut bytes),
    }
    bytes.extend_from_slice(payload);
    bytes.to_vec()
}

fn write(way: Way, cookie: u64, offset: u64, len: usize) -> Asked {
    let flags = if way.headers == Headers::Extended { flag::PAYLOAD_LEN } else { 0 };
    Asked { command: command::WRITE, flags, cookie, offset, len: len as u64 }
}

#[tokio::test]
async fn many_requests_at_once_get_one_reply_each() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        let (mut bytes, mut pending) = (Vec::new(), Vec::new());
        for number in 0..100 {
            let asked = write(way, number * 3 + 1, number * 512, 512);
            bytes.extend(bytes_of(way, &asked, &[u8::try_from(number + 1).unwrap(); 512]));
            pending.push(asked);
            let (command, flags) = (command::READ, 0);
            let asked = Asked { command, flags, cookie: number * 3 + 2, offset: 1 << 19, len: 64 };
            bytes.extend(bytes_of(way, &asked, &[]));
            pending.push(asked);
        }
        peer.send(&bytes).await;
        while !pending.is_empty() {
            let (index, reply) = peer.reply(&pending).await;
            assert_eq!(reply.error, 0);
            pending.swap_remove(index);
        }
        let read = peer.read(0, 51_200).await;
        assert!(read.chunks(512).zip(1..).all(|(sector, number)| sector == [number; 512]));
    }
}

#[tokio::test]
async fn a_request_may_come_byte_by_byte() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut peer = Peer::entered(&stage, way, "disk").await;
        let asked = write(way, 77, 1000, 5);
        for byte in bytes_of(way, &asked, b"drips") {
            peer.send(&[byte]).await;
        }
        assert_eq!(peer.reply(&[asked]).await.1.error, 0);
        assert_eq!(peer.read(999, 7).await, b"\0drips\0");
        assert_eq!(peer.write(0, 1000, &[0; 5]).await.error, 0);
    }
}

#[tokio::test]
async fn one_client_that_reads_no_replies_does_not_keep_another_waiting() {
    let stage = Stage::new().await;
    for way in Way::all() {
        let mut deaf = Peer::entered(&stage, way, "disk").await;
        for _ in 0..100 {
            deaf.start(command::READ, 0, 0, 1 << 20).await;
        }
        let mut other = Peer::entered(&stage, way, "disk").await;
        assert_eq!(other.read(0, 4096).await, [0; 4096]);
    }
}
