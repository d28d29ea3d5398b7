//! The files that an image stands on, by what each says of the next. They are named here, and not opened as disks.

use std::path::{Path, PathBuf};

use qcow2::{Image, MAX_CHAIN_DEPTH};

use crate::making::beside;
use crate::open::Opened;
use crate::target::file_id;

/// An image's file and the files below it, backing and data files, as they are named seen from where the program runs.
/// Ends where an image cannot be looked at, or names nothing below it.
pub(crate) async fn files(top: &Path) -> Vec<PathBuf> {
    let mut files = vec![top.to_owned()];
    let mut path = top.to_owned();
    for _ in 0..MAX_CHAIN_DEPTH {
        let Ok(seen) = Image::inspect(&path).await else { break };
        if let Some(data) = seen.info.data_file.and_then(|file| file.name) {
            files.push(beside(&path, &data));
        }
        let Some(backing) = seen.info.backing else { break };
        path = beside(&path, &backing.name);
        files.push(path.clone());
    }
    files
}

/// As [`files`], by device and inode: what must not be written while the image is read.
pub(crate) async fn ids(top: &Path) -> Vec<(u64, u64)> {
    files(top).await.iter().filter_map(|file| file_id(file)).collect()
}

/// The files of several open images.
pub(crate) async fn ids_of(opened: &[Opened]) -> Vec<(u64, u64)> {
    let mut all = Vec::new();
    for path in opened.iter().filter_map(|opened| opened.place.path()) {
        all.extend(ids(path).await);
    }
    all
}
