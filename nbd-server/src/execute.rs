//! Executing a judged command on a device and wording the answer. When and where it runs is decided by the connection.

use block::{ByteRange, DeviceError, ErrorKind};
use bytes::Bytes;

use crate::block_status::Descriptors;
use crate::export::Attachment;
use crate::handshake::{MetaContext, SelectedContext};
use crate::refusal::Refusal;
use crate::reply::Answer;
use crate::request::Command;
use crate::wire::error;

/// Executes `command`; `payload` is that of a WRITE and empty otherwise.
pub(crate) async fn execute(
    attachment: &Attachment,
    command: Command,
    payload: Bytes,
    contexts: &[SelectedContext],
    status_extents: usize,
) -> Answer {
    let device = &*attachment.device;
    if !matches!(
        command,
        Command::Read { .. } | Command::Cache { .. } | Command::BlockStatus { .. }
    ) {
        attachment.used();
    }
    let done = match command {
        Command::Read { range, whole } => match device.read(range).await {
            Ok(segments) if segments.len() == range.len() => {
                return Answer::Data { offset: range.start(), segments, whole };
            }
            Ok(_) => return broken("the device read another length than it was asked for"),
            Err(error) => Err(error),
        },
        Command::Write { range, durability } => {
            device.write(range.start(), payload, durability).await
        }
        Command::Flush => {
            let flushing = attachment.flushing();
            let flushed = device.flush().await;
            if flushed.is_ok() {
                attachment.flushed(flushing);
            }
            flushed
        }
        Command::Trim { range, durability } => device.discard(range, durability).await,
        // Data is not cached above the device; what can be fetched ahead is the map of where it lies.
        Command::Cache { range } if range.is_empty() => Ok(()),
        Command::Cache { range } => device.extents(range).await.map(drop),
        Command::WriteZeroes { range, mode, durability } => {
            device.write_zeroes(range, mode, durability).await
        }
        Command::BlockStatus { range, one } => {
            let limit = if one { 1 } else { status_extents };
            return block_status(attachment, range, limit, contexts).await;
        }
    };
    match done {
        Ok(()) => Answer::Done,
        Err(error) => failed(&error, command),
    }
}

/// The most often that one request asks for extents in each context. A range of many terabytes can have any number of
/// them behind one descriptor; a client that is told less asks again from there.
const STATUS_ASKS: usize = 64;

/// Asks the device, or what else knows a context, until the range is covered, the reply is full or enough was asked.
/// Every context is told the same way.
async fn block_status(
    attachment: &Attachment,
    range: ByteRange,
    limit: usize,
    contexts: &[SelectedContext],
) -> Answer {
    let mut replies = Vec::with_capacity(contexts.len());
    for selected in contexts {
        let mut status = Descriptors::new(range, limit);
        for _ in 0..STATUS_ASKS {
            let Some(rest) = status.rest() else { break };
            let told = match &selected.context {
                MetaContext::Allocation => {
                    let extents = attachment.device.extents(rest).await;
                    extents.map(|extents| status.push(&extents))
                }
                MetaContext::Source(name) => match attachment.export.sources.get(name) {
                    Some(source) => {
                        let extents = source.extents(rest).await;
                        extents.map(|extents| status.push_flagged(&extents))
                    }
                    None => return broken("the context is gone"),
                },
            };
            match told {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::error!(%error, %range, context = selected.context.name());
                    return broken("the device does not know its extents");
                }
                Err(error) => return failed(&error, Command::BlockStatus { range, one: false }),
            }
        }
        replies.push((selected.id, status.into_vec()));
    }
    Answer::Status(replies)
}

/// A failure of ours.
pub(crate) fn broken(text: &'static str) -> Answer {
    Answer::Failed { error: error::EIO, text: text.to_owned() }
}

/// The answer for a device's error. Its own words may name files of the host, so they go to the log only, unless it says
/// that they are for clients.
fn failed(error: &DeviceError, command: Command) -> Answer {
    let fast_only = matches!(command, Command::WriteZeroes { mode, .. } if mode.fast_only);
    let (value, text) = match error.kind() {
        ErrorKind::Invalid => (error::EINVAL, "the device finds the request invalid"),
        ErrorKind::ReadOnly => (error::EPERM, "the device is read-only"),
        ErrorKind::NoSpace => (error::ENOSPC, "no space is left for the write"),
        ErrorKind::NoMemory => (error::ENOMEM, "the server has no memory for the request"),
        ErrorKind::NotSupported if fast_only => {
            (error::ENOTSUP, "zeros would take as long as writing them")
        }
        ErrorKind::NotSupported => (error::EINVAL, "the device does not support the request"),
        ErrorKind::ShuttingDown => (error::ESHUTDOWN, "the device is closing"),
        _ => (error::EIO, "the device failed"),
    };
    let refusal = Refusal::of(error);
    let text = refusal.map_or(text, |refusal| refusal.0);
    if value == error::ENOTSUP || refusal.is_some() {
        tracing::debug!(%error, ?command, "a request was refused");
    } else {
        tracing::warn!(%error, ?command, "a request failed");
    }
    Answer::Failed { error: value, text: text.to_owned() }
}
