//! Directories held open, so that nothing below is reached through a symbolic link, and small files that are either
//! there whole or not at all. What the files say is not known here.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, RawMode};
use rustix::io::Errno;

use crate::error::{Error, FileOp};

/// Owner everything, group may look: the mode of directories.
const DIRECTORY_MODE: RawMode = 0o750;

/// Owner reads and writes, group reads: the mode of layers and manifests.
pub(crate) const FILE_MODE: RawMode = 0o640;

/// The most entries of one directory that are listed.
pub(crate) const MAX_ENTRIES: usize = 1 << 20;

/// An open directory. All calls block for the time of a metadata operation.
#[derive(Debug)]
pub(crate) struct Directory {
    fd: OwnedFd,
    path: PathBuf,
}

/// What stands behind a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Directory,
    Other,
}

impl Directory {
    /// Opens `path`, whose own last part may be a link: the root of a repository is where the operator says.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|error| FileOp::Open.failed(path, error))?;
        Ok(Self { fd, path: path.to_path_buf() })
    }

    /// The directory `name` in this one; `None` where there is nothing of that name.
    pub(crate) fn child(&self, name: &str) -> Result<Option<Self>, Error> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let path = self.path.join(name);
        match rustix::fs::openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(Self { fd, path })),
            Err(Errno::NOENT) => Ok(None),
            Err(Errno::NOTDIR | Errno::LOOP) => {
                Err(Error::Path { path, rule: crate::error::PathRule::Link })
            }
            Err(error) => Err(FileOp::Open.failed(&path, error)),
        }
    }

    /// The directory `name` in this one, made if it was not there.
    pub(crate) fn make_child(&self, name: &str) -> Result<Self, Error> {
        let path = self.path.join(name);
        match rustix::fs::mkdirat(&self.fd, name, Mode::from_raw_mode(DIRECTORY_MODE)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(FileOp::MakeDirectory.failed(&path, error)),
        }
        let gone = || FileOp::Open.failed(&path, io::Error::from(io::ErrorKind::NotFound));
        self.child(name)?.ok_or_else(gone)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Makes the entries of this directory durable.
    pub(crate) fn sync(&self) -> Result<(), Error> {
        rustix::fs::fsync(&self.fd).map_err(|error| FileOp::Sync.failed(&self.path, error))
    }

    /// What `name` is, without following it; `None` where there is nothing.
    pub(crate) fn kind_of(&self, name: &str) -> Result<Option<Kind>, Error> {
        match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(match FileType::from_raw_mode(stat.st_mode) {
                FileType::RegularFile => Kind::File,
                FileType::Directory => Kind::Directory,
                _ => Kind::Other,
            })),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(FileOp::Stat.failed(&self.path.join(name), error)),
        }
    }

    /// Opens a regular file for reading, without following a link or waiting for a pipe; `None` where there is nothing.
    pub(crate) fn open_file(&self, name: &str) -> Result<Option<File>, Error> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        match rustix::fs::openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(File::from(fd))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(FileOp::Open.failed(&self.path.join(name), error)),
        }
    }

    /// Gives a file the mode that layers have.
    pub(crate) fn set_file_mode(&self, name: &str) -> Result<(), Error> {
        let path = self.path.join(name);
        let missing = || FileOp::SetMode.failed(&path, io::Error::from(io::ErrorKind::NotFound));
        let file = self.open_file(name)?.ok_or_else(missing)?;
        rustix::fs::fchmod(&file, Mode::from_raw_mode(FILE_MODE))
            .map_err(|error| FileOp::SetMode.failed(&path, error))
    }

    /// The first `limit` + 1 bytes of a small file (one more, so that the caller sees what is too long).
    pub(crate) fn read_small(&self, name: &str, limit: usize) -> Result<Option<Vec<u8>>, Error> {
        let Some(file) = self.open_file(name)? else { return Ok(None) };
        let mut bytes = Vec::new();
        let most = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
        file.take(most)
            .read_to_end(&mut bytes)
            .map_err(|error| FileOp::Read.failed(&self.path.join(name), error))?;
        Ok(Some(bytes))
    }

    /// Puts a file in the place of what is there, so that at every moment, also after a power cut, either the old or
    /// the new one is there whole.
    pub(crate) fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let temporary = temporary_name(name);
        // Left behind by a crash: the lease of the repository says that nobody else is writing it.
        self.remove_file(&temporary)?;
        let renamed = self.write_new(&temporary, bytes).and_then(|()| {
            rustix::fs::renameat(&self.fd, &temporary, &self.fd, name)
                .map_err(|error| FileOp::Rename.failed(&self.path.join(name), error))
        });
        if let Err(error) = renamed {
            if let Err(second) = self.remove_file(&temporary) {
                tracing::warn!(file = temporary, %second, "a temporary file stays behind");
            }
            return Err(error);
        }
        self.sync()
    }

    /// Writes a file that must not exist, durably, except for its name.
    fn write_new(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let path = self.path.join(name);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(FILE_MODE);
        let fd = rustix::fs::openat(&self.fd, name, flags, mode)
            .map_err(|error| FileOp::Open.failed(&path, error))?;
        let mut file = File::from(fd);
        file.write_all(bytes).map_err(|error| FileOp::Write.failed(&path, error))?;
        file.sync_all().map_err(|error| FileOp::Sync.failed(&path, error))
    }

    /// Removes a file (or a link, not what it leads to); `false` where there was nothing.
    pub(crate) fn remove_file(&self, name: &str) -> Result<bool, Error> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(FileOp::Remove.failed(&self.path.join(name), error)),
        }
    }

    /// Removes a directory if it is empty; `false` where it is not, or is not there.
    pub(crate) fn remove_empty_child(&self, name: &str) -> Result<bool, Error> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => Ok(false),
            Err(error) => Err(FileOp::Remove.failed(&self.path.join(name), error)),
        }
    }

    /// The names in this directory that are text, sorted. Others cannot be ours.
    pub(crate) fn names(&self) -> Result<Vec<String>, Error> {
        let failed = |error| FileOp::Read.failed(&self.path, error);
        let mut names = Vec::new();
        for (count, entry) in Dir::read_from(&self.fd).map_err(failed)?.enumerate() {
            if count >= MAX_ENTRIES {
                return Err(Error::TooMany { path: self.path.clone(), limit: MAX_ENTRIES });
            }
            let entry = entry.map_err(failed)?;
            if let Ok(name) = entry.file_name().to_str()
                && name != "."
                && name != ".."
            {
                names.push(name.to_owned());
            }
        }
        names.sort_unstable();
        Ok(names)
    }
}

/// The name that a file has while it is written.
pub(crate) fn temporary_name(name: &str) -> String {
    format!(".{name}.tmp")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_replaced_file_is_whole_and_leaves_nothing_beside_it() {
        let temp = tempfile::tempdir().unwrap();
        let directory = Directory::open(temp.path()).unwrap();
        std::fs::write(temp.path().join(temporary_name("a")), "left behind by a crash").unwrap();
        directory.replace("a", b"first").unwrap();
        directory.replace("a", b"second").unwrap();
        assert_eq!(directory.read_small("a", 100).unwrap().as_deref(), Some(&b"second"[..]));
        assert_eq!(directory.names().unwrap(), ["a"]);
        let mode = std::fs::metadata(temp.path().join("a")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777 & !FILE_MODE, 0);
    }

    #[test]
    fn a_small_file_that_is_too_long_shows_by_one_byte() {
        let temp = tempfile::tempdir().unwrap();
        let directory = Directory::open(temp.path()).unwrap();
        directory.replace("a", &[7; 50]).unwrap();
        assert_eq!(directory.read_small("a", 20).unwrap().map(|bytes| bytes.len()), Some(21));
        assert_eq!(directory.read_small("b", 20).unwrap(), None);
    }

    #[test]
    fn links_are_neither_entered_nor_read_nor_followed_when_removed() {
        let temp = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("precious"), "x").unwrap();
        symlink(outside.path(), temp.path().join("d")).unwrap();
        symlink(outside.path().join("precious"), temp.path().join("f")).unwrap();
        let directory = Directory::open(temp.path()).unwrap();
        assert!(matches!(directory.child("d"), Err(Error::Path { .. })));
        assert!(matches!(directory.make_child("d"), Err(Error::Path { .. })));
        assert!(directory.open_file("f").is_err());
        assert_eq!(directory.kind_of("f").unwrap(), Some(Kind::Other));
        assert!(directory.remove_file("f").unwrap());
        assert!(!directory.remove_empty_child("d").unwrap());
        assert!(outside.path().join("precious").exists());
    }
}
