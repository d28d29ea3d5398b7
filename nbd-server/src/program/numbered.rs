//! The files of which an export is joined: those whose names are its path with numbers from 0 on. Nothing is opened here.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use super::images::FileId;
use super::options::ExportSpec;

/// The most files that are joined.
const MAX_FILES: usize = 1000;

/// The path of the file of this number.
fn path_of(spec: &ExportSpec, number: usize) -> PathBuf {
    let mut path = OsString::from(&spec.path);
    path.push(format!(".{number}"));
    path.into()
}

/// The files that are joined, in their order: from number 0 to the last before one that is missing. Blocks.
///
/// # Errors
/// Where there is none, where one is not what can be served, or the same as another.
pub(super) fn files(spec: &ExportSpec) -> anyhow::Result<Vec<(PathBuf, FileId)>> {
    let mut files: Vec<(PathBuf, FileId)> = Vec::new();
    for number in 0..=MAX_FILES {
        let path = path_of(spec, number);
        let behind = !files.is_empty();
        let metadata = match std::fs::metadata(&path) {
            Err(error) if behind && error.kind() == io::ErrorKind::NotFound && !is_there(&path) => {
                break;
            }
            looked => looked.with_context(|| path.display().to_string())?,
        };
        if files.len() == MAX_FILES {
            bail!("{} is one too many: {MAX_FILES} files are joined at most", path.display());
        }
        let id = FileId::of(&metadata);
        let id = id.with_context(|| {
            format!("{} is neither a regular file nor a block device", path.display())
        })?;
        if let Some((first, _)) = files.iter().find(|(_, other)| *other == id) {
            bail!("{} is the same as {}", path.display(), first.display());
        }
        files.push((std::fs::canonicalize(&path)?, id));
    }
    let next = path_of(spec, files.len() + 1);
    if is_there(&next) {
        let missing = path_of(spec, files.len());
        tracing::warn!("{} is left out, because there is no {}", next.display(), missing.display());
    }
    Ok(files)
}

/// Whether something has this name, be it a link to nowhere.
fn is_there(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_files_are_joined_as_may_be_and_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let prefix = folder.path().join("part");
        let spec = format!("disk={},format=raw,multifile", prefix.display());
        let spec: ExportSpec = spec.parse().unwrap();
        for number in 0..MAX_FILES {
            std::fs::write(path_of(&spec, number), [1]).unwrap();
        }
        assert_eq!(files(&spec).unwrap().len(), MAX_FILES);
        std::fs::write(path_of(&spec, MAX_FILES), [1]).unwrap();
        assert!(files(&spec).unwrap_err().to_string().contains("part.1000 is one too many"));
    }
}
