//! The file that keeps what is written to an image that has not come: a qcow2 image over that image, NAME.waiting. Where
//! it lies, making, opening and forgetting it; what is put into it is not known here.

use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use qcow2::{BackingFormat, CreateOptions, Image, OpenOptions};

use super::unknown::Unknown;
use crate::program::first_bytes::FirstBytes;
use crate::program::images::{self, FileId, ImageKey, Opening};
use crate::program::made::Made;
use crate::program::options::{ExportSpec, Format};

/// What is not known is written in whole blocks of this many bytes.
pub(super) const BLOCK_BYTES: u64 = 4096;

/// The folder of the file.
pub(in crate::program) fn folder_of(spec: &ExportSpec) -> &Path {
    spec.diff_folder.as_deref().unwrap_or_else(|| images::folder_of(&spec.path))
}

/// The path of the file.
pub(in crate::program) fn path_of(spec: &ExportSpec) -> PathBuf {
    path_in(folder_of(spec), &spec.path)
}

fn path_in(folder: &Path, image: &Path) -> PathBuf {
    let mut name = OsString::from(image.file_name().unwrap_or_default());
    name.push(".waiting");
    folder.join(name)
}

/// How the file names its image, so that people find it: as what lies beside it, or else by its whole path.
fn image_name(spec: &ExportSpec) -> anyhow::Result<String> {
    let path = match &spec.diff_folder {
        // The dot keeps a colon from being the end of a protocol.
        None => Path::new(".").join(spec.path.file_name().context("it has no name")?),
        Some(_) => std::path::absolute(&spec.path)?,
    };
    let name = path.to_str().context("waitfile needs a path that is UTF-8")?;
    Ok(name.to_owned())
}

/// What has the name of the file; nothing where it is missing or empty. Blocks.
///
/// # Errors
/// What is no such file.
fn look(path: &Path) -> anyhow::Result<Option<Metadata>> {
    let metadata = match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        metadata => metadata?,
    };
    if metadata.is_file() && metadata.len() == 0 {
        return Ok(None);
    }
    if !metadata.is_file() || !FirstBytes::of(path)?.is_qcow2() {
        bail!(
            "it is no file that keeps writes, or was not made to its end, and then it keeps none: remove it, or name \
             another folder by cowdir"
        );
    }
    Ok(Some(metadata))
}

/// Finds the file, or makes it; `None` where it could be made and is not, because nothing is to be changed.
///
/// # Errors
/// Where another thing has its name, or it cannot be made.
pub(in crate::program) async fn find(
    spec: &ExportSpec,
    how: &Opening,
    made: &mut Made,
) -> anyhow::Result<Option<ImageKey>> {
    let path = path_of(spec);
    let about = |what: &str| format!("cannot {what} {}", path.display());
    let place = path.clone();
    let found = tokio::task::spawn_blocking(move || look(&place)).await?;
    if found.with_context(|| about("use"))?.is_none() {
        let options = CreateOptions::new(spec.size.unwrap_or(0))
            .cluster_bytes(u32::try_from(BLOCK_BYTES)?)
            .backing(image_name(spec)?, BackingFormat::Raw);
        if how.only_looks {
            made.rehearse_image(folder_of(spec), &options).await.with_context(|| about("make"))?;
            return Ok(None);
        }
        made.make_image(&path, &options).await.with_context(|| about("make"))?;
    }
    let asked = ExportSpec { path, format: Some(Format::Qcow2), ..ExportSpec::default() };
    let key = move || ImageKey::of(&asked, None, &Opening::default());
    tokio::task::spawn_blocking(key).await?.map(Some)
}

/// Opens the file, and locks it.
///
/// # Errors
/// Where somebody has it, or it is that of another disk or image.
pub(super) async fn open(
    spec: &ExportSpec,
    diff: &ImageKey,
    how: &Opening,
) -> anyhow::Result<Image> {
    let path = diff.path().display();
    let size_bytes = spec.size.unwrap_or(0);
    let options = OpenOptions { rehearse: how.only_looks, ..OpenOptions::writing() };
    let below = Arc::new(Unknown { size_bytes });
    let image = Image::open_with_backing(diff.path(), Some(below), options).await;
    let image = image.map_err(images::in_use)?;
    let info = image.info();
    let (wanted, found) = (image_name(spec)?, info.backing.map(|backing| backing.name));
    let wrong = if info.size_bytes != size_bytes {
        format!("a disk of {} bytes, and filesize says {size_bytes}", info.size_bytes)
    } else if found.as_ref() != Some(&wanted) {
        format!("the image {}, and not {wanted}", found.unwrap_or_default())
    } else if info.cluster_bytes != BLOCK_BYTES {
        "another program".to_owned()
    } else {
        return Ok(image);
    };
    block::BlockDevice::close(&image).await?;
    bail!("{path} keeps writes of {wrong}");
}

/// Refuses an image to which writes are kept that are not in it. Blocks.
///
/// # Errors
/// Where there are some.
pub(in crate::program) fn refuse_beside(spec: &ExportSpec, key: &ImageKey) -> anyhow::Result<()> {
    let path = key.path();
    let mut places = vec![
        path_in(images::folder_of(&spec.path), &spec.path),
        path_in(images::folder_of(path), path),
    ];
    places.extend(spec.diff_folder.as_deref().map(|folder| path_in(folder, &spec.path)));
    for place in places {
        let is_file = std::fs::metadata(&place).is_ok_and(|metadata| metadata.is_file());
        if !is_file {
            continue;
        }
        let first = FirstBytes::of(&place).with_context(|| {
            format!("cannot read {}, which may keep writes to the image", place.display())
        })?;
        if first.is_qcow2() {
            bail!(
                "{} keeps writes that are not in the image: serve it with waitfile and send SIGUSR1, which merges them, or \
                 remove that file where they are not wanted",
                place.display()
            );
        }
    }
    Ok(())
}

/// Empties the file, so that it is never taken for one that keeps something, and removes it. Blocks.
///
/// # Errors
/// Where it still keeps everything.
pub(super) fn forget(diff: &ImageKey) -> io::Result<()> {
    let path = diff.path();
    let file = match File::options().write(true).open(path) {
        Ok(file) if FileId::of(&file.metadata()?).as_ref() == Some(diff.file()) => file,
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {
            tracing::warn!("{} was taken away while it was in use", path.display());
            return Ok(());
        }
    };
    file.set_len(0)?;
    let removed = file
        .sync_all()
        .and_then(|()| std::fs::remove_file(path))
        .and_then(|()| File::open(images::folder_of(path))?.sync_all());
    if let Err(error) = removed {
        let path = path.display();
        tracing::error!(
            "cannot remove {path}, which keeps nothing any more: {error}; see to it that it is gone before the next start"
        );
    }
    Ok(())
}
