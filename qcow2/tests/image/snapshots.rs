//! Internal snapshots: those that qemu-img makes, read by us, and those that we make, judged by qemu-img.

use std::cell::Cell;
use std::path::Path;

use block::{BlockDevice, MemoryStorage};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use qcow2::{Error, Image, OpenOptions, SnapshotError};

use crate::check::check;
use crate::common::{block_on, qemu_check, qemu_create, qemu_img, qemu_io, raw_of, read_all};
use crate::memory::{Act, Shape, any_act, note_discard, part_mut, rounds};

fn str(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The disk as a snapshot has it, read by qemu-img.
fn raw_of_snapshot(path: &Path, name: &str) -> Vec<u8> {
    let raw = path.with_extension("snapshot.raw");
    qemu_img(&["convert", "-O", "raw", "-l", name, str(path), str(&raw)]);
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(&raw).unwrap();
    bytes
}

#[test]
fn snapshots_of_qemu_are_listed_and_read() {
    for options in ["compat=1.1", "compat=1.1,cluster_size=512", "compat=1.1,refcount_bits=64"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        qemu_create(&path, options, "1M", None);
        let mut states = Vec::new();
        for (number, name) in ["first", "second, with a longer name", "3"].iter().enumerate() {
            let write = format!("write -P {} {}k 100k", number + 1, number * 70);
            qemu_io(&path, &[&write]);
            states.push(raw_of(&path));
            qemu_img(&["snapshot", "-c", name, str(&path)]);
        }
        qemu_io(&path, &["write -P 9 0 1M"]);
        block_on(async {
            let image = Image::open(&path, OpenOptions::reading()).await.unwrap();
            let listed = image.snapshots().await.unwrap();
            let names: Vec<_> = listed.iter().map(|s| (s.id.as_str(), s.name.as_str())).collect();
            let wanted = [("1", "first"), ("2", "second, with a longer name"), ("3", "3")];
            assert_eq!(names, wanted, "{options}");
            assert!(listed.iter().all(|s| s.disk_bytes == 1 << 20 && s.vm_state_bytes == 0));
            assert!(read_all(&image).await == vec![9; 1 << 20]);
            image.close().await.unwrap();
            for ((id, name), state) in wanted.iter().zip(&states) {
                for wanted in [id, name] {
                    let options = OpenOptions::reading().snapshot(*wanted);
                    let view = Image::open(&path, options).await.unwrap();
                    assert!(read_all(&view).await == *state, "{name} {wanted}");
                    view.close().await.unwrap();
                }
            }
            assert!(states[1] == raw_of_snapshot(&path, "2"));
        });
    }
}

#[test]
fn snapshots_that_are_not_there_and_writing_to_one_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    qemu_create(&path, "compat=1.1", "1M", None);
    qemu_img(&["snapshot", "-c", "one", str(&path)]);
    block_on(async {
        let open = |options: OpenOptions| Image::open(&path, options);
        let missing = open(OpenOptions::reading().snapshot("two")).await.map(drop).unwrap_err();
        assert!(matches!(missing, Error::Snapshot { what: SnapshotError::NotFound(_), .. }));
        let writing = open(OpenOptions::writing().snapshot("one")).await.map(drop).unwrap_err();
        assert!(matches!(writing, Error::Snapshot { what: SnapshotError::ReadOnly, .. }));
    });
}

/// What an image should hold: the disk now, and as each snapshot has it.
#[derive(Clone, Default)]
struct Model {
    disk: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
}

/// One thing that is done to an image with snapshots.
#[derive(Clone, Debug)]
enum Deed {
    Act(Act),
    Create,
    /// By its position, modulo their number.
    Apply(usize),
    Delete(usize),
}

fn any_deed(sectors: u64) -> impl Strategy<Value = Deed> {
    prop_oneof![
        6 => any_act(sectors, true).prop_map(Deed::Act),
        2 => Just(Deed::Create),
        1 => any::<usize>().prop_map(Deed::Apply),
        1 => any::<usize>().prop_map(Deed::Delete),
    ]
}

impl Model {
    fn new(shape: &Shape) -> Self {
        Self { disk: shape.content(), snapshots: Vec::new() }
    }

    /// The position of a snapshot, and its id.
    async fn pick(&self, image: &Image, number: usize) -> Option<(usize, String)> {
        let listed = image.snapshots().await.unwrap();
        let ids: Vec<_> = self.snapshots.iter().map(|(id, _)| id.clone()).collect();
        assert_eq!(listed.iter().map(|one| one.id.clone()).collect::<Vec<_>>(), ids);
        let at = number.checked_rem(ids.len())?;
        Some((at, ids[at].clone()))
    }

    /// Does a deed to an image, and to the model. Whether it has written the metadata anew.
    async fn apply(&mut self, image: &Image, deed: &Deed) -> bool {
        match deed {
            Deed::Act(act) => {
                let range = act.range(image.limits().size_bytes);
                act.apply(image).await.unwrap();
                if matches!(act, Act::Discard { .. }) {
                    let now = image.read(range).await.unwrap().to_vec();
                    note_discard(&mut self.disk, range, &now, &format!("{act:?}"));
                } else {
                    part_mut(&mut self.disk, range).copy_from_slice(&act.data(range));
                }
                false
            }
            Deed::Create => {
                let name = format!("name {}", self.snapshots.len());
                let made = image.create_snapshot(&name).await.unwrap();
                assert_eq!((&made.name, made.disk_bytes), (&name, self.disk.len() as u64));
                self.snapshots.push((made.id, self.disk.clone()));
                true
            }
            Deed::Apply(number) => {
                let Some((at, id)) = self.pick(image, *number).await else { return false };
                image.apply_snapshot(&id).await.unwrap();
                self.disk = self.snapshots[at].1.clone();
                true
            }
            Deed::Delete(number) => {
                let Some((at, id)) = self.pick(image, *number).await else { return false };
                image.delete_snapshot(&id).await.unwrap();
                self.snapshots.remove(at);
                true
            }
        }
    }

    /// Reads the disk and every snapshot of an image that nobody has open.
    async fn assert_is(&self, shape: &Shape, storage: &MemoryStorage, what: &str) {
        let image = shape.open_read_only(storage).await.unwrap();
        assert!(read_all(&image).await == self.disk, "{what}: the disk");
        image.close().await.unwrap();
        for (id, content) in &self.snapshots {
            let options = OpenOptions::reading().snapshot(id);
            let view = shape.open_with(storage, options).await.unwrap();
            assert!(read_all(&view).await == *content, "{what}: snapshot {id}");
        }
    }
}

async fn run_deeds(shape: &Shape, deeds: &[Deed]) -> (MemoryStorage, Model) {
    let storage = shape.create().await;
    let mut image = shape.open(&storage).await.unwrap();
    let mut model = Model::new(shape);
    for deed in deeds {
        if matches!(deed, Deed::Act(Act::Reopen)) {
            image.close().await.unwrap();
            check(&storage.snapshot()).assert_clean("closed");
            image = shape.open(&storage).await.unwrap();
            continue;
        }
        if model.apply(&image, deed).await {
            check(&storage.snapshot()).assert_clean(&format!("after {deed:?}"));
            assert!(read_all(&image).await == model.disk, "after {deed:?}");
        }
    }
    assert!(read_all(&image).await == model.disk);
    image.close().await.unwrap();
    check(&storage.snapshot()).assert_clean("closed at the end");
    model.assert_is(shape, &storage, "closed at the end").await;
    (storage, model)
}

/// qemu-img lists the snapshots, finds nothing wrong, and reads each the same.
fn qemu_agrees(storage: &MemoryStorage, model: &Model) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    std::fs::write(&path, storage.snapshot()).unwrap();
    let found = qemu_check(&path);
    assert!(found.is_clean(), "{found:?}");
    let listed = qemu_img(&["snapshot", "-l", str(&path)]);
    assert_eq!(
        listed.lines().filter(|line| line.contains(" name ")).count(),
        model.snapshots.len()
    );
    assert!(raw_of(&path) == model.disk);
    for (id, content) in &model.snapshots {
        assert!(raw_of_snapshot(&path, id) == *content, "snapshot {id}");
    }
}

fn imitates_vectors(shape: Shape, cases: u32) {
    let config = Config { cases: rounds(cases), failure_persistence: None, ..Config::default() };
    let seen = Cell::new(0usize);
    let deeds = proptest::collection::vec(any_deed(shape.size_bytes / 512), 1..40);
    let result = TestRunner::new(config).run(&deeds, |deeds| {
        let (storage, model) = block_on(run_deeds(&shape, &deeds));
        seen.set(seen.get() + 1);
        if shape.backing.is_none() && seen.get().is_multiple_of(8) {
            qemu_agrees(&storage, &model);
        }
        Ok(())
    });
    result.unwrap();
}

#[test]
fn snapshots_in_clusters_of_512_bytes_imitate_vectors() {
    imitates_vectors(Shape { size_bytes: 100 << 10, ..Shape::new(512) }, 32);
}

#[test]
fn snapshots_in_clusters_of_4096_bytes_over_a_backing_file_imitate_vectors() {
    imitates_vectors(Shape { size_bytes: 600 << 10, ..Shape::new(4096) }.over_data(), 24);
}

#[test]
fn snapshots_in_clusters_of_64_kib_imitate_vectors() {
    imitates_vectors(Shape { size_bytes: (1 << 20) + 512, ..Shape::new(65536) }, 24);
}
