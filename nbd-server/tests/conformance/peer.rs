//! A client that sends anything, and holds every reply against the rules that all replies must keep: an answer that
//! breaks one fails the test, whatever the test is about.

use std::time::Duration;

use bytes::{BufMut, BytesMut};
use nbd_server::wire::{
    self, CHUNK_BYTES, EXTENDED_CHUNK_BYTES, EXTENDED_REPLY_MAGIC, ExtendedChunkHeader, Fields,
    Headers, MAX_STRING_BYTES, Request, SIMPLE_REPLY_BYTES, SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC, chunk, chunk_flag, client_flag, command, command_flag as flag, error,
    option, reply,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::stage::{STRIPES, Stage, Stream, Transport, Way};

/// After this a server counts as hung.
const PATIENCE: Duration = Duration::from_secs(40);

/// The client flags of fixed newstyle.
pub(crate) const FIXED: u32 = client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES;

/// One reply to an option: its type and data.
pub(crate) type OptionReply = (u32, Vec<u8>);

/// What a server told about an export on INFO or GO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) size_bytes: u64,
    pub(crate) flags: u16,
}

/// A request that was sent, or the answer to which was judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) command: u16,
    pub(crate) flags: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    /// In the header.
    pub(crate) len: u64,
}

/// A judged reply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reply {
    /// 0 for success.
    pub(crate) error: u32,
    pub(crate) text: String,
    /// What was read.
    pub(crate) data: Vec<u8>,
    /// The types of the chunks, in order; none for a simple reply.
    pub(crate) chunks: Vec<u16>,
    /// For each context its number and extents: length and flags.
    pub(crate) status: Vec<(u32, Vec<(u64, u64)>)>,
}

pub(crate) struct Peer {
    stream: Box<dyn Stream>,
    pub(crate) headers: Headers,
    /// What was selected.
    contexts: Vec<u32>,
    next_cookie: u64,
}

impl Peer {
    /// A connection on which nothing has been said.
    pub(crate) async fn connect(stage: &Stage, transport: Transport) -> Self {
        Self::on(stage.connect(transport).await)
    }

    /// The same on any stream.
    pub(crate) fn on(stream: Box<dyn Stream>) -> Self {
        // The first cookie is one that a server might take for none.
        Self { stream, headers: Headers::Simple, contexts: Vec::new(), next_cookie: 0 }
    }

    /// One in fixed newstyle, ready for options.
    pub(crate) async fn fixed(stage: &Stage, transport: Transport) -> Self {
        let mut peer = Self::connect(stage, transport).await;
        if !transport.is_greeted() {
            peer.greet(FIXED).await;
        }
        peer
    }

    /// One in fixed newstyle with the headers negotiated.
    pub(crate) async fn haggling(stage: &Stage, way: Way) -> Self {
        let mut peer = Self::fixed(stage, way.transport).await;
        peer.negotiate(way.headers).await;
        peer
    }

    /// One in transmission, with every context selected where there can be any.
    pub(crate) async fn entered(stage: &Stage, way: Way, export: &str) -> Self {
        let mut peer = Self::haggling(stage, way).await;
        if way.headers.has_chunks() {
            peer.select(export, &["base:allocation", STRIPES]).await;
        }
        peer.go(export).await;
        peer
    }

    // Bytes.

    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        timeout(PATIENCE, self.stream.write_all(bytes)).await.expect("hung").unwrap();
        timeout(PATIENCE, self.stream.flush()).await.expect("hung").unwrap();
    }

    pub(crate) async fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        timeout(PATIENCE, self.stream.read_exact(&mut bytes)).await.expect("hung").unwrap();
        bytes
    }

    /// Everything up to the server's end of the connection.
    pub(crate) async fn rest(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        timeout(PATIENCE, self.stream.read_to_end(&mut bytes)).await.expect("not closed").unwrap();
        bytes
    }

    /// The server closes, and says nothing more.
    pub(crate) async fn is_closed(&mut self) {
        assert_eq!(self.rest().await, [], "something was said before the end");
    }

    // Handshake.

    pub(crate) async fn greet(&mut self, flags: u32) {
        assert_eq!(self.take(18).await, b"NBDMAGICIHAVEOPT\0\x03");
        self.send(&flags.to_be_bytes()).await;
    }

    pub(crate) async fn send_option(&mut self, option: u32, data: &[u8]) {
        let mut bytes = BytesMut::new();
        bytes.put_u64(wire::IHAVEOPT);
        bytes.put_u32(option);
        bytes.put_u32(u32::try_from(data.len()).unwrap());
        bytes.put_slice(data);
        self.send(&bytes).await;
    }

    /// The replies to an option up to the final one.
    pub(crate) async fn option_replies(&mut self, option: u32) -> Vec<OptionReply> {
        let mut all = Vec::new();
        loop {
            let header = self.take(wire::OPTION_REPLY_BYTES).await;
            let mut fields = Fields(&header);
            assert_eq!(fields.u64(), Some(wire::OPTION_REPLY_MAGIC));
            assert_eq!(fields.u32(), Some(option), "the option is echoed");
            let (kind, len) = (fields.u32().unwrap(), fields.u32().unwrap());
            let data = self.take(len as usize).await;
            let is_error = kind >> 31 == 1;
            if kind == reply::ACK {
                assert_eq!(data, [], "ACK has no data");
            } else if is_error {
                assert!(data.len() <= MAX_STRING_BYTES && !data.contains(&0));
                assert!(std::str::from_utf8(&data).is_ok(), "an error's text is a string");
            }
            all.push((kind, data));
            if is_error || kind == reply::ACK {
                return all;
            }
        }
    }

    pub(crate) async fn option(&mut self, option: u32, data: &[u8]) -> Vec<OptionReply> {
        self.send_option(option, data).await;
        self.option_replies(option).await
    }

    /// The type of the only reply to an option.
    pub(crate) async fn only(&mut self, option: u32, data: &[u8]) -> u32 {
        let replies = self.option(option, data).await;
        let [(kind, _)] = replies[..] else { panic!("not one reply: {replies:?}") };
        kind
    }

    /// The next option is understood: nothing was left over, nothing too much taken.
    pub(crate) async fn is_in_step(&mut self) {
        let replies = self.option(option::LIST, &[]).await;
        assert_eq!(replies.last().unwrap().0, reply::ACK);
    }

    pub(crate) async fn negotiate(&mut self, headers: Headers) {
        let option = match headers {
            Headers::Simple => return,
            Headers::Structured => option::STRUCTURED_REPLY,
            Headers::Extended => option::EXTENDED_HEADERS,
        };
        assert_eq!(self.only(option, &[]).await, reply::ACK);
        self.headers = headers;
    }

    /// The contexts that SET_META_CONTEXT selects.
    pub(crate) async fn select(&mut self, export: &str, wanted: &[&str]) -> Vec<(u32, String)> {
        let mut replies = self.option(option::SET_META_CONTEXT, &queries(export, wanted)).await;
        assert_eq!(replies.pop().unwrap().0, reply::ACK);
        let selected: Vec<_> = replies.into_iter().map(context).collect();
        self.contexts = selected.iter().map(|(id, _)| *id).collect();
        selected
    }

    /// GO, which must succeed.
    pub(crate) async fn go(&mut self, export: &str) -> Told {
        let replies = self.option(option::GO, &go(export, &[])).await;
        assert_eq!(replies.last().unwrap().0, reply::ACK, "{replies:?}");
        told(&replies)
    }

    // Transmission.

    /// Sends a header as it is.
    pub(crate) async fn send_header(&mut self, asked: &Asked) {
        let Asked { command, flags, cookie, offset, len } = *asked;
        let request = Request { flags, command, cookie, offset, len };
        let mut bytes = BytesMut::new();
        match self.headers {
            Headers::Extended => request.encode_extended(&mut bytes),
            _ => request.encode(&mut bytes),
        }
        self.send(&bytes).await;
    }

    /// Sends a header with a cookie of its own.
    pub(crate) async fn start(&mut self, command: u16, flags: u16, offset: u64, len: u64) -> Asked {
        let cookie = self.next_cookie;
        self.next_cookie = cookie.wrapping_sub(1);
        let asked = Asked { command, flags, cookie, offset, len };
        self.send_header(&asked).await;
        asked
    }

    /// Sends a WRITE with its payload.
    pub(crate) async fn start_write(&mut self, flags: u16, offset: u64, data: &[u8]) -> Asked {
        let announced = if self.headers == Headers::Extended { flag::PAYLOAD_LEN } else { 0 };
        let flags = flags | announced;
        let asked = self.start(command::WRITE, flags, offset, data.len() as u64).await;
        self.send(data).await;
        asked
    }

    /// Asks and waits.
    pub(crate) async fn ask(&mut self, command: u16, flags: u16, offset: u64, len: u64) -> Reply {
        let asked = self.start(command, flags, offset, len).await;
        self.reply(&[asked]).await.1
    }

    /// Writes and waits.
    pub(crate) async fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> Reply {
        let asked = self.start_write(flags, offset, data).await;
        self.reply(&[asked]).await.1
    }

    /// Reads, which must succeed.
    pub(crate) async fn read(&mut self, offset: u64, len: u64) -> Vec<u8> {
        let reply = self.ask(command::READ, 0, offset, len).await;
        assert_eq!(reply.error, 0, "{}", reply.text);
        reply.data
    }

    /// The next request is understood: nothing was left over, nothing too much taken.
    pub(crate) async fn is_in_step_again(&mut self) {
        assert_eq!(self.ask(command::FLUSH, 0, 0, 0).await.error, 0);
    }

    /// DISC, after which the server closes.
    pub(crate) async fn disconnect(&mut self) {
        self.start(command::DISC, 0, 0, 0).await;
        self.is_closed().await;
    }

    /// The next reply, to one of the requests that are `pending`: which of them, and what it says.
    pub(crate) async fn reply(&mut self, pending: &[Asked]) -> (usize, Reply) {
        let magic = u32::from_be_bytes(self.take(4).await.try_into().unwrap());
        if magic == SIMPLE_REPLY_MAGIC {
            return self.simple(pending).await;
        }
        let (mut judged, mut header) = (Reply::default(), self.chunk_header(magic).await);
        let find = |cookie| pending.iter().position(|one| one.cookie == cookie);
        let index = find(header.cookie).expect("a reply to nothing");
        let asked = pending[index];
        loop {
            assert_eq!(header.cookie, asked.cookie);
            if self.headers == Headers::Extended {
                assert_eq!(header.offset, asked.offset, "the request's offset");
            }
            assert_eq!(header.flags & !chunk_flag::DONE, 0, "a reply flag that is not known");
            let len = usize::try_from(header.len).unwrap();
            assert!(len <= (32 << 20) + 1024, "a payload longer than the maximum");
            let payload = self.take(len).await;
            let is_last = header.flags == chunk_flag::DONE;
            self.judge_chunk(&asked, header.kind, is_last, &payload, &mut judged);
            if is_last {
                break;
            }
            header = match u32::from_be_bytes(self.take(4).await.try_into().unwrap()) {
                SIMPLE_REPLY_MAGIC => panic!("a simple reply between the chunks of one"),
                magic => self.chunk_header(magic).await,
            };
        }
        self.judge_whole(&asked, &mut judged);
        (index, judged)
    }

    async fn simple(&mut self, pending: &[Asked]) -> (usize, Reply) {
        assert_ne!(self.headers, Headers::Extended, "a simple reply with extended headers");
        let rest = self.take(SIMPLE_REPLY_BYTES - 4).await;
        let mut fields = Fields(&rest);
        let (error, cookie) = (fields.u32().unwrap(), fields.u64().unwrap());
        let find = |cookie| pending.iter().position(|one| one.cookie == cookie);
        let index = find(cookie).expect("a reply to nothing");
        let asked = pending[index];
        let mut judged = Reply { error, ..Reply::default() };
        if self.headers == Headers::Structured {
            assert_ne!(asked.command, command::READ, "READ is answered in chunks");
            assert!(error != 0 || asked.command != command::BLOCK_STATUS);
        } else if asked.command == command::READ && error == 0 {
            judged.data = self.take(usize::try_from(asked.len).unwrap()).await;
        }
        assert!(error == 0 || is_known(error), "error {error}");
        (index, judged)
    }

    /// The rest of a chunk's header, of the kind that was negotiated.
    async fn chunk_header(&mut self, magic: u32) -> ExtendedChunkHeader {
        match self.headers {
            Headers::Simple => panic!("a chunk, or worse, where none was negotiated: {magic:#x}"),
            Headers::Structured => {
                assert_eq!(magic, STRUCTURED_REPLY_MAGIC);
                let rest = self.take(CHUNK_BYTES - 4).await;
                let mut fields = Fields(&rest);
                let (flags, kind) = (fields.u16().unwrap(), fields.u16().unwrap());
                let (cookie, len) = (fields.u64().unwrap(), fields.u32().unwrap().into());
                ExtendedChunkHeader { flags, kind, cookie, offset: 0, len }
            }
            Headers::Extended => {
                assert_eq!(magic, EXTENDED_REPLY_MAGIC);
                let mut bytes = [0; EXTENDED_CHUNK_BYTES];
                bytes[..4].copy_from_slice(&magic.to_be_bytes());
                bytes[4..].copy_from_slice(&self.take(EXTENDED_CHUNK_BYTES - 4).await);
                ExtendedChunkHeader::decode(&bytes).unwrap()
            }
        }
    }

    fn judge_chunk(
        &self,
        asked: &Asked,
        kind: u16,
        is_last: bool,
        payload: &[u8],
        judged: &mut Reply,
    ) {
        judged.chunks.push(kind);
        let mut fields = Fields(payload);
        match kind {
            chunk::NONE => assert!(is_last && payload.is_empty(), "NONE is the empty end"),
            chunk::OFFSET_DATA | chunk::OFFSET_HOLE => {
                assert_eq!(asked.command, command::READ);
                let at = fields.u64().unwrap();
                assert!(at == asked.offset || at.is_multiple_of(512), "cut amid a sector");
                // Ours come in order; then neither a gap nor an overlap can hide.
                assert_eq!(at, asked.offset + judged.data.len() as u64);
                if kind == chunk::OFFSET_DATA {
                    assert!(!fields.0.is_empty(), "a chunk describes at least one byte");
                    judged.data.extend_from_slice(fields.0);
                } else {
                    let len = fields.u32().unwrap() as usize;
                    assert!(len > 0 && fields.0.is_empty());
                    judged.data.resize(judged.data.len() + len, 0);
                }
            }
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => {
                assert_eq!(asked.command, command::BLOCK_STATUS);
                let is_extended = self.headers == Headers::Extended;
                assert_eq!(kind == chunk::BLOCK_STATUS_EXT, is_extended);
                judged.status.push(status(kind, fields));
            }
            chunk::ERROR | chunk::ERROR_OFFSET => {
                assert_eq!(judged.error, 0, "one error is enough");
                judged.error = fields.u32().unwrap();
                assert!(is_known(judged.error), "error {}", judged.error);
                let len = fields.u16().unwrap();
                assert!(usize::from(len) <= MAX_STRING_BYTES);
                let text = fields.take(len.into()).expect("the text fits its chunk").to_vec();
                judged.text = String::from_utf8(text).unwrap();
                assert!(!judged.text.contains('\0'));
                fields.finish().unwrap();
            }
            other => panic!("a chunk of the unknown type {other}"),
        }
    }

    /// What can be told only when all chunks are there.
    fn judge_whole(&self, asked: &Asked, judged: &mut Reply) {
        if judged.error != 0 {
            return;
        }
        match asked.command {
            command::READ => {
                assert_eq!(judged.data.len() as u64, asked.len, "all of what was asked");
                let content = judged.chunks.iter().filter(|kind| **kind != chunk::NONE);
                assert!(asked.flags & flag::DF == 0 || content.count() <= 1, "DF");
                if asked.flags & flag::DF != 0 {
                    assert!(!judged.chunks.contains(&chunk::OFFSET_HOLE), "DF spells holes out");
                }
            }
            command::BLOCK_STATUS => {
                if asked.flags & flag::PAYLOAD_LEN == 0 {
                    let mut told: Vec<_> = judged.status.iter().map(|(id, _)| *id).collect();
                    told.sort_unstable();
                    assert_eq!(told, self.contexts, "one chunk for each selected context");
                    for (_, extents) in &judged.status {
                        judge_extents(asked, asked.len, extents);
                    }
                }
            }
            _ => assert_eq!(judged.chunks, [chunk::NONE], "nothing but success"),
        }
    }
}

/// Extents as the answer to a question about `len` bytes.
pub(crate) fn judge_extents(asked: &Asked, len: u64, extents: &[(u64, u64)]) {
    assert!(!extents.is_empty(), "at least one extent");
    assert!(extents.iter().all(|(len, _)| *len > 0), "no extent is empty");
    let before: u64 = extents[..extents.len() - 1].iter().map(|(len, _)| *len).sum();
    assert!(before < len, "only the last extent may pass what was asked");
    if asked.flags & flag::REQ_ONE != 0 {
        assert_eq!(extents.len(), 1);
        assert!(extents[0].0 <= len);
    }
    assert!(extents.windows(2).all(|two| two[0].1 != two[1].1), "neighbours differ");
    let mut at = asked.offset;
    for (len, _) in &extents[..extents.len() - 1] {
        at += len;
        assert!(at.is_multiple_of(512), "cut amid a sector");
    }
}

/// A status chunk: the context, and its extents.
fn status(kind: u16, mut fields: Fields<'_>) -> (u32, Vec<(u64, u64)>) {
    let id = fields.u32().unwrap();
    let is_extended = kind == chunk::BLOCK_STATUS_EXT;
    let count = is_extended.then(|| fields.u32().unwrap());
    let mut extents = Vec::new();
    while !fields.0.is_empty() {
        extents.push(if is_extended {
            (fields.u64().unwrap(), fields.u64().unwrap())
        } else {
            (fields.u32().unwrap().into(), fields.u32().unwrap().into())
        });
    }
    assert!(count.is_none_or(|count| count as usize == extents.len()), "the count is true");
    (id, extents)
}

fn is_known(error: u32) -> bool {
    error::name(error).is_some()
}

/// The data of GO and INFO.
pub(crate) fn go(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = sized(name.as_bytes());
    data.put_u16(u16::try_from(wanted.len()).unwrap());
    wanted.iter().for_each(|one| data.put_u16(*one));
    data
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(crate) fn queries(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = sized(export.as_bytes());
    data.put_u32(u32::try_from(queries.len()).unwrap());
    queries.iter().for_each(|query| data.extend(sized(query.as_bytes())));
    data
}

/// A string with its length before it.
pub(crate) fn sized(text: &[u8]) -> Vec<u8> {
    [&u32::try_from(text.len()).unwrap().to_be_bytes()[..], text].concat()
}

/// What the answer to INFO or GO says of size and flags.
pub(crate) fn told(replies: &[OptionReply]) -> Told {
    let is_export = |(kind, data): &&OptionReply| *kind == reply::INFO && data[..2] == [0, 0];
    let found: Vec<_> = replies.iter().filter(is_export).collect();
    let [(_, data)] = found[..] else { panic!("not one INFO_EXPORT: {replies:?}") };
    assert_eq!(data.len(), 12);
    let mut fields = Fields(&data[2..]);
    Told { size_bytes: fields.u64().unwrap(), flags: fields.u16().unwrap() }
}

/// What a META_CONTEXT reply says.
pub(crate) fn context((kind, data): OptionReply) -> (u32, String) {
    assert_eq!(kind, reply::META_CONTEXT);
    let (id, name) = data.split_at(4);
    (u32::from_be_bytes(id.try_into().unwrap()), String::from_utf8(name.to_vec()).unwrap())
}
