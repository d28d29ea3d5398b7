//! An open source: a device to read, and what its server knows of changes. Which parts are read is decided elsewhere.

use std::path::Path;
use std::sync::Arc;

use block::{BlockDevice, ByteRange, HostError, HostFile, OpenOptions, RawDevice};
use nbd_server::client::{ClientOptions, NbdDevice};

use crate::error::Cause;
use crate::{SourceInfo, SourceSpec, tls};

/// The context in which a server tells what is a hole and what is zero.
const ALLOCATION: &str = "base:allocation";

/// What QEMU puts before the name of a dirty bitmap to make a context of it.
const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";

/// The flag of an extent that a dirty bitmap calls dirty.
const DIRTY: u64 = 1;

/// How a qcow2 image begins.
const QCOW2_MAGIC: &[u8] = b"QFI\xfb";

/// What a source failed at, and where.
#[derive(Debug)]
pub(crate) struct SourceError {
    pub(crate) range: ByteRange,
    pub(crate) cause: Cause,
}

/// A source, open for reading.
pub(crate) struct Source {
    device: Arc<dyn BlockDevice>,
    /// The file whose length must be watched; a server answers for its own.
    file: Option<Arc<RawDevice>>,
    nbd: Option<Arc<NbdDevice>>,
    bitmap: Option<Bitmap>,
}

/// The dirty bitmap that a source names.
struct Bitmap {
    name: String,
    context: String,
    offered: bool,
}

impl Source {
    /// Opens a source, with `connections` to a server.
    pub(crate) async fn open(spec: &SourceSpec, connections: usize) -> Result<Self, Cause> {
        match spec {
            SourceSpec::File(path) => Self::open_file(path).await,
            SourceSpec::Nbd { address, export, tls, bitmap } => {
                let context = bitmap.as_ref().map(|name| format!("{DIRTY_BITMAP}{name}"));
                let mut meta_contexts = vec![ALLOCATION.to_owned()];
                meta_contexts.extend(context.clone());
                let options =
                    ClientOptions { connections, meta_contexts, ..ClientOptions::default() };
                let nbd = tls::connect(address, export, tls.as_ref(), options).await?;
                let granted = |context: &str| nbd.contexts().iter().any(|known| known == context);
                let bitmap = bitmap.clone().zip(context).map(|(name, context)| {
                    let offered = granted(&context);
                    Bitmap { name, context, offered }
                });
                let device: Arc<dyn BlockDevice> = nbd.clone();
                Ok(Self { device, file: None, nbd: Some(nbd), bitmap })
            }
        }
    }

    /// Opens a file without QEMU's image locks: whoever names it vouches that it stands still, as a snapshot does.
    async fn open_file(path: &Path) -> Result<Self, Cause> {
        let options = OpenOptions { lock: false, ..OpenOptions::reading() };
        Ok(Self::of_file(HostFile::open(path, options).await?))
    }

    /// A file that is open already.
    pub(crate) fn of_file(file: HostFile) -> Self {
        let file = RawDevice::new(file);
        Self { device: file.clone(), file: Some(file), nbd: None, bitmap: None }
    }

    /// A device that is open already.
    #[cfg(test)]
    pub(crate) fn of(device: Arc<dyn BlockDevice>) -> Self {
        Self { device, file: None, nbd: None, bitmap: None }
    }

    /// What it is.
    pub(crate) async fn info(&self) -> Result<SourceInfo, Cause> {
        Ok(SourceInfo {
            size_bytes: self.size_bytes(),
            bitmap_offered: self.bitmap.as_ref().map(|bitmap| bitmap.offered),
            looks_like_qcow2: self.looks_like_qcow2().await?,
        })
    }

    /// Whether a file begins as qcow2 images do. A guest can write that to its raw disk, so it proves nothing.
    pub(crate) async fn looks_like_qcow2(&self) -> Result<bool, Cause> {
        let magic = ByteRange::between(0, QCOW2_MAGIC.len() as u64);
        if self.file.is_none() || self.size_bytes() < magic.end() {
            return Ok(false);
        }
        Ok(self.device.read(magic).await?.to_vec() == QCOW2_MAGIC)
    }

    /// The size of the disk, in bytes.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.device.limits().size_bytes
    }

    /// Fails if the source is shorter than it was when it was opened; otherwise its size now, which may be larger.
    ///
    /// Nothing that was read or called zero is believed before this was asked afterwards.
    pub(crate) async fn check_size(&self) -> Result<u64, SourceError> {
        let opened_bytes = self.size_bytes();
        let Some(file) = &self.file else { return Ok(opened_bytes) };
        let failed = |error: HostError| SourceError { range: error.range, cause: error.into() };
        let whole = ByteRange::between(0, opened_bytes);
        file.file().check_uncut(whole).await.map_err(failed)?;
        file.file().host_len().map_err(failed)
    }

    /// The device itself.
    pub(crate) fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.device
    }

    /// The bitmap that it names, and whether the server offers it.
    pub(crate) fn bitmap(&self) -> Option<(&str, bool)> {
        self.bitmap.as_ref().map(|bitmap| (bitmap.name.as_str(), bitmap.offered))
    }

    /// Which parts of `range` the bitmap calls dirty, and how far the answer goes.
    pub(crate) async fn dirty(&self, range: ByteRange) -> Result<(Vec<ByteRange>, u64), Cause> {
        let (Some(nbd), Some(bitmap)) = (&self.nbd, &self.bitmap) else {
            // Without a bitmap everything may have changed.
            return Ok((vec![range], range.end()));
        };
        let extents = nbd.block_status(&bitmap.context, range).await?;
        let end = extents.last().map_or(range.start(), |extent| extent.range.end());
        let dirty = extents.iter().filter(|extent| extent.flags & DIRTY != 0);
        Ok((dirty.map(|extent| extent.range).collect(), end))
    }

    /// Says goodbye to the server, if there is one.
    pub(crate) async fn close(&self) {
        if let Some(nbd) = &self.nbd {
            nbd.disconnect().await;
        }
    }
}
