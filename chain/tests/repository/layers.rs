//! Layers that come to be as they should: what is in them, who can read them, where they lie.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use block::{BlockDevice, ByteRange, DeviceError, Durability, ZeroMode};
use bytes::Bytes;
use chain::{Error, LayerRef, LayerRequest, Repository, RequestRule, State, chain_bytes};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::support::{
    Bench, DISK_BYTES, facts, moment, noise, qemu_checks, qemu_img, qemu_reads, read_all, request,
    text,
};

/// Puts `bytes` into the model of a disk.
fn put(model: &mut [u8], at: u64, bytes: &[u8]) {
    let at = usize::try_from(at).unwrap();
    model[at..at + bytes.len()].copy_from_slice(bytes);
}

fn zeroed() -> Vec<u8> {
    vec![0; usize::try_from(DISK_BYTES).unwrap()]
}

#[tokio::test]
async fn each_point_of_a_chain_reads_as_the_disk_was_then() {
    let bench = Bench::new().await;
    let (mut model, mut points) = (zeroed(), Vec::new());
    let mut parent: Option<LayerRef> = None;
    for hour in 0..4_u64 {
        // Unaligned on purpose, and partly over what the layer below holds.
        let (at, bytes) = (hour * 300_000 + 77, noise(hour + 1, 500_001));
        put(&mut model, at, &bytes);
        let hour = i64::try_from(hour).unwrap();
        let layer = bench.sealed(&request(hour, parent.as_ref()), &[(at, bytes)]).await;
        points.push((layer.clone(), model.clone()));
        parent = Some(layer);
    }
    for (layer, model) in &points {
        let point = bench.repository.open_point(&layer.path).await.unwrap();
        assert!(point.limits().read_only);
        assert!(read_all(&point).await == *model, "our view of {}", layer.path);
        qemu_checks(&bench.file(layer));
        assert!(qemu_reads(&bench.file(layer)) == *model, "QEMU's view of {}", layer.path);
        point.close().await.unwrap();
    }
    let top = &points[3].0;
    let manifests = bench.repository.chain_of(&top.path).await.unwrap();
    assert_eq!(manifests.iter().map(|m| m.sequence).collect::<Vec<_>>(), [0, 1, 2, 3]);
    let stored: u64 = manifests.iter().map(|manifest| manifest.allocated_bytes).sum();
    assert_eq!(chain_bytes(&manifests), stored);
    assert_eq!(bench.states().await, ["sealed"; 4]);
}

/// One change of a disk.
#[derive(Clone, Debug)]
enum Change {
    Noise { at: u64, len: usize, seed: u64 },
    Zeroes { at: u64, len: u64 },
}

fn any_change() -> impl Strategy<Value = Change> {
    let len = 1..300_000_u64;
    (any::<bool>(), 0..DISK_BYTES - 300_000, len, any::<u64>()).prop_map(|(zero, at, len, seed)| {
        if zero {
            Change::Zeroes { at, len }
        } else {
            Change::Noise { at, len: usize::try_from(len).unwrap(), seed }
        }
    })
}

impl Change {
    async fn apply(self, image: &qcow2::Image, model: &mut [u8]) {
        match self {
            Self::Noise { at, len, seed } => {
                let bytes = noise(seed, len);
                put(model, at, &bytes);
                image.write(at, Bytes::from(bytes), Durability::Deferred).await.unwrap();
            }
            Self::Zeroes { at, len } => {
                put(model, at, &vec![0; usize::try_from(len).unwrap()]);
                let range = ByteRange::new(at, len).unwrap();
                let mode = ZeroMode::default();
                image.write_zeroes(range, mode, Durability::Deferred).await.unwrap();
            }
        }
    }
}

/// Makes a chain with these changes in each layer, and compares every point with a plain vector.
async fn compare_with_model(layers: Vec<Vec<Change>>) {
    let bench = Bench::new().await;
    let (mut model, mut points): (_, Vec<(LayerRef, Vec<u8>)>) = (zeroed(), Vec::new());
    for (hour, changes) in (0..).zip(layers) {
        let parent = points.last().map(|(layer, _)| layer);
        let layer = bench.written(&request(hour, parent), &[]).await;
        for change in changes {
            change.apply(&layer.image, &mut model).await;
        }
        let path = layer.plan.path.clone();
        let manifest = bench.repository.seal_layer(layer, facts(hour)).await.unwrap();
        points.push((LayerRef::new(path, &manifest), model.clone()));
    }
    for (layer, model) in &points {
        let point = bench.repository.open_point(&layer.path).await.unwrap();
        assert!(read_all(&point).await == *model, "our view of {}", layer.path);
        qemu_checks(&bench.file(layer));
    }
    let (top, model) = points.last().unwrap();
    assert!(qemu_reads(&bench.file(top)) == *model, "QEMU's view of {}", top.path);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 40, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_written_every_point_reads_like_a_plain_vector(
        layers in vec(vec(any_change(), 0..8), 1..5),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(compare_with_model(layers));
    }
}

#[tokio::test]
async fn a_chain_of_64_incrementals_reads_right() {
    let bench = Bench::new().await;
    let mut model = zeroed();
    let first = noise(1, 1 << 20);
    put(&mut model, 0, &first);
    let mut parent = bench.sealed(&request(0, None), &[(0, first)]).await;
    for hour in 1..=64_u64 {
        let (at, bytes) = ((hour * 37 % 60) * 65536 + 100, noise(hour + 1, 65536));
        put(&mut model, at, &bytes);
        let request = request(i64::try_from(hour).unwrap(), Some(&parent));
        parent = bench.sealed(&request, &[(at, bytes)]).await;
    }
    assert_eq!(bench.repository.chain_of(&parent.path).await.unwrap().len(), 65);
    let point = bench.repository.open_point(&parent.path).await.unwrap();
    assert!(read_all(&point).await == model, "our view");
    assert!(qemu_reads(&bench.file(&parent)) == model, "QEMU's view");
    qemu_checks(&bench.file(&parent));
}

#[tokio::test]
async fn a_manifest_tells_what_the_file_is() {
    let bench = Bench::new().await;
    let layer = bench.sealed(&request(0, None), &[(0, noise(1, 1 << 20))]).await;
    let manifest = bench.repository.manifest(&layer.path).await.unwrap();
    assert_eq!(manifest.size_bytes, DISK_BYTES);
    assert_eq!(manifest.file_bytes, std::fs::metadata(bench.file(&layer)).unwrap().len());
    assert!(manifest.allocated_bytes >= 1 << 20, "{}", manifest.allocated_bytes);
    assert_eq!(manifest.bytes_transferred, 4242);
    assert_eq!(manifest.change_id.as_deref(), Some("52 3f/0"));
    assert_eq!(manifest.vm_name, "Büro / web 01");
    assert_eq!((manifest.disk_index, manifest.disk_key), (0, Some(2000)));
    assert_eq!((manifest.created_at, manifest.sealed_at), (moment(0), Some(moment(0))));
    assert_eq!(
        layer.path.to_string(),
        "ctx-B%C3%BCro%20%2F%20web%2001-20251007T143022/disk-0/\
         backup-B%C3%BCro%20%2F%20web%2001-20251007T143022-full.qcow2"
    );
}

#[tokio::test]
async fn files_and_directories_are_closed_to_others() {
    let bench = Bench::new().await;
    let layer = bench.sealed(&request(0, None), &[(0, noise(1, 4096))]).await;
    let file = bench.file(&layer);
    let disk = file.parent().unwrap();
    for (path, most) in [
        (file.as_path(), 0o640),
        (&bench.manifest_file(&layer), 0o640),
        (disk, 0o750),
        (disk.parent().unwrap(), 0o750),
    ] {
        let mode = std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode & !most, 0, "{} has mode {mode:o}", path.display());
    }
}

#[tokio::test]
async fn a_repository_that_was_moved_still_opens() {
    let Bench { temp, repository } = Bench::new().await;
    let old = temp.path().join("old");
    drop(repository);
    std::fs::create_dir(&old).unwrap();
    let bench = Bench { repository: Repository::open(&old).await.unwrap(), temp };
    let layers = bench.chain(2).await;
    let new = bench.temp.path().join("new");
    let Bench { temp: _temp, repository } = bench;
    drop(repository);
    std::fs::rename(&old, &new).unwrap();

    let repository = Repository::open(&new).await.unwrap();
    let top = &layers[2].path;
    let point = repository.open_point(top).await.unwrap();
    assert!(read_all(&point).await == qemu_reads(&new.join(top)), "both views");
    let info = qemu_img(&["info", "--output=json", text(&new.join(top))]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["backing-filename"], layers[1].path.file_name());
    assert_eq!(info["backing-filename-format"], "qcow2");
}

#[tokio::test]
async fn a_point_stays_readable_while_a_layer_is_written_on_it() {
    let bench = Bench::new().await;
    let full = bench.sealed(&request(0, None), &[(0, noise(1, 1 << 20))]).await;
    let before = qemu_reads(&bench.file(&full));
    let child = bench.written(&request(1, Some(&full)), &[(4096, noise(2, 200_000))]).await;
    assert_eq!(bench.states().await, ["sealed", "writing"]);
    let point = bench.repository.open_point(&full.path).await.unwrap();
    assert!(read_all(&point).await == before, "while it is written");
    child.image.write(9, Bytes::from(noise(3, 100)), Durability::Durable).await.unwrap();
    assert!(read_all(&point).await == before, "after more was written");
    let path = child.plan.path.clone();
    assert!(bench.repository.open_point(&path).await.is_err(), "it is no point yet");
    bench.repository.seal_layer(child, facts(1)).await.unwrap();
    assert!(read_all(&point).await == before, "after it was sealed");
    assert!(bench.repository.open_point(&path).await.is_ok());
}

#[tokio::test]
async fn a_disk_that_grew_reads_as_zeros_behind_its_old_end() {
    let bench = Bench::new().await;
    let full = bench.sealed(&request(0, None), &[(DISK_BYTES - 5000, noise(1, 5000))]).await;
    let larger = LayerRequest { size_bytes: DISK_BYTES + 70_144, ..request(1, Some(&full)) };
    let writes = [(DISK_BYTES + 60_000, noise(2, 1000))];
    let child = bench.sealed(&larger, &writes).await;
    let point = bench.repository.open_point(&child.path).await.unwrap();
    let mut model = zeroed();
    put(&mut model, DISK_BYTES - 5000, &noise(1, 5000));
    model.resize(model.len() + 70_144, 0);
    put(&mut model, DISK_BYTES + 60_000, &noise(2, 1000));
    assert!(read_all(&point).await == model, "our view");
    assert!(qemu_reads(&bench.file(&child)) == model, "QEMU's view");

    let error = bench.repository.plan_layer(&request(2, Some(&child))).unwrap_err();
    assert!(matches!(error, Error::Shrunk { .. }), "{error}");
    // A plan that was made for an older size is caught as well.
    let stale = LayerRef { size_bytes: DISK_BYTES, ..child.clone() };
    let plan = bench.repository.plan_layer(&request(2, Some(&stale))).unwrap();
    let error = bench.repository.create_layer(&plan).await.err().unwrap();
    assert!(matches!(error, Error::Shrunk { .. }), "{error}");
}

#[tokio::test]
async fn nothing_is_written_over() {
    let bench = Bench::new().await;
    let plan = bench.repository.plan_layer(&request(0, None)).unwrap();
    let layer = bench.repository.create_layer(&plan).await.unwrap();
    let error = bench.repository.create_layer(&plan).await.err().unwrap();
    assert!(matches!(error, Error::InUse { .. }), "{error}");
    bench.repository.seal_layer(layer, facts(0)).await.unwrap();
    let error = bench.repository.create_layer(&plan).await.err().unwrap();
    assert!(matches!(error, Error::Exists { .. }), "{error}");
    assert_eq!(bench.states().await, ["sealed"]);
}

#[tokio::test]
async fn a_second_backup_in_one_second_takes_the_next_one() {
    let bench = Bench::new().await;
    let full = bench.sealed(&request(0, None), &[]).await;
    let first = bench.sealed(&request(1, Some(&full)), &[]).await;
    let plan = bench.repository.plan_unused_layer(&request(1, Some(&first))).await.unwrap();
    assert_ne!(plan.path, first.path);
    assert!(plan.path.file_name().ends_with("-20251007T153023-incr.qcow2"), "{}", plan.path);
    assert!(plan.export_name.ends_with("-20251007T153023"), "{}", plan.export_name);
    let second = bench.repository.create_layer(&plan).await.unwrap();
    let third = bench.repository.plan_unused_layer(&request(1, Some(&first))).await.unwrap();
    assert!(third.path.file_name().ends_with("-20251007T153024-incr.qcow2"), "{}", third.path);
    bench.repository.abandon_layer(second).await.unwrap();
}

#[tokio::test]
async fn the_disks_of_a_machine_share_its_directory() {
    let bench = Bench::new().await;
    let other = LayerRequest { disk_index: 1, disk_key: Some(2001), ..request(0, None) };
    let first = bench.written(&request(0, None), &[]).await;
    let second = bench.written(&other, &[(0, noise(1, 4096))]).await;
    // The failure of one disk does not take the directory from the other.
    bench.repository.abandon_layer(first).await.unwrap();
    let path = second.plan.path.clone();
    assert!(path.to_string().contains("/disk-1/"), "{path}");
    bench.repository.seal_layer(second, facts(0)).await.unwrap();
    qemu_checks(&bench.temp.path().join(&path));
    assert_eq!(bench.states().await, ["sealed"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn disks_that_come_and_go_at_once_never_lose_their_directory() {
    let bench = Bench::new().await;
    let tasks = (0..8_u32).map(|disk_index| {
        let repository = bench.repository.clone();
        tokio::spawn(async move {
            let request = LayerRequest { disk_index, ..request(0, None) };
            let plan = repository.plan_layer(&request).unwrap();
            for round in 0..6 {
                let layer = repository.create_layer(&plan).await.unwrap();
                if round == 5 && disk_index % 2 == 0 {
                    repository.seal_layer(layer, facts(0)).await.unwrap();
                } else {
                    repository.abandon_layer(layer).await.unwrap();
                }
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    assert_eq!(bench.states().await, ["sealed"; 4]);
}

#[tokio::test]
async fn a_sealed_image_takes_no_more_writes() {
    let bench = Bench::new().await;
    let layer = bench.written(&request(0, None), &[(0, noise(1, 4096))]).await;
    let kept: Arc<dyn BlockDevice> = layer.device();
    bench.repository.seal_layer(layer, facts(0)).await.unwrap();
    let data = Bytes::from(noise(2, 4096));
    let error = kept.write(0, data, Durability::Durable).await.unwrap_err();
    assert!(matches!(error, DeviceError::Closed), "{error}");
    assert_eq!(bench.states().await, ["sealed"]);
}

#[tokio::test]
async fn a_change_id_that_nobody_could_record_leaves_the_layer_unsealed() {
    let bench = Bench::new().await;
    let layer = bench.written(&request(0, None), &[]).await;
    let mut facts = facts(0);
    facts.change_id = Some("x".repeat(5000));
    let error = bench.repository.seal_layer(layer, facts).await.unwrap_err();
    let rule = RequestRule::Text { field: "change_id", limit: 4096 };
    assert!(matches!(error, Error::Request { rule: found } if found == rule), "{error}");
    assert_eq!(bench.states().await, ["unsealed"]);
}

#[tokio::test]
async fn only_one_hub_works_in_a_repository_and_others_may_look() {
    let bench = Bench::new().await;
    let full = bench.sealed(&request(0, None), &[(0, noise(1, 4096))]).await;
    let error = Repository::open(bench.temp.path()).await.err().unwrap();
    assert!(matches!(error, Error::Leased { .. }), "{error}");
    assert!(error.to_string().contains("in use by another hub"), "{error}");

    let reader = Repository::open_for_reading(bench.temp.path()).await.unwrap();
    let point = reader.open_point(&full.path).await.unwrap();
    assert_eq!(point.read(ByteRange::between(0, 4096)).await.unwrap().to_vec(), noise(1, 4096));
    let error = reader.discard_layer(&full.path).await.unwrap_err();
    assert!(matches!(error, Error::ReadOnly { .. }), "{error}");
    let plan = reader.plan_layer(&request(5, None)).unwrap();
    assert!(matches!(reader.create_layer(&plan).await.err().unwrap(), Error::ReadOnly { .. }));

    let Bench { temp, repository } = bench;
    drop(repository);
    Repository::open(temp.path()).await.unwrap();
}

#[tokio::test]
async fn a_repository_must_be_a_directory_that_is_there() {
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("file");
    std::fs::write(&file, "").unwrap();
    for path in [file, temp.path().join("missing")] {
        let error = Repository::open(&path).await.err().unwrap();
        assert!(matches!(error, Error::Host { .. }), "{error}");
    }
    let repository = Repository::open(temp.path()).await.unwrap();
    let storage = repository.storage().await.unwrap();
    assert!(storage.total_bytes >= storage.available_bytes && storage.available_bytes > 0);
}

#[tokio::test]
async fn paths_outside_the_repository_are_refused_and_absolute_ones_inside_are_understood() {
    let bench = Bench::new().await;
    let full = bench.sealed(&request(0, None), &[]).await;
    let absolute = bench.repository.root().join(&full.path);
    assert_eq!(bench.repository.locate(&absolute).unwrap(), full.path);
    assert_eq!(bench.repository.layer_ref(&absolute).await.unwrap(), full);
    for path in ["/etc/passwd", "../x", "ctx-a/disk-0/../../../etc/x.qcow2", "ctx-a/disk-0", ""] {
        let path = Path::new(path);
        let error = bench.repository.open_point(path).await.err().unwrap();
        assert!(matches!(error, Error::Path { .. }), "{error}");
        let error = bench.repository.discard_layer(path).await.unwrap_err();
        assert!(matches!(error, Error::Path { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_walk_passes_over_what_is_not_a_layer() {
    let bench = Bench::new().await;
    let full = bench.sealed(&request(0, None), &[]).await;
    let outside = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(outside.path().join("disk-0")).unwrap();
    std::fs::write(outside.path().join("disk-0/backup-x.qcow2"), "").unwrap();
    let root = bench.temp.path();
    std::os::unix::fs::symlink(outside.path(), root.join("ctx-link")).unwrap();
    std::fs::create_dir_all(root.join("lost+found")).unwrap();
    std::fs::create_dir_all(root.join("ctx-a/disk-x")).unwrap();
    std::fs::write(root.join("ctx-file"), "").unwrap();
    std::fs::write(bench.file(&full).with_file_name("notes.txt"), "").unwrap();
    let found = bench.repository.layers().await.unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].path, full.path);
    assert!(matches!(&found[0].state, State::Sealed(manifest) if manifest.sequence == 0));
}
