//! Looking at an image without opening it: the header, the snapshot table and the bitmap directory are all that is
//! read. Neither its data file nor its backing file is touched, and no table that maps or counts clusters.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use block::{ByteRange, HostFile};

use crate::bitmap::codec::{BitmapsExtension, DirectoryEntry, parse_directory};
use crate::encryption::{self, LuksInfo};
use crate::error::{Corruption, Error, Fault};
use crate::header::{BITMAPS, CRYPT_LUKS, Header};
use crate::image::Image;
use crate::info::ImageInfo;
use crate::open::parse_header;
use crate::snapshot::{Snapshot, SnapshotEntry};
use crate::snapshots::read_snapshots;
use crate::units::HostOffset;

/// A bitmap as an image lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedBitmap {
    /// Its name; bytes that are no UTF-8 are replaced.
    pub name: String,
    /// The bytes of the disk that a bit stands for.
    pub granularity_bytes: u64,
    /// Every change of the disk is to be recorded in it.
    pub auto: bool,
    /// It was not saved when the image was last written: it must not be used.
    pub in_use: bool,
}

/// What is seen of an image from outside.
#[derive(Debug)]
#[non_exhaustive]
pub struct Inspection {
    /// What the header says.
    pub info: ImageInfo,
    /// The internal snapshots, oldest first.
    pub snapshots: Vec<Snapshot>,
    /// The bitmaps that the image vouches for, in the order of their directory.
    pub bitmaps: Vec<RecordedBitmap>,
    /// What the LUKS header says of itself, where there is one and this build knows LUKS.
    pub luks: Option<LuksInfo>,
    /// The space that the file takes on the host, in bytes.
    pub allocated_bytes: u64,
    /// The length of the file in bytes.
    pub file_bytes: u64,
    /// What is wrong: parts named here are left out above, and opening may be refused for the same reasons.
    pub faults: Vec<Error>,
}

impl Image {
    /// Looks at an image. It is not locked, so that one in use can be looked at, too.
    ///
    /// Damaged, dirty, corrupt and encrypted images are no errors as long as their header can be read.
    ///
    /// # Errors
    /// [`Error::Corrupt`] and [`Error::Unsupported`] for a header that means nothing or has unknown features,
    /// [`Error::Host`].
    pub async fn inspect(path: &Path) -> Result<Inspection, Error> {
        let options = block::OpenOptions {
            read_only: true,
            direct: false,
            lock: false,
            ..block::OpenOptions::default()
        };
        let file = HostFile::open(path, options).await?;
        let metadata = std::fs::metadata(path);
        let metadata = metadata.map_err(|source| Error::Path { path: path.to_owned(), source })?;
        let mut seen = Self::inspect_on(&file).await?;
        // Blocks as the system call counts them have 512 bytes on every file system.
        seen.allocated_bytes = metadata.blocks().saturating_mul(512);
        Ok(seen)
    }

    /// Looks at an image in a file that is open already; [`Inspection::allocated_bytes`] is the file's length.
    ///
    /// # Errors
    /// As [`Image::inspect`].
    pub async fn inspect_on(file: &HostFile) -> Result<Inspection, Error> {
        let header = parse_header(file).await?;
        let file_bytes = file.len();
        let mut faults = Vec::new();
        if let Err(fault) = header.check(file_bytes) {
            faults.push(fault.of(file.path()));
        }
        let snapshots = match read_snapshots(file, &header).await {
            Ok(table) => table.entries,
            Err(error) => or_host_error(error, &mut faults)?,
        };
        let bitmaps = match read_bitmaps(file, &header).await {
            Ok(bitmaps) => bitmaps,
            Err(error) => or_host_error(error, &mut faults)?,
        };
        let luks = match header.crypt_method {
            CRYPT_LUKS => match encryption::describe(file, &header).await {
                Ok(luks) => luks,
                Err(error) => or_host_error(error, &mut faults)?,
            },
            _ => None,
        };
        let describe = |entry: SnapshotEntry| entry.describe(header.size_bytes);
        Ok(Inspection {
            info: ImageInfo::of_header(file.path().to_owned(), &header, file_bytes),
            snapshots: snapshots.into_iter().map(describe).collect(),
            bitmaps,
            luks,
            allocated_bytes: file_bytes,
            file_bytes,
            faults,
        })
    }
}

/// A failing host is an error, a broken part of the image is noted and left out.
fn or_host_error<T: Default>(error: Error, faults: &mut Vec<Error>) -> Result<T, Error> {
    if matches!(error, Error::Host(_)) {
        return Err(error);
    }
    faults.push(error);
    Ok(T::default())
}

async fn read_bitmaps(file: &HostFile, header: &Header) -> Result<Vec<RecordedBitmap>, Error> {
    let fault = |fault: Fault| fault.of(file.path());
    // Without the bit somebody has written who does not keep bitmaps: none of them can be believed.
    let Some(data) = header.extensions.bitmaps.as_ref().filter(|_| header.autoclear & BITMAPS != 0)
    else {
        return Ok(Vec::new());
    };
    let extension = BitmapsExtension::parse(data, HostOffset(0), header.geometry).map_err(fault)?;
    let at = extension.directory_at;
    let range = ByteRange::new(at.0, extension.directory_bytes);
    let range = range.filter(|range| range.end() <= file.len()).ok_or_else(|| {
        fault(Fault::Corrupt { at, what: Corruption::Truncated { what: "the bitmap directory" } })
    })?;
    let bytes = file.read(range).await?;
    let entries = parse_directory(&bytes, &extension, header.geometry).map_err(fault)?;
    let describe = |entry: DirectoryEntry| RecordedBitmap {
        name: String::from_utf8_lossy(&entry.name).into_owned(),
        granularity_bytes: 1 << entry.granularity_bits,
        auto: entry.auto,
        in_use: entry.in_use,
    };
    Ok(entries.into_iter().map(describe).collect())
}
