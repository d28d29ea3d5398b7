//! Replacing the table of exports while clients use it: all of the new table or nothing. Opening and closing images is
//! the caller's.

use std::collections::BTreeMap;
use std::sync::Arc;

use block::BlockDevice;

use crate::admission::Admission;
use crate::export::{Export, ExportError, Removal, Served};
use crate::gauge::Gauge;
use crate::server::{Server, Table};
use crate::signal::Signal;
#[cfg(feature = "tls")]
use crate::tls::ServerTls;

/// Exports that are to be the table, and what is to change with them. What is not said stays.
#[derive(Debug)]
pub struct Replacement {
    exports: Vec<Export>,
    removal: Removal,
    more: Beside,
}

/// What changes together with a table.
#[derive(Debug, Default)]
pub(crate) struct Beside {
    pub(crate) admission: Option<Admission>,
    pub(crate) listing: Option<bool>,
    #[cfg(feature = "tls")]
    pub(crate) tls: Option<ServerTls>,
}

impl Replacement {
    /// These exports alone; connections of those that go are left to go on.
    pub fn of(exports: impl IntoIterator<Item = Export>) -> Self {
        let exports = exports.into_iter().collect();
        Self { exports, removal: Removal::Drain, more: Beside::default() }
    }

    /// What becomes of connections of exports that are removed.
    #[must_use]
    pub fn removal(mut self, how: Removal) -> Self {
        self.removal = how;
        self
    }

    /// As [`Server::set_admission`].
    #[must_use]
    pub fn admission(mut self, admission: Admission) -> Self {
        self.more.admission = Some(admission);
        self
    }

    /// As [`Server::set_listing`].
    #[must_use]
    pub fn listing(mut self, listing: bool) -> Self {
        self.more.listing = Some(listing);
        self
    }

    /// As [`Server::replace_tls`].
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn tls(mut self, tls: ServerTls) -> Self {
        self.more.tls = Some(tls);
        self
    }
}

/// What [`Server::replace_exports`] changed, by the names of exports.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Replaced {
    /// Exports that are new.
    pub added: Vec<String>,
    /// Exports that are another thing for new connections. Connections that were open go on as before.
    pub changed: Vec<String>,
    /// Exports that are gone.
    pub removed: Vec<String>,
    /// Exports that are as they were, with their connections and counters.
    pub kept: Vec<String>,
    /// Whether another export is the default one.
    pub default_changed: bool,
    /// What was taken out of the table, for each export that was removed or changed.
    pub retired: Vec<Retired>,
}

impl Replaced {
    /// Whether anything is other than before.
    pub fn is_empty(&self) -> bool {
        self.retired.is_empty() && self.added.is_empty() && !self.default_changed
    }
}

/// An export that is in the table no more and may still have connections.
pub struct Retired {
    name: String,
    device: Arc<dyn BlockDevice>,
    closing: Signal,
    connections: Arc<Gauge>,
}

impl std::fmt::Debug for Retired {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Retired").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Retired {
    fn of(served: &Served) -> Self {
        Self {
            name: served.facts.name.clone(),
            device: Arc::clone(&served.device),
            closing: served.closing.clone(),
            connections: Arc::clone(&served.connections),
        }
    }

    /// The name it had.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its device.
    pub fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.device
    }

    /// How many connections hold it.
    pub fn connections(&self) -> usize {
        self.connections.count()
    }

    /// Closes the connections that it still has itself, as [`Removal::Cut`] does.
    pub fn cut(&self) {
        self.closing.raise();
    }

    /// Waits until no connection and no request uses it. Its device can be closed then, unless another export has it,
    /// too.
    pub async fn unused(&self) {
        self.connections.idle().await;
    }
}

impl Server {
    /// Makes `exports` the table, at one stroke: a client sees the old table or the new one. Where the table cannot be
    /// had, for instance because two exports have one name, nothing changes.
    ///
    /// An export is kept, its connections and counters untouched, where one of the same name has the same device, the
    /// same sources of contexts (the very same [`Arc`]s) and equal properties. One that differs is changed: new clients
    /// get the new export, open connections stay with the old one. `how` says what becomes of connections of exports
    /// that are removed. The right to write stays with what is written, see [`Lease`](crate::Lease): whoever has it
    /// keeps it under another name, too.
    ///
    /// Devices are never closed here: [`Replaced::retired`] tells when those that left are unused.
    ///
    /// # Errors
    /// [`ExportError`].
    pub fn replace_exports(
        &self,
        exports: impl IntoIterator<Item = Export>,
        how: Removal,
    ) -> Result<Replaced, ExportError> {
        self.replace(Replacement::of(exports).removal(how))
    }

    /// [`Server::replace_exports`], together with what else takes another place: all at one stroke or nothing. A client that
    /// finds an export of the new table is judged by the new rules.
    ///
    /// # Errors
    /// [`ExportError`].
    pub fn replace(&self, replacement: Replacement) -> Result<Replaced, ExportError> {
        let next = self.table_of(replacement.exports)?;
        self.exchange(next, replacement.removal, replacement.more)
    }

    fn table_of(&self, exports: impl IntoIterator<Item = Export>) -> Result<Table, ExportError> {
        let mut next = Table::default();
        for export in exports {
            next.insert(self.served(export)?)?;
        }
        Ok(next)
    }
}

/// Merges what stays of `old` into `next`, and tells the difference.
pub(crate) fn settle(old: &BTreeMap<String, Arc<Served>>, next: &mut Table) -> Replaced {
    let mut replaced = Replaced::default();
    for (name, served) in &mut next.exports {
        match old.get(name) {
            None => replaced.added.push(name.clone()),
            Some(known) if known.is_like(served) => {
                *served = Arc::clone(known);
                replaced.kept.push(name.clone());
            }
            Some(known) => {
                // Nobody else has it yet.
                if let Some(served) = Arc::get_mut(served) {
                    served.succeed(known);
                }
                replaced.changed.push(name.clone());
                replaced.retired.push(Retired::of(known));
            }
        }
    }
    for (name, served) in old {
        if !next.exports.contains_key(name) {
            replaced.removed.push(name.clone());
            replaced.retired.push(Retired::of(served));
        }
    }
    replaced
}
