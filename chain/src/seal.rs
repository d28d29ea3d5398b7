//! The life of a layer: created on a parent that has been proven, written by somebody else, then sealed, and only from
//! then on a parent itself. The order of the steps is what keeps half a backup from ever counting as one.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use block::{BlockDevice, DeviceError};
use qcow2::Image;
use uuid::Uuid;

use crate::durable::Directory;
use crate::error::{Error, FileOp, LayerRule};
use crate::fingerprint::{Fingerprint, measure};
use crate::image;
use crate::layout::LayerPath;
use crate::manifest::Manifest;
use crate::plan::{LayerPlan, LayerRef, SealFacts, check_text};
use crate::repository::{Inner, Repository};
use crate::verify::{Look, Sealed, chain, disk_directory};
use crate::writing::Reservation;

/// A layer that is being written. Dropped without [`Repository::seal_layer`], it stays behind unsealed.
pub struct OpenLayer {
    /// The image to write to. Clones of it may be handed out; they answer `Closed` once the layer is sealed.
    pub image: Image,
    /// What was planned.
    pub plan: LayerPlan,
    layer_uuid: Uuid,
    reservation: Reservation,
}

impl OpenLayer {
    /// The image as a device, for an export.
    pub fn device(&self) -> Arc<dyn BlockDevice> {
        Arc::new(self.image.clone())
    }
}

impl Repository {
    /// Makes the layer's directories and its empty image, and opens that for writing.
    ///
    /// Before an incremental is put on it, the parent and every layer below are compared with their manifests: file,
    /// length, identity, fingerprint. On an error nothing stays behind.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::InUse`]; of the first layer below that cannot be a parent: [`Error::NotSealed`],
    /// [`Error::Manifest`], [`Error::Layer`]; [`Error::Shrunk`]; [`Error::Path`]; [`Error::ReadOnly`];
    /// [`Error::Image`], [`Error::Host`] if the host failed.
    pub async fn create_layer(&self, plan: &LayerPlan) -> Result<OpenLayer, Error> {
        self.check_writable()?;
        let file = self.inner.host_path(&plan.path);
        // With its parent, which from here on is not removed.
        let parent = plan.parent.as_ref().map(|parent| &parent.path);
        let Some(reservation) = self.inner.writing.reserve(&plan.path, parent) else {
            return Err(Error::InUse { file });
        };
        // What lies there already is not ours to clean up.
        let path = plan.path.clone();
        self.with(move |inner| inner.check_absent(&path)).await?;
        match self.create_files(plan, &file).await {
            Ok(image) => {
                let plan = plan.clone();
                Ok(OpenLayer { image, plan, layer_uuid: Uuid::new_v4(), reservation })
            }
            Err(error) => {
                drop(reservation);
                self.sweep(&plan.path).await;
                Err(error)
            }
        }
    }

    async fn create_files(&self, plan: &LayerPlan, file: &Path) -> Result<Image, Error> {
        let planned = plan.clone();
        let below = self.with(move |inner| prepare(inner, &planned)).await?;
        image::create(file, plan).await?;
        let path = plan.path.clone();
        self.with(move |inner| existing_directory(inner, &path)?.set_file_mode(path.file_name()))
            .await?;
        let below = image::open_chain(self.root(), &below).await?;
        let image = image::open_for_writing(file, below).await?;
        image::check(&image, plan.size_bytes, plan.backing_name.clone())
            .map_err(|rule| Error::Layer { file: file.to_path_buf(), rule })?;
        Ok(image)
    }

    /// Finishes a layer: closes its image, makes the file and the directories down to it durable, and only then puts
    /// the manifest beside it. When this returns, the layer is a point in time and may be a parent.
    ///
    /// The image must not have been closed by somebody else: whether that went well could not be known here.
    ///
    /// # Errors
    /// [`Error::Device`] if the image failed now or before, or was closed: then its content cannot be trusted.
    /// [`Error::Request`] for an over-long change id; [`Error::Host`]; what [`Repository::create_layer`] says of the
    /// layers below. In every case the layer is closed and stays unsealed, to be discarded.
    pub async fn seal_layer(&self, layer: OpenLayer, facts: SealFacts) -> Result<Manifest, Error> {
        let OpenLayer { image, plan, layer_uuid, reservation } = layer;
        let closed = close(&image).await;
        drop(image);
        if let Err(source) = closed {
            let file = self.inner.host_path(&plan.path);
            return Err(Error::Device { file, source: Box::new(source) });
        }
        self.with(move |inner| {
            // Here, so that the layer stays reserved when the caller stops waiting.
            let _reservation = reservation;
            seal(inner, &plan, layer_uuid, facts)
        })
        .await
    }

    /// Closes a layer that will not be finished, and discards it.
    ///
    /// # Errors
    /// As [`Repository::discard_layer`]. That the image cannot be closed cleanly does not matter any more.
    pub async fn abandon_layer(&self, layer: OpenLayer) -> Result<(), Error> {
        let OpenLayer { image, plan, reservation, .. } = layer;
        if let Err(error) = image.close().await {
            tracing::debug!(layer = %plan.path, %error, "an abandoned image did not close cleanly");
        }
        drop((image, reservation));
        self.discard_layer(&plan.path).await
    }

    /// Removes what a failed creation left; the failure itself is what the caller hears of.
    async fn sweep(&self, path: &LayerPath) {
        if let Err(error) = self.discard_layer(path).await {
            tracing::warn!(layer = %path, %error, "a layer that could not be created stays behind");
        }
    }
}

/// Flushes and closes, and says what failed first. A second close is fine with everything, so the flush counts, too.
async fn close(image: &Image) -> Result<(), DeviceError> {
    let flushed = image.flush().await;
    let closed = image.close().await;
    flushed.and(closed)
}

/// Proves the layers below and makes the directories. Gives the layers from the full to the parent.
fn prepare(inner: &Inner, plan: &LayerPlan) -> Result<Vec<Sealed>, Error> {
    let below = match &plan.parent {
        Some(parent) => prove_parent(inner, plan, parent, Look::Fingerprint)?,
        None => Vec::new(),
    };
    let context = inner.directory.make_child(plan.path.context_directory())?;
    context.make_child(plan.path.disk_directory())?;
    Ok(below)
}

/// The chain up to the parent, if that is still the layer that the plan was made for.
fn prove_parent(
    inner: &Inner,
    plan: &LayerPlan,
    parent: &LayerRef,
    look: Look,
) -> Result<Vec<Sealed>, Error> {
    let below = chain(&inner.directory, &parent.path, look)?;
    let file = inner.host_path(&parent.path);
    let Some(Sealed { manifest, .. }) = below.last() else {
        return Err(Error::Layer { file, rule: LayerRule::Missing });
    };
    if manifest.layer_uuid != parent.layer_uuid {
        let (recorded, found) = (parent.layer_uuid, manifest.layer_uuid);
        return Err(Error::Layer { file, rule: LayerRule::Identity { recorded, found } });
    }
    if manifest.size_bytes > plan.size_bytes {
        return Err(Error::Shrunk {
            parent: file,
            parent_bytes: manifest.size_bytes,
            size_bytes: plan.size_bytes,
        });
    }
    Ok(below)
}

/// Everything of a seal after the image was closed.
fn seal(
    inner: &Inner,
    plan: &LayerPlan,
    layer_uuid: Uuid,
    facts: SealFacts,
) -> Result<Manifest, Error> {
    if let Some(change_id) = &facts.change_id {
        check_text("change_id", change_id).map_err(|rule| Error::Request { rule })?;
    }
    if let Some(parent) = &plan.parent {
        prove_parent(inner, plan, parent, Look::Length)?;
    }
    let disk = existing_directory(inner, &plan.path)?;
    let file_path = disk.path().join(plan.path.file_name());
    let file = disk
        .open_file(plan.path.file_name())?
        .ok_or_else(|| Error::Layer { file: file_path.clone(), rule: LayerRule::Missing })?;
    file.sync_all().map_err(|error| FileOp::Sync.failed(&file_path, error))?;
    let found = measure(&file, &file_path)?;
    let manifest = Manifest {
        backup_id: plan.backup_id.clone(),
        job_id: plan.job_id.clone(),
        vm_name: plan.vm_name.clone(),
        vm_context: plan.context.clone(),
        disk_index: plan.disk_index,
        disk_key: plan.disk_key,
        kind: plan.kind,
        sequence: plan.sequence,
        layer_uuid,
        file: plan.path.file_name().to_owned(),
        parent: plan.parent_link(),
        created_at: plan.timestamp,
        sealed_at: facts.sealed_at,
        size_bytes: plan.size_bytes,
        file_bytes: found.file_bytes,
        allocated_bytes: found.allocated_bytes,
        bytes_transferred: facts.bytes_transferred,
        change_id: facts.change_id,
        fingerprint: Fingerprint::take(&file, &file_path, found.file_bytes)?,
        extra: BTreeMap::new(),
    };
    let name = plan.path.manifest_name();
    let text = manifest
        .to_bytes()
        .map_err(|rule| Error::Manifest { file: disk.path().join(&name), rule })?;
    sync_up(inner, &plan.path, &disk)?;
    if let Err(error) = disk.replace(&name, &text) {
        // It may be there, but not durably: then it says more than is known.
        if let Err(second) = disk.remove_file(&name) {
            tracing::warn!(layer = %plan.path, %second, "a doubtful manifest stays behind");
        }
        return Err(error);
    }
    Ok(manifest)
}

/// Makes durable that the layer is in its directory, and each directory in the one above.
fn sync_up(inner: &Inner, path: &LayerPath, disk: &Directory) -> Result<(), Error> {
    disk.sync()?;
    if let Some(context) = inner.directory.child(path.context_directory())? {
        context.sync()?;
    }
    inner.directory.sync()
}

/// The directory of a layer that has been created.
fn existing_directory(inner: &Inner, path: &LayerPath) -> Result<Directory, Error> {
    disk_directory(&inner.directory, path)?
        .ok_or_else(|| Error::Layer { file: inner.host_path(path), rule: LayerRule::Missing })
}

#[cfg(test)]
mod tests {
    use std::io;

    use block::{Durability, HostFile, MemoryStorage, OpKind};
    use bytes::Bytes;
    use qcow2::{CreateOptions, OpenOptions};

    use super::*;
    use crate::names::LayerKind;
    use crate::plan::LayerRequest;
    use crate::walk::State;

    fn request() -> LayerRequest<'static> {
        LayerRequest {
            vm_name: "web".to_owned(),
            context: "web".to_owned(),
            disk_index: 0,
            disk_key: None,
            kind: LayerKind::Full,
            timestamp: "2025-10-07T14:30:22Z".parse().unwrap(),
            size_bytes: 1 << 20,
            backup_id: "b".to_owned(),
            job_id: "j".to_owned(),
            parent: None,
        }
    }

    /// Puts an image on a failing disk in the place of the layer's own, and tries to seal that.
    async fn seal_with_failing(kind: OpKind, flush_first: bool) -> (tempfile::TempDir, Repository) {
        let temp = tempfile::tempdir().unwrap();
        let repository = Repository::open(temp.path()).await.unwrap();
        let plan = repository.plan_layer(&request()).unwrap();
        let mut layer = repository.create_layer(&plan).await.unwrap();

        let storage = MemoryStorage::new();
        let faults = storage.clone();
        let file = HostFile::from_storage(Path::new("failing"), storage.into_dyn()).unwrap();
        Image::create_on(&file, &CreateOptions::new(1 << 20)).await.unwrap();
        layer.image = Image::open_on(file, None, OpenOptions::writing()).await.unwrap();
        let data = Bytes::from(vec![7; 65536]);
        layer.image.write(0, data, Durability::Deferred).await.unwrap();
        faults.fail_nth(0, io::ErrorKind::StorageFull, move |op| op.kind == kind);
        if flush_first {
            assert!(layer.image.flush().await.is_err());
        }

        let error = repository.seal_layer(layer, SealFacts::default()).await.unwrap_err();
        assert!(matches!(error, Error::Device { .. }), "{error}");
        let found = repository.layers().await.unwrap();
        assert!(matches!(found[..], [crate::Found { state: State::Unsealed, .. }]), "{found:?}");
        (temp, repository)
    }

    #[tokio::test]
    async fn an_image_that_fails_while_it_is_closed_is_not_sealed() {
        for kind in [OpKind::Write, OpKind::Sync] {
            let (_temp, repository) = seal_with_failing(kind, false).await;
            repository
                .discard_layer(&repository.plan_layer(&request()).unwrap().path)
                .await
                .unwrap();
            assert!(repository.layers().await.unwrap().is_empty());
        }
    }

    #[tokio::test]
    async fn an_image_that_failed_once_is_not_sealed_although_the_disk_works_again() {
        seal_with_failing(OpKind::Sync, true).await;
    }

    #[tokio::test]
    async fn an_image_that_somebody_else_closed_is_not_sealed() {
        let temp = tempfile::tempdir().unwrap();
        let repository = Repository::open(temp.path()).await.unwrap();
        let plan = repository.plan_layer(&request()).unwrap();
        let layer = repository.create_layer(&plan).await.unwrap();
        layer.device().close().await.unwrap();
        let error = repository.seal_layer(layer, SealFacts::default()).await.unwrap_err();
        assert!(matches!(error, Error::Device { .. }), "{error}");
    }
}
