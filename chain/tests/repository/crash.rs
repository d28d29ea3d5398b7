//! Layers that were left behind in the middle of being made: each test stops after one more step of a seal. None of
//! them may count as a backup, and all must be removable.

use std::path::PathBuf;

use block::BlockDevice;
use chain::{Error, LayerPath, LayerRef};

use crate::support::{Bench, noise, request};

/// An incremental on a sealed full that was closed, but not sealed; and what a careless hub might take it for.
struct Left {
    bench: Bench,
    full: LayerRef,
    path: LayerPath,
    mistaken: LayerRef,
}

impl Left {
    async fn closed() -> Self {
        let bench = Bench::new().await;
        let full = bench.sealed(&request(0, None), &[(0, noise(1, 1 << 20))]).await;
        let layer = bench.written(&request(1, Some(&full)), &[(0, noise(2, 4096))]).await;
        layer.image.close().await.unwrap();
        let path = layer.plan.path.clone();
        drop(layer);
        let mistaken = LayerRef { path: path.clone(), sequence: 1, ..full.clone() };
        Self { bench, full, path, mistaken }
    }

    fn beside(&self, name: &str) -> PathBuf {
        self.bench.temp.path().join(&self.path).with_file_name(name)
    }

    fn manifest(&self) -> PathBuf {
        self.beside(&self.path.manifest_name())
    }

    /// The text that a seal of this layer would have written.
    async fn manifest_text(&self) -> Vec<u8> {
        let mut manifest = self.bench.repository.manifest(&self.full.path).await.unwrap();
        manifest.file = self.path.file_name().to_owned();
        manifest.to_bytes().unwrap()
    }

    /// It is no point, no parent, and not in the way.
    async fn is_nothing_and_goes_away(&self) {
        let repository = &self.bench.repository;
        assert!(repository.open_point(&self.path).await.is_err(), "it is no point");
        assert!(repository.chain_of(&self.path).await.is_err(), "it has no chain");
        assert!(repository.layer_ref(&self.path).await.is_err(), "it is no parent");
        let plan = self.bench.child_of(&self.mistaken);
        assert!(repository.create_layer(&plan).await.is_err(), "nothing is put on it");
        assert!(!self.bench.temp.path().join(&plan.path).exists());

        repository.discard_layer(&self.path).await.unwrap();
        assert_eq!(self.bench.states().await, ["sealed"]);
        let directory = self.beside("x");
        let left: Vec<_> = std::fs::read_dir(directory.parent().unwrap()).unwrap().collect();
        assert_eq!(left.len(), 2, "only the full and its manifest: {left:?}");
        repository.discard_layer(&self.path).await.unwrap();

        // And the next backup succeeds, under the same name.
        let again = self.bench.sealed(&request(1, Some(&self.full)), &[(0, noise(3, 99))]).await;
        assert_eq!(again.path, self.path);
        repository.open_point(&again.path).await.unwrap();
    }
}

#[tokio::test]
async fn an_image_that_was_closed_but_has_no_manifest_is_no_backup() {
    let left = Left::closed().await;
    assert_eq!(left.bench.states().await, ["sealed", "unsealed"]);
    let error = left.bench.repository.open_point(&left.path).await.err().unwrap();
    assert!(matches!(error, Error::NotSealed { .. }), "{error}");
    let plan = left.bench.child_of(&left.mistaken);
    let error = left.bench.repository.create_layer(&plan).await.err().unwrap();
    assert!(matches!(error, Error::NotSealed { .. }), "{error}");
    assert!(error.to_string().contains(left.path.file_name()), "{error}");
    left.is_nothing_and_goes_away().await;
}

#[tokio::test]
async fn an_image_that_was_dropped_open_is_no_backup() {
    let bench = Bench::new().await;
    let layer = bench.written(&request(0, None), &[(0, noise(1, 100_000))]).await;
    let path = layer.plan.path.clone();
    let error = bench.repository.discard_layer(&path).await.unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error}");
    drop(layer);
    assert_eq!(bench.states().await, ["unsealed"]);
    assert!(bench.repository.open_point(&path).await.is_err());
    bench.repository.discard_layer(&path).await.unwrap();
    let left: Vec<_> = std::fs::read_dir(bench.temp.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(left, [".sendense-lease"], "the directories are gone, too");
}

#[tokio::test]
async fn a_temporary_manifest_is_no_manifest() {
    let left = Left::closed().await;
    let temporary = format!(".{}.tmp", left.path.manifest_name());
    std::fs::write(left.beside(&temporary), left.manifest_text().await).unwrap();
    assert_eq!(left.bench.states().await, ["sealed", "unsealed"]);
    left.is_nothing_and_goes_away().await;
}

#[tokio::test]
async fn a_truncated_manifest_is_no_manifest() {
    let left = Left::closed().await;
    let text = left.manifest_text().await;
    for len in (0..text.len() - 3).step_by(41) {
        std::fs::write(left.manifest(), &text[..len]).unwrap();
        assert_eq!(left.bench.states().await, ["sealed", "broken"], "{len} bytes");
        let plan = left.bench.child_of(&left.mistaken);
        let error = left.bench.repository.create_layer(&plan).await.err().unwrap();
        assert!(matches!(error, Error::Manifest { .. }), "{len} bytes: {error}");
    }
    left.is_nothing_and_goes_away().await;
}

#[tokio::test]
async fn a_sealed_layer_is_never_discarded() {
    let bench = Bench::new().await;
    let layers = bench.chain(1).await;
    for layer in &layers {
        let error = bench.repository.discard_layer(&layer.path).await.unwrap_err();
        assert!(matches!(error, Error::Sealed { .. }), "{error}");
    }
    // Nor one whose manifest is damaged, or gone while another layer needs it.
    let manifest = bench.manifest_file(&layers[1]);
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, text.replace("job-1", "job-7")).unwrap();
    let error = bench.repository.discard_layer(&layers[1].path).await.unwrap_err();
    assert!(matches!(error, Error::Manifest { .. }), "{error}");
    std::fs::write(&manifest, text).unwrap();
    std::fs::remove_file(bench.manifest_file(&layers[0])).unwrap();
    let error = bench.repository.discard_layer(&layers[0].path).await.unwrap_err();
    assert!(matches!(error, Error::HasChild { .. }), "{error}");
    assert_eq!(bench.states().await, ["broken", "broken"]);
    assert!(layers.iter().all(|layer| bench.file(layer).exists()));
}

#[tokio::test]
async fn a_discard_removes_a_link_and_not_what_it_leads_to() {
    let bench = Bench::new().await;
    let outside = tempfile::tempdir().unwrap();
    let precious = outside.path().join("precious.qcow2");
    std::fs::write(&precious, "x").unwrap();
    let root = bench.temp.path();
    std::fs::create_dir_all(root.join("ctx-a/disk-0")).unwrap();
    std::os::unix::fs::symlink(&precious, root.join("ctx-a/disk-0/backup-a.qcow2")).unwrap();
    std::os::unix::fs::symlink(outside.path(), root.join("ctx-a/disk-1")).unwrap();
    bench.repository.discard_layer("ctx-a/disk-0/backup-a.qcow2".as_ref()).await.unwrap();
    let through = "ctx-a/disk-1/precious.qcow2";
    let error = bench.repository.discard_layer(through.as_ref()).await.unwrap_err();
    assert!(matches!(error, Error::Path { .. }), "{error}");
    assert!(precious.exists());
    assert!(!root.join("ctx-a/disk-0").exists());
}

#[tokio::test]
async fn a_sealed_layer_is_removed_only_when_nothing_stands_on_it() {
    let bench = Bench::new().await;
    let layers = bench.chain(1).await;
    let repository = &bench.repository;
    let error = repository.remove_layer(&layers[0].path).await.unwrap_err();
    assert!(matches!(error, Error::HasChild { .. }), "{error}");
    let writing = bench.written(&request(2, Some(&layers[1])), &[]).await;
    let error = repository.remove_layer(&layers[1].path).await.unwrap_err();
    assert!(matches!(error, Error::HasChild { .. }), "{error}");
    let error = repository.remove_layer(&writing.plan.path).await.unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error}");
    repository.abandon_layer(writing).await.unwrap();
    assert_eq!(bench.states().await, ["sealed", "sealed"]);

    // A damaged manifest keeps nobody from removing what it was about.
    std::fs::write(bench.manifest_file(&layers[1]), "damaged").unwrap();
    for layer in layers.iter().rev() {
        repository.remove_layer(&layer.path).await.unwrap();
        repository.remove_layer(&layer.path).await.unwrap();
    }
    let left = std::fs::read_dir(bench.temp.path()).unwrap().count();
    assert_eq!(left, 1, "only the lease");
}
