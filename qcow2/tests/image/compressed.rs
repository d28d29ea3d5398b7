//! Compressed writes: read back by QEMU for every cluster size, algorithm and refcount width, overwritten in every way,
//! and cut off at every moment.

use std::path::Path;

use block::{BlockDevice, Durability, ZeroMode};
use qcow2::{Image, OpenOptions};

use crate::common::{
    block_on, pattern, qemu_check, qemu_create, qemu_img, range, raw_of, read_all,
};

/// A disk of which some clusters shrink much, some little, some not at all, and some are zero.
pub(crate) fn mixed(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = pattern(seed, len);
    for (number, part) in bytes.chunks_mut(9000).enumerate() {
        match (number as u64 + seed) % 4 {
            0 => part.fill(0),
            1 => part.iter_mut().for_each(|byte| *byte &= 3),
            2 => {
                let (word, _) = part.split_at(37.min(part.len()));
                let word = word.to_vec();
                part.iter_mut().zip(word.iter().cycle()).for_each(|(byte, of)| *byte = *of);
            }
            _ => {}
        }
    }
    let zeros = len / 3..len / 3 + len / 8;
    bytes[zeros].fill(0);
    bytes
}

async fn open(path: &Path) -> Image {
    Image::open(path, OpenOptions::writing()).await.unwrap()
}

fn size_of(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().len()
}

fn writes_what_qemu_reads(options: &str, len: usize) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    qemu_create(&path, options, &len.to_string(), None);
    let model = mixed(7, len);
    block_on(async {
        let image = open(&path).await;
        image.write_compressed(0, model.clone().into()).await.unwrap();
        assert!(read_all(&image).await == model, "{options}: before closing");
        image.close().await.unwrap();
    });
    let check = qemu_check(&path);
    assert!(check.is_clean(), "{options}: {check:?}");
    assert!(raw_of(&path) == model, "{options}");
    block_on(async {
        assert!(read_all(&open(&path).await).await == model, "{options}: reopened");
    });
}

#[test]
fn qemu_reads_what_we_compress_in_every_cluster_size() {
    for kind in ["zlib", "zstd"] {
        for cluster in [512, 1024, 4096, 16_384, 65_536, 262_144, 2 << 20] {
            let options = format!("cluster_size={cluster},compression_type={kind}");
            writes_what_qemu_reads(&options, (5 << 20) + 1536);
        }
    }
}

#[test]
fn qemu_reads_what_we_compress_beside_subclusters() {
    for kind in ["zlib", "zstd"] {
        for cluster in [16_384, 65_536, 2 << 20] {
            let options = format!("cluster_size={cluster},compression_type={kind},extended_l2=on");
            writes_what_qemu_reads(&options, (5 << 20) + 512);
        }
    }
}

#[test]
fn refcounts_of_every_width_count_the_streams_of_a_cluster() {
    for bits in [1, 2, 4, 8, 64] {
        let options = format!("cluster_size=65536,refcount_bits={bits}");
        writes_what_qemu_reads(&options, 4 << 20);
    }
    writes_what_qemu_reads("compat=0.10,cluster_size=4096", 4 << 20);
}

#[test]
fn streams_are_packed_as_tightly_as_qemu_packs_them() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, theirs, ours) =
        (dir.path().join("raw"), dir.path().join("theirs"), dir.path().join("ours"));
    let model = mixed(11, 8 << 20);
    std::fs::write(&raw, &model).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", &text(&raw), &text(&theirs)]);
    qemu_create(&ours, "cluster_size=65536", "8M", None);
    block_on(async {
        let image = open(&ours).await;
        image.write_compressed(0, model.into()).await.unwrap();
        image.close().await.unwrap();
    });
    let (ours, theirs) = (size_of(&ours), size_of(&theirs));
    assert!(ours < theirs + theirs / 20, "{ours} bytes, and {theirs} by qemu-img");
}

/// Writes over compressed clusters in all ways and lets QEMU judge.
fn survives_overwriting(options: &str) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let len = 3 << 20;
    qemu_create(&path, options, &len.to_string(), None);
    let mut model = mixed(3, len);
    block_on(async {
        let image = open(&path).await;
        image.write_compressed(0, model.clone().into()).await.unwrap();
        for round in 0..4_u64 {
            if round % 2 == 1 {
                image.flush().await.unwrap();
            }
            let data = pattern(round, 70_000);
            let at = 100_000 + round * 613_000;
            let place = usize::try_from(at).unwrap();
            model[place..place + data.len()].copy_from_slice(&data);
            image.write(at, data.into(), Durability::Deferred).await.unwrap();
            let zeroed = range(at + 200_000, 131_072);
            image.write_zeroes(zeroed, ZeroMode::default(), Durability::Deferred).await.unwrap();
            model[place + 200_000..place + 331_072].fill(0);
            // Compressed again, half of it over compressed clusters of before.
            let again = usize::try_from(round * 262_144).unwrap();
            let data = mixed(round + 20, 524_288);
            model[again..again + data.len()].copy_from_slice(&data);
            image.write_compressed(round * 262_144, data.into()).await.unwrap();
            assert!(read_all(&image).await == model, "{options}: round {round}");
        }
        image.close().await.unwrap();
    });
    let check = qemu_check(&path);
    assert!(check.is_clean(), "{options}: {check:?}");
    assert!(raw_of(&path) == model, "{options}");
}

#[test]
fn compressed_clusters_are_overwritten_without_leaks() {
    for options in [
        "cluster_size=512",
        "cluster_size=4096,compression_type=zstd",
        "cluster_size=65536",
        "cluster_size=65536,extended_l2=on,compression_type=zstd",
        "cluster_size=65536,refcount_bits=2",
        "cluster_size=262144",
    ] {
        survives_overwriting(options);
    }
}

#[test]
fn many_at_once_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let len = 8 << 20;
    qemu_create(&path, "cluster_size=4096", &len.to_string(), None);
    let model = mixed(5, len);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    runtime.block_on(async {
        let image = open(&path).await;
        let tasks: Vec<_> = model
            .chunks(40_960)
            .enumerate()
            .map(|(number, part)| {
                let (image, part) = (image.clone(), bytes::Bytes::copy_from_slice(part));
                tokio::spawn(async move {
                    let at = number as u64 * 40_960;
                    match number % 3 {
                        0 => image.write(at, part, Durability::Deferred).await.unwrap(),
                        1 => image.write_compressed(at, part).await.unwrap(),
                        _ => {
                            // Everybody's clusters of before go, while others are packed.
                            let old = bytes::Bytes::from(mixed(9, part.len()));
                            image.write_compressed(at, old).await.unwrap();
                            image.flush().await.unwrap();
                            image.write_compressed(at, part).await.unwrap();
                        }
                    }
                })
            })
            .collect();
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

#[test]
fn parts_of_clusters_and_read_only_images_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    qemu_create(&path, "cluster_size=4096", "10000", None);
    block_on(async {
        let image = open(&path).await;
        let data = |len: usize| bytes::Bytes::from(vec![1; len]);
        for (at, len) in [(0, 100), (1, 4096), (4096, 4097), (8192, 4096), (u64::MAX, 2)] {
            assert!(image.write_compressed(at, data(len)).await.is_err(), "{len} bytes at {at}");
        }
        image.write_compressed(8192, data(10_240 - 8192)).await.unwrap();
        image.write_compressed(0, data(0)).await.unwrap();
        image.close().await.unwrap();
        let image = Image::open(&path, OpenOptions::reading()).await.unwrap();
        assert!(image.write_compressed(0, data(4096)).await.is_err());
    });
    assert!(qemu_check(&path).is_clean());
}

#[test]
fn bitmaps_record_what_is_compressed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    qemu_create(&path, "cluster_size=65536", "8M", None);
    qemu_img(&["bitmap", "--add", "-g", "65536", path.to_str().unwrap(), "on"]);
    block_on(async {
        let image = open(&path).await;
        // Bytes that shrink, everywhere.
        let data: Vec<u8> = pattern(1, 1 << 20).iter().map(|byte| byte & 7 | 8).collect();
        image.write_compressed(3 << 20, data.into()).await.unwrap();
        image.close().await.unwrap();
        let image = Image::open(&path, OpenOptions::reading()).await.unwrap();
        assert_eq!(crate::bitmaps::dirty(&image, "on").await, [(3 << 20, 4 << 20)]);
    });
    assert!(qemu_check(&path).is_clean());
}
