//! The step that makes the layers: each disk's is put on the latest completed one, or on nothing, with the reason.

use std::path::Path;

use chain::{LayerKind, LayerRequest, Repository};

use super::base::{self, Base};
use super::disk::new_disk;
use super::work::{Reason, Work};
use crate::error::describe;
use crate::job::Step;
use crate::model::Level;

impl Work {
    pub(super) async fn make_layers(&mut self) -> Result<(), Reason> {
        let repository = self.repository.clone().ok_or("the repository is not open")?;
        let parents = self.hub.db.parents(&self.job.vm_context_id, &self.job.repository_id).await;
        let parents = parents.map_err(|error| describe(&error))?;
        for at in 0..self.disks.len() {
            let Some(disk) = self.disks.get(at) else { continue };
            let latest = parents.iter().find(|parent| parent.disk_index == disk.index);
            let base = base::choose(self.job.backup_type, latest, disk.key, disk.size_bytes);
            let Err(error) = self.make_layer(&repository, at, base.clone()).await else { continue };
            match (base, error) {
                (Base::Layer(parent), LayerTrouble::Parent(why)) => {
                    let why =
                        format!("the layer of {} cannot be built on: {why}", parent.backup_id);
                    self.log(Step::Layers, Level::Warning, &why).await;
                    let base = Base::Nothing(Some(why));
                    self.make_layer(&repository, at, base)
                        .await
                        .map_err(LayerTrouble::into_reason)?;
                }
                (_, trouble) => return Err(trouble.into_reason()),
            }
        }
        Ok(())
    }

    /// Plans the layer of one disk, notes it in the database, and only then makes its file: a crash in between leaves
    /// a row that says what to remove.
    async fn make_layer(
        &mut self,
        repository: &Repository,
        at: usize,
        base: Base,
    ) -> Result<(), LayerTrouble> {
        let Some(disk) = self.disks.get_mut(at) else { return Ok(()) };
        let (parent, full_reason) = match base {
            Base::Nothing(reason) => (None, reason),
            Base::Layer(parent) => (Some(parent), None),
        };
        let below = match &parent {
            Some(parent) => Some(
                repository
                    .layer_ref(Path::new(&parent.path))
                    .await
                    .map_err(|error| LayerTrouble::of_parent(&error))?,
            ),
            None => None,
        };
        let plan = repository
            .plan_unused_layer(&LayerRequest {
                vm_name: self.job.vm_name.clone(),
                context: self.job.vm_name.clone(),
                disk_index: disk.index,
                disk_key: Some(disk.key),
                kind: if below.is_some() { LayerKind::Incremental } else { LayerKind::Full },
                timestamp: self.job.stamp,
                size_bytes: disk.size_bytes,
                backup_id: self.job.id.clone(),
                job_id: self.job.id.clone(),
                parent: below.as_ref(),
            })
            .await
            .map_err(|error| LayerTrouble::of_parent(&error))?;
        let row = new_disk(disk, parent.as_ref(), full_reason, &plan);
        let noted = self.hub.db.put_disk(&self.job.id, row).await;
        noted.map_err(|error| LayerTrouble::Other(describe(&error)))?;
        disk.plan = Some(plan.clone());
        let layer = repository
            .create_layer(&plan)
            .await
            .map_err(|error| LayerTrouble::of_parent(&error))?;
        (disk.parent, disk.layer) = (parent, Some(layer));
        Ok(())
    }
}

/// Why a layer was not made.
enum LayerTrouble {
    /// Its parent is not what it was: a full can be made instead.
    Parent(Reason),
    /// Anything else.
    Other(Reason),
}

impl LayerTrouble {
    fn of_parent(error: &chain::Error) -> Self {
        let reason = describe(error);
        match error {
            chain::Error::Manifest { .. }
            | chain::Error::Layer { .. }
            | chain::Error::NotSealed { .. }
            | chain::Error::Shrunk { .. }
            | chain::Error::Path { .. }
            | chain::Error::Request { rule: chain::RequestRule::TooDeep { .. } } => {
                Self::Parent(reason)
            }
            _ => Self::Other(reason),
        }
    }

    fn into_reason(self) -> Reason {
        match self {
            Self::Parent(reason) | Self::Other(reason) => reason,
        }
    }
}
