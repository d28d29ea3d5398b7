//! A repository on a local file system: opening it, planning in it, looking at it, and removing what was never
//! finished. How layers come to be is in `seal`, how points are read in `point`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::SignedDuration;

use crate::durable::{Directory, temporary_name};
use crate::error::{Error, FileOp};
use crate::layout::{LayerPath, is_layer_name};
use crate::lease::Lease;
use crate::manifest::Manifest;
use crate::plan::{LayerPlan, LayerRef, LayerRequest};
use crate::storage::Storage;
use crate::verify::{Look, Sealed, chain, disk_directory, is_cut_short, read_manifest};
use crate::walk::{Found, walk};
use crate::writing::Writing;

/// How many seconds [`Repository::plan_unused_layer`] moves a name forward at most.
const MAX_SECONDS_AHEAD: u32 = 120;

/// A repository. Cheap to clone; the lease ends with the last clone and the last layer that is being written.
#[derive(Clone, Debug)]
pub struct Repository {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    /// Absolute and without links, as it was when the repository was opened.
    root: PathBuf,
    /// As the operator spells it.
    given: PathBuf,
    pub(crate) directory: Directory,
    lease: Option<Lease>,
    pub(crate) writing: Arc<Writing>,
}

impl Repository {
    /// Opens the repository in `root` for one hub: takes the lease, which also shows that the directory can be written.
    ///
    /// # Errors
    /// [`Error::Leased`] if another hub has it; [`Error::Host`] if `root` is no directory or cannot be written.
    pub async fn open(root: &Path) -> Result<Self, Error> {
        let given = root.to_path_buf();
        blocking(move || {
            let repository = Self::at(given)?;
            let lease = Lease::take(&repository.directory)?;
            Ok(Self { inner: Arc::new(Inner { lease: Some(lease), ..repository }) })
        })
        .await
    }

    /// Opens the repository in `root` for looking and reading only, beside the hub that works there.
    ///
    /// # Errors
    /// [`Error::Host`] if `root` is no directory or cannot be read.
    pub async fn open_for_reading(root: &Path) -> Result<Self, Error> {
        let given = root.to_path_buf();
        blocking(move || Ok(Self { inner: Arc::new(Self::at(given)?) })).await
    }

    fn at(given: PathBuf) -> Result<Inner, Error> {
        let root = given.canonicalize().map_err(|error| FileOp::Open.failed(&given, error))?;
        let directory = Directory::open(&root)?;
        Ok(Inner { root, given, directory, lease: None, writing: Arc::default() })
    }

    /// The root, absolute and without links.
    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    /// Kind, size and free space of the file system, now.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub async fn storage(&self) -> Result<Storage, Error> {
        self.with(|inner| Storage::of(&inner.directory)).await
    }

    /// Decides the names of a new layer. Pure.
    ///
    /// # Errors
    /// As [`LayerPlan::new`].
    pub fn plan_layer(&self, request: &LayerRequest<'_>) -> Result<LayerPlan, Error> {
        LayerPlan::new(request)
    }

    /// As [`Repository::plan_layer`], but where a layer of that second is there already, the next free second is taken,
    /// up to two minutes ahead: two quick backups, or a clock that was set back, need not fail for a name.
    ///
    /// # Errors
    /// As [`LayerPlan::new`]; [`Error::Exists`] if no second is free; [`Error::Host`].
    pub async fn plan_unused_layer(&self, request: &LayerRequest<'_>) -> Result<LayerPlan, Error> {
        let mut request = request.clone();
        let mut tries = 0;
        loop {
            let plan = LayerPlan::new(&request)?;
            let path = plan.path.clone();
            match self.with(move |inner| inner.check_unused(&path)).await {
                Ok(()) => return Ok(plan),
                Err(error @ (Error::Exists { .. } | Error::InUse { .. })) => {
                    tries += 1;
                    let next = request.timestamp.checked_add(SignedDuration::from_secs(1));
                    match next {
                        Ok(next) if tries <= MAX_SECONDS_AHEAD => request.timestamp = next,
                        _ => return Err(error),
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The path of a layer below the root, from such a path or from an absolute one.
    ///
    /// # Errors
    /// [`Error::Path`] with the rule that it breaks.
    pub fn locate(&self, layer: &Path) -> Result<LayerPath, Error> {
        let relative = [&self.inner.root, &self.inner.given]
            .into_iter()
            .filter(|root| root.is_absolute())
            .find_map(|root| layer.strip_prefix(root).ok())
            .unwrap_or(layer);
        LayerPath::parse(relative).map_err(|rule| Error::Path { path: layer.to_path_buf(), rule })
    }

    /// What a child has to know of a sealed layer. The layers below are looked at when the child is created.
    ///
    /// # Errors
    /// [`Error::NotSealed`], [`Error::Manifest`], [`Error::Path`], [`Error::Host`].
    pub async fn layer_ref(&self, layer: &Path) -> Result<LayerRef, Error> {
        let path = self.locate(layer)?;
        let manifest = self.manifest(&path).await?;
        Ok(LayerRef::new(path, &manifest))
    }

    /// The manifest of a sealed layer.
    ///
    /// # Errors
    /// As [`Repository::layer_ref`].
    pub async fn manifest(&self, layer: &Path) -> Result<Manifest, Error> {
        let path = self.locate(layer)?;
        self.with(move |inner| {
            let manifest = match disk_directory(&inner.directory, &path)? {
                Some(directory) => read_manifest(&directory, path.file_name())?,
                None => None,
            };
            manifest.ok_or_else(|| Error::NotSealed { file: inner.root.join(&path) })
        })
        .await
    }

    /// Every layer of the repository with its state, sorted by path.
    ///
    /// # Errors
    /// [`Error::Host`], [`Error::TooMany`]. A broken layer is an answer, not an error.
    pub async fn layers(&self) -> Result<Vec<Found>, Error> {
        self.with(|inner| walk(&inner.directory, &inner.writing)).await
    }

    /// The manifests from the full up to `layer`, each compared with its file and with the one below.
    ///
    /// # Errors
    /// Of the first layer, from the top, that cannot be used: [`Error::NotSealed`], [`Error::Manifest`],
    /// [`Error::Layer`], [`Error::Path`]; [`Error::Host`].
    pub async fn chain_of(&self, layer: &Path) -> Result<Vec<Manifest>, Error> {
        let sealed = self.sealed_chain(layer).await?;
        Ok(sealed.into_iter().map(|layer| layer.manifest).collect())
    }

    pub(crate) async fn sealed_chain(&self, layer: &Path) -> Result<Vec<Sealed>, Error> {
        let path = self.locate(layer)?;
        self.with(move |inner| chain(&inner.directory, &path, Look::Fingerprint)).await
    }

    /// Removes a layer that was never sealed, with what else was left of it, and the directories that get empty.
    /// A layer that is not there is fine.
    ///
    /// A manifest that ends early does not count as one: the layer is not usable either way. Any other damage to a
    /// manifest keeps the layer.
    ///
    /// # Errors
    /// [`Error::Sealed`], [`Error::Manifest`] for a layer that has a manifest; [`Error::HasChild`] for one that must
    /// have had one; [`Error::InUse`]; [`Error::Path`]; [`Error::ReadOnly`]; [`Error::Host`].
    pub async fn discard_layer(&self, layer: &Path) -> Result<(), Error> {
        self.check_writable()?;
        let path = self.locate(layer)?;
        self.with(move |inner| inner.remove(&path, Removal::Unsealed)).await
    }

    /// Removes a layer, sealed or not, on which nothing stands: what a job made that was never completed, or the newest
    /// point of a chain. A layer that is not there is fine.
    ///
    /// The manifest goes first, so that a crash in between leaves an unsealed layer. Whether the layer is still wanted
    /// is not known here, only that no other needs it; a damaged manifest is no obstacle.
    ///
    /// # Errors
    /// [`Error::HasChild`] if a sealed layer, or one that is being written, stands on it; [`Error::InUse`];
    /// [`Error::Path`]; [`Error::ReadOnly`]; [`Error::Host`].
    pub async fn remove_layer(&self, layer: &Path) -> Result<(), Error> {
        self.check_writable()?;
        let path = self.locate(layer)?;
        self.with(move |inner| inner.remove(&path, Removal::Any)).await
    }

    pub(crate) fn check_writable(&self) -> Result<(), Error> {
        match self.inner.lease {
            Some(_) => Ok(()),
            None => Err(Error::ReadOnly { root: self.inner.root.clone() }),
        }
    }

    /// Runs file operations where they may block.
    pub(crate) async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let inner = self.inner.clone();
        blocking(move || work(&inner)).await
    }
}

impl Inner {
    /// Where `path` lies on the host.
    pub(crate) fn host_path(&self, path: &LayerPath) -> PathBuf {
        self.root.join(path)
    }

    /// Refuses a path where anything lies, or will lie soon.
    pub(crate) fn check_unused(&self, path: &LayerPath) -> Result<(), Error> {
        if self.writing.contains(path) {
            return Err(Error::InUse { file: self.host_path(path) });
        }
        self.check_absent(path)
    }

    /// Refuses a path where a layer or a manifest lies.
    pub(crate) fn check_absent(&self, path: &LayerPath) -> Result<(), Error> {
        let Some(directory) = disk_directory(&self.directory, path)? else { return Ok(()) };
        for name in [path.file_name(), &path.manifest_name()] {
            if directory.kind_of(name)?.is_some() {
                return Err(Error::Exists { file: directory.path().join(name) });
            }
        }
        Ok(())
    }

    /// Removes a layer and what gets empty by that.
    fn remove(&self, path: &LayerPath, removal: Removal) -> Result<(), Error> {
        // Held to the end, so that no layer appears in a directory, or on a parent, that is about to go.
        let standstill = self.writing.standstill();
        let file = self.host_path(path);
        if standstill.contains(path) {
            return Err(Error::InUse { file });
        }
        if let Some(child) = standstill.child_of(path) {
            return Err(Error::HasChild { file, child: child.file_name().to_owned() });
        }
        let Some(context) = self.directory.child(path.context_directory())? else { return Ok(()) };
        if let Some(disk) = context.child(path.disk_directory())? {
            if removal == Removal::Unsealed {
                check_unsealed(&disk, path)?;
            }
            if let Some(child) = child_of(&disk, path.file_name())? {
                return Err(Error::HasChild { file, child });
            }
            remove_files(&disk, path)?;
        }
        if !standstill.disk_directory_in_use(path) {
            context.remove_empty_child(path.disk_directory())?;
            context.sync()?;
        }
        if !standstill.context_directory_in_use(path) {
            self.directory.remove_empty_child(path.context_directory())?;
            self.directory.sync()?;
        }
        Ok(())
    }
}

/// Which layers may be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Removal {
    /// Those that were never finished.
    Unsealed,
    /// Those too that were.
    Any,
}

/// Refuses a layer with a manifest, unless that was cut short.
fn check_unsealed(disk: &Directory, path: &LayerPath) -> Result<(), Error> {
    match read_manifest(disk, path.file_name()) {
        Ok(None) => Ok(()),
        Ok(Some(_)) => Err(Error::Sealed { file: disk.path().join(path.file_name()) }),
        Err(error) if is_cut_short(&error) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Removes the files of a layer, the manifest durably first: no manifest is ever left without its layer.
fn remove_files(disk: &Directory, path: &LayerPath) -> Result<(), Error> {
    let manifest = path.manifest_name();
    let temporary = disk.remove_file(&temporary_name(&manifest))?;
    if disk.remove_file(&manifest)? {
        disk.sync()?;
    }
    let layer = disk.remove_file(path.file_name())?;
    if temporary || layer { disk.sync() } else { Ok(()) }
}

/// A sealed layer that names `file` as its parent. A manifest that cannot be read names nothing.
fn child_of(disk: &Directory, file: &str) -> Result<Option<String>, Error> {
    for name in disk.names()? {
        if is_layer_name(&name)
            && let Ok(Some(manifest)) = read_manifest(disk, &name)
            && manifest.parent.is_some_and(|parent| parent.file == file)
        {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// The space that the layers of a chain take together, in bytes.
pub fn chain_bytes(chain: &[Manifest]) -> u64 {
    chain.iter().fold(0, |sum, layer| sum.saturating_add(layer.allocated_bytes))
}

/// Runs `work` on a thread that may block: metadata operations and small files, never the content of a disk.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(Error::Stopped),
        },
    }
}
