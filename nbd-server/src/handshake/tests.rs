mod telling;
mod tls;

use super::*;
use crate::wire::{Fields, OPTION_REPLY_BYTES, info, transmission_flag};
use proptest::prelude::*;

const FIXED: u32 = client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES;

/// Two exports: "disk", also the default one, and the read-only "böse".
struct Two {
    stopping: bool,
    tls_only: bool,
    entered: Vec<String>,
}

impl Two {
    fn new() -> Self {
        Self { stopping: false, tls_only: false, entered: Vec::new() }
    }
}

impl ExportDirectory for Two {
    fn next(&mut self, after: Option<&str>) -> Option<(String, String)> {
        let all = [("böse", ""), ("disk", "first")];
        let next = all.into_iter().find(|(name, _)| after.is_none_or(|after| *name > after));
        next.map(|(name, description)| (name.to_owned(), description.to_owned()))
    }

    fn look_up(&mut self, name: &str) -> Result<ExportFacts, Unavailable> {
        if self.tls_only {
            return Err(Unavailable::TlsRequired);
        }
        let (name, read_only) = match name {
            "" | "disk" => ("disk", false),
            "böse" => ("böse", true),
            _ => return Err(Unavailable::Unknown),
        };
        Ok(ExportFacts {
            name: name.into(),
            description: if read_only { String::new() } else { "first".into() },
            size_bytes: 1 << 30,
            read_only,
            preferred_bytes: 65_536,
            max_payload_bytes: 32 << 20,
            rotational: false,
            withheld: 0,
            contexts: vec![MetaContext::Allocation],
        })
    }

    fn enter(&mut self, name: &str) -> Result<ExportFacts, Unavailable> {
        let facts = self.look_up(name)?;
        self.entered.push(name.into());
        Ok(facts)
    }

    fn is_shutting_down(&self) -> bool {
        self.stopping
    }
}

/// One option reply: option, type, data.
type Reply = (u32, u32, Vec<u8>);

struct Talk {
    machine: Handshake,
    input: BytesMut,
    exports: Two,
}

impl Talk {
    fn new(flags: u32) -> Self {
        Self::with_limits(flags, &Limits::default())
    }

    fn with_limits(flags: u32, limits: &Limits) -> Self {
        let mut input = BytesMut::new();
        input.put_u32(flags);
        Self { machine: Handshake::new(limits), input, exports: Two::new() }
    }

    /// Sends bytes and returns raw output, with what stopped the machine.
    fn send(&mut self, bytes: &[u8]) -> (Vec<u8>, Progress) {
        self.input.put_slice(bytes);
        let mut out = BytesMut::new();
        loop {
            match self.machine.step(&mut self.input, &mut self.exports, &mut out) {
                Progress::Again => {}
                end => return (out.to_vec(), end),
            }
        }
    }

    /// Sends an option; all its replies, and what stopped the machine.
    fn option(&mut self, option: u32, data: &[u8]) -> (Vec<Reply>, Progress) {
        let (out, end) = self.send(&bytes_of(option, data));
        (replies(&out), end)
    }

    /// The type of the only reply to an option after which haggling goes on.
    fn only(&mut self, option: u32, data: &[u8]) -> u32 {
        let (replies, end) = self.option(option, data);
        assert_eq!(end, Progress::Need(OPTION_BYTES), "haggling goes on");
        match &replies[..] {
            [(echo, kind, text)] => {
                assert_eq!(*echo, option);
                assert!(std::str::from_utf8(text).is_ok());
                *kind
            }
            other => panic!("not one reply: {other:?}"),
        }
    }
}

fn bytes_of(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put_u64(wire::IHAVEOPT);
    bytes.put_u32(option);
    bytes.put_u32(u32::try_from(data.len()).unwrap());
    bytes.put_slice(data);
    bytes
}

fn replies(out: &[u8]) -> Vec<Reply> {
    let mut fields = Fields(out);
    let mut all = Vec::new();
    while !fields.0.is_empty() {
        assert!(fields.0.len() >= OPTION_REPLY_BYTES);
        assert_eq!(fields.u64(), Some(wire::OPTION_REPLY_MAGIC));
        let (option, kind) = (fields.u32().unwrap(), fields.u32().unwrap());
        let len = fields.u32().unwrap() as usize;
        all.push((option, kind, fields.take(len).unwrap().to_vec()));
    }
    all
}

fn go(name: &[u8], wanted: &[u16]) -> Vec<u8> {
    let mut data = Vec::new();
    data.put_u32(u32::try_from(name.len()).unwrap());
    data.put_slice(name);
    data.put_u16(u16::try_from(wanted.len()).unwrap());
    wanted.iter().for_each(|one| data.put_u16(*one));
    data
}

fn queries(name: &[u8], queries: &[&[u8]]) -> Vec<u8> {
    let mut data = Vec::new();
    data.put_u32(u32::try_from(name.len()).unwrap());
    data.put_slice(name);
    data.put_u32(u32::try_from(queries.len()).unwrap());
    for query in queries {
        data.put_u32(u32::try_from(query.len()).unwrap());
        data.put_slice(query);
    }
    data
}

#[test]
fn the_greeting_offers_fixed_newstyle_and_no_zeroes() {
    let mut out = BytesMut::new();
    Handshake::greet(&mut out);
    assert_eq!(out.as_ref(), b"NBDMAGICIHAVEOPT\x00\x03");
}

#[test]
fn an_unknown_client_flag_closes() {
    let (out, end) = Talk::new(FIXED | 4).send(&[]);
    assert_eq!((out.len(), end), (0, Progress::Close(Close::ClientFlags(7))));
}

#[test]
fn export_name_is_answered_with_124_zeroes_unless_they_were_waived() {
    for (flags, len) in [(0, 134), (1, 134), (2, 10), (3, 10)] {
        let (out, end) = Talk::new(flags).send(&bytes_of(option::EXPORT_NAME, b"disk"));
        assert_eq!(out.len(), len, "flags {flags}");
        assert_eq!(out[..8], (1_u64 << 30).to_be_bytes());
        assert!(out[10..].iter().all(|byte| *byte == 0));
        assert!(matches!(end, Progress::Transmission(_)));
    }
}

#[test]
fn export_name_that_cannot_be_had_closes_without_a_reply() {
    for name in [&b"none"[..], b"\xff", b"di\0sk", &[b'x'; 4097]] {
        let (out, end) = Talk::new(FIXED).send(&bytes_of(option::EXPORT_NAME, name));
        assert_eq!((out.len(), end), (0, Progress::Close(Close::ExportName)));
    }
}

#[test]
fn a_client_without_fixed_newstyle_may_only_choose() {
    let (out, end) = Talk::new(0).send(&bytes_of(option::LIST, &[]));
    assert_eq!((out.len(), end), (0, Progress::Close(Close::NotFixed(option::LIST))));
}

#[test]
fn an_option_without_its_magic_closes() {
    let (_, end) = Talk::new(FIXED).send(&[0; 16]);
    assert_eq!(end, Progress::Close(Close::Magic));
}

#[test]
fn abort_is_acknowledged_even_with_data() {
    for data in [&b""[..], b"bye"] {
        let (replies, end) = Talk::new(FIXED).option(option::ABORT, data);
        assert_eq!(replies, [(option::ABORT, reply::ACK, Vec::new())]);
        assert_eq!(end, Progress::Close(Close::Aborted));
    }
}

#[test]
fn unknown_options_are_unsupported_and_their_data_is_consumed() {
    let mut talk = Talk::new(FIXED);
    for unknown in [0, option::PEEK_EXPORT, 12, u32::MAX] {
        for data in [&b""[..], b"data", &[7; 300 << 10]] {
            assert_eq!(talk.only(unknown, data), reply::ERR_UNSUP);
        }
    }
}

#[test]
fn data_where_none_belongs_is_invalid_and_has_no_effect() {
    let mut talk = Talk::new(FIXED);
    let bare = [option::LIST, option::STARTTLS, option::STRUCTURED_REPLY, option::EXTENDED_HEADERS];
    for bare in bare {
        assert_eq!(talk.only(bare, b"x"), reply::ERR_INVALID);
    }
    let (_, end) = talk.option(option::GO, &go(b"disk", &[]));
    let Progress::Transmission(agreement) = end else { panic!("{end:?}") };
    assert_eq!(agreement.headers, Headers::Simple);
}

#[test]
fn tls_is_unsupported_where_it_is_not_configured() {
    assert_eq!(Talk::new(FIXED).only(option::STARTTLS, &[]), reply::ERR_UNSUP);
}

#[test]
fn list_names_every_export_with_its_description() {
    let (replies, _) = Talk::new(FIXED).option(option::LIST, &[]);
    let expected = [
        (option::LIST, reply::SERVER, "\0\0\0\x05böse".into()),
        (option::LIST, reply::SERVER, b"\0\0\0\x04diskfirst".to_vec()),
        (option::LIST, reply::ACK, Vec::new()),
    ];
    assert_eq!(replies, expected);
}

#[test]
fn info_and_go_tell_the_same() {
    let wanted = [info::BLOCK_SIZE, info::NAME, 77, info::DESCRIPTION, info::EXPORT];
    let mut talk = Talk::new(FIXED);
    let (mut told, end) = talk.option(option::INFO, &go(b"", &wanted));
    assert_eq!(end, Progress::Need(OPTION_BYTES));
    assert!(talk.exports.entered.is_empty());
    let (entered, end) = talk.option(option::GO, &go(b"", &wanted));
    assert!(matches!(end, Progress::Transmission(_)));
    told.iter_mut().for_each(|reply| reply.0 = option::GO);
    assert_eq!(told, entered);
    let data: Vec<_> = told.iter().map(|reply| &reply.2[..]).collect();
    let [export, name, description, block_size, ack] = data[..] else { panic!("{data:?}") };
    assert_eq!(export[..10], [0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0]);
    assert_eq!((name, description), (&b"\0\x01disk"[..], &b"\0\x02first"[..]));
    assert_eq!(block_size, [0, 3, 0, 0, 0, 1, 0, 1, 0, 0, 2, 0, 0, 0]);
    assert!(ack.is_empty());
}

#[test]
fn go_with_an_unknown_name_stays_in_haggling() {
    let mut talk = Talk::new(FIXED);
    for asked in [option::INFO, option::GO] {
        assert_eq!(talk.only(asked, &go(b"none", &[])), reply::ERR_UNKNOWN);
        assert_eq!(talk.only(asked, &go(&[b'x'; 4096], &[])), reply::ERR_UNKNOWN);
    }
    let (_, end) = talk.option(option::GO, &go(b"disk", &[]));
    assert!(matches!(end, Progress::Transmission(_)));
}

#[test]
fn malformed_go_is_invalid_and_exactly_its_length_is_consumed() {
    let mut talk = Talk::new(FIXED);
    let mut long_name = go(b"disk", &[]);
    long_name[..4].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut missing_infos = go(b"disk", &[1]);
    missing_infos.truncate(missing_infos.len() - 1);
    let mut trailing = go(b"disk", &[1]);
    trailing.push(0);
    let malformed = [
        Vec::new(),
        vec![0; 3],
        vec![0; 4],
        long_name,
        missing_infos,
        trailing,
        go(b"\xff", &[]),
        go(b"a\0b", &[]),
        go(&[b'x'; 4097], &[]),
    ];
    for data in malformed {
        for asked in [option::INFO, option::GO] {
            assert_eq!(talk.only(asked, &data), reply::ERR_INVALID, "{data:?}");
        }
    }
    assert!(talk.exports.entered.is_empty());
}

#[test]
fn go_with_every_information_type_there_can_be_is_read() {
    let all: Vec<u16> = (0..u16::MAX).collect();
    let (_, end) = Talk::new(FIXED).option(option::GO, &go(b"disk", &all));
    assert!(matches!(end, Progress::Transmission(_)));
}

#[test]
fn an_option_over_the_limit_is_discarded_in_bounded_memory() {
    let mut talk = Talk::new(FIXED);
    let len: u32 = 3 << 30;
    let mut header = bytes_of(option::GO, &[]);
    header[12..].copy_from_slice(&len.to_be_bytes());
    let (_, end) = talk.send(&header);
    assert_eq!(end, Progress::Need(1));
    let block = vec![0; 1 << 20];
    for left in (0..3 << 10).rev() {
        let (out, end) = talk.send(&block);
        assert!(talk.input.is_empty());
        if left > 0 {
            assert_eq!((out.len(), end), (0, Progress::Need(1)));
        } else {
            assert_eq!(replies(&out)[0].1, reply::ERR_TOO_BIG);
            assert_eq!(end, Progress::Need(OPTION_BYTES));
        }
    }
}

#[test]
fn one_option_too_many_closes() {
    let limits = Limits { options: 2, ..Limits::default() };
    let mut talk = Talk::with_limits(FIXED, &limits);
    assert_eq!(talk.only(77, &[]), reply::ERR_UNSUP);
    assert_eq!(talk.only(77, &[]), reply::ERR_UNSUP);
    let (out, end) = talk.send(&bytes_of(77, &[]));
    assert_eq!((out.len(), end), (0, Progress::Close(Close::TooManyOptions)));
}

#[test]
fn contexts_need_structured_replies() {
    let mut talk = Talk::new(FIXED);
    let data = queries(b"disk", &[b"base:allocation"]);
    assert_eq!(talk.only(option::SET_META_CONTEXT, &data), reply::ERR_INVALID);
    assert_eq!(talk.only(option::LIST_META_CONTEXT, &data), reply::ERR_INVALID);
}

/// Talks until structured replies are negotiated.
fn structured() -> Talk {
    let mut talk = Talk::new(FIXED);
    assert_eq!(talk.only(option::STRUCTURED_REPLY, &[]), reply::ACK);
    talk
}

fn contexts(talk: &mut Talk, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let (mut replies, _) = talk.option(option, data);
    assert_eq!(replies.pop().map(|last| last.1), Some(reply::ACK));
    let of = |(_, kind, data): Reply| {
        assert_eq!(kind, reply::META_CONTEXT);
        (Fields(&data).u32().unwrap(), data[4..].to_vec())
    };
    replies.into_iter().map(of).collect()
}

#[test]
fn list_without_a_query_and_with_a_bare_namespace_shows_what_there_is() {
    let mut talk = structured();
    let base = [(0, b"base:allocation".to_vec())];
    let no_queries: [&[&[u8]]; 4] =
        [&[], &[b"base:"], &[b"base:allocation", b"base:allocation"], &[b"x:", b"base:allocation"]];
    for asked in no_queries {
        let data = queries(b"disk", asked);
        assert_eq!(contexts(&mut talk, option::LIST_META_CONTEXT, &data), base);
    }
    let none: [&[&[u8]]; 4] = [&[b"qemu:"], &[b"base:other"], &[b""], &[b"base"]];
    for asked in none {
        let data = queries(b"disk", asked);
        assert_eq!(contexts(&mut talk, option::LIST_META_CONTEXT, &data), []);
    }
}

#[test]
fn a_namespace_and_a_kind_in_it_stand_for_all_of_theirs() {
    let offered = ["base:allocation", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:a:b", "qemu:depth"]
        .map(|name| MetaContext::Source(name.into()));
    let listed = |query: &[u8]| -> Vec<String> {
        let data = queries(b"disk", &[query]);
        let parsed = super::meta_context::parse(&data).unwrap();
        parsed.list(&offered).iter().map(|one| one.context.name().to_owned()).collect()
    };
    assert_eq!(listed(b"qemu:"), ["qemu:dirty-bitmap:a", "qemu:dirty-bitmap:a:b", "qemu:depth"]);
    assert_eq!(listed(b"qemu:dirty-bitmap:"), ["qemu:dirty-bitmap:a", "qemu:dirty-bitmap:a:b"]);
    assert_eq!(listed(b"qemu:dirty-bitmap:a:b"), ["qemu:dirty-bitmap:a:b"]);
    // A leaf is no group, whatever it looks like.
    for query in [&b"qemu:dirty-bitmap:a:"[..], b"qemu:dirty-bitmap", b"qemu:depth:", b":"] {
        assert!(listed(query).is_empty());
    }
}

#[test]
fn set_selects_full_names_once_and_ignores_the_rest() {
    let mut talk = structured();
    let none: [&[&[u8]]; 3] = [&[], &[b"base:"], &[b"qemu:dirty-bitmap:x", b"base:other"]];
    for asked in none {
        let data = queries(b"disk", asked);
        assert_eq!(contexts(&mut talk, option::SET_META_CONTEXT, &data), []);
    }
    let data = queries(b"disk", &[b"base:allocation", b"x:y", b"base:allocation"]);
    let selected = contexts(&mut talk, option::SET_META_CONTEXT, &data);
    assert_eq!(selected, [(1, b"base:allocation".to_vec())]);
}

fn selected_after(talk: &mut Talk, export: &[u8]) -> usize {
    let (_, end) = talk.option(option::GO, &go(export, &[]));
    let Progress::Transmission(agreement) = end else { panic!("{end:?}") };
    assert_eq!(agreement.headers, Headers::Structured);
    agreement.contexts.len()
}

#[test]
fn a_selection_belongs_to_the_name_it_was_made_for() {
    let base = queries(b"disk", &[b"base:allocation"]);
    for (export, expected) in [(&b"disk"[..], 1), (b"", 0), ("böse".as_bytes(), 0)] {
        let mut talk = structured();
        contexts(&mut talk, option::SET_META_CONTEXT, &base);
        assert_eq!(selected_after(&mut talk, export), expected);
    }
}

#[test]
fn a_failed_selection_replaces_the_one_before() {
    let base = queries(b"disk", &[b"base:allocation"]);
    let mut broken = base.clone();
    broken.push(0);
    let unknown = queries(b"none", &[b"base:allocation"]);
    for (data, expected) in [
        (broken, reply::ERR_INVALID),
        (unknown, reply::ERR_UNKNOWN),
        (vec![0; 257 << 10], reply::ERR_TOO_BIG),
        (queries(b"disk", &[b"\xff"]), reply::ERR_INVALID),
        (queries(b"disk", &[&[b'x'; 4097]]), reply::ERR_INVALID),
    ] {
        let mut talk = structured();
        contexts(&mut talk, option::SET_META_CONTEXT, &base);
        assert_eq!(talk.only(option::SET_META_CONTEXT, &data), expected);
        assert_eq!(selected_after(&mut talk, b"disk"), 0);
    }
}

#[test]
fn a_query_count_beyond_the_data_is_invalid_at_once() {
    let mut talk = structured();
    let mut data = queries(b"disk", &[]);
    let at = data.len() - 4;
    data[at..].copy_from_slice(&u32::MAX.to_be_bytes());
    assert_eq!(talk.only(option::SET_META_CONTEXT, &data), reply::ERR_INVALID);
}

#[test]
fn a_stopping_server_refuses_everything_but_abort() {
    let mut talk = Talk::new(FIXED);
    talk.exports.stopping = true;
    for asked in [option::LIST, option::STRUCTURED_REPLY] {
        assert_eq!(talk.only(asked, &[]), reply::ERR_SHUTDOWN);
    }
    assert_eq!(talk.only(option::GO, &go(b"disk", &[])), reply::ERR_SHUTDOWN);
    let (replies, _) = talk.option(option::ABORT, &[]);
    assert_eq!(replies[0].1, reply::ACK);
}

#[test]
fn requests_behind_the_last_option_are_left_alone() {
    let mut talk = Talk::new(FIXED);
    let mut bytes = bytes_of(option::GO, &go(b"disk", &[]));
    bytes.extend_from_slice(b"requests");
    let (_, end) = talk.send(&bytes);
    assert!(matches!(end, Progress::Transmission(_)));
    assert_eq!(talk.input.as_ref(), b"requests");
    assert_eq!(talk.send(&[]).1, Progress::Close(Close::Aborted));
    assert_eq!(talk.input.as_ref(), b"requests");
}

#[test]
fn flags_tell_about_structured_replies_as_negotiated() {
    for mut talk in [Talk::new(FIXED), structured()] {
        let (replies, end) = talk.option(option::GO, &go(b"disk", &[]));
        let flags = Fields(&replies[0].2[10..]).u16().unwrap();
        let Progress::Transmission(agreement) = end else { panic!("{end:?}") };
        assert_eq!(flags & transmission_flag::SEND_DF != 0, agreement.headers.has_chunks());
        assert_ne!(flags & transmission_flag::HAS_FLAGS, 0);
    }
}

#[test]
fn extended_headers_win_over_structured_replies_in_either_order() {
    let both = [option::STRUCTURED_REPLY, option::EXTENDED_HEADERS];
    for options in [&both[..], &both[1..], &[both[1], both[1]]] {
        let mut talk = Talk::new(FIXED);
        for option in options {
            assert_eq!(talk.only(*option, &[]), reply::ACK);
        }
        assert_eq!(talk.only(option::STRUCTURED_REPLY, &[]), reply::ERR_EXT_HEADER_REQD);
        let (_, end) = talk.option(option::GO, &go(b"disk", &[]));
        let Progress::Transmission(agreement) = end else { panic!("{end:?}") };
        assert_eq!(agreement.headers, Headers::Extended);
    }
}

#[test]
fn extended_headers_need_go() {
    let mut talk = Talk::new(FIXED);
    assert_eq!(talk.only(option::EXTENDED_HEADERS, &[]), reply::ACK);
    let (out, end) = talk.send(&bytes_of(option::EXPORT_NAME, b"disk"));
    assert_eq!((out.len(), end), (0, Progress::Close(Close::ExtendedExportName)));
    assert!(talk.exports.entered.is_empty());
}

#[test]
fn a_payload_for_status_is_offered_with_extended_headers_and_a_selection_only() {
    for headers in [option::STRUCTURED_REPLY, option::EXTENDED_HEADERS] {
        for selects in [false, true] {
            let mut talk = Talk::new(FIXED);
            assert_eq!(talk.only(headers, &[]), reply::ACK);
            if selects {
                let data = queries(b"disk", &[b"base:allocation"]);
                assert_eq!(contexts(&mut talk, option::SET_META_CONTEXT, &data).len(), 1);
            }
            // INFO, and for another name nothing is selected.
            for (name, is_selected) in [(&b"disk"[..], selects), (b"", false)] {
                let (replies, _) = talk.option(option::INFO, &go(name, &[]));
                let flags = Fields(&replies[0].2[10..]).u16().unwrap();
                let offered = flags & transmission_flag::BLOCK_STATUS_PAYLOAD != 0;
                assert_eq!(offered, is_selected && headers == option::EXTENDED_HEADERS);
            }
        }
    }
}

/// An option that is more often nearly right than random bytes are.
fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let names = prop_oneof![Just(b"disk".to_vec()), Just(Vec::new()), any::<Vec<u8>>()];
    let query =
        prop_oneof![Just(b"base:allocation".to_vec()), Just(b"base:".to_vec()), any::<Vec<u8>>()];
    let data = prop_oneof![
        any::<Vec<u8>>(),
        (names.clone(), any::<Vec<u16>>()).prop_map(|(name, wanted)| go(&name, &wanted)),
        (names, proptest::collection::vec(query, 0..4)).prop_map(|(name, all)| {
            queries(&name, &all.iter().map(Vec::as_slice).collect::<Vec<_>>())
        }),
    ];
    (prop_oneof![0_u32..14, any::<u32>()], data).prop_map(|(option, data)| bytes_of(option, &data))
}

proptest! {
    #[test]
    fn arbitrary_bytes_neither_panic_nor_lead_to_endless_answers(bytes in any::<Vec<u8>>()) {
        let mut talk = Talk::new(FIXED);
        let before = bytes.len() + 4;
        let (_, end) = talk.send(&bytes);
        prop_assert!(talk.input.len() <= before);
        prop_assert!(!matches!(end, Progress::Again));
    }

    #[test]
    fn each_option_is_answered_by_one_final_reply_and_consumed_whole(
        options in proptest::collection::vec(any_option(), 1..8),
        cut in any::<proptest::sample::Index>(),
    ) {
        let mut talk = Talk::new(FIXED);
        for bytes in options {
            let at = cut.index(bytes.len());
            let (mut out, mut end) = talk.send(&bytes[..at]);
            if !matches!(end, Progress::Close(_)) {
                let (more, last) = talk.send(&bytes[at..]);
                out.extend(more);
                end = last;
            }
            let option = Fields(&bytes[8..]).u32().unwrap();
            if option == option::EXPORT_NAME {
                return Ok(());
            }
            let replies = replies(&out);
            let finals = |kind: u32| kind == reply::ACK || kind >> 31 == 1;
            prop_assert!(replies.iter().all(|reply| reply.0 == option));
            prop_assert_eq!(replies.iter().filter(|reply| finals(reply.1)).count(), 1);
            prop_assert!(replies.last().is_some_and(|reply| finals(reply.1)));
            match end {
                Progress::Need(OPTION_BYTES) => prop_assert!(talk.input.is_empty()),
                Progress::Transmission(_) => {
                    prop_assert_eq!(option, option::GO);
                    return Ok(());
                }
                Progress::Close(Close::Aborted) => {
                    prop_assert_eq!(option, option::ABORT);
                    return Ok(());
                }
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }

    #[test]
    fn how_the_bytes_are_cut_changes_nothing(
        options in proptest::collection::vec(any_option(), 1..4),
        step in 1_usize..20,
    ) {
        let bytes: Vec<u8> = options.concat();
        let (whole, end) = Talk::new(FIXED).send(&bytes);
        let mut talk = Talk::new(FIXED);
        let (mut parts, mut last) = (Vec::new(), Progress::Need(0));
        for piece in bytes.chunks(step) {
            let (out, now) = talk.send(piece);
            parts.extend(out);
            last = now;
            if matches!(last, Progress::Transmission(_) | Progress::Close(_)) {
                break;
            }
        }
        prop_assert_eq!(whole, parts);
        prop_assert_eq!(end, last);
    }
}
