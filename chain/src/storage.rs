//! What a repository's file system is and how much room it has. What to do about it (warn, refuse, clean up) is the
//! caller's policy.

use rustix::fs::{fstatfs, fstatvfs};
use serde::Serialize;

use crate::durable::Directory;
use crate::error::{Error, FileOp};

/// Room and kind of the file system under a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Storage {
    /// What it is.
    pub file_system: FileSystem,
    /// Its whole size, in bytes.
    pub total_bytes: u64,
    /// What may still be written by somebody who is not root, in bytes.
    pub available_bytes: u64,
}

/// The kinds of file systems that matter to a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum FileSystem {
    /// ext4, or one of its elders, which have the same number.
    Ext4,
    /// XFS.
    Xfs,
    /// Btrfs.
    Btrfs,
    /// Memory: gone with the machine.
    Tmpfs,
    /// NFS.
    Nfs,
    /// CIFS or SMB.
    Cifs,
    /// Something in user space.
    Fuse,
    /// Anything else, by the number that `statfs` gives.
    Other(i64),
}

impl FileSystem {
    /// Whether this is a local file system that large images and durable renames are known to work on.
    pub const fn is_recommended(self) -> bool {
        matches!(self, Self::Ext4 | Self::Xfs | Self::Btrfs)
    }

    /// Recognises the number of a file system.
    ///
    /// Source: statfs(2).
    const fn from_magic(magic: i64) -> Self {
        match magic {
            0xef53 => Self::Ext4,
            0x5846_5342 => Self::Xfs,
            0x9123_683e => Self::Btrfs,
            0x0102_1994 => Self::Tmpfs,
            0x6969 => Self::Nfs,
            0xff53_4d42 | 0xfe53_4d42 => Self::Cifs,
            0x6573_5546 => Self::Fuse,
            other => Self::Other(other),
        }
    }
}

impl Storage {
    /// Asks the host.
    pub(crate) fn of(root: &Directory) -> Result<Self, Error> {
        let failed = |error| FileOp::Stat.failed(root.path(), error);
        let room = fstatvfs(root.fd()).map_err(failed)?;
        let kind = fstatfs(root.fd()).map_err(failed)?;
        Ok(Self {
            file_system: FileSystem::from_magic(kind.f_type),
            total_bytes: room.f_blocks.saturating_mul(room.f_frsize),
            available_bytes: room.f_bavail.saturating_mul(room.f_frsize),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn memory_is_recognised_and_not_recommended() {
        let storage = Storage::of(&Directory::open(Path::new("/dev/shm")).unwrap()).unwrap();
        assert_eq!(storage.file_system, FileSystem::Tmpfs);
        assert!(!storage.file_system.is_recommended());
        assert!(storage.available_bytes <= storage.total_bytes && storage.total_bytes > 0);
    }

    #[test]
    fn an_unknown_file_system_keeps_its_number() {
        assert_eq!(FileSystem::from_magic(0x1234), FileSystem::Other(0x1234));
        assert_eq!(FileSystem::from_magic(0x5846_5342), FileSystem::Xfs);
    }
}
