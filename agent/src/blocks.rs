//! The unit of comparison: blocks of 64 KiB, what is known about one, and how a read piece is told apart into them.
//! No I/O.

use block::ByteRange;

/// The size of a compared block, in bytes. The last block of a disk may be shorter.
pub(crate) const BLOCK_BYTES: u64 = 64 << 10;

/// The BLAKE3-256 of the bytes of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockDigest(pub(crate) [u8; 32]);

/// What a block holds now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockState {
    /// Zeros only.
    Zero,
    /// Something else, with its digest where a comparison or a digest file needs one.
    Data(Option<BlockDigest>),
}

/// The number of blocks that a disk of `size_bytes` has.
pub(crate) const fn blocks_of(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(BLOCK_BYTES)
}

/// The bytes of block `index` on a disk of `size_bytes`; empty behind its end.
pub(crate) const fn block_range(index: u64, size_bytes: u64) -> ByteRange {
    let start = index.saturating_mul(BLOCK_BYTES);
    let end = start.saturating_add(BLOCK_BYTES);
    ByteRange::between(start, if end < size_bytes { end } else { size_bytes })
}

/// What a block with these bytes holds.
pub(crate) fn state_of(bytes: &[u8], with_digest: bool) -> BlockState {
    if block::is_zero(bytes) {
        return BlockState::Zero;
    }
    BlockState::Data(with_digest.then(|| BlockDigest(*blake3::hash(bytes).as_bytes())))
}
