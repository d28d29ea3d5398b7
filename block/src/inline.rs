//! Files of file systems that live in memory: an operation there is a copy, which is done sooner than handed to another
//! thread, so whoever asks makes the system call. What takes longer than a copy of some megabytes goes to the thread pool.

use std::io;
use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::CopySource;
use crate::blocking::BlockingEngine;
use crate::copy::Origin;
use crate::descriptor::Descriptor;
use crate::storage::{Op, Request, Storage, StorageFacts};

/// The most that is read or written on the thread of whoever asks, in bytes.
const INLINE_BYTES: u64 = 4 << 20;

/// Where a file system has so much more room than is asked for, in bytes, none is reserved: blocks in memory are as good
/// one by one, and whoever finds the last of them gone is told so.
const AMPLE_BYTES: u64 = 1 << 30;

/// A file in memory.
pub(crate) struct InlineStorage {
    descriptor: Arc<Descriptor>,
    pool: Arc<BlockingEngine>,
}

impl InlineStorage {
    pub(crate) fn new(descriptor: Descriptor, pool: &Arc<BlockingEngine>) -> Self {
        Self { descriptor: Arc::new(descriptor), pool: Arc::clone(pool) }
    }
}

impl Storage for InlineStorage {
    fn submit(&self, request: Request) {
        match request.op {
            Op::Read { .. } | Op::Write { .. } | Op::Sync
                if request.op.range().len() <= INLINE_BYTES =>
            {
                let (op, finish) = request.into_parts();
                finish.complete(self.descriptor.execute(op));
            }
            _ => self.pool.submit(Arc::clone(&self.descriptor), request),
        }
    }

    fn facts(&self) -> StorageFacts {
        self.descriptor.facts
    }

    fn has_ample_room(&self, bytes: u64) -> bool {
        let needed = bytes.saturating_add(AMPLE_BYTES);
        self.descriptor.room().is_ok_and(|room| room >= needed)
    }

    fn len(&self) -> io::Result<u64> {
        self.descriptor.len()
    }

    fn slots(&self) -> &Arc<Semaphore> {
        self.pool.slots()
    }

    fn copy_source(&self) -> Option<CopySource> {
        Some(CopySource(Origin::File(Arc::clone(&self.descriptor))))
    }
}
