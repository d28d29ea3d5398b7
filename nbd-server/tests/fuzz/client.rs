//! The client against a server that says anything: every call ends, with an error or with an answer that is whole, and
//! nothing the server says makes it panic or take memory without bound.

use block::{BlockDevice, ByteRange, Durability, ZeroMode};
use bytes::{BufMut, Bytes, BytesMut};
use nbd_server::client::{ClientOptions, NbdDevice};
use nbd_server::wire::{
    ChunkHeader, ExtendedChunkHeader, Fields, Headers, IHAVEOPT, INIT_PASSWD, OPTION_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC, info, option, reply,
};
use tokio::io::AsyncWriteExt;

const DISK: u64 = 1 << 20;
/// How much the server says at most, in bytes.
const MAX_SAID: usize = 1 << 20;

/// The first byte says how far the server behaves; what follows are records of what it says then. Returns how many of
/// six calls succeeded.
pub(crate) async fn run(data: &[u8]) -> usize {
    let Some((&shape, data)) = data.split_first() else { return 0 };
    let headers = [Headers::Simple, Headers::Structured, Headers::Extended][usize::from(shape % 3)];
    let behaves = shape & 64 != 0;
    let (ours, mut theirs) = tokio::io::duplex(64 << 10);
    let (mut hear, mut say) = {
        let greeting = if behaves { negotiation(headers, shape) } else { BytesMut::new() };
        theirs.write_all(&greeting).await.expect("room for it");
        tokio::io::split(theirs)
    };
    let hearing = tokio::spawn(async move {
        let _ = tokio::io::copy(&mut hear, &mut tokio::io::sink()).await;
    });
    let said = records(data, headers);
    let server = async {
        // The client has asked by then, unless it never will.
        for _ in 0..64 {
            tokio::task::yield_now().await;
        }
        let _ = say.write_all(&said).await;
        let _ = say.shutdown().await;
        drop(say);
        let _ = hearing.await;
    };
    tokio::join!(server, ask(ours, headers)).1
}

async fn ask(stream: tokio::io::DuplexStream, headers: Headers) -> usize {
    let meta_contexts = vec!["base:allocation".to_owned(), "x:y".to_owned()];
    let options = ClientOptions { headers, meta_contexts, ..ClientOptions::default() };
    let Ok(device) = NbdDevice::over_stream(stream, "disk", options).await else {
        return 0;
    };
    let size = device.limits().size_bytes;
    let whole = ByteRange::between(0, size.min(4096));
    let contexts: Vec<&str> = device.contexts().iter().map(String::as_str).collect();
    let (first, second, written, zeroed, told, flushed) = tokio::join!(
        device.read(whole),
        device.read(ByteRange::between(0, size.min(100))),
        device.write(0, Bytes::from_static(b"text"), Durability::Deferred),
        device.write_zeroes(whole, ZeroMode::default(), Durability::Durable),
        device.block_statuses(&contexts, whole),
        device.flush(),
    );
    let answered = [
        first.is_ok(),
        second.is_ok(),
        written.is_ok(),
        zeroed.is_ok(),
        told.is_ok(),
        flushed.is_ok(),
    ];
    if let Ok(segments) = first {
        assert_eq!(segments.len(), whole.len());
    }
    if let Ok(segments) = second {
        assert_eq!(segments.len(), size.min(100));
    }
    for extents in told.into_iter().flatten() {
        let mut at = whole.start();
        for extent in extents {
            assert_eq!(extent.range.start(), at);
            assert!(!extent.range.is_empty() && extent.range.end() <= whole.end());
            at = extent.range.end();
        }
    }
    device.disconnect().await;
    answered.iter().filter(|answered| **answered).count()
}

/// What a server says until transmission begins, to a client that asks for these headers.
fn negotiation(headers: Headers, shape: u8) -> BytesMut {
    let mut out = BytesMut::new();
    out.put_u64(INIT_PASSWD);
    out.put_u64(IHAVEOPT);
    out.put_u16(3);
    let mut answer = |option: u32, kind: u32, body: &[u8]| {
        out.put_u64(OPTION_REPLY_MAGIC);
        out.put_u32(option);
        out.put_u32(kind);
        out.put_u32(u32::try_from(body.len()).unwrap());
        out.put_slice(body);
    };
    match headers {
        Headers::Simple => {}
        Headers::Structured => answer(option::STRUCTURED_REPLY, reply::ACK, &[]),
        Headers::Extended => answer(option::EXTENDED_HEADERS, reply::ACK, &[]),
    }
    if headers.has_chunks() {
        let names = [&b"\0\0\0\x01base:allocation"[..], b"\0\0\0\x02x:y"];
        for name in names {
            answer(option::SET_META_CONTEXT, reply::META_CONTEXT, name);
        }
        answer(option::SET_META_CONTEXT, reply::ACK, &[]);
    }
    // All that there is, but for what needs other headers, as the shape says.
    let flags: u16 = if shape & 128 != 0 && headers == Headers::Extended { 0x1d6d } else { 0xd6d };
    let mut export = info::EXPORT.to_be_bytes().to_vec();
    export.extend(DISK.to_be_bytes());
    export.extend(flags.to_be_bytes());
    answer(option::GO, reply::INFO, &export);
    answer(option::GO, reply::ACK, &[]);
    out
}

/// What the input has the server say: bytes as they are, simple replies, and chunks whose lengths may lie.
fn records(data: &[u8], headers: Headers) -> BytesMut {
    let (mut rest, mut out) = (Fields(data), BytesMut::new());
    while out.len() < MAX_SAID && record(&mut rest, headers, &mut out).is_some() {}
    out
}

fn record(rest: &mut Fields<'_>, headers: Headers, out: &mut BytesMut) -> Option<()> {
    let tag = rest.take(1)?[0];
    let cookie = u64::from(tag >> 4);
    match tag & 3 {
        0 => out.put_slice(rest.take(usize::from(tag >> 2) + 1)?),
        1 => {
            let error = rest.take(1)?[0];
            out.put_u32(SIMPLE_REPLY_MAGIC);
            out.put_u32(error.into());
            out.put_u64(cookie);
        }
        _ => {
            let head = rest.take(3)?;
            let kind = u16::from(head[0] & 127) | u16::from(head[0] >> 7) << 15;
            let payload = rest.take(usize::from(head[1]))?;
            // Mostly the truth.
            let lie = if head[2] < 200 { 0 } else { u32::from(head[2] - 200) << 12 };
            let len = u32::from(head[1]) + lie;
            let flags = u16::from(tag >> 2 & 3);
            if headers == Headers::Extended {
                let len = len.into();
                ExtendedChunkHeader { flags, kind, cookie, offset: 0, len }.encode(out);
            } else {
                ChunkHeader { flags, kind, cookie, len }.encode(out);
            }
            out.put_slice(payload);
        }
    }
    Some(())
}
