//! What stands for the algorithms in a build without the feature `compression`. Whoever asks for them looks at
//! [`super::CAN_COMPRESS`] first and refuses by name.

use crate::codec::Compression;
use crate::error::Corruption;

/// Reads no stream.
pub(crate) fn decompress(
    compression: Compression,
    _input: &[u8],
    _into: &mut [u8],
) -> Result<(), Corruption> {
    Err(Corruption::CompressedGarbage { compression })
}

/// Makes no stream: a cluster stays as it is.
pub(crate) fn compress(_kind: Compression, _level: u8, _cluster: &[u8]) -> Option<Vec<u8>> {
    None
}
