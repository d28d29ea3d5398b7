//! What a client can fail at: one variant a broken rule, with the numbers and the blame in it. The mapping onto
//! [`DeviceError`] is here, too; nothing here decides what to do next.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use block::{ByteRange, DeviceError, ErrorKind};

use crate::wire;

/// Why a client call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The socket did not connect.
    #[error("cannot connect to {address}: {source}")]
    Connect {
        /// Whom we called.
        address: String,
        /// What the kernel or the resolver said.
        source: io::Error,
    },
    /// Connecting or negotiating took longer than the options allow.
    #[error("{address} did not finish {what} within {} ms", after.as_millis())]
    Timeout {
        /// Whom we called.
        address: String,
        /// What was to be done.
        what: &'static str,
        /// The limit.
        after: Duration,
    },
    /// The socket failed during the negotiation.
    #[error("the connection failed during the negotiation: {source}")]
    HandshakeIo {
        /// What the kernel said.
        source: io::Error,
    },
    /// The server hung up during the negotiation.
    #[error("the server closed the connection while {during}")]
    HandshakeClosed {
        /// What we waited for.
        during: &'static str,
    },
    /// The server broke the rules of the negotiation.
    #[error("the server breaks the protocol: {0}")]
    Handshake(#[from] HandshakeFault),
    /// TLS did not come about: one side does not trust the other, or they have no version or algorithm in common.
    #[cfg(feature = "tls")]
    #[error("TLS with the server failed: {source}")]
    Tls {
        /// What TLS, or the kernel, said.
        source: io::Error,
    },
    /// TLS cannot be set up on our side.
    #[cfg(feature = "tls")]
    #[error(transparent)]
    TlsSetup(#[from] crate::tls::TlsError),
    /// The server answered an option with an error.
    #[error("the server refuses {}: {}{}", option_name(*.option), reply_name(*.reply), said(text))]
    Refused {
        /// The option ([`wire::option`]).
        option: u32,
        /// The error reply ([`wire::reply`]).
        reply: u32,
        /// The server's own words; may be empty.
        text: String,
    },
    /// The server cannot do what was asked for; it broke no rule.
    #[error("the server does not support {what}")]
    NotSupported {
        /// What was asked for.
        what: &'static str,
    },
    /// An export or context name that the protocol does not allow.
    #[error(
        "the name is {len} bytes long or holds a NUL; {} bytes are allowed",
        wire::MAX_STRING_BYTES
    )]
    Name {
        /// Its length in bytes.
        len: usize,
    },
    /// A further connection negotiated another export than the first.
    #[error("connection {index} sees another {what} than the first connection")]
    Inconsistent {
        /// Which connection.
        index: usize,
        /// What differs.
        what: &'static str,
    },
    /// The context was not asked for, or the server did not grant it.
    #[error("the meta context {context:?} was not negotiated")]
    NoContext {
        /// Its name.
        context: String,
    },
    /// The server answered a request with an error.
    #[error("the server failed {} of {range}: {}{}", command_name(*.command), error_name(*.error), said(text))]
    Server {
        /// The command ([`wire::command`]).
        command: u16,
        /// The bytes it was about.
        range: ByteRange,
        /// The error value ([`wire::error`]).
        error: u32,
        /// The server's own words; may be empty.
        text: String,
    },
    /// The request does not fit the server's minimum block size.
    #[error("{range} is not aligned to the server's minimum block size of {minimum} bytes")]
    Unaligned {
        /// What was asked for.
        range: ByteRange,
        /// The block size in bytes.
        minimum: u32,
    },
    /// The connection died with the request in flight, or before.
    #[error("the connection is lost: {0}")]
    Lost(Arc<LostCause>),
    /// The export is another one since the server came back.
    #[error("the server came back with another {what}")]
    Changed {
        /// What differs.
        what: &'static str,
    },
    /// The server had answered a change, lost it with its life, and refuses it now.
    #[error("a change of {range} that the server had answered cannot be made again: {source}")]
    NotRestored {
        /// The bytes that are not what they should be.
        range: ByteRange,
        /// What it failed at.
        source: Box<ClientError>,
    },
    /// All connections broke, and none came about within the time that [`super::Reconnect`] allows; or none will ever
    /// do, because of [`ClientError::Changed`] or [`ClientError::NotRestored`].
    #[error("the connection could not be restored: {0}")]
    Gone(Arc<ClientError>),
    /// The device was disconnected by its owner.
    #[error("the client is disconnected")]
    Closed,
    /// The request itself is wrong for this device.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Why a connection is dead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LostCause {
    /// The socket failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The server hung up.
    #[error("the server closed it")]
    Closed,
    /// The server broke the protocol; what follows on the stream has no meaning.
    #[error("the server breaks the protocol: {0}")]
    Protocol(#[from] ReplyFault),
    /// The server owed replies and sent nothing.
    #[error("the server owes replies and was silent for {} s", .0.as_secs())]
    Stalled(Duration),
}

/// A rule of the negotiation that the server broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeFault {
    /// The first bytes are not NBD's.
    #[error("it greets with {found:#018x} instead of NBDMAGIC")]
    NotNbd {
        /// The first eight bytes.
        found: u64,
    },
    /// The export is served in the oldstyle, which has no names.
    #[error("it speaks the oldstyle negotiation, which is not supported")]
    OldStyle,
    /// The second magic number is unknown.
    #[error("its second magic number is {found:#018x} instead of IHAVEOPT")]
    NotNewStyle {
        /// The number.
        found: u64,
    },
    /// An option reply without its magic number.
    #[error("an option reply begins with {found:#018x}")]
    ReplyMagic {
        /// The number.
        found: u64,
    },
    /// A reply to another option than the one that was sent.
    #[error("it answers option {found} where option {sent} was sent")]
    WrongOption {
        /// The option that was sent.
        sent: u32,
        /// The option in the reply.
        found: u32,
    },
    /// A reply that the option does not have.
    #[error("it answers option {option} with reply {reply:#x}")]
    UnexpectedReply {
        /// The option.
        option: u32,
        /// The reply.
        reply: u32,
    },
    /// A reply longer than any that makes sense.
    #[error("it announces an option reply of {len} bytes; at most {limit} are accepted")]
    TooLong {
        /// The announced length.
        len: u32,
        /// The limit in bytes.
        limit: u32,
    },
    /// More replies to one option than are accepted.
    #[error("it sends more than {limit} replies to option {option}")]
    TooMany {
        /// The option.
        option: u32,
        /// The limit.
        limit: usize,
    },
    /// A reply whose inner lengths do not add up.
    #[error("the content of reply {reply:#x} to option {option} is malformed")]
    Malformed {
        /// The option.
        option: u32,
        /// The reply.
        reply: u32,
    },
    /// Something in plain text behind the acknowledgement of STARTTLS, which anybody could have sent.
    #[error("plain text comes behind its answer to STARTTLS")]
    PlaintextBehindStartTls,
    /// Transmission began without the size of the export.
    #[error("it accepts the export without telling its size")]
    NoSize,
    /// Block sizes that are no powers of two or contradict each other.
    #[error(
        "its block sizes make no sense: minimum {minimum}, preferred {preferred}, maximum {maximum}"
    )]
    BlockSizes {
        /// The minimum in bytes.
        minimum: u32,
        /// The preferred size in bytes.
        preferred: u32,
        /// The maximum in bytes.
        maximum: u32,
    },
    /// Two meta contexts with one number.
    #[error("it gives the number {id} to two meta contexts")]
    ContextId {
        /// The number.
        id: u32,
    },
}

/// A rule of the transmission phase that the server broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReplyFault {
    /// Neither a simple reply nor a chunk.
    #[error("a reply begins with {found:#010x}")]
    Magic {
        /// The first four bytes.
        found: u32,
    },
    /// A reply to nothing that was asked.
    #[error("a reply carries the cookie {cookie:#x}, which is not in flight")]
    UnknownCookie {
        /// The cookie.
        cookie: u64,
    },
    /// A chunk with a header that was not negotiated.
    #[error("a chunk has a header that was not negotiated")]
    UnexpectedChunk,
    /// An extended chunk that repeats another offset than that of its request.
    #[error("a chunk repeats the offset {found} where {sent} was sent")]
    WrongOffset {
        /// The offset of the request.
        sent: u64,
        /// The offset in the chunk.
        found: u64,
    },
    /// A simple reply where only a structured one is allowed.
    #[error("a simple reply to a request that needs a structured one")]
    UnexpectedSimple,
    /// A chunk of a kind that the request does not have.
    #[error("a chunk of type {kind} does not belong to the request")]
    ChunkKind {
        /// The type.
        kind: u16,
    },
    /// A chunk whose length its type does not allow.
    #[error("a chunk of type {kind} has {len} bytes")]
    ChunkLength {
        /// The type.
        kind: u16,
        /// The length.
        len: u64,
    },
    /// A NONE chunk that is not the last.
    #[error("a NONE chunk without DONE")]
    NoneNotDone,
    /// Content outside the request.
    #[error("a chunk covers {len} bytes at offset {offset}, outside the request")]
    OutsideRequest {
        /// The offset on the export.
        offset: u64,
        /// The length in bytes.
        len: u64,
    },
    /// Content that was sent already.
    #[error("a chunk covers {len} bytes at offset {offset}, some of which came before")]
    Overlap {
        /// The offset on the export.
        offset: u64,
        /// The length in bytes.
        len: u64,
    },
    /// DONE before every byte was sent.
    #[error("the reply to a read ends after {covered} of {len} bytes")]
    Gap {
        /// The bytes that came.
        covered: u64,
        /// The bytes that were asked for.
        len: u64,
    },
    /// More chunks than any sane reply has.
    #[error("a reply has more than {limit} chunks")]
    TooManyChunks {
        /// The limit.
        limit: u32,
    },
    /// An error chunk that says success, or whose text does not fit.
    #[error("an error chunk is malformed")]
    MalformedError,
    /// A block status chunk whose extents break the rules.
    #[error("the block status is malformed: {what}")]
    Status {
        /// Which rule.
        what: &'static str,
    },
}

impl ClientError {
    /// The class of this error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Server { error, .. } => match *error {
                wire::error::EPERM => ErrorKind::ReadOnly,
                wire::error::ENOMEM => ErrorKind::NoMemory,
                wire::error::ENOSPC => ErrorKind::NoSpace,
                wire::error::ENOTSUP => ErrorKind::NotSupported,
                wire::error::ESHUTDOWN => ErrorKind::ShuttingDown,
                wire::error::EIO => ErrorKind::Io,
                // EINVAL, as which the document has unknown ones taken, among them.
                _ => ErrorKind::Invalid,
            },
            #[cfg(feature = "tls")]
            Self::TlsSetup(_) => ErrorKind::Invalid,
            Self::Name { .. } | Self::Unaligned { .. } => ErrorKind::Invalid,
            Self::NotSupported { .. } | Self::NoContext { .. } => ErrorKind::NotSupported,
            Self::Closed => ErrorKind::ShuttingDown,
            Self::Device(error) => error.kind(),
            _ => ErrorKind::Io,
        }
    }
}

impl From<ClientError> for DeviceError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Device(error) => error,
            ClientError::Closed => Self::Closed,
            error => Self::Backend { kind: error.kind(), source: Box::new(error) },
        }
    }
}

/// `text` after a colon, or nothing.
fn said(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

fn option_name(option: u32) -> String {
    wire::option::name(option).map_or_else(|| format!("option {option}"), str::to_owned)
}

fn reply_name(reply: u32) -> String {
    wire::reply::name(reply).map_or_else(|| format!("reply {reply:#x}"), str::to_owned)
}

fn command_name(command: u16) -> String {
    wire::command::name(command).map_or_else(|| format!("command {command}"), str::to_owned)
}

fn error_name(error: u32) -> String {
    wire::error::name(error).map_or_else(|| format!("error {error}"), str::to_owned)
}

/// A server's text for people: valid UTF-8, one line, at most as long as the protocol allows.
pub(super) fn text(bytes: &[u8]) -> String {
    let bounded = bytes.get(..wire::MAX_STRING_BYTES).unwrap_or(bytes);
    String::from_utf8_lossy(bounded)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect::<String>()
        .trim()
        .to_owned()
}
