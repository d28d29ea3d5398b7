//! A file that was made and is not what it is to be yet: it goes again unless it is kept. Making it is done elsewhere.

use std::fs::{Metadata, remove_file, symlink_metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Takes the name of a new file away when dropped, unless another file has it by then.
#[derive(Debug)]
pub(crate) struct Unfinished {
    path: PathBuf,
    /// Device and inode; `None` once it stays.
    made: Option<(u64, u64)>,
}

impl Unfinished {
    /// The file that was made at `path`, by device and inode.
    pub(crate) fn new(path: &Path, made: Option<(u64, u64)>) -> Self {
        Self { path: path.to_owned(), made }
    }

    /// It stays.
    pub(crate) fn keep(mut self) {
        self.made = None;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        let id = |found: Metadata| (found.dev(), found.ino());
        if let Some(made) = self.made
            && symlink_metadata(&self.path).is_ok_and(|found| id(found) == made)
            && let Err(error) = remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a file that was made in vain");
        }
    }
}
