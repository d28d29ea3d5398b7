//! Which backing file a recorded name leads to, and whether it may be opened. An image comes from strangers: its
//! backing name must not become a way to read any file of the host.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use block::{HostFile, HostOp, Root};

use crate::create::{BackingFormat, folder};
use crate::error::{Error, Feature, ReferenceError};
use crate::open::OpenOptions;

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
    /// Where all references have to stay.
    root: Option<Root>,
    /// The files above, by device and inode.
    seen: Vec<(u64, u64)>,
    depth: usize,
    /// The layer that was entered last: what comes next is what it refers to.
    last: Option<PathBuf>,
}

/// A backing file that may be opened.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub path: PathBuf,
    pub format: BackingFormat,
    place: Place,
}

/// A file that may be opened, and what it was when that was decided.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub path: PathBuf,
    /// Where references are confined: to what, and the device and inode of the file.
    confined: Option<(Root, (u64, u64))>,
}

impl Place {
    /// Opens the file. Where references are confined it is the one that was allowed, whatever somebody has put in the
    /// place of it or of a folder on the way since.
    ///
    /// # Errors
    /// [`ReferenceError::Replaced`], [`Error::Host`].
    pub(crate) async fn open(
        &self,
        options: &OpenOptions,
        format: BackingFormat,
    ) -> Result<HostFile, Error> {
        // Files in memory lie in no folder.
        let in_memory = options.engine.as_ref().is_some_and(|engine| engine.name() == "memory");
        let confined = self.confined.as_ref().filter(|_| !in_memory);
        let Some((root, allowed)) = confined else {
            return options.open_file(&self.path, format).await;
        };
        let replaced = || {
            let name = self.path.display().to_string();
            let reason = ReferenceError::Replaced;
            Error::Reference { file: self.path.clone(), name, reason }
        };
        match HostFile::open_beneath(root, &self.path, options.host(format)).await {
            Ok(file) if file.id() == Some(*allowed) => Ok(file),
            Ok(_) => Err(replaced()),
            Err(error) if error.op == HostOp::Open && leads_away(&error.source) => Err(replaced()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Found {
    /// As [`Place::open`].
    pub(crate) async fn open(&self, options: &OpenOptions) -> Result<HostFile, Error> {
        self.place.open(options, self.format).await
    }
}

impl Trail {
    /// The trail of a chain whose top image is `path`.
    pub(crate) fn start(path: &Path, references: &References) -> Result<Self, Error> {
        let root = match references {
            References::Any => None,
            References::Under(root) => Some(root.as_path()),
            References::Confined => Some(folder(path)),
        };
        let open = |path: &Path| {
            Root::open(path).map_err(|source| Error::Path { path: path.to_owned(), source })
        };
        let root = root.map(open).transpose()?;
        Ok(Self { root, seen: Vec::new(), depth: 0, last: None })
    }

    /// The trail behind the layer in `path`, which was opened as the file `id`.
    pub(crate) fn enter(self, path: &Path, id: Option<(u64, u64)>) -> Result<Self, Error> {
        let mut trail = self.pass(path, id)?;
        trail.depth += 1;
        if trail.depth > MAX_CHAIN_DEPTH {
            return Err(trail.refused(path, ReferenceError::TooDeep(MAX_CHAIN_DEPTH)));
        }
        trail.last = Some(path.to_owned());
        Ok(trail)
    }

    /// The trail of a layer whose guest data lies in `path`: a file that no other part of the chain may be.
    pub(crate) fn beside(self, path: &Path, id: Option<(u64, u64)>) -> Result<Self, Error> {
        self.pass(path, id)
    }

    fn pass(mut self, path: &Path, id: Option<(u64, u64)>) -> Result<Self, Error> {
        if let Some(id) = id {
            if self.seen.contains(&id) {
                return Err(self.refused(path, ReferenceError::Loop));
            }
            self.seen.push(id);
        }
        Ok(self)
    }

    /// Why the last layer may not refer to the file in `path`.
    fn refused(&self, path: &Path, reason: ReferenceError) -> Error {
        let file = self.last.as_deref().unwrap_or(path).to_owned();
        Error::Reference { file, name: path.display().to_string(), reason }
    }

    /// Refuses a file that is part of the chain already.
    pub(crate) fn check_new(&self, place: &Place) -> Result<(), Error> {
        let id = match &place.confined {
            Some((_, id)) => Some(*id),
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
            // QEMU's drivers of files are formats by name, too: that of the bytes as they are.
            Some(b"raw" | b"file" | b"host_device") => BackingFormat::Raw,
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
        let Some(root) = &self.root else { return Ok(Place { path, confined: None }) };
        if !path.starts_with(root.path()) {
            let root = root.path().to_owned();
            return Err(refused(ReferenceError::Outside { target: path, root }));
        }
        // Not followed: a resolved path has no link in it, unless somebody has just put one there.
        let facts = std::fs::symlink_metadata(&path);
        let facts = facts.map_err(|source| Error::Path { path: path.clone(), source })?;
        if !facts.is_file() {
            return Err(refused(ReferenceError::NotRegular));
        }
        Ok(Place { path, confined: Some((root.clone(), (facts.dev(), facts.ino()))) })
    }
}

/// Whether QEMU would take a name for a protocol: a colon before the first slash. No image follows such names, and none
/// is written down.
pub(crate) fn has_protocol(name: &str) -> bool {
    name.split('/').next().is_some_and(|first| first.contains(':'))
}

/// Whether opening failed because a link was in the way, something that is no file, or nothing any more.
fn leads_away(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::NotADirectory | ErrorKind::NotFound)
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
        let ask = |name: &str| {
            trail.resolve(&top, name.as_bytes(), Some(b"raw")).map(drop).map_err(reason)
        };
        assert!(ask("top.qcow2").is_ok());
        assert!(matches!(ask("../secret"), Err(ReferenceError::Outside { .. })));
        assert!(matches!(ask("link"), Err(ReferenceError::Outside { .. })));
        assert!(matches!(ask("/etc/passwd"), Err(ReferenceError::Outside { .. })));
        assert_eq!(ask("folder"), Err(ReferenceError::NotRegular));
        assert_eq!(ask("nbd:localhost:10809"), Err(ReferenceError::Protocol));
        assert_eq!(ask("json:{\"driver\":\"raw\"}"), Err(ReferenceError::Protocol));
        let error = trail.resolve(&top, b"top.qcow2", None).map(drop).map_err(reason);
        assert_eq!(error, Err(ReferenceError::NoFormat));
        let error = trail.resolve(&top, b"\xff", Some(b"raw")).map(drop).map_err(reason);
        assert_eq!(error, Err(ReferenceError::NotUtf8));
        let wide = Trail::start(&top, &References::Under(dir.path().to_owned())).unwrap();
        assert!(wide.resolve(&top, b"../secret", Some(b"raw")).is_ok());
    }

    #[tokio::test]
    async fn a_folder_that_is_swapped_after_the_check_leads_to_nothing_outside() {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["root/sub", "outside"] {
            std::fs::create_dir_all(dir.path().join(folder)).unwrap();
            std::fs::write(dir.path().join(folder).join("base"), folder).unwrap();
        }
        std::os::unix::fs::symlink("sub/base", dir.path().join("root/link")).unwrap();
        let top = dir.path().join("root/top.qcow2");
        let trail = Trail::start(&top, &References::Confined).unwrap();
        let reading = OpenOptions { lock: false, ..OpenOptions::reading() };
        let found = trail.resolve(&top, b"link", Some(b"raw")).unwrap();
        assert!(found.open(&reading).await.is_ok());
        std::fs::rename(dir.path().join("root/sub"), dir.path().join("root/old")).unwrap();
        assert_eq!(
            found.open(&reading).await.map(drop).map_err(reason),
            Err(ReferenceError::Replaced)
        );
        std::os::unix::fs::symlink("../outside", dir.path().join("root/sub")).unwrap();
        assert_eq!(
            found.open(&reading).await.map(drop).map_err(reason),
            Err(ReferenceError::Replaced)
        );
        // Another file inside is not the one that was looked at either.
        std::fs::remove_file(dir.path().join("root/sub")).unwrap();
        std::fs::create_dir(dir.path().join("root/sub")).unwrap();
        std::fs::write(dir.path().join("root/sub/base"), "other").unwrap();
        assert_eq!(
            found.open(&reading).await.map(drop).map_err(reason),
            Err(ReferenceError::Replaced)
        );
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
        let deeper = trail.enter(Path::new("/tmp/y"), Some((2, 0))).map(drop).unwrap_err();
        assert_eq!(
            deeper.to_string(),
            "/tmp/x refers to \"/tmp/y\": the chain has more than 256 layers"
        );
        assert_eq!(reason(deeper), ReferenceError::TooDeep(MAX_CHAIN_DEPTH));
    }
}
