//! Making a new image: what it is to be, and the steps from nothing to a file that is durable. Where its parts lie is
//! decided in `create::layout`.

mod layout;
mod options;

use std::path::Path;

use block::{ByteRange, HostFile};
use bytes::Bytes;

use crate::encryption;
use crate::error::{Error, InvalidOption};
use crate::image::Image;
use crate::units::index;
use layout::Layout;

pub use options::{
    BackingFormat, BackingName, CreateOptions, DataFileName, Preallocation, Version,
};

/// The tables of a new image are made and written in pieces of this many bytes, or of a cluster.
const PIECE_BYTES: u64 = 1 << 20;

impl Image {
    /// Makes a new image, and its external data file where it has one. When this returns, files and directory entries
    /// are durable; when it fails, there are no files.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what no image can be; [`Error::Host`] if a file exists or cannot be written.
    pub async fn create(path: &Path, options: &CreateOptions) -> Result<(), Error> {
        let layout = plan(path, options).await?;
        let file = HostFile::open(path, block::OpenOptions::creating()).await?;
        let made = match &options.data_file {
            None => write(&layout, &file, None).await,
            Some(name) => create_data_file(path, &layout, &file, name).await,
        };
        let made = match made {
            Ok(()) => sync_folder(path),
            failed => failed,
        };
        if made.is_err() {
            // The error that counts is the first one; a file that stays behind cannot be opened as an image.
            let _not_removed = std::fs::remove_file(path);
        }
        made
    }

    /// Makes a new image without an external data file in an open file, which must be empty (or a block device, which
    /// is overwritten).
    ///
    /// # Errors
    /// As [`Image::create`]; [`InvalidOption::DataFileMissing`] where `options` ask for a data file.
    pub async fn create_on(file: &HostFile, options: &CreateOptions) -> Result<(), Error> {
        Self::create_with_data(file, None, options).await
    }

    /// Makes a new image in an open file, with its guest data in another one. Both must be empty (or block devices).
    ///
    /// # Errors
    /// As [`Image::create_on`]; [`InvalidOption::DataFileUnexpected`] where `options` name no data file.
    pub async fn create_with_data(
        file: &HostFile,
        data: Option<&HostFile>,
        options: &CreateOptions,
    ) -> Result<(), Error> {
        let what = match (&options.data_file, data) {
            (Some(_), None) => Some(InvalidOption::DataFileMissing),
            (None, Some(_)) => Some(InvalidOption::DataFileUnexpected),
            _ => None,
        };
        if let Some(what) = what {
            return Err(Error::Invalid { file: file.path().to_owned(), what });
        }
        write(&plan(file.path(), options).await?, file, data).await
    }
}

async fn plan(path: &Path, options: &CreateOptions) -> Result<Layout, Error> {
    let invalid = |what| Error::Invalid { file: path.to_owned(), what };
    options.check().map_err(invalid)?;
    let luks = match &options.encryption {
        Some(options) => encryption::format(path, options).await?,
        None => Vec::new(),
    };
    Layout::new(options, luks).map_err(invalid)
}

/// Makes the data file beside the image, then the image. Removes the data file again where that fails.
async fn create_data_file(
    path: &Path,
    layout: &Layout,
    file: &HostFile,
    name: &DataFileName,
) -> Result<(), Error> {
    let place = folder(path).join(&name.path);
    let data = HostFile::open(&place, block::OpenOptions::creating()).await?;
    let made = match write(layout, file, Some(&data)).await {
        Ok(()) => sync_folder(&place),
        failed => failed,
    };
    if made.is_err() {
        let _not_removed = std::fs::remove_file(&place);
    }
    made
}

async fn write(layout: &Layout, file: &HostFile, data: Option<&HostFile>) -> Result<(), Error> {
    let cluster = layout.geometry.bytes();
    let used = layout.used_clusters() * cluster;
    let metadata = layout.metadata_clusters() * cluster;
    if file.len() < metadata {
        file.set_len(metadata).await?;
    }
    if file.is_fixed_len() {
        file.write_zeroes(ByteRange::between(0, metadata), None).await?;
    }
    match data {
        None => preallocate(file, ByteRange::between(metadata, used), layout.preallocation).await?,
        Some(data) => {
            let disk = ByteRange::between(0, layout.header.size_bytes);
            preallocate(data, disk, layout.preallocation).await?;
            data.sync().await?;
        }
    }
    for (range, piece) in [
        (layout.refcount_table(), Layout::refcount_table_piece as Piece),
        (layout.refcount_blocks(), Layout::refcount_block_piece),
        (layout.l1_table(), Layout::l1_piece),
        (layout.luks(), Layout::luks_piece),
        (layout.l2_tables(), Layout::l2_piece),
    ] {
        for part in range.pieces(PIECE_BYTES.max(cluster)) {
            let bytes = piece(layout, part);
            if bytes.iter().any(|byte| *byte != 0) {
                file.write(part.start(), Bytes::from(bytes), None).await?;
            }
        }
    }
    // Last, so that nothing half-made looks like an image.
    file.sync().await?;
    file.write(0, Bytes::from(layout.header_bytes.clone()), None).await?;
    Ok(file.sync().await?)
}

type Piece = fn(&Layout, ByteRange) -> Vec<u8>;

/// Makes `range`, which ends where the file shall, what the mode says. It reads as zeros.
async fn preallocate(file: &HostFile, range: ByteRange, mode: Preallocation) -> Result<(), Error> {
    match mode {
        Preallocation::Off | Preallocation::Metadata => {
            if file.len() < range.end() {
                file.set_len(range.end()).await?;
            }
            if file.is_fixed_len() && mode == Preallocation::Metadata {
                file.write_zeroes(range, None).await?;
            }
        }
        Preallocation::Falloc => {
            if file.len() < range.end() {
                file.set_len(range.end()).await?;
            }
            // A device holds what it held, and a host that cannot allocate has to be written.
            file.write_zeroes(range, None).await?;
        }
        Preallocation::Full => {
            file.grow(range.end()).await?;
            for part in range.pieces(PIECE_BYTES) {
                file.write(part.start(), Bytes::from(vec![0; index(part.len())]), None).await?;
            }
        }
    }
    Ok(())
}

/// The folder that relative names in an image start from.
pub(crate) fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

pub(crate) fn sync_folder(path: &Path) -> Result<(), Error> {
    let folder = folder(path);
    let synced = std::fs::File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(|source| Error::Path { path: folder.to_owned(), source })
}
