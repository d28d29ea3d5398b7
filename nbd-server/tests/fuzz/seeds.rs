//! Real conversations for the fuzzer to begin with: every option, every command, and every way to do them wrong that a
//! client has thought of. They are kept in `fuzz/corpus`, and written there with `SENDENSE_WRITE_SEEDS` set.

use bytes::{BufMut, BytesMut};
use nbd_server::Limits;
use nbd_server::handshake::{Handshake, Progress};
use nbd_server::wire::{self, Headers, Request, client_flag, command, command_flag, info, option};

use crate::handshake::OneExport;

const FIXED: u32 = client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES;
const EVERY_INFO: [u16; 4] = [info::EXPORT, info::NAME, info::DESCRIPTION, info::BLOCK_SIZE];
const BASE: &str = "base:allocation";

fn sized(text: &[u8]) -> Vec<u8> {
    let len = u32::try_from(text.len()).unwrap();
    [&len.to_be_bytes()[..], text].concat()
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    [&wire::IHAVEOPT.to_be_bytes()[..], &option.to_be_bytes(), &sized(data)].concat()
}

/// The data of INFO and GO.
fn chosen(name: &[u8], wanted: &[u16]) -> Vec<u8> {
    let mut data = sized(name);
    data.put_u16(u16::try_from(wanted.len()).unwrap());
    wanted.iter().for_each(|one| data.put_u16(*one));
    data
}

/// The data of the options about contexts.
fn queries(name: &[u8], queries: &[&str]) -> Vec<u8> {
    let mut data = sized(name);
    data.put_u32(u32::try_from(queries.len()).unwrap());
    queries.iter().for_each(|query| data.extend(sized(query.as_bytes())));
    data
}

/// How the handshake of a seed ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// In transmission.
    Enters,
    /// By the server.
    Closes,
    /// Not yet.
    Goes,
}

type Negotiation = (&'static str, u32, Vec<Vec<u8>>, End);

/// What goes well.
fn sound_negotiations() -> Vec<Negotiation> {
    let structured = || option(option::STRUCTURED_REPLY, &[]);
    let extended = || option(option::EXTENDED_HEADERS, &[]);
    let go = || option(option::GO, &chosen(b"disk", &EVERY_INFO));
    let info = |name: &[u8]| option(option::INFO, &chosen(name, &EVERY_INFO));
    let list = |data: &[u8]| option(option::LIST_META_CONTEXT, data);
    let set = |data: &[u8]| option(option::SET_META_CONTEXT, data);
    let (base, all) = (queries(b"disk", &[BASE]), queries(b"disk", &[]));
    vec![
        ("abort", FIXED, vec![option(option::ABORT, &[])], End::Closes),
        ("abort_with_data", FIXED, vec![option(option::ABORT, b"bye")], End::Closes),
        ("every_information", FIXED, vec![info(b"disk"), go()], End::Enters),
        (
            "default_export",
            FIXED,
            vec![info(b""), option(option::GO, &chosen(b"", &[]))],
            End::Enters,
        ),
        ("list_info_go", FIXED, vec![option(option::LIST, &[]), info(b"disk"), go()], End::Enters),
        ("structured_go", FIXED, vec![structured(), go()], End::Enters),
        ("extended_go", FIXED, vec![extended(), go()], End::Enters),
        ("extended_contexts", FIXED, vec![extended(), list(&all), set(&base), go()], End::Enters),
        (
            "structured_contexts",
            FIXED,
            vec![structured(), list(&base), set(&base), go()],
            End::Enters,
        ),
        ("structured_then_extended", FIXED, vec![structured(), extended(), go()], End::Enters),
        (
            "structured_export_name",
            FIXED,
            vec![structured(), option(option::EXPORT_NAME, b"disk")],
            End::Enters,
        ),
        (
            "zeroes",
            client_flag::FIXED_NEWSTYLE,
            vec![option(option::EXPORT_NAME, b"")],
            End::Enters,
        ),
        (
            "namespace",
            FIXED,
            vec![structured(), list(&queries(b"", &["base:", "qemu:", "x-y:z"]))],
            End::Goes,
        ),
        (
            "selected_twice",
            FIXED,
            vec![structured(), set(&base), set(&queries(b"disk", &["no:such"])), go()],
            End::Enters,
        ),
        (
            "selected_for_another",
            FIXED,
            vec![structured(), set(&queries(b"", &[BASE])), go()],
            End::Enters,
        ),
        (
            "asks_twice",
            FIXED,
            vec![
                info(b"disk"),
                info(b"none"),
                option(option::LIST, &[]),
                option(option::LIST, &[]),
                go(),
            ],
            End::Enters,
        ),
        (
            "requests_behind",
            FIXED,
            vec![go(), vec![0x25, 0x60, 0x95, 0x13], vec![0; 24]],
            End::Enters,
        ),
    ]
}

/// What does not.
fn broken_negotiations() -> Vec<Negotiation> {
    let structured = || option(option::STRUCTURED_REPLY, &[]);
    let extended = || option(option::EXTENDED_HEADERS, &[]);
    let go = |data: &[u8]| option(option::GO, data);
    let disk = chosen(b"disk", &EVERY_INFO);
    let mut counts = queries(b"disk", &[BASE]);
    counts[8..12].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut announced = option(option::SET_META_CONTEXT, b"");
    announced[12..].copy_from_slice(&(300_u32 << 10).to_be_bytes());
    let unsized_go = |len: u32| option(option::GO, &[&len.to_be_bytes()[..], b"disk\0\0"].concat());
    let nothing = || chosen(b"disk", &[]);
    vec![
        ("client_flags", 1 << 9, vec![], End::Closes),
        ("no_magic", FIXED, vec![b"IHAVEOPS\0\0\0\x03\0\0\0\0".to_vec()], End::Closes),
        ("not_fixed", 0, vec![option(option::LIST, &[])], End::Closes),
        ("no_such_name", FIXED, vec![option(option::EXPORT_NAME, b"none")], End::Closes),
        (
            "extended_export_name",
            FIXED,
            vec![extended(), option(option::EXPORT_NAME, b"disk")],
            End::Closes,
        ),
        ("extended_then_structured", FIXED, vec![extended(), structured(), go(&disk)], End::Enters),
        ("tls", FIXED, vec![option(option::STARTTLS, &[]), go(&disk)], End::Enters),
        (
            "unknown_options",
            FIXED,
            vec![option(4, b"peek"), option(0, &[]), option(u32::MAX, &[7; 40])],
            End::Goes,
        ),
        (
            "data_where_none_belongs",
            FIXED,
            vec![
                option(option::LIST, b"x"),
                option(option::STRUCTURED_REPLY, b"y"),
                option(option::EXTENDED_HEADERS, b"z"),
            ],
            End::Goes,
        ),
        (
            "go_cut_off",
            FIXED,
            (0..disk.len()).step_by(3).map(|end| go(&disk[..end])).collect(),
            End::Goes,
        ),
        (
            "go_with_more",
            FIXED,
            vec![go(&[&nothing()[..], b"more"].concat()), go(&nothing())],
            End::Enters,
        ),
        (
            "go_lengths",
            FIXED,
            vec![unsized_go(3), unsized_go(5), unsized_go(u32::MAX), unsized_go(0)],
            End::Goes,
        ),
        (
            "bad_names",
            FIXED,
            vec![
                go(&chosen(b"di\0sk", &[])),
                go(&chosen(b"\xff", &[])),
                go(&chosen(&[b'x'; 4097], &[])),
            ],
            End::Goes,
        ),
        (
            "long_name",
            FIXED,
            vec![option(option::INFO, &chosen(&[b'x'; 4096], &EVERY_INFO))],
            End::Goes,
        ),
        (
            "contexts_too_early",
            FIXED,
            vec![
                option(option::SET_META_CONTEXT, &queries(b"disk", &[BASE])),
                option(option::LIST_META_CONTEXT, &[]),
            ],
            End::Goes,
        ),
        (
            "query_count",
            FIXED,
            vec![structured(), option(option::SET_META_CONTEXT, &counts), go(&disk)],
            End::Enters,
        ),
        (
            "many_queries",
            FIXED,
            vec![structured(), option(option::SET_META_CONTEXT, &queries(b"disk", &[""; 200]))],
            End::Goes,
        ),
        (
            "contexts_of_none",
            FIXED,
            vec![structured(), option(option::LIST_META_CONTEXT, &queries(b"none", &[]))],
            End::Goes,
        ),
        ("too_long", FIXED, vec![structured(), announced, vec![1; 500]], End::Goes),
    ]
}

/// Requests as they are on the wire.
struct Talk {
    headers: Headers,
    bytes: BytesMut,
    cookie: u64,
}

impl Talk {
    /// A client that has entered with all that these headers allow.
    fn entered(headers: Headers) -> Self {
        let mut bytes = BytesMut::new();
        bytes.put_u32(FIXED);
        let contexts = || option(option::SET_META_CONTEXT, &queries(b"disk", &[BASE]));
        let kind = match headers {
            Headers::Simple => Vec::new(),
            Headers::Structured => [option(option::STRUCTURED_REPLY, &[]), contexts()].concat(),
            Headers::Extended => [option(option::EXTENDED_HEADERS, &[]), contexts()].concat(),
        };
        bytes.put_slice(&kind);
        bytes.put_slice(&option(option::GO, &chosen(b"disk", &[])));
        Self { headers, bytes, cookie: 0 }
    }

    fn ask(mut self, command: u16, flags: u16, offset: u64, len: u64, payload: &[u8]) -> Self {
        self.cookie += 1;
        // A payload is told by a flag where headers are extended.
        let has_payload = self.headers == Headers::Extended && !payload.is_empty();
        let flags = flags | if has_payload { command_flag::PAYLOAD_LEN } else { 0 };
        let request = Request { flags, command, cookie: self.cookie, offset, len };
        if self.headers == Headers::Extended {
            request.encode_extended(&mut self.bytes);
        } else {
            request.encode(&mut self.bytes);
        }
        self.bytes.put_slice(payload);
        self
    }

    fn write(self, flags: u16, offset: u64, payload: &[u8]) -> Self {
        self.ask(command::WRITE, flags, offset, payload.len() as u64, payload)
    }
}

/// What is done after the handshake, with headers of each kind.
fn transmission(name: &str, talk: Talk) -> Talk {
    use command::{BLOCK_STATUS, CACHE, FLUSH, READ, TRIM, WRITE_ZEROES};
    use command_flag as flag;
    const END: u64 = 1 << 20;
    let bye = |talk: Talk| talk.ask(command::DISC, 0, 0, 0, &[]);
    match name {
        "write_read" => bye(talk
            .write(0, 100, b"some bytes")
            .write(flag::FUA, 4090, &[7; 20])
            .ask(FLUSH, 0, 0, 0, &[])
            .ask(READ, 0, 0, 8192, &[])
            .ask(READ, flag::DF, END - 1, 1, &[])),
        "zeros" => bye(talk
            .write(0, 0, &[9; 700])
            .ask(WRITE_ZEROES, flag::NO_HOLE, 10, 20, &[])
            .ask(WRITE_ZEROES, flag::FAST_ZERO | flag::FUA, 0, END, &[])
            .ask(TRIM, flag::FUA, 512, 100_000, &[])
            .ask(CACHE, 0, 0, END, &[])
            .ask(READ, 0, 0, 1024, &[])),
        "status" => {
            let talk = talk
                .write(0, 70_000, &[1; 300])
                .ask(BLOCK_STATUS, 0, 0, END, &[])
                .ask(BLOCK_STATUS, flag::REQ_ONE, 70_000, 10, &[])
                .ask(BLOCK_STATUS, 0, END, 1, &[]);
            if talk.headers < Headers::Extended {
                return bye(talk);
            }
            // Of the contexts with these numbers, one of which there is.
            let of = |id: u32| [&END.to_be_bytes()[..], &id.to_be_bytes()].concat();
            bye(talk.ask(BLOCK_STATUS, 0, 0, 12, &of(1)).ask(BLOCK_STATUS, 0, 0, 12, &of(9)))
        }
        "pipelined" => (0..20).fold(talk, |talk, number| {
            talk.write(0, number * 1000, &[1; 40]).ask(READ, 0, number * 1000, 50, &[])
        }),
        "refused" => bye(talk
            .ask(READ, 0, END - 10, 11, &[])
            .write(0, END, b"behind")
            .write(1 << 12, 0, b"flags")
            .ask(TRIM, 0, u64::MAX, 1, &[])
            .ask(FLUSH, 0, 1, 1, &[])
            .ask(READ, 0, 0, 0, &[])
            .ask(99, 0, 0, 0, &[])
            .ask(READ, 0, 0, u64::from(u32::MAX), &[])),
        "cut_off" => talk.write(0, 0, b"whole").ask(command::WRITE, 0, 0, 5000, &[3; 200]),
        _ => talk.ask(READ, 0, 0, 512, &[]).ask(command::WRITE, 0, 0, u64::from(u32::MAX), &[]),
    }
}

const TRANSMISSIONS: [&str; 7] =
    ["write_read", "zeros", "status", "pipelined", "refused", "cut_off", "too_long"];

/// The seed as it is kept, which is `fresh` if seeds are to be written.
fn kept(target: &str, name: &str, fresh: &[u8]) -> Vec<u8> {
    let path = format!("{}/../fuzz/corpus/{target}/{name}", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("SENDENSE_WRITE_SEEDS").is_some() {
        std::fs::write(&path, fresh).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[test]
fn the_handshakes_that_are_kept_are_real_ones_and_end_as_they_should() {
    // Whole, and in pieces of some bytes.
    for (number, (name, flags, options, end)) in
        (0..).zip(sound_negotiations().into_iter().chain(broken_negotiations()))
    {
        let bytes = [&flags.to_be_bytes()[..], &options.concat()].concat();
        let piece = [255, 1, 16, 33][number % 4];
        let seed = [&[piece], &bytes[..]].concat();
        assert!(kept("nbd_handshake", &format!("real_{name}"), &seed) == seed, "{name}");
        let (mut input, mut out) = (BytesMut::from(&bytes[..]), BytesMut::new());
        let mut machine = Handshake::new(&Limits::default());
        let last = loop {
            match machine.step(&mut input, &mut OneExport, &mut out) {
                Progress::Again => {}
                last => break last,
            }
        };
        let ended = match last {
            Progress::Transmission(_) => End::Enters,
            Progress::Close(_) => End::Closes,
            _ => End::Goes,
        };
        assert_eq!(ended, end, "{name}: {last:?}");
    }
}

#[test]
fn the_sessions_that_are_kept_are_real_ones() {
    let kinds = [Headers::Simple, Headers::Structured, Headers::Extended];
    for (kind, headers) in ["simple", "structured", "extended"].into_iter().zip(kinds) {
        for name in TRANSMISSIONS {
            let seed = transmission(name, Talk::entered(headers)).bytes;
            assert!(kept("nbd_session", &format!("{kind}_{name}"), &seed) == seed, "{kind} {name}");
        }
    }
}
