//! From a request to the names, paths and links of a new layer: pure, so that a plan can be logged, stored and compared
//! before anything is created.

use jiff::Timestamp;
use uuid::Uuid;

use crate::error::{Error, RequestRule};
use crate::layout::LayerPath;
use crate::manifest::{Manifest, ParentLink};
use crate::names::{LayerKind, export_name};

/// The longest name or id in a request, in bytes.
pub const MAX_TEXT_BYTES: usize = 4096;

/// The most layers of one chain, the full included.
pub const MAX_CHAIN_LAYERS: u32 = 256;

/// The unit in which QEMU counts the size of a disk, rounding down.
const SECTOR_BYTES: u64 = 512;

/// What is asked for: one layer for one disk of one virtual machine.
#[derive(Clone, Debug)]
pub struct LayerRequest<'a> {
    /// The name of the virtual machine, as people know it. Only recorded.
    pub vm_name: String,
    /// What paths and export names call the virtual machine: any text that is the same for all its backups and that no
    /// other virtual machine has. It is escaped where a path needs it.
    pub context: String,
    /// Which disk of the virtual machine, from 0.
    pub disk_index: u32,
    /// The hypervisor's own key of the disk.
    pub disk_key: Option<i64>,
    /// Whether the layer stands alone.
    pub kind: LayerKind,
    /// When the backup was started. Its second becomes part of the names.
    pub timestamp: Timestamp,
    /// The size of the disk now, in bytes: whole sectors of 512.
    pub size_bytes: u64,
    /// The backup, as the hub calls it.
    pub backup_id: String,
    /// The job, as the hub calls it.
    pub job_id: String,
    /// The layer that an incremental stands on.
    pub parent: Option<&'a LayerRef>,
}

/// A sealed layer, as far as a child has to know it. From [`crate::Repository::layer_ref`], or from a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerRef {
    /// Where it lies.
    pub path: LayerPath,
    /// Its identity.
    pub layer_uuid: Uuid,
    /// Its place in the chain.
    pub sequence: u32,
    /// The size of the disk in it, in bytes.
    pub size_bytes: u64,
    /// The disk it belongs to.
    pub disk_index: u32,
    /// The virtual machine it belongs to.
    pub vm_context: String,
}

impl LayerRef {
    /// The layer at `path`, as `manifest` describes it.
    pub fn new(path: LayerPath, manifest: &Manifest) -> Self {
        Self {
            path,
            layer_uuid: manifest.layer_uuid,
            sequence: manifest.sequence,
            size_bytes: manifest.size_bytes,
            disk_index: manifest.disk_index,
            vm_context: manifest.vm_context.clone(),
        }
    }
}

/// A layer that can be created: every name is decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerPlan {
    /// Where the layer will lie, below the root.
    pub path: LayerPath,
    /// Under which name it is served while it is written.
    pub export_name: String,
    /// What it will name as its backing file: a plain file name, so that the repository can move.
    pub backing_name: Option<String>,
    /// The layer below.
    pub parent: Option<LayerRef>,
    /// Its place in the chain.
    pub sequence: u32,
    /// Whether it stands alone.
    pub kind: LayerKind,
    /// The size of the disk, in bytes.
    pub size_bytes: u64,
    /// The name of the virtual machine.
    pub vm_name: String,
    /// What paths and export names call the virtual machine.
    pub context: String,
    /// Which disk.
    pub disk_index: u32,
    /// The hypervisor's own key of the disk.
    pub disk_key: Option<i64>,
    /// When the backup was started.
    pub timestamp: Timestamp,
    /// The backup.
    pub backup_id: String,
    /// The job.
    pub job_id: String,
}

/// What is known only once a layer is written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SealFacts {
    /// Where the next incremental begins, in the words of the source.
    pub change_id: Option<String>,
    /// What crossed the wire, in bytes.
    pub bytes_transferred: u64,
    /// Now, by the hub's clock.
    pub sealed_at: Option<Timestamp>,
}

impl LayerPlan {
    /// Decides every name of the layer that `request` asks for.
    ///
    /// # Errors
    /// [`Error::Request`] for a request that contradicts itself or its parent; [`Error::Shrunk`] if the disk is smaller
    /// than in the parent.
    pub fn new(request: &LayerRequest<'_>) -> Result<Self, Error> {
        check(request).map_err(|rule| Error::Request { rule })?;
        if let Some(parent) = request.parent
            && request.size_bytes < parent.size_bytes
        {
            return Err(Error::Shrunk {
                parent: parent.path.to_path_buf(),
                parent_bytes: parent.size_bytes,
                size_bytes: request.size_bytes,
            });
        }
        let LayerRequest { context, disk_index, timestamp, .. } = request;
        let path = match request.parent {
            None => LayerPath::full(context, *disk_index, *timestamp),
            Some(parent) => LayerPath::beside(&parent.path, context, *timestamp),
        };
        Ok(Self {
            path,
            export_name: export_name(context, *disk_index, request.kind, *timestamp),
            backing_name: request.parent.map(|parent| parent.path.file_name().to_owned()),
            parent: request.parent.cloned(),
            sequence: request.parent.map_or(0, |parent| parent.sequence.saturating_add(1)),
            kind: request.kind,
            size_bytes: request.size_bytes,
            vm_name: request.vm_name.clone(),
            context: context.clone(),
            disk_index: *disk_index,
            disk_key: request.disk_key,
            timestamp: *timestamp,
            backup_id: request.backup_id.clone(),
            job_id: request.job_id.clone(),
        })
    }

    /// How the manifest will name the layer below.
    pub(crate) fn parent_link(&self) -> Option<ParentLink> {
        self.parent.as_ref().map(|parent| ParentLink {
            file: parent.path.file_name().to_owned(),
            layer_uuid: parent.layer_uuid,
        })
    }
}

fn check(request: &LayerRequest<'_>) -> Result<(), RequestRule> {
    for (field, text) in [
        ("vm_name", &request.vm_name),
        ("context", &request.context),
        ("backup_id", &request.backup_id),
        ("job_id", &request.job_id),
    ] {
        check_text(field, text)?;
    }
    if request.size_bytes == 0 {
        return Err(RequestRule::NoBytes);
    }
    if !request.size_bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(RequestRule::HalfSector { size_bytes: request.size_bytes });
    }
    match (request.kind, request.parent) {
        (LayerKind::Full, None) => Ok(()),
        (LayerKind::Full, Some(_)) => Err(RequestRule::ParentOfFull),
        (LayerKind::Incremental, None) => Err(RequestRule::NoParent),
        (LayerKind::Incremental, Some(parent)) => check_parent(request, parent),
    }
}

fn check_parent(request: &LayerRequest<'_>, parent: &LayerRef) -> Result<(), RequestRule> {
    if parent.disk_index != request.disk_index {
        let (parent, wanted) = (parent.disk_index, request.disk_index);
        return Err(RequestRule::OtherDisk { parent, wanted });
    }
    if parent.vm_context != request.context {
        return Err(RequestRule::OtherContext);
    }
    if parent.sequence >= MAX_CHAIN_LAYERS - 1 {
        return Err(RequestRule::TooDeep { limit: MAX_CHAIN_LAYERS });
    }
    Ok(())
}

/// Refuses a text that is missing, or too long to be recorded.
pub(crate) fn check_text(field: &'static str, text: &str) -> Result<(), RequestRule> {
    if text.is_empty() || text.len() > MAX_TEXT_BYTES {
        return Err(RequestRule::Text { field, limit: MAX_TEXT_BYTES });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::parse_timestamp;

    fn full() -> LayerRequest<'static> {
        LayerRequest {
            vm_name: "web/01".to_owned(),
            context: "web/01".to_owned(),
            disk_index: 1,
            disk_key: Some(2001),
            kind: LayerKind::Full,
            timestamp: parse_timestamp("20251007T143022").unwrap(),
            size_bytes: 1 << 30,
            backup_id: "b1".to_owned(),
            job_id: "j1".to_owned(),
            parent: None,
        }
    }

    fn parent_of(plan: &LayerPlan) -> LayerRef {
        LayerRef {
            path: plan.path.clone(),
            layer_uuid: Uuid::from_u128(1),
            sequence: plan.sequence,
            size_bytes: plan.size_bytes,
            disk_index: plan.disk_index,
            vm_context: plan.context.clone(),
        }
    }

    fn rule(request: &LayerRequest<'_>) -> RequestRule {
        match LayerPlan::new(request) {
            Err(Error::Request { rule }) => rule,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_incremental_lies_beside_its_parent_and_names_it_plainly() {
        let plan = LayerPlan::new(&full()).unwrap();
        assert_eq!(plan.export_name, "backup-web%2F01-disk1-full-20251007T143022");
        assert_eq!((plan.sequence, &plan.backing_name), (0, &None));
        let parent = parent_of(&plan);
        let request = LayerRequest {
            kind: LayerKind::Incremental,
            timestamp: parse_timestamp("20251008T020000").unwrap(),
            size_bytes: 2 << 30,
            parent: Some(&parent),
            ..full()
        };
        let child = LayerPlan::new(&request).unwrap();
        assert_eq!(child.path.parent(), plan.path.parent());
        assert_eq!(
            child.backing_name.as_deref(),
            Some("backup-web%2F01-20251007T143022-full.qcow2")
        );
        assert_eq!(child.sequence, 1);
        assert_eq!(child.parent_link().unwrap().layer_uuid, Uuid::from_u128(1));
    }

    #[test]
    fn a_disk_that_shrank_needs_a_new_full() {
        let parent = parent_of(&LayerPlan::new(&full()).unwrap());
        let request = LayerRequest {
            kind: LayerKind::Incremental,
            size_bytes: (1 << 30) - 512,
            parent: Some(&parent),
            ..full()
        };
        let error = LayerPlan::new(&request).unwrap_err();
        assert!(matches!(error, Error::Shrunk { .. }), "{error}");
        assert!(error.to_string().contains("new full backup"), "{error}");
    }

    #[test]
    fn requests_that_contradict_themselves_are_refused() {
        let parent = parent_of(&LayerPlan::new(&full()).unwrap());
        let incremental =
            || LayerRequest { kind: LayerKind::Incremental, parent: Some(&parent), ..full() };
        assert_eq!(
            rule(&LayerRequest { parent: Some(&parent), ..full() }),
            RequestRule::ParentOfFull
        );
        assert_eq!(rule(&LayerRequest { parent: None, ..incremental() }), RequestRule::NoParent);
        assert_eq!(rule(&LayerRequest { size_bytes: 0, ..full() }), RequestRule::NoBytes);
        let half = LayerRequest { size_bytes: 1000, ..full() };
        assert_eq!(rule(&half), RequestRule::HalfSector { size_bytes: 1000 });
        assert_eq!(
            rule(&LayerRequest { disk_index: 2, ..incremental() }),
            RequestRule::OtherDisk { parent: 1, wanted: 2 }
        );
        assert_eq!(
            rule(&LayerRequest { context: "db".to_owned(), ..incremental() }),
            RequestRule::OtherContext
        );
        let deep = LayerRef { sequence: MAX_CHAIN_LAYERS - 1, ..parent.clone() };
        assert_eq!(
            rule(&LayerRequest { parent: Some(&deep), ..incremental() }),
            RequestRule::TooDeep { limit: MAX_CHAIN_LAYERS }
        );
        for text in [String::new(), "x".repeat(MAX_TEXT_BYTES + 1)] {
            let field = rule(&LayerRequest { context: text, ..full() });
            assert_eq!(field, RequestRule::Text { field: "context", limit: MAX_TEXT_BYTES });
        }
    }
}
