//! Replies of the transmission phase, decoded and checked without I/O: [`Header`] is what a reply begins with,
//! [`Assembly`] what one request awaits and what has come of it. Bytes are moved by `connection`.
//!
//! Source: `doc/proto.md`, "Structured reply types" and "Request types".

use std::collections::BTreeMap;

use block::{ByteRange, Segment, Segments};
use bytes::Bytes;

use super::error::{ReplyFault, text};
use super::export::StatusExtent;
use crate::wire::{
    CHUNK_BYTES, EXTENDED_CHUNK_BYTES, EXTENDED_REPLY_MAGIC, Fields, Headers, SIMPLE_REPLY_BYTES,
    SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk, chunk_flag,
};

/// The most chunks in one reply: a payload of the greatest length that alternates every sector needs half of it.
const MAX_CHUNKS: u32 = 1 << 17;
/// The most extents in a block status chunk that is accepted: a million, as nbdkit may send.
const MAX_STATUS_DESCRIPTORS: u64 = 1 << 20;
/// The extents kept of a block status chunk; the rest can be asked for again.
const MAX_STATUS_EXTENTS: usize = 1 << 16;
/// The longest error chunk that is accepted, in bytes: the longest text with room for fields yet unknown.
const MAX_ERROR_BYTES: u64 = 1 << 17;

/// The header of a chunk, structured or extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) flags: u16,
    pub(super) kind: u16,
    pub(super) cookie: u64,
    /// The offset of the request, which extended chunks repeat.
    pub(super) offset: Option<u64>,
    /// The payload that follows, in bytes.
    pub(super) len: u64,
}

/// The beginning of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Header {
    /// A simple reply.
    Simple { error: u32, cookie: u64 },
    /// A chunk of a structured or extended reply.
    Chunk(Chunk),
}

impl Header {
    /// The bytes after which [`Header::len`] can tell the length.
    pub(super) const SHORTEST: usize = SIMPLE_REPLY_BYTES;
    /// The longest header.
    pub(super) const LONGEST: usize = EXTENDED_CHUNK_BYTES;

    /// The length of the header that begins with `bytes`.
    pub(super) fn len(bytes: &[u8; Self::LONGEST]) -> Result<usize, ReplyFault> {
        match Fields(bytes).u32().unwrap_or_default() {
            SIMPLE_REPLY_MAGIC => Ok(SIMPLE_REPLY_BYTES),
            STRUCTURED_REPLY_MAGIC => Ok(CHUNK_BYTES),
            EXTENDED_REPLY_MAGIC => Ok(EXTENDED_CHUNK_BYTES),
            found => Err(ReplyFault::Magic { found }),
        }
    }

    /// Decodes a header of which [`Header::len`] bytes are there.
    pub(super) fn decode(bytes: &[u8; Self::LONGEST]) -> Result<Self, ReplyFault> {
        let mut fields = Fields(bytes);
        let found = fields.u32().unwrap_or_default();
        let fault = ReplyFault::Magic { found };
        match found {
            SIMPLE_REPLY_MAGIC => Ok(Self::Simple {
                error: fields.u32().ok_or(fault)?,
                cookie: fields.u64().ok_or(fault)?,
            }),
            STRUCTURED_REPLY_MAGIC => Ok(Self::Chunk(Chunk {
                flags: fields.u16().ok_or(fault)?,
                kind: fields.u16().ok_or(fault)?,
                cookie: fields.u64().ok_or(fault)?,
                offset: None,
                len: fields.u32().ok_or(fault)?.into(),
            })),
            EXTENDED_REPLY_MAGIC => Ok(Self::Chunk(Chunk {
                flags: fields.u16().ok_or(fault)?,
                kind: fields.u16().ok_or(fault)?,
                cookie: fields.u64().ok_or(fault)?,
                offset: Some(fields.u64().ok_or(fault)?),
                len: fields.u64().ok_or(fault)?,
            })),
            _ => Err(fault),
        }
    }

    /// Which request it answers.
    pub(super) fn cookie(&self) -> u64 {
        match self {
            Self::Simple { cookie, .. } => *cookie,
            Self::Chunk(chunk) => chunk.cookie,
        }
    }
}

/// What a request wants to hear besides success.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wants {
    /// Nothing.
    Success,
    /// The bytes of the range.
    Data,
    /// Extents of the contexts with these numbers.
    Status { contexts: Vec<u32> },
}

/// What the driver does next for a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Receive so many bytes and pass them to [`Assembly::bytes`].
    Bytes(usize),
    /// Receive `len` bytes into the request's buffer at `at`, then call [`Assembly::filled`].
    Fill { at: usize, len: usize },
    /// Nothing; more chunks will come.
    More,
    /// The reply is complete.
    Done,
}

/// An error reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) error: u32,
    pub(super) text: String,
}

/// What a successful reply brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Nothing but success.
    Success,
    /// The bytes of a read.
    Data(Segments),
    /// Of each context that was asked for, extents in order from the start of the range.
    Status(Vec<Vec<StatusExtent>>),
}

/// A run of a read that came.
#[derive(Clone, Copy, Debug)]
struct Run {
    len: usize,
    zero: bool,
}

/// What one request awaits, and what has come of it.
#[derive(Debug)]
pub(super) struct Assembly {
    range: ByteRange,
    wants: Wants,
    headers: Headers,
    /// The chunk in progress.
    chunk: Option<Chunk>,
    chunks: u32,
    /// What came of a read, by its place in the request.
    runs: BTreeMap<usize, Run>,
    covered: usize,
    /// The contexts that were heard of.
    contexts: Vec<u32>,
    extents: Vec<Vec<StatusExtent>>,
    failure: Option<Failure>,
}

impl Assembly {
    /// Of a request over `range`, on a connection that negotiated these headers.
    pub(super) fn new(range: ByteRange, wants: Wants, headers: Headers) -> Self {
        let asked = if let Wants::Status { contexts } = &wants { contexts.len() } else { 0 };
        Self {
            range,
            wants,
            headers,
            chunk: None,
            chunks: 0,
            runs: BTreeMap::new(),
            covered: 0,
            contexts: Vec::new(),
            extents: vec![Vec::new(); asked],
            failure: None,
        }
    }

    /// Takes the header of a simple reply or of a chunk.
    pub(super) fn begin(&mut self, header: Header) -> Result<Step, ReplyFault> {
        match header {
            Header::Simple { error, .. } => self.simple(error),
            Header::Chunk(chunk) => self.chunk(chunk),
        }
    }

    fn simple(&mut self, error: u32) -> Result<Step, ReplyFault> {
        let needs_chunks = match (self.headers, &self.wants) {
            (Headers::Extended, _) => true,
            (headers, Wants::Data) => headers.has_chunks(),
            (_, Wants::Status { .. }) => error == 0,
            (_, Wants::Success) => false,
        };
        // A reply that began in chunks cannot end as a simple one.
        if needs_chunks || self.chunks > 0 {
            return Err(ReplyFault::UnexpectedSimple);
        }
        if error != 0 {
            self.failure = Some(Failure { error, text: String::new() });
            return Ok(Step::Done);
        }
        if self.wants != Wants::Data {
            return Ok(Step::Done);
        }
        let len = usize::try_from(self.range.len()).unwrap_or_default();
        self.cover(self.range.start(), self.range.len(), false)?;
        Ok(Step::Fill { at: 0, len })
    }

    fn chunk(&mut self, header: Chunk) -> Result<Step, ReplyFault> {
        match (self.headers, header.offset) {
            (Headers::Structured, None) => {}
            (Headers::Extended, Some(found)) if found == self.range.start() => {}
            (Headers::Extended, Some(found)) => {
                return Err(ReplyFault::WrongOffset { sent: self.range.start(), found });
            }
            _ => return Err(ReplyFault::UnexpectedChunk),
        }
        self.chunks += 1;
        if self.chunks > MAX_CHUNKS {
            return Err(ReplyFault::TooManyChunks { limit: MAX_CHUNKS });
        }
        let (kind, len) = (header.kind, header.len);
        let wrong_length = ReplyFault::ChunkLength { kind, len };
        let wanted = match (kind, &self.wants) {
            (chunk::NONE, _) if len != 0 => return Err(wrong_length),
            (chunk::NONE, _) if header.flags & chunk_flag::DONE == 0 => {
                return Err(ReplyFault::NoneNotDone);
            }
            (chunk::NONE, _) => return self.end_of_reply(),
            (chunk::OFFSET_DATA, Wants::Data) if len < 9 => return Err(wrong_length),
            (chunk::OFFSET_DATA, Wants::Data) => 8,
            (chunk::OFFSET_HOLE, Wants::Data) if len != 12 => return Err(wrong_length),
            (chunk::OFFSET_HOLE, Wants::Data) => 12,
            (chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT, Wants::Status { .. })
                if (kind == chunk::BLOCK_STATUS_EXT) == (self.headers == Headers::Extended) =>
            {
                let (head, each) = status_sizes(kind);
                let descriptors = len.checked_sub(head).ok_or(wrong_length)?;
                if !(each..=each * MAX_STATUS_DESCRIPTORS).contains(&descriptors)
                    || !descriptors.is_multiple_of(each)
                {
                    return Err(wrong_length);
                }
                len
            }
            _ if kind & (1 << 15) != 0 => {
                let least = if kind == chunk::ERROR_OFFSET { 14 } else { 6 };
                if len < least || len > MAX_ERROR_BYTES {
                    return Err(wrong_length);
                }
                len
            }
            _ => return Err(ReplyFault::ChunkKind { kind }),
        };
        self.chunk = Some(header);
        Ok(Step::Bytes(usize::try_from(wanted).map_err(|_| wrong_length)?))
    }

    /// Takes the bytes that a [`Step::Bytes`] asked for.
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> Result<Step, ReplyFault> {
        let Some(header) = self.chunk else { return Ok(Step::More) };
        let (kind, len) = (header.kind, header.len);
        let short = ReplyFault::ChunkLength { kind, len };
        let mut fields = Fields(bytes);
        match kind {
            chunk::OFFSET_DATA => {
                let offset = fields.u64().ok_or(short)?;
                let len = len.checked_sub(8).ok_or(short)?;
                let (at, len) = self.cover(offset, len, false)?;
                return Ok(Step::Fill { at, len });
            }
            chunk::OFFSET_HOLE => {
                let offset = fields.u64().ok_or(short)?;
                let len = fields.u32().ok_or(short)?;
                self.cover(offset, u64::from(len), true)?;
            }
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => self.status(kind, fields)?,
            _ => self.error(kind, fields)?,
        }
        self.filled()
    }

    /// The bytes that a [`Step::Fill`] asked for are in the buffer.
    pub(super) fn filled(&mut self) -> Result<Step, ReplyFault> {
        match self.chunk.take() {
            Some(header) if header.flags & chunk_flag::DONE == 0 => Ok(Step::More),
            Some(_) => self.end_of_reply(),
            // A simple reply to a read ends with its data.
            None => Ok(Step::Done),
        }
    }

    /// Notes that a piece of a read came; inside the request, and for the first time.
    fn cover(&mut self, offset: u64, len: u64, zero: bool) -> Result<(usize, usize), ReplyFault> {
        let outside = ReplyFault::OutsideRequest { offset, len };
        let piece = ByteRange::new(offset, len).ok_or(outside)?;
        if piece.is_empty() || !self.range.contains(piece) {
            return Err(outside);
        }
        let at = usize::try_from(offset - self.range.start()).map_err(|_| outside)?;
        let len_here = usize::try_from(len).map_err(|_| outside)?;
        let end = at + len_here;
        let before = self.runs.range(..end).next_back().map(|(at, run)| (*at, *run));
        if before.is_some_and(|(start, run)| start + run.len > at) {
            return Err(ReplyFault::Overlap { offset, len });
        }
        match before {
            Some((start, run)) if start + run.len == at && run.zero == zero => {
                self.runs.insert(start, Run { len: run.len + len_here, zero });
            }
            _ => {
                self.runs.insert(at, Run { len: len_here, zero });
            }
        }
        self.covered += len_here;
        Ok((at, len_here))
    }

    fn status(&mut self, kind: u16, mut fields: Fields<'_>) -> Result<(), ReplyFault> {
        let id = fields.u32().ok_or(ReplyFault::Status { what: "no context" })?;
        if self.contexts.contains(&id) {
            return Err(ReplyFault::Status { what: "two chunks for one context" });
        }
        if self.contexts.len() >= 256 {
            return Err(ReplyFault::Status { what: "more contexts than were negotiated" });
        }
        self.contexts.push(id);
        let place = match &self.wants {
            Wants::Status { contexts } => contexts.iter().position(|wanted| *wanted == id),
            _ => None,
        };
        let mut kept = place.and_then(|place| self.extents.get_mut(place));
        if kind == chunk::BLOCK_STATUS_EXT {
            let (_, each) = status_sizes(kind);
            let count = fields.u32().ok_or(ReplyFault::Status { what: "no count" })?;
            if u64::from(count) * each != fields.0.len() as u64 {
                return Err(ReplyFault::Status { what: "a wrong count of extents" });
            }
        }
        let mut at = self.range.start();
        while let Some((len, flags)) = descriptor(kind, &mut fields) {
            if len == 0 {
                return Err(ReplyFault::Status { what: "an empty extent" });
            }
            if at >= self.range.end() {
                return Err(ReplyFault::Status { what: "extents behind the end of the request" });
            }
            // Only the last one may reach beyond the request; that part is not ours.
            let end = at.saturating_add(len);
            let range = ByteRange::between(at, end.min(self.range.end()));
            at = end;
            if let Some(kept) = &mut kept
                && kept.len() < MAX_STATUS_EXTENTS
            {
                kept.push(StatusExtent { range, flags });
            }
        }
        Ok(())
    }

    fn error(&mut self, kind: u16, mut fields: Fields<'_>) -> Result<(), ReplyFault> {
        let error = fields.u32().ok_or(ReplyFault::MalformedError)?;
        let len = fields.u16().ok_or(ReplyFault::MalformedError)?;
        let said = fields.take(usize::from(len)).ok_or(ReplyFault::MalformedError)?;
        if error == 0 {
            return Err(ReplyFault::MalformedError);
        }
        if kind == chunk::ERROR_OFFSET {
            let offset = fields.u64().ok_or(ReplyFault::MalformedError)?;
            if offset < self.range.start() || offset >= self.range.end() {
                return Err(ReplyFault::OutsideRequest { offset, len: 1 });
            }
        }
        // The first error is the one that is told.
        self.failure.get_or_insert_with(|| Failure { error, text: text(said) });
        Ok(())
    }

    /// DONE: whatever did not come now never will.
    fn end_of_reply(&mut self) -> Result<Step, ReplyFault> {
        if self.failure.is_some() {
            return Ok(Step::Done);
        }
        match &self.wants {
            Wants::Success => {}
            Wants::Data => {
                let (covered, len) = (self.covered as u64, self.range.len());
                if covered != len {
                    return Err(ReplyFault::Gap { covered, len });
                }
            }
            Wants::Status { contexts } => {
                if contexts.iter().any(|context| !self.contexts.contains(context)) {
                    return Err(ReplyFault::Status { what: "no chunk for the context" });
                }
            }
        }
        Ok(Step::Done)
    }

    /// The outcome of a complete reply. `data` freezes the buffer that was filled, and is only called where a byte of
    /// it is part of the answer.
    pub(super) fn finish(self, data: impl FnOnce() -> Bytes) -> Result<Answer, Failure> {
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        Ok(match self.wants {
            Wants::Success => Answer::Success,
            Wants::Status { .. } => Answer::Status(self.extents),
            Wants::Data => Answer::Data(segments(&self.runs, data)),
        })
    }
}

/// Of a block status chunk, the bytes before the extents and those of each.
fn status_sizes(kind: u16) -> (u64, u64) {
    if kind == chunk::BLOCK_STATUS_EXT { (8, 16) } else { (4, 8) }
}

/// The length and the flags of the next extent.
fn descriptor(kind: u16, fields: &mut Fields<'_>) -> Option<(u64, u64)> {
    if kind == chunk::BLOCK_STATUS_EXT {
        Some((fields.u64()?, fields.u64()?))
    } else {
        Some((fields.u32()?.into(), fields.u32()?.into()))
    }
}

/// The runs of a read as slices of its buffer.
fn segments(runs: &BTreeMap<usize, Run>, data: impl FnOnce() -> Bytes) -> Segments {
    let mut segments = Segments::default();
    let data = if runs.values().any(|run| !run.zero) { data() } else { Bytes::new() };
    for (at, run) in runs {
        segments.push(if run.zero {
            Segment::Zero(run.len as u64)
        } else {
            Segment::Data(data.slice(*at..*at + run.len))
        });
    }
    segments
}

#[cfg(test)]
mod tests;
