//! Which engine carries out the I/O of this process: chosen once, at first use. What an operation is, and what
//! alignment it needs, is not decided here.

use std::path::Path;
use std::sync::{Arc, LazyLock};

use crate::blocking::{BLOCKING_THREADS, BlockingEngine};
use crate::descriptor::Descriptor;
use crate::storage::Storage;
use crate::{HostError, HostOp, OpenOptions};

/// The environment variable that forces an engine: `blocking` or `uring`.
pub const ENGINE_VARIABLE: &str = "SENDENSE_IO";

/// What carries out operations on host files. Clones are the same engine.
#[derive(Clone, Debug)]
pub struct Engine {
    pool: Arc<BlockingEngine>,
}

impl Engine {
    /// The engine of this process, set up at the first call.
    pub fn shared() -> &'static Self {
        static SHARED: LazyLock<Engine> = LazyLock::new(|| Engine::blocking(BLOCKING_THREADS));
        &SHARED
    }

    /// A pool of up to `threads` threads that make blocking calls.
    pub fn blocking(threads: usize) -> Self {
        Self { pool: BlockingEngine::new(threads) }
    }

    /// What it is, for logs and benchmarks.
    pub fn name(&self) -> &'static str {
        "blocking"
    }

    pub(crate) async fn open(
        &self,
        path: &Path,
        options: &OpenOptions,
    ) -> Result<Arc<dyn Storage>, HostError> {
        let (owned, options) = (path.to_owned(), options.clone());
        let descriptor = self.pool.call(move || Descriptor::open(&owned, &options)).await;
        let descriptor =
            descriptor.map_err(|source| HostError::whole(path, HostOp::Open, source))?;
        Ok(self.pool.attach(descriptor))
    }
}
