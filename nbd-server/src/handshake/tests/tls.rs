//! What the machine says before TLS, at its beginning and behind it. TLS itself does not take part.

use super::*;

const EVERY_OPTION: std::ops::Range<u32> = option::EXPORT_NAME..20;

fn talk(mode: TlsMode) -> Talk {
    let mut talk = Talk::new(FIXED);
    talk.machine = talk.machine.with_tls(mode);
    talk
}

impl Talk {
    /// Goes to the other side of TLS.
    fn secured(mut self) -> Self {
        let (replies, end) = self.option(option::STARTTLS, &[]);
        assert_eq!(replies, [(option::STARTTLS, reply::ACK, Vec::new())]);
        assert_eq!(end, Progress::StartTls);
        self.machine = self.machine.secured(&Limits::default());
        self
    }
}

#[test]
fn without_tls_nothing_demands_it() {
    let mut talk = talk(TlsMode::Off);
    assert_eq!(talk.only(option::STARTTLS, &[]), reply::ERR_UNSUP);
    for asked in EVERY_OPTION.filter(|one| ![option::EXPORT_NAME, option::ABORT].contains(one)) {
        let (replies, _) = talk.option(asked, &[]);
        assert!(replies.iter().all(|reply| reply.1 != reply::ERR_TLS_REQD), "{asked}");
    }
}

#[test]
fn where_tls_is_demanded_every_option_but_two_is_refused_and_consumed_whole() {
    let mut talk = talk(TlsMode::Required);
    for asked in EVERY_OPTION {
        if [option::EXPORT_NAME, option::ABORT, option::STARTTLS].contains(&asked) {
            continue;
        }
        for data in [Vec::new(), go(b"disk", &[]), vec![0; 300 << 10]] {
            assert_eq!(talk.only(asked, &data), reply::ERR_TLS_REQD, "{asked}");
        }
    }
    assert!(talk.exports.entered.is_empty());
    assert_eq!(talk.only(option::STARTTLS, &[0]), reply::ERR_INVALID);
    let (replies, end) = talk.option(option::ABORT, &[]);
    assert_eq!((replies[0].1, end), (reply::ACK, Progress::Close(Close::Aborted)));
}

#[test]
fn where_tls_is_demanded_export_name_closes() {
    for name in [&b"disk"[..], b"", b"none"] {
        let mut talk = talk(TlsMode::Required);
        let (out, end) = talk.send(&bytes_of(option::EXPORT_NAME, name));
        assert_eq!((out.len(), end), (0, Progress::Close(Close::TlsRequired)));
        assert!(talk.exports.entered.is_empty());
    }
}

#[test]
fn where_tls_is_demanded_a_client_without_fixed_newstyle_gets_nothing() {
    for flags in [0, client_flag::NO_ZEROES] {
        for (asked, why) in [
            (option::EXPORT_NAME, Close::TlsRequired),
            (option::STARTTLS, Close::NotFixed(option::STARTTLS)),
        ] {
            let mut talk = Talk::new(flags);
            talk.machine = talk.machine.with_tls(TlsMode::Required);
            let (out, end) = talk.send(&bytes_of(asked, &[]));
            assert_eq!((out.len(), end), (0, Progress::Close(why)));
        }
    }
}

#[test]
fn where_tls_is_offered_everything_works_without_it_and_with_it() {
    for mut talk in [talk(TlsMode::Offered), talk(TlsMode::Offered).secured()] {
        assert_eq!(talk.only(option::STRUCTURED_REPLY, &[]), reply::ACK);
        let (_, end) = talk.option(option::GO, &go(b"disk", &[]));
        assert!(matches!(end, Progress::Transmission(_)));
    }
}

#[test]
fn behind_tls_no_option_demands_it_and_a_second_beginning_is_invalid() {
    for mode in [TlsMode::Offered, TlsMode::Required] {
        let mut talk = talk(mode).secured();
        for data in [&[][..], &[0]] {
            assert_eq!(talk.only(option::STARTTLS, data), reply::ERR_INVALID);
        }
        assert_eq!(talk.only(option::INFO, &go(b"none", &[])), reply::ERR_UNKNOWN);
        let (out, end) = talk.send(&bytes_of(option::EXPORT_NAME, b"disk"));
        assert_eq!(out.len(), 10);
        assert!(matches!(end, Progress::Transmission(_)));
    }
}

#[test]
fn the_beginning_of_tls_forgets_what_was_negotiated() {
    for headers in [option::STRUCTURED_REPLY, option::EXTENDED_HEADERS] {
        let mut talk = talk(TlsMode::Offered);
        assert_eq!(talk.only(headers, &[]), reply::ACK);
        let base = queries(b"disk", &[b"base:allocation"]);
        contexts(&mut talk, option::SET_META_CONTEXT, &base);
        let mut talk = talk.secured();
        assert_eq!(talk.only(option::SET_META_CONTEXT, &base), reply::ERR_INVALID);
        let (replies, end) = talk.option(option::GO, &go(b"disk", &[]));
        let flags = Fields(&replies[0].2[10..]).u16().unwrap();
        assert_eq!(flags & transmission_flag::SEND_DF, 0);
        let Progress::Transmission(agreement) = end else { panic!("{end:?}") };
        assert_eq!((agreement.headers, agreement.contexts), (Headers::Simple, Vec::new()));
    }
}

#[test]
fn the_beginning_of_tls_gives_no_options_back() {
    let limits = Limits { options: 2, ..Limits::default() };
    let mut talk = Talk::with_limits(FIXED, &limits);
    talk.machine = talk.machine.with_tls(TlsMode::Required);
    let mut talk = talk.secured();
    assert_eq!(talk.only(77, &[]), reply::ERR_UNSUP);
    let (_, end) = talk.send(&bytes_of(77, &[]));
    assert_eq!(end, Progress::Close(Close::TooManyOptions));
}

#[test]
fn plain_text_behind_starttls_closes_before_anything_of_it_is_looked_at() {
    for mode in [TlsMode::Offered, TlsMode::Required] {
        for behind in [bytes_of(option::GO, &go(b"disk", &[])), vec![0x16]] {
            let mut talk = talk(mode);
            let mut bytes = bytes_of(option::STARTTLS, &[]);
            bytes.extend_from_slice(&behind);
            let (out, end) = talk.send(&bytes);
            assert_eq!((out.len(), end), (0, Progress::Close(Close::PlaintextBehindStartTls)));
            assert!(talk.exports.entered.is_empty());
        }
    }
}

#[test]
fn a_stopping_server_begins_no_tls() {
    let mut talk = talk(TlsMode::Offered);
    talk.exports.stopping = true;
    assert_eq!(talk.only(option::STARTTLS, &[]), reply::ERR_SHUTDOWN);
}

#[test]
fn only_info_and_go_tell_that_tls_would_help() {
    let mut talk = structured();
    talk.exports.tls_only = true;
    for (asked, data, expected) in [
        (option::INFO, go(b"disk", &[]), reply::ERR_TLS_REQD),
        (option::GO, go(b"disk", &[]), reply::ERR_TLS_REQD),
        (option::LIST_META_CONTEXT, queries(b"disk", &[]), reply::ERR_UNKNOWN),
        (option::SET_META_CONTEXT, queries(b"disk", &[]), reply::ERR_UNKNOWN),
    ] {
        assert_eq!(talk.only(asked, &data), expected, "{asked}");
    }
    let (out, end) = talk.send(&bytes_of(option::EXPORT_NAME, b"disk"));
    assert_eq!((out.len(), end), (0, Progress::Close(Close::ExportName)));
}

proptest! {
    #[test]
    fn without_tls_a_demanding_server_lets_nobody_in(
        options in proptest::collection::vec(any_option(), 1..8),
        flags in 0..4_u32,
    ) {
        let mut talk = Talk::new(flags);
        talk.machine = talk.machine.with_tls(TlsMode::Required);
        let (_, end) = talk.send(&options.concat());
        prop_assert!(!matches!(end, Progress::Transmission(_)));
        prop_assert!(talk.exports.entered.is_empty());
    }
}
