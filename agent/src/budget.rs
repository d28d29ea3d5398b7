//! How much memory all runs of a process may hold in bytes that were read and are not yet written. Blocks are not
//! allocated here; a reservation is a promise that travels with them.

use std::sync::{Arc, LazyLock};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The most bytes that all runs of the process hold at once.
///
/// Well below the cap of the shared buffer pool: a server in the same process needs buffers for what we send it, and
/// must always find some.
pub(crate) const MAX_BYTES_IN_FLIGHT: u64 = 96 << 20;

/// What one permit stands for, in bytes.
const UNIT_BYTES: u64 = 4 << 10;

static BUDGET: LazyLock<Arc<Semaphore>> = LazyLock::new(|| {
    Arc::new(Semaphore::new(usize::try_from(MAX_BYTES_IN_FLIGHT / UNIT_BYTES).unwrap_or(1)))
});

/// A part of the budget. Given back when the last clone is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Reserved {
    _permit: Option<Arc<OwnedSemaphorePermit>>,
}

/// Waits for room for `bytes`, first come, first served.
///
/// A disk reserves in the order in which it books, so that the piece that its ledger waits for never waits itself for
/// later ones.
pub(crate) async fn reserve(bytes: u64) -> Reserved {
    let units = bytes.min(MAX_BYTES_IN_FLIGHT).div_ceil(UNIT_BYTES);
    let units = u32::try_from(units).unwrap_or(u32::MAX);
    // The semaphore is never closed.
    let permit = Arc::clone(&BUDGET).acquire_many_owned(units).await.ok();
    Reserved { _permit: permit.map(Arc::new) }
}
