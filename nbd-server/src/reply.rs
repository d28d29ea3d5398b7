//! Encoding replies of the transmission phase: headers into one growing buffer, payload segments passed on untouched,
//! ready for a vectored write. When a reply is due is told in the connection.
//!
//! Source: `doc/proto.md`, "Simple reply message", "Structured reply chunk message", "Extended reply chunk message".

use std::collections::VecDeque;

use block::{ByteRange, Segment, Segments};
use bytes::{BufMut, Bytes, BytesMut};

use crate::block_status::Descriptor;
use crate::wire::{
    ChunkHeader, ExtendedChunkHeader, Headers, Request, SIMPLE_REPLY_MAGIC, chunk, chunk_flag,
};

/// The longest text in an error chunk, in bytes; longer ones are cut at a character.
const MAX_TEXT_BYTES: usize = 1024;

/// Zeros to send where a hole must be spelt out.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// What a request is answered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Success without a payload.
    Done,
    /// A failure; READ keeps its form of reply even so.
    Failed {
        /// One of [`crate::wire::error`].
        error: u32,
        /// For people; told only in structured replies.
        text: String,
    },
    /// What was read at `offset`.
    Data {
        /// The request's offset.
        offset: u64,
        /// What the device gave, of the request's length.
        segments: Segments,
        /// At most one chunk of content.
        whole: bool,
    },
    /// Extents of each context.
    Status(Vec<(u32, Vec<Descriptor>)>),
}

/// A part of what was read; parts are given in order, and together they are all of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// What the request asked for.
    pub read: ByteRange,
    /// At most one chunk of content for all parts.
    pub whole: bool,
    /// Where this part begins.
    pub offset: u64,
    /// What the device gave for it.
    pub segments: Segments,
}

/// What a reply repeats of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The client's handle.
    pub cookie: u64,
    /// The request's offset; only extended replies repeat it.
    pub offset: u64,
}

impl From<&Request> for Asked {
    fn from(request: &Request) -> Self {
        Self { cookie: request.cookie, offset: request.offset }
    }
}

/// Turns answers into buffers to send, in order.
#[derive(Debug, Default)]
pub struct Encoder {
    headers: Headers,
    head: BytesMut,
    queue: VecDeque<Bytes>,
}

impl Encoder {
    /// An encoder for a connection with `headers`.
    pub fn new(headers: Headers) -> Self {
        Self { headers, ..Self::default() }
    }

    /// Appends the reply to the request that `asked`.
    pub fn push(&mut self, asked: Asked, answer: Answer) {
        match answer {
            Answer::Done if self.headers == Headers::Extended => {
                self.chunk(asked, chunk::NONE, true, 0);
            }
            Answer::Done => self.simple(asked, 0),
            Answer::Failed { error, text } if self.headers.has_chunks() => {
                self.failed(asked, error, &text);
            }
            Answer::Failed { error, .. } => self.simple(asked, error),
            Answer::Data { offset, segments, whole } => {
                let read = ByteRange::between(offset, offset.saturating_add(segments.len()));
                self.push_part(asked, Part { read, whole, offset, segments });
            }
            Answer::Status(contexts) => self.status(asked, &contexts),
        }
    }

    /// Appends a part of the reply to the READ that `asked`; where it must not be cut into chunks, the parts follow each
    /// other without another reply between them.
    pub fn push_part(&mut self, asked: Asked, part: Part) {
        let Part { read, whole, offset, segments } = part;
        let first = offset == read.start();
        if self.headers.has_chunks() && read.is_empty() {
            self.chunk(asked, chunk::NONE, true, 0);
        } else if self.headers.has_chunks() && !whole {
            let last = offset.saturating_add(segments.len()) >= read.end();
            self.pieces(asked, offset, segments, last);
        } else {
            if !self.headers.has_chunks() && first {
                self.simple(asked, 0);
            } else if first {
                self.data_header(asked, true, offset, read.len());
            }
            self.spell_out(segments);
        }
    }

    /// Whether a READ whose first part was appended can still fail in the words of the protocol.
    pub fn can_fail_later(&self, whole: bool) -> bool {
        self.headers.has_chunks() && !whole
    }

    /// The buffers so far, none of them empty. Leaves nothing behind.
    pub fn take(&mut self) -> VecDeque<Bytes> {
        self.seal();
        std::mem::take(&mut self.queue)
    }

    /// Gives an emptied queue back, to save its allocation.
    pub fn reuse(&mut self, mut queue: VecDeque<Bytes>) {
        if self.queue.is_empty() {
            queue.clear();
            self.queue = queue;
        }
    }

    /// Ends the current run of headers, so that payload can follow it.
    fn seal(&mut self) {
        if !self.head.is_empty() {
            self.queue.push_back(self.head.split().freeze());
        }
    }

    fn simple(&mut self, asked: Asked, error: u32) {
        self.head.put_u32(SIMPLE_REPLY_MAGIC);
        self.head.put_u32(error);
        self.head.put_u64(asked.cookie);
    }

    fn chunk(&mut self, asked: Asked, kind: u16, last: bool, len: u32) {
        let flags = if last { chunk_flag::DONE } else { 0 };
        let Asked { cookie, offset } = asked;
        if self.headers == Headers::Extended {
            let len = len.into();
            ExtendedChunkHeader { flags, kind, cookie, offset, len }.encode(&mut self.head);
        } else {
            ChunkHeader { flags, kind, cookie, len }.encode(&mut self.head);
        }
    }

    fn failed(&mut self, asked: Asked, error: u32, text: &str) {
        let text = text.get(..text.floor_char_boundary(MAX_TEXT_BYTES)).unwrap_or_default();
        let len = u16::try_from(text.len()).unwrap_or(0);
        self.chunk(asked, chunk::ERROR, true, 6 + u32::from(len));
        self.head.put_u32(error);
        self.head.put_u16(len);
        self.head.put_slice(text.as_bytes());
    }

    /// The head of a chunk of `len` bytes at `offset`; `len` is bounded by the length of a request.
    fn data_header(&mut self, asked: Asked, last: bool, offset: u64, len: u64) {
        let payload = u32::try_from(len + 8).unwrap_or(u32::MAX);
        self.chunk(asked, chunk::OFFSET_DATA, last, payload);
        self.head.put_u64(offset);
    }

    /// Sends segments as bytes, zeros included.
    fn spell_out(&mut self, segments: Segments) {
        self.seal();
        for segment in segments.0 {
            match segment {
                Segment::Data(bytes) if bytes.is_empty() => {}
                Segment::Data(bytes) => self.queue.push_back(bytes),
                Segment::Zero(mut left) => {
                    while left > 0 {
                        let now = left.min(ZEROS.len() as u64);
                        let piece = usize::try_from(now).unwrap_or(ZEROS.len());
                        self.queue.push_back(Bytes::from_static(&ZEROS).slice(..piece));
                        left -= now;
                    }
                }
            }
        }
    }

    /// Data and holes as chunks of their own; neighbouring data shares one. Whether nothing comes behind them is `last`.
    fn pieces(&mut self, asked: Asked, mut offset: u64, segments: Segments, last: bool) {
        let mut rest = segments.0.into_iter().filter(|segment| !segment.is_empty()).peekable();
        while let Some(segment) = rest.next() {
            match segment {
                Segment::Zero(mut len) => {
                    while let Some(Segment::Zero(more)) = rest.peek() {
                        len += more;
                        rest.next();
                    }
                    self.chunk(asked, chunk::OFFSET_HOLE, last && rest.peek().is_none(), 12);
                    self.head.put_u64(offset);
                    self.head.put_u32(u32::try_from(len).unwrap_or(u32::MAX));
                    offset += len;
                }
                Segment::Data(first) => {
                    let mut run = vec![first];
                    while let Some(Segment::Data(more)) = rest.peek() {
                        run.push(more.clone());
                        rest.next();
                    }
                    let len = run.iter().map(|bytes| bytes.len() as u64).sum();
                    self.data_header(asked, last && rest.peek().is_none(), offset, len);
                    self.seal();
                    self.queue.extend(run);
                    offset += len;
                }
            }
        }
    }

    /// One chunk for each context, the last of them DONE.
    fn status(&mut self, asked: Asked, contexts: &[(u32, Vec<Descriptor>)]) {
        for (index, (id, descriptors)) in contexts.iter().enumerate() {
            let last = index + 1 == contexts.len();
            // The limit on extents keeps a chunk far below 4 GiB.
            let count = u32::try_from(descriptors.len()).unwrap_or(u32::MAX);
            if self.headers == Headers::Extended {
                let len = count.saturating_mul(16).saturating_add(8);
                self.chunk(asked, chunk::BLOCK_STATUS_EXT, last, len);
                self.head.put_u32(*id);
                self.head.put_u32(count);
                for one in descriptors {
                    self.head.put_u64(one.len);
                    self.head.put_u64(one.flags.into());
                }
                continue;
            }
            let len = count.saturating_mul(8).saturating_add(4);
            self.chunk(asked, chunk::BLOCK_STATUS, last, len);
            self.head.put_u32(*id);
            for one in descriptors {
                // A compact request asks about less than 4 GiB.
                self.head.put_u32(u32::try_from(one.len).unwrap_or(u32::MAX));
                self.head.put_u32(one.flags);
            }
        }
    }
}

#[cfg(test)]
mod tests;
