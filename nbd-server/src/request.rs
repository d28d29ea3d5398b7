//! The border of the transmission phase: a request is judged once against what was negotiated, and becomes a command
//! that a device can execute as it is, or a refusal. Executing is told in the connection.
//!
//! Source: `doc/proto.md`, "Request types", "Command flags", "Error values".

use block::{ByteRange, Durability, ZeroMode};

use crate::handshake::Agreement;
use crate::wire::{Request, command, command_flag as flag, error};

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
    /// A flag that is not known, not negotiated, or not meant for this command.
    #[error("a command flag is not valid for this command on this connection")]
    Flags,
    /// A change to a read-only export.
    #[error("the export is read-only")]
    ReadOnly,
    /// A READ or WRITE of more than was told to the client.
    #[error("the request is longer than the maximum block size")]
    TooLong,
    /// An unfragmented READ of more than was told to the client.
    #[error("the read is too long to be answered in one piece")]
    TooLongForOnePiece,
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
            Self::TooLongForOnePiece => error::EOVERFLOW,
            Self::ShuttingDown => error::ESHUTDOWN,
            Self::UnknownCommand
            | Self::Flags
            | Self::TooLong
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
    /// Answer with an error.
    Refuse(Refusal),
    /// The client takes its leave: finish what is in flight, then close.
    Disconnect,
}

/// How many bytes follow the header on the wire: those of a WRITE, whatever becomes of it; no other command has any.
pub fn payload_bytes(request: &Request) -> u32 {
    if request.command == command::WRITE { request.len } else { 0 }
}

/// Judges a request. When several rules are broken, the first in the order command, flags, read-only, length, bounds
/// is told.
pub fn judge(request: &Request, agreement: &Agreement) -> Verdict {
    // Nothing else in a disconnect matters.
    if request.command == command::DISC {
        return Verdict::Disconnect;
    }
    match command(request, agreement) {
        Ok(command) => Verdict::Execute(command),
        Err(refusal) => Verdict::Refuse(refusal),
    }
}

fn command(request: &Request, agreement: &Agreement) -> Result<Command, Refusal> {
    let allowed = allowed_flags(request.command, agreement).ok_or(Refusal::UnknownCommand)?;
    if request.flags & !allowed != 0 {
        return Err(Refusal::Flags);
    }
    let facts = &agreement.facts;
    let has = |bit| request.flags & bit != 0;
    let durability = if has(flag::FUA) { Durability::Durable } else { Durability::Deferred };
    let range = || within(request, facts.size_bytes).ok_or(Refusal::PastEnd);
    let payload =
        |too_long| if request.len > facts.max_payload_bytes { Err(too_long) } else { Ok(()) };
    let writable = || if facts.read_only { Err(Refusal::ReadOnly) } else { Ok(()) };
    let write_range = || within(request, facts.size_bytes).ok_or(Refusal::WritePastEnd);
    Ok(match request.command {
        command::READ => {
            let whole = has(flag::DF);
            payload(if whole { Refusal::TooLongForOnePiece } else { Refusal::TooLong })?;
            Command::Read { range: range()?, whole }
        }
        command::WRITE => {
            writable()?;
            payload(Refusal::TooLong)?;
            Command::Write { range: write_range()?, durability }
        }
        command::FLUSH if request.offset != 0 || request.len != 0 => {
            return Err(Refusal::FlushRange);
        }
        command::FLUSH => Command::Flush,
        command::TRIM => {
            writable()?;
            Command::Trim { range: range()?, durability }
        }
        command::CACHE => Command::Cache { range: range()? },
        command::WRITE_ZEROES => {
            writable()?;
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

/// The flags that a command may carry; `None` for a command that is not known. FUA was offered, so it is legal on
/// every one.
fn allowed_flags(command: u16, agreement: &Agreement) -> Option<u16> {
    let own = match command {
        command::READ if agreement.structured => flag::DF,
        command::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
        command::BLOCK_STATUS => flag::REQ_ONE,
        command::READ | command::WRITE | command::FLUSH | command::TRIM | command::CACHE => 0,
        _ => return None,
    };
    Some(own | flag::FUA)
}

/// The request's range, where it lies inside the export. The end may pass 2^64 in what the client sent.
fn within(request: &Request, size_bytes: u64) -> Option<ByteRange> {
    let range = ByteRange::new(request.offset, u64::from(request.len))?;
    (range.end() <= size_bytes).then_some(range)
}

#[cfg(test)]
mod tests;
