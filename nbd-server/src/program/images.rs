//! Opening an image by its format. The one place of this crate that knows formats.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use block::{BlockDevice, RawDevice};
use qcow2::{Image, OpenOptions, References};

use super::options::{AllowReferences, ExportSpec, Format};

/// The first bytes of a qcow2 image.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// An image that is open, with its path for messages.
pub(super) struct Opened {
    path: PathBuf,
    device: Arc<dyn BlockDevice>,
}

impl Opened {
    /// What to serve, and to close at the end.
    pub(super) fn device(&self) -> Arc<dyn BlockDevice> {
        Arc::clone(&self.device)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

/// Opens the image of an export.
pub(super) async fn open(
    spec: &ExportSpec,
    references: Option<&AllowReferences>,
) -> anyhow::Result<Opened> {
    let path = &spec.path;
    let cannot = || format!("cannot open {} for export {:?}", path.display(), spec.name);
    let format = match spec.format {
        Some(format) => format,
        None => recognise(path).with_context(cannot)?,
    };
    let device: Arc<dyn BlockDevice> = match format {
        Format::Raw => RawDevice::open(path, spec.read_only).await.with_context(cannot)?,
        Format::Qcow2 => {
            let options = qcow2_options(spec.read_only, references);
            Arc::new(Image::open(path, options).await.with_context(cannot)?)
        }
    };
    Ok(Opened { path: path.clone(), device })
}

/// Locked, direct, and with backing files where they are allowed to be.
fn qcow2_options(read_only: bool, references: Option<&AllowReferences>) -> OpenOptions {
    let options = if read_only { OpenOptions::reading() } else { OpenOptions::writing() };
    options.references(match references {
        None => References::Confined,
        Some(AllowReferences::Any) => References::Any,
        Some(AllowReferences::Below(directory)) => References::Under(directory.clone()),
    })
}

/// Recognises qcow2. Anything else must be named: a guest could write a header into a raw disk, and would be believed.
fn recognise(path: &Path) -> anyhow::Result<Format> {
    let mut magic = [0; QCOW2_MAGIC.len()];
    match File::open(path)?.read_exact(&mut magic) {
        Ok(()) if magic == QCOW2_MAGIC => Ok(Format::Qcow2),
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(error.into()),
        _ => bail!("it is no qcow2 image; say format=raw if it is a raw one"),
    }
}
