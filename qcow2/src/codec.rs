//! The kinds of compressed clusters. The algorithms are in `contexts`, which the feature `compression` brings; where
//! streams lie in the file is the mapping's business.

use std::fmt;

#[cfg(feature = "compression")]
mod contexts;
#[cfg(not(feature = "compression"))]
#[path = "codec/left_out.rs"]
mod contexts;

pub(crate) use contexts::{compress, decompress};

/// Whether this build can read and write compressed clusters.
pub(crate) const CAN_COMPRESS: bool = cfg!(feature = "compression");

/// The best level of deflate.
const MAX_DEFLATE_LEVEL: u8 = 9;
/// The best level of zstd that does not take more memory than a few clusters.
const MAX_ZSTD_LEVEL: u8 = 19;

/// How clusters of an image are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Raw deflate: all versions of QEMU read it.
    #[default]
    Deflate,
    /// Zstandard: faster and smaller, from QEMU 5.1 on.
    Zstd,
}

impl Compression {
    /// The value of the header's field `compression_type`.
    pub const fn type_byte(self) -> u8 {
        match self {
            Self::Deflate => 0,
            Self::Zstd => 1,
        }
    }

    /// What a header's field `compression_type` means; `None` for what no specification names.
    pub const fn from_type_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Deflate),
            1 => Some(Self::Zstd),
            _ => None,
        }
    }

    /// The name that QEMU uses, in options and in what `info` prints.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Deflate => "zlib",
            Self::Zstd => "zstd",
        }
    }

    /// The level that is used where none is asked for: what the makers of the algorithm, and QEMU, choose.
    pub const fn default_level(self) -> u8 {
        match self {
            Self::Deflate => 6,
            Self::Zstd => 3,
        }
    }

    /// The highest level.
    pub const fn max_level(self) -> u8 {
        match self {
            Self::Deflate => MAX_DEFLATE_LEVEL,
            Self::Zstd => MAX_ZSTD_LEVEL,
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(all(test, feature = "compression"))]
mod tests;
