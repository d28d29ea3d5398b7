//! Threads for computing (compression, ciphers, digests), as many as the machine has processors, with a bounded queue.
//! What is computed is the caller's business, and nothing that waits for a disk or a network belongs here.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, LazyLock};
use std::thread;

use tokio::sync::Semaphore;

use crate::DeviceError;
use crate::ErrorKind;
use crate::blocking::BlockingEngine;

/// How many jobs per thread may be admitted, running or queued; further ones wait without blocking a thread.
pub const CPU_JOBS_PER_THREAD: usize = 4;

/// Why a job has no result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CpuError {
    /// The job panicked, which is a defect in the job; its thread goes on.
    #[error("a computation panicked: {message}")]
    Panicked {
        /// What the panic said.
        message: String,
    },
    /// The job was lost with its thread.
    #[error("a computation was lost")]
    Lost,
}

impl From<CpuError> for DeviceError {
    fn from(error: CpuError) -> Self {
        Self::Backend { kind: ErrorKind::Io, source: Box::new(error) }
    }
}

/// Runs `work` on one of the process's threads for computing, and gives its result.
///
/// Waits, first come first served, while [`CPU_JOBS_PER_THREAD`] jobs per thread are admitted: whoever makes jobs
/// slows down to the speed of the processors. Dropping the future before a thread has begun cancels the job; one that
/// has begun runs to its end, and its result is dropped. A job must not wait for another one.
///
/// # Errors
/// [`CpuError::Panicked`].
pub async fn on_cpu<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, CpuError> {
    static SHARED: LazyLock<CpuPool> = LazyLock::new(|| CpuPool::new(cpu_threads()));
    SHARED.run(work).await
}

/// How many jobs of [`on_cpu`] run at once: as many as the process may use processors.
pub fn cpu_threads() -> usize {
    static THREADS: LazyLock<usize> =
        LazyLock::new(|| thread::available_parallelism().map_or(1, usize::from));
    *THREADS
}

struct CpuPool {
    threads: Arc<BlockingEngine>,
    places: Arc<Semaphore>,
}

impl CpuPool {
    fn new(threads: usize) -> Self {
        let places = Arc::new(Semaphore::new(threads.max(1) * CPU_JOBS_PER_THREAD));
        Self { threads: BlockingEngine::named(threads, "block-cpu"), places }
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, CpuError> {
        // Nobody closes the semaphore.
        let place = Arc::clone(&self.places).acquire_owned().await.map_err(|_| CpuError::Lost)?;
        // The job keeps a watch on its caller: a queued one that nobody waits for is not worth its time.
        let caller = Arc::new(());
        let watch = Arc::downgrade(&caller);
        let job = move || {
            // Given back whatever becomes of the work, but not before.
            let _place = place;
            if watch.strong_count() == 0 {
                return Err(CpuError::Lost);
            }
            // The work is consumed: nobody can see what a panic left half-done, but through a poisoned lock.
            catch_unwind(AssertUnwindSafe(work))
                .map_err(|panic| CpuError::Panicked { message: message_of(&*panic).to_owned() })
        };
        let answer = self.threads.call(job).await.unwrap_or(Err(CpuError::Lost));
        drop(caller);
        answer
    }
}

fn message_of(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "no message",
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::task::{Context, Waker};

    use super::*;

    #[tokio::test]
    async fn results_come_back_from_threads_of_its_own() {
        let name = on_cpu(|| thread::current().name().map(str::to_owned)).await;
        assert_eq!(name, Ok(Some("block-cpu".to_owned())));
        assert!(cpu_threads() > 0);
    }

    #[tokio::test]
    async fn a_panic_is_an_error_and_the_thread_goes_on() {
        let pool = CpuPool::new(1);
        for _ in 0..CPU_JOBS_PER_THREAD * 2 {
            let broken = pool
                .run(|| {
                    if cpu_threads() > 0 {
                        panic!("seven is {}", 7)
                    }
                })
                .await;
            assert_eq!(broken, Err(CpuError::Panicked { message: "seven is 7".to_owned() }));
        }
        assert_eq!(pool.run(|| 5).await, Ok(5));
        let error = DeviceError::from(CpuError::Lost);
        assert_eq!(error.kind(), ErrorKind::Io);
    }

    #[tokio::test]
    async fn admission_waits_while_the_queue_is_full() {
        let pool = CpuPool::new(1);
        let (release, held) = mpsc::channel::<()>();
        let ran = Arc::new(AtomicUsize::new(0));
        let mut context = Context::from_waker(Waker::noop());
        let mut admitted = Vec::new();
        let mut first = Box::pin(pool.run(move || held.recv().is_ok()));
        assert!(first.as_mut().poll(&mut context).is_pending());
        for _ in 0..CPU_JOBS_PER_THREAD + 3 {
            let ran = Arc::clone(&ran);
            let mut job = Box::pin(pool.run(move || ran.fetch_add(1, Ordering::SeqCst)));
            assert!(job.as_mut().poll(&mut context).is_pending());
            admitted.push(job);
        }
        assert_eq!(pool.places.available_permits(), 0);
        // The last are dropped before they are admitted, one while it is queued: none of them runs.
        admitted.truncate(CPU_JOBS_PER_THREAD - 2);
        release.send(()).expect("the first job listens");
        assert_eq!(first.await, Ok(true));
        for job in admitted {
            job.await.expect("it was admitted");
        }
        assert_eq!(pool.run(|| ()).await, Ok(()));
        assert_eq!(ran.load(Ordering::SeqCst), CPU_JOBS_PER_THREAD - 2);
    }

    #[tokio::test]
    async fn every_place_is_given_back() {
        let pool = CpuPool::new(2);
        let jobs = (0..200).map(|number| pool.run(move || number));
        assert_eq!(crate::try_join_all(jobs).await, Ok((0..200).collect()));
        // A job answers before its thread lets go of its place; taking all of them waits for that.
        let all = u32::try_from(2 * CPU_JOBS_PER_THREAD).expect("few");
        pool.places.acquire_many(all).await.map(drop).expect("all are back");
    }
}
