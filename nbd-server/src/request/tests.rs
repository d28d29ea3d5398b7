use super::*;
use crate::handshake::{ExportFacts, MetaContext, SelectedContext};
use proptest::prelude::*;

const SIZE: u64 = 1 << 40;

fn agreement(read_only: bool, headers: Headers) -> Agreement {
    let source = MetaContext::Source("x-test:other".into());
    let contexts = [(1, MetaContext::Allocation), (2, source)];
    let selected = |(id, context)| SelectedContext { id, context };
    Agreement {
        facts: ExportFacts {
            name: "disk".into(),
            description: String::new(),
            size_bytes: SIZE,
            read_only,
            preferred_bytes: 4096,
            max_payload_bytes: 32 << 20,
            rotational: false,
            withheld: 0,
            contexts: contexts.iter().map(|(_, context)| context.clone()).collect(),
        },
        headers,
        contexts: if headers.has_chunks() {
            contexts.into_iter().map(selected).collect()
        } else {
            Vec::new()
        },
    }
}

fn request(command: u16, flags: u16, offset: u64, len: u64) -> Request {
    Request { flags, command, cookie: 0, offset, len }
}

fn refusal(request: &Request, agreement: &Agreement) -> Option<Refusal> {
    match judge(request, agreement) {
        Verdict::Refuse(refusal) => Some(refusal),
        _ => None,
    }
}

#[test]
fn fua_is_legal_on_every_command() {
    let agreement = agreement(false, Headers::Structured);
    for command in [0, 1, 3, 4, 5, 6, 7] {
        let len = if command == command::FLUSH { 0 } else { 512 };
        let request = request(command, flag::FUA, 0, len);
        assert!(matches!(judge(&request, &agreement), Verdict::Execute(_)), "command {command}");
    }
}

#[test]
fn a_flag_of_another_command_is_invalid() {
    let agreement = agreement(false, Headers::Structured);
    let flags =
        [flag::NO_HOLE, flag::DF, flag::REQ_ONE, flag::FAST_ZERO, flag::PAYLOAD_LEN, 1 << 15];
    for (command, own) in [
        (command::READ, flag::DF),
        (command::WRITE, 0),
        (command::TRIM, 0),
        (command::CACHE, 0),
        (command::WRITE_ZEROES, flag::NO_HOLE | flag::FAST_ZERO),
        (command::BLOCK_STATUS, flag::REQ_ONE),
    ] {
        for bit in flags {
            let told = refusal(&request(command, bit, 0, 512), &agreement);
            let expected = (own & bit == 0).then_some(Refusal::Flags);
            assert_eq!(told, expected, "command {command}, flag {bit:#x}");
        }
    }
}

#[test]
fn df_needs_structured_replies() {
    let read = request(command::READ, flag::DF, 0, 512);
    assert_eq!(refusal(&read, &agreement(false, Headers::Simple)), Some(Refusal::Flags));
}

#[test]
fn what_the_export_withholds_is_refused() {
    for (withheld, command, flags, expected) in [
        (told::SEND_TRIM, command::TRIM, 0, Refusal::NotOffered),
        (told::SEND_FLUSH, command::FLUSH, 0, Refusal::NotOffered),
        (told::SEND_WRITE_ZEROES, command::WRITE_ZEROES, 0, Refusal::NotOffered),
        (told::SEND_WRITE_ZEROES, command::WRITE_ZEROES, flag::FAST_ZERO, Refusal::Flags),
        (told::SEND_FAST_ZERO, command::WRITE_ZEROES, flag::FAST_ZERO, Refusal::Flags),
        (told::SEND_FUA, command::WRITE, flag::FUA, Refusal::Flags),
        (told::SEND_DF, command::READ, flag::DF, Refusal::Flags),
    ] {
        let mut agreement = agreement(false, Headers::Structured);
        let asked = request(command, flags, 0, if command == command::FLUSH { 0 } else { 512 });
        assert_eq!(refusal(&asked, &agreement), None);
        agreement.facts.withheld = withheld;
        assert_eq!(refusal(&asked, &agreement), Some(expected), "{withheld:#x}");
        assert_eq!(expected.error(), error::EINVAL);
        // The rest works on.
        assert_eq!(refusal(&request(command::WRITE, 0, 0, 512), &agreement), None);
    }
}

#[test]
fn a_read_only_export_permits_no_change() {
    let agreement = agreement(true, Headers::Structured);
    for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
        let told = refusal(&request(command, 0, 0, 512), &agreement).unwrap();
        assert_eq!(told.error(), error::EPERM);
        // Even past the end, and even with nothing to change.
        assert_eq!(refusal(&request(command, 0, SIZE, 1), &agreement), Some(told));
        assert_eq!(refusal(&request(command, 0, 0, 0), &agreement), Some(told));
    }
}

#[test]
fn past_the_end_reads_are_invalid_and_writes_have_no_space() {
    let agreement = agreement(false, Headers::Structured);
    for (offset, len) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 4096)] {
        for (command, expected) in [
            (command::READ, error::EINVAL),
            (command::TRIM, error::EINVAL),
            (command::CACHE, error::EINVAL),
            (command::BLOCK_STATUS, error::EINVAL),
            (command::WRITE, error::ENOSPC),
            (command::WRITE_ZEROES, error::ENOSPC),
        ] {
            let told = refusal(&request(command, 0, offset, len), &agreement);
            assert_eq!(told.map(Refusal::error), Some(expected), "{command} at {offset}");
        }
    }
}

#[test]
fn only_commands_with_a_payload_are_bound_by_its_maximum() {
    let agreement = agreement(false, Headers::Structured);
    let long = (32 << 20) + 1;
    // A client that knows of chunks knows what EOVERFLOW means.
    for flags in [0, flag::DF] {
        let told = refusal(&request(command::READ, flags, 0, long), &agreement).unwrap();
        assert_eq!((told, told.error()), (Refusal::LongRead, error::EOVERFLOW));
    }
    let simple = self::agreement(false, Headers::Simple);
    assert_eq!(refusal(&request(command::READ, 0, 0, long), &simple), Some(Refusal::TooLong));
    // What passes the end would not fit in pieces, either.
    let beyond = request(command::READ, 0, SIZE, long);
    assert_eq!(refusal(&beyond, &agreement), Some(Refusal::PastEnd));
    assert_eq!(refusal(&request(command::WRITE, 0, 0, long), &agreement), Some(Refusal::TooLong));
    for command in [command::TRIM, command::WRITE_ZEROES, command::BLOCK_STATUS] {
        assert_eq!(refusal(&request(command, 0, 0, u32::MAX.into()), &agreement), None);
    }
}

#[test]
fn zero_lengths_are_answered_somehow() {
    let agreement = agreement(false, Headers::Structured);
    for command in [command::READ, command::WRITE, command::TRIM, command::WRITE_ZEROES] {
        assert_eq!(refusal(&request(command, 0, SIZE, 0), &agreement), None);
    }
    let status = request(command::BLOCK_STATUS, 0, 0, 0);
    assert_eq!(refusal(&status, &agreement), Some(Refusal::EmptyStatus));
}

#[test]
fn status_without_a_context_is_invalid() {
    let status = request(command::BLOCK_STATUS, 0, 0, 512);
    assert_eq!(refusal(&status, &agreement(false, Headers::Simple)), Some(Refusal::NoContext));
}

#[test]
fn a_flush_with_a_range_is_invalid() {
    let agreement = agreement(false, Headers::Structured);
    assert_eq!(refusal(&request(3, 0, 1, 0), &agreement), Some(Refusal::FlushRange));
    assert_eq!(refusal(&request(3, 0, 0, 1), &agreement), Some(Refusal::FlushRange));
}

#[test]
fn a_disconnect_is_one_whatever_else_it_says() {
    let disconnect = request(command::DISC, u16::MAX, u64::MAX, u64::MAX);
    assert_eq!(judge(&disconnect, &agreement(true, Headers::Simple)), Verdict::Disconnect);
    assert_eq!(payload_bytes(&disconnect, Headers::Structured), 0);
}

#[test]
fn extended_lengths_reach_as_far_as_the_export() {
    let agreement = agreement(false, Headers::Extended);
    for command in [command::TRIM, command::CACHE, command::WRITE_ZEROES, command::BLOCK_STATUS] {
        assert_eq!(refusal(&request(command, 0, 0, SIZE), &agreement), None);
        for len in [SIZE + 1, u64::MAX] {
            let told = refusal(&request(command, 0, 0, len), &agreement).unwrap();
            assert!([Refusal::PastEnd, Refusal::WritePastEnd].contains(&told));
        }
    }
    let read = request(command::READ, 0, 0, SIZE);
    assert_eq!(refusal(&read, &agreement), Some(Refusal::LongRead));
}

#[test]
fn an_extended_payload_is_what_its_flag_announces() {
    for command in 0..10 {
        let with = request(command, flag::PAYLOAD_LEN, 0, 12);
        let without = request(command, 0, 0, 12);
        assert_eq!(payload_bytes(&with, Headers::Extended), 12);
        let always = if command == command::WRITE { 12 } else { 0 };
        assert_eq!(payload_bytes(&without, Headers::Extended), always);
        assert_eq!(payload_bytes(&with, Headers::Structured), always);
    }
}

#[test]
fn an_extended_payload_where_none_belongs_is_refused() {
    let agreement = agreement(false, Headers::Extended);
    for command in [command::READ, command::FLUSH, command::TRIM, command::CACHE, 6] {
        let told = refusal(&request(command, flag::PAYLOAD_LEN, 0, 12), &agreement);
        assert_eq!(told, Some(Refusal::Flags), "command {command}");
    }
    let unknown = request(99, flag::PAYLOAD_LEN, 0, 12);
    assert_eq!(refusal(&unknown, &agreement), Some(Refusal::UnknownCommand));
}

#[test]
fn behind_a_huge_payload_nothing_is_read() {
    let agreement = agreement(false, Headers::Extended);
    for command in 0..10 {
        let huge = request(command, flag::PAYLOAD_LEN, 0, (32 << 20) + 1);
        let expected = match command {
            command::DISC => Verdict::Disconnect,
            _ => Verdict::Abandon(Refusal::HugePayload),
        };
        assert_eq!(judge(&huge, &agreement), expected);
    }
    for flags in [flag::PAYLOAD_LEN, 0] {
        let written = request(command::WRITE, flags, 0, 32 << 20);
        assert!(matches!(judge(&written, &agreement), Verdict::Execute(Command::Write { .. })));
    }
}

/// What becomes of a BLOCK_STATUS at offset 512 with this payload.
fn filter(flags: u16, len: u64, ids: &[u32]) -> Result<(Command, Vec<u32>), Refusal> {
    let agreement = agreement(false, Headers::Extended);
    let mut payload = len.to_be_bytes().to_vec();
    ids.iter().for_each(|id| payload.extend(id.to_be_bytes()));
    let flags = flags | flag::PAYLOAD_LEN;
    let asked = request(command::BLOCK_STATUS, flags, 512, payload.len() as u64);
    match judge(&asked, &agreement) {
        Verdict::Filter { payload_bytes } => {
            assert_eq!(payload_bytes as usize, payload.len());
            let (command, contexts) = judge_filter(&asked, &payload, &agreement)?;
            Ok((command, contexts.iter().map(|one| one.id).collect()))
        }
        Verdict::Refuse(refusal) => Err(refusal),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_status_payload_chooses_among_the_selected_contexts() {
    let range = ByteRange::between(512, SIZE);
    let asked = |one| Command::BlockStatus { range, one };
    assert_eq!(filter(0, SIZE - 512, &[2]), Ok((asked(false), vec![2])));
    assert_eq!(filter(flag::REQ_ONE, SIZE - 512, &[2, 1]), Ok((asked(true), vec![2, 1])));
}

#[test]
fn a_status_payload_of_another_shape_is_refused() {
    assert_eq!(filter(0, 512, &[]), Err(Refusal::NoContext));
    assert_eq!(filter(0, 0, &[1]), Err(Refusal::EmptyStatus));
    assert_eq!(filter(0, SIZE, &[1]), Err(Refusal::PastEnd));
    assert_eq!(filter(flag::DF, 512, &[1]), Err(Refusal::Flags));
    for ids in [&[0][..], &[3], &[1, 1], &[1, 2, 1], &[1, 2, 3]] {
        assert_eq!(filter(0, 512, ids), Err(Refusal::Filter), "{ids:?}");
    }
    let agreement = agreement(false, Headers::Extended);
    for len in [0, 4, 7, 9, 13, 20, 1 << 20] {
        let asked = request(command::BLOCK_STATUS, flag::PAYLOAD_LEN, 0, len);
        assert_eq!(refusal(&asked, &agreement), Some(Refusal::Filter), "{len}");
    }
}

#[test]
fn a_status_payload_needs_extended_headers_and_a_selection() {
    let asked = request(command::BLOCK_STATUS, flag::PAYLOAD_LEN, 0, 12);
    let mut extended = agreement(false, Headers::Extended);
    extended.contexts.clear();
    for agreement in [extended, agreement(false, Headers::Structured)] {
        assert_eq!(refusal(&asked, &agreement), Some(Refusal::Flags));
    }
}

proptest! {
    #[test]
    fn what_is_executed_lies_on_the_export_and_only_the_known_errors_are_told(
        command in prop_oneof![0_u16..10, any::<u16>()],
        flags in prop_oneof![Just(0_u16), any::<u16>()],
        offset in prop_oneof![0..2 * SIZE, any::<u64>()],
        len in prop_oneof![any::<u32>().prop_map(u64::from), any::<u64>()],
        read_only: bool,
        headers in prop_oneof![
            Just(Headers::Simple), Just(Headers::Structured), Just(Headers::Extended)
        ],
    ) {
        let request = request(command, flags, offset, len);
        match judge(&request, &agreement(read_only, headers)) {
            Verdict::Disconnect => prop_assert_eq!(command, command::DISC),
            Verdict::Filter { payload_bytes } => {
                prop_assert_eq!(headers, Headers::Extended);
                prop_assert!(payload_bytes <= 16);
            }
            Verdict::Refuse(refusal) | Verdict::Abandon(refusal) => {
                let known = [error::EPERM, error::EINVAL, error::ENOSPC, error::EOVERFLOW];
                prop_assert!(known.contains(&refusal.error()));
                prop_assert!(!refusal.to_string().is_empty());
            }
            Verdict::Execute(command) => {
                let (range, changes) = match command {
                    Command::Read { range, .. }
                    | Command::Cache { range }
                    | Command::BlockStatus { range, .. } => (range, false),
                    Command::Write { range, .. }
                    | Command::Trim { range, .. }
                    | Command::WriteZeroes { range, .. } => (range, true),
                    Command::Flush => (ByteRange::between(0, 0), false),
                };
                prop_assert!(range.end() <= SIZE);
                prop_assert!(!(changes && read_only));
            }
        }
    }
}
