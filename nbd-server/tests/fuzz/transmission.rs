//! The server's machines of the transmission phase on arbitrary requests: what is executed lies inside the export and is
//! allowed, what is refused has an error of the protocol, and every answer is a reply that says just that.

use block::{ByteRange, Segment, Segments};
use bytes::Bytes;
use nbd_server::block_status::{Descriptor, Descriptors};
use nbd_server::handshake::{Agreement, MetaContext, SelectedContext};
use nbd_server::reply::{Answer, Asked, Encoder};
use nbd_server::request::{Command, Refusal, Verdict, judge, judge_filter, payload_bytes};
use nbd_server::wire::{
    CHUNK_BYTES, EXTENDED_CHUNK_BYTES, EXTENDED_REQUEST_BYTES, EXTENDED_REQUEST_MAGIC,
    ExtendedChunkHeader, Fields, Headers, REQUEST_BYTES, REQUEST_MAGIC, Request,
    SIMPLE_REPLY_BYTES, chunk, chunk_flag, command, error,
};
use nbd_server::{FlaggedExtent, wire};

use crate::handshake::facts;

/// The most requests of one input.
const MAX_REQUESTS: usize = 64;

fn agreement(shape: u8) -> Agreement {
    let mut facts = facts();
    facts.size_bytes = if shape & 4 != 0 { 1 << 20 } else { 1 << 40 };
    facts.read_only = shape & 8 != 0;
    facts.withheld = if shape & 16 != 0 { wire::transmission_flag::SEND_TRIM } else { 0 };
    let headers = match shape & 3 {
        0 => Headers::Simple,
        1 => Headers::Structured,
        _ => Headers::Extended,
    };
    let names = [MetaContext::Allocation, MetaContext::Source("x:y".into())];
    let contexts = (7..).zip(names).map(|(id, context)| SelectedContext { id, context });
    let contexts = if headers.has_chunks() { contexts.collect() } else { Vec::new() };
    Agreement { facts, headers, contexts }
}

/// The first byte is what was negotiated; requests follow, whose magic numbers are made right.
pub(crate) fn run(data: &[u8]) {
    let Some((&shape, data)) = data.split_first() else { return };
    let agreement = agreement(shape);
    let mut rest = Fields(data);
    for _ in 0..MAX_REQUESTS {
        let Some(request) = request(&mut rest, agreement.headers) else { return };
        let payload = payload_bytes(&request, agreement.headers);
        match judge(&request, &agreement) {
            Verdict::Execute(command) => {
                is_allowed(&command, &request, &agreement);
                replies(&request, &command, &agreement, &mut rest);
            }
            Verdict::Filter { payload_bytes } => {
                assert_eq!(u64::from(payload_bytes), payload);
                let Some(bytes) = rest.take(usize::try_from(payload).unwrap()) else { return };
                if let Ok((command, contexts)) = judge_filter(&request, bytes, &agreement) {
                    assert!(!contexts.is_empty() && contexts.len() <= agreement.contexts.len());
                    assert!(contexts.iter().all(|one| agreement.contexts.contains(one)));
                    is_allowed(&command, &request, &agreement);
                }
            }
            Verdict::Refuse(refusal) => is_refusal(refusal, &request, agreement.headers),
            Verdict::Abandon(refusal) => {
                assert!(payload > u64::from(wire::MAX_PAYLOAD_BYTES));
                is_refusal(refusal, &request, agreement.headers);
                return;
            }
            Verdict::Disconnect => return assert_eq!(request.command, command::DISC),
        }
    }
}

fn request(rest: &mut Fields<'_>, headers: Headers) -> Option<Request> {
    if headers == Headers::Extended {
        let mut bytes: [u8; EXTENDED_REQUEST_BYTES] =
            rest.take(EXTENDED_REQUEST_BYTES)?.try_into().unwrap();
        bytes[..4].copy_from_slice(&EXTENDED_REQUEST_MAGIC.to_be_bytes());
        Request::decode_extended(&bytes)
    } else {
        let mut bytes: [u8; REQUEST_BYTES] = rest.take(REQUEST_BYTES)?.try_into().unwrap();
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        Request::decode(&bytes)
    }
}

fn is_allowed(command: &Command, request: &Request, agreement: &Agreement) {
    let facts = &agreement.facts;
    let (range, changes, moves) = match *command {
        Command::Read { range, .. } => (range, false, true),
        Command::Write { range, .. } => (range, true, true),
        Command::Trim { range, .. } | Command::WriteZeroes { range, .. } => (range, true, false),
        Command::Cache { range } => (range, false, false),
        Command::BlockStatus { range, .. } => {
            assert!(!range.is_empty() && !agreement.contexts.is_empty());
            (range, false, false)
        }
        Command::Flush => return assert_eq!((request.offset, request.len), (0, 0)),
        _ => return,
    };
    assert_eq!(range.start(), request.offset);
    assert!(range.end() <= facts.size_bytes);
    assert!(!changes || !facts.read_only);
    assert!(!moves || range.len() <= u64::from(facts.max_payload_bytes));
}

fn is_refusal(refusal: Refusal, request: &Request, headers: Headers) {
    let errors = [
        error::EPERM,
        error::EIO,
        error::ENOMEM,
        error::EINVAL,
        error::ENOSPC,
        error::EOVERFLOW,
        error::ENOTSUP,
        error::ESHUTDOWN,
    ];
    assert!(errors.contains(&refusal.error()));
    let answer = Answer::Failed { error: refusal.error(), text: refusal.to_string() };
    let bytes = encode(request, answer, headers);
    if headers.has_chunks() {
        let chunks = chunks(&bytes, request, headers);
        assert_eq!(chunks.len(), 1);
        assert_eq!(chunks[0].0, chunk::ERROR);
        assert_eq!(Fields(chunks[0].1).u32(), Some(refusal.error()));
    } else {
        assert_eq!(bytes.len(), SIMPLE_REPLY_BYTES);
    }
}

fn encode(request: &Request, answer: Answer, headers: Headers) -> Vec<u8> {
    let mut encoder = Encoder::new(headers);
    encoder.push(Asked::from(request), answer);
    encoder.take().iter().flatten().copied().collect()
}

/// The chunks of one reply, each with its type and payload.
fn chunks<'a>(bytes: &'a [u8], request: &Request, headers: Headers) -> Vec<(u16, &'a [u8])> {
    let (mut rest, mut all) = (Fields(bytes), Vec::new());
    while !rest.0.is_empty() {
        assert!(all.last().is_none_or(|(_, _, done)| !done), "something follows the end");
        let (flags, kind, cookie, len) = if headers == Headers::Extended {
            let header = rest.take(EXTENDED_CHUNK_BYTES).unwrap().try_into().unwrap();
            let header = ExtendedChunkHeader::decode(header).unwrap();
            assert_eq!(header.offset, request.offset);
            (header.flags, header.kind, header.cookie, header.len)
        } else {
            let mut header = Fields(rest.take(CHUNK_BYTES).unwrap());
            assert_eq!(header.u32(), Some(wire::STRUCTURED_REPLY_MAGIC));
            let (flags, kind) = (header.u16().unwrap(), header.u16().unwrap());
            (flags, kind, header.u64().unwrap(), header.u32().unwrap().into())
        };
        assert_eq!(cookie, request.cookie);
        let payload = rest.take(usize::try_from(len).unwrap()).unwrap();
        all.push((kind, payload, flags & chunk_flag::DONE != 0));
    }
    assert!(all.last().is_some_and(|(_, _, done)| *done), "the reply does not end");
    all.into_iter().map(|(kind, payload, _)| (kind, payload)).collect()
}

/// Answers a read and a status with what the input says that the device gave.
fn replies(request: &Request, command: &Command, agreement: &Agreement, rest: &mut Fields<'_>) {
    let headers = agreement.headers;
    match *command {
        Command::Read { range, whole } if range.len() <= 1 << 16 => {
            let (segments, expected) = content(range, rest);
            let answer = Answer::Data { offset: range.start(), segments, whole };
            let bytes = encode(request, answer, headers);
            if headers.has_chunks() {
                is_content(&chunks(&bytes, request, headers), range, &expected, whole);
            } else {
                assert_eq!(bytes[SIMPLE_REPLY_BYTES..], expected);
            }
        }
        Command::BlockStatus { range, .. } => {
            let status = agreement.contexts.iter().map(|one| (one.id, described(range, rest)));
            let status: Vec<_> = status.collect();
            if status.iter().any(|(_, all)| all.is_empty()) {
                return;
            }
            let bytes = encode(request, Answer::Status(status.clone()), headers);
            let chunks = chunks(&bytes, request, headers);
            assert_eq!(chunks.len(), status.len());
            for ((_, payload), (id, _)) in chunks.iter().zip(&status) {
                assert_eq!(Fields(payload).u32(), Some(*id));
            }
        }
        _ => {}
    }
}

/// Segments of `range` as the input has them, and their bytes.
fn content(range: ByteRange, rest: &mut Fields<'_>) -> (Segments, Vec<u8>) {
    let (mut segments, mut left) = (Segments::default(), range.len());
    while left > 0 {
        let shape = rest.u16().unwrap_or(u16::MAX);
        let len = u64::from(shape >> 1).clamp(1, left);
        left -= len;
        segments.push(if shape & 1 == 0 {
            Segment::Zero(len)
        } else {
            Segment::Data(Bytes::from(vec![7; usize::try_from(len).unwrap()]))
        });
    }
    let bytes = segments.to_vec();
    (segments, bytes)
}

fn is_content(chunks: &[(u16, &[u8])], range: ByteRange, expected: &[u8], whole: bool) {
    let mut found = vec![None; expected.len()];
    let contents = chunks.iter().filter(|(kind, _)| *kind != chunk::NONE);
    assert!(!whole || contents.clone().count() <= 1, "more than one chunk of content");
    for (kind, payload) in contents {
        let mut fields = Fields(payload);
        let at = usize::try_from(fields.u64().unwrap() - range.start()).unwrap();
        let bytes = match *kind {
            chunk::OFFSET_DATA => fields.0.to_vec(),
            chunk::OFFSET_HOLE => vec![0; usize::try_from(fields.u32().unwrap()).unwrap()],
            other => panic!("type {other} in a read"),
        };
        assert!(!bytes.is_empty());
        for (place, byte) in found[at..][..bytes.len()].iter_mut().zip(bytes) {
            assert_eq!(place.replace(byte), None, "a byte came twice");
        }
    }
    assert!(found.iter().zip(expected).all(|(found, byte)| *found == Some(*byte)));
}

/// Extents of `range` as the input has them, put together; nothing where the device broke its rules.
fn described(range: ByteRange, rest: &mut Fields<'_>) -> Vec<Descriptor> {
    let mut descriptors = Descriptors::new(range, 16);
    while let Some(asked) = descriptors.rest() {
        let shape = rest.u16().unwrap_or(u16::MAX);
        let lie = u64::from(shape & 7 == 7 && shape != u16::MAX);
        let start = asked.start().saturating_add(lie);
        let len = (u64::from(shape) << 20).max(1);
        let Some(range) = ByteRange::new(start, len) else { return Vec::new() };
        let told = FlaggedExtent { range, flags: u32::from(shape & 3) };
        if descriptors.push_flagged(&[told]).is_err() {
            assert_eq!(lie, 1, "what is told in order is taken");
            return Vec::new();
        }
    }
    let done = descriptors.into_vec();
    assert!(done.iter().map(|one| one.len).sum::<u64>() <= range.len());
    assert!(done.iter().all(|one| one.len > 0) && done.len() <= 16);
    done
}
