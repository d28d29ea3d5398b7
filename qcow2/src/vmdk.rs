//! VMDK images as read-only devices: a thin adapter around the library that knows the format. Which of its extents may
//! be opened is checked here, before the library opens them; deltas over a parent are refused.

use std::io::{self, Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use block::{
    BlockDevice, BufferPool, ByteRange, DeviceError, Durability, Engine, Extent, HostError,
    HostFile, HostOp, Limits, MAX_EXTENTS, Segment, Segments, ZeroMode, try_join_all,
};
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use vmdk::VmdkFileReader;

use crate::backing::Trail;
use crate::error::{Error, VmdkError};
use crate::open::OpenOptions;
use crate::units::{SECTOR_BYTES, index};

/// The longest text descriptor that is read, in bytes.
const MAX_DESCRIPTOR_BYTES: u64 = 1 << 20;
/// How many requests one image serves at once, each through a reader of its own.
const READERS: u32 = 4;
/// The largest piece that one reader reads at once, in bytes.
const READ_BYTES: u64 = 1 << 20;
/// How many grain tables a reader may keep in memory: 32 MiB. One with more is replaced.
const MAX_CACHED_TABLES: usize = 16384;
/// How many grains one question about extents looks at.
const MAX_PROBES: u64 = 1 << 16;
/// What a descriptor without a parent says.
const NO_PARENT: u32 = 0xffff_ffff;
/// The flag of a sparse extent whose grains are compressed, and where flags are.
const COMPRESSED: u32 = 1 << 16;

/// A VMDK image, open for reading.
///
/// Sparse, flat, split and stream-optimised images are read. Extents must be regular files that obey
/// [`OpenOptions::references`]; all files are locked as QEMU does.
pub struct Vmdk {
    shared: Arc<Shared>,
    size_bytes: u64,
    /// The unit of allocation in bytes; 0 where all is allocated.
    grain_bytes: u64,
}

struct Shared {
    path: PathBuf,
    idle: Mutex<Vec<VmdkFileReader>>,
    places: Arc<Semaphore>,
    /// Held for their locks.
    files: Mutex<Vec<HostFile>>,
}

impl Vmdk {
    /// Opens an image. [`OpenOptions::read_only`] is taken as set.
    ///
    /// # Errors
    /// [`Error::Vmdk`] for what is broken or not supported, [`Error::Reference`] for an extent that may not be opened,
    /// [`Error::Host`].
    pub async fn open(path: &Path, options: &OpenOptions) -> Result<Self, Error> {
        let trail = Trail::start(path, &options.references)?;
        Self::open_on_trail(path, options, trail).await
    }

    pub(crate) async fn open_on_trail(
        path: &Path,
        options: &OpenOptions,
        trail: Trail,
    ) -> Result<Self, Error> {
        let options = options.to_read();
        let file = options.open_file(path).await?;
        let trail = trail.enter(path, file.id())?;
        let start = file.read(ByteRange::between(0, file.len().min(MAX_DESCRIPTOR_BYTES))).await?;
        if start.first() == Some(&b'#') && file.len() > MAX_DESCRIPTOR_BYTES {
            return Err(refused(path, VmdkError::LongDescriptor(file.len())));
        }
        let mut files = vec![file];
        let owned = path.to_owned();
        let names = on_file(path, move || VmdkFileReader::extent_dependencies(&owned)).await?;
        for extent in &names {
            // The library tells where extents are, not how the descriptor spells them.
            let extent = std::path::absolute(extent)
                .map_err(|source| Error::Path { path: extent.clone(), source })?;
            let place = trail.place(path, extent.as_os_str().as_encoded_bytes())?;
            let file = place.open(&options).await?;
            check_extent(path, &file).await?;
            files.push(file);
        }
        let owned = path.to_owned();
        let mut reader = on_file(path, move || VmdkFileReader::open_path(&owned)).await?;
        let (size_bytes, grain_bytes) = check(path, &start, names.is_empty(), &mut reader)?;
        let shared = Shared {
            path: path.to_owned(),
            idle: Mutex::new(vec![reader]),
            places: Arc::new(Semaphore::new(index(u64::from(READERS)))),
            files: Mutex::new(files),
        };
        Ok(Self { shared: Arc::new(shared), size_bytes, grain_bytes })
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Runs `work` on a thread for blocking calls, with a reader that nobody else has.
    async fn with_reader<T: Send + 'static>(
        &self,
        range: ByteRange,
        work: impl FnOnce(&mut VmdkFileReader) -> io::Result<T> + Send + 'static,
    ) -> Result<T, DeviceError> {
        let places = Arc::clone(&self.shared.places);
        let place = places.acquire_owned().await.map_err(|_| DeviceError::Closed)?;
        let shared = Arc::clone(&self.shared);
        let done = Engine::shared().run(move || {
            let _place = place;
            let idle = shared.idle.lock().pop();
            let mut reader = match idle {
                Some(reader) => reader,
                None => VmdkFileReader::open_path(&shared.path).map_err(io::Error::other)?,
            };
            let done = caught(|| work(&mut reader))?;
            if reader.gt_cache_size() <= MAX_CACHED_TABLES {
                shared.idle.lock().push(reader);
            }
            done
        });
        let failed =
            |source| HostError { path: self.shared.path.clone(), op: HostOp::Read, range, source };
        Ok(done.await.and_then(|done| done).map_err(failed)?)
    }

    async fn read_piece(&self, range: ByteRange) -> Result<Segments, DeviceError> {
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
}

#[async_trait]
impl BlockDevice for Vmdk {
    fn limits(&self) -> Limits {
        Limits {
            size_bytes: self.size_bytes,
            read_only: true,
            preferred_bytes: 1 << 16,
            can_discard: false,
            fast_zeroes: false,
        }
    }

    async fn read(&self, range: ByteRange) -> Result<Segments, DeviceError> {
        self.limits().check_read(range)?;
        let reads = range.pieces(READ_BYTES).map(|piece| self.read_piece(piece));
        let mut all = Segments::default();
        for segments in try_join_all(reads).await? {
            all.extend(segments);
        }
        Ok(all)
    }

    async fn write(&self, _: u64, _: Bytes, _: Durability) -> Result<(), DeviceError> {
        Err(DeviceError::ReadOnly)
    }

    async fn write_zeroes(
        &self,
        _: ByteRange,
        _: ZeroMode,
        _: Durability,
    ) -> Result<(), DeviceError> {
        Err(DeviceError::ReadOnly)
    }

    async fn discard(&self, _: ByteRange, _: Durability) -> Result<(), DeviceError> {
        Err(DeviceError::ReadOnly)
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, DeviceError> {
        self.limits().check_read(range)?;
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let grain = self.grain_bytes;
        self.with_reader(range, move |reader| stretches(reader, range, grain, MAX_PROBES)).await
    }

    async fn close(&self) -> Result<(), DeviceError> {
        if let Ok(all) = self.shared.places.acquire_many(READERS).await {
            self.shared.places.close();
            drop(all);
            self.shared.idle.lock().clear();
            self.shared.files.lock().clear();
        }
        Ok(())
    }
}

/// What is allocated of `range`, looking at `probes` grains at most.
fn stretches(
    reader: &mut VmdkFileReader,
    range: ByteRange,
    grain: u64,
    probes: u64,
) -> io::Result<Vec<Extent>> {
    if grain == 0 {
        return Ok(vec![Extent { range, allocated: true, zero: false }]);
    }
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

/// The size of the disk and of a grain in bytes, if all that the image says agrees.
fn check(
    path: &Path,
    start: &[u8],
    is_one_file: bool,
    reader: &mut VmdkFileReader,
) -> Result<(u64, u64), Error> {
    if reader.parent_cid() != NO_PARENT {
        return Err(refused(path, VmdkError::Parent));
    }
    let size_bytes = reader.virtual_disk_size();
    if size_bytes > i64::MAX.unsigned_abs() {
        return Err(refused(path, VmdkError::Size(size_bytes)));
    }
    // The library leaves out lines that it does not understand: the disk would be shorter, and shifted.
    if start.first() == Some(&b'#') {
        let promised = extent_lines_bytes(&String::from_utf8_lossy(start));
        if promised != Some(size_bytes) {
            return Err(refused(path, VmdkError::Extents { size_bytes }));
        }
    } else if !is_one_file {
        return Err(refused(path, VmdkError::Extents { size_bytes }));
    }
    Ok((size_bytes, reader.info().grain_size_bytes))
}

/// The bytes of the disk that all extent lines of a descriptor, known or not, add up to.
fn extent_lines_bytes(descriptor: &str) -> Option<u64> {
    let mut sectors: u64 = 0;
    for line in descriptor.lines() {
        let mut words = line.split_whitespace();
        if let (Some("RW" | "RDONLY" | "NOACCESS"), Some(count)) = (words.next(), words.next()) {
            sectors = sectors.checked_add(count.parse().ok()?)?;
        }
    }
    sectors.checked_mul(SECTOR_BYTES)
}

/// Refuses what the library would take for something else: compressed grains in one extent of several.
async fn check_extent(image: &Path, file: &HostFile) -> Result<(), Error> {
    let head = file.read(ByteRange::between(0, file.len().min(SECTOR_BYTES))).await?;
    let flags = head.get(8..12).and_then(|flags| flags.first_chunk());
    let flags = flags.map_or(0, |flags| u32::from_le_bytes(*flags));
    if head.starts_with(b"KDMV") && flags & COMPRESSED != 0 {
        return Err(refused(image, VmdkError::CompressedExtent(file.path().to_owned())));
    }
    Ok(())
}

/// Runs a call of the library that opens files.
async fn on_file<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> Result<T, vmdk::VmdkError> + Send + 'static,
) -> Result<T, Error> {
    let failed = |source: io::Error| refused(path, VmdkError::Library(Box::new(source)));
    let done = Engine::shared().run(|| caught(work)).await.map_err(failed)?;
    match done.map_err(failed)? {
        Ok(answer) => Ok(answer),
        Err(source) => Err(refused(path, VmdkError::Library(Box::new(source)))),
    }
}

/// The library reads what strangers wrote: a panic in it is one more way of saying that an image is broken.
fn caught<T>(work: impl FnOnce() -> T) -> io::Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "the VMDK library panicked"))
}

fn refused(path: &Path, what: VmdkError) -> Error {
    Error::Vmdk { file: path.to_owned(), what }
}
