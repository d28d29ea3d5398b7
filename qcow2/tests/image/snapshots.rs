//! Internal snapshots: those that qemu-img makes, read by us, and those that we make, judged by qemu-img.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use block::{BlockDevice, Durability, MemoryStorage};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use qcow2::{Error, Feature, Image, OpenOptions, SnapshotError};

use crate::check::check;
use crate::common::{
    block_on, pattern, qemu_check, qemu_create, qemu_img, qemu_io, range, raw_of, read_all,
};
use crate::memory::{Act, Shape, any_act, note_discard, part_mut, read};
use crate::rounds::rounds;

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
pub(crate) struct Model {
    pub(crate) disk: Vec<u8>,
    /// Ids and contents.
    pub(crate) snapshots: Vec<(String, Vec<u8>)>,
}

/// One thing that is done to an image with snapshots.
#[derive(Clone, Debug)]
pub(crate) enum Deed {
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
    pub(crate) fn new(shape: &Shape) -> Self {
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
    pub(crate) async fn apply(&mut self, image: &Image, deed: &Deed) -> bool {
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
    pub(crate) async fn assert_is(&self, shape: &Shape, storage: &MemoryStorage, what: &str) {
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

/// Bytes of one writer of [`snapshots_of_a_disk_in_use_are_a_moment_of_it`].
const WRITER_BYTES: u64 = 4096;

/// A cluster that says the same number everywhere.
fn stamp(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(usize::try_from(WRITER_BYTES / 8).unwrap())
}

#[test]
fn snapshots_of_a_disk_in_use_are_a_moment_of_it() {
    const WRITERS: u64 = 8;
    let shape = Shape { size_bytes: 4 * WRITERS * WRITER_BYTES, ..Shape::new(4096) };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).build().unwrap();
    runtime.block_on(async {
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        // What each writer has begun to write, and what has returned.
        let begun: Arc<Vec<AtomicU64>> =
            Arc::new((0..WRITERS).map(|_| AtomicU64::new(0)).collect());
        let done: Arc<Vec<AtomicU64>> = Arc::new((0..WRITERS).map(|_| AtomicU64::new(0)).collect());
        let stop = Arc::new(AtomicBool::new(false));
        let mut writers = Vec::new();
        for writer in 0..WRITERS {
            let (image, begun, done, stop) =
                (image.clone(), begun.clone(), done.clone(), stop.clone());
            writers.push(tokio::spawn(async move {
                let slot = usize::try_from(writer).unwrap();
                let mut number = 0;
                while !stop.load(Ordering::SeqCst) {
                    number += 1;
                    begun[slot].store(number, Ordering::SeqCst);
                    let later = Durability::Deferred;
                    let at = writer * 4 * WRITER_BYTES;
                    image.write(at, stamp(number).into(), later).await.unwrap();
                    done[slot].store(number, Ordering::SeqCst);
                    if number % 4 == writer % 4 {
                        image.flush().await.unwrap();
                    }
                    tokio::task::yield_now().await;
                }
            }));
        }
        let now = |all: &[AtomicU64]| -> Vec<u64> {
            all.iter().map(|one| one.load(Ordering::SeqCst)).collect()
        };
        let mut moments = Vec::new();
        for round in 0..12 {
            let least = now(&done);
            let made = image.create_snapshot("moment").await.unwrap();
            moments.push((made.id, least.clone(), now(&begun)));
            // All of them go on.
            while now(&done).iter().zip(&least).any(|(now, least)| now <= least) {
                tokio::task::yield_now().await;
            }
            if round % 4 == 3 {
                let (id, ..) = moments.remove(1);
                image.delete_snapshot(&id).await.unwrap();
            }
        }
        stop.store(true, Ordering::SeqCst);
        for writer in writers {
            writer.await.unwrap();
        }
        image.close().await.unwrap();
        check(&storage.snapshot()).assert_clean("after writers and snapshots at once");
        for (id, least, most) in moments {
            let options = OpenOptions::reading().snapshot(&id);
            let view = shape.open_with(&storage, options).await.unwrap();
            for writer in 0..WRITERS {
                let read = read(&view, writer * 4 * WRITER_BYTES, WRITER_BYTES).await;
                let number = u64::from_le_bytes(read[..8].try_into().unwrap());
                assert!(read == stamp(number), "snapshot {id} has a part of a write");
                let slot = usize::try_from(writer).unwrap();
                assert!((least[slot]..=most[slot]).contains(&number), "snapshot {id}: {number}");
            }
        }
    });
}

/// Makes, applies and deletes snapshots in an image that holds something, and lets qemu-img judge.
async fn snapshots_work(path: &Path, what: &str) {
    let before = raw_of(path);
    let image = Image::open(path, OpenOptions::writing()).await.unwrap();
    image.create_snapshot("ours").await.unwrap_or_else(|error| panic!("{what}: {error}"));
    let mut now = before.clone();
    for (at, seed) in [(0u64, 1), (100_000, 2), (700_001, 3)] {
        let data = pattern(seed, 30_000);
        part_mut(&mut now, range(at, 30_000)).copy_from_slice(&data);
        image.write(at, data.into(), Durability::Deferred).await.unwrap();
    }
    assert!(read_all(&image).await == now, "{what}: written after the snapshot");
    image.close().await.unwrap();
    assert!(qemu_check(path).is_clean(), "{what}: {:?}", qemu_check(path));
    assert!(raw_of(path) == now && raw_of_snapshot(path, "ours") == before, "{what}");
    assert!(qemu_img(&["snapshot", "-l", str(path)]).contains("ours"), "{what}");

    let image = Image::open(path, OpenOptions::writing()).await.unwrap();
    image.apply_snapshot("ours").await.unwrap();
    assert!(read_all(&image).await == before, "{what}: applied");
    image.write(5, pattern(4, 100_000).into(), Durability::Deferred).await.unwrap();
    image.close().await.unwrap();
    assert!(qemu_check(path).is_clean(), "{what}: {:?}", qemu_check(path));
    assert!(raw_of_snapshot(path, "ours") == before, "{what}: written after applying");

    let image = Image::open(path, OpenOptions::writing()).await.unwrap();
    image.apply_snapshot("ours").await.unwrap();
    image.delete_snapshot("ours").await.unwrap();
    image.close().await.unwrap();
    assert!(qemu_check(path).is_clean(), "{what}: {:?}", qemu_check(path));
    assert!(raw_of(path) == before, "{what}: deleted");
    qemu_io(path, &["write -P 7 0 300k"]);
    assert!(qemu_check(path).is_clean(), "{what}: qemu goes on");
}

#[test]
fn snapshots_work_in_images_of_every_kind() {
    for options in [
        "compat=0.10",
        "compat=1.1,cluster_size=512,refcount_bits=2",
        "compat=1.1,refcount_bits=4",
        "compat=1.1,refcount_bits=8,cluster_size=4096",
        "compat=1.1,refcount_bits=32",
        "compat=1.1,refcount_bits=64,cluster_size=2M",
        "compat=1.1,extended_l2=on",
        "compat=1.1,compression_type=zstd",
        "compat=1.1,lazy_refcounts=on",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (plain, path) = (dir.path().join("plain.qcow2"), dir.path().join("disk.qcow2"));
        qemu_create(&plain, "compat=1.1", "1M", None);
        qemu_io(&plain, &["write -P 1 0 200k", "write -P 2 500k 300k", "write -z 600k 64k"]);
        // Many compressed clusters lie in one: twice as many references do not fit narrow refcounts.
        let narrow = options.ends_with("refcount_bits=2") || options.ends_with("refcount_bits=4");
        for compress in if narrow { &[false][..] } else { &[false, true] } {
            let mut args = vec!["convert", "-f", "qcow2", "-O", "qcow2", "-o", options];
            if *compress {
                args.push("-c");
            }
            args.extend([str(&plain), str(&path)]);
            qemu_img(&args);
            qemu_io(&path, &["write -P 3 90k 70k", "discard 300k 64k"]);
            block_on(snapshots_work(&path, &format!("{options}, compressed: {compress}")));
        }
    }
}

#[test]
fn refcounts_that_cannot_count_a_snapshot_refuse_it_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for (bits, most) in [(1, 0), (2, 2)] {
        let path = dir.path().join(format!("{bits}.qcow2"));
        qemu_create(&path, &format!("compat=1.1,refcount_bits={bits}"), "1M", None);
        qemu_io(&path, &["write -P 1 0 200k"]);
        block_on(async {
            let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
            let mut made = 0;
            let refused = loop {
                match image.create_snapshot("one more").await {
                    Ok(_) => made += 1,
                    Err(error) => break error,
                }
            };
            assert_eq!(made, most);
            let Error::Unsupported { feature: Feature::RefcountTooNarrow { .. }, .. } = refused
            else {
                panic!("{refused}");
            };
            image.write(0, pattern(1, 512).into(), Durability::Durable).await.unwrap();
            image.close().await.unwrap();
            let found = qemu_check(&path);
            assert!(found.is_clean(), "{found:?}");
        });
    }
}

#[test]
fn a_snapshot_brings_back_the_size_that_the_disk_had() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    for (then, now) in [("1M", "600M"), ("600M", "1M")] {
        qemu_create(&path, "compat=1.1", then, None);
        qemu_io(&path, &["write -P 1 0 100k"]);
        qemu_img(&["snapshot", "-c", "then", str(&path)]);
        qemu_img(&["resize", "-q", "--shrink", str(&path), now]);
        qemu_io(&path, &["write -P 2 0 900k"]);
        block_on(async {
            let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
            image.apply_snapshot("then").await.unwrap();
            let bytes = if then == "1M" { 1 << 20 } else { 600 << 20 };
            assert_eq!(image.limits().size_bytes, bytes);
            let written = image.read(range(0, 200 << 10)).await.unwrap().to_vec();
            assert!(written[..100 << 10].iter().all(|byte| *byte == 1));
            assert!(written[100 << 10..].iter().all(|byte| *byte == 0));
            image.write(bytes - 512, vec![5; 512].into(), Durability::Durable).await.unwrap();
            image.close().await.unwrap();
        });
        let found = qemu_check(&path);
        assert!(found.is_clean(), "{found:?}");
        std::fs::remove_file(&path).unwrap();
    }
}
