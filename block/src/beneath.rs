//! Opening files below a folder and nowhere else, whatever somebody does to the folders on the way meanwhile. What
//! may be opened at all is decided by those who ask.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::Errno;

/// How often a path is looked up that somebody changes meanwhile.
const LOOKUPS: usize = 16;

/// A folder that is open: what is opened below it stays below it. Clones are the same open folder.
///
/// Symbolic links may be followed as long as they stay inside; with a kernel older than Linux 5.6 none is.
#[derive(Clone, Debug)]
pub struct Root {
    path: PathBuf,
    folder: Arc<OwnedFd>,
}

impl Root {
    /// Opens a folder. Its path is resolved first; whatever it is later, this stays the folder that it was.
    ///
    /// # Errors
    /// What the system says, also where it is no folder.
    pub fn open(path: &Path) -> io::Result<Self> {
        let path = std::fs::canonicalize(path)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = rustix::fs::open(&path, flags, Mode::empty())?;
        Ok(Self { path, folder: Arc::new(folder) })
    }

    /// The path of the folder when it was opened, without links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a regular file, by a path below the folder or one that starts with [`Root::path`]. Nothing else is ever
    /// opened: neither a FIFO, which would wait, nor a device, which would notice.
    pub(crate) fn open_file(&self, path: &Path, read_only: bool) -> io::Result<File> {
        let below = path.strip_prefix(&self.path).unwrap_or(path);
        let place = match self.look_up(below) {
            Err(Errno::NOSYS | Errno::PERM) => self.walk(below),
            found => found,
        };
        let place = place.map_err(|errno| match errno {
            Errno::XDEV | Errno::LOOP => {
                let what = "it leads out of the folder that it must stay in";
                io::Error::new(io::ErrorKind::InvalidInput, what)
            }
            other => other.into(),
        })?;
        open_regular(&place, read_only)
    }

    /// The file at a path, as a handle that does not open it.
    fn look_up(&self, below: &Path) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        for _ in 1..LOOKUPS {
            match rustix::fs::openat2(&self.folder, below, flags, Mode::empty(), resolve) {
                // Somebody renames folders, so that nothing could be said for sure.
                Err(Errno::AGAIN | Errno::INTR) => {}
                found => return found,
            }
        }
        rustix::fs::openat2(&self.folder, below, flags, Mode::empty(), resolve)
    }

    /// As [`Root::look_up`], folder by folder and without following any link.
    fn walk(&self, below: &Path) -> Result<OwnedFd, Errno> {
        let mut at: Option<OwnedFd> = None;
        for part in below.components() {
            let Component::Normal(name) = part else {
                return Err(Errno::XDEV);
            };
            let folder = at.as_ref().unwrap_or(&self.folder);
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let next = rustix::fs::openat(folder, name, flags, Mode::empty())?;
            if kind_of(next.as_fd())? == FileType::Symlink {
                return Err(Errno::LOOP);
            }
            at = Some(next);
        }
        at.ok_or(Errno::ISDIR)
    }
}

fn kind_of(file: BorrowedFd<'_>) -> Result<FileType, Errno> {
    let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::TYPE)?;
    Ok(FileType::from_raw_mode(stat.stx_mode.into()))
}

/// Opens what a handle stands for, if it is a regular file.
fn open_regular(place: &OwnedFd, read_only: bool) -> io::Result<File> {
    if kind_of(place.as_fd())? != FileType::RegularFile {
        let what = "it is no regular file";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    // Not by its path, which may lead elsewhere by now.
    let handle = format!("/proc/self/fd/{}", place.as_raw_fd());
    let flags = access | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = rustix::fs::open(handle, flags, Mode::empty())?;
    Ok(File::from(file))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::symlink;

    use super::*;

    /// A root with a file in a folder, and a secret beside it.
    fn tree() -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("root/sub")).unwrap();
        std::fs::create_dir(dir.path().join("outside")).unwrap();
        std::fs::write(dir.path().join("root/sub/file"), b"inside").unwrap();
        std::fs::write(dir.path().join("outside/file"), b"secret").unwrap();
        let root = Root::open(&dir.path().join("root")).unwrap();
        (dir, root)
    }

    fn text(root: &Root, path: &str) -> io::Result<String> {
        let mut text = String::new();
        root.open_file(Path::new(path), true)?.read_to_string(&mut text)?;
        Ok(text)
    }

    #[test]
    fn files_and_links_that_stay_inside_open() {
        let (_dir, root) = tree();
        symlink("sub/../sub/file", root.path().join("link")).unwrap();
        symlink("sub", root.path().join("folder")).unwrap();
        for path in ["sub/file", "link", "folder/file", "sub/../sub/file"] {
            assert_eq!(text(&root, path).unwrap(), "inside", "{path}");
        }
        let whole = root.path().join("sub/file");
        assert_eq!(text(&root, whole.to_str().unwrap()).unwrap(), "inside");
    }

    #[test]
    fn nothing_leads_outside() {
        let (dir, root) = tree();
        symlink("../outside/file", root.path().join("up")).unwrap();
        symlink(dir.path().join("outside"), root.path().join("away")).unwrap();
        symlink("/proc/self/root/etc/passwd", root.path().join("magic")).unwrap();
        for path in ["../outside/file", "up", "away/file", "magic", "/etc/passwd", "sub/../../x"] {
            let refused = text(&root, path);
            assert!(refused.is_err(), "{path}: {refused:?}");
            assert!(root.walk(Path::new(path)).is_err(), "{path}");
        }
    }

    #[test]
    fn a_folder_that_is_swapped_for_a_link_leads_nowhere() {
        let (dir, root) = tree();
        let whole = root.path().join("sub/file");
        std::fs::rename(root.path().join("sub"), root.path().join("old")).unwrap();
        symlink(dir.path().join("outside"), root.path().join("sub")).unwrap();
        assert!(text(&root, whole.to_str().unwrap()).is_err());
        assert_eq!(root.walk(Path::new("sub/file")).map(drop), Err(Errno::LOOP));
        // The folder itself: what was opened is what counts.
        std::fs::rename(root.path(), dir.path().join("moved")).unwrap();
        symlink(dir.path().join("outside"), root.path()).unwrap();
        assert!(text(&root, root.path().join("file").to_str().unwrap()).is_err());
        assert_eq!(text(&root, "old/file").unwrap(), "inside");
    }

    #[test]
    fn without_the_system_call_folders_are_walked_one_by_one() {
        let (_dir, root) = tree();
        symlink("file", root.path().join("sub/link")).unwrap();
        let place = root.walk(Path::new("sub/file")).unwrap();
        let mut text = String::new();
        open_regular(&place, true).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "inside");
        for (path, refused) in [
            ("sub/link", Errno::LOOP),
            ("sub/none", Errno::NOENT),
            ("..", Errno::XDEV),
            ("", Errno::ISDIR),
        ] {
            assert_eq!(root.walk(Path::new(path)).map(drop), Err(refused), "{path}");
        }
    }

    #[test]
    fn fifos_sockets_devices_and_folders_are_never_opened() {
        let (_dir, root) = tree();
        rustix::fs::mkfifoat(rustix::fs::CWD, root.path().join("fifo"), Mode::RUSR | Mode::WUSR)
            .unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(root.path().join("socket")).unwrap();
        for path in ["fifo", "socket", "sub"] {
            for read_only in [true, false] {
                let refused = root.open_file(Path::new(path), read_only).unwrap_err();
                assert_eq!(refused.kind(), io::ErrorKind::InvalidInput, "{path}");
            }
        }
        let devices = Root::open(Path::new("/dev")).unwrap();
        let refused = devices.open_file(Path::new("null"), true).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    }
}
