use super::*;
use crate::wire::{EXTENDED_REPLY_MAGIC, Fields, STRUCTURED_REPLY_MAGIC, error};
use proptest::prelude::*;

/// A chunk as decoded: flags, type, cookie, payload.
type Chunk = (u16, u16, u64, Vec<u8>);

/// The offset of every request.
const OFFSET: u64 = 4096;

fn asked(cookie: u64) -> Asked {
    Asked { cookie, offset: OFFSET }
}

fn sent(headers: Headers, answers: Vec<(u64, Answer)>) -> Vec<u8> {
    let mut encoder = Encoder::new(headers);
    for (cookie, answer) in answers {
        encoder.push(asked(cookie), answer);
    }
    let queue = encoder.take();
    assert!(queue.iter().all(|bytes| !bytes.is_empty()));
    queue.into_iter().flatten().collect()
}

fn chunks(bytes: &[u8]) -> Vec<Chunk> {
    let mut fields = Fields(bytes);
    let mut all = Vec::new();
    while !fields.0.is_empty() {
        let magic = fields.u32().unwrap();
        let (flags, kind) = (fields.u16().unwrap(), fields.u16().unwrap());
        let cookie = fields.u64().unwrap();
        let len = match magic {
            STRUCTURED_REPLY_MAGIC => fields.u32().unwrap() as usize,
            EXTENDED_REPLY_MAGIC => {
                assert_eq!(fields.u64(), Some(OFFSET), "the request's offset");
                usize::try_from(fields.u64().unwrap()).unwrap()
            }
            other => panic!("no chunk: {other:#x}"),
        };
        all.push((flags, kind, cookie, fields.take(len).unwrap().to_vec()));
    }
    all
}

fn data(segments: Vec<Segment>, whole: bool) -> Answer {
    Answer::Data { offset: OFFSET, segments: Segments(segments), whole }
}

fn bytes(text: &'static str) -> Segment {
    Segment::Data(Bytes::from_static(text.as_bytes()))
}

#[test]
fn headers_of_replies_without_payload_share_one_buffer() {
    let mut encoder = Encoder::new(Headers::Structured);
    encoder.push(asked(1), Answer::Done);
    encoder.push(asked(u64::MAX), Answer::Done);
    let queue = encoder.take();
    assert_eq!(queue.len(), 1);
    let expected = [
        &b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x01"[..],
        b"\x67\x44\x66\x98\0\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff",
    ];
    assert_eq!(queue[0], expected.concat());
}

#[test]
fn payload_is_passed_on_without_a_copy() {
    let payload = Bytes::from(vec![7; 4096]);
    let mut encoder = Encoder::new(Headers::Structured);
    encoder.push(asked(1), data(vec![Segment::Data(payload.clone())], false));
    let queue = encoder.take();
    assert_eq!(queue[1].as_ptr(), payload.as_ptr());
}

#[test]
fn a_read_is_answered_by_data_and_holes_without_gaps() {
    let segments = vec![
        bytes("ab"),
        bytes("c"),
        Segment::Zero(10),
        Segment::Zero(0),
        Segment::Zero(5),
        bytes("d"),
    ];
    let all = chunks(&sent(Headers::Structured, vec![(9, data(segments, false))]));
    let at = |offset: u64| offset.to_be_bytes().to_vec();
    let expected = [
        (0, chunk::OFFSET_DATA, 9, [at(4096), b"abc".to_vec()].concat()),
        (0, chunk::OFFSET_HOLE, 9, [at(4099), vec![0, 0, 0, 15]].concat()),
        (1, chunk::OFFSET_DATA, 9, [at(4114), b"d".to_vec()].concat()),
    ];
    assert_eq!(all, expected);
}

#[test]
fn an_unfragmented_read_spells_its_holes_out() {
    let segments = vec![bytes("ab"), Segment::Zero(100_000)];
    let all = chunks(&sent(Headers::Structured, vec![(9, data(segments, true))]));
    let [(1, chunk::OFFSET_DATA, 9, payload)] = &all[..] else { panic!("{} chunks", all.len()) };
    assert_eq!(payload.len(), 8 + 2 + 100_000);
    assert_eq!(payload[8..10], *b"ab");
    assert!(payload[10..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_simple_read_is_its_header_and_all_bytes() {
    let all = sent(Headers::Simple, vec![(9, data(vec![bytes("ab"), Segment::Zero(3)], false))]);
    assert_eq!(all[4..8], [0; 4]);
    assert_eq!(all[16..], *b"ab\0\0\0");
}

#[test]
fn a_read_of_nothing_is_a_bare_end() {
    for whole in [false, true] {
        let all = chunks(&sent(Headers::Structured, vec![(9, data(Vec::new(), whole))]));
        assert_eq!(all, [(1, chunk::NONE, 9, Vec::new())]);
    }
}

#[test]
fn an_error_carries_its_text_only_in_a_chunk() {
    let failed = || Answer::Failed { error: error::ENOSPC, text: "füll".into() };
    let all = chunks(&sent(Headers::Structured, vec![(9, failed())]));
    assert_eq!(all, [(1, chunk::ERROR, 9, [&b"\0\0\0\x1c\0\x05"[..], "füll".as_bytes()].concat())]);
    let simple = sent(Headers::Simple, vec![(9, failed())]);
    assert_eq!(simple, b"\x67\x44\x66\x98\0\0\0\x1c\0\0\0\0\0\0\0\x09");
}

#[test]
fn a_long_text_is_cut_between_characters() {
    let text = format!("x{}", "ä".repeat(5000));
    let all =
        chunks(&sent(Headers::Structured, vec![(9, Answer::Failed { error: error::EIO, text })]));
    let text = &all[0].3[6..];
    assert!(text.len() <= MAX_TEXT_BYTES && std::str::from_utf8(text).is_ok());
}

#[test]
fn a_status_has_one_chunk_for_each_context_and_the_last_is_done() {
    let one = |len| vec![Descriptor { len, flags: 3 }];
    let all = chunks(&sent(
        Headers::Structured,
        vec![(9, Answer::Status(vec![(1, one(5)), (7, one(6))]))],
    ));
    let expected = [
        (0, chunk::BLOCK_STATUS, 9, b"\0\0\0\x01\0\0\0\x05\0\0\0\x03".to_vec()),
        (1, chunk::BLOCK_STATUS, 9, b"\0\0\0\x07\0\0\0\x06\0\0\0\x03".to_vec()),
    ];
    assert_eq!(all, expected);
}

#[test]
fn with_extended_headers_every_reply_is_a_chunk_with_the_offset_of_its_request() {
    let failed = Answer::Failed { error: error::EIO, text: String::new() };
    let answers = vec![(1, Answer::Done), (2, failed), (3, data(vec![bytes("ab")], false))];
    let expected = [
        (1, chunk::NONE, 1, Vec::new()),
        (1, chunk::ERROR, 2, b"\0\0\0\x05\0\0".to_vec()),
        (1, chunk::OFFSET_DATA, 3, [&OFFSET.to_be_bytes()[..], b"ab"].concat()),
    ];
    assert_eq!(chunks(&sent(Headers::Extended, answers)), expected);
}

#[test]
fn an_extended_status_counts_its_descriptors_of_64_bits() {
    let status = Answer::Status(vec![(7, vec![Descriptor { len: 1 << 40, flags: 3 }; 2])]);
    let all = chunks(&sent(Headers::Extended, vec![(9, status)]));
    let [(1, chunk::BLOCK_STATUS_EXT, 9, payload)] = &all[..] else { panic!("{all:?}") };
    assert_eq!(payload[..8], *b"\0\0\0\x07\0\0\0\x02");
    let one = [(1_u64 << 40).to_be_bytes(), 3_u64.to_be_bytes()].concat();
    assert_eq!(payload[8..], [&one[..], &one].concat());
}

proptest! {
    #[test]
    fn chunks_put_together_are_what_was_read(
        runs in proptest::collection::vec((any::<bool>(), 0_usize..200), 0..20),
        whole: bool,
        extended: bool,
    ) {
        let headers = if extended { Headers::Extended } else { Headers::Structured };
        let mut segments = Vec::new();
        for (index, (zero, len)) in runs.iter().enumerate() {
            segments.push(if *zero {
                Segment::Zero(*len as u64)
            } else {
                Segment::Data(Bytes::from(vec![u8::try_from(index).unwrap() + 1; *len]))
            });
        }
        let expected = Segments(segments.clone()).to_vec();
        let all = chunks(&sent(headers, vec![(5, data(segments, whole))]));
        let mut image = vec![0xff; expected.len()];
        let mut next = OFFSET;
        let mut content = 0;
        for (index, (flags, kind, cookie, payload)) in all.iter().enumerate() {
            prop_assert_eq!(*cookie, 5);
            prop_assert_eq!(*flags == 1, index + 1 == all.len());
            if *kind == chunk::NONE {
                prop_assert!(payload.is_empty() && expected.is_empty());
                continue;
            }
            content += 1;
            let mut fields = Fields(payload);
            prop_assert_eq!(fields.u64(), Some(next));
            let from = usize::try_from(next - OFFSET).unwrap();
            let bytes = if *kind == chunk::OFFSET_HOLE {
                vec![0; fields.u32().unwrap() as usize]
            } else {
                fields.0.to_vec()
            };
            prop_assert!(!bytes.is_empty());
            image[from..from + bytes.len()].copy_from_slice(&bytes);
            next += bytes.len() as u64;
        }
        prop_assert_eq!(image, expected);
        prop_assert!(!whole || content <= 1);
    }
}
