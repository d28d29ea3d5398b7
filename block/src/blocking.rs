//! The engine for machines without io_uring: a bounded pool of threads that make plain system calls. Its queue needs
//! no bound of its own, because every request brings a slot along.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::thread;

use parking_lot::{Condvar, Mutex};
use tokio::sync::{Semaphore, oneshot};

use crate::CopySource;
use crate::copy::Origin;
use crate::descriptor::Descriptor;
use crate::storage::{Request, Storage, StorageFacts};

/// The most threads of the pool that all files of a process share.
pub const BLOCKING_THREADS: usize = 16;
/// The most operations in flight in one engine, over all its files; further ones wait without blocking a thread.
pub const ENGINE_SLOTS: usize = 1024;

/// Threads that make blocking system calls. They start as work arrives and end with the last owner.
#[derive(Debug)]
pub(crate) struct BlockingEngine {
    queue: Arc<Queue>,
    slots: Arc<Semaphore>,
}

enum Job {
    Io(Arc<Descriptor>, Request),
    Call(Box<dyn FnOnce() + Send>),
}

impl Job {
    fn run(self) {
        match self {
            Self::Io(descriptor, request) => {
                let (op, finish) = request.into_parts();
                let result = descriptor.execute(op);
                // The file first: whoever hears of the completion may want it closed.
                drop(descriptor);
                finish.complete(result);
            }
            Self::Call(call) => call(),
        }
    }
}

#[derive(Default)]
struct Queue {
    state: Mutex<QueueState>,
    work: Condvar,
    max_threads: usize,
    thread_name: &'static str,
}

#[derive(Default)]
struct QueueState {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    stop: bool,
}

impl BlockingEngine {
    pub(crate) fn new(max_threads: usize) -> Arc<Self> {
        Self::named(max_threads, "block-io")
    }

    pub(crate) fn named(max_threads: usize, thread_name: &'static str) -> Arc<Self> {
        let queue = Queue { max_threads: max_threads.max(1), thread_name, ..Queue::default() };
        Arc::new(Self { queue: Arc::new(queue), slots: Arc::new(Semaphore::new(ENGINE_SLOTS)) })
    }

    pub(crate) fn attach(self: &Arc<Self>, descriptor: Descriptor) -> Arc<dyn Storage> {
        Arc::new(BlockingStorage { engine: Arc::clone(self), descriptor: Arc::new(descriptor) })
    }

    /// Runs system calls that may block; the future may be dropped. Fails only if no thread can be had.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let (reply, answer) = oneshot::channel();
        self.queue.push(Job::Call(Box::new(move || {
            // The caller may be gone.
            let _gone = reply.send(call());
        })));
        answer.await.map_err(|_| io::ErrorKind::Interrupted.into())
    }

    pub(crate) fn slots(&self) -> &Arc<Semaphore> {
        &self.slots
    }

    pub(crate) fn submit(&self, descriptor: Arc<Descriptor>, request: Request) {
        self.queue.push(Job::Io(descriptor, request));
    }
}

impl Drop for BlockingEngine {
    fn drop(&mut self) {
        self.queue.state.lock().stop = true;
        self.queue.work.notify_all();
    }
}

impl Queue {
    fn push(self: &Arc<Self>, job: Job) {
        let mut state = self.state.lock();
        state.jobs.push_back(job);
        if state.idle >= state.jobs.len() || state.threads >= self.max_threads {
            drop(state);
            self.work.notify_one();
            return;
        }
        state.threads += 1;
        drop(state);
        let queue = Arc::clone(self);
        let name = self.thread_name.to_owned();
        if let Err(error) = thread::Builder::new().name(name).spawn(move || queue.work()) {
            let mut state = self.state.lock();
            state.threads -= 1;
            let alone = state.threads == 0;
            let orphan = if alone { state.jobs.pop_back() } else { None };
            drop(state);
            tracing::warn!(%error, "cannot start a thread for disk I/O");
            // Nobody else would ever run it: better to block the caller than to lose it.
            if let Some(job) = orphan {
                job.run();
            }
        }
    }

    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job.run();
                state = self.state.lock();
            } else if state.stop {
                state.threads -= 1;
                return;
            } else {
                state.idle += 1;
                self.work.wait(&mut state);
                state.idle -= 1;
            }
        }
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.state.lock();
        f.debug_struct("Queue")
            .field("jobs", &state.jobs.len())
            .field("threads", &state.threads)
            .finish_non_exhaustive()
    }
}

struct BlockingStorage {
    engine: Arc<BlockingEngine>,
    descriptor: Arc<Descriptor>,
}

impl Storage for BlockingStorage {
    fn submit(&self, request: Request) {
        self.engine.submit(Arc::clone(&self.descriptor), request);
    }

    fn facts(&self) -> StorageFacts {
        self.descriptor.facts
    }

    fn len(&self) -> io::Result<u64> {
        self.descriptor.len()
    }

    fn slots(&self) -> &Arc<Semaphore> {
        &self.engine.slots
    }

    fn copy_source(&self) -> Option<CopySource> {
        Some(CopySource(Origin::File(Arc::clone(&self.descriptor))))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn no_more_calls_run_at_once_than_there_are_threads() {
        let engine = BlockingEngine::new(2);
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let calls = (0..100_usize).map(|number| {
            let (running, most) = (Arc::clone(&running), Arc::clone(&most));
            let engine = Arc::clone(&engine);
            async move {
                let call = move || {
                    let now = running.fetch_add(1, Ordering::SeqCst) + 1;
                    most.fetch_max(now, Ordering::SeqCst);
                    thread::yield_now();
                    running.fetch_sub(1, Ordering::SeqCst);
                    number
                };
                engine.call(call).await
            }
        });
        let answers = crate::try_join_all(calls).await.expect("all are answered");
        assert_eq!(answers, (0..100).collect::<Vec<_>>());
        assert!((1..=2).contains(&most.load(Ordering::SeqCst)));
    }
}
