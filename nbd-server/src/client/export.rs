//! What a client knows of an export, as the negotiation left it. Plain data: nothing here asks the server.

use block::ByteRange;

use crate::wire::{Headers, MAX_PAYLOAD_BYTES, transmission_flag};

/// An export as [`super::NbdDevice::list`] finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportListing {
    /// Its name; the default export's is empty.
    pub name: String,
    /// What the server says about it to people; often empty.
    pub description: String,
}

/// Block size constraints in bytes ("Block size constraints"); all are powers of two here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Requests are multiples of this.
    pub minimum: u32,
    /// Requests that are multiples of this are fast.
    pub preferred: u32,
    /// The longest payload.
    pub maximum: u32,
}

impl Default for BlockSizes {
    /// What holds for a server that says nothing.
    fn default() -> Self {
        Self { minimum: 1, preferred: 4096, maximum: MAX_PAYLOAD_BYTES }
    }
}

/// What was negotiated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// The name that was asked for.
    pub name: String,
    /// The size in bytes.
    pub size_bytes: u64,
    /// [`transmission_flag`] bits.
    pub flags: u16,
    /// The server's block sizes, or the defaults.
    pub block_sizes: BlockSizes,
    /// The headers that both sides use.
    pub headers: Headers,
    /// The names of the meta contexts that the server granted.
    pub contexts: Vec<String>,
}

impl ExportInfo {
    /// Whether every bit of `flag` is set.
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag == flag
    }

    /// What another connection sees differently, if anything.
    pub(super) fn difference(&self, other: &Self) -> Option<&'static str> {
        let differences = [
            (self.size_bytes != other.size_bytes, "size"),
            (self.flags != other.flags, "set of flags"),
            (self.block_sizes != other.block_sizes, "block size"),
            (self.contexts != other.contexts, "set of meta contexts"),
            (self.headers != other.headers, "kind of headers"),
        ];
        differences.into_iter().find_map(|(is_different, what)| is_different.then_some(what))
    }

    /// Whether a BLOCK_STATUS may choose among the contexts.
    pub(super) fn filters_status(&self) -> bool {
        self.headers == Headers::Extended && self.has(transmission_flag::BLOCK_STATUS_PAYLOAD)
    }

    /// Whether the export refuses writes.
    pub fn is_read_only(&self) -> bool {
        self.has(transmission_flag::READ_ONLY)
    }
}

/// A run of bytes with the same flags in one meta context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// Where it lies on the export.
    pub range: ByteRange,
    /// The context's flags; with the headers before the extended ones, 32 bits at most.
    pub flags: u64,
}
