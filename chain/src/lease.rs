//! The lease of a repository: a lock on a file in its root, held as long as a hub works there. It ends with the
//! process, however that dies; nothing has to be cleaned up.

use std::fs::File;
use std::io::{Read, Write};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::durable::Directory;
use crate::error::{Error, FileOp};
use crate::layout::LEASE_NAME;

/// The most that is read of what a holder wrote about itself.
const MAX_HOLDER_BYTES: u64 = 200;

/// The lock, released when dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    _file: File,
}

impl Lease {
    /// Takes the lease of the repository whose root is `root`, or says who has it.
    pub(crate) fn take(root: &Directory) -> Result<Self, Error> {
        let path = root.path().join(LEASE_NAME);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fd = rustix::fs::openat(root.fd(), LEASE_NAME, flags, Mode::from_raw_mode(0o600))
            .map_err(|error| FileOp::Open.failed(&path, error))?;
        let mut file = File::from(fd);
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(Error::Leased {
                    root: root.path().to_path_buf(),
                    holder: holder(&file),
                });
            }
            Err(error) => return Err(FileOp::Lock.failed(&path, error)),
        }
        // Only for the message above; the lock is what counts.
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let holder = format!("process {} on {}\n", std::process::id(), host.trim());
        file.set_len(0).map_err(|error| FileOp::Write.failed(&path, error))?;
        file.write_all(holder.as_bytes()).map_err(|error| FileOp::Write.failed(&path, error))?;
        Ok(Self { _file: file })
    }
}

fn holder(file: &File) -> String {
    let mut text = Vec::new();
    let read = file.take(MAX_HOLDER_BYTES).read_to_end(&mut text);
    match (read, String::from_utf8_lossy(&text).trim()) {
        (Ok(_), text) if !text.is_empty() => text.escape_default().to_string(),
        _ => "it does not say who it is".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_lease_is_refused_with_the_name_of_the_first_and_granted_after_it() {
        let temp = tempfile::tempdir().unwrap();
        let root = Directory::open(temp.path()).unwrap();
        let first = Lease::take(&root).unwrap();
        let error = Lease::take(&root).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Leased { .. }), "{text}");
        assert!(text.contains(&format!("process {}", std::process::id())), "{text}");
        drop(first);
        Lease::take(&root).unwrap();
    }

    #[test]
    fn a_link_in_place_of_the_lease_is_not_followed() {
        let temp = tempfile::tempdir().unwrap();
        let outside = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(outside.path(), "precious").unwrap();
        std::os::unix::fs::symlink(outside.path(), temp.path().join(LEASE_NAME)).unwrap();
        assert!(Lease::take(&Directory::open(temp.path()).unwrap()).is_err());
        assert_eq!(std::fs::read_to_string(outside.path()).unwrap(), "precious");
    }
}
