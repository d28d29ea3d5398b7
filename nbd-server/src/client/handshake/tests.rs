use bytes::{BufMut, BytesMut};
use proptest::prelude::*;

use super::*;

/// A server's side of a negotiation, written down beforehand.
#[derive(Default)]
struct Script(BytesMut);

impl Script {
    fn greeting(flags: u16) -> Self {
        let mut bytes = BytesMut::new();
        bytes.put_u64(INIT_PASSWD);
        bytes.put_u64(IHAVEOPT);
        bytes.put_u16(flags);
        Self(bytes)
    }

    fn modern() -> Self {
        Self::greeting(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES)
    }

    fn reply(mut self, option: u32, kind: u32, body: &[u8]) -> Self {
        self.0.put_u64(OPTION_REPLY_MAGIC);
        self.0.put_u32(option);
        self.0.put_u32(kind);
        self.0.put_u32(u32::try_from(body.len()).unwrap());
        self.0.put_slice(body);
        self
    }

    fn export(self, size: u64, flags: u16) -> Self {
        let mut body = BytesMut::new();
        body.put_u16(info::EXPORT);
        body.put_u64(size);
        body.put_u16(flags);
        self.reply(option::GO, reply::INFO, &body)
    }

    fn block_sizes(self, sizes: [u32; 3]) -> Self {
        let mut body = BytesMut::new();
        body.put_u16(info::BLOCK_SIZE);
        for size in sizes {
            body.put_u32(size);
        }
        self.reply(option::GO, reply::INFO, &body)
    }

    fn context(self, id: u32, name: &str) -> Self {
        let mut body = BytesMut::new();
        body.put_u32(id);
        body.put_slice(name.as_bytes());
        self.reply(option::SET_META_CONTEXT, reply::META_CONTEXT, &body)
    }

    fn ack(self, option: u32) -> Self {
        self.reply(option, reply::ACK, &[])
    }
}

fn connect() -> Goal {
    Goal::Connect {
        export: "disk".to_owned(),
        contexts: vec!["base:allocation".to_owned()],
        headers: Headers::Structured,
    }
}

/// Runs a negotiation until it ends or the script does; also returns what the client sent and what was left over.
fn run(goal: Goal, script: &[u8]) -> (Result<Option<Outcome>, ClientError>, Vec<u8>, usize) {
    drive(&mut Handshake::new(goal).unwrap(), script)
}

fn drive(
    handshake: &mut Handshake,
    script: &[u8],
) -> (Result<Option<Outcome>, ClientError>, Vec<u8>, usize) {
    let (mut rest, mut sent) = (script, Vec::new());
    loop {
        let Some((bytes, after)) = rest.split_at_checked(handshake.wants()) else {
            return (Ok(None), sent, rest.len());
        };
        rest = after;
        let fed = handshake.feed(bytes);
        sent.extend_from_slice(&handshake.take_output());
        match fed {
            Ok(None) => {}
            end => return (end, sent, rest.len()),
        }
    }
}

/// The options in what the client sent.
fn options(sent: &[u8]) -> Vec<u32> {
    let mut fields = Fields(sent);
    let mut options = Vec::new();
    fields.u32();
    while let (Some(magic), Some(option), Some(len)) = (fields.u64(), fields.u32(), fields.u32()) {
        assert_eq!(magic, IHAVEOPT);
        fields.take(usize::try_from(len).unwrap()).unwrap();
        options.push(option);
    }
    fields.finish().unwrap();
    options
}

fn negotiated(script: Script) -> (Negotiated, Vec<u32>) {
    let (end, sent, left) = run(connect(), &script.0);
    assert_eq!(left, 0, "bytes of the transmission phase were taken, or some were left");
    match end.unwrap() {
        Some(Outcome::Transmission(negotiated)) => (negotiated, options(&sent)),
        other => panic!("{other:?}"),
    }
}

fn fault(script: &Script) -> HandshakeFault {
    match run(connect(), &script.0).0 {
        Err(ClientError::Handshake(fault)) => fault,
        other => panic!("{other:?}"),
    }
}

fn newest() -> Goal {
    match connect() {
        Goal::Connect { export, contexts, .. } => {
            Goal::Connect { export, contexts, headers: Headers::Extended }
        }
        Goal::List => panic!("not to connect"),
    }
}

#[test]
fn extended_headers_need_no_structured_replies_beside_them() {
    let script = Script::modern()
        .ack(option::EXTENDED_HEADERS)
        .context(7, "base:allocation")
        .ack(option::SET_META_CONTEXT)
        .export(1 << 60, 1)
        .ack(option::GO);
    let (end, sent, left) = run(newest(), &script.0);
    let Ok(Some(Outcome::Transmission(negotiated))) = end else { panic!("{end:?}") };
    assert_eq!(left, 0);
    assert_eq!(options(&sent), [option::EXTENDED_HEADERS, option::SET_META_CONTEXT, option::GO]);
    assert_eq!(negotiated.export.headers, Headers::Extended);
    assert_eq!(negotiated.contexts.len(), 1);
}

#[test]
fn a_server_without_extended_headers_is_asked_for_structured_replies() {
    for refusal in [reply::ERR_UNSUP, reply::ERR_INVALID, reply::ERR_POLICY] {
        let script = Script::modern()
            .reply(option::EXTENDED_HEADERS, refusal, b"no")
            .ack(option::STRUCTURED_REPLY)
            .ack(option::SET_META_CONTEXT)
            .export(1 << 30, 1)
            .ack(option::GO);
        let (end, sent, left) = run(newest(), &script.0);
        let Ok(Some(Outcome::Transmission(negotiated))) = end else { panic!("{end:?}") };
        assert_eq!(left, 0);
        assert_eq!(negotiated.export.headers, Headers::Structured);
        let asked = [option::EXTENDED_HEADERS, option::STRUCTURED_REPLY];
        assert_eq!(options(&sent)[..2], asked);
    }
}

#[test]
fn after_extended_headers_there_is_no_way_back_to_export_name() {
    let script = Script::modern()
        .ack(option::EXTENDED_HEADERS)
        .ack(option::SET_META_CONTEXT)
        .reply(option::GO, reply::ERR_UNSUP, b"");
    let (end, sent, _) = run(newest(), &script.0);
    assert!(matches!(end, Err(ClientError::Refused { option: option::GO, .. })), "{end:?}");
    assert_eq!(options(&sent).last(), Some(&option::ABORT));
}

#[test]
fn a_modern_server_grants_everything() {
    let (negotiated, options) = negotiated(
        Script::modern()
            .ack(option::STRUCTURED_REPLY)
            .context(7, "base:allocation")
            .ack(option::SET_META_CONTEXT)
            .reply(option::GO, reply::INFO, &[0, 2, b'x'])
            .export(1 << 30, 0x1ff)
            .block_sizes([512, 4096, 0x0180_0000])
            .ack(option::GO),
    );
    assert_eq!(options, [option::STRUCTURED_REPLY, option::SET_META_CONTEXT, option::GO]);
    let export = negotiated.export;
    assert_eq!((export.size_bytes, export.flags), (1 << 30, 0x1ff));
    let sizes = BlockSizes { minimum: 512, preferred: 4096, maximum: 0x0100_0000 };
    assert_eq!(export.block_sizes, sizes);
    assert_eq!(export.headers, Headers::Structured);
    assert_eq!(export.contexts, ["base:allocation"]);
    assert_eq!(negotiated.contexts.first().map(|context| context.id), Some(7));
}

#[test]
fn flags_and_items_that_are_unknown_are_ignored_and_no_flag_is_set_that_was_not_offered() {
    for (offered, taken) in [(u16::MAX, 3), (0xfffd, 1), (3, 3), (1, 1), (2, 2), (0, 0)] {
        let mut script = Script::greeting(offered);
        if offered & handshake_flag::FIXED_NEWSTYLE == 0 {
            script.0.put_u64(4096);
            script.0.put_u16(u16::MAX);
            if offered & handshake_flag::NO_ZEROES == 0 {
                script.0.put_slice(&[0; 124]);
            }
        } else {
            script = script
                .ack(option::STRUCTURED_REPLY)
                .ack(option::SET_META_CONTEXT)
                .reply(option::GO, reply::INFO, &[0xab, 0xcd, 1, 2, 3])
                .export(4096, u16::MAX)
                .ack(option::GO);
        }
        let (end, sent, left) = run(connect(), &script.0);
        let Ok(Some(Outcome::Transmission(negotiated))) = end else { panic!("{end:?}") };
        assert_eq!((left, negotiated.export.size_bytes), (0, 4096));
        assert_eq!(sent[..4], u32::to_be_bytes(taken), "{offered:#x}");
    }
}

#[test]
fn an_older_server_is_met_where_it_is() {
    let (negotiated, options) = negotiated(
        Script::modern()
            .reply(option::STRUCTURED_REPLY, reply::ERR_UNSUP, b"what?")
            .export(4096, 1)
            .ack(option::GO),
    );
    assert_eq!(options, [option::STRUCTURED_REPLY, option::GO]);
    assert_eq!(negotiated.export.headers, Headers::Simple);
    assert!(negotiated.export.contexts.is_empty());
}

#[test]
fn a_server_without_go_is_asked_by_export_name() {
    let mut script = Script::greeting(handshake_flag::FIXED_NEWSTYLE)
        .reply(option::STRUCTURED_REPLY, reply::ERR_UNSUP, b"")
        .reply(option::GO, reply::ERR_UNSUP, b"");
    script.0.put_u64(8192);
    script.0.put_u16(3);
    script.0.put_slice(&[0; 124]);
    let (negotiated, options) = negotiated(script);
    assert_eq!(options, [option::STRUCTURED_REPLY, option::GO, option::EXPORT_NAME]);
    assert_eq!((negotiated.export.size_bytes, negotiated.export.flags), (8192, 3));
}

#[test]
fn a_newstyle_server_that_is_not_fixed_sees_no_option_but_one() {
    let mut script = Script::greeting(handshake_flag::NO_ZEROES);
    script.0.put_u64(8192);
    script.0.put_u16(3);
    let (negotiated, options) = negotiated(script);
    assert_eq!(options, [option::EXPORT_NAME]);
    assert_eq!(negotiated.export.block_sizes, BlockSizes::default());
}

#[test]
fn a_refusal_is_told_in_the_words_of_the_server_and_answered_with_abort() {
    let script = Script::modern()
        .ack(option::STRUCTURED_REPLY)
        .ack(option::SET_META_CONTEXT)
        .reply(option::GO, reply::ERR_UNKNOWN, "kein Platz\n\u{7}für disk".as_bytes());
    let (end, sent, _) = run(connect(), &script.0);
    match end {
        Err(ClientError::Refused { option, reply, text }) => {
            assert_eq!((option, reply), (option::GO, reply::ERR_UNKNOWN));
            assert_eq!(text, "kein Platz  für disk");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(options(&sent).last(), Some(&option::ABORT));
}

#[test]
fn a_server_that_insists_on_tls_is_not_asked_twice() {
    let script = Script::modern().reply(option::STRUCTURED_REPLY, reply::ERR_TLS_REQD, b"");
    match run(connect(), &script.0).0 {
        Err(ClientError::Refused { reply, .. }) => assert_eq!(reply, reply::ERR_TLS_REQD),
        other => panic!("{other:?}"),
    }
}

#[test]
fn exports_are_listed_with_their_descriptions() {
    let script = Script::modern()
        .reply(option::LIST, reply::SERVER, b"\0\0\0\x01afirst")
        .reply(option::LIST, reply::SERVER, b"\0\0\0\0")
        .ack(option::LIST);
    let (end, sent, _) = run(Goal::List, &script.0);
    match end.unwrap() {
        Some(Outcome::Listed(exports)) => {
            let listing = |name: &str, description: &str| ExportListing {
                name: name.to_owned(),
                description: description.to_owned(),
            };
            assert_eq!(exports, [listing("a", "first"), listing("", "")]);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(options(&sent), [option::LIST, option::ABORT]);
}

#[test]
fn what_is_not_newstyle_nbd_is_refused_by_name() {
    let mut script = Script(BytesMut::from(&b"SSH-2.0-"[..]));
    assert_eq!(fault(&script), HandshakeFault::NotNbd { found: 0x5353_482d_322e_302d });
    script = Script::default();
    script.0.put_u64(INIT_PASSWD);
    script.0.put_u64(OLD_STYLE);
    script.0.put_slice(&[0; 136]);
    assert_eq!(fault(&script), HandshakeFault::OldStyle);
}

#[test]
fn lengths_and_replies_that_lie_are_refused() {
    let mut script = Script::modern().ack(option::STRUCTURED_REPLY);
    script.0.put_u64(OPTION_REPLY_MAGIC);
    script.0.put_u32(option::SET_META_CONTEXT);
    script.0.put_u32(reply::META_CONTEXT);
    script.0.put_u32(u32::MAX);
    assert_eq!(fault(&script), HandshakeFault::TooLong { len: u32::MAX, limit: MAX_REPLY_BYTES });

    let script = Script::modern().ack(option::GO);
    let wrong = HandshakeFault::WrongOption { sent: option::STRUCTURED_REPLY, found: option::GO };
    assert_eq!(fault(&script), wrong);

    let contexts = || Script::modern().ack(option::STRUCTURED_REPLY).context(1, "a");
    assert_eq!(fault(&contexts().context(1, "b")), HandshakeFault::ContextId { id: 1 });

    let open = || contexts().ack(option::SET_META_CONTEXT);
    assert_eq!(fault(&open().ack(option::GO)), HandshakeFault::NoSize);
    let malformed = HandshakeFault::Malformed { option: option::GO, reply: reply::INFO };
    assert_eq!(fault(&open().reply(option::GO, reply::INFO, &[0, 0, 1])), malformed);
    assert_eq!(fault(&open().reply(option::GO, reply::INFO, &[])), malformed);
    for [minimum, preferred, maximum] in
        [[0, 4096, 4096], [3, 4096, 4096], [512, 256, 4096], [4096, 4096, 512], [1, 0, 4096]]
    {
        let sizes = HandshakeFault::BlockSizes { minimum, preferred, maximum };
        assert_eq!(fault(&open().block_sizes([minimum, preferred, maximum])), sizes);
    }
}

#[test]
fn replies_without_end_are_cut_off() {
    let mut script = Script::modern().ack(option::STRUCTURED_REPLY);
    for id in 0..=256 {
        script = script.context(id, "x");
    }
    let many = HandshakeFault::TooMany { option: option::SET_META_CONTEXT, limit: MAX_REPLIES };
    assert_eq!(fault(&script), many);
}

#[test]
fn a_name_that_the_protocol_cannot_carry_is_refused_before_a_byte_is_sent() {
    for name in ["x".repeat(4097), "a\0b".to_owned()] {
        let goal = Goal::Connect { export: name, contexts: Vec::new(), headers: Headers::Extended };
        assert!(matches!(Handshake::new(goal), Err(ClientError::Name { .. })));
    }
}

proptest! {
    #[test]
    fn no_bytes_of_a_server_make_the_negotiation_panic_or_ask_for_much(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        kinds in proptest::collection::vec((0_u32..12, prop_oneof![0_u32..6, 0x8000_0000_u32..0x8000_000b],
            proptest::collection::vec(any::<u8>(), 0..40)), 0..12),
        honest in any::<bool>(),
    ) {
        let mut script = if honest { Script::modern() } else { Script(BytesMut::from(&bytes[..])) };
        for (option, kind, body) in &kinds {
            script = script.reply(*option, *kind, body);
        }
        script.0.put_slice(&bytes);
        let mut handshake = Handshake::new(connect()).unwrap();
        let mut rest = &script.0[..];
        while let Some((bytes, after)) = rest.split_at_checked(handshake.wants()) {
            rest = after;
            if !matches!(handshake.feed(bytes), Ok(None)) {
                break;
            }
            prop_assert!(handshake.wants() > 0 && handshake.wants() <= 16 << 10);
        }
    }
}

fn with_tls() -> Handshake {
    Handshake::new(connect()).unwrap().with_tls()
}

#[test]
fn with_tls_nothing_is_asked_for_before_it() {
    let mut handshake = with_tls();
    let script = Script::modern().ack(option::STARTTLS);
    let (end, sent, left) = drive(&mut handshake, &script.0);
    assert!(matches!(end, Ok(Some(Outcome::StartTls))), "{end:?}");
    assert_eq!((options(&sent), left), (vec![option::STARTTLS], 0));
    let mut handshake = handshake.secured().unwrap();
    let mut first = vec![0; 4];
    first.extend_from_slice(&handshake.take_output());
    assert_eq!(options(&first), [option::STRUCTURED_REPLY]);
    let script = Script::default()
        .ack(option::STRUCTURED_REPLY)
        .ack(option::SET_META_CONTEXT)
        .export(1 << 20, 1)
        .ack(option::GO);
    let (end, _, left) = drive(&mut handshake, &script.0);
    assert!(matches!(end, Ok(Some(Outcome::Transmission(_)))), "{end:?}");
    assert_eq!(left, 0);
}

#[test]
fn a_client_that_was_told_to_use_tls_never_goes_on_without() {
    let refusals = [reply::ERR_UNSUP, reply::ERR_POLICY, reply::ERR_INVALID, reply::ERR_TLS_REQD];
    for refusal in refusals {
        let script = Script::modern().reply(option::STARTTLS, refusal, b"no");
        let (end, sent, _) = drive(&mut with_tls(), &script.0);
        let Err(ClientError::Refused { option: option::STARTTLS, reply, .. }) = end else {
            panic!("{end:?}")
        };
        assert_eq!(reply, refusal);
        assert_eq!(options(&sent), [option::STARTTLS, option::ABORT]);
    }
    // Somebody in between who takes the fixed newstyle away.
    for flags in [0, handshake_flag::NO_ZEROES] {
        let (end, sent, _) = drive(&mut with_tls(), &Script::greeting(flags).0);
        assert!(matches!(end, Err(ClientError::NotSupported { what: "TLS" })), "{end:?}");
        assert_eq!(options(&sent), [option::ABORT]);
    }
    // Somebody who answers what was not asked, or more than that.
    for answer in [
        Script::modern().ack(option::STRUCTURED_REPLY),
        Script::modern().reply(option::STARTTLS, reply::INFO, &[0; 12]),
        Script::modern().reply(option::STARTTLS, reply::ACK, &[0]),
    ] {
        let (end, sent, _) = drive(&mut with_tls(), &answer.0);
        assert!(matches!(end, Err(ClientError::Handshake(_))), "{end:?}");
        assert_eq!(options(&sent), [option::STARTTLS]);
    }
}

#[test]
fn without_tls_a_server_that_demands_it_is_an_error() {
    let refused = |option| Script::modern().reply(option, reply::ERR_TLS_REQD, b"TLS first");
    let (end, _, _) = run(connect(), &refused(option::STRUCTURED_REPLY).0);
    assert!(matches!(end, Err(ClientError::Refused { reply: reply::ERR_TLS_REQD, .. })), "{end:?}");
}

proptest! {
    #[test]
    fn whatever_a_server_says_tls_comes_before_everything_else(bytes in any::<Vec<u8>>()) {
        let mut script = Script::modern().0;
        script.put_slice(&bytes);
        let (end, sent, _) = drive(&mut with_tls(), &script);
        prop_assert!(!matches!(end, Ok(Some(Outcome::Transmission(_) | Outcome::Listed(_)))));
        prop_assert!(
            options(&sent).iter().all(|one| [option::STARTTLS, option::ABORT].contains(one))
        );
    }
}
