//! Which engine carries out the I/O of this process: chosen once, at first use. What an operation is, and what
//! alignment it needs, is not decided here.

use std::io;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::thread;

use crate::blocking::{BLOCKING_THREADS, BlockingEngine};
use crate::descriptor::Descriptor;
use crate::holders::holders;
use crate::inline::InlineStorage;
use crate::patience::{is_conflict, wait_for_lock};
use crate::storage::Storage;
use crate::uring::{URING_THREADS, UringEngine};
use crate::{Create, HostError, HostOp, ImageLocked, MemoryFiles, OpenOptions, Root};

/// The environment variable that forces an engine: `blocking` or `uring`.
pub const ENGINE_VARIABLE: &str = "SENDENSE_IO";

/// What carries out operations on host files. Clones are the same engine.
///
/// Two kinds: rings of io_uring on their own threads, and a pool of threads that make plain system calls. Both need
/// no runtime: the futures of [`crate::HostFile`] can be awaited anywhere.
#[derive(Clone, Debug)]
pub struct Engine {
    pool: Arc<BlockingEngine>,
    rings: Option<Arc<UringEngine>>,
    memory: Option<MemoryFiles>,
}

impl Engine {
    /// The engine of this process, chosen and set up at the first call: io_uring, unless [`ENGINE_VARIABLE`] says
    /// `blocking` or the machine refuses it, as containers often do.
    pub fn shared() -> &'static Self {
        static SHARED: LazyLock<Engine> = LazyLock::new(|| {
            let wish = std::env::var(ENGINE_VARIABLE).ok();
            Engine::choose(wish.as_deref(), Engine::uring)
        });
        &SHARED
    }

    /// A pool of up to `threads` threads that make blocking calls.
    pub fn blocking(threads: usize) -> Self {
        Self { pool: BlockingEngine::new(threads), rings: None, memory: None }
    }

    /// Up to [`URING_THREADS`] rings, with a pool for what they do not do.
    ///
    /// # Errors
    /// What the kernel says to the set-up: it is missing, forbidden, or short of memory.
    pub fn uring() -> io::Result<Self> {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let pool = BlockingEngine::new(BLOCKING_THREADS);
        let rings = UringEngine::new(processors.min(URING_THREADS), &pool)?;
        Ok(Self { pool, rings: Some(Arc::new(rings)), memory: None })
    }

    /// Opens files in memory and no others: for tests.
    pub fn memory(files: MemoryFiles) -> Self {
        Self { memory: Some(files), ..Self::blocking(1) }
    }

    /// What it is, for logs and benchmarks: `uring`, `blocking` or `memory`.
    pub fn name(&self) -> &'static str {
        match (&self.memory, &self.rings) {
            (Some(_), _) => "memory",
            (None, Some(_)) => "uring",
            (None, None) => "blocking",
        }
    }

    /// Runs `call`, which may block on files, on one of the engine's threads for that: for libraries that read files
    /// themselves. A dropped future does not stop it; it must not panic.
    ///
    /// # Errors
    /// What the system says where no thread can be had.
    pub async fn run<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        self.pool.call(call).await
    }

    fn choose(wish: Option<&str>, uring: impl FnOnce() -> io::Result<Self>) -> Self {
        if wish == Some("blocking") {
            tracing::info!(
                engine = "blocking",
                "disk I/O by a thread pool, as {ENGINE_VARIABLE} asks"
            );
            return Self::blocking(BLOCKING_THREADS);
        }
        if let Some(other) = wish.filter(|wish| *wish != "uring") {
            tracing::warn!(value = other, "{ENGINE_VARIABLE} is neither `blocking` nor `uring`");
        }
        match uring() {
            Ok(engine) => {
                tracing::info!(engine = engine.name(), "disk I/O by io_uring");
                engine
            }
            Err(error) => {
                tracing::warn!(
                    engine = "blocking",
                    %error,
                    "io_uring cannot be used here; disk I/O by a thread pool"
                );
                Self::blocking(BLOCKING_THREADS)
            }
        }
    }

    /// Says in an error about a lock who holds it.
    async fn tell_holders(&self, mut error: HostError) -> HostError {
        let Some(locked) = ImageLocked::of(&error.source) else { return error };
        if !locked.holders.is_empty() {
            return error;
        }
        let (conflict, path) = (locked.conflict, error.path.clone());
        let holders = self.pool.call(move || holders(&path)).await.unwrap_or_default();
        let locked = ImageLocked { conflict, holders };
        error.source = io::Error::new(io::ErrorKind::ResourceBusy, locked);
        error
    }

    /// Opens and, where that is wanted, locks; waits a little for a lock that another program may be about to release.
    pub(crate) async fn open(
        &self,
        root: Option<&Root>,
        path: &Path,
        options: &OpenOptions,
    ) -> Result<Arc<dyn Storage>, HostError> {
        if let Some(files) = &self.memory {
            let failed = |source| HostError::whole(path, HostOp::Open, source);
            return files.open(path, options).map_err(failed);
        }
        let attempt = || {
            let (root, path, options) = (root.cloned(), path.to_owned(), options.clone());
            move || Descriptor::open(root.as_ref(), &path, &options)
        };
        let opened = self.pool.call(attempt()).await;
        let failed = |source| Err(HostError::whole(path, HostOp::Open, source));
        let opened = match opened.unwrap_or_else(failed) {
            Err(refused) if is_conflict(&refused) && options.create != Create::New => {
                wait_for_lock(refused, attempt()).await
            }
            opened => opened,
        };
        let descriptor = match opened {
            Ok(descriptor) => descriptor,
            Err(error) => return Err(self.tell_holders(error).await),
        };
        Ok(match &self.rings {
            _ if descriptor.is_in_memory() => Arc::new(InlineStorage::new(descriptor, &self.pool)),
            Some(rings) => rings.attach(descriptor, &self.pool),
            None => self.pool.attach(descriptor),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_refuses_io_uring_gets_the_pool() {
        let refuse = || Err(io::Error::from_raw_os_error(1));
        assert_eq!(Engine::choose(None, refuse).name(), "blocking");
        assert_eq!(Engine::choose(Some("uring"), refuse).name(), "blocking");
    }

    #[test]
    fn the_variable_forces_the_pool_without_trying_a_ring() {
        let engine = Engine::choose(Some("blocking"), || unreachable!("nobody asked for a ring"));
        assert_eq!(engine.name(), "blocking");
    }

    #[test]
    fn a_wish_that_nobody_knows_is_no_wish() {
        let refuse = || Err(io::Error::from_raw_os_error(1));
        assert_eq!(Engine::choose(Some("no such engine"), refuse).name(), "blocking");
        let rings = Engine::uring().map(|engine| engine.name()).unwrap_or("blocking");
        assert_eq!(Engine::choose(Some("no such engine"), Engine::uring).name(), rings);
    }

    #[tokio::test]
    async fn a_file_whose_lock_is_released_in_time_opens() {
        let held = tempfile::NamedTempFile::new().expect("a file");
        crate::lock::lock(&held, false).expect("a lock");
        let (holder, path) = held.into_parts();
        let engine = Engine::blocking(1);
        let options = OpenOptions::writing();
        let mut opening = std::pin::pin!(engine.open(None, &path, &options));
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(opening.as_mut().poll(&mut context).is_pending());
        // The one thread takes things in order: the first try has been refused when this is done.
        engine.pool.call(move || drop(holder)).await.expect("a thread");
        opening.await.map(drop).expect("the holder is gone");
    }
}
