//! How many files this process has open, for programs that end: an operation in flight keeps its file open, and locked,
//! for longer than whoever asked for it.

use std::time::Duration;

use parking_lot::{Condvar, Mutex};

static OPEN: Mutex<usize> = Mutex::new(0);
static CLOSED: Condvar = Condvar::new();

/// One open file; counted until it is dropped.
#[derive(Debug)]
pub(crate) struct OpenFile(());

impl OpenFile {
    pub(crate) fn count() -> Self {
        *OPEN.lock() += 1;
        Self(())
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        *OPEN.lock() -= 1;
        CLOSED.notify_all();
    }
}

/// Waits until every [`crate::HostFile`] of this process is closed and its last operation has ended, so that no lock and
/// no write outlives the process. Blocks the thread, for `at_most` at the most; says whether all are closed.
///
/// For the end of a program: whoever still holds files waits for nothing.
pub fn wait_until_closed(at_most: Duration) -> bool {
    let mut open = OPEN.lock();
    let waited = CLOSED.wait_while_for(&mut open, |open| *open > 0, at_most);
    !waited.timed_out()
}
