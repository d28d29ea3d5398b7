//! Waiting for an image that another program is about to let go: the kernel releases the locks of a killed process
//! only when its last I/O in flight has ended, which can be after its parent has been told of its death. What a lock
//! is, and whether one is wanted, is told elsewhere.

use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::{HostError, ImageLocked};

/// How often a locked image is tried again before it counts as in use: about two seconds in all.
const LOCK_RETRIES: u32 = 100;
/// The pause before each of these tries.
const LOCK_RETRY_PAUSE: Duration = Duration::from_millis(20);

/// Whether `error` is another program's lock.
pub(crate) fn is_conflict(error: &HostError) -> bool {
    ImageLocked::of(&error.source).is_some()
}

/// Repeats an attempt that was `refused` because of a lock until it has another outcome, or the last of
/// [`LOCK_RETRIES`] is refused too. An attempt must let go of its own locks where it fails, lest two that wait refuse
/// each other.
///
/// It waits on a thread of its own, because those of the engines have I/O to do. Dropping the future ends that.
pub(crate) async fn wait_for_lock<T: Send + 'static>(
    refused: HostError,
    mut attempt: impl FnMut() -> Result<T, HostError> + Send + 'static,
) -> Result<T, HostError> {
    let (reply, answer) = oneshot::channel();
    let wait = move || {
        for _ in 0..LOCK_RETRIES {
            thread::sleep(LOCK_RETRY_PAUSE);
            if reply.is_closed() {
                return;
            }
            match attempt() {
                Err(error) if is_conflict(&error) => {}
                outcome => {
                    // The caller may be gone.
                    let _gone = reply.send(outcome);
                    return;
                }
            }
        }
    };
    if let Err(error) = thread::Builder::new().name("block-open".to_owned()).spawn(wait) {
        tracing::warn!(%error, "cannot start a thread to wait for a locked image");
    }
    // Nothing comes where the last try was refused, or no thread could be had.
    answer.await.unwrap_or(Err(refused))
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::{HostOp, LockConflict, Permission};

    fn refusal() -> HostError {
        let conflict = LockConflict::InUse { used: Permission::Write };
        let locked = ImageLocked { conflict, holders: Vec::new() };
        let source = io::Error::new(io::ErrorKind::ResourceBusy, locked);
        HostError::whole(Path::new("image"), HostOp::Lock, source)
    }

    #[tokio::test]
    async fn an_attempt_is_repeated_until_the_lock_is_gone() {
        let mut left = 3;
        let attempt = move || {
            left -= 1;
            if left == 0 { Ok(()) } else { Err(refusal()) }
        };
        wait_for_lock(refusal(), attempt).await.expect("the third try");
    }

    #[tokio::test]
    async fn a_lock_that_stays_is_reported_as_it_was_found() {
        let tries = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&tries);
        let attempt = move || {
            counted.fetch_add(1, Ordering::SeqCst);
            Err::<(), _>(refusal())
        };
        let error = wait_for_lock(refusal(), attempt).await.expect_err("locked all the time");
        assert!(is_conflict(&error), "{error}");
        assert_eq!(tries.load(Ordering::SeqCst), LOCK_RETRIES);
    }

    #[tokio::test]
    async fn another_failure_ends_the_wait() {
        let missing =
            || HostError::whole(Path::new("x"), HostOp::Open, io::ErrorKind::NotFound.into());
        let error = wait_for_lock(refusal(), move || Err::<(), _>(missing())).await;
        assert_eq!(error.expect_err("missing").source.kind(), io::ErrorKind::NotFound);
    }
}
