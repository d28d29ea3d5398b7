//! The newstyle handshake of the server as a machine: bytes in, replies and at last an outcome out. No I/O and no
//! clock; an option's own rules live in the file of that option.
//!
//! Source: `doc/proto.md`, "Newstyle negotiation", "Fixed newstyle negotiation", "Option types".

mod answer;
mod directory;
mod info;
mod meta_context;
mod name;
mod telling;
mod tls;

use bytes::{Buf, BufMut, BytesMut};

use self::answer::Answer;
use self::name::Malformed;
use self::telling::Telling;
use self::tls::StartTls;
use crate::limits::Limits;
use crate::wire::{
    self, Fields, Headers, MAX_STRING_BYTES, OPTION_BYTES, client_flag, handshake_flag, option,
    reply, transmission_flag,
};

pub use self::directory::{
    ExportDirectory, ExportFacts, MetaContext, SelectedContext, Unavailable,
};
pub use self::tls::TlsMode;

/// The zeroes behind the answer to EXPORT_NAME.
const EXPORT_NAME_ZEROES: usize = 124;

/// What the client and the server agreed on when the handshake ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// The export.
    pub facts: ExportFacts,
    /// The headers of requests and replies.
    pub headers: Headers,
    /// What BLOCK_STATUS answers with; empty where it is not allowed.
    pub contexts: Vec<SelectedContext>,
}

impl Agreement {
    /// The transmission flags of the export under this agreement.
    ///
    /// Source: "Transmission flags".
    pub fn transmission_flags(&self) -> u16 {
        let own = self.facts.transmission_flags(self.headers.has_chunks());
        own | if self.filters_status() { transmission_flag::BLOCK_STATUS_PAYLOAD } else { 0 }
    }

    /// Whether BLOCK_STATUS takes a payload that names some of the contexts.
    pub fn filters_status(&self) -> bool {
        self.headers == Headers::Extended && !self.contexts.is_empty()
    }
}

/// Why the server closes a connection during the handshake. All but [`Close::Aborted`] break the protocol or a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Close {
    /// The client asked to end.
    #[error("the client aborted the negotiation")]
    Aborted,
    /// A client flag that was not offered.
    #[error("unknown client flags {0:#x}")]
    ClientFlags(u32),
    /// Something else than an option.
    #[error("an option does not begin with its magic number")]
    Magic,
    /// A client without fixed newstyle sent anything but EXPORT_NAME.
    #[error("option {0} from a client without fixed newstyle")]
    NotFixed(u32),
    /// EXPORT_NAME cannot be refused politely: no such export, or no valid name.
    #[error("EXPORT_NAME for an export that cannot be had")]
    ExportName,
    /// EXPORT_NAME is not allowed once extended headers are negotiated.
    #[error("EXPORT_NAME with extended headers, which need GO")]
    ExtendedExportName,
    /// More options than [`Limits::options`].
    #[error("too many options")]
    TooManyOptions,
    /// EXPORT_NAME without TLS, where TLS is demanded.
    #[error("EXPORT_NAME without TLS, which this server demands")]
    TlsRequired,
    /// Something was sent in plain text behind STARTTLS.
    #[error("plain text behind STARTTLS")]
    PlaintextBehindStartTls,
}

/// What the driver does next. Replies, if there are any, are in the output and must be sent first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Call again with at least this many more bytes of input.
    Need(usize),
    /// A step was taken; send what is in the output and call again.
    Again,
    /// Nothing was done, because the directory said [`Unavailable::NotYet`]: call again when it may say something else.
    Wait,
    /// TLS begins with the next byte in either direction; where it comes about, [`Handshake::secured`] goes on. No
    /// input is left.
    StartTls,
    /// Transmission begins. Input that is left belongs to it.
    Transmission(Box<Agreement>),
    /// Close the connection.
    Close(Close),
}

#[derive(Clone, Copy, Debug)]
enum State {
    ClientFlags,
    OptionHeader,
    Data { option: u32, len: usize },
    Discard { option: u32, left: usize, reply: (u32, &'static str) },
    Done,
}

/// Why an option is not done.
enum Trouble {
    Malformed(Malformed),
    Unavailable(Unavailable),
}

impl From<Malformed> for Trouble {
    fn from(why: Malformed) -> Self {
        Self::Malformed(why)
    }
}

impl From<Unavailable> for Trouble {
    fn from(why: Unavailable) -> Self {
        Self::Unavailable(why)
    }
}

/// The handshake of one connection.
#[derive(Debug)]
pub struct Handshake {
    state: State,
    max_option_bytes: usize,
    options_left: u32,
    fixed: bool,
    no_zeroes: bool,
    headers: Headers,
    tls: TlsMode,
    /// Whether TLS has begun.
    secured: bool,
    /// The export for which contexts were selected, as the client spelt it, and the contexts.
    selection: Option<(String, Vec<SelectedContext>)>,
    /// The answer that is being given, where it is a list.
    telling: Option<Telling>,
}

impl Handshake {
    /// A handshake at its beginning.
    pub fn new(limits: &Limits) -> Self {
        Self {
            state: State::ClientFlags,
            max_option_bytes: usize::try_from(limits.option_bytes).unwrap_or(usize::MAX),
            options_left: limits.options,
            fixed: false,
            no_zeroes: false,
            headers: Headers::Simple,
            tls: TlsMode::Off,
            secured: false,
            selection: None,
            telling: None,
        }
    }

    /// In this mode of TLS.
    #[must_use]
    pub fn with_tls(self, tls: TlsMode) -> Self {
        Self { tls, ..self }
    }

    /// The handshake after [`Progress::StartTls`], on the other side of TLS: nothing that was negotiated before holds.
    /// The client's flags do, and so does what is left of [`Limits::options`].
    ///
    /// Source: "NBD_OPT_STARTTLS".
    #[must_use]
    pub fn secured(self, limits: &Limits) -> Self {
        Self {
            state: State::OptionHeader,
            options_left: self.options_left,
            fixed: self.fixed,
            no_zeroes: self.no_zeroes,
            tls: self.tls,
            secured: true,
            ..Self::new(limits)
        }
    }

    /// Appends what the server says first.
    pub fn greet(out: &mut BytesMut) {
        out.put_u64(wire::INIT_PASSWD);
        out.put_u64(wire::IHAVEOPT);
        out.put_u16(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
    }

    /// Takes one step: consumes from the front of `input` at most what the step is about, appends replies to `out`, of a
    /// list no more than a piece.
    ///
    /// After [`Progress::Transmission`], [`Progress::StartTls`] or [`Progress::Close`] it consumes nothing and answers `Close` for ever.
    pub fn step(
        &mut self,
        input: &mut BytesMut,
        exports: &mut dyn ExportDirectory,
        out: &mut BytesMut,
    ) -> Progress {
        if let Some(telling) = self.telling.take() {
            self.telling = telling.go_on(exports, out);
            return Progress::Again;
        }
        let wanted = match self.state {
            State::ClientFlags => 4,
            State::OptionHeader => OPTION_BYTES,
            State::Data { len, .. } => len,
            State::Discard { option, left, reply } => {
                return self.discard(option, left, reply, input, out);
            }
            State::Done => return Progress::Close(Close::Aborted),
        };
        if input.len() < wanted {
            return Progress::Need(wanted - input.len());
        }
        let (taken, before) = (input.split_to(wanted), self.state);
        let progress = match self.state {
            State::ClientFlags => self.client_flags(&taken),
            State::OptionHeader => self.option_header(&taken),
            State::Data { option, .. } => {
                self.state = State::OptionHeader;
                if option == option::STARTTLS {
                    self.start_tls(input.is_empty(), exports, out)
                } else {
                    self.option(option, &taken, exports, out)
                }
            }
            State::Discard { .. } | State::Done => Progress::Close(Close::Aborted),
        };
        match progress {
            Progress::Transmission(_) | Progress::StartTls | Progress::Close(_) => {
                self.state = State::Done;
            }
            Progress::Wait => {
                self.state = before;
                let behind = std::mem::replace(input, taken);
                input.unsplit(behind);
            }
            Progress::Need(_) | Progress::Again => {}
        }
        progress
    }

    fn client_flags(&mut self, taken: &[u8]) -> Progress {
        let flags = Fields(taken).u32().unwrap_or(u32::MAX);
        if flags & !(client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES) != 0 {
            return Progress::Close(Close::ClientFlags(flags));
        }
        self.fixed = flags & client_flag::FIXED_NEWSTYLE != 0;
        self.no_zeroes = flags & client_flag::NO_ZEROES != 0;
        self.state = State::OptionHeader;
        Progress::Again
    }

    /// Looks at an option's header. Whatever the option, exactly its data is consumed.
    fn option_header(&mut self, taken: &[u8]) -> Progress {
        let mut fields = Fields(taken);
        let (Some(wire::IHAVEOPT), Some(option), Some(len)) =
            (fields.u64(), fields.u32(), fields.u32())
        else {
            return Progress::Close(Close::Magic);
        };
        let Some(options_left) = self.options_left.checked_sub(1) else {
            return Progress::Close(Close::TooManyOptions);
        };
        self.options_left = options_left;
        if !self.fixed && option != option::EXPORT_NAME {
            return Progress::Close(Close::NotFixed(option));
        }
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if !self.secured && !tls::permits(self.tls, option) {
            if option == option::EXPORT_NAME {
                return Progress::Close(Close::TlsRequired);
            }
            self.state = State::Discard { option, left: len, reply: tls::REQUIRED };
            return Progress::Again;
        }
        if option == option::EXPORT_NAME && len > MAX_STRING_BYTES {
            return Progress::Close(Close::ExportName);
        }
        self.state = if !takes_data(option) && len > 0 {
            State::Discard { option, left: len, reply: with_unwanted_data(option) }
        } else if len > self.max_option_bytes.max(MAX_STRING_BYTES) {
            // A new selection replaces the old one even where it fails.
            if option == option::SET_META_CONTEXT {
                self.selection = None;
            }
            let reply = (reply::ERR_TOO_BIG, "the option is longer than this server reads");
            State::Discard { option, left: len, reply }
        } else {
            State::Data { option, len }
        };
        Progress::Again
    }

    /// Throws data away as it comes, so that its length costs no memory.
    fn discard(
        &mut self,
        option: u32,
        left: usize,
        reply: (u32, &'static str),
        input: &mut BytesMut,
        out: &mut BytesMut,
    ) -> Progress {
        let now = left.min(input.len());
        input.advance(now);
        if now < left {
            self.state = State::Discard { option, left: left - now, reply };
            return Progress::Need(1);
        }
        if option == option::ABORT {
            Answer::new(option, out).ack();
            self.state = State::Done;
            return Progress::Close(Close::Aborted);
        }
        Answer::new(option, out).error(reply.0, reply.1);
        self.state = State::OptionHeader;
        Progress::Again
    }

    /// Answers one option with all its data at hand.
    fn option(
        &mut self,
        option: u32,
        data: &[u8],
        exports: &mut dyn ExportDirectory,
        out: &mut BytesMut,
    ) -> Progress {
        if option == option::EXPORT_NAME {
            return self.export_name(data, exports, out);
        }
        let mut answer = Answer::new(option, out);
        if option == option::ABORT {
            answer.ack();
            return Progress::Close(Close::Aborted);
        }
        if exports.is_shutting_down() {
            refuse(Unavailable::ShuttingDown, &mut answer);
            return Progress::Again;
        }
        let done = match option {
            option::LIST => {
                self.list(exports, &mut answer);
                Ok(())
            }
            option::INFO => self.info(data, exports, &mut answer),
            option::GO => match self.go(data, exports, &mut answer) {
                Ok(agreement) => return Progress::Transmission(Box::new(agreement)),
                Err(trouble) => Err(trouble),
            },
            option::STRUCTURED_REPLY | option::EXTENDED_HEADERS => {
                self.set_headers(option, &mut answer);
                Ok(())
            }
            option::LIST_META_CONTEXT => self.list_contexts(data, exports, &mut answer),
            option::SET_META_CONTEXT => self.set_contexts(data, exports, &mut answer),
            _ => {
                answer.error(reply::ERR_UNSUP, "this server does not know the option");
                Ok(())
            }
        };
        match done {
            Ok(()) => {}
            Err(Trouble::Unavailable(Unavailable::NotYet)) => return Progress::Wait,
            Err(Trouble::Unavailable(why)) => refuse(why, &mut answer),
            Err(Trouble::Malformed(why)) => answer.error(reply::ERR_INVALID, why.text()),
        }
        Progress::Again
    }

    /// STRUCTURED_REPLY and EXTENDED_HEADERS. The extended kind replaces the structured one, and there is no way back.
    fn set_headers(&mut self, option: u32, answer: &mut Answer<'_>) {
        let wanted = match option {
            option::EXTENDED_HEADERS => Headers::Extended,
            _ => Headers::Structured,
        };
        if wanted < self.headers {
            let text = "extended headers are negotiated already";
            return answer.error(reply::ERR_EXT_HEADER_REQD, text);
        }
        self.headers = wanted;
        answer.ack();
    }

    /// STARTTLS; `alone` where no byte came behind it.
    fn start_tls(
        &self,
        alone: bool,
        exports: &mut dyn ExportDirectory,
        out: &mut BytesMut,
    ) -> Progress {
        let mut answer = Answer::new(option::STARTTLS, out);
        if exports.is_shutting_down() {
            refuse(Unavailable::ShuttingDown, &mut answer);
            return Progress::Again;
        }
        match tls::start(self.tls, self.secured, alone) {
            StartTls::Begin => {
                answer.ack();
                Progress::StartTls
            }
            StartTls::Refuse(kind, text) => {
                answer.error(kind, text);
                Progress::Again
            }
            StartTls::Plaintext => Progress::Close(Close::PlaintextBehindStartTls),
        }
    }

    /// EXPORT_NAME: the one option without a way to say no.
    fn export_name(
        &mut self,
        data: &[u8],
        exports: &mut dyn ExportDirectory,
        out: &mut BytesMut,
    ) -> Progress {
        if self.headers == Headers::Extended {
            return Progress::Close(Close::ExtendedExportName);
        }
        let Ok(name) = name::text(data) else { return Progress::Close(Close::ExportName) };
        let facts = match exports.enter(name) {
            Ok(facts) => facts,
            Err(Unavailable::NotYet) => return Progress::Wait,
            Err(_) => return Progress::Close(Close::ExportName),
        };
        let agreement = self.agree(name, facts);
        out.put_u64(agreement.facts.size_bytes);
        out.put_u16(agreement.transmission_flags());
        if !self.no_zeroes {
            out.put_bytes(0, EXPORT_NAME_ZEROES);
        }
        Progress::Transmission(Box::new(agreement))
    }

    /// LIST: every export with its description.
    fn list(&mut self, exports: &dyn ExportDirectory, answer: &mut Answer<'_>) {
        if exports.lists() {
            self.telling = Some(Telling::Exports { after: None });
        } else {
            answer.error(reply::ERR_POLICY, "this server does not list its exports");
        }
    }

    fn info(
        &self,
        data: &[u8],
        exports: &mut dyn ExportDirectory,
        answer: &mut Answer<'_>,
    ) -> Result<(), Trouble> {
        let question = info::parse(data)?;
        let facts = exports.look_up(question.name)?;
        info::tell(&question, &self.agree(question.name, facts), answer);
        answer.ack();
        Ok(())
    }

    fn go(
        &mut self,
        data: &[u8],
        exports: &mut dyn ExportDirectory,
        answer: &mut Answer<'_>,
    ) -> Result<Agreement, Trouble> {
        let question = info::parse(data)?;
        let facts = exports.enter(question.name)?;
        let agreement = self.agree(question.name, facts);
        info::tell(&question, &agreement, answer);
        answer.ack();
        Ok(agreement)
    }

    fn list_contexts(
        &mut self,
        data: &[u8],
        exports: &mut dyn ExportDirectory,
        answer: &mut Answer<'_>,
    ) -> Result<(), Trouble> {
        if !self.headers.has_chunks() {
            answer.error(reply::ERR_INVALID, NEEDS_CHUNKS);
            return Ok(());
        }
        let queries = meta_context::parse(data)?;
        let facts = exports.look_up(queries.export).map_err(Unavailable::without_tls_hint)?;
        self.tell_contexts(option::LIST_META_CONTEXT, queries.list(&facts.contexts));
        Ok(())
    }

    fn set_contexts(
        &mut self,
        data: &[u8],
        exports: &mut dyn ExportDirectory,
        answer: &mut Answer<'_>,
    ) -> Result<(), Trouble> {
        self.selection = None;
        if !self.headers.has_chunks() {
            answer.error(reply::ERR_INVALID, NEEDS_CHUNKS);
            return Ok(());
        }
        let queries = meta_context::parse(data)?;
        let facts = exports.look_up(queries.export).map_err(Unavailable::without_tls_hint)?;
        let selected = queries.select(&facts.contexts);
        self.selection = Some((queries.export.to_owned(), selected.clone()));
        self.tell_contexts(option::SET_META_CONTEXT, selected);
        Ok(())
    }

    fn tell_contexts(&mut self, option: u32, contexts: Vec<SelectedContext>) {
        self.telling = Some(Telling::Contexts { option, left: contexts.into_iter() });
    }

    /// Contexts hold only for the export name for which they were selected, and while it has them.
    fn agree(&self, name: &str, facts: ExportFacts) -> Agreement {
        let contexts = match &self.selection {
            Some((export, selected)) if export == name => {
                let is_there = |one: &&SelectedContext| facts.contexts.contains(&one.context);
                selected.iter().filter(is_there).cloned().collect()
            }
            _ => Vec::new(),
        };
        Agreement { facts, headers: self.headers, contexts }
    }
}

const NEEDS_CHUNKS: &str = "meta contexts need structured replies or extended headers first";

/// Whether data may follow the option's header. An option that is not known may have any.
fn takes_data(option: u32) -> bool {
    matches!(
        option,
        option::EXPORT_NAME
            | option::INFO
            | option::GO
            | option::LIST_META_CONTEXT
            | option::SET_META_CONTEXT
    )
}

/// The answer where data follows the header of an option that takes none, or of one that is not known.
fn with_unwanted_data(option: u32) -> (u32, &'static str) {
    match option {
        option::LIST | option::STARTTLS | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS => {
            (reply::ERR_INVALID, "the option takes no data")
        }
        _ => (reply::ERR_UNSUP, "this server does not know the option"),
    }
}

fn refuse(why: Unavailable, answer: &mut Answer<'_>) {
    let (kind, text) = why.reply();
    answer.error(kind, text);
}

#[cfg(test)]
mod tests;
