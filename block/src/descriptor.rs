//! An open host file as a descriptor with known demands, and the system calls that carry out one operation on it.
//! Which thread makes them is decided by the engines.

use std::fs::{File, OpenOptions as StdOpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{Access, AtFlags, FallocateFlags, OFlags, SeekFrom, StatxFlags};
use rustix::io::Errno;

use crate::copy::Origin;
use crate::lock;
use crate::open_files::OpenFile;
use crate::rehearsal::Claim;
use crate::storage::{Op, Outcome, StorageFacts};
use crate::unfinished::Unfinished;
use crate::{
    BUFFER_ALIGN_BYTES, Buffer, ByteRange, CopySource, Create, HostError, HostOp, OpenOptions, Root,
};

/// What `O_DIRECT` is assumed to demand where the kernel does not tell.
const ASSUMED_ALIGN_BYTES: u32 = 4096;
/// The largest offset alignment that is served with direct I/O; beyond it, read-modify-write would cost too much.
const MAX_OFFSET_ALIGN_BYTES: u32 = 64 << 10;
/// Magic numbers of file systems that live in memory, where `O_DIRECT` has nothing to bypass.
const MEMORY_FILE_SYSTEMS: [i64; 2] = [0x0102_1994, 0x8584_58F6];

/// An open file and what it demands.
#[derive(Debug)]
pub(crate) struct Descriptor {
    pub(crate) file: File,
    pub(crate) facts: StorageFacts,
    locked: bool,
    /// Where it is rehearsed.
    _claim: Option<Claim>,
    /// Dropped after the file.
    _open: OpenFile,
}

impl Descriptor {
    /// Opens a regular file or a block device, or below `root` a regular file that is there. Makes system calls that
    /// can block.
    pub(crate) fn open(
        root: Option<&Root>,
        path: &Path,
        options: &OpenOptions,
    ) -> Result<Self, HostError> {
        let failed = |op| move |source| HostError::whole(path, op, source);
        if options.rehearse {
            return Self::rehearse(root, path, options);
        }
        let file = match root {
            Some(root) => root.open_file(path, options.read_only),
            None => open_file(path, options),
        };
        let file = file.map_err(failed(HostOp::Open))?;
        let made = (options.create == Create::New).then(|| Unfinished::new(path, id(&file)));
        let locked = if options.lock {
            lock::lock(&file, options.read_only).map_err(failed(HostOp::Lock))
        } else {
            Ok(())
        };
        let facts = locked.and_then(|()| prepare(&file, options).map_err(failed(HostOp::Open)));
        match facts {
            Ok(facts) => {
                if let Some(made) = made {
                    made.keep();
                }
                let (locked, _open) = (options.lock, OpenFile::count());
                Ok(Self { file, facts, locked, _claim: None, _open })
            }
            Err(error) => {
                // A part of the locks may be taken.
                lock::unlock(&file);
                Err(error)
            }
        }
    }

    /// Opens for reading what could be opened as the options say, beside all that is rehearsed already.
    fn rehearse(
        root: Option<&Root>,
        path: &Path,
        options: &OpenOptions,
    ) -> Result<Self, HostError> {
        let failed = |op| move |source| HostError::whole(path, op, source);
        let reading = OpenOptions { read_only: true, lock: false, rehearse: false, ..*options };
        let mut opened = Self::open(root, path, &reading)?;
        if !options.read_only {
            // By the file that is open, whatever its name leads to by now.
            let this = format!("/proc/self/fd/{}", opened.file.as_raw_fd());
            let may = rustix::fs::access(this, Access::WRITE_OK);
            may.map_err(|error| failed(HostOp::Open)(error.into()))?;
        }
        let claim = opened.facts.id.filter(|_| options.lock);
        let claim = claim.map(|id| Claim::take(id, options.read_only)).transpose();
        opened._claim = claim.map_err(failed(HostOp::Lock))?;
        Ok(opened)
    }

    /// The length now.
    pub(crate) fn len(&self) -> io::Result<u64> {
        if self.facts.fixed_len {
            return Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?);
        }
        Ok(self.file.metadata()?.len())
    }

    /// Whether its file system lives in memory.
    pub(crate) fn is_in_memory(&self) -> bool {
        !self.facts.fixed_len && is_in_memory(&self.file)
    }

    /// How much its file system could take, in bytes.
    pub(crate) fn room(&self) -> io::Result<u64> {
        let system = rustix::fs::fstatvfs(&self.file)?;
        Ok(system.f_bavail.saturating_mul(system.f_frsize))
    }

    /// Carries out an operation on the calling thread, which it blocks.
    pub(crate) fn execute(&self, op: Op) -> io::Result<Outcome> {
        match op {
            Op::Read { at, mut buffer } => {
                self.read_from(at, &mut buffer, 0)?;
                Ok(Outcome::Read(buffer))
            }
            Op::Write { at, data } => self.write_from(at, &data, 0).map(|()| Outcome::Done),
            Op::Copy { source: CopySource(Origin::File(source)), from, range } => {
                crate::copy::copy(&source.file, from, &self.file, range)?;
                Ok(Outcome::Done)
            }
            Op::Copy { .. } => Err(io::ErrorKind::Unsupported.into()),
            Op::Sync => done(|| rustix::fs::fdatasync(&self.file)),
            Op::Allocate { range } => self.fallocate(FallocateFlags::empty(), range),
            Op::Punch { range } => {
                self.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, range)
            }
            Op::ZeroRange { range } => self.fallocate(FallocateFlags::ZERO_RANGE, range),
            Op::SetLen { len } => done(|| rustix::fs::ftruncate(&self.file, len)),
            Op::Map { range, max } => self.map(range, max).map(Outcome::Ranges),
        }
    }

    /// Reads what is missing behind the first `done` bytes of `buffer`.
    fn read_from(&self, at: u64, buffer: &mut Buffer, mut done: usize) -> io::Result<()> {
        while done < buffer.len() {
            let offset = at + done as u64;
            match rustix::io::pread(&self.file, &mut buffer[done..], offset) {
                Ok(read) => {
                    done += read;
                    if self.is_end(read, at + done as u64) {
                        buffer[done..].fill(0);
                        return Ok(());
                    }
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Whether a read that ended at `end` after `read` bytes met the end of the file: direct I/O ends off the
    /// alignment only there, and could not be continued.
    pub(crate) fn is_end(&self, read: usize, end: u64) -> bool {
        read == 0 || !end.is_multiple_of(self.facts.offset_align)
    }

    fn write_from(&self, at: u64, data: &[u8], mut done: usize) -> io::Result<()> {
        while done < data.len() {
            match rustix::io::pwrite(&self.file, &data[done..], at + done as u64) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => done += written,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn fallocate(&self, flags: FallocateFlags, range: ByteRange) -> io::Result<Outcome> {
        if range.is_empty() {
            return Ok(Outcome::Done);
        }
        done(|| rustix::fs::fallocate(&self.file, flags, range.start(), range.len()))
    }

    fn map(&self, range: ByteRange, max: usize) -> io::Result<Vec<ByteRange>> {
        let mut found = Vec::new();
        let mut at = range.start();
        while at < range.end() && found.len() < max {
            let start = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(start) => start,
                Err(Errno::NXIO) => break,
                // Block devices, and file systems that know no holes: all of it is data.
                Err(Errno::INVAL) if found.is_empty() => {
                    return Ok(vec![ByteRange::between(at, i64::MAX.unsigned_abs())]);
                }
                Err(error) => return Err(error.into()),
            };
            if start >= range.end() {
                break;
            }
            let end = match rustix::fs::seek(&self.file, SeekFrom::Hole(start)) {
                Ok(end) => end,
                Err(Errno::NXIO) => break, // Cut by somebody meanwhile.
                Err(error) => return Err(error.into()),
            };
            found.push(ByteRange::between(start, end));
            at = end.max(at + 1);
        }
        Ok(found)
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        if self.locked {
            lock::unlock(&self.file);
        }
    }
}

/// Device and inode.
fn id(file: &File) -> Option<(u64, u64)> {
    file.metadata().ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Finds out what an open file is and demands, and switches to direct I/O where that works.
fn prepare(file: &File, options: &OpenOptions) -> io::Result<StorageFacts> {
    let metadata = file.metadata()?;
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is neither a regular file nor a block device",
        ));
    }
    let fixed_len = kind.is_block_device();
    // Rounding the odd tail of an existing file up and cutting it again could, in a power cut, leave it longer.
    let keeps_len = !options.read_only && !options.can_lengthen;
    let odd_tail = |align: u64| keeps_len && !metadata.len().is_multiple_of(align);
    let align = match direct_alignment(file, fixed_len) {
        Some((memory, offset)) if options.direct && !odd_tail(offset) => {
            match rustix::fs::fcntl_setfl(file, OFlags::DIRECT) {
                Ok(()) => Some((memory, offset)),
                Err(_) => None,
            }
        }
        _ => None,
    };
    if align.is_none() {
        rustix::fs::fcntl_setfl(file, OFlags::empty())?;
    }
    let (memory_align, offset_align) = align.unwrap_or((1, 1));
    Ok(StorageFacts {
        memory_align,
        offset_align,
        read_only: options.read_only,
        fixed_len,
        id: Some((metadata.dev(), metadata.ino())),
    })
}

fn open_file(path: &Path, options: &OpenOptions) -> io::Result<File> {
    let mut open = StdOpenOptions::new();
    open.read(true).write(!options.read_only);
    if options.create == Create::New {
        open.create_new(true);
    }
    // A FIFO or a busy device must not hang us; `Descriptor::prepare` clears the flag.
    let nonblock = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
    open.custom_flags(nonblock).open(path)
}

fn done(mut call: impl FnMut() -> rustix::io::Result<()>) -> io::Result<Outcome> {
    loop {
        match call() {
            Ok(()) => return Ok(Outcome::Done),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// What direct I/O on this file demands of memory and of offsets; `None` where it cannot, or should not, be done.
fn direct_alignment(file: &File, is_device: bool) -> Option<(usize, u64)> {
    let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
    let told = stat.filter(|stat| stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
    let (memory, offset) = match told {
        Some(stat) => (stat.stx_dio_mem_align, stat.stx_dio_offset_align),
        None if is_device => {
            let sector = rustix::fs::ioctl_blksszget(file).unwrap_or(ASSUMED_ALIGN_BYTES);
            (sector, sector)
        }
        None if is_in_memory(file) => return None,
        None => (ASSUMED_ALIGN_BYTES, ASSUMED_ALIGN_BYTES),
    };
    let usable = memory.is_power_of_two()
        && offset.is_power_of_two()
        && usize::try_from(memory).is_ok_and(|memory| memory <= BUFFER_ALIGN_BYTES)
        && offset <= MAX_OFFSET_ALIGN_BYTES;
    usable.then(|| (usize::try_from(memory).unwrap_or(BUFFER_ALIGN_BYTES), u64::from(offset)))
}

/// Whether the file lies in a file system that lives in memory.
fn is_in_memory(file: &File) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|system| MEMORY_FILE_SYSTEMS.contains(&system.f_type))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_outlives_a_descriptor_holds_no_locks() {
        let image = tempfile::NamedTempFile::new().expect("a file");
        let open = || Descriptor::open(None, image.path(), &OpenOptions::writing());
        let first = open().expect("open");
        // As the kernel keeps it for a ring, or a child that has not become its program yet.
        let copy = first.file.try_clone().expect("the same description");
        let denied = open().expect_err("locked");
        assert_eq!(denied.op, HostOp::Lock, "{denied}");
        drop(first);
        open().expect("unlocked");
        drop(copy);
    }

    #[test]
    fn an_image_that_is_refused_stays_as_free_as_it_was() {
        let image = tempfile::NamedTempFile::new().expect("a file");
        let reader = OpenOptions { read_only: true, ..OpenOptions::writing() };
        let first = Descriptor::open(None, image.path(), &reader).expect("open");
        Descriptor::open(None, image.path(), &OpenOptions::writing()).expect_err("locked");
        Descriptor::open(None, image.path(), &reader).expect("still only read");
        drop(first);
        Descriptor::open(None, image.path(), &OpenOptions::writing()).expect("nobody is left");
    }
}
