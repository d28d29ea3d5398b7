//! Opening an image by its format. The one place of this crate that knows formats.

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use async_trait::async_trait;
use block::{
    BlockDevice, ByteRange, DeviceError, Holder, HostError, HostFile, ImageLocked,
    OpenOptions as HostOptions, RawDevice,
};
use nbd_server::{DIRTY, ExtentSource, FlaggedExtent, Joined};
use qcow2::{BitmapError, Corruption, DirtyExtent, Image, OpenOptions, Passphrase, References};

use super::depth::{self, AllocationDepth};
use super::first_bytes::FirstBytes;
use super::numbered;
use super::options::{AllowReferences, ExportSpec, Format};

/// How images are opened that do not say otherwise.
#[derive(Clone, Debug, Default)]
pub(super) struct Opening {
    pub(super) references: Option<AllowReferences>,
    /// How long may be worked on a passphrase for one key slot.
    pub(super) unlock_time: Option<Duration>,
    /// Nothing is made, changed or locked, because another program may be serving the images: it is only found out what
    /// this program could serve.
    pub(super) only_looks: bool,
}

/// Which file it is: one that was put in the place of another is another one, and a device has many names.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum FileId {
    /// Device and inode.
    File(u64, u64),
    /// The number of a block device.
    Device(u64),
    /// Several that are joined, in their order.
    Joined(Vec<FileId>),
}

impl FileId {
    /// `None` where it is neither a regular file nor a block device.
    pub(super) fn of(metadata: &Metadata) -> Option<Self> {
        let kind = metadata.file_type();
        if kind.is_file() {
            Some(Self::File(metadata.dev(), metadata.ino()))
        } else if kind.is_block_device() {
            Some(Self::Device(metadata.rdev()))
        } else {
            None
        }
    }

    /// Whether it is one of those that the other is joined of, or has one in common with it.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Joined(ids), other) => ids.iter().any(|id| other.overlaps(id)),
            (one, Self::Joined(ids)) => ids.contains(one),
            (one, other) => one == other,
        }
    }
}

/// What makes two exports show one image: which file it is, and as what it is opened.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct ImageKey {
    /// Of the first file, where several are joined.
    path: PathBuf,
    /// The files behind it, in their order.
    more: Vec<PathBuf>,
    file: FileId,
    format: Format,
    snapshot: Option<String>,
    references: Option<AllowReferences>,
    passphrase_files: Vec<PathBuf>,
}

impl ImageKey {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn file(&self) -> &FileId {
        &self.file
    }

    pub(super) fn is_raw(&self) -> bool {
        self.format == Format::Raw
    }

    /// The same file, found elsewhere.
    pub(super) fn at(&self, path: PathBuf) -> Self {
        Self { path, ..self.clone() }
    }

    /// Finds the image of an export, and its format; `nameless` leads to one that has no name. Blocks.
    pub(super) fn of(
        spec: &ExportSpec,
        nameless: Option<PathBuf>,
        how: &Opening,
    ) -> anyhow::Result<Self> {
        let (path, more, file) = match nameless {
            _ if spec.joins => joined(spec)?,
            Some(path) => single(path)?,
            None => single(std::fs::canonicalize(&spec.path)?)?,
        };
        let format = format_of(spec, &path)?;
        // A raw image refers to nothing: it stays what it is where others may refer to something else.
        let references = spec.references.as_ref().or(how.references.as_ref());
        Ok(Self {
            references: references.filter(|_| format == Format::Qcow2).cloned(),
            more,
            file,
            format,
            snapshot: spec.snapshot.clone(),
            passphrase_files: spec.passphrase_files.clone(),
            path,
        })
    }
}

/// One file.
fn single(path: PathBuf) -> anyhow::Result<(PathBuf, Vec<PathBuf>, FileId)> {
    let file = FileId::of(&std::fs::metadata(&path)?)
        .context("it is neither a regular file nor a block device")?;
    Ok((path, Vec::new(), file))
}

/// The first file, those behind it, and all of them; where one is all there is, it is like any other.
fn joined(spec: &ExportSpec) -> anyhow::Result<(PathBuf, Vec<PathBuf>, FileId)> {
    let (mut paths, mut ids): (Vec<_>, Vec<_>) = numbered::files(spec)?.into_iter().unzip();
    let first = paths.remove(0);
    let file = if paths.is_empty() { ids.remove(0) } else { FileId::Joined(ids) };
    Ok((first, paths, file))
}

/// The folder that a file lies in.
pub(super) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Sources of metadata contexts, with their names.
pub(super) type Sources = Vec<(String, Arc<dyn ExtentSource>)>;

/// An image that is open.
pub(super) struct Opened {
    device: Arc<dyn BlockDevice>,
    image: Option<Image>,
    only_looks: bool,
}

impl Opened {
    #[cfg(test)]
    pub(super) fn of(device: Arc<dyn BlockDevice>) -> Self {
        Self { device, image: None, only_looks: false }
    }

    /// What to serve, and to close at the end.
    pub(super) fn device(&self) -> Arc<dyn BlockDevice> {
        Arc::clone(&self.device)
    }

    pub(super) fn as_device(&self) -> &dyn BlockDevice {
        &*self.device
    }

    /// Opens an image, for writing where that is wanted and can be.
    pub(super) async fn open(
        key: &ImageKey,
        writable: bool,
        how: &Opening,
    ) -> anyhow::Result<Self> {
        let rehearse = how.only_looks;
        let (device, image): (Arc<dyn BlockDevice>, _) = match key.format {
            Format::Raw => {
                let options =
                    HostOptions { read_only: !writable, rehearse, ..HostOptions::writing() };
                (raw(key, options).await?, None)
            }
            Format::Qcow2 => {
                let mut options = qcow2_options(key, writable);
                options.rehearse = rehearse;
                options.passphrases = passphrases(key)?;
                options.unlock_time = how.unlock_time.unwrap_or(options.unlock_time);
                let image =
                    Image::open(&key.path, options).await.map_err(|error| explained(error, key))?;
                (Arc::new(image.clone()), Some(image))
            }
        };
        Ok(Self { device, image, only_looks: how.only_looks })
    }

    /// What the image tells beside where data lies, as far as it was asked for: which layer holds what, and bitmaps, each
    /// of which must tell every change: of the image, or else of the first image below it that has one of that name.
    pub(super) async fn sources(&self, spec: &ExportSpec) -> anyhow::Result<Sources> {
        let mut sources = Sources::new();
        for name in &spec.bitmaps {
            let top = self.image.as_ref().context("a raw image has no bitmaps")?;
            let image = image_with(top, name, self.only_looks).await;
            let image = image.map_err(|error| no_bitmap(error, top, name))?;
            let source = Bitmap { image, name: name.clone() };
            sources.push((format!("qemu:dirty-bitmap:{name}"), Arc::new(source)));
        }
        if spec.allocation_depth {
            let top = self.image.as_ref().context("a raw image has no layers")?;
            let source = AllocationDepth::new(top)?;
            sources.push((depth::CONTEXT.to_owned(), Arc::new(source)));
        }
        Ok(sources)
    }
}

/// A raw file, or several as one device.
async fn raw(key: &ImageKey, options: HostOptions) -> anyhow::Result<Arc<dyn BlockDevice>> {
    let file = HostFile::open(&key.path, options.clone()).await.map_err(in_use)?;
    let first: Arc<dyn BlockDevice> = RawDevice::new(file);
    if key.more.is_empty() {
        return Ok(first);
    }
    let mut parts = vec![first];
    for path in &key.more {
        let file = HostFile::open(path, options.clone()).await.map_err(in_use)?;
        parts.push(RawDevice::new(file));
    }
    let files = parts.len();
    let device = Joined::new(parts).context("its files are too long together")?;
    let bytes = device.limits().size_bytes;
    tracing::info!(first = %key.path.display(), files, bytes, "joined files");
    Ok(device)
}

/// The format that was said, or that may be taken for granted. Nothing but a qcow2 header is recognised, and only where
/// raw images have to be said: a guest could write a header into a raw disk, and would be believed.
fn format_of(spec: &ExportSpec, path: &Path) -> anyhow::Result<Format> {
    if let Some(format) = spec.format {
        return Ok(format);
    }
    let first = FirstBytes::of(path)?;
    match (first.is_qcow2(), spec.raw_unless_said) {
        (true, true) => bail!(
            "it begins as a qcow2 image does; say format = qcow2, or format = raw where that is meant"
        ),
        (false, true) => Ok(Format::Raw),
        (true, false) => Ok(Format::Qcow2),
        (false, false) => bail!(first.why_not_qcow2()),
    }
}

/// The uppermost image from `top` down that has a usable bitmap of that name. One that is there and unusable hides
/// those below it. Who only looks finds those that record changes to be unsaved, because whoever writes has them.
async fn image_with(top: &Image, name: &str, only_looks: bool) -> Result<Image, qcow2::Error> {
    let mut layer = top.clone();
    loop {
        let first = ByteRange::between(0, layer.limits().size_bytes.min(1));
        let missing = match layer.dirty_extents(name, first).await {
            Ok(_) => return Ok(layer),
            Err(error @ qcow2::Error::Bitmap { reason: BitmapError::Unknown, .. }) => error,
            Err(qcow2::Error::Bitmap { reason: BitmapError::Inconsistent, .. }) if only_looks => {
                tracing::warn!(
                    image = %layer.path().display(),
                    bitmap = name,
                    "the bitmap is of no use unless a program that has the image open is recording in it"
                );
                return Ok(layer);
            }
            Err(error) => return Err(error),
        };
        match layer.backing_image()? {
            Some(below) => layer = below,
            None => return Err(missing),
        }
    }
}

/// An error of looking for a bitmap; where there is none, with where it was looked for.
fn no_bitmap(error: qcow2::Error, top: &Image, name: &str) -> anyhow::Error {
    match &error {
        qcow2::Error::Bitmap { file, reason: BitmapError::Unknown, .. } => {
            let below = if file == top.path() { "" } else { ", nor in those below it" };
            anyhow!("there is no bitmap {name:?} in the image{below}")
        }
        _ => error.into(),
    }
}

/// A bitmap of an open image, as it is when a client asks.
struct Bitmap {
    image: Image,
    name: String,
}

#[async_trait]
impl ExtentSource for Bitmap {
    async fn extents(&self, range: ByteRange) -> Result<Vec<FlaggedExtent>, DeviceError> {
        // An image below may be smaller: behind its end nothing is dirty.
        let end = range.end().min(self.image.limits().size_bytes).max(range.start());
        let known = ByteRange::between(range.start(), end);
        let mut extents = if known.is_empty() {
            Vec::new()
        } else {
            self.image.dirty_extents(&self.name, known).await?
        };
        if extents.last().map_or(range.start(), |last| last.range.end()) == end && end < range.end()
        {
            let start = match extents.last() {
                Some(last) if !last.dirty => extents.pop().map_or(end, |last| last.range.start()),
                _ => end,
            };
            extents
                .push(DirtyExtent { range: ByteRange::between(start, range.end()), dirty: false });
        }
        let flagged = |extent: DirtyExtent| FlaggedExtent {
            range: extent.range,
            flags: if extent.dirty { DIRTY } else { 0 },
        };
        Ok(extents.into_iter().map(flagged).collect())
    }
}

/// Locked, direct, and with backing files where they are allowed to be.
fn qcow2_options(key: &ImageKey, writable: bool) -> OpenOptions {
    let options = match &key.snapshot {
        Some(snapshot) => OpenOptions::reading().snapshot(snapshot),
        None if writable => OpenOptions::writing(),
        None => OpenOptions::reading(),
    };
    options.references(match &key.references {
        None => References::Confined,
        Some(AllowReferences::Any) => References::Any,
        Some(AllowReferences::Below(directory)) => References::Under(directory.clone()),
    })
}

/// What may open the image and those below it. Read each time that it is opened, and not kept.
fn passphrases(key: &ImageKey) -> anyhow::Result<Vec<Passphrase>> {
    let read = |file: &PathBuf| {
        let bytes = std::fs::read(file);
        let mut bytes =
            bytes.with_context(|| format!("cannot read the passphrase from {}", file.display()))?;
        // Editors end a file with a newline that nobody typed.
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
        }
        Ok(Passphrase::new(bytes))
    };
    key.passphrase_files.iter().map(read).collect()
}

/// An error of opening an image, in the words of somebody who named a file.
fn explained(error: qcow2::Error, key: &ImageKey) -> anyhow::Error {
    let chain = || format!("a file in the chain below {}", key.path.display());
    match &error {
        qcow2::Error::Corrupt { file, what: Corruption::NoMagic, .. }
        | qcow2::Error::Corrupt {
            file, what: Corruption::Truncated { what: "the header" }, ..
        } => match FirstBytes::of(file) {
            Ok(first) if *file == key.path => anyhow!(first.why_not_qcow2()),
            _ => anyhow::Error::new(error).context(chain()),
        },
        qcow2::Error::Path { path, .. } => match &key.references {
            Some(AllowReferences::Below(folder)) if folder == path => {
                anyhow::Error::new(error).context("the folder for backing files")
            }
            _ if *path == key.path => error.into(),
            _ => anyhow::Error::new(error).context(chain()),
        },
        _ => in_use(error),
    }
}

/// An error, with who it is that has the image where that is this server.
pub(super) fn in_use(error: impl Into<anyhow::Error>) -> anyhow::Error {
    let error = error.into();
    let host = match error.downcast_ref::<qcow2::Error>() {
        // It is no cause of its own.
        Some(qcow2::Error::Host(host)) => Some(host),
        _ => error.downcast_ref::<HostError>(),
    };
    let locked = host.and_then(|host| {
        let locked = host.source.get_ref()?.downcast_ref::<ImageLocked>()?;
        locked.holders.iter().any(Holder::is_own).then_some((&host.path, locked.conflict))
    });
    match locked {
        Some((path, conflict)) => anyhow!(
            "cannot lock {}: another export of this server has it open {conflict}; \
             remove one of them, or let both only read",
            path.display()
        ),
        None => error,
    }
}
