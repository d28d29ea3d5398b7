use proptest::prelude::*;

use super::*;
use crate::wire::{self, ChunkHeader, ExtendedChunkHeader};

const START: u64 = 1000;
const LEN: usize = 100;

fn read() -> Assembly {
    Assembly::new(range(START, LEN as u64), Wants::Data, Headers::Structured)
}

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).unwrap()
}

/// A chunk as the server would send it.
fn chunk(kind: u16, done: bool, payload: &[u8]) -> Vec<u8> {
    let mut bytes = bytes::BytesMut::new();
    let len = u32::try_from(payload.len()).unwrap();
    ChunkHeader { flags: u16::from(done), kind, cookie: 5, len }.encode(&mut bytes);
    bytes.extend_from_slice(payload);
    bytes.to_vec()
}

fn data(offset: u64, bytes: &[u8], done: bool) -> Vec<u8> {
    chunk(chunk::OFFSET_DATA, done, &[&offset.to_be_bytes()[..], bytes].concat())
}

fn hole(offset: u64, len: u32, done: bool) -> Vec<u8> {
    let payload = [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat();
    chunk(chunk::OFFSET_HOLE, done, &payload)
}

fn none() -> Vec<u8> {
    chunk(chunk::NONE, true, &[])
}

fn error(kind: u16, error: u32, text: &str, rest: &[u8], done: bool) -> Vec<u8> {
    let len = u16::try_from(text.len()).unwrap().to_be_bytes();
    chunk(kind, done, &[&error.to_be_bytes()[..], &len, text.as_bytes(), rest].concat())
}

fn status(id: u32, extents: &[(u32, u32)], done: bool) -> Vec<u8> {
    let mut payload = id.to_be_bytes().to_vec();
    for (len, flags) in extents {
        payload.extend_from_slice(&len.to_be_bytes());
        payload.extend_from_slice(&flags.to_be_bytes());
    }
    chunk(chunk::BLOCK_STATUS, done, &payload)
}

/// An extended chunk to a request at `START`.
fn extended(kind: u16, done: bool, payload: &[u8]) -> Vec<u8> {
    repeating(START, kind, done, payload)
}

fn repeating(offset: u64, kind: u16, done: bool, payload: &[u8]) -> Vec<u8> {
    let mut bytes = bytes::BytesMut::new();
    let len = payload.len() as u64;
    ExtendedChunkHeader { flags: u16::from(done), kind, cookie: 5, offset, len }.encode(&mut bytes);
    bytes.extend_from_slice(payload);
    bytes.to_vec()
}

fn wide_status(id: u32, count: u32, extents: &[(u64, u64)], done: bool) -> Vec<u8> {
    let mut payload = [id.to_be_bytes(), count.to_be_bytes()].concat();
    for (len, flags) in extents {
        payload.extend_from_slice(&len.to_be_bytes());
        payload.extend_from_slice(&flags.to_be_bytes());
    }
    extended(chunk::BLOCK_STATUS_EXT, done, &payload)
}

fn simple(error: u32) -> Vec<u8> {
    let magic = SIMPLE_REPLY_MAGIC.to_be_bytes();
    [&magic[..], &error.to_be_bytes(), &5_u64.to_be_bytes()].concat()
}

/// What becomes of a request whose replies are `stream`: `None` where the stream ends first.
fn assemble(
    mut assembly: Assembly,
    stream: &[u8],
    buffer_len: usize,
) -> Result<Option<Result<Answer, Failure>>, ReplyFault> {
    let mut rest = Fields(stream);
    let mut buffer = vec![0xEE; buffer_len];
    loop {
        let mut header = [0; Header::LONGEST];
        let Some(bytes) = rest.take(Header::SHORTEST) else { return Ok(None) };
        header[..Header::SHORTEST].copy_from_slice(bytes);
        let len = Header::len(&header)?;
        let Some(bytes) = rest.take(len - Header::SHORTEST) else { return Ok(None) };
        header[Header::SHORTEST..len].copy_from_slice(bytes);
        let mut step = assembly.begin(Header::decode(&header)?)?;
        loop {
            step = match step {
                Step::Bytes(len) => {
                    assert!(len <= 8 + (16 << 20));
                    let Some(bytes) = rest.take(len) else { return Ok(None) };
                    assembly.bytes(bytes)?
                }
                Step::Fill { at, len } => {
                    let place = &mut buffer[at..at + len];
                    let Some(bytes) = rest.take(len) else { return Ok(None) };
                    place.copy_from_slice(bytes);
                    assembly.filled()?
                }
                Step::More => break,
                Step::Done => return Ok(Some(assembly.finish(|| buffer.into()))),
            }
        }
    }
}

fn answer(assembly: Assembly, chunks: &[Vec<u8>]) -> Answer {
    assemble(assembly, &chunks.concat(), LEN).unwrap().unwrap().unwrap()
}

fn failure(assembly: Assembly, chunks: &[Vec<u8>]) -> Failure {
    assemble(assembly, &chunks.concat(), LEN).unwrap().unwrap().unwrap_err()
}

fn fault(assembly: Assembly, chunks: &[Vec<u8>]) -> ReplyFault {
    assemble(assembly, &chunks.concat(), LEN).unwrap_err()
}

#[test]
fn chunks_are_put_together_in_any_order_and_holes_stay_holes() {
    let chunks = [data(1060, &[7; 40], false), hole(1020, 40, false), data(1000, &[3; 20], true)];
    let Answer::Data(segments) = answer(read(), &chunks) else { panic!("no data") };
    let lengths: Vec<_> =
        segments.0.iter().map(|s| (s.len(), matches!(s, Segment::Zero(_)))).collect();
    assert_eq!(lengths, [(20, false), (40, true), (40, false)]);
    assert_eq!(segments.to_vec(), [[3; 20].as_slice(), &[0; 40], &[7; 40]].concat());
}

#[test]
fn a_hole_over_everything_takes_no_memory() {
    let Answer::Data(segments) = answer(read(), &[hole(1000, 100, false), none()]) else {
        panic!("no data")
    };
    assert_eq!(segments.0, [Segment::Zero(100)]);
}

#[test]
fn data_in_consecutive_chunks_is_one_segment() {
    let chunks = [data(1000, &[1; 60], false), data(1060, &[2; 40], true)];
    let Answer::Data(segments) = answer(read(), &chunks) else { panic!("no data") };
    assert_eq!(segments.0.len(), 1);
}

#[test]
fn a_read_that_is_not_covered_exactly_once_is_a_fault() {
    let outside = |offset, len| ReplyFault::OutsideRequest { offset, len };
    assert_eq!(fault(read(), &[data(999, &[1; 2], true)]), outside(999, 2));
    assert_eq!(fault(read(), &[data(1099, &[1; 2], true)]), outside(1099, 2));
    assert_eq!(fault(read(), &[hole(u64::MAX, 9, true)]), outside(u64::MAX, 9));
    assert_eq!(fault(read(), &[hole(1000, 0, false)]), outside(1000, 0));
    let overlap = |offset, len| ReplyFault::Overlap { offset, len };
    let first = || data(1010, &[1; 10], false);
    assert_eq!(fault(read(), &[first(), first()]), overlap(1010, 10));
    assert_eq!(fault(read(), &[first(), hole(1019, 1, false)]), overlap(1019, 1));
    assert_eq!(fault(read(), &[first(), hole(1000, 11, false)]), overlap(1000, 11));
    assert_eq!(fault(read(), &[first(), hole(1000, 100, false)]), overlap(1000, 100));
    assert_eq!(fault(read(), &[first(), none()]), ReplyFault::Gap { covered: 10, len: 100 });
    assert_eq!(fault(read(), &[none()]), ReplyFault::Gap { covered: 0, len: 100 });
}

#[test]
fn chunks_that_break_their_own_rules_are_faults() {
    let length = |kind, len| ReplyFault::ChunkLength { kind, len };
    assert_eq!(fault(read(), &[data(1000, &[], true)]), length(chunk::OFFSET_DATA, 8));
    assert_eq!(fault(read(), &[chunk(chunk::OFFSET_HOLE, true, &[0; 13])]), length(2, 13));
    assert_eq!(fault(read(), &[chunk(chunk::NONE, true, &[0])]), length(0, 1));
    assert_eq!(fault(read(), &[chunk(chunk::NONE, false, &[])]), ReplyFault::NoneNotDone);
    assert_eq!(fault(read(), &[chunk(99, true, &[])]), ReplyFault::ChunkKind { kind: 99 });
    assert_eq!(fault(read(), &[status(1, &[(1, 0)], true)]), ReplyFault::ChunkKind { kind: 5 });
    assert_eq!(fault(read(), &[vec![0; 20]]), ReplyFault::Magic { found: 0 });
}

#[test]
fn flags_of_chunks_that_are_unknown_are_ignored() {
    let (mut first, mut last) = (data(1000, &[1; 50], false), data(1050, &[2; 50], true));
    for chunk in [&mut first, &mut last] {
        // Behind the magic number.
        chunk[4] |= 0x80;
        chunk[5] |= 0x7e;
    }
    let Answer::Data(segments) = answer(read(), &[first, last]) else { panic!("no data") };
    assert_eq!(segments.to_vec(), [[1; 50], [2; 50]].concat());
}

#[test]
fn simple_and_structured_replies_are_not_mixed_up() {
    assert_eq!(fault(read(), &[simple(0)]), ReplyFault::UnexpectedSimple);
    assert_eq!(fault(read(), &[simple(22)]), ReplyFault::UnexpectedSimple);
    let plain = |wants| Assembly::new(range(START, LEN as u64), wants, Headers::Simple);
    assert_eq!(fault(plain(Wants::Data), &[none()]), ReplyFault::UnexpectedChunk);
    let Answer::Data(segments) = answer(plain(Wants::Data), &[simple(0), vec![9; LEN]]) else {
        panic!("no data")
    };
    assert_eq!(segments.to_vec(), [9; LEN]);
    assert_eq!(failure(plain(Wants::Data), &[simple(5)]).error, wire::error::EIO);
    let write = || Assembly::new(range(START, LEN as u64), Wants::Success, Headers::Structured);
    assert_eq!(answer(write(), &[simple(0)]), Answer::Success);
    assert_eq!(answer(write(), &[none()]), Answer::Success);
    let wrong = ReplyFault::ChunkKind { kind: chunk::OFFSET_DATA };
    assert_eq!(fault(write(), &[data(1000, &[1], true)]), wrong);
}

#[test]
fn errors_are_told_when_the_reply_is_over() {
    let text = "der Träger\nfehlt";
    let chunks = [
        data(1000, &[1; 10], false),
        error(chunk::ERROR_OFFSET, 5, text, &1005_u64.to_be_bytes(), false),
        error(0x8063, 28, "unknown kinds are errors too", &[1, 2, 3], false),
        none(),
    ];
    let told = Failure { error: wire::error::EIO, text: "der Träger fehlt".to_owned() };
    assert_eq!(failure(read(), &chunks), told);
    let zero = error(chunk::ERROR, 0, "", &[], true);
    assert_eq!(fault(read(), &[zero]), ReplyFault::MalformedError);
    let long = chunk(chunk::ERROR, true, &[0, 0, 0, 5, 0, 9, b'x']);
    assert_eq!(fault(read(), &[long]), ReplyFault::MalformedError);
    let outside = error(chunk::ERROR_OFFSET, 5, "", &1100_u64.to_be_bytes(), true);
    let wrong = ReplyFault::OutsideRequest { offset: 1100, len: 1 };
    assert_eq!(fault(read(), &[outside]), wrong);
}

#[test]
fn block_status_is_clipped_to_the_request_and_checked() {
    let wants = || Wants::Status { contexts: vec![3] };
    let ask = || Assembly::new(range(START, LEN as u64), wants(), Headers::Structured);
    let chunks = [status(2, &[(100, 1)], false), status(3, &[(60, 0), (4096, 3)], true)];
    let Answer::Status(extents) = answer(ask(), &chunks) else { panic!("no extents") };
    let expected = [
        StatusExtent { range: range(1000, 60), flags: 0 },
        StatusExtent { range: range(1060, 40), flags: 3 },
    ];
    assert_eq!(extents, [expected]);
    let what = |chunks: &[Vec<u8>]| match fault(ask(), chunks) {
        ReplyFault::Status { what } => what,
        other => panic!("{other}"),
    };
    assert_eq!(what(&[status(3, &[(0, 0)], true)]), "an empty extent");
    let behind = "extents behind the end of the request";
    assert_eq!(what(&[status(3, &[(100, 0), (1, 1)], true)]), behind);
    let one = || status(3, &[(1, 0)], false);
    assert_eq!(what(&[one(), one()]), "two chunks for one context");
    assert_eq!(what(&[none()]), "no chunk for the context");
    assert_eq!(fault(ask(), &[simple(0)]), ReplyFault::UnexpectedSimple);
    assert_eq!(failure(ask(), &[simple(22)]).error, 22);
    assert_eq!(
        fault(ask(), &[chunk(5, true, &[0; 4])]),
        ReplyFault::ChunkLength { kind: 5, len: 4 }
    );
}

#[test]
fn extended_replies_repeat_the_offset_and_are_never_simple() {
    let read = || Assembly::new(range(START, LEN as u64), Wants::Data, Headers::Extended);
    let piece = |at: u64, bytes: &[u8]| [&at.to_be_bytes()[..], bytes].concat();
    let hole = [&1000_u64.to_be_bytes()[..], &60_u32.to_be_bytes()].concat();
    let chunks = [
        extended(chunk::OFFSET_DATA, false, &piece(1060, &[7; 40])),
        extended(chunk::OFFSET_HOLE, false, &hole),
        extended(chunk::NONE, true, &[]),
    ];
    let Answer::Data(segments) = answer(read(), &chunks) else { panic!("no data") };
    assert_eq!(segments.to_vec(), [[0; 60].as_slice(), &[7; 40]].concat());
    let elsewhere = repeating(1060, chunk::OFFSET_DATA, true, &piece(1060, &[7; 40]));
    let wrong = ReplyFault::WrongOffset { sent: START, found: 1060 };
    assert_eq!(fault(read(), &[elsewhere]), wrong);
    assert_eq!(fault(read(), &[none()]), ReplyFault::UnexpectedChunk);
    let structured = Assembly::new(range(START, LEN as u64), Wants::Data, Headers::Structured);
    let chunk = extended(chunk::NONE, true, &[]);
    assert_eq!(fault(structured, &[chunk]), ReplyFault::UnexpectedChunk);
    let write = || Assembly::new(range(START, LEN as u64), Wants::Success, Headers::Extended);
    assert_eq!(answer(write(), &[extended(chunk::NONE, true, &[])]), Answer::Success);
    for error in [0, 5] {
        assert_eq!(fault(write(), &[simple(error)]), ReplyFault::UnexpectedSimple);
    }
    let endless = ReplyFault::ChunkLength { kind: chunk::ERROR, len: u64::MAX };
    let header = ExtendedChunkHeader {
        flags: 1,
        kind: chunk::ERROR,
        cookie: 5,
        offset: START,
        len: u64::MAX,
    };
    let mut bytes = bytes::BytesMut::new();
    header.encode(&mut bytes);
    assert_eq!(fault(read(), &[bytes.to_vec()]), endless);
}

#[test]
fn a_status_of_64_bits_tells_of_every_context_that_was_asked_about() {
    let whole = range(START, 1 << 40);
    let ask = || Assembly::new(whole, Wants::Status { contexts: vec![9, 2] }, Headers::Extended);
    let chunks = [
        wide_status(2, 1, &[(u64::MAX, 1 << 40)], false),
        wide_status(3, 1, &[(5, 5)], false),
        wide_status(9, 2, &[(1 << 33, 3), (7, 0)], true),
    ];
    let Answer::Status(extents) = answer(ask(), &chunks) else { panic!("no extents") };
    let first = [
        StatusExtent { range: range(START, 1 << 33), flags: 3 },
        StatusExtent { range: range(START + (1 << 33), 7), flags: 0 },
    ];
    assert_eq!(extents[0], first);
    assert_eq!(extents[1], [StatusExtent { range: whole, flags: 1 << 40 }]);
    let what = |chunks: &[Vec<u8>]| match fault(ask(), chunks) {
        ReplyFault::Status { what } => what,
        other => panic!("{other}"),
    };
    assert_eq!(what(&[wide_status(9, 1, &[(1, 0)], true)]), "no chunk for the context");
    assert_eq!(what(&[wide_status(9, 3, &[(1, 0)], true)]), "a wrong count of extents");
    let kind = chunk::BLOCK_STATUS;
    let old = extended(kind, true, &[0; 12]);
    assert_eq!(fault(ask(), &[old]), ReplyFault::ChunkKind { kind });
    let (kind, len) = (chunk::BLOCK_STATUS_EXT, 16);
    let uneven = extended(kind, true, &[0; 16]);
    assert_eq!(fault(ask(), &[uneven]), ReplyFault::ChunkLength { kind, len });
}

#[test]
fn errors_without_end_are_cut_off() {
    let mut assembly = read();
    let header =
        Header::Chunk(Chunk { flags: 0, kind: chunk::ERROR, cookie: 5, offset: None, len: 6 });
    for _ in 0..MAX_CHUNKS {
        assert_eq!(assembly.begin(header), Ok(Step::Bytes(6)));
        assert_eq!(assembly.bytes(&[0, 0, 0, 5, 0, 0]), Ok(Step::More));
    }
    assert_eq!(assembly.begin(header), Err(ReplyFault::TooManyChunks { limit: MAX_CHUNKS }));
}

/// Pieces of a reply that are near to right, so that arbitrary streams get further than their first magic number.
fn any_piece() -> impl Strategy<Value = Vec<u8>> {
    let kind = prop_oneof![0_u16..7, 0x8000_u16..0x8004, any::<u16>()];
    prop_oneof![
        (990_u64..1110, 0_usize..120, any::<bool>()).prop_map(|(at, len, d)| data(
            at,
            &vec![1; len],
            d
        )),
        (990_u64..1110, 0_u32..120, any::<bool>()).prop_map(|(at, len, d)| hole(at, len, d)),
        (0_u32..4, proptest::collection::vec((0_u32..120, 0_u32..4), 0..4), any::<bool>())
            .prop_map(|(id, extents, d)| status(id, &extents, d)),
        (kind.clone(), any::<bool>(), proptest::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(kind, d, payload)| chunk(kind, d, &payload)),
        (kind, any::<bool>(), proptest::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(kind, d, payload)| extended(kind, d, &payload)),
        (990_u64..1110, 0_usize..120, any::<bool>()).prop_map(|(at, len, d)| extended(
            chunk::OFFSET_DATA,
            d,
            &[&at.to_be_bytes()[..], &vec![1; len]].concat()
        )),
        (0_u32..4, proptest::collection::vec((0_u64..120, 0_u64..4), 0..4), any::<bool>())
            .prop_map(|(id, extents, d)| wide_status(
                id,
                u32::try_from(extents.len()).unwrap(),
                &extents,
                d
            )),
        proptest::collection::vec(any::<u8>(), 0..24),
        Just(none()),
        (0_u32..3).prop_map(simple),
    ]
}

proptest! {
    #[test]
    fn no_stream_panics_or_answers_with_bytes_that_never_came(
        pieces in proptest::collection::vec(any_piece(), 0..12),
        wants in prop_oneof![
            Just(Wants::Data), Just(Wants::Success), Just(Wants::Status { contexts: vec![1] })
        ],
        headers in prop_oneof![
            Just(Headers::Simple), Just(Headers::Structured), Just(Headers::Extended)
        ],
    ) {
        let assembly = Assembly::new(range(START, LEN as u64), wants, headers);
        match assemble(assembly, &pieces.concat(), LEN) {
            Ok(Some(Ok(Answer::Data(segments)))) => {
                prop_assert_eq!(segments.len(), LEN as u64);
                prop_assert!(!segments.to_vec().contains(&0xEE) || headers == Headers::Simple);
            }
            Ok(Some(Ok(Answer::Status(extents)))) => {
                let mut at = START;
                for extent in extents.into_iter().flatten() {
                    prop_assert_eq!(extent.range.start(), at);
                    prop_assert!(!extent.range.is_empty());
                    at = extent.range.end();
                }
                prop_assert!(at > START && at <= START + LEN as u64);
            }
            _ => {}
        }
    }
}
