//! Backup chains on disk: QCOW2 layers that any QEMU can read, a manifest beside each, and the rules by which a layer
//! becomes a point in time. Jobs, schedules and networks are not known here.
//!
//! # A repository
//!
//! A [`Repository`] is a directory of a local file system:
//!
//! ```text
//! ctx-{vm}-{time of the full}/
//!     disk-0/
//!         backup-{vm}-{time}-full.qcow2           stands alone
//!         backup-{vm}-{time}-full.qcow2.json      its manifest
//!         backup-{vm}-{time}-incr.qcow2           names the file above as its backing file, by its bare name
//!         backup-{vm}-{time}-incr.qcow2.json
//! .sendense-lease                                 locked by the hub that works here
//! ```
//!
//! Nothing in it depends on where it lies: it may be moved or copied whole, and read with `qemu-img` alone.
//!
//! # The life of a layer
//!
//! 1. [`Repository::plan_layer`] decides every name, without touching anything.
//! 2. [`Repository::create_layer`] compares the parent and all below it with their manifests, then makes the image.
//! 3. Somebody writes to [`OpenLayer::device`].
//! 4. [`Repository::seal_layer`] closes the image, makes file and directories durable, and puts the manifest in place
//!    with one rename. Only from then on is the layer a point in time, and a possible parent.
//!
//! What stops anywhere before the end of step 4, by an error or a power cut, is an unsealed layer:
//! [`Repository::layers`] shows it and [`Repository::discard_layer`] removes it.
//!
//! # What is proven, and what is not
//!
//! A missing, renamed, truncated, replaced or rewritten layer, and every damaged bit of a manifest, is found before an
//! incremental is put on it or a point is opened: by identity, length and a [`Fingerprint`] of the file's beginning and
//! of pieces spread over it. Bits that rot between those pieces are not found here.
//!
//! # Example
//!
//! ```
//! use block::{BlockDevice, ByteRange, Durability};
//! use bytes::Bytes;
//! use chain::{LayerKind, LayerRef, LayerRequest, Repository, SealFacts};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! let repository = Repository::open(directory.path()).await?;
//!
//! // A full: everything that is on the disk.
//! let monday = LayerRequest {
//!     vm_name: "web 01".to_owned(),
//!     context: "web 01".to_owned(),
//!     disk_index: 0,
//!     disk_key: Some(2000),
//!     kind: LayerKind::Full,
//!     timestamp: "2025-10-06T20:34:01Z".parse()?,
//!     size_bytes: 1 << 20,
//!     backup_id: "backup-1".to_owned(),
//!     job_id: "job-1".to_owned(),
//!     parent: None,
//! };
//! let plan = repository.plan_layer(&monday)?;
//! assert_eq!(plan.export_name, "backup-web 01-disk0-full-20251006T203401");
//! let layer = repository.create_layer(&plan).await?;
//! layer.image.write(0, Bytes::from_static(b"monday"), Durability::Deferred).await?;
//! let manifest = repository.seal_layer(layer, SealFacts::default()).await?;
//! let full = LayerRef::new(plan.path, &manifest);
//!
//! // An incremental: what has changed since.
//! let tuesday = LayerRequest {
//!     kind: LayerKind::Incremental,
//!     timestamp: "2025-10-07T20:34:01Z".parse()?,
//!     backup_id: "backup-2".to_owned(),
//!     job_id: "job-2".to_owned(),
//!     parent: Some(&full),
//!     ..monday.clone()
//! };
//! let plan = repository.plan_layer(&tuesday)?;
//! let layer = repository.create_layer(&plan).await?;
//! layer.image.write(0, Bytes::from_static(b"tue"), Durability::Deferred).await?;
//! repository.seal_layer(layer, SealFacts::default()).await?;
//!
//! // Both points in time can be read.
//! for (path, content) in [(&full.path, b"monday"), (&plan.path, b"tueday")] {
//!     let point = repository.open_point(path).await?;
//!     assert_eq!(point.read(ByteRange::between(0, 6)).await?.to_vec(), content);
//! }
//! assert_eq!(repository.chain_of(&plan.path).await?.len(), 2);
//! # Ok(())
//! # }
//! ```

mod durable;
mod error;
mod fingerprint;
mod image;
mod layout;
mod lease;
mod manifest;
mod names;
mod plan;
mod point;
mod repository;
mod seal;
mod storage;
mod verify;
mod walk;
mod writing;

pub use error::{Error, FileOp, LayerRule, ManifestRule, PathRule, RequestRule};
pub use fingerprint::Fingerprint;
pub use layout::{LayerPath, MAX_NAME_BYTES};
pub use manifest::{MAX_MANIFEST_BYTES, Manifest, ParentLink, VERSION as MANIFEST_VERSION};
pub use names::{
    LayerKind, MAX_COMPONENT_BYTES, MAX_EXPORT_NAME_BYTES, compact_timestamp, decode_component,
    encode_component, export_name, parse_timestamp,
};
pub use plan::{LayerPlan, LayerRef, LayerRequest, MAX_CHAIN_LAYERS, MAX_TEXT_BYTES, SealFacts};
pub use repository::{Repository, chain_bytes};
pub use seal::OpenLayer;
pub use storage::{FileSystem, Storage};
pub use walk::{Found, MAX_LAYERS, State};
