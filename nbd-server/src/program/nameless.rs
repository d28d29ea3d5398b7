//! Files that have no name and are gone with the process, by which it is found out what could be made in a folder.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{Access, CWD, MemfdFlags, Mode, OFlags};
use rustix::io::Errno;

/// Makes a file in a folder, as a new one with a name would be made there; in memory where its file system makes none
/// without.
///
/// # Errors
/// Those of making a file with a name.
pub(super) fn file(folder: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let made = match rustix::fs::openat(CWD, folder, flags, Mode::from_raw_mode(0o666)) {
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => {
            rustix::fs::access(folder, Access::WRITE_OK | Access::EXEC_OK)?;
            rustix::fs::memfd_create("nbd-server", MemfdFlags::CLOEXEC)?
        }
        made => made?,
    };
    Ok(File::from(made))
}
