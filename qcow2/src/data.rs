//! The bytes of guest data on the host: in the image file or the data file, encrypted or not. Where they lie is told
//! by the core; metadata does not pass here.

use block::{BufferPool, ByteRange, Hold, HostError};
use bytes::Bytes;

use crate::cipher::CIPHER_SECTOR_BYTES;
use crate::image::Live;
use crate::units::{HostOffset, index};

/// Reads guest data from `range` of the file that holds it; zeros behind its end, where nothing is encrypted.
pub(crate) async fn read_data(live: &Live, range: ByteRange) -> Result<Bytes, HostError> {
    let file = live.data.as_ref().unwrap_or(&live.file);
    let Some(cipher) = &live.cipher else { return file.read(range).await };
    let wide = range.widen(CIPHER_SECTOR_BYTES);
    let sealed = file.read(wide).await?;
    let mut buffer = BufferPool::shared().get_now(sealed.len());
    buffer.copy_from_slice(&sealed);
    cipher.decrypt(HostOffset(wide.start()), &mut buffer);
    let skip = index(range.start() - wide.start());
    Ok(buffer.freeze().slice(skip..skip + index(range.len())))
}

/// Writes guest data at `at` of the file that holds it. Where [`needs_whole_sectors`] says so, the caller keeps
/// everybody else away from the sectors at the edges.
pub(crate) async fn write_data(
    live: &Live,
    at: HostOffset,
    bytes: Bytes,
    hold: &Hold,
) -> Result<(), HostError> {
    let file = live.data.as_ref().unwrap_or(&live.file);
    let Some(cipher) = &live.cipher else { return file.write(at.0, bytes, hold.clone()).await };
    let range = ByteRange::between(at.0, at.0.saturating_add(bytes.len() as u64));
    let wide = range.widen(CIPHER_SECTOR_BYTES);
    // Never waits: the request that this belongs to has been admitted already.
    let mut buffer = BufferPool::shared().get_now(index(wide.len()));
    if wide != range {
        for edge in [wide.start(), wide.end() - CIPHER_SECTOR_BYTES] {
            let sector = ByteRange::between(edge, edge + CIPHER_SECTOR_BYTES);
            let place = index(edge - wide.start())..index(sector.end() - wide.start());
            buffer[place].copy_from_slice(&read_data(live, sector).await?);
        }
    }
    let skip = index(range.start() - wide.start());
    buffer[skip..][..bytes.len()].copy_from_slice(&bytes);
    cipher.encrypt(HostOffset(wide.start()), &mut buffer);
    file.write(wide.start(), buffer.freeze(), hold.clone()).await
}

/// Makes `range` of the data file read as zeros; `keeps` keeps or takes space for it. Not for encrypted data.
pub(crate) async fn zero_data(
    live: &Live,
    range: ByteRange,
    keeps: bool,
    hold: &Hold,
) -> Result<(), HostError> {
    let file = live.data.as_ref().unwrap_or(&live.file);
    if !keeps && file.punch(range, hold.clone()).await? {
        return Ok(());
    }
    file.write_zeroes(range, hold.clone()).await
}

/// Whether a write to `range` (of guest or host: they agree within a cluster) reads the sectors at its edges first.
pub(crate) fn needs_whole_sectors(live: &Live, range: ByteRange) -> bool {
    live.cipher.is_some() && range.widen(CIPHER_SECTOR_BYTES) != range
}
