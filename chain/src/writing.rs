//! Which layers this process is writing, so that no directory is removed under a layer that is about to appear in it.
//! Knows names only; the files are `repository`'s.

use std::collections::HashSet;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use crate::layout::LayerPath;

/// The layers that are being written.
#[derive(Debug, Default)]
pub(crate) struct Writing {
    layers: Mutex<HashSet<LayerPath>>,
}

/// One layer being written, until dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    writing: Arc<Writing>,
    path: LayerPath,
}

/// Nothing can be reserved while this lives.
pub(crate) struct Standstill<'a> {
    layers: MutexGuard<'a, HashSet<LayerPath>>,
}

impl Writing {
    /// Reserves `path`; `None` where somebody else has it.
    pub(crate) fn reserve(self: &Arc<Self>, path: &LayerPath) -> Option<Reservation> {
        let new = self.layers.lock().insert(path.clone());
        new.then(|| Reservation { writing: self.clone(), path: path.clone() })
    }

    /// Whether `path` is being written.
    pub(crate) fn contains(&self, path: &LayerPath) -> bool {
        self.layers.lock().contains(path)
    }

    /// Keeps new layers from being reserved. For short work that blocks, never across an await.
    pub(crate) fn standstill(&self) -> Standstill<'_> {
        Standstill { layers: self.layers.lock() }
    }
}

impl Standstill<'_> {
    /// Whether `path` is being written.
    pub(crate) fn contains(&self, path: &LayerPath) -> bool {
        self.layers.contains(path)
    }

    /// Whether a layer is being written in the disk directory of `path`.
    pub(crate) fn disk_directory_in_use(&self, path: &LayerPath) -> bool {
        self.layers.iter().any(|layer| layer.parent() == path.parent())
    }

    /// Whether a layer is being written in the context directory of `path`.
    pub(crate) fn context_directory_in_use(&self, path: &LayerPath) -> bool {
        self.layers.iter().any(|layer| layer.context_directory() == path.context_directory())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.writing.layers.lock().remove(&self.path);
    }
}
