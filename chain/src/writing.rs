//! Which layers this process is writing, so that no directory is removed under a layer that is about to appear in it.
//! Knows names only; the files are `repository`'s.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use crate::layout::LayerPath;

/// The layers that are being written, each with its parent.
#[derive(Debug, Default)]
pub(crate) struct Writing {
    layers: Mutex<HashMap<LayerPath, Option<LayerPath>>>,
}

/// One layer being written, until dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    writing: Arc<Writing>,
    path: LayerPath,
}

/// Nothing can be reserved while this lives.
pub(crate) struct Standstill<'a> {
    layers: MutexGuard<'a, HashMap<LayerPath, Option<LayerPath>>>,
}

impl Writing {
    /// Reserves `path`; `None` where somebody else has it.
    pub(crate) fn reserve(
        self: &Arc<Self>,
        path: &LayerPath,
        parent: Option<&LayerPath>,
    ) -> Option<Reservation> {
        let mut layers = self.layers.lock();
        if layers.contains_key(path) {
            return None;
        }
        layers.insert(path.clone(), parent.cloned());
        Some(Reservation { writing: self.clone(), path: path.clone() })
    }

    /// Whether `path` is being written.
    pub(crate) fn contains(&self, path: &LayerPath) -> bool {
        self.layers.lock().contains_key(path)
    }

    /// Keeps new layers from being reserved. For short work that blocks, never across an await.
    pub(crate) fn standstill(&self) -> Standstill<'_> {
        Standstill { layers: self.layers.lock() }
    }
}

impl Standstill<'_> {
    /// Whether `path` is being written.
    pub(crate) fn contains(&self, path: &LayerPath) -> bool {
        self.layers.contains_key(path)
    }

    /// The layer that is being written on `path`.
    pub(crate) fn child_of(&self, path: &LayerPath) -> Option<&LayerPath> {
        let on_it = self.layers.iter().find(|(_, parent)| parent.as_ref() == Some(path));
        on_it.map(|(child, _)| child)
    }

    /// Whether a layer is being written in the disk directory of `path`.
    pub(crate) fn disk_directory_in_use(&self, path: &LayerPath) -> bool {
        self.layers.keys().any(|layer| layer.parent() == path.parent())
    }

    /// Whether a layer is being written in the context directory of `path`.
    pub(crate) fn context_directory_in_use(&self, path: &LayerPath) -> bool {
        self.layers.keys().any(|layer| layer.context_directory() == path.context_directory())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.writing.layers.lock().remove(&self.path);
    }
}
