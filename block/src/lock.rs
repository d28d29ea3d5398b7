//! The locks by which QEMU recognises an image in use: open-file-description locks on certain bytes of the file.
//! Whether an image should be locked at all is the opener's choice.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Once;

use crate::holders::Holder;

/// The first byte of "this permission is in use", by bit; see `RAW_LOCK_PERM_BASE` of QEMU's `block/file-posix.c`.
const IN_USE_BYTE: i64 = 100;
/// The first byte of "others must not use this permission", by bit (`RAW_LOCK_SHARED_BASE`).
const NOT_SHARED_BYTE: i64 = 200;
/// How many permissions, and so bytes of each kind, there can be.
const PERMISSION_BYTES: i64 = 64;

/// What a program can do with an image, as QEMU divides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permission {
    /// Reading what makes sense: no other program is in the middle of changing it.
    ConsistentRead,
    /// Changing what the guest sees.
    Write,
    /// Writing, but nothing that the guest could see.
    WriteUnchanged,
    /// Changing the size.
    Resize,
}

impl Permission {
    const ALL: [Self; 4] = [Self::ConsistentRead, Self::Write, Self::WriteUnchanged, Self::Resize];

    fn bit(self) -> i64 {
        match self {
            Self::ConsistentRead => 0,
            Self::Write => 1,
            Self::WriteUnchanged => 2,
            Self::Resize => 3,
        }
    }
}

impl std::fmt::Display for Permission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::ConsistentRead => "consistent read",
            Self::Write => "write",
            Self::WriteUnchanged => "write unchanged",
            Self::Resize => "resize",
        })
    }
}

/// An image that could not be locked: the source of the [`crate::HostError`] whose operation is
/// [`crate::HostOp::Lock`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ImageLocked {
    /// What does not go together.
    pub conflict: LockConflict,
    /// The processes that have locked it, as far as this machine tells: not those of other machines, nor of users
    /// whose processes we may not look into.
    pub holders: Vec<Holder>,
}

impl std::error::Error for ImageLocked {}

impl std::fmt::Display for ImageLocked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.holders.as_slice() {
            [] => f.write_str("another program")?,
            [first, others @ ..] => {
                first.fmt(f)?;
                others.iter().try_for_each(|other| write!(f, ", {other}"))?;
            }
        }
        let verb = if self.holders.len() > 1 { "have" } else { "has" };
        let remedy = match self.holders.as_slice() {
            [holder] if holder.is_own() => "it is to be closed there first",
            _ => "end it, or detach the image from it, and try again",
        };
        write!(f, " {verb} the image open {}; {remedy}", self.conflict)
    }
}

impl ImageLocked {
    /// What an error says of locks, if it does.
    pub(crate) fn of(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }
}

/// Why an image could not be locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LockConflict {
    /// We need something that another program does not let others do.
    #[error("and does not share the \"{wanted}\" permission")]
    NotShared {
        /// What we need.
        wanted: Permission,
    },
    /// Another program does something that we cannot have beside us.
    #[error("with the \"{used}\" permission, which cannot be shared")]
    InUse {
        /// What it may do.
        used: Permission,
    },
}

/// What is done with an image and what is tolerated beside it.
struct Claim {
    uses: &'static [Permission],
    shares: &'static [Permission],
}

/// What QEMU's file node takes for a format that is written.
const WRITER: Claim = Claim {
    uses: &[Permission::ConsistentRead, Permission::Write, Permission::Resize],
    shares: &[Permission::ConsistentRead, Permission::WriteUnchanged],
};
/// What it takes for an image that is only read, alone or as a backing file.
const READER: Claim = Claim {
    uses: &[Permission::ConsistentRead],
    shares: &[Permission::ConsistentRead, Permission::WriteUnchanged],
};

/// Locks an image until [`unlock`], or until its file description is closed, as a reader or as a writer.
///
/// All locks are shared ones, so that any number of programs can tell what they do; whether they agree is checked
/// afterwards. Two that start at the same moment may both be refused, but never both accepted. A file system without
/// such locks is worth a warning, once.
///
/// # Errors
/// An [`ImageLocked`] without holders inside an `io::Error` of kind `ResourceBusy`; otherwise what the kernel says. What was locked is
/// left to [`unlock`].
pub(crate) fn lock(file: &impl AsFd, read_only: bool) -> io::Result<()> {
    let claim = if read_only { READER } else { WRITER };
    match claim.take(file) {
        Err(error) if is_unsupported(&error) => {
            static WARN: Once = Once::new();
            WARN.call_once(|| {
                tracing::warn!(%error, "a file system cannot lock images: nobody is kept out");
            });
            Ok(())
        }
        result => result,
    }
}

/// Gives all locks of a file description back. Closing the descriptor would not do: the kernel may hold the description
/// for a moment longer, for an operation of a ring that has already ended, or for a child of this process that is about to
/// become another program.
pub(crate) fn unlock(file: &impl AsFd) {
    let mut all = byte_lock(libc::F_UNLCK, IN_USE_BYTE);
    all.l_len = NOT_SHARED_BYTE + PERMISSION_BYTES - IN_USE_BYTE;
    // Where it fails, closing has to do.
    let _locked = fcntl(file, libc::F_OFD_SETLK, &mut all);
}

impl Claim {
    fn take(&self, file: &impl AsFd) -> io::Result<()> {
        for permission in Permission::ALL {
            if self.uses.contains(&permission) {
                share_byte(file, IN_USE_BYTE + permission.bit())?;
            }
            if !self.shares.contains(&permission) {
                share_byte(file, NOT_SHARED_BYTE + permission.bit())?;
            }
        }
        for permission in Permission::ALL {
            let shares = self.shares.contains(&permission);
            if !shares && is_locked_by_others(file, IN_USE_BYTE + permission.bit())? {
                return Err(busy(LockConflict::InUse { used: permission }));
            }
        }
        for permission in Permission::ALL {
            let uses = self.uses.contains(&permission);
            if uses && is_locked_by_others(file, NOT_SHARED_BYTE + permission.bit())? {
                return Err(busy(LockConflict::NotShared { wanted: permission }));
            }
        }
        Ok(())
    }
}

fn busy(conflict: LockConflict) -> io::Error {
    io::Error::new(io::ErrorKind::ResourceBusy, ImageLocked { conflict, holders: Vec::new() })
}

/// Whether the file system, or the kernel, has no such locks.
fn is_unsupported(error: &io::Error) -> bool {
    let errnos = [libc::EINVAL, libc::ENOLCK, libc::ENOSYS, libc::EOPNOTSUPP];
    error.raw_os_error().is_some_and(|errno| errnos.contains(&errno))
}

/// A lock on one byte, as `fcntl` takes it.
fn byte_lock(kind: libc::c_int, byte: i64) -> libc::flock {
    // SAFETY: `flock` is a plain structure of numbers, of which zero is a valid value each.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::c_short::try_from(kind).unwrap_or_default();
    lock.l_whence = libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default();
    lock.l_start = byte;
    lock.l_len = 1;
    lock
}

fn share_byte(file: &impl AsFd, byte: i64) -> io::Result<()> {
    fcntl(file, libc::F_OFD_SETLK, &mut byte_lock(libc::F_RDLCK, byte)).map_err(|error| {
        // Somebody holds it exclusively, which QEMU never does for long and others only to keep everybody out.
        let taken = [libc::EAGAIN, libc::EACCES];
        match error.raw_os_error() {
            Some(errno) if taken.contains(&errno) => {
                busy(LockConflict::NotShared { wanted: Permission::ConsistentRead })
            }
            _ => error,
        }
    })
}

fn is_locked_by_others(file: &impl AsFd, byte: i64) -> io::Result<bool> {
    let mut lock = byte_lock(libc::F_WRLCK, byte);
    fcntl(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}

fn fcntl(file: &impl AsFd, command: libc::c_int, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: both commands take a pointer to a `flock`, which `lock` is for the duration of the call; the descriptor
    // is open because it is borrowed.
    let result =
        unsafe { libc::fcntl(file.as_fd().as_raw_fd(), command, std::ptr::from_mut(lock)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn twice() -> (tempfile::NamedTempFile, std::fs::File) {
        let first = tempfile::NamedTempFile::new().expect("a file");
        let second = first.reopen().expect("the same file");
        (first, second)
    }

    fn conflict(result: io::Result<()>) -> Option<LockConflict> {
        Some(ImageLocked::of(&result.err()?)?.conflict)
    }

    #[test]
    fn readers_share() {
        let (first, second) = twice();
        lock(&first, true).expect("a reader");
        lock(&second, true).expect("another reader");
    }

    #[test]
    fn a_writer_keeps_readers_and_writers_out() {
        let (first, second) = twice();
        lock(&first, false).expect("a writer");
        let reader = conflict(lock(&second, true));
        assert_eq!(reader, Some(LockConflict::InUse { used: Permission::Write }));
        let writer = conflict(lock(&first.reopen().expect("again"), false));
        assert_eq!(writer, Some(LockConflict::InUse { used: Permission::Write }));
    }

    #[test]
    fn a_reader_keeps_writers_out_until_it_is_gone() {
        let (first, second) = twice();
        lock(&second, true).expect("a reader");
        let writer = conflict(lock(&first, false));
        assert_eq!(writer, Some(LockConflict::NotShared { wanted: Permission::Write }));
        drop(second);
        lock(&first.reopen().expect("again"), false).expect_err("our own try holds locks still");
        let path = first.into_temp_path();
        let file = std::fs::File::options().read(true).write(true).open(&path).expect("reopen");
        lock(&file, false).expect("everybody is gone");
    }

    #[test]
    fn a_byte_that_is_held_alone_keeps_everybody_out() {
        let (first, second) = twice();
        fcntl(&first, libc::F_OFD_SETLK, &mut byte_lock(libc::F_WRLCK, IN_USE_BYTE))
            .expect("alone");
        let reader = lock(&second, true);
        let text = reader.as_ref().expect_err("held").to_string();
        assert_eq!(
            conflict(reader),
            Some(LockConflict::NotShared { wanted: Permission::ConsistentRead })
        );
        assert!(text.contains("\"consistent read\" permission"), "{text}");
    }

    #[test]
    fn conflicts_name_the_permission_as_qemu_does() {
        let names = ["consistent read", "write", "write unchanged", "resize"];
        for (permission, name) in Permission::ALL.into_iter().zip(names) {
            let wanted = LockConflict::NotShared { wanted: permission }.to_string();
            let used = LockConflict::InUse { used: permission }.to_string();
            for text in [wanted, used] {
                assert!(text.contains(&format!("\"{name}\" permission")), "{text}");
            }
        }
    }
}
