//! Files that are made for exports, and taken away again where nothing comes of them. What is put into them is not known
//! here.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use block::{BlockDevice, HostFile, OpenOptions, RawDevice};
use parking_lot::Mutex;
use qcow2::{CreateOptions, Image};

use super::images::{FileId, folder_of};
use super::nameless;
use super::options::ExportSpec;

/// What was made since the exports that are served last changed.
#[derive(Debug, Default)]
pub(super) struct Made {
    files: Vec<(PathBuf, FileId)>,
    /// Where nothing is to be changed: files without a name, by the name that they would have.
    rehearsed: Option<Arc<Mutex<HashMap<PathBuf, File>>>>,
}

impl Made {
    /// Makes files without names.
    pub(super) fn rehearsed() -> Self {
        Self { files: Vec::new(), rehearsed: Some(Arc::default()) }
    }

    /// Makes the raw image of an export where there is none and one is to be made. The path that leads to it where that is
    /// not the one of the export.
    pub(super) async fn make(&mut self, spec: &ExportSpec) -> anyhow::Result<Option<PathBuf>> {
        let asked = spec.clone();
        if let Some(rehearsed) = self.rehearsed.clone() {
            return tokio::task::spawn_blocking(move || rehearse(&asked, &mut rehearsed.lock()))
                .await?;
        }
        let Some(bytes) = tokio::task::spawn_blocking(move || wanting(&asked)).await? else {
            return Ok(None);
        };
        let device = RawDevice::create(&spec.path, bytes).await?;
        // Its own numbers: the name may be somebody else's by now.
        if let Some((device, inode)) = device.file().id() {
            self.files.push((spec.path.clone(), FileId::File(device, inode)));
        }
        device.close().await?;
        tracing::info!(image = %spec.path.display(), bytes, "made an image");
        Ok(None)
    }

    /// Makes a qcow2 image, in the place of a file that is empty if there is one.
    pub(super) async fn make_image(
        &mut self,
        path: &Path,
        options: &CreateOptions,
    ) -> anyhow::Result<()> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        Image::create(path, options).await?;
        if let Some(file) = id(std::fs::symlink_metadata(path)) {
            self.files.push((path.to_owned(), file));
        }
        Ok(())
    }

    /// Makes a qcow2 image without a name.
    pub(super) async fn rehearse_image(
        &self,
        folder: &Path,
        options: &CreateOptions,
    ) -> anyhow::Result<()> {
        let file = nameless::file(folder)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let file = HostFile::open(&path, OpenOptions::writing()).await?;
        Ok(Image::create_on(&file, options).await?)
    }

    /// They stay.
    pub(super) fn keep(&mut self) {
        self.files.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for (path, file) in &self.files {
            let is_ours = id(std::fs::symlink_metadata(path)).as_ref() == Some(file);
            match is_ours.then(|| std::fs::remove_file(path)) {
                Some(Ok(())) => {
                    tracing::info!(image = %path.display(), "removed the image that was made");
                }
                Some(Err(error)) => tracing::warn!("cannot remove {}: {error}", path.display()),
                None => {}
            }
        }
    }
}

fn id(metadata: io::Result<Metadata>) -> Option<FileId> {
    metadata.ok().as_ref().and_then(FileId::of)
}

/// The length, in bytes, of the image that is to be made for an export, if one is. Blocks.
fn wanting(spec: &ExportSpec) -> Option<u64> {
    spec.makes_bytes.filter(|_| !spec.read_only && is_missing(&spec.path))
}

fn is_missing(path: &Path) -> bool {
    matches!(path.try_exists(), Ok(false))
}

/// What leads to the image of an export that is not there: a file without a name, made for it or for one before it.
/// Blocks.
fn rehearse(
    spec: &ExportSpec,
    made: &mut HashMap<PathBuf, File>,
) -> anyhow::Result<Option<PathBuf>> {
    if !is_missing(&spec.path) {
        return Ok(None);
    }
    let folder = folder_of(&spec.path);
    let name = spec.path.file_name().context("it has no name")?;
    let place = std::fs::canonicalize(folder)?.join(name);
    if let Some(bytes) = wanting(spec)
        && !made.contains_key(&place)
    {
        if std::fs::symlink_metadata(&place).is_ok() {
            // A link to nowhere: what is new is made in no such place.
            return Err(io::Error::from(io::ErrorKind::AlreadyExists).into());
        }
        let file = nameless::file(folder)?;
        file.set_len(bytes)?;
        made.insert(place.clone(), file);
    }
    let path = |file: &File| PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    Ok(made.get(&place).map(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_made_goes_unless_it_is_kept_and_nothing_else_does() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let spec = |name: &str| ExportSpec {
            path: path(name),
            makes_bytes: Some(4096),
            ..ExportSpec::default()
        };
        std::fs::write(path("there"), "abc").unwrap();
        let mut made = Made::default();
        for name in ["there", "replaced", "goes"] {
            made.make(&spec(name)).await.unwrap();
        }
        assert_eq!(std::fs::metadata(path("goes")).unwrap().len(), 4096);
        std::fs::write(path("other"), "def").unwrap();
        std::fs::rename(path("other"), path("replaced")).unwrap();
        drop(made);
        assert!(!path("goes").exists());
        assert_eq!(std::fs::read(path("there")).unwrap(), b"abc");
        assert_eq!(std::fs::read(path("replaced")).unwrap(), b"def");
        let mut made = Made::default();
        made.make(&spec("stays")).await.unwrap();
        made.keep();
        drop(made);
        assert!(path("stays").exists());
        let unread = ExportSpec { read_only: true, ..spec("not made") };
        assert_eq!(wanting(&unread), None);
    }

    #[tokio::test]
    async fn an_image_that_cannot_be_made_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let spec =
            ExportSpec { path: path.clone(), makes_bytes: Some(u64::MAX), ..ExportSpec::default() };
        Made::default().make(&spec).await.expect_err("no file is that long");
        assert!(!path.exists());
        Made::rehearsed().make(&spec).await.expect_err("no file is that long");
    }

    #[tokio::test]
    async fn a_rehearsal_makes_one_file_for_each_name_and_none_that_can_be_seen() {
        let dir = tempfile::tempdir().unwrap();
        let spec = |name: &str, makes_bytes, read_only| ExportSpec {
            path: dir.path().join(name),
            makes_bytes,
            read_only,
            ..ExportSpec::default()
        };
        let mut made = Made::rehearsed();
        assert_eq!(made.make(&spec("a", Some(4096), true)).await.unwrap(), None, "none yet");
        let path = made.make(&spec("a", Some(4096), false)).await.unwrap().unwrap();
        for again in [spec("./a", Some(8192), false), spec("a", None, true)] {
            assert_eq!(made.make(&again).await.unwrap().as_ref(), Some(&path));
        }
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 4096, "the first counts");
        assert_ne!(made.make(&spec("b", Some(4096), false)).await.unwrap(), Some(path));
        std::os::unix::fs::symlink("nowhere", dir.path().join("link")).unwrap();
        made.make(&spec("link", Some(4096), false)).await.expect_err("nothing is made there");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "the link alone");
    }
}
