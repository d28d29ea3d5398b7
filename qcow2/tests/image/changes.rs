//! Images that change what they are: the size of the disk, the version, refcounts, names. Against `qemu-img`, and with
//! power cuts at every moment.

use block::{BlockDevice, Durability, HostFile, MemoryDevice, MemoryStorage, ZeroMode};
use qcow2::{
    AmendOptions, BackingFormat, BackingName, ChangeError, Compression, CreateOptions, Error,
    Image, OpenOptions, Preallocation, References, ResizeOptions, Version,
};

use crate::check::check;
use crate::common::{
    block_on, pattern, qemu_check, qemu_create, qemu_img, qemu_io, range, raw_of, read_all,
};
use crate::memory::host;

const MIB: u64 = 1 << 20;

fn change(error: Error) -> ChangeError {
    match error {
        Error::Change { what, .. } => what,
        other => panic!("{other}"),
    }
}

fn shrinking() -> ResizeOptions {
    ResizeOptions { allow_shrinking: true, ..ResizeOptions::default() }
}

#[test]
fn a_disk_that_grows_reads_zeros_behind_whatever_its_backing_file_holds() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base.raw"), vec![7; 5 << 20]).unwrap();
    let path = dir.path().join("disk.qcow2");
    for (version, cluster_bytes, extended) in [
        (Version::V3, 65536, false),
        (Version::V3, 512, false),
        (Version::V3, 16384, true),
        (Version::V2, 4096, false),
    ] {
        let size = 3 * MIB - 1000;
        let options = CreateOptions::new(size)
            .version(version)
            .cluster_bytes(cluster_bytes)
            .extended_l2(extended)
            .backing("base.raw", BackingFormat::Raw);
        block_on(async {
            Image::create(&path, &options).await.unwrap();
            let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
            image.write(size - 5000, pattern(1, 5000).into(), Durability::Deferred).await.unwrap();
            image.resize(9 * MIB, &ResizeOptions::default()).await.unwrap();
            assert_eq!(image.limits().size_bytes, 9 * MIB);
            image.write(8 * MIB, pattern(2, 70000).into(), Durability::Deferred).await.unwrap();
            let mut model = vec![7; 9 << 20];
            let end = usize::try_from(size).unwrap();
            model[end..].fill(0);
            model[end - 5000..end].copy_from_slice(&pattern(1, 5000));
            model[8 << 20..][..70000].copy_from_slice(&pattern(2, 70000));
            assert!(read_all(&image).await == model, "{options:?}");
            image.close().await.unwrap();
            let found = qemu_check(&path);
            assert!(found.is_clean(), "{options:?}: {found:?}");
            assert!(raw_of(&path) == model, "{options:?}");
        });
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn what_was_cut_off_never_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base.raw"), vec![7; 9 << 20]).unwrap();
    let path = dir.path().join("disk.qcow2");
    let base = || Some("base.raw");
    for (cluster_bytes, backing) in [(65536, None), (512, None), (65536, base()), (4096, base())] {
        let mut options = CreateOptions::new(9 * MIB).cluster_bytes(cluster_bytes);
        if let Some(name) = backing {
            options = options.backing(name, BackingFormat::Raw);
        }
        block_on(async {
            Image::create(&path, &options).await.unwrap();
            let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
            let data = pattern(3, 8 << 20);
            image.write(512 * 3, data.clone().into(), Durability::Deferred).await.unwrap();
            let refused = image.resize(MIB, &ResizeOptions::default()).await.map_err(change);
            assert_eq!(refused, Err(ChangeError::Shrinks { from_bytes: 9 * MIB, to_bytes: MIB }));
            let small = MIB + 1536;
            image.resize(small, &shrinking()).await.unwrap();
            image.close().await.unwrap();
            let left = Image::inspect(&path).await.unwrap().allocated_bytes;
            assert!(left < 3 * MIB, "space is given back: {left}");
            assert!(qemu_check(&path).is_clean(), "{cluster_bytes}");
            // Grown by QEMU, which clears nothing, and by us.
            let copy = dir.path().join("copy.qcow2");
            std::fs::copy(&path, &copy).unwrap();
            let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
            image.resize(9 * MIB, &ResizeOptions::default()).await.unwrap();
            let mut model = vec![if backing.is_some() { 7 } else { 0 }; 9 << 20];
            model[1536..][..8 << 20].copy_from_slice(&data);
            model[usize::try_from(small).unwrap()..].fill(0);
            assert!(read_all(&image).await == model, "{cluster_bytes} {backing:?}");
            image.close().await.unwrap();
            assert!(qemu_check(&path).is_clean());
            qemu_img(&["resize", "-q", "-f", "qcow2", copy.to_str().unwrap(), "9M"]);
            assert!(raw_of(&copy) == model, "{cluster_bytes} {backing:?}");
        });
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn growth_makes_in_advance_what_it_is_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    for preallocation in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        for (cluster_bytes, extended) in [(4096, false), (65536, true)] {
            block_on(async {
                let options =
                    CreateOptions::new(MIB).cluster_bytes(cluster_bytes).extended_l2(extended);
                Image::create(&path, &options).await.unwrap();
                let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
                let how = ResizeOptions { preallocation, ..ResizeOptions::default() };
                image.resize(4 * MIB, &how).await.unwrap();
                assert!(read_all(&image).await.iter().all(|byte| *byte == 0));
                let extents = image.extents(range(MIB, 3 * MIB)).await.unwrap();
                assert!(extents.iter().all(|extent| extent.allocated), "{extents:?}");
                image.close().await.unwrap();
                assert!(std::fs::metadata(&path).unwrap().len() > 3 * MIB);
                let found = qemu_check(&path);
                assert!(found.is_clean(), "{preallocation:?} {found:?}");
            });
            std::fs::remove_file(&path).unwrap();
        }
    }
}

#[test]
fn what_is_made_in_advance_reads_as_zeros_where_others_left_their_bytes() {
    for preallocation in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        for can_punch in [true, false] {
            block_on(async {
                let storage = MemoryStorage::new();
                if !can_punch {
                    storage.without_fallocate();
                }
                let options = CreateOptions::new(4 * MIB).cluster_bytes(4096);
                Image::create_on(&host(&storage), &options).await.unwrap();
                let open = || Image::open_on(host(&storage), None, OpenOptions::writing());
                let image = open().await.unwrap();
                let data = pattern(7, 3 << 20);
                image.write(MIB, data.into(), Durability::Durable).await.unwrap();
                // Behind it, so that the file keeps its length.
                image.write(0, vec![9; 4096].into(), Durability::Durable).await.unwrap();
                image.discard(range(MIB, 3 * MIB), Durability::Durable).await.unwrap();
                image.close().await.unwrap();
                let before = storage.snapshot().len() as u64;
                let image = open().await.unwrap();
                let how = ResizeOptions { preallocation, ..ResizeOptions::default() };
                // Ends inside a cluster.
                image.resize(6 * MIB + 512, &how).await.unwrap();
                let disk = read_all(&image).await;
                assert!(disk[4096..].iter().all(|byte| *byte == 0), "{preallocation:?}");
                let area = range(4 * MIB, 2 * MIB + 512);
                let extents = image.extents(area).await.unwrap();
                assert!(extents.iter().all(|extent| extent.allocated), "{extents:?}");
                image.close().await.unwrap();
                let after = storage.snapshot();
                assert!((after.len() as u64) < before + MIB, "{before}: nothing is used again");
                let found = check(&after);
                found.assert_clean(&format!("{preallocation:?} {can_punch}"));
            });
        }
    }
}

#[test]
fn sizes_that_cannot_be_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let resize = |size, options: ResizeOptions| {
        block_on(async {
            let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
            let done = image.resize(size, &options).await.map_err(change);
            image.close().await.unwrap();
            done
        })
    };
    qemu_create(&path, "compat=0.10,cluster_size=512", "1M", None);
    assert_eq!(
        resize((128 << 30) + 1, ResizeOptions::default()),
        Err(ChangeError::SizeBytes { size_bytes: (128 << 30) + 1, limit_bytes: 128 << 30 })
    );
    let prepared = ResizeOptions { preallocation: Preallocation::Full, allow_shrinking: true };
    assert_eq!(resize(1000, prepared), Err(ChangeError::PreallocationWithoutGrowth));
    qemu_img(&["snapshot", "-c", "s", path.to_str().unwrap()]);
    assert_eq!(resize(2 * MIB, ResizeOptions::default()), Err(ChangeError::SnapshotsInVersion2));
    std::fs::remove_file(&path).unwrap();
    qemu_create(&path, "cluster_size=4096", "1M", None);
    qemu_io(&path, &["write -P 5 0 1M"]);
    qemu_img(&["snapshot", "-c", "s", path.to_str().unwrap()]);
    // In version 3 a snapshot knows its size.
    assert_eq!(resize(9 * MIB, ResizeOptions::default()), Ok(()));
    assert_eq!(resize(4096, shrinking()), Ok(()));
    assert!(qemu_check(&path).is_clean());
    qemu_img(&["snapshot", "-a", "s", path.to_str().unwrap()]);
    assert_eq!(raw_of(&path), vec![5; 1 << 20]);
}

#[test]
fn a_disk_of_64_tib_shrinks_and_grows_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    block_on(async {
        Image::create(&path, &CreateOptions::new(MIB)).await.unwrap();
        let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
        image.resize(64 << 40, &ResizeOptions::default()).await.unwrap();
        image.write((64 << 40) - 4096, pattern(1, 4096).into(), Durability::Durable).await.unwrap();
        image.resize(MIB, &shrinking()).await.unwrap();
        image.resize(64 << 40, &ResizeOptions::default()).await.unwrap();
        let end = image.read(range((64 << 40) - 4096, 4096)).await.unwrap().to_vec();
        assert!(end.iter().all(|byte| *byte == 0));
        image.close().await.unwrap();
    });
    assert!(qemu_check(&path).is_clean());
}

/// After a power cut at any moment of a change the image is consistent, its size is one of `sizes`, and the bytes
/// below `kept` are what they were.
async fn survives_cuts(
    storage: &MemoryStorage,
    backing: Option<&[u8]>,
    from: usize,
    sizes: [u64; 2],
    kept: &[u8],
) {
    for ops in from..=storage.log_len() {
        for seed in 0..3 {
            let left = storage.crash_image_seeded(ops, seed + ops as u64 * 31);
            check(&left.snapshot()).assert_consistent(&format!("cut after {ops}"));
            let device = backing.map(|bytes| MemoryDevice::read_only(bytes.to_vec()) as _);
            let image = Image::open_on(host(&left), device, OpenOptions::reading()).await.unwrap();
            let size = image.limits().size_bytes;
            assert!(sizes.contains(&size), "{size}");
            let now = read_all(&image).await;
            let common = kept.len().min(now.len());
            assert!(now[..common] == kept[..common], "cut after {ops}, seed {seed}");
            if size > kept.len() as u64 {
                assert!(now[common..].iter().all(|byte| *byte == 0), "cut after {ops}");
            }
        }
    }
}

#[test]
fn growing_and_shrinking_survive_every_power_cut() {
    for over in [false, true] {
        block_on(async {
            let below = over.then(|| pattern(9, 200 << 10));
            let device = || below.clone().map(|bytes| MemoryDevice::read_only(bytes) as _);
            let mut options = CreateOptions::new(60 << 10).cluster_bytes(512);
            if over {
                options = options.backing("below", BackingFormat::Raw);
            }
            let storage = MemoryStorage::with_alignment(512);
            Image::create_on(&host(&storage), &options).await.unwrap();
            let storage = MemoryStorage::from_bytes(storage.snapshot(), 512);
            storage.without_fallocate();
            let image =
                Image::open_on(host(&storage), device(), OpenOptions::writing()).await.unwrap();
            image.write(1000, pattern(1, 50_000).into(), Durability::Durable).await.unwrap();
            let kept = read_all(&image).await;
            let from = storage.log_len();
            // A longer L1 table: one cluster of it maps 2 MiB.
            image.resize(5 << 20, &ResizeOptions::default()).await.unwrap();
            survives_cuts(&storage, below.as_deref(), from, [60 << 10, 5 << 20], &kept).await;
            let from = storage.log_len();
            image.resize(20 << 10, &shrinking()).await.unwrap();
            let kept = &kept[..20 << 10];
            // What is to be cut off may read as zeros already.
            for ops in from..=storage.log_len() {
                let left = storage.crash_image_seeded(ops, ops as u64);
                check(&left.snapshot()).assert_consistent("while it shrinks");
                let image =
                    Image::open_on(host(&left), device(), OpenOptions::reading()).await.unwrap();
                assert!([20 << 10, 5 << 20].contains(&image.limits().size_bytes));
                assert!(read_all(&image).await[..20 << 10] == *kept);
            }
            image.close().await.unwrap();
            check(&storage.snapshot()).assert_clean("resized");
        });
    }
}

#[test]
fn growth_that_is_made_in_advance_survives_every_power_cut() {
    const GROWN: u64 = (150 << 10) + 512;
    for mode in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        for (over, can_punch) in [(false, false), (true, false), (false, true)] {
            block_on(async {
                let below = over.then(|| pattern(9, 200 << 10));
                let device = || below.clone().map(|bytes| MemoryDevice::read_only(bytes) as _);
                let mut options = CreateOptions::new(220 << 10).cluster_bytes(4096);
                if over {
                    options = options.backing("below", BackingFormat::Raw);
                }
                let storage = MemoryStorage::with_alignment(512);
                Image::create_on(&host(&storage), &options).await.unwrap();
                if !can_punch {
                    storage.without_fallocate();
                }
                let open = || Image::open_on(host(&storage), device(), OpenOptions::writing());
                let image = open().await.unwrap();
                // What the new area gets was somebody else's once.
                let data = pattern(3, 160 << 10);
                image.write(60 << 10, data.into(), Durability::Durable).await.unwrap();
                image.write(1000, pattern(1, 50_000).into(), Durability::Durable).await.unwrap();
                image.resize(61_000 / 512 * 512, &shrinking()).await.unwrap();
                image.close().await.unwrap();
                let image = open().await.unwrap();
                let kept = read_all(&image).await;
                let from = storage.log_len();
                let how = ResizeOptions { preallocation: mode, ..ResizeOptions::default() };
                image.resize(GROWN, &how).await.unwrap();
                let sizes = [kept.len() as u64, GROWN];
                survives_cuts(&storage, below.as_deref(), from, sizes, &kept).await;
                image.close().await.unwrap();
                check(&storage.snapshot()).assert_clean("grown");
            });
        }
    }
}

#[test]
fn an_amended_image_is_what_qemu_says_and_reads_the_same() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base.raw"), vec![7; 3 << 20]).unwrap();
    let path = dir.path().join("disk.qcow2");
    let options = CreateOptions::new(5 * MIB).backing("base.raw", BackingFormat::Raw);
    block_on(Image::create(&path, &options)).unwrap();
    qemu_io(&path, &["write -P 1 100k 1M", "write -z 2M 300k", "write -z 4M 100k"]);
    let model = raw_of(&path);
    let none = AmendOptions::default;
    for (amend, compat, bits, lazy) in [
        (AmendOptions { refcount_bits: Some(64), ..none() }, "1.1", 64, Some(false)),
        (AmendOptions { lazy_refcounts: Some(true), ..none() }, "1.1", 64, Some(true)),
        (
            AmendOptions { version: Some(Version::V2), refcount_bits: Some(16), ..none() },
            "0.10",
            16,
            None,
        ),
        (none(), "0.10", 16, None),
        (
            AmendOptions {
                version: Some(Version::V3),
                refcount_bits: Some(1),
                lazy_refcounts: Some(true),
                ..none()
            },
            "1.1",
            1,
            Some(true),
        ),
        (AmendOptions { lazy_refcounts: Some(false), ..none() }, "1.1", 1, Some(false)),
    ] {
        block_on(async {
            let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
            image.amend(&amend).await.unwrap();
            assert!(read_all(&image).await == model, "{amend:?}");
            image.close().await.unwrap();
        });
        let found = qemu_check(&path);
        assert!(found.is_clean(), "{amend:?}: {found:?}");
        let text = qemu_img(&["info", "--output=json", path.to_str().unwrap()]);
        let info: serde_json::Value = serde_json::from_str(&text).unwrap();
        let data = &info["format-specific"]["data"];
        assert_eq!((&data["compat"], &data["refcount-bits"]), (&compat.into(), &bits.into()));
        assert_eq!(data.get("lazy-refcounts").and_then(serde_json::Value::as_bool), lazy);
        assert!(raw_of(&path) == model, "{amend:?}");
    }
}

#[test]
fn what_version_2_has_not_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let new = || CreateOptions::new(MIB);
    for options in [new().extended_l2(true), new().refcount_bits(8), new().data_file("data", false)]
    {
        block_on(async {
            Image::create(&path, &options).await.unwrap();
            let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
            let amend = AmendOptions { version: Some(Version::V2), ..AmendOptions::default() };
            let refused = image.amend(&amend).await.map_err(change);
            assert!(matches!(refused, Err(ChangeError::NotInVersion2 { .. })), "{refused:?}");
            let raw = AmendOptions { data_file_raw: Some(true), ..AmendOptions::default() };
            assert_eq!(image.amend(&raw).await.map_err(change), Err(ChangeError::MakeRaw));
            image.close().await.unwrap();
        });
        std::fs::remove_file(&path).unwrap();
    }
}

/// The disk as a snapshot has it, as QEMU reads it.
fn raw_of_snapshot(path: &std::path::Path, name: &str) -> Vec<u8> {
    let raw = path.with_extension("snapshot.raw");
    let (from, to) = (path.to_str().unwrap(), raw.to_str().unwrap());
    qemu_img(&["convert", "-l", name, "-O", "raw", from, to]);
    std::fs::read(&raw).unwrap()
}

async fn downgrade(path: &std::path::Path) -> Result<(), Error> {
    let image = Image::open(path, OpenOptions::writing()).await.unwrap();
    let amend = AmendOptions { version: Some(Version::V2), ..AmendOptions::default() };
    let done = image.amend(&amend).await;
    image.close().await.unwrap();
    done
}

#[test]
fn zeros_of_disk_and_snapshots_become_data_only_where_a_backing_file_needs_it() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base.raw"), vec![7; 1 << 20]).unwrap();
    let path = dir.path().join("disk.qcow2");
    let name = path.to_str().unwrap();
    for (over, cluster_bytes) in [(false, 512), (false, 65536), (true, 4096), (true, 65536)] {
        let mut options = CreateOptions::new(4 * MIB).cluster_bytes(cluster_bytes);
        if over {
            options = options.backing("base.raw", BackingFormat::Raw);
        }
        block_on(Image::create(&path, &options)).unwrap();
        qemu_io(&path, &["write -P 1 100k 300k", "write -z 200k 200k", "write -z 3M 500k"]);
        qemu_img(&["snapshot", "-c", "a", name]);
        qemu_img(&["snapshot", "-c", "b", name]);
        qemu_io(&path, &["write -P 2 0 64k", "write -z -u 128k 128k", "write -P 3 3M 64k"]);
        qemu_img(&["snapshot", "-c", "c", name]);
        qemu_io(&path, &["write -P 4 600k 64k", "write -z 700k 64k"]);
        let all = || ["a", "b", "c"].map(|one| raw_of_snapshot(&path, one));
        let (model, snapshots) = (raw_of(&path), all());
        let before = block_on(Image::inspect(&path)).unwrap().allocated_bytes;
        block_on(downgrade(&path)).unwrap();
        let after = block_on(Image::inspect(&path)).unwrap().allocated_bytes;
        let text = qemu_img(&["info", "--output=json", name]);
        assert!(text.contains("\"compat\": \"0.10\""), "{text}");
        let found = qemu_check(&path);
        assert!(found.is_clean(), "{cluster_bytes} {over}: {found:?}");
        assert!(raw_of(&path) == model, "{cluster_bytes} {over}");
        assert!(all() == snapshots, "{cluster_bytes} {over}");
        // What lies behind the end of the backing file needs no data either.
        let room = if over { 3 * MIB } else { MIB };
        assert!(after < before + room, "{cluster_bytes} {over}: {before} and {after}");
        // It goes on, in both programs.
        qemu_io(&path, &["write -P 9 100k 100k"]);
        block_on(async {
            let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
            image.write(300_000, vec![8; 5000].into(), Durability::Deferred).await.unwrap();
            image.delete_snapshot("b").await.unwrap();
            image.close().await.unwrap();
        });
        let found = qemu_check(&path);
        assert!(found.is_clean(), "{cluster_bytes} {over}: {found:?}");
        assert!(raw_of_snapshot(&path, "a") == snapshots[0]);
        assert!(raw_of_snapshot(&path, "c") == snapshots[2]);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_downgrade_is_refused_for_what_qemu_refuses_it_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let zstd = CreateOptions::new(MIB).compression(Compression::Zstd);
    block_on(async {
        Image::create(&path, &zstd).await.unwrap();
        downgrade(&path).await.unwrap();
    });
    assert!(qemu_check(&path).is_clean());
    std::fs::remove_file(&path).unwrap();
    block_on(async {
        Image::create(&path, &zstd).await.unwrap();
        let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
        image.write_compressed(0, vec![5; 65536].into()).await.unwrap();
        image.close().await.unwrap();
        let refused = downgrade(&path).await.map_err(change);
        assert!(matches!(refused, Err(ChangeError::NotInVersion2 { .. })), "{refused:?}");
    });
    assert!(qemu_check(&path).is_clean(), "what was begun leaves nothing behind");
    std::fs::remove_file(&path).unwrap();
    block_on(async {
        Image::create(&path, &CreateOptions::new(MIB)).await.unwrap();
        let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
        image.create_snapshot("small").await.unwrap();
        image.resize(2 * MIB, &ResizeOptions::default()).await.unwrap();
        image.close().await.unwrap();
        let refused = downgrade(&path).await.map_err(change);
        assert!(matches!(refused, Err(ChangeError::NotInVersion2 { .. })), "{refused:?}");
    });
}

#[test]
fn a_downgrade_survives_every_power_cut() {
    block_on(async {
        let below = pattern(9, 30 << 10);
        let device = || Some(MemoryDevice::read_only(below.clone()) as _);
        let options =
            CreateOptions::new(60 << 10).cluster_bytes(512).backing("below", BackingFormat::Raw);
        let storage = MemoryStorage::with_alignment(512);
        Image::create_on(&host(&storage), &options).await.unwrap();
        let storage = MemoryStorage::from_bytes(storage.snapshot(), 512);
        storage.without_fallocate();
        let image = Image::open_on(host(&storage), device(), OpenOptions::writing()).await.unwrap();
        let zeros =
            |at, len| image.write_zeroes(range(at, len), ZeroMode::default(), Durability::Deferred);
        image.write(1000, pattern(1, 20_000).into(), Durability::Durable).await.unwrap();
        zeros(5000, 20_000).await.unwrap();
        image.create_snapshot("s").await.unwrap();
        image.create_snapshot("t").await.unwrap();
        zeros(26_000, 9000).await.unwrap();
        image.flush().await.unwrap();
        let disk = read_all(&image).await;
        let from = storage.log_len();
        let amend = AmendOptions { version: Some(Version::V2), ..AmendOptions::default() };
        image.amend(&amend).await.unwrap();
        let mut versions = [0, 0];
        for ops in from..=storage.log_len() {
            for seed in 0..3 {
                let left = storage.crash_image_seeded(ops, seed + ops as u64 * 31);
                let bytes = left.snapshot();
                check(&bytes).assert_consistent(&format!("cut after {ops}"));
                versions[usize::from(bytes[7]) - 2] += 1;
                for (snapshot, part) in [(None, 60 << 10), (Some("s"), 26_000), (Some("t"), 26_000)]
                {
                    let mut options = OpenOptions::reading();
                    if let Some(name) = snapshot {
                        options = options.snapshot(name);
                    }
                    let image = Image::open_on(host(&left), device(), options).await.unwrap();
                    assert!(read_all(&image).await[..part] == disk[..part], "cut after {ops}");
                }
            }
        }
        assert!(versions.iter().all(|times| *times > 0), "{versions:?}");
        image.close().await.unwrap();
        check(&storage.snapshot()).assert_clean("downgraded");
    });
}

#[test]
fn another_backing_file_is_recorded_without_touching_anything_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    for options in ["compat=0.10", "compat=1.1", "cluster_size=512"] {
        qemu_create(&path, options, "1M", None);
        let names = ["a".to_owned(), "b".repeat(100), "folder/".repeat(40)];
        for name in names.iter().chain([&"c".to_owned()]) {
            let name =
                if options == "cluster_size=512" { &name[..name.len().min(60)] } else { name };
            let backing = BackingName { path: name.to_owned(), format: BackingFormat::Qcow2 };
            block_on(Image::set_backing(&path, Some(&backing))).unwrap();
            let text = qemu_img(&["info", "--output=json", "-f", "qcow2", path.to_str().unwrap()]);
            let info: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(info["backing-filename"], name);
            assert_eq!(info["backing-filename-format"], "qcow2");
        }
        block_on(Image::set_backing(&path, None)).unwrap();
        assert_eq!(block_on(Image::inspect(&path)).unwrap().info.backing, None);
        assert!(qemu_check(&path).is_clean());
        std::fs::remove_file(&path).unwrap();
    }
    let bad = BackingName { path: "x".repeat(1024), format: BackingFormat::Raw };
    qemu_create(&path, "compat=1.1", "1M", None);
    assert_eq!(
        block_on(Image::set_backing(&path, Some(&bad))).map_err(change),
        Err(ChangeError::Name { len: 1024, limit: 1023 })
    );
}

#[test]
fn an_external_data_file_holds_the_disk_and_is_confined_like_a_backing_file() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("images");
    std::fs::create_dir(&folder).unwrap();
    let path = folder.join("disk.qcow2");
    let data = folder.join("disk.data");
    for raw in [false, true] {
        block_on(async {
            let options = CreateOptions::new(3 * MIB).data_file("disk.data", raw);
            Image::create(&path, &options).await.unwrap();
            let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
            let mut model = vec![0; 5 << 20];
            let later = Durability::Deferred;
            for (at, len, seed) in [(1000, 100_000, 1), (2 << 20, 1 << 20, 2)] {
                let bytes = pattern(seed, len);
                model[at..at + len].copy_from_slice(&bytes);
                image.write(at as u64, bytes.into(), later).await.unwrap();
            }
            image.write_zeroes(range(50_000, 20_000), Default::default(), later).await.unwrap();
            model[50_000..70_000].fill(0);
            image.write(80_000, vec![0; 65536].into(), later).await.unwrap();
            model[80_000..80_000 + 65536].fill(0);
            image.write_zeroes(range(5 << 19, 1 << 18), Default::default(), later).await.unwrap();
            model[5 << 19..][..1 << 18].fill(0);
            image.resize(5 * MIB, &ResizeOptions::default()).await.unwrap();
            image.write(4 * MIB, pattern(3, 5000).into(), later).await.unwrap();
            model[4 << 20..][..5000].copy_from_slice(&pattern(3, 5000));
            assert!(read_all(&image).await == model, "raw {raw}");
            image.close().await.unwrap();
            if raw {
                assert!(std::fs::read(&data).unwrap() == model, "the data file is the disk");
            }
            let image = Image::open(&path, OpenOptions::reading()).await.unwrap();
            assert!(read_all(&image).await == model, "raw {raw}");
            image.close().await.unwrap();
            let spec = format!(
                "json:{{\"driver\":\"qcow2\",\"file\":{{\"driver\":\"file\",\"filename\":\"{}\"}},\
                 \"data-file\":{{\"driver\":\"file\",\"filename\":\"{}\"}}}}",
                path.display(),
                data.display()
            );
            qemu_img(&["check", &spec]);
            let copy = dir.path().join("copy.raw");
            qemu_img(&["convert", "-O", "raw", &spec, copy.to_str().unwrap()]);
            assert!(std::fs::read(&copy).unwrap() == model);
        });
        std::fs::remove_file(&path).unwrap();
        std::fs::rename(&data, dir.path().join("outside.data")).unwrap();
        let outside = dir.path().join("outside.data");
        block_on(async {
            let options = CreateOptions::new(5 * MIB).data_file("../outside2.data", raw);
            Image::create(&path, &options).await.unwrap();
            let refused = Image::open(&path, OpenOptions::reading()).await.map(drop);
            assert!(matches!(refused, Err(Error::Reference { .. })), "{refused:?}");
            let wide = References::Under(dir.path().to_owned());
            let image = Image::open(&path, OpenOptions::reading().references(wide)).await.unwrap();
            image.close().await.unwrap();
            let given = OpenOptions::reading().data_file(&outside);
            Image::open(&path, given).await.unwrap().close().await.unwrap();
        });
        std::fs::remove_file(dir.path().join("outside2.data")).unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn data_files_that_may_not_be_are_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let open = || block_on(Image::open(&path, OpenOptions::writing())).map(drop);
    let fifo = dir.path().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    std::fs::create_dir(dir.path().join("folder")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
    let data = dir.path().join("first");
    let options = CreateOptions::new(MIB).data_file("first", false);
    block_on(Image::create(&path, &options)).unwrap();
    let amend = |name: &str| {
        block_on(async {
            let given = OpenOptions::writing().data_file(&data);
            let image = Image::open(&path, given).await.unwrap();
            let to = AmendOptions { data_file: Some(name.to_owned()), ..Default::default() };
            let done = image.amend(&to).await;
            image.close().await.unwrap();
            done
        })
    };
    for name in ["json:{}", "nbd:x:1", "nbd://x/y"] {
        let refused = amend(name);
        let what = ChangeError::Protocol(name.to_owned());
        assert!(matches!(refused, Err(Error::Change { what: found, .. }) if found == what));
        open().unwrap();
    }
    for name in ["fifo", "folder", "link", "/etc/passwd", "/dev/null", "disk.qcow2"] {
        amend(name).unwrap();
        let refused = open();
        assert!(matches!(refused, Err(Error::Reference { .. })), "{name}: {refused:?}");
    }
    amend("first").unwrap();
    open().unwrap();
    // A data file for an image that has none.
    let plain = dir.path().join("plain.qcow2");
    block_on(Image::create(&plain, &CreateOptions::new(MIB))).unwrap();
    let given = OpenOptions::reading().data_file(&data);
    let refused = block_on(Image::open(&plain, given)).map(drop);
    assert!(matches!(refused, Err(Error::Reference { .. })));
    let file = block_on(HostFile::open(&data, block::OpenOptions::reading())).unwrap();
    let refused = block_on(Image::create_with_data(&file, Some(&file), &CreateOptions::new(MIB)));
    assert!(matches!(refused, Err(Error::Invalid { .. })));
}

#[test]
fn lazy_refcounts_are_dirty_while_they_change_and_counted_anew_after_a_crash() {
    block_on(async {
        let options = CreateOptions::new(200 << 10).cluster_bytes(512).lazy_refcounts(true);
        let storage = MemoryStorage::with_alignment(512);
        Image::create_on(&host(&storage), &options).await.unwrap();
        let storage = MemoryStorage::from_bytes(storage.snapshot(), 512);
        storage.without_fallocate();
        let dirty = |storage: &MemoryStorage| storage.snapshot()[79] & 1 == 1;
        let image = Image::open_on(host(&storage), None, OpenOptions::writing()).await.unwrap();
        assert!(!dirty(&storage), "nothing has changed");
        let mut moments = vec![(0, vec![0; 200 << 10])];
        for n in 0..6u64 {
            let mut model = moments.last().unwrap().1.clone();
            let at = usize::try_from(n * 30_000).unwrap();
            model[at..at + 20_000].copy_from_slice(&pattern(n + 1, 20_000));
            let bytes = pattern(n + 1, 20_000);
            image.write(n * 30_000, bytes.into(), Durability::Durable).await.unwrap();
            assert!(dirty(&storage));
            moments.push((storage.log_len(), model));
        }
        for ops in 0..=storage.log_len() {
            let left = storage.crash_image_seeded(ops, ops as u64);
            let was_dirty = dirty(&left);
            let image = Image::open_on(host(&left), None, OpenOptions::writing()).await.unwrap();
            assert!(!image.info().is_dirty, "repaired while it was opened");
            let now = read_all(&image).await;
            let first = moments.iter().rposition(|(durable, _)| *durable <= ops).unwrap();
            for (n, sector) in now.chunks(512).enumerate() {
                let at = n * 512;
                let mut allowed = moments[first..].iter().take(2);
                assert!(allowed.any(|(_, model)| model[at..at + sector.len()] == *sector));
            }
            image.write(100, pattern(9, 3000).into(), Durability::Durable).await.unwrap();
            image.close().await.unwrap();
            assert!(!dirty(&left));
            if was_dirty {
                check(&left.snapshot()).assert_clean(&format!("cut after {ops}"));
            }
        }
        image.close().await.unwrap();
        assert!(!dirty(&storage));
        check(&storage.snapshot()).assert_clean("closed");
    });
}
