//! What is served: images that are open and the exports that show them, changed all at once or not at all. Who asks for
//! a change is told in `mod`.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::{Context, bail};
use block::{BlockDevice, ByteRange};
use futures_util::future::join_all;
use nbd_server::wire::transmission_flag;
use nbd_server::{Export, Lease, Replaced, Replacement, Server, Window, WriteThrough, partition};
use rustix::fs::Access;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::attendant::Doorkeeper;
use super::errors::text_of;
use super::images::{FileId, ImageKey, Opened, Opening, Sources, folder_of};
use super::made::Made;
use super::options::{AllowReferences, ExportSpec, Writes};
use super::overlay::Overlay;
use super::sealable::Sealable;
use super::waiting::{Waiting, diff};
use super::wanted::{Refused, Use, Wanted, clashes, refuse_meeting, uses};

/// How long an image may take to close that nothing shows any more.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(20);

/// An export that is served.
pub(super) struct Placed {
    spec: ExportSpec,
    /// `None` where there is no image.
    key: Option<ImageKey>,
    /// Where the partition lies that it shows, if it is one.
    partition: Option<ByteRange>,
    export: Export,
}

/// An image that is open.
struct Shown {
    image: Openness,
    writable: bool,
    /// So that what is sealed is not forgotten while it is open.
    _lease: Arc<Lease>,
    /// Exports that are in the table no more and may have connections.
    retired: usize,
}

/// What the right to write is for.
#[derive(Debug, PartialEq, Eq, Hash)]
enum Written {
    File(FileId),
    /// The disks that clients of the export of this name have apart.
    Apart(String),
}

/// Images and exports.
pub(super) struct Catalogue {
    server: Server,
    how: Opening,
    images: HashMap<ImageKey, Shown>,
    placed: BTreeMap<String, Placed>,
    /// As long as an export or an open image has them.
    leases: HashMap<Written, Weak<Lease>>,
    leaving: JoinSet<ImageKey>,
}

/// In which way it is.
enum Openness {
    /// As it is until it is closed.
    Fixed(Opened),
    /// Until it is sealed.
    Sealable(Arc<Sealable>),
    /// Until its image has come.
    Waiting(Arc<Waiting>),
}

impl Shown {
    /// What exports show, and what is closed at the end.
    fn device(&self) -> Arc<dyn BlockDevice> {
        match &self.image {
            Openness::Fixed(opened) => opened.device(),
            Openness::Sealable(sealable) => Arc::clone(sealable) as _,
            Openness::Waiting(waiting) => Arc::clone(waiting) as _,
        }
    }

    fn sealable(&self) -> Option<&Arc<Sealable>> {
        match &self.image {
            Openness::Sealable(sealable) => Some(sealable),
            _ => None,
        }
    }

    fn waiting(&self) -> Option<&Arc<Waiting>> {
        match &self.image {
            Openness::Waiting(waiting) => Some(waiting),
            _ => None,
        }
    }

    async fn sources(&self, spec: &ExportSpec) -> anyhow::Result<Sources> {
        match &self.image {
            Openness::Fixed(opened) => opened.sources(spec).await,
            // They would tell of an image that is closed.
            Openness::Sealable(_) if !spec.bitmaps.is_empty() || spec.allocation_depth => {
                bail!("an image that is sealed while it is served tells neither bitmaps nor layers")
            }
            Openness::Sealable(_) => Ok(Sources::new()),
            Openness::Waiting(_) if !spec.bitmaps.is_empty() || spec.allocation_depth => {
                bail!("a raw image has neither bitmaps nor layers")
            }
            Openness::Waiting(_) => Ok(Sources::new()),
        }
    }
}

impl Catalogue {
    pub(super) fn new(server: Server, how: Opening) -> Self {
        let (images, placed, leases) = (HashMap::new(), BTreeMap::new(), HashMap::new());
        Self { server, how, images, placed, leases, leaving: JoinSet::new() }
    }

    /// Serves what is wanted and nothing else, and with it what changes beside the exports. Where that cannot be,
    /// everything is as it was before.
    ///
    /// An export that is wanted as it is stays as it is, and its image is not opened again, unless another file has
    /// taken its place. Dropping the future leaves images open that `end` closes.
    pub(super) async fn apply(
        &mut self,
        wanted: &[Wanted],
        references: Option<&AllowReferences>,
        beside: impl FnOnce(Replacement) -> Replacement,
    ) -> Result<Replaced, Refused> {
        let mut made = if self.how.only_looks { Made::rehearsed() } else { Made::default() };
        let applied = match self.prepare(wanted, references, &mut made).await {
            Ok(placed) => {
                let exports = placed.values().map(|placed| placed.export.clone());
                self.server
                    .replace(beside(Replacement::of(exports)))
                    .map(|replaced| (placed, replaced))
                    .map_err(|error| Refused::by_server(wanted, error))
            }
            Err(refused) => Err(refused),
        };
        let (placed, mut replaced) = match applied {
            Ok(applied) => applied,
            Err(refused) => {
                // Nobody was told that they are open.
                self.close_idle().await;
                return Err(refused);
            }
        };
        made.keep();
        let before = std::mem::replace(&mut self.placed, placed);
        for retired in std::mem::take(&mut replaced.retired) {
            let Some(key) = before.get(retired.name()).and_then(|placed| placed.key.clone()) else {
                continue;
            };
            if let Some(shown) = self.images.get_mut(&key) {
                shown.retired += 1;
                self.leaving.spawn(async move {
                    retired.unused().await;
                    key
                });
            }
        }
        Ok(replaced)
    }

    /// Waits until the last connection of an export that was removed or changed is gone, and closes its image where
    /// nothing else shows it. Waits for ever where there is none. Nothing is lost where the future is dropped.
    pub(super) async fn settle(&mut self) {
        let Some(left) = self.leaving.join_next().await else {
            return std::future::pending().await;
        };
        if let Ok(key) = left
            && let Some(shown) = self.images.get_mut(&key)
        {
            shown.retired -= 1;
        }
    }

    /// Closes the images that nothing shows, and tells that.
    pub(super) async fn sweep(&mut self) {
        for path in self.close_idle().await {
            tracing::info!(image = %path.display(), "closed an image");
        }
    }

    /// Closes the images that nothing shows; which they were.
    async fn close_idle(&mut self) -> Vec<PathBuf> {
        let is_idle = |(key, shown): (&ImageKey, &Shown)| {
            let used = shown.retired > 0
                || self.placed.values().any(|placed| placed.key.as_ref() == Some(key));
            (!used).then(|| key.clone())
        };
        let idle: Vec<ImageKey> = self.images.iter().filter_map(is_idle).collect();
        let mut closed = Vec::new();
        for key in idle {
            // Still in the map while it is being closed, so that `end` would wait for it.
            let Some(device) = self.images.get(&key).map(Shown::device) else {
                continue;
            };
            match close(key.path(), &*device, CLOSE_TIMEOUT).await {
                Ok(()) => closed.push(key.path().to_owned()),
                Err(error) => tracing::error!("{error}"),
            }
            self.images.remove(&key);
        }
        self.leases.retain(|_, lease| lease.strong_count() > 0);
        closed
    }

    /// Closes every image, each whatever becomes of the others, and all of them within `limit`; what went wrong.
    pub(super) async fn end(self, limit: Duration) -> Vec<String> {
        let closed = self.images.into_iter().map(|(key, shown)| async move {
            close(key.path(), &*shown.device(), limit).await.err()
        });
        let failures = join_all(closed).await.into_iter().flatten();
        failures.map(|error| error.to_string()).collect()
    }

    /// Opens what is not open yet, and makes the exports. Nobody sees them so far.
    ///
    /// # Errors
    /// All that keeps any of them from being served.
    pub(super) async fn prepare(
        &mut self,
        wanted: &[Wanted],
        references: Option<&AllowReferences>,
        made: &mut Made,
    ) -> Result<BTreeMap<String, Placed>, Refused> {
        let references = references.or(self.how.references.as_ref()).cloned();
        let how = Opening { references, ..self.how.clone() };
        let (mut found, mut refused) = (Vec::new(), Vec::new());
        for one in wanted {
            if let Err(error) = refuse_meeting(one, wanted) {
                refused.push(error);
                continue;
            }
            match self.find(&one.spec, &how, made).await {
                Ok(key) => found.push((one, key)),
                Err(error) => refused.push(one.blame(error)),
            }
        }
        refused.extend(clashes(&found));
        let uses = uses(&found);
        let mut placed = BTreeMap::new();
        for (one, key) in found {
            let used = key.as_ref().and_then(|key| uses.get(key.file())).copied();
            match self.export(&one.spec, key.as_ref(), used.unwrap_or_default()).await {
                Ok((export, partition)) => {
                    let next = Placed { spec: one.spec.clone(), key, partition, export };
                    placed.insert(one.spec.name.clone(), next);
                }
                Err(error) => refused.push(one.blame(error)),
            }
        }
        if refused.is_empty() { Ok(placed) } else { Err(Refused(refused)) }
    }

    /// Finds the image of an export, or what stands for it until it has come, and makes it where that is to be done; `None`
    /// for one that has none. It is looked for on a thread that may block.
    async fn find(
        &self,
        spec: &ExportSpec,
        how: &Opening,
        made: &mut Made,
    ) -> anyhow::Result<Option<ImageKey>> {
        if let Some(key) = self.awaited(spec) {
            return Ok(Some(key));
        }
        if spec.writes == Writes::Temporary {
            return Ok(None);
        }
        if spec.waits {
            self.refuse_served(spec)?;
            return diff::find(spec, how, made).await;
        }
        let nameless = made.make(spec).await?;
        let (spec, how) = (spec.clone(), how.clone());
        let find = move || {
            let key = ImageKey::of(&spec, nameless, &how)?;
            diff::refuse_beside(&spec, &key)?;
            Ok(Some(key))
        };
        tokio::task::spawn_blocking(find).await?
    }

    /// What an export shows that waits for its image, or whose image has come, and shall be served as any other.
    fn awaited(&self, spec: &ExportSpec) -> Option<ImageKey> {
        let placed = self.placed.get(&spec.name).filter(|placed| placed.spec.path == spec.path)?;
        let key = placed.key.as_ref()?;
        let waiting = self.images.get(key)?.waiting()?;
        let is_same = match spec.waits {
            true => spec.diff_folder == placed.spec.diff_folder,
            false => waiting.has_come() && spec.is_raw() && !spec.joins,
        };
        is_same.then(|| key.clone())
    }

    /// Refuses to wait for an image that is open.
    fn refuse_served(&self, spec: &ExportSpec) -> anyhow::Result<()> {
        let Ok(path) = std::fs::canonicalize(&spec.path) else { return Ok(()) };
        if self.images.keys().any(|key| key.path() == path) {
            bail!(
                "the image is open, so that there is nothing to wait for: leave out waitfile, or remove the export, reload, \
                 and add it again"
            );
        }
        Ok(())
    }

    /// Merges what was written into the images of exports that wait, and shows these from then on. Where that cannot be,
    /// the export goes on waiting.
    pub(super) async fn merge(&self) {
        let placed = self.placed.values().filter_map(|placed| {
            let shown = self.images.get(placed.key.as_ref()?)?;
            let waiting = shown.waiting().filter(|waiting| !waiting.has_come())?;
            Some((&placed.spec, waiting))
        });
        let mut waits = false;
        for (spec, waiting) in placed {
            waits = true;
            let (export, image) = (&spec.name, spec.path.display());
            match waiting.merge(&self.how).await {
                Ok(bytes) => tracing::info!(
                    export, %image, bytes,
                    "the image has come, with what was written merged into it: it is served"
                ),
                Err(error) => tracing::error!(
                    "{}; the export {export:?} goes on waiting for its image, until SIGUSR1 tells again that it is whole",
                    text_of(&error)
                ),
            }
        }
        if !waits {
            tracing::warn!("SIGUSR1 has no effect: no export waits for its image");
        }
    }

    /// An image that nothing shows any more, and that is to be closed.
    #[cfg(test)]
    pub(super) fn leave(&mut self, key: ImageKey, device: Arc<dyn BlockDevice>) {
        let image = Openness::Fixed(Opened::of(device));
        let shown = Shown { image, writable: true, _lease: Lease::new(), retired: 1 };
        self.images.insert(key.clone(), shown);
        self.leaving.spawn(async move { key });
    }

    /// The right to write to something: there is one, whatever becomes of exports.
    fn lease(&mut self, written: Written) -> Arc<Lease> {
        if let Some(lease) = self.leases.get(&written).and_then(Weak::upgrade) {
            return lease;
        }
        let lease = Lease::new();
        self.leases.insert(written, Arc::downgrade(&lease));
        lease
    }

    /// The export as it is served, or else a new one; and where its partition lies.
    async fn export(
        &mut self,
        spec: &ExportSpec,
        key: Option<&ImageKey>,
        used: Use,
    ) -> anyhow::Result<(Export, Option<ByteRange>)> {
        if let Some(known) = self.placed.get(&spec.name)
            && known.spec == *spec
            && known.key.as_ref() == key
            && known.partition == self.partition(spec, key).await?
        {
            return Ok((known.export.clone(), known.partition));
        }
        match key {
            Some(key) => {
                self.refuse_regrouped(spec, key, used)?;
                self.export_of(spec, key, used).await
            }
            // It has none, or is looked at where what would be its image is not made.
            None => {
                let folder = if spec.waits { diff::folder_of(spec) } else { folder_of(&spec.path) };
                let disk = Overlay::empty(spec.size.unwrap_or(0), folder);
                Ok((self.apart(spec, disk, folder)?, None))
            }
        }
    }

    /// Refuses files of an export that has some of them open for writing, joined with others: the locks are its own.
    fn refuse_regrouped(&self, spec: &ExportSpec, key: &ImageKey, used: Use) -> anyhow::Result<()> {
        let old = self.placed.get(&spec.name).and_then(|known| known.key.as_ref());
        let old = old.filter(|old| old.file() != key.file() && old.file().overlaps(key.file()));
        let is_written = |old| self.images.get(old).is_some_and(|shown| shown.writable);
        if old.is_some_and(|old| used.writable || is_written(old)) {
            bail!(
                "other files are joined than those that it has open: remove the export, reload, and add it again"
            );
        }
        Ok(())
    }

    /// Where the partition of an export lies by now, in an image that is open.
    async fn partition(
        &self,
        spec: &ExportSpec,
        key: Option<&ImageKey>,
    ) -> anyhow::Result<Option<ByteRange>> {
        match (spec.partition, key.and_then(|key| self.images.get(key))) {
            (Some(number), Some(shown)) => {
                Ok(Some(partition::find(&*shown.device(), number).await?))
            }
            _ => Ok(None),
        }
    }

    /// Makes an export of which each client gets a disk of its own, kept in a folder.
    fn apart(
        &mut self,
        spec: &ExportSpec,
        disk: Arc<Overlay>,
        folder: &Path,
    ) -> anyhow::Result<Export> {
        let usable = rustix::fs::access(folder, Access::WRITE_OK | Access::EXEC_OK);
        usable.with_context(|| {
            format!("cannot keep what clients write in the folder {}", folder.display())
        })?;
        let lease = self.lease(Written::Apart(spec.name.clone()));
        let all = ByteRange::between(0, disk.limits().size_bytes);
        Ok(shape(spec, disk.clone(), Some(disk), None).lease(lease, all))
    }

    /// Makes an export over its image.
    async fn export_of(
        &mut self,
        spec: &ExportSpec,
        key: &ImageKey,
        used: Use,
    ) -> anyhow::Result<(Export, Option<ByteRange>)> {
        let lease = self.lease(Written::File(key.file().clone()));
        let shown = self.shown(spec, key, used, &lease).await?;
        let sources = shown.sources(spec).await?;
        let sealable = shown.sealable().filter(|_| spec.seals).cloned();
        let (device, range) = part(shown.device(), spec).await?;
        let mut export = match &spec.writes {
            Writes::Apart { folder } if !spec.read_only => {
                let folder = folder.as_deref().unwrap_or_else(|| folder_of(&spec.path));
                self.apart(spec, Overlay::over(device, folder), folder)?
            }
            _ => shape(spec, device, None, sealable).lease(lease, range),
        };
        for (name, source) in sources {
            export = export.context(name, source);
        }
        Ok((export, spec.partition.map(|_| range)))
    }

    /// The image of an export, which is opened where it is not. What is sealed is open for reading alone.
    async fn shown(
        &mut self,
        spec: &ExportSpec,
        key: &ImageKey,
        used: Use,
        lease: &Arc<Lease>,
    ) -> anyhow::Result<&Shown> {
        let writable = used.writable && !lease.is_sealed();
        match self.images.get(key) {
            Some(shown) if shown.writable || !writable => {}
            Some(_) => bail!(
                "the image is served read-only and would have to be opened again for writing: remove all its exports, \
                 reload, and add them again; until then, nothing of the configuration is taken"
            ),
            None => {
                let image = if spec.waits {
                    Openness::Waiting(Waiting::open(spec, key, &self.how).await?)
                } else if used.seals && writable {
                    Openness::Sealable(Sealable::open(key, &self.how).await?)
                } else {
                    Openness::Fixed(Opened::open(key, writable, &self.how).await?)
                };
                let _lease = Arc::clone(lease);
                let shown = Shown { image, writable, _lease, retired: 0 };
                self.images.insert(key.clone(), shown);
            }
        }
        let shown = self.images.get(key).context("the image is gone")?;
        if spec.waits && spec.size != Some(shown.device().limits().size_bytes) {
            bail!("filesize stays as it is while the image is waited for or served");
        }
        if spec.seals && shown.sealable().is_none() && !lease.is_sealed() {
            bail!(
                "the image is open already, and not so that it can be sealed: remove its exports, reload, and add them"
            );
        }
        Ok(shown)
    }
}

/// The export of a device; clients work on fresh copies of `overlay` where there is one.
fn shape(
    spec: &ExportSpec,
    device: Arc<dyn BlockDevice>,
    overlay: Option<Arc<Overlay>>,
    sealable: Option<Arc<Sealable>>,
) -> Export {
    let alone = if overlay.is_some() { transmission_flag::CAN_MULTI_CONN } else { 0 };
    let mut export = Export::new(&spec.name, device)
        .description(spec.description.clone().unwrap_or_default())
        .read_only(spec.is_read_only())
        .default_export(spec.is_default)
        .admission(spec.admission.clone())
        .tls_only(spec.tls_only)
        .writers(spec.writers)
        .seal_on_disconnect(spec.seals)
        .rotational(spec.rotational)
        .withhold(spec.withheld | alone);
    if let Some(bytes) = spec.preferred_bytes {
        export = export.preferred_bytes(bytes);
    }
    if let Some(connections) = spec.max_connections {
        export = export.max_connections(connections);
    }
    if let Some(limit) = spec.idle_timeout {
        export = export.idle_timeout(limit);
    }
    if !spec.clients.is_empty() {
        export = export.clients(spec.clients.iter().cloned());
    }
    match Doorkeeper::new(spec, overlay, sealable) {
        Some(doorkeeper) => export.attendant(doorkeeper),
        None => export,
    }
}

/// The part of an image that an export shows, and where it lies.
async fn part(
    image: Arc<dyn BlockDevice>,
    spec: &ExportSpec,
) -> anyhow::Result<(Arc<dyn BlockDevice>, ByteRange)> {
    let size_bytes = image.limits().size_bytes;
    let all = ByteRange::between(0, size_bytes);
    let range = if let Some(number) = spec.partition {
        partition::find(&*image, number).await?
    } else {
        let size = spec.size.unwrap_or(size_bytes.saturating_sub(spec.offset));
        ByteRange::new(spec.offset, size).context("offset and size are too large")?
    };
    let mut device = image;
    if range != all {
        device = Window::new(device, range)?;
    }
    if spec.durable {
        device = WriteThrough::new(device);
    }
    Ok((device, range))
}

async fn close(path: &Path, device: &dyn BlockDevice, limit: Duration) -> anyhow::Result<()> {
    match timeout(limit, device.close()).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => bail!("cannot close {}: {error}", path.display()),
        Err(_) => bail!("closing {} took too long", path.display()),
    }
}
