//! New images as `create`, `convert` and `dd` make them, from the options of `-o`. Where the bytes of the guest come
//! from is the commands' business.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow, bail, ensure};
use block::{BlockDevice, ByteRange, HostFile, RawDevice};
use qcow2::{
    BackingFormat, Compression, CreateOptions, Image, KeyCost, LuksCipher, LuksHash, LuksOptions,
    Preallocation, Version,
};

use crate::cache::Cache;
use crate::chain;
use crate::format::Format;
use crate::open::{self, Access, How, Named, Opened};
use crate::options::{OptionList, switch};
use crate::output::warn;
use crate::place::folder;
use crate::secret::Secrets;
use crate::settings;
use crate::target::{Target, file_id};

/// QEMU counts disks in sectors of this many bytes.
pub(crate) const SECTOR_BYTES: u64 = 512;

/// What a new image is to be.
pub(crate) struct Plan<'a> {
    pub(crate) path: &'a Path,
    pub(crate) format: Format,
    pub(crate) size_bytes: u64,
    pub(crate) options: &'a OptionList,
    pub(crate) access: &'a Access,
    pub(crate) cache: Cache,
}

/// A new image whose files are there, and go again unless they are kept.
pub(crate) struct Made {
    file: HostFile,
    /// The external data file, where it has one.
    data: Option<HostFile>,
    files: Vec<Target>,
    format: Format,
}

impl Plan<'_> {
    /// Makes an empty image. `sources` are the files, by device and inode, that the command still reads.
    ///
    /// # Errors
    /// Options that contradict each other or the format, and what the host fails at.
    pub(crate) async fn make(&self, sources: &[(u64, u64)]) -> anyhow::Result<Made> {
        match self.format.for_making()? {
            Format::Qcow2 => self.make_qcow2(sources).await,
            _ => {
                // Before any file is touched.
                let mode = self.options.get("preallocation");
                let mode = raw_preallocation(mode.map_or(Ok(Preallocation::Off), preallocation)?)?;
                let (target, file) = Target::make(self.path, self.cache, sources).await?;
                make_raw(&file, self.size_bytes, mode).await?;
                Ok(Made { file, data: None, files: vec![target], format: self.format })
            }
        }
    }

    async fn make_qcow2(&self, sources: &[(u64, u64)]) -> anyhow::Result<Made> {
        // Before any file is touched.
        let options = create_options(self.size_bytes, self.options, &self.access.secrets)?;
        options.check()?;
        let is_same = |name: &str| {
            let place = beside(self.path, name);
            place == self.path || file_id(&place).is_some_and(|id| file_id(self.path) == Some(id))
        };
        if let Some(name) = &options.data_file {
            if is_same(&name.path) {
                bail!("the data file {} would be the image itself", name.path);
            }
            tell_of_distance(self.path, &beside(self.path, &name.path), self.access);
        }
        let (target, file) = Target::make(self.path, self.cache, sources).await?;
        let mut files = vec![target];
        let mut data = None;
        if let Some(name) = &options.data_file {
            let mut taken = sources.to_vec();
            taken.extend(file.id());
            let place = beside(self.path, &name.path);
            let (target, file) = Target::make(&place, self.cache, &taken).await?;
            files.push(target);
            data = Some(file);
        }
        Image::create_with_data(&file, data.as_ref(), &options).await?;
        Ok(Made { file, data, files, format: self.format })
    }
}

impl Made {
    /// Makes it durable as it is.
    ///
    /// # Errors
    /// What the host fails at.
    pub(crate) async fn keep(self) -> anyhow::Result<()> {
        self.file.sync().await?;
        self.files.into_iter().try_for_each(Target::keep)
    }

    /// Opens it for writing, over what lies below it; its files are kept apart.
    ///
    /// # Errors
    /// What the library refuses.
    pub(crate) async fn open(
        self,
        below: Option<Arc<dyn BlockDevice>>,
        access: &Access,
        cache: Cache,
    ) -> anyhow::Result<(Filling, Vec<Target>)> {
        let Self { file, data, files, format } = self;
        let is_zero = below.is_none() && files.iter().all(Target::is_new);
        if format == Format::Raw {
            let device: Arc<dyn BlockDevice> = RawDevice::new(file);
            return Ok((Filling { device, image: None, is_zero }, files));
        }
        let options = open::qcow2_options(&How::writing(Some(cache)), access)?;
        let image = Image::open_parts(file, data, below, options).await?;
        Ok((Filling { device: Arc::new(image.clone()), image: Some(image), is_zero }, files))
    }
}

/// A new image, open for writing.
pub(crate) struct Filling {
    pub(crate) device: Arc<dyn BlockDevice>,
    pub(crate) image: Option<Image>,
    /// It reads as zeros, also where it is made in advance and does not say so.
    pub(crate) is_zero: bool,
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
        plain_path(name)?;
        let format = options.get("backing_fmt").map(str::parse).transpose();
        let named = Named::file(&beside(path, name), format.map_err(anyhow::Error::msg)?);
        let opened = open::open(&named, &How::reading(None, false), access).await;
        Ok(Self(Some(opened.context("Could not open backing image")?)))
    }

    /// The disk.
    pub(crate) fn device(&self) -> Option<Arc<dyn BlockDevice>> {
        self.0.as_ref().map(Opened::device)
    }

    /// Its files, by device and inode.
    pub(crate) async fn ids(&self) -> Vec<(u64, u64)> {
        chain::ids_of(self.0.as_slice()).await
    }
}

async fn make_raw(file: &HostFile, size_bytes: u64, mode: Preallocation) -> anyhow::Result<()> {
    if file.is_fixed_len() {
        let has = file.len();
        ensure!(has >= size_bytes, "the device has {has} bytes, and the disk needs {size_bytes}");
        return Ok(());
    }
    file.set_len(size_bytes).await?;
    preallocate_raw(file, ByteRange::between(0, size_bytes), mode, || Ok(())).await
}

/// The same mode, if raw disks have it.
///
/// # Errors
/// `metadata`: there is none.
fn raw_preallocation(mode: Preallocation) -> anyhow::Result<Preallocation> {
    ensure!(
        mode != Preallocation::Metadata,
        "Invalid preallocation mode 'metadata' of a raw disk: off, falloc and full are known"
    );
    Ok(mode)
}

/// Makes in advance what a new range of a raw disk shall have, as long as `go_on` says so.
///
/// # Errors
/// Modes that raw disks do not have, what the host fails at, and what `go_on` says: nothing is in flight then.
pub(crate) async fn preallocate_raw(
    file: &HostFile,
    range: ByteRange,
    mode: Preallocation,
    go_on: impl Fn() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    match raw_preallocation(mode)? {
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        Preallocation::Falloc => Ok(file.write_zeroes(range, None).await?),
        Preallocation::Full => write_zeros(file, range, go_on).await,
    }
}

/// Writes zeros as data, so that the host has written every block once.
async fn write_zeros(
    file: &HostFile,
    range: ByteRange,
    go_on: impl Fn() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    const PIECE_BYTES: u64 = 1 << 20;
    let zeros = bytes::Bytes::from(vec![0; 1 << 20]);
    for piece in range.pieces(PIECE_BYTES) {
        go_on()?;
        let len = usize::try_from(piece.len()).unwrap_or(zeros.len());
        file.write(piece.start(), zeros.slice(..len), None).await?;
    }
    Ok(())
}

/// Whether a new image of this format, with these options, can have bitmaps.
pub(crate) fn keeps_bitmaps(format: Format, options: &OptionList) -> bool {
    let is_old = |value: &str| version(value).is_ok_and(|version| version == Version::V2);
    format == Format::Qcow2 && !options.get("compat").is_some_and(is_old)
}

/// What the library is told.
///
/// # Errors
/// Values that the library has no word for.
pub(crate) fn create_options(
    size_bytes: u64,
    options: &OptionList,
    secrets: &Secrets,
) -> anyhow::Result<CreateOptions> {
    let size_bytes = size_bytes.next_multiple_of(SECTOR_BYTES);
    let mut create = CreateOptions::new(size_bytes);
    if let Some(size) = options.get("cluster_size") {
        create.cluster_bytes = cluster_bytes(size)?;
    }
    if let Some(value) = options.get("compat") {
        create.version = version(value)?;
    }
    if let Some(value) = options.get("extended_l2") {
        create.extended_l2 = switch("extended_l2", value)?;
    }
    if let Some(value) = options.get("refcount_bits") {
        create.refcount_bits = refcount_bits(value)?;
    }
    if let Some(value) = options.get("lazy_refcounts") {
        create.lazy_refcounts = switch("lazy_refcounts", value)?;
    }
    if let Some(value) = options.get("compression_type") {
        create.compression = compression(value)?;
    }
    if let Some(value) = options.get("preallocation") {
        create.preallocation = preallocation(value)?;
    }
    let raw = options.get("data_file_raw").map(|value| switch("data_file_raw", value));
    let raw = raw.transpose()?.unwrap_or(false);
    match options.get("data_file") {
        Some(name) => {
            plain_path(name)?;
            create = create.data_file(name, raw);
        }
        None => ensure!(!raw, "data_file_raw needs data_file"),
    }
    if let Some(backing) = options.get("backing_file") {
        let format = options.get("backing_fmt");
        let format = format.context("Backing file specified without backing format (-F)")?;
        plain_path(backing)?;
        create = create.backing(backing, backing_format(format)?);
    }
    create.encryption = encryption(options, secrets)?;
    Ok(create)
}

/// The size of a cluster.
///
/// # Errors
/// Sizes that the format does not have.
pub(crate) fn cluster_bytes(value: &str) -> anyhow::Result<u32> {
    let bytes = settings::size("cluster_size", value)?;
    let valid = bytes.is_power_of_two() && (512..=2 << 20).contains(&bytes);
    ensure!(valid, "Cluster size must be a power of two between 512 and 2048k");
    Ok(u32::try_from(bytes)?)
}

/// The width of refcounts.
///
/// # Errors
/// Widths that the format does not have.
pub(crate) fn refcount_bits(value: &str) -> anyhow::Result<u32> {
    let bits = settings::number("refcount_bits", value)?;
    let valid = bits.is_power_of_two() && bits <= 64;
    ensure!(valid, "Refcount width must be a power of two and may not exceed 64 bits");
    Ok(u32::try_from(bits)?)
}

/// The version of the format by qemu's name.
///
/// # Errors
/// Other names.
pub(crate) fn version(value: &str) -> anyhow::Result<Version> {
    match value {
        "0.10" | "v2" => Ok(Version::V2),
        "1.1" | "v3" => Ok(Version::V3),
        _ => bail!("Invalid compatibility level '{value}': 1.1 (v3) and 0.10 (v2) are known"),
    }
}

/// The way to compress by its name.
///
/// # Errors
/// Other names.
pub(crate) fn compression(value: &str) -> anyhow::Result<Compression> {
    match value {
        "zlib" => Ok(Compression::Deflate),
        "zstd" => Ok(Compression::Zstd),
        _ => bail!("Invalid parameter '{value}' for compression_type: zlib and zstd are known"),
    }
}

/// What is made in advance, by qemu's name.
///
/// # Errors
/// Other names.
pub(crate) fn preallocation(value: &str) -> anyhow::Result<Preallocation> {
    let all =
        [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
    all.into_iter().find(|mode| mode.name() == value).ok_or_else(|| {
        anyhow!("Invalid preallocation mode '{value}': off, metadata, falloc and full are known")
    })
}

/// The format of a backing file by its name.
///
/// # Errors
/// Formats that are not read below others.
pub(crate) fn backing_format(name: &str) -> anyhow::Result<BackingFormat> {
    match name {
        "qcow2" => Ok(BackingFormat::Qcow2),
        "raw" | "file" | "host_device" => Ok(BackingFormat::Raw),
        "vmdk" => Ok(BackingFormat::Vmdk),
        other => {
            bail!("Unknown file format '{other}' of a backing file: qcow2, raw and vmdk are known")
        }
    }
}

fn encryption(options: &OptionList, secrets: &Secrets) -> anyhow::Result<Option<LuksOptions>> {
    let legacy = options.get("encryption").map(|value| switch("encryption", value)).transpose()?;
    match (legacy, options.get("encrypt.format")) {
        (Some(true), _) | (_, Some("aes")) => {
            bail!("the AES mode of old is not safe: say encrypt.format=luks")
        }
        (_, Some("luks")) => {}
        (_, Some(other)) => bail!("Unknown encryption format '{other}': luks is known"),
        (_, None) => {
            let stray = options.iter().find(|(name, _)| name.starts_with("encrypt."));
            return match stray {
                Some((name, _)) => bail!("{name} needs encrypt.format=luks"),
                None => Ok(None),
            };
        }
    }
    let passphrase = secrets.passphrase(options.get("encrypt.key-secret"));
    let passphrase = passphrase.context("Parameter 'encrypt.key-secret' is required for cipher")?;
    let mut luks = LuksOptions::new(passphrase);
    for (name, value) in options.iter() {
        match (name, value) {
            ("encrypt.cipher-alg", "aes-256")
            | ("encrypt.cipher-mode", "xts")
            | ("encrypt.ivgen-alg", "plain64") => {}
            ("encrypt.cipher-alg", "aes-128") => luks.cipher = LuksCipher::Aes128Xts,
            ("encrypt.hash-alg", value) => luks.hash = luks_hash(value)?,
            ("encrypt.iter-time", value) => luks.cost = key_cost(value)?,
            ("encrypt.cipher-alg" | "encrypt.cipher-mode" | "encrypt.ivgen-alg", _) => {
                bail!("{name}={value} is not supported: aes-256 or aes-128, xts and plain64 are")
            }
            _ => {}
        }
    }
    Ok(Some(luks))
}

fn luks_hash(value: &str) -> anyhow::Result<LuksHash> {
    Ok(match value {
        "sha1" => LuksHash::Sha1,
        "sha224" => LuksHash::Sha224,
        "sha256" => LuksHash::Sha256,
        "sha384" => LuksHash::Sha384,
        "sha512" => LuksHash::Sha512,
        _ => bail!("Unknown hash '{value}': sha1, sha224, sha256, sha384 and sha512 are known"),
    })
}

/// How long a try of a passphrase shall take.
///
/// # Errors
/// What is no number of milliseconds.
pub(crate) fn key_cost(value: &str) -> anyhow::Result<KeyCost> {
    let millis = settings::number("encrypt.iter-time", value)?;
    Ok(KeyCost::Milliseconds(u32::try_from(millis).context("encrypt.iter-time is too long")?))
}

/// Refuses names of backing and data files that no image follows.
///
/// # Errors
/// `json:` and protocols.
pub(crate) fn plain_path(name: &str) -> anyhow::Result<()> {
    let begin = name.split('/').next().unwrap_or_default();
    ensure!(
        !begin.contains(':'),
        "Could not open '{name}': images refer to plain paths only, not to protocols or json: names \
         (./{name} if it is a path)"
    );
    Ok(())
}

/// Where a backing name leads, seen from the image that records it.
pub(crate) fn beside(image: &Path, name: &str) -> PathBuf {
    match image.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.join(name),
        _ => name.into(),
    }
}

/// References are confined by default: better said now than when the image is opened.
pub(crate) fn tell_of_distance(file: &Path, other: &Path, access: &Access) {
    // A data file is yet to be made: its folder is there.
    let resolved = other.canonicalize().or_else(|_| folder(other).canonicalize());
    if let (Ok(inside), Ok(other)) = (folder(file).canonicalize(), resolved)
        && access.allow_references.is_none()
        && !other.starts_with(&inside)
    {
        warn(&format!(
            "{} lies outside {}: opening the new image will need --allow-references",
            other.display(),
            inside.display()
        ));
    }
}
