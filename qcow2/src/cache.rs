//! How much memory the tables of all open images take together, and which of them are forgotten when it is too much.
//! What a table is, and whether it may be forgotten, the mapping and the refcounts know.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Weak};

use parking_lot::Mutex;

use crate::core::Core;

/// The memory for L2 tables of all images in a process, in bytes: maps 256 GiB with clusters of 64 KiB.
pub const L2_CACHE_BYTES: u64 = 32 << 20;
/// The memory for refcount blocks of all images in a process, in bytes.
pub const REFCOUNT_CACHE_BYTES: u64 = 8 << 20;
/// What one image may keep changed, in parts of the whole, when all is taken: beyond it, it flushes.
const DIRTY_PARTS: u64 = 16;
/// How many times a table is passed over that was loaded and not yet used.
const GRACE: u8 = 3;

/// The memory for tables of one kind.
#[derive(Debug)]
pub(crate) struct Pool {
    limit_bytes: u64,
    used_bytes: AtomicU64,
    /// From where on it is worth looking for something to forget.
    trim_at_bytes: AtomicU64,
}

pub(crate) static L2_TABLES: Pool = Pool::new(L2_CACHE_BYTES);
pub(crate) static REFCOUNT_BLOCKS: Pool = Pool::new(REFCOUNT_CACHE_BYTES);

/// Goes on with every table that is loaded: what was used since shares its age.
static CLOCK: AtomicU64 = AtomicU64::new(0);
static IMAGES: LazyLock<Mutex<Vec<Weak<Mutex<Core>>>>> = LazyLock::new(Mutex::default);

impl Pool {
    const fn new(limit_bytes: u64) -> Self {
        let (used_bytes, trim_at_bytes) = (AtomicU64::new(0), AtomicU64::new(limit_bytes));
        Self { limit_bytes, used_bytes, trim_at_bytes }
    }

    fn used(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Whether all that is taken is more than there is.
    pub(crate) fn is_over(&self) -> bool {
        self.used() > self.limit_bytes
    }

    /// The bytes that one image may keep changed while the pool is over.
    pub(crate) fn dirty_bytes(&self) -> u64 {
        self.limit_bytes / DIRTY_PARTS
    }
}

/// The memory that the tables of all open images take now, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheUsage {
    /// L2 tables, of at most [`L2_CACHE_BYTES`] and what waits to be written.
    pub l2_bytes: u64,
    /// Refcount blocks, of at most [`REFCOUNT_CACHE_BYTES`] and what waits to be written.
    pub refcount_bytes: u64,
}

/// How much memory the tables of all open images take.
pub fn cache_usage() -> CacheUsage {
    CacheUsage { l2_bytes: L2_TABLES.used(), refcount_bytes: REFCOUNT_BLOCKS.used() }
}

/// What one image has of a pool; gives it back when it goes.
#[derive(Debug)]
pub(crate) struct Share {
    pool: &'static Pool,
    table_bytes: u64,
    tables: u64,
}

impl Share {
    pub(crate) fn new(pool: &'static Pool, table_bytes: u64) -> Self {
        Self { pool, table_bytes, tables: 0 }
    }

    /// The image has this many tables in memory now.
    pub(crate) fn set(&mut self, tables: usize) {
        let tables = tables as u64;
        let bytes = |count: u64| count * self.table_bytes;
        if tables > self.tables {
            self.pool.used_bytes.fetch_add(bytes(tables - self.tables), Ordering::Relaxed);
        } else {
            self.pool.used_bytes.fetch_sub(bytes(self.tables - tables), Ordering::Relaxed);
        }
        self.tables = tables;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// When a table was used last.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Age {
    used: u64,
    grace: u8,
}

impl Age {
    /// Of a table that was just loaded, for somebody who has yet to come back for it.
    pub(crate) fn loaded() -> Self {
        Self { used: CLOCK.fetch_add(1, Ordering::Relaxed) + 1, grace: GRACE }
    }

    /// It is used now.
    pub(crate) fn touch(&mut self) {
        *self = Self { used: CLOCK.load(Ordering::Relaxed), grace: 0 };
    }

    /// Its rank among what may be forgotten, smallest first; `None` where it is passed over once more.
    pub(crate) fn rank(&mut self) -> Option<u64> {
        if self.grace > 0 {
            self.grace -= 1;
            return None;
        }
        Some(self.used)
    }
}

/// Counts an image in.
pub(crate) fn register(core: &Arc<Mutex<Core>>) {
    let mut images = IMAGES.lock();
    images.retain(|image| image.strong_count() > 0);
    images.push(Arc::downgrade(core));
}

/// Forgets what was not used for longest, in whichever image it is, where there is too much. Nobody's lock is held by
/// the caller; images that are busy at this moment are left out.
pub(crate) fn make_room() {
    trim(&L2_TABLES, |core| core.map.oldest(), |core, l1| core.map.forget(l1));
    trim(&REFCOUNT_BLOCKS, |core| core.refs.oldest(), |core, block| core.refs.forget(block));
}

fn trim(
    pool: &Pool,
    oldest: impl Fn(&mut Core) -> Vec<(u64, u64)>,
    forget: impl Fn(&mut Core, u64),
) {
    if pool.used() <= pool.trim_at_bytes.load(Ordering::Relaxed) {
        return;
    }
    let images: Vec<_> = IMAGES.lock().iter().filter_map(Weak::upgrade).collect();
    let mut all = Vec::new();
    for (image, core) in images.iter().enumerate() {
        if let Some(mut core) = core.try_lock() {
            all.extend(oldest(&mut core).into_iter().map(|(rank, table)| (rank, image, table)));
        }
    }
    all.sort_unstable();
    // More than the excess, so that this is not done at every turn.
    let target = pool.limit_bytes - pool.limit_bytes / 8;
    for (_, image, table) in all {
        if pool.used() <= target {
            break;
        }
        if let Some(mut core) = images.get(image).and_then(|core| core.try_lock()) {
            forget(&mut core, table);
        }
    }
    // Where all is in use, looking again helps only when there is more.
    let next = pool.limit_bytes.max(pool.used() + pool.limit_bytes / DIRTY_PARTS);
    let next = if pool.is_over() { next } else { pool.limit_bytes };
    pool.trim_at_bytes.store(next, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_goes_back_when_it_ends() {
        static POOL: Pool = Pool::new(4096);
        let mut one = Share::new(&POOL, 512);
        one.set(9);
        assert!(POOL.is_over());
        one.set(8);
        assert!(!POOL.is_over());
        let mut two = Share::new(&POOL, 4096);
        two.set(1);
        assert!(POOL.is_over());
        drop(one);
        assert!(!POOL.is_over());
        drop(two);
        assert_eq!(POOL.used(), 0);
    }

    #[test]
    fn what_was_just_loaded_is_passed_over_until_it_is_used() {
        let mut age = Age::loaded();
        for _ in 0..GRACE {
            assert_eq!(age.rank(), None);
        }
        let old = age.rank();
        let _another = Age::loaded();
        age.touch();
        assert!(age.rank() > old);
    }
}
