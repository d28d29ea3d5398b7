//! Strings of the protocol: UTF-8 without NUL, at most 4096 bytes. What they name is not looked at here.

use crate::wire::{Fields, MAX_STRING_BYTES};

/// Why an option's data does not parse; each has its text for the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Malformed {
    /// A length inside the option passes its end.
    Truncated,
    /// Something follows the last field.
    Trailing,
    /// A string of more than 4096 bytes.
    LongString,
    /// A string that is not UTF-8.
    NotUtf8,
    /// A string that holds a NUL.
    Nul,
}

impl Malformed {
    /// For the client's error reply.
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Truncated => "a length inside the option passes its end",
            Self::Trailing => "data follows the last field of the option",
            Self::LongString => "a string is longer than 4096 bytes",
            Self::NotUtf8 => "a string is not UTF-8",
            Self::Nul => "a string holds a NUL byte",
        }
    }
}

/// Checks a string.
pub(super) fn text(bytes: &[u8]) -> Result<&str, Malformed> {
    if bytes.len() > MAX_STRING_BYTES {
        return Err(Malformed::LongString);
    }
    if bytes.contains(&0) {
        return Err(Malformed::Nul);
    }
    std::str::from_utf8(bytes).map_err(|_| Malformed::NotUtf8)
}

/// Takes a string with its length in 32 bits before it.
pub(super) fn sized<'a>(fields: &mut Fields<'a>) -> Result<&'a str, Malformed> {
    let len = fields.u32().ok_or(Malformed::Truncated)?;
    let len = usize::try_from(len).map_err(|_| Malformed::Truncated)?;
    text(fields.take(len).ok_or(Malformed::Truncated)?)
}
