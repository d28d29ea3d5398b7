//! New images as `create`, `convert` and `dd` make them. Where the bytes of the guest come from is the commands'
//! business.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use block::{BlockDevice, ByteRange, HostFile, RawDevice};
use qcow2::{BackingFormat, CreateOptions, Image, OpenOptions};

use crate::format::Format;
use crate::open::{self, Access, How, Named, Opened};
use crate::options::OptionList;
use crate::settings;
use crate::target::file_id;

/// QEMU counts disks in sectors of this many bytes.
pub(crate) const SECTOR_BYTES: u64 = 512;

/// Makes an empty image in an open, empty file (or over a block device).
///
/// # Errors
/// Options that contradict each other or the format, and what the host fails at.
pub(crate) async fn make(
    file: &HostFile,
    format: Format,
    size_bytes: u64,
    options: &OptionList,
) -> anyhow::Result<()> {
    match format {
        Format::Raw => make_raw(file, size_bytes, options.get("preallocation")).await,
        Format::Qcow2 => {
            let options = create_options(size_bytes, options)?;
            Ok(Image::create_on(file, &options).await?)
        }
    }
}

/// The image below a new one, open.
pub(crate) struct Below(Option<Opened>);

impl Below {
    /// Opens what the options name as the backing file of the image in `path`.
    ///
    /// # Errors
    /// As [`open::open`].
    pub(crate) async fn open(
        path: &Path,
        options: &OptionList,
        access: &Access,
    ) -> anyhow::Result<Self> {
        let Some(name) = options.get("backing_file") else { return Ok(Self(None)) };
        let format = options.get("backing_fmt").map(str::parse).transpose();
        let named = Named::file(&beside(path, name), format.map_err(anyhow::Error::msg)?);
        let opened = open::open(&named, &How::reading(None, false), access).await;
        Ok(Self(Some(opened.context("Could not open backing image")?)))
    }

    /// The disk.
    pub(crate) fn device(&self) -> Option<Arc<dyn BlockDevice>> {
        self.0.as_ref().map(Opened::device)
    }

    /// The file, by device and inode.
    pub(crate) fn id(&self) -> Option<(u64, u64)> {
        self.0.as_ref()?.place.path().and_then(file_id)
    }
}

/// Opens what [`make`] made, for writing, over what lies below it.
///
/// # Errors
/// What the library refuses.
pub(crate) async fn open_made(
    file: HostFile,
    format: Format,
    below: Option<Arc<dyn BlockDevice>>,
) -> anyhow::Result<Arc<dyn BlockDevice>> {
    Ok(match format {
        Format::Raw => RawDevice::new(file),
        Format::Qcow2 => Arc::new(Image::open_on(file, below, OpenOptions::writing()).await?),
    })
}

async fn make_raw(file: &HostFile, size_bytes: u64, prealloc: Option<&str>) -> anyhow::Result<()> {
    if file.is_fixed_len() {
        let has = file.len();
        ensure!(has >= size_bytes, "the device has {has} bytes, and the disk needs {size_bytes}");
        return Ok(());
    }
    file.set_len(size_bytes).await?;
    let whole = ByteRange::between(0, size_bytes);
    match prealloc {
        None | Some("off") => {}
        Some("falloc") => file.write_zeroes(whole, None).await?,
        Some("full") => write_zeros(file, whole).await?,
        Some(other) => {
            bail!("Invalid preallocation mode '{other}': off, falloc and full are known")
        }
    }
    Ok(())
}

/// Writes zeros as data, so that the host has written every block once.
async fn write_zeros(file: &HostFile, range: ByteRange) -> anyhow::Result<()> {
    const PIECE_BYTES: u64 = 1 << 20;
    let zeros = bytes::Bytes::from(vec![0; 1 << 20]);
    for piece in range.pieces(PIECE_BYTES) {
        let len = usize::try_from(piece.len()).unwrap_or(zeros.len());
        file.write(piece.start(), zeros.slice(..len), None).await?;
    }
    Ok(())
}

/// What the library is told.
///
/// # Errors
/// Values that the library has no word for.
pub(crate) fn create_options(
    size_bytes: u64,
    options: &OptionList,
) -> anyhow::Result<CreateOptions> {
    let size_bytes = size_bytes.next_multiple_of(SECTOR_BYTES);
    let mut create = CreateOptions::new(size_bytes);
    if let Some(size) = options.get("cluster_size") {
        let bytes = settings::size("cluster_size", size)?;
        let valid = bytes.is_power_of_two() && (512..=2 << 20).contains(&bytes);
        ensure!(valid, "Cluster size must be a power of two between 512 and 2048k, not {bytes}");
        create = create.cluster_bytes(u32::try_from(bytes)?);
    }
    for (name, default) in [
        ("extended_l2", "off"),
        ("preallocation", "off"),
        ("compression_type", "zlib"),
        ("compat", "1.1"),
        ("lazy_refcounts", "off"),
        ("refcount_bits", "16"),
    ] {
        let given = options.get(name).unwrap_or(default);
        ensure!(given == default, "{name}={given} is not supported; {default} is");
    }
    if let Some(backing) = options.get("backing_file") {
        let format =
            options.get("backing_fmt").context("Backing file specified without backing format")?;
        create = create.backing(backing, backing_format(format)?);
    }
    Ok(create)
}

/// The format of a backing file by its name.
///
/// # Errors
/// Formats that are not read below others.
pub(crate) fn backing_format(name: &str) -> anyhow::Result<BackingFormat> {
    match name {
        "qcow2" => Ok(BackingFormat::Qcow2),
        "raw" => Ok(BackingFormat::Raw),
        other => bail!("Unknown file format '{other}' of a backing file: qcow2 and raw are known"),
    }
}

/// Where a backing name leads, seen from the image that records it.
pub(crate) fn beside(image: &Path, name: &str) -> PathBuf {
    match image.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.join(name),
        _ => name.into(),
    }
}
