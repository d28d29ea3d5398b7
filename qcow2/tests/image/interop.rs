//! Images against `qemu-img` and `qemu-io`: ours read by them, theirs read and changed by us.

use crate::common::{
    block_on, pattern, qemu_check, qemu_create, qemu_img, qemu_io, range, raw_of, read_all,
};
use block::{BlockDevice, Durability, ZeroMode};
use qcow2::{BackingFormat, CreateOptions, Image, OpenOptions};

const MIB: u64 = 1 << 20;

#[test]
fn what_we_write_qemu_reads() {
    for cluster_bytes in [512, 4096, 65536, 2 << 20] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        let size = 20 * MIB + 512;
        let mut model = vec![0; usize::try_from(size).unwrap()];
        block_on(async {
            let options = CreateOptions::new(size).cluster_bytes(cluster_bytes);
            Image::create(&path, &options).await.unwrap();
            assert!(qemu_check(&path).is_clean(), "a new image");
            let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
            for (at, len, seed) in [
                (0, 1 << 20, 1),
                (5 * MIB + 1000, 70_000, 2),
                (9 * MIB - 100, 3 << 20, 3),
                (20 * MIB, 512, 4),
                (5 * MIB, 512, 5),
            ] {
                let data = pattern(seed, len);
                let start = usize::try_from(at).unwrap();
                model[start..start + len].copy_from_slice(&data);
                image.write(at, data.into(), Durability::Deferred).await.unwrap();
            }
            image
                .write_zeroes(range(9 * MIB, MIB), ZeroMode::default(), Durability::Deferred)
                .await
                .unwrap();
            model[9 << 20..10 << 20].fill(0);
            assert!(read_all(&image).await == model, "before closing");
            image.close().await.unwrap();
        });
        let check = qemu_check(&path);
        assert!(check.is_clean(), "clusters of {cluster_bytes}: {check:?}");
        assert!(raw_of(&path) == model, "clusters of {cluster_bytes}");
        block_on(async {
            let image = Image::open(&path, OpenOptions::reading()).await.unwrap();
            assert!(read_all(&image).await == model, "reopened");
        });
    }
}

#[test]
fn what_qemu_writes_we_read_and_change() {
    for options in [
        "cluster_size=512",
        "cluster_size=4096",
        "cluster_size=65536",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=64,cluster_size=4k",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        qemu_create(&path, options, "12M", None);
        qemu_io(
            &path,
            &[
                "write -P 17 0 1M",
                "write -P 18 5000k 100k",
                "write -z 64k 128k",
                "discard 512k 128k",
            ],
        );
        let mut model = raw_of(&path);
        block_on(async {
            let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
            assert!(read_all(&image).await == model, "{options}");
            for (at, len, seed) in
                [(100_000, 300_000, 1), (11 << 20, 1 << 20, 2), (2 << 20, 512, 3)]
            {
                let data = pattern(seed, len);
                let start = usize::try_from(at).unwrap();
                model[start..start + len].copy_from_slice(&data);
                image.write(at, data.into(), Durability::Deferred).await.unwrap();
            }
            image.discard(range(0, 65536), Durability::Deferred).await.unwrap();
            model[..65536].copy_from_slice(&image.read(range(0, 65536)).await.unwrap().to_vec());
            image.close().await.unwrap();
        });
        let check = qemu_check(&path);
        assert!(check.is_clean(), "{options}: {check:?}");
        assert!(raw_of(&path) == model, "{options}");
    }
}

#[test]
fn overlays_over_qcow2_and_raw_read_like_qemus() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("base.raw"), pattern(1, 3 << 20)).unwrap();
    block_on(async {
        for (name, size, backing, format) in [
            ("one.qcow2", 5 * MIB, "base.raw", BackingFormat::Raw),
            ("two.qcow2", 2 * MIB + 1024, "one.qcow2", BackingFormat::Qcow2),
            ("three.qcow2", 6 * MIB, "two.qcow2", BackingFormat::Qcow2),
        ] {
            let options = CreateOptions::new(size).backing(backing, format);
            Image::create(&at(name), &options).await.unwrap();
            let image = Image::open(&at(name), OpenOptions::writing()).await.unwrap();
            let data = pattern(size, 100_000);
            image.write(MIB + size / 10, data.into(), Durability::Deferred).await.unwrap();
            image
                .write_zeroes(range(200_000, 200_000), ZeroMode::default(), Durability::Deferred)
                .await
                .unwrap();
            image.close().await.unwrap();
            assert!(qemu_check(&at(name)).is_clean());
            let image = Image::open(&at(name), OpenOptions::reading()).await.unwrap();
            assert!(read_all(&image).await == raw_of(&at(name)), "{name}");
        }
    });
    qemu_img(&[
        "compare",
        at("three.qcow2").to_str().unwrap(),
        at("three.qcow2").to_str().unwrap(),
    ]);
}

#[test]
fn an_overlay_of_qemu_over_our_image_reads_back() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.qcow2");
    let top = dir.path().join("top.qcow2");
    block_on(async {
        Image::create(&base, &CreateOptions::new(4 * MIB)).await.unwrap();
        let image = Image::open(&base, OpenOptions::writing()).await.unwrap();
        image.write(0, pattern(1, 4 << 20).into(), Durability::Deferred).await.unwrap();
        image.close().await.unwrap();
    });
    qemu_create(&top, "cluster_size=64k", "4M", Some("base.qcow2"));
    qemu_io(&top, &["write -P 17 100k 100k", "write -z 1M 1M"]);
    let model = raw_of(&top);
    block_on(async {
        let image = Image::open(&top, OpenOptions::reading()).await.unwrap();
        assert!(read_all(&image).await == model);
        let info = image.info();
        assert_eq!(info.backing.unwrap().name, "base.qcow2");
    });
}

#[test]
fn the_deepest_chain_reads_and_one_more_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: usize| dir.path().join(format!("{n}.qcow2"));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    // On a worker thread: its stack is the small one.
    let deepest = qcow2::MAX_CHAIN_DEPTH;
    let owns = move |n: usize| n < deepest && (n.is_multiple_of(16) || n + 1 == deepest);
    let stripe = |n: usize| pattern(1 + n as u64, 4096);
    let paths: Vec<_> = (0..=deepest).map(at).collect();
    let work = async move {
        for (n, path) in paths.iter().enumerate() {
            let mut options = CreateOptions::new(MIB).cluster_bytes(4096);
            if n > 0 {
                options = options.backing(format!("{}.qcow2", n - 1), BackingFormat::Qcow2);
            }
            Image::create(path, &options).await.unwrap();
            if owns(n) {
                let image = Image::open(path, OpenOptions::writing()).await.unwrap();
                image.write(n as u64 * 4096, stripe(n).into(), Durability::Durable).await.unwrap();
                image.close().await.unwrap();
            }
        }
        let image = Image::open(&paths[paths.len() - 2], OpenOptions::reading()).await.unwrap();
        let read = image.read(range(0, MIB)).await.unwrap().to_vec();
        for (n, found) in read.chunks(4096).enumerate() {
            let expected = if owns(n) { stripe(n) } else { vec![0; 4096] };
            assert!(found == expected, "the stripe of layer {n}");
        }
        let stripes = image.extents(range(0, MIB)).await.unwrap();
        assert_eq!(stripes.iter().filter(|extent| !extent.zero).count(), 17);
        let map = image.map_chain(range(0, MIB)).await.unwrap();
        let owners: Vec<_> = map.iter().filter(|e| e.data).map(|e| deepest - 1 - e.depth).collect();
        assert_eq!(owners, (0..deepest).filter(|n| owns(*n)).collect::<Vec<_>>());
        let deeper = Image::open(&paths[paths.len() - 1], OpenOptions::reading()).await;
        assert!(matches!(deeper, Err(qcow2::Error::Reference { .. })));
    };
    runtime.block_on(async { tokio::spawn(work).await.unwrap() });
}

#[test]
fn many_writers_on_a_real_file_leave_what_qemu_reads() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let size = 48 * MIB;
    let mut model = vec![0; usize::try_from(size).unwrap()];
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).build().unwrap();
    runtime.block_on(async {
        Image::create(&path, &CreateOptions::new(size)).await.unwrap();
        let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
        let mut tasks = Vec::new();
        for n in 0..40u64 {
            // Neighbours share clusters, and nothing is aligned.
            let (at, data) = (n * 1_000_003, pattern(n + 1, 1_000_003));
            let start = usize::try_from(at).unwrap();
            model[start..start + data.len()].copy_from_slice(&data);
            let image = image.clone();
            tasks.push(tokio::spawn(async move {
                image.write(at, data.into(), Durability::Deferred).await.unwrap();
                if n % 8 == 0 {
                    image.flush().await.unwrap();
                }
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        assert!(read_all(&image).await == model);
        image.close().await.unwrap();
    });
    let check = qemu_check(&path);
    assert!(check.is_clean(), "{check:?}");
    assert!(raw_of(&path) == model);
}
