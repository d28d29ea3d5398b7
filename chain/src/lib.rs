//! Placeholder.

mod durable;
mod error;
mod fingerprint;
mod layout;
mod lease;
mod manifest;
mod names;
mod plan;
mod repository;
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
pub use storage::{FileSystem, Storage};
pub use walk::{Found, MAX_LAYERS, State};
