//! What the tests of a repository share: a repository in a temporary directory, layers with known content, and
//! qemu-img as the judge.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use block::{BlockDevice, ByteRange, Durability};
use bytes::Bytes;
use chain::{
    LayerKind, LayerPlan, LayerRef, LayerRequest, OpenLayer, Repository, SealFacts, State,
};
use jiff::{SignedDuration, Timestamp};
use tempfile::TempDir;

/// The size of the disks in these tests.
pub(crate) const DISK_BYTES: u64 = 4 << 20;

/// A repository, alone in a temporary directory.
pub(crate) struct Bench {
    pub(crate) temp: TempDir,
    pub(crate) repository: Repository,
}

/// Bytes to be written at an offset.
pub(crate) type Write = (u64, Vec<u8>);

/// `hour` hours after the first backup of all tests.
pub(crate) fn moment(hour: i64) -> Timestamp {
    let first: Timestamp = "2025-10-07T14:30:22Z".parse().unwrap();
    first.checked_add(SignedDuration::from_hours(hour)).unwrap()
}

/// A request for a layer of disk 0 of a machine with a name that needs care.
pub(crate) fn request(hour: i64, parent: Option<&LayerRef>) -> LayerRequest<'_> {
    LayerRequest {
        vm_name: "Büro / web 01".to_owned(),
        context: "Büro / web 01".to_owned(),
        disk_index: 0,
        disk_key: Some(2000),
        kind: if parent.is_some() { LayerKind::Incremental } else { LayerKind::Full },
        timestamp: moment(hour),
        size_bytes: DISK_BYTES,
        backup_id: format!("backup-{hour}"),
        job_id: format!("job-{hour}"),
        parent,
    }
}

pub(crate) fn facts(hour: i64) -> SealFacts {
    SealFacts {
        change_id: Some(format!("52 3f/{hour}")),
        bytes_transferred: 4242,
        sealed_at: Some(moment(hour)),
    }
}

/// Bytes that look random and follow from `seed`.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .flatten()
    .take(len)
    .collect()
}

impl Bench {
    pub(crate) async fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        let repository = Repository::open(temp.path()).await.unwrap();
        Self { temp, repository }
    }

    /// Creates a layer and writes to it.
    pub(crate) async fn written(&self, request: &LayerRequest<'_>, writes: &[Write]) -> OpenLayer {
        let plan = self.repository.plan_layer(request).unwrap();
        let layer = self.repository.create_layer(&plan).await.unwrap();
        for (at, bytes) in writes {
            let data = Bytes::from(bytes.clone());
            layer.image.write(*at, data, Durability::Deferred).await.unwrap();
        }
        layer
    }

    /// Creates, writes and seals a layer.
    pub(crate) async fn sealed(&self, request: &LayerRequest<'_>, writes: &[Write]) -> LayerRef {
        let layer = self.written(request, writes).await;
        let path = layer.plan.path.clone();
        let manifest = self.repository.seal_layer(layer, facts(0)).await.unwrap();
        LayerRef::new(path, &manifest)
    }

    /// A full and `count` incrementals of noise; the last is the newest.
    pub(crate) async fn chain(&self, count: i64) -> Vec<LayerRef> {
        let mut layers = vec![self.sealed(&request(0, None), &[(0, noise(1, 1 << 20))]).await];
        for hour in 1..=count {
            let parent = layers.last().unwrap();
            let seed = u64::try_from(hour).unwrap();
            let writes = [(seed * 65536, noise(seed + 1, 65536))];
            let child = self.sealed(&request(hour, Some(parent)), &writes).await;
            layers.push(child);
        }
        layers
    }

    pub(crate) fn file(&self, layer: &LayerRef) -> PathBuf {
        self.temp.path().join(&layer.path)
    }

    pub(crate) fn manifest_file(&self, layer: &LayerRef) -> PathBuf {
        self.file(layer).with_file_name(layer.path.manifest_name())
    }

    /// The plan of an incremental on `parent`.
    pub(crate) fn child_of(&self, parent: &LayerRef) -> LayerPlan {
        self.repository.plan_layer(&request(1000, Some(parent))).unwrap()
    }

    /// What the walk says of each layer, in the order of their paths.
    pub(crate) async fn states(&self) -> Vec<&'static str> {
        let found = self.repository.layers().await.unwrap();
        found
            .iter()
            .map(|found| match found.state {
                State::Sealed(_) => "sealed",
                State::Unsealed if found.writing => "writing",
                State::Unsealed => "unsealed",
                State::Broken { .. } => "broken",
            })
            .collect()
    }
}

/// Everything on a device.
pub(crate) async fn read_all(device: &Arc<dyn BlockDevice>) -> Vec<u8> {
    let whole = ByteRange::between(0, device.limits().size_bytes);
    device.read(whole).await.unwrap().to_vec()
}

/// Runs qemu-img, which must succeed, and gives what it printed.
pub(crate) fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img").args(arguments).output().expect("qemu-img is needed");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// What QEMU reads from an image and everything below it.
pub(crate) fn qemu_reads(image: &Path) -> Vec<u8> {
    let temp = tempfile::tempdir().unwrap();
    let raw = temp.path().join("raw");
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", text(image), text(&raw)]);
    std::fs::read(raw).unwrap()
}

/// `qemu-img check` finds nothing at all.
pub(crate) fn qemu_checks(image: &Path) {
    let report = qemu_img(&["check", "-f", "qcow2", text(image)]);
    assert!(report.contains("No errors were found"), "{report}");
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
