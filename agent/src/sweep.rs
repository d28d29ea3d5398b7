//! Which digest files of a disk are no longer needed, and their removal. Nothing here touches a file of another disk.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::change_id::StateId;
use crate::digest_file::{Header, PARTIAL_SUFFIX, SUFFIX, peek};

/// How many states of other lineages of the same disk are kept: those of chains that somebody else may run.
const KEPT_OTHER_LINEAGES: usize = 2;

/// A digest file that was found.
#[derive(Clone, Debug)]
struct Found {
    path: PathBuf,
    header: Header,
    modified: SystemTime,
    partial: bool,
}

/// Removes the digest files that the state of `new` leaves behind: all others of its lineage except `previous`, old
/// ones of other lineages of its disk, and what a killed run left half written.
///
/// Best effort: what cannot be read or removed stays, and is looked at again by the next run.
pub(crate) fn sweep(directory: &Path, new: &Header, previous: Option<StateId>) {
    let Ok(listing) = fs::read_dir(directory) else { return };
    let found = listing.flatten().filter_map(|entry| find(&entry.path())).collect();
    for path in superfluous(found, new, previous) {
        match fs::remove_file(&path) {
            Ok(()) => tracing::debug!(path = %path.display(), "removed an old digest file"),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cannot remove an old digest file");
            }
        }
    }
}

fn find(path: &Path) -> Option<Found> {
    let name = path.file_name()?.to_str()?;
    let partial = name.ends_with(PARTIAL_SUFFIX);
    if !partial && !name.ends_with(SUFFIX) {
        return None;
    }
    if partial && File::open(path).ok()?.try_lock().is_err() {
        // Its writer is alive.
        return None;
    }
    let header = peek(path).ok()?;
    let modified = fs::metadata(path).and_then(|metadata| metadata.modified());
    Some(Found { path: path.to_owned(), header, modified: modified.ok()?, partial })
}

fn superfluous(found: Vec<Found>, new: &Header, previous: Option<StateId>) -> Vec<PathBuf> {
    let (mut remove, mut others) = (Vec::new(), Vec::new());
    for file in found {
        let needed = file.header.state == new.state || Some(file.header.state) == previous;
        let same_lineage = file.header.lineage == new.lineage;
        let same_disk = file.header.disk == new.disk;
        match (needed, file.partial) {
            (true, false) => {}
            _ if same_lineage || (same_disk && file.partial) => remove.push(file.path),
            _ if same_disk => others.push(file),
            _ => {}
        }
    }
    others.sort_by_key(|file| std::cmp::Reverse(file.modified));
    remove.extend(others.into_iter().skip(KEPT_OTHER_LINEAGES).map(|file| file.path));
    remove
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::BLOCK_BYTES;
    use crate::digest_file::{DigestWriter, DiskIdentity, path_of};

    fn header(disk: u8, lineage: Option<&Header>) -> Header {
        let state = StateId::following(lineage.map(|header| header.state));
        Header {
            disk_bytes: BLOCK_BYTES,
            state,
            lineage: lineage.map_or(state.uuid, |header| header.lineage),
            disk: DiskIdentity([disk; 32]),
        }
    }

    fn write(directory: &Path, header: &Header) {
        DigestWriter::create(directory, header).unwrap().finish().unwrap().publish().unwrap();
    }

    #[test]
    fn a_lineage_keeps_the_previous_state_and_the_new_one() {
        let directory = tempfile::tempdir().unwrap();
        let first = header(1, None);
        let previous = header(1, Some(&first));
        let failed = header(1, Some(&previous));
        let new = header(1, Some(&previous));
        let stranger = header(2, None);
        for header in [&first, &previous, &failed, &new, &stranger] {
            write(directory.path(), header);
        }
        fs::write(directory.path().join("notes.digests"), "not ours").unwrap();
        sweep(directory.path(), &new, Some(previous.state));
        let exists = |header: &Header| path_of(directory.path(), header.state).exists();
        assert_eq!([&first, &failed].map(exists), [false, false]);
        assert_eq!([&previous, &new, &stranger].map(exists), [true, true, true]);
        assert!(directory.path().join("notes.digests").exists());
    }

    #[test]
    fn fulls_of_one_disk_do_not_pile_up() {
        let directory = tempfile::tempdir().unwrap();
        for _ in 0..6 {
            let full = header(1, None);
            write(directory.path(), &full);
            sweep(directory.path(), &full, None);
        }
        let files = fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(files, 1 + KEPT_OTHER_LINEAGES);
    }

    #[test]
    fn half_a_file_is_removed_unless_its_writer_lives() {
        let directory = tempfile::tempdir().unwrap();
        let (new, dead, alive) = (header(1, None), header(1, None), header(1, None));
        write(directory.path(), &new);
        write(directory.path(), &dead);
        let dead_path = path_of(directory.path(), dead.state);
        let partial = dead_path.with_extension("digests.partial");
        fs::rename(dead_path, &partial).unwrap();
        let writer = DigestWriter::create(directory.path(), &alive).unwrap().finish().unwrap();
        sweep(directory.path(), &new, None);
        assert!(!partial.exists());
        writer.publish().unwrap();
        assert!(path_of(directory.path(), alive.state).exists());
    }
}
