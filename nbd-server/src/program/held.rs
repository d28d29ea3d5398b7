//! A hold on the file of an image, by which it is found again however it is called by then. Nothing is read, written or
//! locked by it.

use std::fs::{File, read_link};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use rustix::fs::{Mode, OFlags};

use super::images::{FileId, ImageKey};

/// The file of an image. While it is held, no other one gets its numbers.
pub(super) struct Held {
    file: Arc<File>,
    id: FileId,
}

impl Held {
    /// # Errors
    /// Where another file, or none, has the name of the image.
    pub(super) async fn of(key: &ImageKey) -> anyhow::Result<Self> {
        let (path, id) = (key.path().to_owned(), key.file().clone());
        let wanted = id.clone();
        let file = blocking(move || {
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let file = File::from(rustix::fs::open(&path, flags, Mode::empty())?);
            if FileId::of(&file.metadata()?) != Some(wanted) {
                bail!("another file was put in its place while it was opened");
            }
            Ok(file)
        });
        Ok(Self { file: Arc::new(file.await?), id })
    }

    /// Whether a path leads to it now.
    pub(super) async fn is_at(&self, path: &Path) -> bool {
        let (path, id) = (path.to_owned(), self.id.clone());
        blocking(move || Ok(is(&path, &id))).await.unwrap_or(false)
    }

    /// A path that leads to it now: the one by which it was opened, the one to which it was renamed, and for what
    /// refers to no other files any at all.
    ///
    /// # Errors
    /// Where there is none.
    pub(super) async fn path(&self, key: &ImageKey) -> anyhow::Result<PathBuf> {
        let known = key.path().to_owned();
        let file = Arc::clone(&self.file);
        let (id, is_raw) = (self.id.clone(), key.is_raw());
        blocking(move || {
            if is(&known, &id) {
                return Ok(known);
            }
            let any = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
            let renamed = read_link(&any).context("it does not have its name any more")?;
            let found = [Some(renamed), is_raw.then_some(any)].into_iter().flatten();
            let mut found = found.filter(|path| is(path, &id));
            found
                .next()
                .context("it does not have its name any more, nor another one that is known")
        })
        .await
    }
}

fn is(path: &Path, id: &FileId) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| FileId::of(&metadata).as_ref() == Some(id))
}

/// What may wait for a disk.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await?
}
