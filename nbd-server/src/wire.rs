//! The numbers of the NBD protocol and the fixed-size headers, encoded and decoded without I/O. What they mean in
//! sequence is told by the handshake and transmission machines.
//!
//! Source: `doc/proto.md` of NetworkBlockDevice/nbd; each item names its section. Extended headers are told by the same
//! file on the branch `extension-ext-header`.

use bytes::{BufMut, BytesMut};

/// "NBDMAGIC", the first eight bytes from the server ("Newstyle negotiation").
pub const INIT_PASSWD: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT", before the handshake flags and before each option ("Newstyle negotiation").
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// Before each option reply ("Fixed newstyle negotiation").
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Before each compact request ("Request message").
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Before each simple reply ("Simple reply message").
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Before each structured reply chunk ("Structured reply chunk message").
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Before each extended request ("Request message" of the extension).
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Before each extended reply chunk ("Extended reply chunk message" of the extension).
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// The longest name of an export or a meta context, in bytes ("Values", "Maximum string length").
pub const MAX_STRING_BYTES: usize = 4096;
/// The longest payload that a peer must accept without block size constraints, in bytes ("Block size constraints").
pub const MAX_PAYLOAD_BYTES: u32 = 32 << 20;
/// The size of a compact request without its payload.
pub const REQUEST_BYTES: usize = 28;
/// The size of a simple reply without its payload.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// The size of a structured chunk header.
pub const CHUNK_BYTES: usize = 20;
/// The size of an extended request without its payload.
pub const EXTENDED_REQUEST_BYTES: usize = 32;
/// The size of an extended chunk header.
pub const EXTENDED_CHUNK_BYTES: usize = 32;
/// The size of an option header from the client.
pub const OPTION_BYTES: usize = 16;
/// The size of an option reply header from the server.
pub const OPTION_REPLY_BYTES: usize = 20;

/// Declares a group of protocol numbers as constants of one integer type, and a function that names them for logs.
macro_rules! numbers {
    ($(#[$doc:meta])* $module:ident: $type:ty { $($(#[$item_doc:meta])* $name:ident = $value:expr;)* }) => {
        $(#[$doc])*
        pub mod $module {
            $($(#[$item_doc])* pub const $name: $type = $value;)*

            /// The protocol's name of `value`, for logs and error texts.
            pub fn name(value: $type) -> Option<&'static str> {
                $(if value == $name { return Some(stringify!($name)); })*
                None
            }
        }
    };
}

numbers! {
    /// Handshake flags of the server ("Handshake phase flags").
    handshake_flag: u16 {
        /// Fixed newstyle.
        FIXED_NEWSTYLE = 1 << 0;
        /// The server can leave out the 124 zeroes after EXPORT_NAME.
        NO_ZEROES = 1 << 1;
    }
}

numbers! {
    /// Handshake flags of the client.
    client_flag: u32 {
        /// The client speaks fixed newstyle.
        FIXED_NEWSTYLE = 1 << 0;
        /// The client wants no 124 zeroes.
        NO_ZEROES = 1 << 1;
    }
}

numbers! {
    /// Options ("Option types").
    option: u32 {
        /// Choose an export and enter transmission, without an error path.
        EXPORT_NAME = 1;
        /// End the negotiation.
        ABORT = 2;
        /// Ask for the exports.
        LIST = 3;
        /// Withdrawn.
        PEEK_EXPORT = 4;
        /// Begin TLS.
        STARTTLS = 5;
        /// Ask about an export.
        INFO = 6;
        /// Choose an export and enter transmission.
        GO = 7;
        /// Use structured replies.
        STRUCTURED_REPLY = 8;
        /// Ask for meta contexts.
        LIST_META_CONTEXT = 9;
        /// Select meta contexts.
        SET_META_CONTEXT = 10;
        /// Use 64-bit headers.
        EXTENDED_HEADERS = 11;
    }
}

numbers! {
    /// Option replies ("Option reply types").
    reply: u32 {
        /// Accepted; or the end of a list.
        ACK = 1;
        /// An export.
        SERVER = 2;
        /// Information on an export.
        INFO = 3;
        /// A meta context.
        META_CONTEXT = 4;
        /// The option is not known.
        ERR_UNSUP = (1 << 31) + 1;
        /// Not allowed by policy.
        ERR_POLICY = (1 << 31) + 2;
        /// The request is malformed.
        ERR_INVALID = (1 << 31) + 3;
        /// Not on this platform.
        ERR_PLATFORM = (1 << 31) + 4;
        /// TLS first.
        ERR_TLS_REQD = (1 << 31) + 5;
        /// No such export.
        ERR_UNKNOWN = (1 << 31) + 6;
        /// The server is stopping.
        ERR_SHUTDOWN = (1 << 31) + 7;
        /// The client must ask for block sizes.
        ERR_BLOCK_SIZE_REQD = (1 << 31) + 8;
        /// Too large to process.
        ERR_TOO_BIG = (1 << 31) + 9;
        /// Extended headers are in force.
        ERR_EXT_HEADER_REQD = (1 << 31) + 10;
    }
}

numbers! {
    /// Information types of INFO and GO.
    info: u16 {
        /// Size and transmission flags.
        EXPORT = 0;
        /// The canonical name.
        NAME = 1;
        /// A text for people.
        DESCRIPTION = 2;
        /// Block size constraints.
        BLOCK_SIZE = 3;
    }
}

numbers! {
    /// Transmission flags of an export ("Transmission flags").
    transmission_flag: u16 {
        /// The flags are valid.
        HAS_FLAGS = 1 << 0;
        /// No writes.
        READ_ONLY = 1 << 1;
        /// FLUSH works.
        SEND_FLUSH = 1 << 2;
        /// FUA works.
        SEND_FUA = 1 << 3;
        /// Behaves like a rotating disk.
        ROTATIONAL = 1 << 4;
        /// TRIM works.
        SEND_TRIM = 1 << 5;
        /// WRITE_ZEROES works.
        SEND_WRITE_ZEROES = 1 << 6;
        /// DF works (only with structured replies).
        SEND_DF = 1 << 7;
        /// Several connections see one consistent device.
        CAN_MULTI_CONN = 1 << 8;
        /// RESIZE works.
        SEND_RESIZE = 1 << 9;
        /// CACHE works.
        SEND_CACHE = 1 << 10;
        /// FAST_ZERO works (only with WRITE_ZEROES).
        SEND_FAST_ZERO = 1 << 11;
        /// BLOCK_STATUS takes a payload (only with extended headers).
        BLOCK_STATUS_PAYLOAD = 1 << 12;
    }
}

numbers! {
    /// Commands ("Request types").
    command: u16 {
        /// Read.
        READ = 0;
        /// Write.
        WRITE = 1;
        /// Disconnect.
        DISC = 2;
        /// Make durable.
        FLUSH = 3;
        /// Discard.
        TRIM = 4;
        /// Prefetch.
        CACHE = 5;
        /// Write zeroes.
        WRITE_ZEROES = 6;
        /// Ask for extents.
        BLOCK_STATUS = 7;
        /// Change the size.
        RESIZE = 8;
    }
}

numbers! {
    /// Command flags ("Command flags").
    command_flag: u16 {
        /// Durable before the reply.
        FUA = 1 << 0;
        /// Do not leave a hole.
        NO_HOLE = 1 << 1;
        /// Do not fragment the reply to a read.
        DF = 1 << 2;
        /// One extent a context.
        REQ_ONE = 1 << 3;
        /// Fast, or not at all.
        FAST_ZERO = 1 << 4;
        /// The length is that of a payload.
        PAYLOAD_LEN = 1 << 5;
    }
}

numbers! {
    /// Structured reply flags.
    chunk_flag: u16 {
        /// The last chunk of a reply.
        DONE = 1 << 0;
    }
}

numbers! {
    /// Structured reply types ("Structured reply types").
    chunk: u16 {
        /// Nothing but the end.
        NONE = 0;
        /// Data at an offset.
        OFFSET_DATA = 1;
        /// Zeros at an offset.
        OFFSET_HOLE = 2;
        /// Extents of one context.
        BLOCK_STATUS = 5;
        /// Extents of one context with 64-bit lengths (only with extended headers).
        BLOCK_STATUS_EXT = 6;
        /// An error.
        ERROR = (1 << 15) + 1;
        /// An error at an offset.
        ERROR_OFFSET = (1 << 15) + 2;
    }
}

numbers! {
    /// Error values ("Error values").
    error: u32 {
        /// Not permitted.
        EPERM = 1;
        /// Input or output failed.
        EIO = 5;
        /// No memory.
        ENOMEM = 12;
        /// Invalid.
        EINVAL = 22;
        /// No space.
        ENOSPC = 28;
        /// Too large.
        EOVERFLOW = 75;
        /// Not supported.
        ENOTSUP = 95;
        /// The server is stopping.
        ESHUTDOWN = 108;
    }
}

/// The headers of the transmission phase: what the client asked for in the handshake, and got. Each kind can do what
/// those before it can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Headers {
    /// Compact requests, simple replies.
    #[default]
    Simple,
    /// Compact requests, replies in structured chunks where they have a payload or an error.
    Structured,
    /// Extended requests, replies in extended chunks.
    Extended,
}

impl Headers {
    /// Whether READ and BLOCK_STATUS are answered in chunks.
    pub fn has_chunks(self) -> bool {
        self >= Self::Structured
    }
}

/// Flags of an extent in the `base:allocation` context ("base:allocation metadata context").
pub mod allocation {
    /// Nothing is allocated.
    pub const HOLE: u32 = 1 << 0;
    /// Reads as zeros.
    pub const ZERO: u32 = 1 << 1;
}

/// A request header, compact or extended; a payload may follow it on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// [`command_flag`] bits.
    pub flags: u16,
    /// One of [`command`], or a number not known here.
    pub command: u16,
    /// The client's handle, opaque to the server.
    pub cookie: u64,
    /// The first byte of the export.
    pub offset: u64,
    /// The number of bytes of the export; in an extended request with [`command_flag::PAYLOAD_LEN`], of the payload.
    pub len: u64,
}

impl Request {
    /// Decodes a compact header; `None` where the magic is wrong, after which the stream has no meaning.
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<Self> {
        Self::read(bytes, REQUEST_MAGIC, |fields| fields.u32().map(u64::from))
    }

    /// Decodes an extended header, as [`Self::decode`].
    pub fn decode_extended(bytes: &[u8; EXTENDED_REQUEST_BYTES]) -> Option<Self> {
        Self::read(bytes, EXTENDED_REQUEST_MAGIC, Fields::u64)
    }

    fn read<'a>(
        bytes: &'a [u8],
        magic: u32,
        len: impl FnOnce(&mut Fields<'a>) -> Option<u64>,
    ) -> Option<Self> {
        let mut fields = Fields(bytes);
        (fields.u32()? == magic).then_some(())?;
        Some(Self {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            len: len(&mut fields)?,
        })
    }

    /// Appends the compact header to `out`. Its length has 32 bits: a longer one, which no caller may ask for, becomes
    /// the longest.
    pub fn encode(&self, out: &mut BytesMut) {
        self.write(REQUEST_MAGIC, out);
        out.put_u32(u32::try_from(self.len).unwrap_or(u32::MAX));
    }

    /// Appends the extended header to `out`.
    pub fn encode_extended(&self, out: &mut BytesMut) {
        self.write(EXTENDED_REQUEST_MAGIC, out);
        out.put_u64(self.len);
    }

    fn write(&self, magic: u32, out: &mut BytesMut) {
        out.put_u32(magic);
        out.put_u16(self.flags);
        out.put_u16(self.command);
        out.put_u64(self.cookie);
        out.put_u64(self.offset);
    }
}

/// The header of a structured reply chunk; `len` bytes of payload follow it on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHeader {
    /// [`chunk_flag`] bits.
    pub flags: u16,
    /// One of [`chunk`], or a number not known here.
    pub kind: u16,
    /// The request's cookie.
    pub cookie: u64,
    /// The payload that follows, in bytes.
    pub len: u32,
}

impl ChunkHeader {
    /// Appends the header to `out`.
    pub fn encode(&self, out: &mut BytesMut) {
        out.put_u32(STRUCTURED_REPLY_MAGIC);
        out.put_u16(self.flags);
        out.put_u16(self.kind);
        out.put_u64(self.cookie);
        out.put_u32(self.len);
    }
}

/// The header of an extended reply chunk; `len` bytes of payload follow it on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtendedChunkHeader {
    /// [`chunk_flag`] bits.
    pub flags: u16,
    /// One of [`chunk`], or a number not known here.
    pub kind: u16,
    /// The request's cookie.
    pub cookie: u64,
    /// The request's offset, whatever the payload is about.
    pub offset: u64,
    /// The payload that follows, in bytes.
    pub len: u64,
}

impl ExtendedChunkHeader {
    /// Decodes a header; `None` where the magic is wrong, after which the stream has no meaning.
    pub fn decode(bytes: &[u8; EXTENDED_CHUNK_BYTES]) -> Option<Self> {
        let mut fields = Fields(bytes);
        (fields.u32()? == EXTENDED_REPLY_MAGIC).then_some(())?;
        Some(Self {
            flags: fields.u16()?,
            kind: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            len: fields.u64()?,
        })
    }

    /// Appends the header to `out`.
    pub fn encode(&self, out: &mut BytesMut) {
        out.put_u32(EXTENDED_REPLY_MAGIC);
        out.put_u16(self.flags);
        out.put_u16(self.kind);
        out.put_u64(self.cookie);
        out.put_u64(self.offset);
        out.put_u64(self.len);
    }
}

/// Big-endian fields taken one after another from a slice; each is `None` where the slice is too short.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// The next `len` bytes.
    pub fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    /// The next two bytes.
    pub fn u16(&mut self) -> Option<u16> {
        self.take(2)?.try_into().ok().map(u16::from_be_bytes)
    }

    /// The next four bytes.
    pub fn u32(&mut self) -> Option<u32> {
        self.take(4)?.try_into().ok().map(u32::from_be_bytes)
    }

    /// The next eight bytes.
    pub fn u64(&mut self) -> Option<u64> {
        self.take(8)?.try_into().ok().map(u64::from_be_bytes)
    }

    /// `Some` only where nothing is left.
    pub fn finish(self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_survives_encoding() {
        let request =
            Request { flags: 1, command: command::WRITE, cookie: u64::MAX, offset: 7, len: 9 };
        let mut out = BytesMut::new();
        request.encode(&mut out);
        let bytes: [u8; REQUEST_BYTES] = out.as_ref().try_into().unwrap();
        assert_eq!(Request::decode(&bytes), Some(request));
    }

    #[test]
    fn an_extended_request_survives_encoding() {
        let request =
            Request { flags: 32, command: command::WRITE, cookie: 0, offset: 7, len: 1 << 40 };
        let mut out = BytesMut::new();
        request.encode_extended(&mut out);
        let bytes: [u8; EXTENDED_REQUEST_BYTES] = out.as_ref().try_into().unwrap();
        assert_eq!(Request::decode_extended(&bytes), Some(request));
        assert_eq!(bytes[..8], [0x21, 0xe4, 0x1c, 0x71, 0, 32, 0, 1]);
        assert_eq!(bytes[24..], (1_u64 << 40).to_be_bytes());
    }

    #[test]
    fn an_extended_chunk_survives_encoding() {
        let header =
            ExtendedChunkHeader { flags: 1, kind: 6, cookie: 9, offset: u64::MAX, len: 24 };
        let mut out = BytesMut::new();
        header.encode(&mut out);
        let bytes: [u8; EXTENDED_CHUNK_BYTES] = out.as_ref().try_into().unwrap();
        assert_eq!(ExtendedChunkHeader::decode(&bytes), Some(header));
        assert_eq!(bytes[..8], [0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0, 6]);
    }

    #[test]
    fn a_wrong_magic_is_no_request() {
        assert_eq!(Request::decode(&[0; REQUEST_BYTES]), None);
        assert_eq!(Request::decode_extended(&[0; EXTENDED_REQUEST_BYTES]), None);
        // Neither kind is taken for the other.
        let request = Request { flags: 0, command: 0, cookie: 0, offset: 0, len: 0 };
        let mut out = BytesMut::new();
        request.encode(&mut out);
        out.put_u32(0);
        let bytes: [u8; EXTENDED_REQUEST_BYTES] = out.as_ref().try_into().unwrap();
        assert_eq!(Request::decode_extended(&bytes), None);
    }

    #[test]
    fn numbers_know_their_names() {
        assert_eq!(reply::name(0x8000_0006), Some("ERR_UNKNOWN"));
        assert_eq!(command::name(99), None);
    }
}
