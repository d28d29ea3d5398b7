//! Giving a finished file its name. A name that is taken is not taken over unless that was asked for, on every file system:
//! some (NFS among them) cannot rename without replacing, and are asked for a second link instead.

use std::fs::File;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

/// Gives the finished file its name, durably; refuses to replace one that appeared meanwhile.
///
/// # Errors
/// In words. The file may still have its first name.
pub(super) async fn publish(
    partial: PathBuf,
    target: PathBuf,
    overwrite: bool,
) -> Result<(), String> {
    let named = tokio::task::spawn_blocking(move || {
        let failed =
            |error: &dyn std::fmt::Display| format!("cannot name {}: {error}", target.display());
        match overwrite {
            true => std::fs::rename(&partial, &target).map_err(|error| failed(&error))?,
            false => rename_to_free(&partial, &target).map_err(|error| failed(&error))?,
        }
        let directory = target.parent().unwrap_or(Path::new("/"));
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(|error| format!("cannot make {} durable: {error}", directory.display()))
    });
    named.await.unwrap_or_else(|_| Err("the hub is stopping".to_owned()))
}

/// Renames to a name that is free.
fn rename_to_free(from: &Path, to: &Path) -> std::io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => link_to_free(from, to),
        renamed => Ok(renamed?),
    }
}

/// The same in two steps. A crash between them leaves both names, and the first is known to be superfluous.
fn link_to_free(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::hard_link(from, to)?;
    std::fs::remove_file(from)
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;

    #[test]
    fn both_ways_of_naming_take_a_free_name_and_leave_a_taken_one() {
        for name in [rename_to_free, link_to_free] {
            let dir = tempfile::tempdir().unwrap();
            let (from, to) = (dir.path().join("from"), dir.path().join("to"));
            std::fs::write(&from, "new").unwrap();
            name(&from, &to).unwrap();
            assert!(!from.exists());
            std::fs::write(&from, "newer").unwrap();
            assert_eq!(name(&from, &to).unwrap_err().kind(), ErrorKind::AlreadyExists);
            assert_eq!(std::fs::read(&to).unwrap(), b"new");
            assert!(from.exists());
        }
    }
}
