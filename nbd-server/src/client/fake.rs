//! A server for tests of the driver: a disk in memory behind an in-memory stream, without negotiation. It notes what
//! it is asked, and can answer late and out of order.

use std::sync::Arc;

use bytes::BytesMut;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::connection::Connection;
use super::device::NbdDevice;
use super::export::{BlockSizes, ExportInfo};
use super::handshake::{Context, Negotiated};
use super::links::Links;
use super::options::ClientOptions;
use super::stream::{Counters, Halves};
use crate::wire::{
    ChunkHeader, EXTENDED_REQUEST_BYTES, ExtendedChunkHeader, Headers, REQUEST_BYTES, Request,
    SIMPLE_REPLY_MAGIC, chunk, command, command_flag, error, transmission_flag,
};

/// The size of the fake's disk in bytes.
pub(super) const DISK_BYTES: usize = 1 << 20;

/// What a fake server was asked, without cookies: command, flags, offset, length.
pub(super) type Log = Arc<Mutex<Vec<(u16, u16, u64, u64)>>>;

/// What a connection to a fake server has negotiated.
pub(super) fn negotiated(flags: u16, headers: Headers) -> Negotiated {
    let names = ["base:allocation".to_owned(), "x-test:a".to_owned()];
    let contexts = (1..).zip(&names).map(|(id, name)| Context { name: name.clone(), id });
    Negotiated {
        contexts: if headers.has_chunks() { contexts.collect() } else { Vec::new() },
        export: ExportInfo {
            name: String::new(),
            size_bytes: DISK_BYTES as u64,
            flags: flags | transmission_flag::HAS_FLAGS,
            block_sizes: BlockSizes::default(),
            headers,
            contexts: if headers.has_chunks() { names.to_vec() } else { Vec::new() },
        },
    }
}

/// A stream to a server of the test's own making.
pub(super) fn halves() -> (Halves, DuplexStream, Arc<Counters>) {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let (read, write) = tokio::io::split(ours);
    let counters = Arc::default();
    (Halves::new(read, write, &counters), theirs, counters)
}

/// A device over `connections` fake servers that share one disk; each answers after `late` further requests or when
/// nothing more comes, the last first.
pub(super) fn device(
    negotiated: &Negotiated,
    connections: usize,
    late: usize,
    options: ClientOptions,
) -> (NbdDevice, Log) {
    let behaviour = Behaviour { late, ..Behaviour::default() };
    device_that(behaviour, negotiated, connections, options)
}

/// What a fake server is like.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Behaviour {
    /// After how many further requests it answers.
    pub(super) late: usize,
    /// Whether it refuses zeroes that must be fast.
    pub(super) no_fast_zeroes: bool,
}

/// A device over fake servers of this kind.
pub(super) fn device_that(
    behaviour: Behaviour,
    negotiated: &Negotiated,
    connections: usize,
    options: ClientOptions,
) -> (NbdDevice, Log) {
    let disk = Arc::new(Mutex::new(vec![0; DISK_BYTES]));
    let log = Log::default();
    let all = (0..connections).map(|_| {
        let (halves, stream, _) = halves();
        let fake = Fake {
            stream,
            disk: Arc::clone(&disk),
            log: Arc::clone(&log),
            headers: negotiated.export.headers,
            behaviour,
            owed: Vec::new(),
        };
        tokio::spawn(fake.serve());
        Connection::start(halves, negotiated, &options)
    });
    let all = all.collect();
    let links = Links::new(negotiated.export.clone(), all, options, Arc::default(), None);
    (NbdDevice::new(links), log)
}

struct Fake {
    stream: DuplexStream,
    disk: Arc<Mutex<Vec<u8>>>,
    log: Log,
    headers: Headers,
    behaviour: Behaviour,
    owed: Vec<Vec<u8>>,
}

impl Fake {
    async fn serve(mut self) {
        loop {
            let mut header = vec![0; self.header_len()];
            // Whoever has asked for less than is held back would wait for ever: a pause in the requests ends it.
            let first = tokio::select! {
                biased;
                read = self.stream.read_exact(&mut header) => Some(read),
                () = tokio::task::yield_now(), if !self.owed.is_empty() => None,
            };
            match first {
                None => self.pay().await,
                Some(Err(_)) => return,
                Some(Ok(_)) => {
                    let request = self.decode(&header);
                    if request.command == command::DISC {
                        return self.pay().await;
                    }
                    let reply = self.answer(request).await;
                    self.owed.push(reply);
                    if self.owed.len() > self.behaviour.late {
                        self.pay().await;
                    }
                }
            }
        }
    }

    async fn pay(&mut self) {
        while let Some(reply) = self.owed.pop() {
            if self.stream.write_all(&reply).await.is_err() {
                return;
            }
        }
    }

    async fn answer(&mut self, request: Request) -> Vec<u8> {
        let Request { flags, command, offset, mut len, .. } = request;
        let mut wanted = vec![1, 2];
        if flags & command_flag::PAYLOAD_LEN != 0 && command == command::BLOCK_STATUS {
            len = self.stream.read_u64().await.expect("a length");
            wanted.clear();
            for _ in 0..(request.len - 8) / 4 {
                wanted.push(self.stream.read_u32().await.expect("a context"));
            }
        }
        self.log.lock().push((command, flags, offset, len));
        let start = usize::try_from(offset).unwrap();
        // The disk may be larger than what is kept of it.
        let end = start.saturating_add(usize::try_from(len).unwrap()).min(DISK_BYTES);
        let range = start.min(end)..end;
        match command {
            command::WRITE => {
                let mut payload = vec![0; range.len()];
                self.stream.read_exact(&mut payload).await.expect("a payload");
                self.disk.lock()[range].copy_from_slice(&payload);
            }
            command::WRITE_ZEROES
                if flags & command_flag::FAST_ZERO != 0 && self.behaviour.no_fast_zeroes =>
            {
                return self.refusal(&request, error::ENOTSUP);
            }
            command::WRITE_ZEROES => self.disk.lock()[range].fill(0),
            command::READ => {
                let content = self.disk.lock()[range].to_vec();
                return self.content(&request, &content);
            }
            command::BLOCK_STATUS => return self.status(&request, len, &wanted),
            _ => {}
        }
        self.success(&request)
    }

    fn refusal(&self, request: &Request, error: u32) -> Vec<u8> {
        let payload = [&error.to_be_bytes()[..], &[0; 2]].concat();
        self.chunk(request, 1, chunk::ERROR, &payload)
    }

    fn header_len(&self) -> usize {
        if self.headers == Headers::Extended { EXTENDED_REQUEST_BYTES } else { REQUEST_BYTES }
    }

    fn decode(&self, header: &[u8]) -> Request {
        match self.headers {
            Headers::Extended => Request::decode_extended(header.try_into().unwrap()),
            _ => Request::decode(header.try_into().unwrap()),
        }
        .expect("a request")
    }

    fn success(&self, request: &Request) -> Vec<u8> {
        match self.headers {
            Headers::Extended => self.chunk(request, 1, chunk::NONE, &[]),
            _ => simple(request.cookie),
        }
    }

    fn chunk(&self, request: &Request, flags: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut reply = BytesMut::new();
        let Request { cookie, offset, .. } = *request;
        match self.headers {
            Headers::Extended => {
                let len = payload.len() as u64;
                ExtendedChunkHeader { flags, kind, cookie, offset, len }.encode(&mut reply);
            }
            _ => {
                let len = u32::try_from(payload.len()).unwrap();
                ChunkHeader { flags, kind, cookie, len }.encode(&mut reply);
            }
        }
        reply.extend_from_slice(payload);
        reply.to_vec()
    }

    /// The reply to a read: data and holes, in pieces of a size that divides nothing, the last first.
    fn content(&self, request: &Request, content: &[u8]) -> Vec<u8> {
        if !self.headers.has_chunks() {
            return [simple(request.cookie), content.to_vec()].concat();
        }
        let mut reply = Vec::new();
        let mut at = request.offset + content.len() as u64;
        for piece in content.rchunks(3001) {
            at -= piece.len() as u64;
            let len = u32::try_from(piece.len()).unwrap();
            let at = at.to_be_bytes();
            let (kind, payload) = if block::is_zero(piece) {
                (chunk::OFFSET_HOLE, [&at[..], &len.to_be_bytes()].concat())
            } else {
                (chunk::OFFSET_DATA, [&at[..], piece].concat())
            };
            reply.extend(self.chunk(request, 0, kind, &payload));
        }
        reply.extend(self.chunk(request, 1, chunk::NONE, &[]));
        reply
    }

    /// Two contexts: in the first, the first half is a hole and the rest data; in the second, all carries the flag 1
    /// and the extent reaches far beyond the request.
    fn status(&self, request: &Request, len: u64, wanted: &[u32]) -> Vec<u8> {
        let extents = [vec![(len.div_ceil(2), 3), (len, 0)], vec![(u64::from(u32::MAX), 1)]];
        let mut reply = Vec::new();
        for (id, extents) in (1_u32..).zip(&extents).filter(|(id, _)| wanted.contains(id)) {
            let mut payload = id.to_be_bytes().to_vec();
            let extended = self.headers == Headers::Extended;
            if extended {
                payload.extend(u32::try_from(extents.len()).unwrap().to_be_bytes());
            }
            for field in extents.iter().flat_map(|(len, flags)| [*len, *flags]) {
                let bytes = field.to_be_bytes();
                payload.extend(if extended { &bytes[..] } else { &bytes[4..] });
            }
            let kind = if extended { chunk::BLOCK_STATUS_EXT } else { chunk::BLOCK_STATUS };
            let last = Some(&id) == wanted.last();
            reply.extend(self.chunk(request, u16::from(last), kind, &payload));
        }
        reply
    }
}

fn simple(cookie: u64) -> Vec<u8> {
    [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &[0; 4], &cookie.to_be_bytes()].concat()
}
