//! The client's side of the negotiation as a machine: bytes in, bytes out, no I/O and no clock. It is fed exactly the
//! number of bytes it asks for, so that not one byte of the transmission phase is lost.
//!
//! Source: `doc/proto.md`, "Fixed newstyle negotiation".

use bytes::{BufMut, BytesMut};

use super::error::{ClientError, HandshakeFault, text};
use super::export::{BlockSizes, ExportInfo, ExportListing};
use crate::wire::{
    self, Fields, Headers, IHAVEOPT, INIT_PASSWD, MAX_STRING_BYTES, OPTION_REPLY_BYTES,
    OPTION_REPLY_MAGIC, client_flag, handshake_flag, info, option, reply,
};

/// The second magic number of the oldstyle negotiation ("Oldstyle negotiation").
const OLD_STYLE: u64 = 0x0000_4202_8186_1253;
/// The longest content of an option reply that is accepted, in bytes: two strings and their lengths fit amply.
const MAX_REPLY_BYTES: u32 = 16 << 10;
/// The most exports in a list.
const MAX_LISTED: usize = 65_536;
/// The most replies to any other option.
const MAX_REPLIES: usize = 256;
/// The zeroes after EXPORT_NAME where the server cannot leave them out.
const PADDING_BYTES: usize = 124;

/// What the negotiation is for.
#[derive(Clone, Debug)]
pub(super) enum Goal {
    /// Enter transmission.
    Connect {
        /// The export.
        export: String,
        /// The meta contexts to select.
        contexts: Vec<String>,
        /// The newest headers to ask for.
        headers: Headers,
    },
    /// Learn the exports and hang up.
    List,
}

/// What the negotiation brought.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Transmission begins with the next byte.
    Transmission(Negotiated),
    /// The exports.
    Listed(Vec<ExportListing>),
    /// TLS begins with the next byte; go on with [`Handshake::secured`].
    StartTls,
}

/// A granted meta context; its number holds for one connection only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Context {
    pub(super) name: String,
    pub(super) id: u32,
}

/// One connection's share of the negotiation.
#[derive(Clone, Debug)]
pub(super) struct Negotiated {
    pub(super) export: ExportInfo,
    pub(super) contexts: Vec<Context>,
}

/// What the next bytes are.
#[derive(Clone, Copy, Debug)]
enum Await {
    Magic,
    Style,
    ReplyHeader,
    ReplyBody { kind: u32, len: usize },
    ExportName,
}

/// The negotiation.
#[derive(Debug)]
pub(super) struct Handshake {
    goal: Goal,
    /// Whether TLS comes before everything else.
    starts_tls: bool,
    awaiting: Await,
    /// The option in force.
    option: u32,
    /// Replies to it so far.
    replies: usize,
    output: BytesMut,
    no_zeroes: bool,
    headers: Headers,
    contexts: Vec<Context>,
    size_and_flags: Option<(u64, u16)>,
    block_sizes: Option<BlockSizes>,
    listed: Vec<ExportListing>,
}

impl Handshake {
    /// Begins; refuses names that the protocol cannot carry.
    pub(super) fn new(goal: Goal) -> Result<Self, ClientError> {
        if let Goal::Connect { export, contexts, .. } = &goal {
            for name in std::iter::once(export).chain(contexts) {
                if name.len() > MAX_STRING_BYTES || name.contains('\0') {
                    return Err(ClientError::Name { len: name.len() });
                }
            }
        }
        Ok(Self {
            goal,
            starts_tls: false,
            awaiting: Await::Magic,
            option: 0,
            replies: 0,
            output: BytesMut::new(),
            no_zeroes: false,
            headers: Headers::Simple,
            contexts: Vec::new(),
            size_and_flags: None,
            block_sizes: None,
            listed: Vec::new(),
        })
    }

    /// The same, but nothing is asked for before TLS has begun, and nothing at all where it does not begin.
    pub(super) fn with_tls(self) -> Self {
        Self { starts_tls: true, ..self }
    }

    /// The negotiation on the other side of TLS, with a first option in its output. Of what was said in plain text it
    /// knows only that the server speaks the fixed newstyle.
    pub(super) fn secured(self) -> Result<Self, ClientError> {
        let mut secured = Self { no_zeroes: self.no_zeroes, ..Self::new(self.goal)? };
        secured.send_first();
        Ok(secured)
    }

    /// How many bytes [`Handshake::feed`] wants next.
    pub(super) fn wants(&self) -> usize {
        match self.awaiting {
            Await::Magic => 8,
            Await::Style => 10,
            Await::ReplyHeader => OPTION_REPLY_BYTES,
            Await::ReplyBody { len, .. } => len,
            Await::ExportName if self.no_zeroes => 10,
            Await::ExportName => 10 + PADDING_BYTES,
        }
    }

    /// What is awaited, in words.
    pub(super) fn during(&self) -> &'static str {
        match (self.awaiting, self.option) {
            (Await::Magic | Await::Style, _) => "greeting",
            (Await::ExportName, _) => {
                "opening the export by EXPORT_NAME (there may be no such export)"
            }
            (_, option::STARTTLS) => "answering STARTTLS",
            (_, option::EXTENDED_HEADERS) => "answering EXTENDED_HEADERS",
            (_, option::STRUCTURED_REPLY) => "answering STRUCTURED_REPLY",
            (_, option::SET_META_CONTEXT) => "answering SET_META_CONTEXT",
            (_, option::LIST) => "answering LIST",
            _ => "answering GO",
        }
    }

    /// What must be sent before more is read; also after an error.
    pub(super) fn take_output(&mut self) -> BytesMut {
        self.output.split()
    }

    /// Takes the [`Handshake::wants`] next bytes.
    ///
    /// # Errors
    /// A broken rule, or a refusal by the server. The machine is spent then; its output may hold a last ABORT.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Result<Option<Outcome>, ClientError> {
        let fed = match self.awaiting {
            Await::Magic => self.magic(bytes).map(|()| None),
            Await::Style => self.style(bytes).map(|()| None),
            Await::ReplyHeader => self.reply_header(bytes),
            Await::ReplyBody { kind, .. } => self.reply_body(kind, bytes),
            Await::ExportName => self.export_name(bytes),
        };
        if matches!(fed, Err(ClientError::Refused { .. } | ClientError::NotSupported { .. })) {
            self.send(option::ABORT, &[]);
        }
        fed
    }

    fn magic(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        let found = Fields(bytes).u64().unwrap_or_default();
        if found != INIT_PASSWD {
            return Err(HandshakeFault::NotNbd { found }.into());
        }
        self.awaiting = Await::Style;
        Ok(())
    }

    fn style(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        let mut fields = Fields(bytes);
        let found = fields.u64().unwrap_or_default();
        let flags = fields.u16().unwrap_or_default();
        match found {
            IHAVEOPT => {}
            OLD_STYLE => return Err(HandshakeFault::OldStyle.into()),
            _ => return Err(HandshakeFault::NotNewStyle { found }.into()),
        }
        let fixed = flags & handshake_flag::FIXED_NEWSTYLE != 0;
        self.no_zeroes = flags & handshake_flag::NO_ZEROES != 0;
        let mut answer = 0;
        if fixed {
            answer |= client_flag::FIXED_NEWSTYLE;
        }
        if self.no_zeroes {
            answer |= client_flag::NO_ZEROES;
        }
        self.output.put_u32(answer);
        match (&self.goal, fixed) {
            (_, false) if self.starts_tls => {
                return Err(ClientError::NotSupported { what: "TLS" });
            }
            (_, true) if self.starts_tls => self.send(option::STARTTLS, &[]),
            (_, true) => self.send_first(),
            (Goal::Connect { .. }, false) => self.send_export_name(),
            (Goal::List, false) => {
                return Err(ClientError::NotSupported { what: "listing its exports" });
            }
        }
        Ok(())
    }

    /// The first option that is about the goal.
    fn send_first(&mut self) {
        match &self.goal {
            Goal::Connect { headers: Headers::Extended, .. } => {
                self.send(option::EXTENDED_HEADERS, &[]);
            }
            Goal::Connect { headers: Headers::Structured, .. } => {
                self.send(option::STRUCTURED_REPLY, &[]);
            }
            Goal::Connect { headers: Headers::Simple, .. } => self.send_go(),
            Goal::List => self.send(option::LIST, &[]),
        }
    }

    fn reply_header(&mut self, bytes: &[u8]) -> Result<Option<Outcome>, ClientError> {
        let mut fields = Fields(bytes);
        let magic = fields.u64().unwrap_or_default();
        let found = fields.u32().unwrap_or_default();
        let kind = fields.u32().unwrap_or_default();
        let len = fields.u32().unwrap_or_default();
        if magic != OPTION_REPLY_MAGIC {
            return Err(HandshakeFault::ReplyMagic { found: magic }.into());
        }
        if found != self.option {
            return Err(HandshakeFault::WrongOption { sent: self.option, found }.into());
        }
        if len > MAX_REPLY_BYTES {
            return Err(HandshakeFault::TooLong { len, limit: MAX_REPLY_BYTES }.into());
        }
        self.replies += 1;
        let limit = if self.option == option::LIST { MAX_LISTED } else { MAX_REPLIES };
        if self.replies > limit {
            return Err(HandshakeFault::TooMany { option: self.option, limit }.into());
        }
        let len = usize::try_from(len).unwrap_or_default();
        if len == 0 {
            return self.reply_body(kind, &[]);
        }
        self.awaiting = Await::ReplyBody { kind, len };
        Ok(None)
    }

    fn reply_body(&mut self, kind: u32, body: &[u8]) -> Result<Option<Outcome>, ClientError> {
        self.awaiting = Await::ReplyHeader;
        if kind & (1 << 31) != 0 {
            return self.refused(kind, body).map(|()| None);
        }
        match (self.option, kind) {
            (_, reply::ACK) => return self.acknowledged(body),
            (option::LIST, reply::SERVER) => {
                let listing = listing(body).ok_or_else(|| self.malformed(kind))?;
                self.listed.push(listing);
            }
            (option::SET_META_CONTEXT, reply::META_CONTEXT) => {
                let context = context(body).ok_or_else(|| self.malformed(kind))?;
                if self.contexts.iter().any(|known| known.id == context.id) {
                    return Err(HandshakeFault::ContextId { id: context.id }.into());
                }
                self.contexts.push(context);
            }
            (option::GO, reply::INFO) => self.information(body)?,
            (option, reply) => {
                return Err(HandshakeFault::UnexpectedReply { option, reply }.into());
            }
        }
        Ok(None)
    }

    /// An error reply: some options are optional, and GO has a predecessor.
    fn refused(&mut self, kind: u32, body: &[u8]) -> Result<(), ClientError> {
        let fatal = matches!(kind, reply::ERR_TLS_REQD | reply::ERR_SHUTDOWN);
        match self.option {
            option::EXTENDED_HEADERS if !fatal => self.send(option::STRUCTURED_REPLY, &[]),
            option::STRUCTURED_REPLY if !fatal => self.send_go(),
            option::SET_META_CONTEXT if !fatal => {
                self.contexts.clear();
                self.send_go();
            }
            // After extended headers EXPORT_NAME is forbidden, and a server that has those has GO.
            option::GO if kind == reply::ERR_UNSUP && self.headers != Headers::Extended => {
                self.send_export_name();
            }
            option => {
                return Err(ClientError::Refused { option, reply: kind, text: text(body) });
            }
        }
        Ok(())
    }

    fn acknowledged(&mut self, body: &[u8]) -> Result<Option<Outcome>, ClientError> {
        if !body.is_empty() {
            return Err(self.malformed(reply::ACK).into());
        }
        match self.option {
            option::STARTTLS => Ok(Some(Outcome::StartTls)),
            option::EXTENDED_HEADERS => {
                self.headers = Headers::Extended;
                self.send_contexts_or_go();
                Ok(None)
            }
            option::STRUCTURED_REPLY => {
                self.headers = Headers::Structured;
                self.send_contexts_or_go();
                Ok(None)
            }
            option::SET_META_CONTEXT => {
                self.send_go();
                Ok(None)
            }
            option::LIST => {
                self.send(option::ABORT, &[]);
                Ok(Some(Outcome::Listed(std::mem::take(&mut self.listed))))
            }
            _ => {
                let (size_bytes, flags) = self.size_and_flags.ok_or(HandshakeFault::NoSize)?;
                Ok(Some(self.transmission(size_bytes, flags)))
            }
        }
    }

    /// An INFO reply of GO; those that nobody asked for are fine.
    fn information(&mut self, body: &[u8]) -> Result<(), ClientError> {
        let malformed = self.malformed(reply::INFO);
        let mut fields = Fields(body);
        match fields.u16().ok_or(malformed)? {
            info::EXPORT => {
                let size = fields.u64().ok_or(malformed)?;
                let flags = fields.u16().ok_or(malformed)?;
                fields.finish().ok_or(malformed)?;
                self.size_and_flags = Some((size, flags));
            }
            info::BLOCK_SIZE => {
                let minimum = fields.u32().ok_or(malformed)?;
                let preferred = fields.u32().ok_or(malformed)?;
                let maximum = fields.u32().ok_or(malformed)?;
                fields.finish().ok_or(malformed)?;
                self.block_sizes = Some(block_sizes(minimum, preferred, maximum)?);
            }
            _ => {}
        }
        Ok(())
    }

    fn export_name(&mut self, bytes: &[u8]) -> Result<Option<Outcome>, ClientError> {
        let mut fields = Fields(bytes);
        let size_bytes = fields.u64().ok_or(HandshakeFault::NoSize)?;
        let flags = fields.u16().ok_or(HandshakeFault::NoSize)?;
        Ok(Some(self.transmission(size_bytes, flags)))
    }

    fn transmission(&mut self, size_bytes: u64, flags: u16) -> Outcome {
        let name = match &self.goal {
            Goal::Connect { export, .. } => export.clone(),
            Goal::List => String::new(),
        };
        let contexts = std::mem::take(&mut self.contexts);
        Outcome::Transmission(Negotiated {
            export: ExportInfo {
                name,
                size_bytes,
                flags,
                block_sizes: self.block_sizes.unwrap_or_default(),
                headers: self.headers,
                contexts: contexts.iter().map(|context| context.name.clone()).collect(),
            },
            contexts,
        })
    }

    fn send_contexts_or_go(&mut self) {
        let mut data = BytesMut::new();
        match &self.goal {
            Goal::Connect { export, contexts, .. } if !contexts.is_empty() => {
                put_string(&mut data, export);
                data.put_u32(u32::try_from(contexts.len()).unwrap_or(u32::MAX));
                for context in contexts {
                    put_string(&mut data, context);
                }
            }
            _ => return self.send_go(),
        }
        self.send(option::SET_META_CONTEXT, &data);
    }

    fn send_go(&mut self) {
        let mut data = BytesMut::new();
        put_string(&mut data, self.export());
        data.put_u16(1);
        data.put_u16(info::BLOCK_SIZE);
        self.send(option::GO, &data);
    }

    fn send_export_name(&mut self) {
        let name = self.export().to_owned();
        self.send(option::EXPORT_NAME, name.as_bytes());
        self.awaiting = Await::ExportName;
    }

    fn send(&mut self, option: u32, data: &[u8]) {
        self.output.put_u64(IHAVEOPT);
        self.output.put_u32(option);
        self.output.put_u32(u32::try_from(data.len()).unwrap_or(u32::MAX));
        self.output.put_slice(data);
        self.option = option;
        self.replies = 0;
        self.awaiting = Await::ReplyHeader;
    }

    fn export(&self) -> &str {
        match &self.goal {
            Goal::Connect { export, .. } => export,
            Goal::List => "",
        }
    }

    fn malformed(&self, reply: u32) -> HandshakeFault {
        HandshakeFault::Malformed { option: self.option, reply }
    }
}

/// The content of a SERVER reply.
fn listing(body: &[u8]) -> Option<ExportListing> {
    let mut fields = Fields(body);
    let len = usize::try_from(fields.u32()?).ok()?;
    let name = fields.take(len)?;
    (len <= MAX_STRING_BYTES).then_some(())?;
    let name = std::str::from_utf8(name).ok()?.to_owned();
    Some(ExportListing { name, description: text(fields.0) })
}

/// The content of a META_CONTEXT reply.
fn context(body: &[u8]) -> Option<Context> {
    let mut fields = Fields(body);
    let id = fields.u32()?;
    (fields.0.len() <= MAX_STRING_BYTES).then_some(())?;
    let name = std::str::from_utf8(fields.0).ok()?.to_owned();
    Some(Context { name, id })
}

/// Checks the constraints and makes the maximum a power of two, by which requests can be cut.
fn block_sizes(minimum: u32, preferred: u32, maximum: u32) -> Result<BlockSizes, HandshakeFault> {
    let sane = minimum.is_power_of_two()
        && preferred.is_power_of_two()
        && minimum <= wire::MAX_PAYLOAD_BYTES
        && minimum <= preferred
        && minimum <= maximum;
    if !sane {
        return Err(HandshakeFault::BlockSizes { minimum, preferred, maximum });
    }
    let maximum = 1 << maximum.ilog2();
    Ok(BlockSizes { minimum, preferred, maximum })
}

fn put_string(out: &mut BytesMut, string: &str) {
    out.put_u32(u32::try_from(string.len()).unwrap_or(u32::MAX));
    out.put_slice(string.as_bytes());
}

#[cfg(test)]
mod tests;
