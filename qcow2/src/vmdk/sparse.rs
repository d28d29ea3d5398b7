//! One file with grains, as the library for VMDK reads it. It is given files that are open, and never a path: what may
//! be opened is decided before, once.

use std::io::{self, Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use block::{BufferPool, ByteRange, Engine, Extent, FileReader, HostFile, MAX_EXTENTS, Segment};
use block::{HostError, HostOp, Segments};
use parking_lot::Mutex;
use vmdk::VmdkReader;

use super::refused;
use crate::error::{Error, VmdkError};
use crate::units::{SECTOR_BYTES, index};

/// How many grain tables a reader may keep in memory: 32 MiB. One with more is replaced.
const MAX_CACHED_TABLES: usize = 16384;

type Reader = VmdkReader<io::BufReader<FileReader>>;

/// A file with grains.
pub(super) struct Sparse {
    file: HostFile,
    idle: Mutex<Vec<Reader>>,
    /// The bytes of the disk that it holds.
    pub bytes: u64,
    /// The unit of allocation in bytes.
    pub grain_bytes: u64,
    /// What its own descriptor, if it has one, says of a parent.
    pub parent: u32,
}

impl Sparse {
    /// Reads the header and the grain directory of `file`, part of the image in `image`.
    pub(super) async fn open(image: &Path, file: HostFile) -> Result<Arc<Self>, Error> {
        let failed = |source: io::Error| refused(image, VmdkError::Library(Box::new(source)));
        let source = file.clone();
        let done = Engine::shared().run(move || caught(|| reader(&source))).await;
        let reader = done.and_then(|done| done).and_then(|done| done).map_err(failed)?;
        let (bytes, grain_bytes) = (reader.virtual_disk_size(), reader.info().grain_size_bytes);
        if bytes > i64::MAX.unsigned_abs() {
            return Err(refused(image, VmdkError::Size(bytes)));
        }
        if bytes == 0 || grain_bytes == 0 {
            return Err(refused(image, VmdkError::Extents { size_bytes: bytes }));
        }
        let parent = reader.parent_cid();
        Ok(Arc::new(Self { file, idle: Mutex::new(vec![reader]), bytes, grain_bytes, parent }))
    }

    /// What is allocated of `range`, looking at `probes` grains at most.
    pub(super) async fn extents(
        self: &Arc<Self>,
        range: ByteRange,
        probes: u64,
    ) -> Result<Vec<Extent>, HostError> {
        let grain = self.grain_bytes;
        self.with_reader(range, move |reader| stretches(reader, range, grain, probes)).await
    }

    /// The bytes of `range`, which should be short: it is read in one call.
    pub(super) async fn read(self: &Arc<Self>, range: ByteRange) -> Result<Segments, HostError> {
        let grain = self.grain_bytes;
        self.with_reader(range, move |reader| {
            let mut segments = Segments::default();
            for stretch in stretches(reader, range, grain, u64::MAX)? {
                if !stretch.allocated {
                    segments.push(Segment::Zero(stretch.range.len()));
                    continue;
                }
                // Never waits: the request that this belongs to has been admitted already.
                let mut buffer = BufferPool::shared().get_now(index(stretch.range.len()));
                reader.seek(SeekFrom::Start(stretch.range.start()))?;
                reader.read_exact(&mut buffer)?;
                segments.push(Segment::Data(buffer.freeze()));
            }
            Ok(segments)
        })
        .await
    }

    /// Forgets its readers, which hold the file open.
    pub(super) fn close(&self) {
        self.idle.lock().clear();
    }

    /// Runs `work` on a thread for blocking calls, with a reader that nobody else has.
    async fn with_reader<T: Send + 'static>(
        self: &Arc<Self>,
        range: ByteRange,
        work: impl FnOnce(&mut Reader) -> io::Result<T> + Send + 'static,
    ) -> Result<T, HostError> {
        let sparse = Arc::clone(self);
        let done = Engine::shared().run(move || {
            let idle = sparse.idle.lock().pop();
            caught(|| {
                let mut reader = match idle {
                    Some(reader) => reader,
                    None => reader(&sparse.file)?,
                };
                let done = work(&mut reader);
                if reader.gt_cache_size() <= MAX_CACHED_TABLES {
                    sparse.idle.lock().push(reader);
                }
                done
            })?
        });
        let path = || self.file.path().to_owned();
        let failed = |source| HostError { path: path(), op: HostOp::Read, range, source };
        done.await.and_then(|done| done).map_err(failed)
    }
}

fn reader(file: &HostFile) -> io::Result<Reader> {
    let file = file.reader().ok_or(io::ErrorKind::Unsupported)?;
    VmdkReader::open(io::BufReader::new(file)).map_err(io::Error::other)
}

fn stretches(
    reader: &mut Reader,
    range: ByteRange,
    grain: u64,
    probes: u64,
) -> io::Result<Vec<Extent>> {
    let mut all: Vec<Extent> = Vec::new();
    let mut at = range.start();
    let mut probed = 0;
    while at < range.end() && probed < probes {
        let end = (at - at % grain).saturating_add(grain).min(range.end());
        let allocated = reader.is_allocated(at / SECTOR_BYTES)?;
        let full = all.len() == MAX_EXTENTS;
        match all.last_mut() {
            Some(last) if last.allocated == allocated => {
                last.range = ByteRange::between(last.range.start(), end);
            }
            _ if full => break,
            _ => {
                all.push(Extent { range: ByteRange::between(at, end), allocated, zero: !allocated })
            }
        }
        at = end;
        probed += 1;
    }
    Ok(all)
}

/// The library reads what strangers wrote: a panic in it is one more way of saying that an image is broken.
fn caught<T>(work: impl FnOnce() -> T) -> io::Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "the VMDK library panicked"))
}
