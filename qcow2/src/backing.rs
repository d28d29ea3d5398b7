//! Which backing file a recorded name leads to, and whether it may be opened. An image comes from strangers: its
//! backing name must not become a way to read any file of the host.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use block::HostFile;

use crate::create::BackingFormat;
use crate::error::{Error, Feature, ReferenceError};

/// The most layers of a chain, the top image included.
pub const MAX_CHAIN_DEPTH: usize = 256;

/// Which backing files may be followed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum References {
    /// Regular files in the folder of the top image, or below it.
    #[default]
    Confined,
    /// Regular files in this folder, or below it.
    Under(PathBuf),
    /// Any file and any block device. For images whose every layer the caller trusts.
    Any,
}

/// The way that led to a layer: what it may refer to, and what it may not come back to.
#[derive(Clone, Debug)]
pub(crate) struct Trail {
    /// Where all references have to stay, resolved.
    root: Option<PathBuf>,
    /// The files above, by device and inode.
    seen: Vec<(u64, u64)>,
    depth: usize,
}

/// A backing file that may be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub path: PathBuf,
    pub format: BackingFormat,
    place: Place,
}

/// A file that may be opened, and what it was when that was decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub path: PathBuf,
    /// Device and inode, where references are confined.
    id: Option<(u64, u64)>,
}

impl Place {
    /// Refuses a file that is not the one that was allowed: somebody has put another in its place since.
    pub(crate) fn confirm(&self, file: &HostFile) -> Result<(), Error> {
        let Some(allowed) = self.id else { return Ok(()) };
        let same_path = std::fs::canonicalize(&self.path).is_ok_and(|path| path == self.path);
        if file.id() == Some(allowed) && same_path {
            return Ok(());
        }
        let name = self.path.display().to_string();
        Err(Error::Reference { file: self.path.clone(), name, reason: ReferenceError::Replaced })
    }
}

impl Found {
    /// As [`Place::confirm`].
    pub(crate) fn confirm(&self, file: &HostFile) -> Result<(), Error> {
        self.place.confirm(file)
    }
}

impl Trail {
    /// The trail of a chain whose top image is `path`.
    pub(crate) fn start(path: &Path, references: &References) -> Result<Self, Error> {
        let root = match references {
            References::Any => None,
            References::Under(root) => Some(resolve(root)?),
            References::Confined => Some(resolve(folder(path))?),
        };
        Ok(Self { root, seen: Vec::new(), depth: 0 })
    }

    /// The trail behind the layer in `path`, which was opened as the file `id`.
    pub(crate) fn enter(mut self, path: &Path, id: Option<(u64, u64)>) -> Result<Self, Error> {
        let refused = |reason| Error::Reference {
            file: path.to_owned(),
            name: path.display().to_string(),
            reason,
        };
        if let Some(id) = id {
            if self.seen.contains(&id) {
                return Err(refused(ReferenceError::Loop));
            }
            self.seen.push(id);
        }
        self.depth += 1;
        if self.depth > MAX_CHAIN_DEPTH {
            return Err(refused(ReferenceError::TooDeep(MAX_CHAIN_DEPTH)));
        }
        Ok(self)
    }

    /// The trail of a layer whose guest data lies in `path`: a file that no other part of the chain may be.
    pub(crate) fn beside(mut self, path: &Path, id: Option<(u64, u64)>) -> Result<Self, Error> {
        let depth = std::mem::take(&mut self.depth);
        Ok(Self { depth, ..self.enter(path, id)? })
    }

    /// Refuses a file that is part of the chain already.
    pub(crate) fn check_new(&self, place: &Place) -> Result<(), Error> {
        let id = match place.id {
            Some(id) => Some(id),
            None => std::fs::metadata(&place.path).ok().map(|facts| (facts.dev(), facts.ino())),
        };
        self.clone().beside(&place.path, id).map(drop)
    }

    /// What the backing name of the layer in `file` leads to.
    pub(crate) fn resolve(
        &self,
        file: &Path,
        name: &[u8],
        format: Option<&[u8]>,
    ) -> Result<Found, Error> {
        let text = String::from_utf8_lossy(name).into_owned();
        let refused =
            |reason| Error::Reference { file: file.to_owned(), name: text.clone(), reason };
        let format = match format {
            None => return Err(refused(ReferenceError::NoFormat)),
            Some(b"qcow2") => BackingFormat::Qcow2,
            Some(b"raw") => BackingFormat::Raw,
            Some(b"vmdk") => BackingFormat::Vmdk,
            Some(other) => {
                let other = String::from_utf8_lossy(other).into_owned();
                let feature = Feature::BackingFormat(other);
                return Err(Error::Unsupported { file: file.to_owned(), feature });
            }
        };
        let place = self.place(file, name)?;
        Ok(Found { path: place.path.clone(), format, place })
    }

    /// What a recorded name of the layer in `file` leads to: a backing file's, or an external data file's.
    pub(crate) fn place(&self, file: &Path, name: &[u8]) -> Result<Place, Error> {
        let text = String::from_utf8_lossy(name).into_owned();
        let refused =
            |reason| Error::Reference { file: file.to_owned(), name: text.clone(), reason };
        let name = std::str::from_utf8(name).ok().filter(|name| !name.contains('\0'));
        let name = name.ok_or_else(|| refused(ReferenceError::NotUtf8))?;
        if has_protocol(name) {
            return Err(refused(ReferenceError::Protocol));
        }
        let path = resolve(&folder(file).join(name))?;
        let Some(root) = &self.root else { return Ok(Place { path, id: None }) };
        if !path.starts_with(root) {
            return Err(refused(ReferenceError::Outside { target: path, root: root.clone() }));
        }
        // Not followed: a resolved path has no link in it, unless somebody has just put one there.
        let facts = std::fs::symlink_metadata(&path);
        let facts = facts.map_err(|source| Error::Path { path: path.clone(), source })?;
        if !facts.is_file() {
            return Err(refused(ReferenceError::NotRegular));
        }
        Ok(Place { path, id: Some((facts.dev(), facts.ino())) })
    }
}

/// Whether QEMU would take a name for a protocol: a colon before the first slash.
fn has_protocol(name: &str) -> bool {
    name.split('/').next().is_some_and(|first| first.contains(':'))
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn resolve(path: &Path) -> Result<PathBuf, Error> {
    std::fs::canonicalize(path).map_err(|source| Error::Path { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(error: Error) -> ReferenceError {
        match error {
            Error::Reference { reason, .. } => reason,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn names_that_leave_the_folder_or_are_no_plain_path_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("sub/top.qcow2");
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        std::fs::create_dir(dir.path().join("sub/folder")).unwrap();
        std::fs::write(&top, b"").unwrap();
        std::fs::write(dir.path().join("secret"), b"").unwrap();
        std::os::unix::fs::symlink("../secret", dir.path().join("sub/link")).unwrap();
        let trail = Trail::start(&top, &References::Confined).unwrap();
        let ask = |name: &str| trail.resolve(&top, name.as_bytes(), Some(b"raw")).map_err(reason);
        assert!(ask("top.qcow2").is_ok());
        assert!(matches!(ask("../secret"), Err(ReferenceError::Outside { .. })));
        assert!(matches!(ask("link"), Err(ReferenceError::Outside { .. })));
        assert!(matches!(ask("/etc/passwd"), Err(ReferenceError::Outside { .. })));
        assert_eq!(ask("folder"), Err(ReferenceError::NotRegular));
        assert_eq!(ask("nbd:localhost:10809"), Err(ReferenceError::Protocol));
        assert_eq!(ask("json:{\"driver\":\"raw\"}"), Err(ReferenceError::Protocol));
        let error = trail.resolve(&top, b"top.qcow2", None).map_err(reason);
        assert_eq!(error, Err(ReferenceError::NoFormat));
        let error = trail.resolve(&top, b"\xff", Some(b"raw")).map_err(reason);
        assert_eq!(error, Err(ReferenceError::NotUtf8));
        let wide = Trail::start(&top, &References::Under(dir.path().to_owned())).unwrap();
        assert!(wide.resolve(&top, b"../secret", Some(b"raw")).is_ok());
    }

    #[test]
    fn a_chain_that_comes_back_or_never_ends_is_refused() {
        let path = Path::new("/tmp/x");
        let mut trail = Trail::start(path, &References::Any).unwrap();
        for id in 0..MAX_CHAIN_DEPTH as u64 {
            trail = trail.enter(path, Some((1, id))).unwrap();
        }
        let again = trail.clone().enter(path, Some((1, 3))).map(drop).map_err(reason);
        assert_eq!(again, Err(ReferenceError::Loop));
        let deeper = trail.enter(path, Some((2, 0))).map(drop).map_err(reason);
        assert_eq!(deeper, Err(ReferenceError::TooDeep(MAX_CHAIN_DEPTH)));
    }
}
