use super::*;
use crate::handshake::{ExportFacts, MetaContext, SelectedContext};
use proptest::prelude::*;

const SIZE: u64 = 1 << 40;

fn agreement(read_only: bool, structured: bool) -> Agreement {
    let context = MetaContext::Allocation;
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
            contexts: vec![context.clone()],
        },
        structured,
        contexts: if structured { vec![SelectedContext { id: 1, context }] } else { Vec::new() },
    }
}

fn request(command: u16, flags: u16, offset: u64, len: u32) -> Request {
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
    let agreement = agreement(false, true);
    for command in [0, 1, 3, 4, 5, 6, 7] {
        let len = if command == command::FLUSH { 0 } else { 512 };
        let request = request(command, flag::FUA, 0, len);
        assert!(matches!(judge(&request, &agreement), Verdict::Execute(_)), "command {command}");
    }
}

#[test]
fn a_flag_of_another_command_is_invalid() {
    let agreement = agreement(false, true);
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
    assert_eq!(refusal(&read, &agreement(false, false)), Some(Refusal::Flags));
}

#[test]
fn a_read_only_export_permits_no_change() {
    let agreement = agreement(true, true);
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
    let agreement = agreement(false, true);
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
    let agreement = agreement(false, true);
    let long = (32 << 20) + 1;
    assert_eq!(refusal(&request(command::READ, 0, 0, long), &agreement), Some(Refusal::TooLong));
    assert_eq!(refusal(&request(command::WRITE, 0, 0, long), &agreement), Some(Refusal::TooLong));
    let whole = refusal(&request(command::READ, flag::DF, 0, long), &agreement);
    assert_eq!(whole.map(Refusal::error), Some(error::EOVERFLOW));
    for command in [command::TRIM, command::WRITE_ZEROES, command::BLOCK_STATUS] {
        assert_eq!(refusal(&request(command, 0, 0, u32::MAX), &agreement), None);
    }
}

#[test]
fn zero_lengths_are_answered_somehow() {
    let agreement = agreement(false, true);
    for command in [command::READ, command::WRITE, command::TRIM, command::WRITE_ZEROES] {
        assert_eq!(refusal(&request(command, 0, SIZE, 0), &agreement), None);
    }
    let status = request(command::BLOCK_STATUS, 0, 0, 0);
    assert_eq!(refusal(&status, &agreement), Some(Refusal::EmptyStatus));
}

#[test]
fn status_without_a_context_is_invalid() {
    let status = request(command::BLOCK_STATUS, 0, 0, 512);
    assert_eq!(refusal(&status, &agreement(false, false)), Some(Refusal::NoContext));
}

#[test]
fn a_flush_with_a_range_is_invalid() {
    let agreement = agreement(false, true);
    assert_eq!(refusal(&request(3, 0, 1, 0), &agreement), Some(Refusal::FlushRange));
    assert_eq!(refusal(&request(3, 0, 0, 1), &agreement), Some(Refusal::FlushRange));
}

#[test]
fn a_disconnect_is_one_whatever_else_it_says() {
    let disconnect = request(command::DISC, u16::MAX, u64::MAX, u32::MAX);
    assert_eq!(judge(&disconnect, &agreement(true, false)), Verdict::Disconnect);
    assert_eq!(payload_bytes(&disconnect), 0);
}

proptest! {
    #[test]
    fn what_is_executed_lies_on_the_export_and_only_the_known_errors_are_told(
        command in prop_oneof![0_u16..10, any::<u16>()],
        flags in prop_oneof![Just(0_u16), any::<u16>()],
        offset in prop_oneof![0..2 * SIZE, any::<u64>()],
        len: u32,
        read_only: bool,
        structured: bool,
    ) {
        let request = request(command, flags, offset, len);
        match judge(&request, &agreement(read_only, structured)) {
            Verdict::Disconnect => prop_assert_eq!(command, command::DISC),
            Verdict::Refuse(refusal) => {
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
