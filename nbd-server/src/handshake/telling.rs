//! Lists in answers, told piece by piece: however many exports and contexts there are, what waits to be sent is little.
//! What is in a list is decided in the file of its option.

use std::vec;

use bytes::{BufMut, BytesMut};

use super::answer::Answer;
use super::directory::{ExportDirectory, SelectedContext};
use super::meta_context;
use crate::wire::{option, reply};

/// A piece ends with the reply that makes it at least so long, in bytes.
const PIECE_BYTES: usize = 16 << 10;

/// A list of which a part may have been told.
#[derive(Debug)]
pub(super) enum Telling {
    /// Every export behind the one of this name. One that comes or goes meanwhile may be told or not.
    Exports { after: Option<String> },
    /// Contexts, for this option.
    Contexts { option: u32, left: vec::IntoIter<SelectedContext> },
}

impl Telling {
    /// Appends the next piece to `out`, and what ends the list where it is the last. What is left then, or `None`.
    pub(super) fn go_on(
        mut self,
        exports: &mut dyn ExportDirectory,
        out: &mut BytesMut,
    ) -> Option<Self> {
        let full = out.len() + PIECE_BYTES;
        let mut answer = Answer::new(self.option(), out);
        while answer.len() < full {
            if !self.tell_one(exports, &mut answer) {
                answer.ack();
                return None;
            }
        }
        Some(self)
    }

    fn option(&self) -> u32 {
        match self {
            Self::Exports { .. } => option::LIST,
            Self::Contexts { option, .. } => *option,
        }
    }

    /// Whether there was one more.
    fn tell_one(&mut self, exports: &mut dyn ExportDirectory, answer: &mut Answer<'_>) -> bool {
        match self {
            Self::Exports { after } => {
                let Some((name, description)) = exports.next(after.as_deref()) else {
                    return false;
                };
                answer.reply(reply::SERVER, |out| {
                    out.put_u32(u32::try_from(name.len()).unwrap_or(u32::MAX));
                    out.put_slice(name.as_bytes());
                    out.put_slice(description.as_bytes());
                });
                *after = Some(name);
                true
            }
            Self::Contexts { left, .. } => {
                let Some(one) = left.next() else { return false };
                meta_context::tell(one.id, &one.context, answer);
                true
            }
        }
    }
}
