//! Locks as they would be, for who finds out whether images could be opened together: known to this process alone, which
//! takes none on the files. What programs really hold is in `lock`.

use std::collections::BTreeMap;
use std::io;

use parking_lot::Mutex;

use crate::holders::Holder;
use crate::lock::{ImageLocked, LockConflict, Permission};

/// The files that are claimed, by device and inode.
static CLAIMED: Mutex<BTreeMap<(u64, u64), Claimed>> = Mutex::new(BTreeMap::new());

/// How many have a file.
#[derive(Debug, Default)]
struct Claimed {
    readers: usize,
    writers: usize,
}

/// A file that is claimed until this is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    file: (u64, u64),
    read_only: bool,
}

impl Claim {
    /// Claims a file as [`lock`](crate::lock::lock) would lock it.
    ///
    /// # Errors
    /// An [`ImageLocked`] inside an `io::Error` of kind `ResourceBusy`.
    pub(crate) fn take(file: (u64, u64), read_only: bool) -> io::Result<Self> {
        let mut all = CLAIMED.lock();
        let claimed = all.entry(file).or_default();
        let conflict = if claimed.writers > 0 {
            Some(LockConflict::InUse { used: Permission::Write })
        } else if claimed.readers > 0 && !read_only {
            Some(LockConflict::NotShared { wanted: Permission::Write })
        } else {
            None
        };
        if let Some(conflict) = conflict {
            let locked = ImageLocked { conflict, holders: vec![Holder::own()] };
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, locked));
        }
        *claimed.count(read_only) += 1;
        Ok(Self { file, read_only })
    }
}

impl Claimed {
    fn count(&mut self, read_only: bool) -> &mut usize {
        if read_only { &mut self.readers } else { &mut self.writers }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut all = CLAIMED.lock();
        let Some(claimed) = all.get_mut(&self.file) else { return };
        *claimed.count(self.read_only) -= 1;
        if claimed.readers + claimed.writers == 0 {
            all.remove(&self.file);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{HostFile, OpenOptions};

    fn told(refused: io::Result<Claim>) -> LockConflict {
        let error = refused.expect_err("a conflict");
        let locked = ImageLocked::of(&error).expect("who has it");
        assert!(locked.holders.iter().all(Holder::is_own), "{locked}");
        locked.conflict
    }

    #[test]
    fn claims_refuse_each_other_as_locks_do() {
        // Of no device that there is.
        let file = (u64::MAX, 1);
        let used = LockConflict::InUse { used: Permission::Write };
        let wanted = LockConflict::NotShared { wanted: Permission::Write };
        let writer = Claim::take(file, false).expect("the first");
        assert_eq!(told(Claim::take(file, true)), used);
        assert_eq!(told(Claim::take(file, false)), used);
        Claim::take((u64::MAX, 2), false).expect("another file");
        drop(writer);
        let readers = [(); 2].map(|()| Claim::take(file, true).expect("readers share"));
        assert_eq!(told(Claim::take(file, false)), wanted);
        drop(readers);
        Claim::take(file, false).expect("nobody is left");
    }

    #[tokio::test]
    async fn a_rehearsal_keeps_nobody_out_and_is_kept_out_by_its_own_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let (path, other) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&path, [0; 512]).expect("a file");
        std::fs::hard_link(&path, &other).expect("a second name");
        let rehearse = |path, read_only| {
            let options = OpenOptions { read_only, rehearse: true, ..OpenOptions::writing() };
            HostFile::open(path, options)
        };
        let held = HostFile::open(&path, OpenOptions::writing()).await.expect("a real writer");
        let rehearsed = rehearse(&path, false).await.expect("nobody else rehearses");
        assert!(rehearsed.is_read_only(), "nothing can be changed by it");
        drop(held);
        HostFile::open(&path, OpenOptions::writing()).await.expect("no lock was taken");
        let refused = rehearse(&other, true).await.expect_err("it is rehearsed by another name");
        assert_eq!(refused.op, crate::HostOp::Lock, "{refused}");
    }
}
