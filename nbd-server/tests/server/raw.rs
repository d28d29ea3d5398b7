//! A client without manners: sends any bytes, and decodes what comes back.

use bytes::{BufMut, BytesMut};
use nbd_server::Server;
use nbd_server::wire::{self, Fields, Request, chunk, client_flag, option};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};

/// What a server told about an export on GO.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entered {
    pub(crate) size_bytes: u64,
    pub(crate) flags: u16,
}

/// A reply, simple or structured, with the chunks put together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) cookie: u64,
    /// 0 for success.
    pub(crate) error: u32,
    pub(crate) text: String,
    /// Type and payload of every content chunk.
    pub(crate) content: Vec<(u16, Vec<u8>)>,
}

pub(crate) struct Raw<S = DuplexStream> {
    pub(crate) stream: S,
}

/// Any stream.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

impl Raw {
    /// A client of `server` over a pipe of `buffer_bytes` in each direction.
    pub(crate) fn with_buffer(server: &Server, buffer_bytes: usize) -> Self {
        let (ours, theirs) = tokio::io::duplex(buffer_bytes);
        server.serve_stream(theirs);
        Self { stream: ours }
    }

    pub(crate) fn new(server: &Server) -> Self {
        Self::with_buffer(server, 64 << 10)
    }

    /// A client of which the server knows who it is.
    pub(crate) fn of(server: &Server, peer: nbd_server::Peer) -> Self {
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        server.serve_stream_of(theirs, peer);
        Self { stream: ours }
    }

    /// A client that has entered "disk" with structured replies and `base:allocation`.
    pub(crate) async fn entered(server: &Server) -> Self {
        let mut raw = Self::new(server);
        raw.enter(true).await;
        raw
    }
}

impl<S: Stream> Raw<S> {
    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    pub(crate) async fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).await.unwrap();
        bytes
    }

    /// Reads until the server closes; what came before.
    pub(crate) async fn rest(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.stream.read_to_end(&mut bytes).await.unwrap();
        bytes
    }

    /// Reads the greeting and answers with client flags.
    pub(crate) async fn greet(&mut self, flags: u32) {
        assert_eq!(self.take(18).await, b"NBDMAGICIHAVEOPT\0\x03");
        self.send(&flags.to_be_bytes()).await;
    }

    /// Sends an option without waiting.
    pub(crate) async fn send_option(&mut self, option: u32, data: &[u8]) {
        let mut bytes = BytesMut::new();
        bytes.put_u64(wire::IHAVEOPT);
        bytes.put_u32(option);
        bytes.put_u32(u32::try_from(data.len()).unwrap());
        bytes.put_slice(data);
        self.send(&bytes).await;
    }

    /// One option reply: its type and data.
    pub(crate) async fn option_reply(&mut self, option: u32) -> (u32, Vec<u8>) {
        let header = self.take(wire::OPTION_REPLY_BYTES).await;
        let mut fields = Fields(&header);
        assert_eq!(fields.u64(), Some(wire::OPTION_REPLY_MAGIC));
        assert_eq!(fields.u32(), Some(option));
        let (kind, len) = (fields.u32().unwrap(), fields.u32().unwrap());
        (kind, self.take(len as usize).await)
    }

    /// Sends an option and reads replies up to the final one, which is last.
    pub(crate) async fn option(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send_option(option, data).await;
        self.option_replies(option).await
    }

    /// Reads replies to an option up to the final one.
    pub(crate) async fn option_replies(&mut self, option: u32) -> Vec<(u32, Vec<u8>)> {
        let mut all = Vec::new();
        loop {
            let reply = self.option_reply(option).await;
            let is_final = reply.0 == wire::reply::ACK || reply.0 >> 31 == 1;
            all.push(reply);
            if is_final {
                return all;
            }
        }
    }

    /// Negotiates and enters "disk".
    pub(crate) async fn enter(&mut self, structured: bool) -> Entered {
        self.greet(client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES).await;
        if structured {
            self.option(option::STRUCTURED_REPLY, &[]).await;
            let data = b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation";
            assert_eq!(self.option(option::SET_META_CONTEXT, data).await.len(), 2);
        }
        self.go("disk").await
    }

    /// GO, which must succeed.
    pub(crate) async fn go(&mut self, name: &str) -> Entered {
        let replies = self.option(option::GO, &go(name)).await;
        assert_eq!(replies.last().unwrap().0, wire::reply::ACK, "{replies:?}");
        let mut fields = Fields(&replies[0].1[2..]);
        Entered { size_bytes: fields.u64().unwrap(), flags: fields.u16().unwrap() }
    }

    /// Sends a request header.
    pub(crate) async fn request(
        &mut self,
        command: u16,
        flags: u16,
        cookie: u64,
        offset: u64,
        len: u32,
    ) {
        let mut bytes = BytesMut::new();
        Request { flags, command, cookie, offset, len: len.into() }.encode(&mut bytes);
        self.send(&bytes).await;
    }

    /// The next reply; with `simple_len` the payload of a simple one is that long when it succeeded.
    pub(crate) async fn reply_of(&mut self, simple_len: usize) -> Reply {
        let mut reply = Reply::default();
        loop {
            let magic = self.take(4).await;
            match u32::from_be_bytes(magic.try_into().unwrap()) {
                wire::SIMPLE_REPLY_MAGIC => {
                    assert!(reply.content.is_empty(), "a simple reply among chunks");
                    let rest = self.take(12).await;
                    let mut fields = Fields(&rest);
                    reply.error = fields.u32().unwrap();
                    reply.cookie = fields.u64().unwrap();
                    if reply.error == 0 && simple_len > 0 {
                        let data = self.take(simple_len).await;
                        reply.content.push((u16::MAX, data));
                    }
                    return reply;
                }
                wire::STRUCTURED_REPLY_MAGIC => {
                    if self.chunk(&mut reply).await {
                        return reply;
                    }
                }
                other => panic!("no reply: {other:#x}"),
            }
        }
    }

    pub(crate) async fn reply(&mut self) -> Reply {
        self.reply_of(0).await
    }

    /// Reads a chunk behind its magic; whether it is the last.
    async fn chunk(&mut self, reply: &mut Reply) -> bool {
        let header = self.take(wire::CHUNK_BYTES - 4).await;
        let mut fields = Fields(&header);
        let (flags, kind) = (fields.u16().unwrap(), fields.u16().unwrap());
        reply.cookie = fields.u64().unwrap();
        let payload = self.take(fields.u32().unwrap() as usize).await;
        if kind == chunk::ERROR {
            let mut fields = Fields(&payload);
            reply.error = fields.u32().unwrap();
            let len = fields.u16().unwrap();
            reply.text = String::from_utf8(fields.take(len.into()).unwrap().to_vec()).unwrap();
            fields.finish().unwrap();
        } else if kind != chunk::NONE {
            reply.content.push((kind, payload));
        }
        flags & wire::chunk_flag::DONE != 0
    }
}

/// The data of GO and INFO without information requests.
pub(crate) fn go(name: &str) -> Vec<u8> {
    let mut data = Vec::new();
    data.put_u32(u32::try_from(name.len()).unwrap());
    data.put_slice(name.as_bytes());
    data.put_u16(0);
    data
}
