//! Memory storages in the place of files, for tests of what opens several files by their paths: one order of events
//! over all of them, and what a power cut leaves of each.

use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::storage::{Storage, StorageFacts};
use crate::{MemoryStorage, OpenOptions};

/// Files in memory, each in the place of one that exists. [`crate::Engine::memory`] opens them by their paths; their
/// locks are not imitated. Clones are the same files.
#[derive(Clone, Default)]
pub struct MemoryFiles {
    clock: Arc<AtomicU64>,
    files: Arc<Mutex<Vec<(PathBuf, MemoryStorage)>>>,
}

impl MemoryFiles {
    /// No files yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts durable bytes in the place of the file at `path`: from then on what is opened there is in memory.
    ///
    /// # Errors
    /// What the system says if there is no such file.
    pub fn put(&self, path: &Path, bytes: Vec<u8>, align: u16) -> io::Result<MemoryStorage> {
        let path = std::fs::canonicalize(path)?;
        let storage = MemoryStorage::on_clock(bytes, align, Arc::clone(&self.clock));
        let mut files = self.files.lock();
        files.retain(|(other, _)| *other != path);
        files.push((path, storage.clone()));
        Ok(storage)
    }

    /// How many operations took effect, over all files.
    pub fn events(&self) -> u64 {
        self.clock.load(Ordering::SeqCst)
    }

    /// What a power cut after the first `events` operations may leave of all files, see
    /// [`MemoryStorage::crash_image_seeded`]: in the same places, durable, without a past.
    pub fn crash_seeded(&self, events: u64, seed: u64) -> Self {
        let left = Self::default();
        for ((path, storage), place) in self.files.lock().iter().zip(0..) {
            // Each file loses something else; the two seeds with a meaning mean the same for all.
            let seed = if seed < 2 { seed } else { seed.wrapping_add(place << 32) };
            let image = storage.crash_image_seeded(storage.ops_by(events), seed);
            let align = u16::try_from(storage.facts().offset_align).unwrap_or(1);
            let clock = Arc::clone(&left.clock);
            let image = MemoryStorage::on_clock(image.snapshot(), align, clock);
            left.files.lock().push((path.clone(), image));
        }
        left
    }

    /// The storage in the place of a file.
    pub fn storage(&self, path: &Path) -> Option<MemoryStorage> {
        let path = std::fs::canonicalize(path).ok()?;
        let files = self.files.lock();
        files.iter().find(|(other, _)| *other == path).map(|(_, storage)| storage.clone())
    }

    /// Opens the file in the place of `path`, as that one in the eyes of those who compare files.
    pub(crate) fn open(&self, path: &Path, options: &OpenOptions) -> io::Result<Arc<dyn Storage>> {
        let storage = self.storage(path).ok_or(io::ErrorKind::NotFound)?;
        let metadata = std::fs::metadata(path)?;
        let facts = StorageFacts {
            read_only: options.read_only,
            id: Some((metadata.dev(), metadata.ino())),
            ..storage.facts()
        };
        Ok(storage.with_facts(facts))
    }
}

impl fmt::Debug for MemoryFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paths: Vec<_> = self.files.lock().iter().map(|(path, _)| path.clone()).collect();
        f.debug_struct("MemoryFiles").field("paths", &paths).finish_non_exhaustive()
    }
}
