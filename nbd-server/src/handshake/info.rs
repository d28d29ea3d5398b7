//! INFO and GO: one parser, one set of replies, so that the two cannot disagree. Entering transmission after GO is the
//! machine's step.
//!
//! Source: "NBD_OPT_INFO", "NBD_OPT_GO".

use bytes::BufMut;

use super::Agreement;
use super::answer::Answer;
use super::name::{self, Malformed};
use crate::wire::{self, Fields, info};

/// What INFO or GO asks.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Question<'a> {
    pub(super) name: &'a str,
    wants_name: bool,
    wants_description: bool,
    wants_block_size: bool,
}

/// Parses the data of INFO and GO. Information types not known here are ignored.
pub(super) fn parse(data: &[u8]) -> Result<Question<'_>, Malformed> {
    let mut fields = Fields(data);
    let name = name::sized(&mut fields)?;
    let count = fields.u16().ok_or(Malformed::Truncated)?;
    let mut question =
        Question { name, wants_name: false, wants_description: false, wants_block_size: false };
    for _ in 0..count {
        match fields.u16().ok_or(Malformed::Truncated)? {
            info::NAME => question.wants_name = true,
            info::DESCRIPTION => question.wants_description = true,
            info::BLOCK_SIZE => question.wants_block_size = true,
            _ => {}
        }
    }
    fields.finish().ok_or(Malformed::Trailing)?;
    Ok(question)
}

/// Answers with what was asked, as it would be agreed on now; size and flags always.
pub(super) fn tell(question: &Question<'_>, agreement: &Agreement, answer: &mut Answer<'_>) {
    let facts = &agreement.facts;
    answer.reply(wire::reply::INFO, |out| {
        out.put_u16(info::EXPORT);
        out.put_u64(facts.size_bytes);
        out.put_u16(agreement.transmission_flags());
    });
    if question.wants_name {
        answer.reply(wire::reply::INFO, |out| {
            out.put_u16(info::NAME);
            out.put_slice(facts.name.as_bytes());
        });
    }
    if question.wants_description && !facts.description.is_empty() {
        answer.reply(wire::reply::INFO, |out| {
            out.put_u16(info::DESCRIPTION);
            out.put_slice(facts.description.as_bytes());
        });
    }
    if question.wants_block_size {
        let (minimum, preferred, maximum) = facts.block_sizes();
        answer.reply(wire::reply::INFO, |out| {
            out.put_u16(info::BLOCK_SIZE);
            out.put_u32(minimum);
            out.put_u32(preferred);
            out.put_u32(maximum);
        });
    }
}
