//! The server's handshake machine on arbitrary bytes, in pieces of arbitrary sizes: it never panics, never consumes
//! what it was not given, and always says what comes next. What it agrees to is what the client may have.

use bytes::BytesMut;
use nbd_server::Limits;
use nbd_server::handshake::{
    Agreement, ExportDirectory, ExportFacts, Handshake, MetaContext, Progress, Unavailable,
};
use nbd_server::wire::{Headers, transmission_flag};

pub(crate) struct OneExport;

impl ExportDirectory for OneExport {
    fn next(&mut self, after: Option<&str>) -> Option<(String, String)> {
        after.is_none().then(|| ("disk".to_owned(), "a disk".to_owned()))
    }

    fn enter(&mut self, name: &str) -> Result<ExportFacts, Unavailable> {
        self.look_up(name)
    }

    fn is_shutting_down(&self) -> bool {
        false
    }

    fn look_up(&mut self, name: &str) -> Result<ExportFacts, Unavailable> {
        if matches!(name, "" | "disk") { Ok(facts()) } else { Err(Unavailable::Unknown) }
    }
}

/// An export with something of everything.
pub(crate) fn facts() -> ExportFacts {
    ExportFacts {
        name: "disk".to_owned(),
        description: "a disk".to_owned(),
        size_bytes: 1 << 30,
        read_only: false,
        preferred_bytes: 4096,
        max_payload_bytes: 32 << 20,
        rotational: false,
        withheld: 0,
        contexts: vec![MetaContext::Allocation],
    }
}

/// The first byte is the size of the pieces.
pub(crate) fn run(data: &[u8]) {
    let Some((&piece, data)) = data.split_first() else { return };
    let mut machine = Handshake::new(&Limits::default());
    let (mut input, mut out) = (BytesMut::new(), BytesMut::new());
    for part in data.chunks(usize::from(piece).max(1)) {
        input.extend_from_slice(part);
        loop {
            let before = input.len();
            let progress = machine.step(&mut input, &mut OneExport, &mut out);
            assert!(input.len() <= before, "the machine gave bytes back");
            out.clear();
            match progress {
                Progress::Need(more) => {
                    assert!(more > 0, "the machine needs nothing and does not go on");
                    break;
                }
                Progress::Again => {}
                Progress::Wait => panic!("the machine waits for a seal that there is not"),
                Progress::Transmission(agreement) => return is_sane(&agreement),
                Progress::StartTls | Progress::Close(_) => return,
            }
        }
    }
}

fn is_sane(agreement: &Agreement) {
    let flags = agreement.transmission_flags();
    let has = |flag| flags & flag != 0;
    assert!(has(transmission_flag::HAS_FLAGS));
    assert!(agreement.contexts.is_empty() || agreement.headers.has_chunks());
    assert!(!has(transmission_flag::SEND_DF) || agreement.headers.has_chunks());
    let filters = has(transmission_flag::BLOCK_STATUS_PAYLOAD);
    assert!(!filters || agreement.headers == Headers::Extended);
}
