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
use super::options::ClientOptions;
use super::stream::{Counters, Halves};
use crate::wire::{
    ChunkHeader, REQUEST_BYTES, Request, SIMPLE_REPLY_MAGIC, chunk, command, transmission_flag,
};

/// The size of the fake's disk in bytes.
pub(super) const DISK_BYTES: usize = 1 << 20;

/// What a fake server was asked, without cookies: command, flags, offset, length.
pub(super) type Log = Arc<Mutex<Vec<(u16, u16, u64, u32)>>>;

/// What a connection to a fake server has negotiated.
pub(super) fn negotiated(flags: u16, structured_replies: bool) -> Negotiated {
    let names = ["base:allocation".to_owned(), "x-test:a".to_owned()];
    let contexts = (1..).zip(&names).map(|(id, name)| Context { name: name.clone(), id });
    Negotiated {
        contexts: if structured_replies { contexts.collect() } else { Vec::new() },
        export: ExportInfo {
            name: String::new(),
            size_bytes: DISK_BYTES as u64,
            flags: flags | transmission_flag::HAS_FLAGS,
            block_sizes: BlockSizes::default(),
            structured_replies,
            contexts: if structured_replies { names.to_vec() } else { Vec::new() },
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
    let disk = Arc::new(Mutex::new(vec![0; DISK_BYTES]));
    let log = Log::default();
    let all = (0..connections).map(|_| {
        let (halves, stream, _) = halves();
        let fake = Fake {
            stream,
            disk: Arc::clone(&disk),
            log: Arc::clone(&log),
            structured: negotiated.export.structured_replies,
            owed: Vec::new(),
        };
        tokio::spawn(fake.serve(late));
        Connection::start(halves, negotiated, &options)
    });
    let all = all.collect();
    let device = NbdDevice::new(negotiated.export.clone(), all, options, Arc::default());
    (device, log)
}

struct Fake {
    stream: DuplexStream,
    disk: Arc<Mutex<Vec<u8>>>,
    log: Log,
    structured: bool,
    owed: Vec<Vec<u8>>,
}

impl Fake {
    async fn serve(mut self, late: usize) {
        loop {
            let mut header = [0; REQUEST_BYTES];
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
                    let request = Request::decode(&header).expect("a request");
                    if request.command == command::DISC {
                        return self.pay().await;
                    }
                    let reply = self.answer(request).await;
                    self.owed.push(reply);
                    if self.owed.len() > late {
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
        let Request { flags, command, cookie, offset, len } = request;
        let len = u32::try_from(len).unwrap();
        self.log.lock().push((command, flags, offset, len));
        let start = usize::try_from(offset).unwrap();
        let range = start..start + usize::try_from(len).unwrap();
        match command {
            command::WRITE => {
                let mut payload = vec![0; range.len()];
                self.stream.read_exact(&mut payload).await.expect("a payload");
                self.disk.lock()[range].copy_from_slice(&payload);
            }
            command::WRITE_ZEROES => self.disk.lock()[range].fill(0),
            command::READ => {
                let content = self.disk.lock()[range].to_vec();
                return self.content(cookie, offset, &content);
            }
            command::BLOCK_STATUS => return status(cookie, len),
            _ => {}
        }
        simple(cookie)
    }

    /// The reply to a read: data and holes, in pieces of a size that divides nothing, the last first.
    fn content(&self, cookie: u64, offset: u64, content: &[u8]) -> Vec<u8> {
        if !self.structured {
            return [simple(cookie), content.to_vec()].concat();
        }
        let mut reply = BytesMut::new();
        let mut at = offset + content.len() as u64;
        for piece in content.rchunks(3001) {
            at -= piece.len() as u64;
            let len = u32::try_from(piece.len()).unwrap();
            if block::is_zero(piece) {
                ChunkHeader { flags: 0, kind: chunk::OFFSET_HOLE, cookie, len: 12 }
                    .encode(&mut reply);
                reply.extend_from_slice(&at.to_be_bytes());
                reply.extend_from_slice(&len.to_be_bytes());
            } else {
                ChunkHeader { flags: 0, kind: chunk::OFFSET_DATA, cookie, len: len + 8 }
                    .encode(&mut reply);
                reply.extend_from_slice(&at.to_be_bytes());
                reply.extend_from_slice(piece);
            }
        }
        ChunkHeader { flags: 1, kind: chunk::NONE, cookie, len: 0 }.encode(&mut reply);
        reply.to_vec()
    }
}

fn simple(cookie: u64) -> Vec<u8> {
    [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &[0; 4], &cookie.to_be_bytes()].concat()
}

/// Two contexts: in the first, the first half is a hole and the rest data; in the second, all carries the flag 1 and
/// the extent reaches far beyond the request.
fn status(cookie: u64, len: u32) -> Vec<u8> {
    let mut reply = BytesMut::new();
    let first = [1, len.div_ceil(2), 3, len, 0];
    for (flags, words) in [(0, &first[..]), (1, &[2, u32::MAX, 1])] {
        let len = u32::try_from(words.len() * 4).unwrap();
        ChunkHeader { flags, kind: chunk::BLOCK_STATUS, cookie, len }.encode(&mut reply);
        for word in words {
            reply.extend_from_slice(&word.to_be_bytes());
        }
    }
    reply.to_vec()
}
