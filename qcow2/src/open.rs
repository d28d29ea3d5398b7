//! Opening: reads and checks the header, the L1 table and (for writing) the refcount table, and opens the chain of
//! backing files. Which paths may be followed is decided in `backing`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use block::{BlockDevice, ByteRange, DeviceError, Engine, HostFile, Limits, RawDevice};

use crate::backing::{Found, References, Trail};
use crate::check::rebuild_dirty;
use crate::core::Core;
use crate::create::BackingFormat;
use crate::encryption::{self, DEFAULT_UNLOCK_TIME, Passphrase};
use crate::error::{Error, Fault, Feature, ReferenceError, SnapshotError};
use crate::header::{Header, MAX_L1_BYTES};
use crate::image::{Image, Live};
use crate::info::Facts;
use crate::layers::Below;
use crate::mapping::{Mapping, from_big_endian};
use crate::refcount::{RefcountWidth, Refcounts};
use crate::snapshot;
use crate::snapshots::{SnapshotTable, read_snapshots};
use crate::units::{HostOffset, Run, SECTOR_BYTES, index};

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Refuse every change.
    pub read_only: bool,
    /// Which backing files may be followed.
    pub references: References,
    /// Take QEMU's image locks, on this image and on all below it.
    pub lock: bool,
    /// Find out whether it could be opened so, without taking a lock or changing anything: see
    /// [`block::OpenOptions::rehearse`]. The image can be read.
    pub rehearse: bool,
    /// Bypass the page cache where the host can.
    pub direct: bool,
    /// What may open encrypted images, this one and those below it: each image takes the first that fits.
    pub passphrases: Vec<Passphrase>,
    /// Show the disk as this internal snapshot of the image has it: an id, or else a name. Only for reading; images
    /// below it are shown as they are now.
    pub snapshot: Option<String>,
    /// Where the external data file of the image lies, whatever the image says: a path that the caller trusts. Images
    /// below it use the names that they record.
    pub data_file: Option<PathBuf>,
    /// What carries out the I/O; that of the process otherwise.
    pub engine: Option<Engine>,
    /// How long a processor may work to try one passphrase on one key slot of an encrypted image. This machine is
    /// measured, and slots that ask for more are not tried.
    pub unlock_time: Duration,
}

impl OpenOptions {
    /// For reading: locked, direct, with backing files in the folder of the image.
    pub fn reading() -> Self {
        Self {
            read_only: true,
            references: References::Confined,
            lock: true,
            rehearse: false,
            direct: true,
            passphrases: Vec::new(),
            snapshot: None,
            data_file: None,
            engine: None,
            unlock_time: DEFAULT_UNLOCK_TIME,
        }
    }

    /// For reading and writing; otherwise as [`OpenOptions::reading`]. Backing files are never written.
    pub fn writing() -> Self {
        Self { read_only: false, ..Self::reading() }
    }

    /// The same with other rules for backing files.
    #[must_use]
    pub fn references(self, references: References) -> Self {
        Self { references, ..self }
    }

    /// The same with one more passphrase for encrypted images.
    #[must_use]
    pub fn passphrase(mut self, passphrase: Passphrase) -> Self {
        self.passphrases.push(passphrase);
        self
    }

    /// The same, showing an internal snapshot, by its id or else its name.
    #[must_use]
    pub fn snapshot(self, id_or_name: impl Into<String>) -> Self {
        Self { snapshot: Some(id_or_name.into()), ..self }
    }

    /// The same with another place for the external data file.
    #[must_use]
    pub fn data_file(self, path: impl Into<PathBuf>) -> Self {
        Self { data_file: Some(path.into()), ..self }
    }

    /// For the images below: read, as they are now.
    fn below(&self) -> Self {
        Self { read_only: true, snapshot: None, data_file: None, ..self.clone() }
    }

    /// Opens a file of the host that holds this format, for reading or writing as `read_only` says.
    pub(crate) async fn open_file(
        &self,
        path: &Path,
        format: BackingFormat,
    ) -> Result<HostFile, Error> {
        let engine = self.engine.as_ref().unwrap_or_else(|| Engine::shared());
        Ok(HostFile::open_with(engine, path, self.host(format)).await?)
    }

    /// The same for reading alone.
    pub(crate) fn to_read(&self) -> Self {
        Self { read_only: true, ..self.clone() }
    }

    /// The same for writing, too.
    pub(crate) fn to_write(&self) -> Self {
        Self { read_only: false, ..self.clone() }
    }

    /// How a file with this format is opened. What counts in an image is where its tables say that it lies: a few zeros
    /// behind the end are nothing, as they are not for a raw disk.
    pub(crate) fn host(&self, format: BackingFormat) -> block::OpenOptions {
        block::OpenOptions {
            read_only: self.read_only,
            direct: self.direct,
            can_lengthen: format == BackingFormat::Qcow2,
            lock: self.lock,
            rehearse: self.rehearse,
            ..block::OpenOptions::default()
        }
    }
}

impl Image {
    /// Opens an image and, for reading, its chain of backing files.
    ///
    /// Backing files must have their format recorded and obey [`OpenOptions::references`]. Resolving their paths asks
    /// the file system directly, not through the I/O engine.
    ///
    /// # Errors
    /// [`Error::Corrupt`] and [`Error::Unsupported`] for any image of the chain, [`Error::Reference`] for a backing
    /// file that may not be followed, [`Error::Host`].
    pub async fn open(path: &Path, options: OpenOptions) -> Result<Self, Error> {
        let trail = Trail::start(path, &options.references)?;
        open_chain(path.to_owned(), None, options, trail).await
    }

    /// Opens an image over a backing device that the caller has opened.
    ///
    /// # Errors
    /// As [`Image::open_on`].
    pub async fn open_with_backing(
        path: &Path,
        backing: Option<Arc<dyn BlockDevice>>,
        options: OpenOptions,
    ) -> Result<Self, Error> {
        let file = options.open_file(path, BackingFormat::Qcow2).await?;
        Self::open_on(file, backing, options).await
    }

    /// Opens an image in a file that is open already, over a backing device that the caller has opened.
    ///
    /// # Errors
    /// As [`Image::open`], and [`ReferenceError::Missing`] or [`ReferenceError::Unexpected`] where the header and
    /// `backing` do not agree on whether there is one.
    pub async fn open_on(
        file: HostFile,
        backing: Option<Arc<dyn BlockDevice>>,
        options: OpenOptions,
    ) -> Result<Self, Error> {
        Self::open_parts(file, None, backing, options).await
    }

    /// As [`Image::open_on`], with the external data file open already, too. Without one it is opened by
    /// [`OpenOptions::data_file`], or by the name that the image records.
    ///
    /// # Errors
    /// As [`Image::open_on`], and [`ReferenceError::UnexpectedDataFile`].
    pub async fn open_parts(
        file: HostFile,
        data: Option<HostFile>,
        backing: Option<Arc<dyn BlockDevice>>,
        options: OpenOptions,
    ) -> Result<Self, Error> {
        let header = read_header(&file).await?;
        let name = header.backing_name.as_deref().map(String::from_utf8_lossy);
        let reason = match (&name, &backing) {
            (Some(_), None) => Some(ReferenceError::Missing),
            (None, Some(_)) => Some(ReferenceError::Unexpected),
            (Some(_), Some(_)) | (None, None) => None,
        };
        if let Some(reason) = reason {
            let name = name.unwrap_or_default().into_owned();
            return Err(Error::Reference { file: file.path().to_owned(), name, reason });
        }
        let data = match data {
            Some(data) if header.has_data_file() => Some(data),
            Some(data) => {
                let reason = ReferenceError::UnexpectedDataFile;
                let name = data.path().display().to_string();
                return Err(Error::Reference { file: file.path().to_owned(), name, reason });
            }
            None if header.has_data_file() || options.data_file.is_some() => {
                let trail = Trail::start(file.path(), &options.references)?;
                let trail = trail.enter(file.path(), file.id())?;
                open_data(file.path(), &header, &options, &trail).await?
            }
            None => None,
        };
        let name = PathBuf::from(name.unwrap_or_default().into_owned());
        let backing = backing.map(|device| (device, Below::Other(name)));
        open_with_header(file, data, header, backing, &options).await
    }
}

/// A layer whose file is open, and which waits for those below it.
struct Opened {
    file: HostFile,
    data: Option<HostFile>,
    header: Header,
    options: OpenOptions,
}

/// What lies below a layer, and what is known of it.
type Lower = (Arc<dyn BlockDevice>, Below);

/// Opens an image and everything below it; `trail` is what was passed on the way, and `place` where a reference led.
///
/// In a loop: down to the lowest layer, and up again. A chain may be deeper than a stack.
pub(crate) async fn open_chain(
    path: PathBuf,
    place: Option<Found>,
    options: OpenOptions,
    trail: Trail,
) -> Result<Image, Error> {
    let (mut path, mut place, mut options, mut trail) = (path, place, options, trail);
    let mut above: Vec<Opened> = Vec::new();
    let (mut top, mut lower) = loop {
        let file = match &place {
            Some(place) => place.open(&options).await?,
            None => options.open_file(&path, BackingFormat::Qcow2).await?,
        };
        trail = trail.enter(&path, file.id())?;
        let header = read_header(&file).await?;
        let data = open_data(&path, &header, &options, &trail).await?;
        if let Some(data) = &data {
            trail = trail.beside(data.path(), data.id())?;
        }
        let below = options.below();
        let found = header
            .backing_name
            .as_ref()
            .map(|name| trail.resolve(&path, name, header.extensions.backing_format.as_deref()));
        let opened = Opened { file, data, header, options };
        match found.transpose()? {
            None => break (opened, None),
            Some(found) if found.format == BackingFormat::Qcow2 => {
                above.push(opened);
                (path, place, options) = (found.path.clone(), Some(found), below);
            }
            Some(found) => break (opened, Some(open_other(&found, &below, trail).await?)),
        }
    };
    loop {
        let Opened { file, data, header, options } = top;
        let image = open_with_header(file, data, header, lower, &options).await?;
        match above.pop() {
            None => return Ok(image),
            Some(next) => top = next,
        }
        lower = Some((Arc::new(image.clone()) as _, Below::Image(image)));
    }
}

/// Opens what lies below an image, for reading.
pub(crate) async fn open_found(
    found: Found,
    below: OpenOptions,
    trail: Trail,
) -> Result<Arc<dyn BlockDevice>, Error> {
    if found.format == BackingFormat::Qcow2 {
        return Ok(Arc::new(open_chain(found.path.clone(), Some(found), below, trail).await?));
    }
    Ok(open_other(&found, &below, trail).await?.0)
}

/// Opens what is not a QCOW2 image.
async fn open_other(found: &Found, options: &OpenOptions, trail: Trail) -> Result<Lower, Error> {
    let path = found.path.clone();
    if found.format == BackingFormat::Vmdk {
        return Ok((open_vmdk(found, options, trail).await?, Below::Other(path)));
    }
    Ok((open_raw(found, options, &trail).await?, Below::Raw(path)))
}

async fn open_raw(
    found: &Found,
    options: &OpenOptions,
    trail: &Trail,
) -> Result<Arc<dyn BlockDevice>, Error> {
    let file = found.open(options).await?;
    trail.clone().enter(&found.path, file.id())?;
    Ok(RawDevice::new(file))
}

#[cfg(feature = "vmdk")]
async fn open_vmdk(
    found: &Found,
    options: &OpenOptions,
    trail: Trail,
) -> Result<Arc<dyn BlockDevice>, Error> {
    let path = &found.path;
    Ok(Arc::new(crate::vmdk::Vmdk::open_on_trail(path, Some(found), options, trail).await?))
}

#[cfg(not(feature = "vmdk"))]
async fn open_vmdk(
    found: &Found,
    _: &OpenOptions,
    _: Trail,
) -> Result<Arc<dyn BlockDevice>, Error> {
    Err(Fault::Unsupported(Feature::VmdkLeftOut).of(&found.path))
}

/// Reads a header that may be opened.
pub(crate) async fn read_header(file: &HostFile) -> Result<Header, Error> {
    let fault = |fault: Fault| fault.of(file.path());
    let header = parse_header(file).await?;
    header.check(file.len()).map_err(fault)?;
    Ok(header)
}

/// Reads a header, whatever it says of the rest of the file.
pub(crate) async fn parse_header(file: &HostFile) -> Result<Header, Error> {
    let fault = |fault: Fault| fault.of(file.path());
    let len = file.len();
    let start = file.read(ByteRange::between(0, SECTOR_BYTES.min(len))).await?;
    let needed = Header::needed_bytes(&start).map_err(fault)?;
    let cluster = file.read(ByteRange::between(0, needed.min(len))).await?;
    Header::parse(&cluster).map_err(fault)
}

/// Opens the external data file of the image in `path`, where its header says that it has one: a name alone leads
/// nowhere.
async fn open_data(
    path: &Path,
    header: &Header,
    options: &OpenOptions,
    trail: &Trail,
) -> Result<Option<HostFile>, Error> {
    let refused = |name: &str, reason| {
        Err(Error::Reference { file: path.to_owned(), name: name.to_owned(), reason })
    };
    let file = match (&options.data_file, &header.extensions.data_file) {
        (Some(given), _) if !header.has_data_file() => {
            return refused(&given.display().to_string(), ReferenceError::UnexpectedDataFile);
        }
        _ if !header.has_data_file() => return Ok(None),
        (Some(given), _) => options.open_file(given, BackingFormat::Raw).await?,
        (None, None) => return refused("", ReferenceError::NoDataFileName),
        (None, Some(name)) => {
            let place = trail.place(path, name)?;
            // Before it is opened: our own lock on the image would refuse it with a less clear reason.
            trail.check_new(&place)?;
            place.open(options, BackingFormat::Raw).await?
        }
    };
    trail.clone().beside(file.path(), file.id())?;
    Ok(Some(file))
}

async fn open_with_header(
    file: HostFile,
    data: Option<HostFile>,
    header: Header,
    backing: Option<Lower>,
    options: &OpenOptions,
) -> Result<Image, Error> {
    let (backing, below) = backing.unzip();
    let fault = |fault: Fault| fault.of(file.path());
    let read_only = options.read_only || file.is_read_only();
    let cipher =
        encryption::unlock(&file, &header, &options.passphrases, options.unlock_time).await?;
    // What is rehearsed is open for reading alone.
    let writes = !options.read_only && (options.rehearse || !file.is_read_only());
    if writes && header.is_corrupt() {
        return Err(fault(Fault::Unsupported(Feature::WritingCorrupt)));
    }
    let header = if read_only || !header.is_dirty() {
        header
    } else {
        // It was not closed cleanly: its refcounts may be wrong, and allocating would overwrite what they miss.
        tracing::warn!(image = %file.path().display(), "it was not closed cleanly: counting its references");
        rebuild_dirty(&file).await?;
        read_header(&file).await?
    };
    let header = match &options.snapshot {
        None => header,
        Some(_) if !read_only => return Err(snapshot_error(&file, SnapshotError::ReadOnly)),
        Some(wanted) => view_of(&file, header, wanted).await?,
    };
    let unlock_time = options.unlock_time;
    let live = Live { file, data, backing, below, cipher, unlock_time };
    start(live, header, read_only).await
}

/// An image on files that are open, with all that its header asks for.
pub(crate) async fn start(live: Live, header: Header, read_only: bool) -> Result<Image, Error> {
    let limits = Limits {
        size_bytes: header.size_bytes,
        read_only,
        preferred_bytes: u32::try_from(header.geometry.bytes()).unwrap_or(u32::MAX),
        can_discard: !read_only,
        // Version 2 has no flag for them; without a backing file an absent cluster is as good.
        fast_zeroes: !read_only && (header.version >= 3 || live.backing.is_none()),
    };
    let facts = Facts::new(&header);
    let backing_bytes = live.backing.as_ref().map(|backing| backing.limits().size_bytes);
    let core = load_core(&live.file, header, backing_bytes, !read_only).await?;
    let image = Image::assemble(live, core, limits, facts);
    if !read_only {
        let inner = &image.inner;
        let live = inner.live()?;
        inner.step_in_flush(&live, Core::find_end).await?;
    }
    Ok(image)
}

/// The header as it would be if a snapshot were the active disk.
async fn view_of(file: &HostFile, header: Header, wanted: &str) -> Result<Header, Error> {
    let table = read_snapshots(file, &header).await?;
    let entry = snapshot::find(&table.entries, wanted)
        .and_then(|at| table.entries.into_iter().nth(at))
        .ok_or_else(|| snapshot_error(file, SnapshotError::NotFound(wanted.to_owned())))?;
    entry.check(header.geometry, file.len()).map_err(|fault| fault.of(file.path()))?;
    let mut view = header;
    view.size_bytes = entry.disk_bytes.unwrap_or(view.size_bytes);
    view.l1_at = entry.l1_at;
    view.l1_entries = u64::from(entry.l1_entries);
    // Bitmaps tell of the present disk.
    view.set_bitmaps(None);
    Ok(view)
}

fn snapshot_error(file: &HostFile, what: SnapshotError) -> Error {
    Error::Snapshot { file: file.path().to_owned(), what }
}

/// Reads what a core begins with: the L1 table and, for writing, the refcount table and the snapshot table.
/// [`Core::find_end`] is still to be done.
pub(crate) async fn load_core(
    file: &HostFile,
    header: Header,
    backing_bytes: Option<u64>,
    writing: bool,
) -> Result<Core, Error> {
    let geometry = header.geometry;
    let l1 = read_table(file, header.l1_at, header.l1_entries).await?;
    let table_run = Run {
        start: geometry.host_cluster(header.refcount_table_at),
        count: header.refcount_table_clusters,
    };
    let mut table = Vec::new();
    let mut snapshots = SnapshotTable::default();
    if writing {
        let entries = header.refcount_table_clusters * geometry.bytes() / 8;
        table = read_table(file, header.refcount_table_at, entries).await?;
        snapshots = read_snapshots(file, &header).await?;
    }
    let width = RefcountWidth::new(header.refcount_order).unwrap_or(RefcountWidth::DEFAULT);
    let map = Mapping::new(header.entry_format(), header.l1_at, l1);
    let refs = Refcounts::new(geometry, width, table, table_run);
    let snapshots_at = geometry.host_cluster(header.snapshots_at);
    let mut core = Core::new(header, map, refs, backing_bytes, file.len());
    if snapshots.len > 0 {
        core.fixed.push(Run { start: snapshots_at, count: geometry.clusters(snapshots.len) });
    }
    for entry in &snapshots.entries {
        // A longer one is no table that anybody reads.
        let bytes = (u64::from(entry.l1_entries) * 8).min(MAX_L1_BYTES);
        let count = geometry.clusters(bytes);
        core.fixed.push(Run { start: geometry.host_cluster(entry.l1_at), count });
    }
    if writing {
        core.find_tables();
    }
    Ok(core)
}

async fn read_table(file: &HostFile, at: HostOffset, entries: u64) -> Result<Vec<u64>, Error> {
    // Both tables have limits that were checked with the header: this is at most 32 MiB.
    let bytes = file.read(ByteRange::between(at.0, at.0.saturating_add(entries * 8))).await?;
    let mut table = from_big_endian(&bytes);
    table.resize(index(entries), 0);
    Ok(table)
}

impl From<DeviceError> for Error {
    fn from(error: DeviceError) -> Self {
        Self::Request(error)
    }
}
