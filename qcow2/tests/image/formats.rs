//! Images in all shapes that the format has, made by `qemu-img` and `qemu-io`: we read what they hold, change it in
//! every way, and `qemu-img` reads back what we meant and finds nothing to complain about.

use std::path::Path;

use block::{BlockDevice, ByteRange, Durability, ZeroMode};
use qcow2::{Image, LayerState, OpenOptions};

use crate::common::{
    block_on, pattern, qemu_check, qemu_create, qemu_img, qemu_io, range, raw_of, read_all,
};
use crate::crowd::Random;
use crate::memory::{note_discard, part, part_mut};
use crate::rounds::rounds;

/// A disk of `len` bytes in which data that compresses, data that does not, and zeros take turns.
fn mixed(len: usize) -> Vec<u8> {
    let mut disk = Vec::new();
    let mut n = 0u64;
    while disk.len() < len {
        match n % 5 {
            0 => disk.extend(pattern(n + 1, 70_000)),
            1 => disk.extend(vec![0; 150_000]),
            2 => disk.extend((0..20_000u32).flat_map(|word| (word / 7).to_le_bytes())),
            3 => disk.extend(vec![0x5a; 3_000]),
            _ => disk.extend(b"the same words again and again, ".repeat(4_000)),
        }
        n += 1;
    }
    disk.truncate(len);
    disk
}

/// An image that `qemu-img convert` has made, and the disk in it.
fn converted(
    dir: &Path,
    options: &str,
    compressed: bool,
    len: usize,
) -> (std::path::PathBuf, Vec<u8>) {
    let disk = mixed(len);
    let (raw, path) = (dir.join("disk.raw"), dir.join("disk.qcow2"));
    std::fs::write(&raw, &disk).unwrap();
    let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
    if compressed {
        args.push("-c");
    }
    args.extend([raw.to_str().unwrap(), path.to_str().unwrap()]);
    qemu_img(&args);
    (path, disk)
}

/// Does some of everything to an image and to its model.
async fn change(image: &Image, model: &mut [u8], random: &mut Random, acts: usize) {
    let size = image.limits().size_bytes;
    for n in 0..acts {
        let at = random.below(size);
        let longest = [700, 9_000, 200_000][usize::try_from(random.below(3)).unwrap()];
        let mut place = ByteRange::between(at, (at + 1 + random.below(longest)).min(size));
        if random.below(2) == 0 {
            place = place.widen(512).intersection(range(0, size));
        }
        let len = usize::try_from(place.len()).unwrap();
        let kind = random.below(10);
        match kind {
            0..=4 => {
                let data = pattern(random.below(1 << 40), len);
                part_mut(model, place).copy_from_slice(&data);
                image.write(place.start(), data.into(), Durability::Deferred).await.unwrap();
            }
            5 => {
                part_mut(model, place).fill(0);
                image
                    .write(place.start(), vec![0; len].into(), Durability::Deferred)
                    .await
                    .unwrap();
            }
            6 | 7 => {
                part_mut(model, place).fill(0);
                let mode = ZeroMode { keep_allocated: kind == 7, fast_only: false };
                image.write_zeroes(place, mode, Durability::Deferred).await.unwrap();
            }
            8 => {
                image.discard(place, Durability::Deferred).await.unwrap();
                let now = image.read(place).await.unwrap().to_vec();
                note_discard(model, place, &now, &format!("discard {place}"));
            }
            _ => image.flush().await.unwrap(),
        }
        let around = place.widen(4096).intersection(range(0, size));
        let now = image.read(around).await.unwrap().to_vec();
        assert!(now == part(model, around), "act {n}, kind {kind}, at {place}");
    }
}

/// Reads, changes, closes and reopens an image, with `qemu-img` looking on.
fn lives(path: &Path, mut model: Vec<u8>, seed: u64, what: &str) {
    block_on(async {
        for session in 0..2 {
            let image = Image::open(path, OpenOptions::writing()).await.unwrap();
            assert!(read_all(&image).await == model, "{what}, session {session}: as it was");
            let mut random = Random(seed * 31 + session);
            change(&image, &mut model, &mut random, 40).await;
            assert!(read_all(&image).await == model, "{what}, session {session}: changed");
            image.close().await.unwrap();
            let found = qemu_check(path);
            assert!(found.is_clean(), "{what}, session {session}: {found:?}");
        }
    });
    // QEMU rounds odd sizes up.
    let mut by_qemu = raw_of(path);
    by_qemu.truncate(model.len());
    assert!(by_qemu == model, "{what}: as qemu reads it");
}

const CONFIGURATIONS: [&str; 12] = [
    "cluster_size=512",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=64k,refcount_bits=64",
    "cluster_size=2M,refcount_bits=8",
    "cluster_size=512,compat=0.10",
    "cluster_size=64k,compat=0.10",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=64k,extended_l2=on,refcount_bits=2",
    "cluster_size=2M,extended_l2=on",
    "cluster_size=4k,compression_type=zstd",
    "cluster_size=64k,compression_type=zstd,extended_l2=on",
    "cluster_size=64k,preallocation=metadata,refcount_bits=32",
];

#[test]
fn what_qemu_converts_we_read_and_change() {
    for (n, options) in CONFIGURATIONS.iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let (path, disk) = converted(dir.path(), options, false, 3_500_000 / 512 * 512);
        lives(&path, disk, n as u64, options);
    }
}

#[test]
fn what_qemu_compresses_we_read_and_change() {
    for (n, options) in CONFIGURATIONS.iter().enumerate() {
        if options.contains("refcount_bits=1") && !options.contains("refcount_bits=16")
            || options.contains("preallocation")
        {
            // Streams share clusters, and preallocation excludes compression.
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        let (path, disk) = converted(dir.path(), options, true, 3_500_000 / 512 * 512);
        lives(&path, disk, n as u64 + 100, &format!("compressed, {options}"));
    }
}

#[test]
fn images_over_a_backing_file_live_in_every_shape() {
    for (n, options) in CONFIGURATIONS.iter().enumerate() {
        if options.contains("preallocation") && !options.contains("extended") {
            continue;
        }
        for longer in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let (below, disk) =
                converted(dir.path(), "compression_type=zstd", true, 2_000_000 / 512 * 512);
            let size = if longer { 1_500_160 } else { 3_000_320u64 };
            let path = dir.path().join("top.qcow2");
            qemu_create(&path, options, &size.to_string(), below.file_name().unwrap().to_str());
            let mut model = disk;
            model.resize(usize::try_from(size).unwrap(), 0);
            lives(&path, model, n as u64 + 200, &format!("over a backing file, {options}"));
        }
    }
}

#[test]
fn random_shapes_written_by_both_in_turn_lose_nothing() {
    for round in 0..rounds(6) {
        let mut random = Random(u64::from(round) + 77);
        let which = usize::try_from(random.below(CONFIGURATIONS.len() as u64)).unwrap();
        let options = CONFIGURATIONS[which];
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        let size = 512 * (1 + random.below(4_000));
        qemu_create(&path, options, &size.to_string(), None);
        let mut model = vec![0; usize::try_from(size).unwrap()];
        for turn in 0..3 {
            let at = 512 * random.below(size / 512);
            let len = (512 * (1 + random.below(200))).min(size - at);
            let byte = u8::try_from(random.below(255)).unwrap() + 1;
            part_mut(&mut model, range(at, len)).fill(byte);
            let zero = 512 * random.below(size / 512);
            let zeros = (512 * (1 + random.below(100))).min(size - zero);
            part_mut(&mut model, range(zero, zeros)).fill(0);
            qemu_io(
                &path,
                &[&format!("write -P {byte} {at} {len}"), &format!("write -z {zero} {zeros}")],
            );
            lives_once(&path, &mut model, &mut random, &format!("{options}, turn {turn}"));
        }
    }
}

fn lives_once(path: &Path, model: &mut [u8], random: &mut Random, what: &str) {
    block_on(async {
        let image = Image::open(path, OpenOptions::writing()).await.unwrap();
        assert!(read_all(&image).await == model, "{what}: what qemu wrote");
        change(&image, model, random, 15).await;
        image.close().await.unwrap();
    });
    let found = qemu_check(path);
    assert!(found.is_clean(), "{what}: {found:?}");
    assert!(raw_of(path) == model, "{what}: what we wrote");
}

#[test]
fn compressed_clusters_show_in_the_map_and_go_with_all_that_they_touched() {
    let dir = tempfile::tempdir().unwrap();
    let (path, disk) = converted(dir.path(), "cluster_size=64k", true, 1 << 20);
    block_on(async {
        let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
        let map = image.map(range(0, 1 << 20)).await.unwrap();
        assert!(map.iter().any(|extent| extent.state == LayerState::Compressed), "{map:?}");
        // One byte of each cluster: all of them become plain, and nothing is left of the streams.
        let mut model = disk;
        for at in (0..1u64 << 20).step_by(65536) {
            part_mut(&mut model, range(at + 5, 1)).fill(9);
            image.write(at + 5, vec![9].into(), Durability::Deferred).await.unwrap();
        }
        let map = image.map(range(0, 1 << 20)).await.unwrap();
        assert!(map.iter().all(|extent| extent.state == LayerState::Data), "{map:?}");
        assert!(read_all(&image).await == model);
        image.close().await.unwrap();
        assert!(qemu_check(&path).is_clean());
        assert!(raw_of(&path) == model);
    });
}

#[test]
fn images_with_their_data_elsewhere_live_in_every_shape() {
    for (n, options) in [
        "cluster_size=64k",
        "cluster_size=4k,data_file_raw=on",
        "cluster_size=64k,extended_l2=on",
        "cluster_size=64k,extended_l2=on,data_file_raw=on",
        "cluster_size=512,preallocation=metadata",
    ]
    .iter()
    .enumerate()
    {
        for size in [3_000_320u64, 1 << 20] {
            let dir = tempfile::tempdir().unwrap();
            let (path, data) = (dir.path().join("disk.qcow2"), dir.path().join("disk.data"));
            let all = format!("{options},data_file={}", data.display());
            qemu_create(&path, &all, &size.to_string(), None);
            qemu_io(&path, &["write -P 7 0 100k", "write -P 8 500k 70k", "write -z 520k 20k"]);
            let mut model = vec![0; usize::try_from(size).unwrap()];
            part_mut(&mut model, range(0, 100 << 10)).fill(7);
            part_mut(&mut model, range(500 << 10, 70 << 10)).fill(8);
            part_mut(&mut model, range(520 << 10, 20 << 10)).fill(0);
            let mut random = Random(n as u64 + 900);
            for turn in 0..3 {
                lives_once(&path, &mut model, &mut random, &format!("{options}, turn {turn}"));
                if options.contains("raw") {
                    let mut raw = std::fs::read(&data).unwrap();
                    raw.resize(model.len(), 0);
                    assert!(raw == model, "{options}: the data file reads like the disk");
                }
            }
        }
    }
}

#[test]
fn what_a_snapshot_of_qemu_shares_is_copied_in_every_shape() {
    for (n, options) in CONFIGURATIONS.iter().enumerate() {
        if options.contains("refcount_bits=1") && !options.contains("refcount_bits=16") {
            // A cluster cannot have two users.
            continue;
        }
        for compressed in [false, true] {
            let narrow = options.contains("refcount_bits=2");
            if compressed && (narrow || options.contains("preallocation")) {
                // Streams share clusters, which would have more users than they can count.
                continue;
            }
            let dir = tempfile::tempdir().unwrap();
            let len = 1_500_000 / 512 * 512;
            let (path, disk) = converted(dir.path(), options, compressed, len);
            let name = path.to_str().unwrap();
            qemu_img(&["snapshot", "-c", "then", name]);
            let (mut model, mut random) = (disk.clone(), Random(n as u64 + 1300));
            for turn in 0..3 {
                lives_once(&path, &mut model, &mut random, &format!("{options}, turn {turn}"));
            }
            let raw = dir.path().join("then.raw");
            qemu_img(&["convert", "-O", "raw", "-l", "then", name, raw.to_str().unwrap()]);
            assert!(std::fs::read(raw).unwrap() == disk, "{options}: the snapshot");
            qemu_img(&["snapshot", "-d", "then", name]);
            assert!(qemu_check(&path).is_clean(), "{options}: without the snapshot");
        }
    }
}
