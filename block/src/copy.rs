//! Copying from one open file into another inside the host: by sharing extents where the file system can, by its own
//! copying otherwise. Locks, lengths and what to do where neither works are the host file's business.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, opcode};

use crate::descriptor::Descriptor;
use crate::{ByteRange, MemoryStorage};

/// What a copy inside the host reads: an open file in the hands of an engine, see [`crate::Storage::copy_source`].
#[derive(Clone)]
pub struct CopySource(pub(crate) Origin);

#[derive(Clone)]
pub(crate) enum Origin {
    File(Arc<Descriptor>),
    Memory(MemoryStorage),
}

impl fmt::Debug for CopySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Origin::File(_) => "a file",
            Origin::Memory(_) => "memory",
        })
    }
}

/// What the kernel calls `struct file_clone_range`.
#[repr(C)]
struct CloneRange {
    source: i64,
    source_offset: u64,
    source_length: u64,
    target_offset: u64,
}

const FICLONERANGE: Opcode = opcode::write::<CloneRange>(0x94, 13);

/// Makes `range` of `target` read as `source` does from `from` on. [`io::ErrorKind::Unsupported`] where the host does
/// not do that for these files and offsets, or where the source ends before: then any part of it may be done.
pub(crate) fn copy(source: &File, from: u64, target: &File, range: ByteRange) -> io::Result<()> {
    // Whatever it refuses (no such file system, offsets that are no blocks), copying may do.
    if share(source, from, target, range).is_ok() {
        return Ok(());
    }
    let (mut from, mut to) = (from, range.start());
    while to < range.end() {
        let len = usize::try_from(range.end() - to).unwrap_or(usize::MAX);
        let copied =
            rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), len);
        match copied {
            Ok(0) => return Err(io::ErrorKind::Unsupported.into()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) if is_refusal(error) => return Err(io::ErrorKind::Unsupported.into()),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Lets the target have the source's extents. What is written to either later is its own.
fn share(source: &File, from: u64, target: &File, range: ByteRange) -> rustix::io::Result<()> {
    let input = CloneRange {
        source: i64::from(source.as_raw_fd()),
        source_offset: from,
        source_length: range.len(),
        target_offset: range.start(),
    };
    // SAFETY: `FICLONERANGE` reads a `file_clone_range`, which `CloneRange` repeats field by field; the descriptor in it
    // belongs to `source`, which is borrowed until the call returns. It writes to no memory of this process.
    unsafe { rustix::ioctl::ioctl(target, Setter::<FICLONERANGE, _>::new(input)) }
}

/// Whether the kernel says that it does not copy like this, and not that it failed.
fn is_refusal(error: Errno) -> bool {
    [
        Errno::INVAL,
        Errno::XDEV,
        Errno::OPNOTSUPP,
        Errno::NOSYS,
        Errno::NOTTY,
        Errno::NODEV,
        Errno::TXTBSY,
        Errno::PERM,
    ]
    .contains(&error)
}
