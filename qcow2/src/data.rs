//! The bytes of guest data on the host: in the image file or the data file, encrypted or not. Where they lie is told
//! by the core; metadata does not pass here.

use std::sync::Arc;

use block::{Buffer, BufferPool, ByteRange, Hold, HostError, HostFile, on_cpu};
use bytes::Bytes;

use crate::cipher::{CIPHER_SECTOR_BYTES, Cipher};
use crate::error::Error;
use crate::image::Live;
use crate::units::{HostOffset, index};

/// How many bytes are encrypted or decrypted at once on the thread that asks for it: some 50 microseconds of work.
const CRYPT_HERE_BYTES: u64 = 64 << 10;

/// The file that holds guest data.
pub(crate) fn data_file(live: &Live) -> &HostFile {
    live.data.as_ref().unwrap_or(&live.file)
}

/// Reads guest data from `range` of the file that holds it; zeros behind its end, where nothing is encrypted.
pub(crate) async fn read_data(live: &Live, range: ByteRange) -> Result<Bytes, Error> {
    let file = data_file(live);
    let Some(cipher) = &live.cipher else { return Ok(file.read(range).await?) };
    let wide = range.widen(CIPHER_SECTOR_BYTES);
    let sealed = file.read(wide).await?;
    let mut buffer = BufferPool::shared().get_now(sealed.len());
    buffer.copy_from_slice(&sealed);
    let buffer = crypt(live, cipher, Direction::Decrypt, wide, buffer).await?;
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
) -> Result<(), Error> {
    let file = data_file(live);
    let Some(cipher) = &live.cipher else {
        return Ok(file.write(at.0, bytes, hold.clone()).await?);
    };
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
    let buffer = crypt(live, cipher, Direction::Encrypt, wide, buffer).await?;
    Ok(file.write(wide.start(), buffer.freeze(), hold.clone()).await?)
}

#[derive(Clone, Copy)]
enum Direction {
    Decrypt,
    Encrypt,
}

/// Turns whole sectors at `range` of the host into plain or cipher text: many of them on the threads for computing.
async fn crypt(
    live: &Live,
    cipher: &Arc<dyn Cipher>,
    direction: Direction,
    range: ByteRange,
    mut sectors: Buffer,
) -> Result<Buffer, Error> {
    let (cipher, at) = (Arc::clone(cipher), HostOffset(range.start()));
    let work = move || {
        match direction {
            Direction::Decrypt => cipher.decrypt(at, &mut sectors),
            Direction::Encrypt => cipher.encrypt(at, &mut sectors),
        }
        sectors
    };
    if range.len() <= CRYPT_HERE_BYTES {
        return Ok(work());
    }
    let file = || data_file(live).path().to_owned();
    on_cpu(work).await.map_err(|source| Error::Cpu { file: file(), source })
}

/// Makes `range` of the data file read as zeros; `keeps` keeps or takes space for it. Not for encrypted data.
pub(crate) async fn zero_data(
    live: &Live,
    range: ByteRange,
    keeps: bool,
    hold: &Hold,
) -> Result<(), HostError> {
    let file = data_file(live);
    if !keeps && file.punch(range, hold.clone()).await? {
        return Ok(());
    }
    file.write_zeroes(range, hold.clone()).await
}

/// Whether a write to `range` (of guest or host: they agree within a cluster) reads the sectors at its edges first.
pub(crate) fn needs_whole_sectors(live: &Live, range: ByteRange) -> bool {
    live.cipher.is_some() && range.widen(CIPHER_SECTOR_BYTES) != range
}
