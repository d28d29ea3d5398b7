//! The border of the transmission phase: a request is judged once against what was negotiated, and becomes a command
//! that a device can execute as it is, or a refusal. Executing is told in the connection.
//!
//! Source: `doc/proto.md`, "Request message", "Request types", "Command flags", "Error values".

use block::{ByteRange, Durability, ZeroMode};

use crate::handshake::{Agreement, SelectedContext};
use crate::wire::{
    Fields, Headers, MAX_PAYLOAD_BYTES, Request, command, command_flag as flag, error,
    transmission_flag as told,
};

/// The part of a BLOCK_STATUS payload before the contexts: the length of the range that is asked about.
const FILTER_HEAD_BYTES: u64 = 8;
/// The size of a context's number in that payload.
const FILTER_ID_BYTES: u64 = 4;

/// A request that may be executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Command {
    /// Read.
    Read {
        /// What.
        range: ByteRange,
        /// Whether the reply may have at most one chunk of content.
        whole: bool,
    },
    /// Write the payload.
    Write {
        /// Where.
        range: ByteRange,
        /// When it may be answered.
        durability: Durability,
    },
    /// Make durable what was answered.
    Flush,
    /// Discard.
    Trim {
        /// Where.
        range: ByteRange,
        /// When it may be answered.
        durability: Durability,
    },
    /// Prefetch.
    Cache {
        /// Where.
        range: ByteRange,
    },
    /// Write zeros.
    WriteZeroes {
        /// Where.
        range: ByteRange,
        /// How.
        mode: ZeroMode,
        /// When it may be answered.
        durability: Durability,
    },
    /// Tell the extents.
    BlockStatus {
        /// Of what.
        range: ByteRange,
        /// Only the first.
        one: bool,
    },
}

/// Why a request is not executed: one rule each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// A command that is not known here.
    #[error("this server does not know the command")]
    UnknownCommand,
    /// A command that the export withholds, though the server knows it.
    #[error("the export does not offer the command")]
    NotOffered,
    /// A flag that is not known, not negotiated, withheld, or not meant for this command.
    #[error("a command flag is not valid for this command on this connection")]
    Flags,
    /// A change to a read-only export.
    #[error("the export is read-only")]
    ReadOnly,
    /// A READ or WRITE of more than was told to the client.
    #[error("the request is longer than the maximum payload")]
    TooLong,
    /// The same READ of a client that understands that it may ask for less.
    #[error("the read is longer than the maximum payload; ask for less at a time")]
    LongRead,
    /// A payload that is longer than any that is worth being consumed.
    #[error("the payload is longer than any that is read")]
    HugePayload,
    /// The payload of a BLOCK_STATUS that is no list of different contexts, each of them selected.
    #[error("the payload does not name selected meta contexts, each once")]
    Filter,
    /// A request, other than a write, that leaves the export.
    #[error("the request passes the end of the export")]
    PastEnd,
    /// A write that leaves the export.
    #[error("the write passes the end of the export")]
    WritePastEnd,
    /// FLUSH with an offset or a length.
    #[error("a flush takes no offset and no length")]
    FlushRange,
    /// BLOCK_STATUS without a context.
    #[error("no meta context was selected for this export")]
    NoContext,
    /// BLOCK_STATUS of nothing, which no reply could describe.
    #[error("a status needs at least one byte to describe")]
    EmptyStatus,
    /// The server is stopping, or the export is being removed.
    #[error("the server is stopping")]
    ShuttingDown,
}

impl Refusal {
    /// The protocol's error value.
    pub fn error(self) -> u32 {
        match self {
            Self::ReadOnly => error::EPERM,
            Self::WritePastEnd => error::ENOSPC,
            Self::LongRead => error::EOVERFLOW,
            Self::ShuttingDown => error::ESHUTDOWN,
            Self::UnknownCommand
            | Self::NotOffered
            | Self::Flags
            | Self::TooLong
            | Self::HugePayload
            | Self::Filter
            | Self::PastEnd
            | Self::FlushRange
            | Self::NoContext
            | Self::EmptyStatus => error::EINVAL,
        }
    }
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Execute it.
    Execute(Command),
    /// Read the payload, of this many bytes, and ask [`judge_filter`].
    Filter {
        /// Bounded by the number of contexts that were selected.
        payload_bytes: u32,
    },
    /// Consume the payload, if there is one, and answer with an error.
    Refuse(Refusal),
    /// Answer with an error and close: what follows on the stream is not to be read.
    Abandon(Refusal),
    /// The client takes its leave: finish what is in flight, then close.
    Disconnect,
}

/// How many bytes follow the header on the wire, whatever becomes of the request: those of a WRITE, and with extended
/// headers those that the client announces.
///
/// A WRITE has its payload even where an extended header does not announce it. The document wants it announced, but
/// QEMU (10.0 at least) does not do it, and a WRITE without data would be no use to anybody.
pub fn payload_bytes(request: &Request, headers: Headers) -> u64 {
    let announces = headers == Headers::Extended && request.flags & flag::PAYLOAD_LEN != 0;
    if announces || request.command == command::WRITE { request.len } else { 0 }
}

/// Judges a request. When several rules are broken, the first in the order command, flags, read-only, bounds, length
/// is told.
pub fn judge(request: &Request, agreement: &Agreement) -> Verdict {
    // Nothing else in a disconnect matters.
    if request.command == command::DISC {
        return Verdict::Disconnect;
    }
    if is_huge(request, agreement) {
        return Verdict::Abandon(Refusal::HugePayload);
    }
    let judged = if is_filtered(request, agreement) {
        let payload_bytes = filter_bytes(request, agreement);
        payload_bytes.map(|payload_bytes| Verdict::Filter { payload_bytes })
    } else {
        command(request, agreement).map(Verdict::Execute)
    };
    judged.unwrap_or_else(Verdict::Refuse)
}

/// Judges a BLOCK_STATUS with a payload, now that it is read: what to execute, about which contexts.
///
/// # Errors
/// The rule that it breaks.
///
/// Source: "NBD_CMD_BLOCK_STATUS".
pub fn judge_filter(
    request: &Request,
    payload: &[u8],
    agreement: &Agreement,
) -> Result<(Command, Vec<SelectedContext>), Refusal> {
    let mut fields = Fields(payload);
    let len = fields.u64().ok_or(Refusal::Filter)?;
    let mut wanted: Vec<SelectedContext> = Vec::new();
    while !fields.0.is_empty() {
        let id = fields.u32().ok_or(Refusal::Filter)?;
        let selected = agreement.contexts.iter().find(|one| one.id == id);
        let is_new = wanted.iter().all(|one| one.id != id);
        wanted.push(selected.filter(|_| is_new).ok_or(Refusal::Filter)?.clone());
    }
    if wanted.is_empty() {
        return Err(Refusal::NoContext);
    }
    let asked = Request { len, flags: request.flags & !flag::PAYLOAD_LEN, ..*request };
    Ok((command(&asked, agreement)?, wanted))
}

/// Whether an extended payload is too long to be worth consuming. A compact one has always been consumed.
///
/// Source: "Request message" of the extension, "Size constraints".
fn is_huge(request: &Request, agreement: &Agreement) -> bool {
    let limit = agreement.facts.max_payload_bytes.max(MAX_PAYLOAD_BYTES);
    agreement.headers == Headers::Extended
        && payload_bytes(request, agreement.headers) > u64::from(limit)
}

/// Whether it is a BLOCK_STATUS that names the contexts to tell of.
fn is_filtered(request: &Request, agreement: &Agreement) -> bool {
    let asks = request.command == command::BLOCK_STATUS && request.flags & flag::PAYLOAD_LEN != 0;
    asks && agreement.filters_status()
}

/// The length of the payload, where it can be one. Longer than the list of all contexts it cannot.
fn filter_bytes(request: &Request, agreement: &Agreement) -> Result<u32, Refusal> {
    check_flags(request, agreement)?;
    let longest = FILTER_HEAD_BYTES + FILTER_ID_BYTES * agreement.contexts.len() as u64;
    let is_list = request.len.is_multiple_of(FILTER_ID_BYTES);
    if !is_list || !(FILTER_HEAD_BYTES..=longest).contains(&request.len) {
        return Err(Refusal::Filter);
    }
    u32::try_from(request.len).map_err(|_| Refusal::Filter)
}

fn check_flags(request: &Request, agreement: &Agreement) -> Result<(), Refusal> {
    let allowed = allowed_flags(request.command, agreement).ok_or(Refusal::UnknownCommand)?;
    if request.flags & !allowed != 0 { Err(Refusal::Flags) } else { Ok(()) }
}

fn command(request: &Request, agreement: &Agreement) -> Result<Command, Refusal> {
    check_flags(request, agreement)?;
    let facts = &agreement.facts;
    let has = |bit| request.flags & bit != 0;
    let durability = if has(flag::FUA) { Durability::Durable } else { Durability::Deferred };
    let range = || within(request, facts.size_bytes).ok_or(Refusal::PastEnd);
    let is_long = request.len > u64::from(facts.max_payload_bytes);
    let writable = || if facts.read_only { Err(Refusal::ReadOnly) } else { Ok(()) };
    let offered = |bit| if facts.withheld & bit != 0 { Err(Refusal::NotOffered) } else { Ok(()) };
    let write_range = || within(request, facts.size_bytes).ok_or(Refusal::WritePastEnd);
    Ok(match request.command {
        command::READ => {
            let range = range()?;
            if is_long {
                let chunks = agreement.headers.has_chunks();
                return Err(if chunks { Refusal::LongRead } else { Refusal::TooLong });
            }
            Command::Read { range, whole: has(flag::DF) }
        }
        command::WRITE => {
            writable()?;
            let range = write_range()?;
            if is_long {
                return Err(Refusal::TooLong);
            }
            Command::Write { range, durability }
        }
        command::FLUSH if request.offset != 0 || request.len != 0 => {
            return Err(Refusal::FlushRange);
        }
        command::FLUSH => {
            offered(told::SEND_FLUSH)?;
            Command::Flush
        }
        command::TRIM => {
            writable()?;
            offered(told::SEND_TRIM)?;
            Command::Trim { range: range()?, durability }
        }
        command::CACHE => Command::Cache { range: range()? },
        command::WRITE_ZEROES => {
            writable()?;
            offered(told::SEND_WRITE_ZEROES)?;
            let mode =
                ZeroMode { keep_allocated: has(flag::NO_HOLE), fast_only: has(flag::FAST_ZERO) };
            Command::WriteZeroes { range: write_range()?, mode, durability }
        }
        command::BLOCK_STATUS => {
            if agreement.contexts.is_empty() {
                return Err(Refusal::NoContext);
            }
            let range = range()?;
            if range.is_empty() {
                return Err(Refusal::EmptyStatus);
            }
            Command::BlockStatus { range, one: has(flag::REQ_ONE) }
        }
        _ => return Err(Refusal::UnknownCommand),
    })
}

/// The flags that a command may carry; `None` for a command that is not known. Where FUA was offered, it is legal on
/// every one. A flag that the export withholds is none.
fn allowed_flags(command: u16, agreement: &Agreement) -> Option<u16> {
    let own = match command {
        command::READ if agreement.headers.has_chunks() => flag::DF,
        command::WRITE if agreement.headers == Headers::Extended => flag::PAYLOAD_LEN,
        command::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
        command::BLOCK_STATUS if agreement.filters_status() => flag::REQ_ONE | flag::PAYLOAD_LEN,
        command::BLOCK_STATUS => flag::REQ_ONE,
        command::READ | command::WRITE | command::FLUSH | command::TRIM | command::CACHE => 0,
        _ => return None,
    };
    let needs = [
        (flag::FUA, told::SEND_FUA),
        (flag::DF, told::SEND_DF),
        (flag::FAST_ZERO, told::SEND_FAST_ZERO | told::SEND_WRITE_ZEROES),
    ];
    let is_withheld = |bits| agreement.facts.withheld & bits != 0;
    let withheld = needs.iter().filter(|(_, bits)| is_withheld(*bits));
    Some(withheld.fold(own | flag::FUA, |allowed, (flag, _)| allowed & !flag))
}

/// The request's range, where it lies inside the export. The end may pass 2^64 in what the client sent.
fn within(request: &Request, size_bytes: u64) -> Option<ByteRange> {
    let range = ByteRange::new(request.offset, request.len)?;
    (range.end() <= size_bytes).then_some(range)
}

#[cfg(test)]
mod tests;
