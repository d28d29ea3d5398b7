//! LIST_META_CONTEXT and SET_META_CONTEXT: parsing queries and matching them with what an export offers. What a
//! context says about a range is not known here.
//!
//! Source: "NBD_OPT_LIST_META_CONTEXT", "NBD_OPT_SET_META_CONTEXT", "Metadata querying".

use bytes::BufMut;

use super::answer::Answer;
use super::directory::{MetaContext, SelectedContext};
use super::name::{self, Malformed};
use crate::wire::{self, Fields};

/// What either option asks: an export, and queries.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Queries<'a> {
    pub(super) export: &'a str,
    queries: Vec<&'a str>,
}

/// Parses the data of either option. The number of queries is bounded by the bytes that are there, whatever the
/// count says.
pub(super) fn parse(data: &[u8]) -> Result<Queries<'_>, Malformed> {
    let mut fields = Fields(data);
    let export = name::sized(&mut fields)?;
    let count = fields.u32().ok_or(Malformed::Truncated)?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(name::sized(&mut fields)?);
    }
    fields.finish().ok_or(Malformed::Trailing)?;
    Ok(Queries { export, queries })
}

impl Queries<'_> {
    /// What LIST shows: everything without a query, else what some query names, where a bare `base:` or `qemu:` names
    /// the whole namespace, and `qemu:dirty-bitmap:` all of that kind in it.
    /// None of them has a number.
    pub(super) fn list(&self, offered: &[MetaContext]) -> Vec<SelectedContext> {
        let wanted = |context: &MetaContext| {
            self.queries.is_empty()
                || self.queries.iter().any(|query| {
                    *query == context.name() || groups(context.name()).any(|group| group == *query)
                })
        };
        let listed = |context: &MetaContext| SelectedContext { id: 0, context: context.clone() };
        offered.iter().filter(|context| wanted(context)).map(listed).collect()
    }

    /// What SET selects: only full names, each once, numbered from 1.
    pub(super) fn select(&self, offered: &[MetaContext]) -> Vec<SelectedContext> {
        (1..)
            .zip(offered)
            .filter(|(_, context)| self.queries.contains(&context.name()))
            .map(|(id, context)| SelectedContext { id, context: context.clone() })
            .collect()
    }
}

/// The names that stand for a context among others: its namespace, and the kind in it where there is one, both with
/// their colons. What follows is a leaf, which may hold colons of its own.
fn groups(name: &str) -> impl Iterator<Item = &str> {
    name.match_indices(':').take(2).map(|(at, _)| &name[..=at])
}

/// One reply about one context.
pub(super) fn tell(id: u32, context: &MetaContext, answer: &mut Answer<'_>) {
    answer.reply(wire::reply::META_CONTEXT, |out| {
        out.put_u32(id);
        out.put_slice(context.name().as_bytes());
    });
}
