//! Writing option replies. Which reply an option deserves is decided in the file of that option.

use bytes::{BufMut, BytesMut};

use crate::wire::{self, MAX_STRING_BYTES, OPTION_REPLY_BYTES};

/// Appends replies to one option.
pub(super) struct Answer<'a> {
    option: u32,
    out: &'a mut BytesMut,
}

impl<'a> Answer<'a> {
    /// Replies to `option` go to `out`.
    pub(super) fn new(option: u32, out: &'a mut BytesMut) -> Self {
        Self { option, out }
    }

    /// The bytes that wait to be sent.
    pub(super) fn len(&self) -> usize {
        self.out.len()
    }

    /// Accepts the option, or ends its list.
    pub(super) fn ack(&mut self) {
        self.reply(wire::reply::ACK, |_| {});
    }

    /// Refuses the option with a text for people. The text is ours: nothing of what the client sent is in it.
    pub(super) fn error(&mut self, kind: u32, text: &str) {
        debug_assert!(text.len() <= MAX_STRING_BYTES);
        self.reply(kind, |out| out.put_slice(text.as_bytes()));
    }

    /// One reply of `kind` with the data that `fill` appends.
    pub(super) fn reply(&mut self, kind: u32, fill: impl FnOnce(&mut BytesMut)) {
        self.out.put_u64(wire::OPTION_REPLY_MAGIC);
        self.out.put_u32(self.option);
        self.out.put_u32(kind);
        let at = self.out.len();
        self.out.put_u32(0);
        fill(self.out);
        let data = self.out.len() - at - 4;
        debug_assert_eq!(OPTION_REPLY_BYTES, 20);
        // Our replies hold at most a name and a text, each with a limit.
        let len = u32::try_from(data).unwrap_or(u32::MAX);
        if let Some(field) = self.out.get_mut(at..at + 4) {
            field.copy_from_slice(&len.to_be_bytes());
        }
    }
}
