//! Images whose bitmaps, or the refcounts of whose bitmaps, are broken: what is not known to be free is not written, and
//! a repair makes the image usable again.

use std::path::Path;

use block::{BlockDevice, Durability};
use qcow2::{Image, OpenOptions, Repair};

use crate::bitmaps::dirty;
use crate::checking::{Layout, check};
use crate::common::{block_on, pattern, qemu_check, qemu_create, qemu_img, qemu_io, raw_of};

/// Where the bitmaps of an image of 4 KiB clusters lie.
struct Bitmaps {
    extension_at: u64,
    directory_at: u64,
    /// The first table, and the places of its entries that are not 0.
    table_at: u64,
    entries: Vec<u64>,
}

impl Bitmaps {
    fn of(layout: &Layout) -> Self {
        let mut at = u64::from(layout.u32(100));
        while layout.u32(at) != 0x2385_2875 {
            assert_ne!(layout.u32(at), 0, "there is an extension for bitmaps");
            at += 8 + u64::from(layout.u32(at + 4)).next_multiple_of(8);
        }
        let directory_at = layout.u64(at + 8 + 16);
        let table_at = layout.u64(directory_at);
        let bytes = u64::from(layout.u32(directory_at + 8)) * 8;
        let entries = layout.entries(table_at, bytes, 8);
        Self { extension_at: at + 8, directory_at, table_at, entries }
    }
}

/// Two bitmaps of which the first has data in clusters of its own, and the second records.
fn make(path: &Path) {
    let name = path.to_str().unwrap();
    qemu_create(path, "cluster_size=4096", "64M", None);
    qemu_img(&["bitmap", "--add", "-g", "512", name, "a"]);
    let writes: Vec<_> = (0..20).map(|n| format!("write -P {} {}k 1k", n + 1, n * 3000)).collect();
    qemu_io(path, &writes.iter().map(String::as_str).collect::<Vec<_>>());
    qemu_img(&["bitmap", "--disable", name, "a"]);
    qemu_img(&["bitmap", "--add", "-g", "65536", name, "b"]);
}

async fn dirty_in(path: &Path, name: &str) -> Vec<(u64, u64)> {
    let image = Image::open(path, OpenOptions::reading()).await.unwrap();
    let found = dirty(&image, name).await;
    image.close().await.unwrap();
    found
}

#[test]
fn clusters_of_bitmaps_are_not_taken_where_a_refcount_calls_them_free() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    make(&path);
    let before = block_on(dirty_in(&path, "a"));
    assert!(before.len() >= 20);
    let mut layout = Layout::of(&path);
    let places = Bitmaps::of(&layout);
    let mut clusters = vec![places.directory_at, places.table_at];
    clusters.extend(places.entries.iter().map(|at| layout.u64(*at)).filter(|raw| *raw > 1));
    assert!(clusters.len() > 5, "{clusters:x?}");
    for at in &clusters {
        let number = at / 4096;
        let block = layout.u64(layout.u64(48) + number / 2048 * 8);
        let at = usize::try_from(block + number % 2048 * 2).unwrap();
        layout.bytes[at..at + 2].fill(0);
    }
    std::fs::write(&path, &layout.bytes).unwrap();
    let mut model = raw_of(&path);
    block_on(async {
        let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
        let data = pattern(5, 2 << 20);
        image.write(33 << 20, data.clone().into(), Durability::Durable).await.unwrap();
        image.write((10 << 20) + 7, data.clone().into(), Durability::Durable).await.unwrap();
        model[33 << 20..][..2 << 20].copy_from_slice(&data);
        model[(10 << 20) + 7..][..2 << 20].copy_from_slice(&data);
        assert_eq!(dirty(&image, "a").await, before);
        image.close().await.unwrap();
        assert_eq!(dirty_in(&path, "a").await, before);
    });
    assert!(raw_of(&path) == model);
    let report = check(&path, Repair::All);
    assert!(report.is_consistent(), "{report:#?}");
    assert_eq!(block_on(dirty_in(&path, "a")), before);
    assert!(qemu_check(&path).is_clean());
}

#[test]
fn a_repair_takes_away_bitmaps_that_keep_an_image_from_being_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    make(&path);
    let sound = std::fs::read(&path).unwrap();
    let model = raw_of(&path);
    let places = Bitmaps::of(&Layout::of(&path));
    let first = places.entries[0];
    // What is broken, and how many bitmaps a repair leaves.
    let faults = [
        ("the number of bitmaps", places.extension_at, 0, 0),
        ("the length of the directory", places.extension_at + 8, 1 << 60, 0),
        ("the place of the directory", places.extension_at + 16, 1 << 40, 0),
        ("the directory over the L1 table", places.extension_at + 16, u64::MAX, 0),
        ("the place of a table", places.directory_at, 0x1234, 0),
        ("a table behind the end of the file", places.directory_at, 1 << 40, 0),
        ("the flags of a bitmap", places.directory_at + 8, 3 << 32 | 0xff00, 0),
        ("an entry with reserved bits", first, 0x8000_0000_0000_0000, 2),
        ("an entry off the clusters", first, 0x1200, 2),
        ("an entry behind the end of the file", first, 1 << 40, 2),
        ("a table that is too short", places.directory_at + 8, 1 << 32, 2),
    ];
    for (what, at, value, left) in faults {
        std::fs::write(&path, &sound).unwrap();
        let mut layout = Layout::of(&path);
        let value = if value == u64::MAX { layout.u64(40) } else { value };
        layout.put(at, value);
        std::fs::write(&path, &layout.bytes).unwrap();
        let found = check(&path, Repair::None);
        assert!(!found.is_clean(), "{what}: {found:#?}");
        let report = check(&path, Repair::All);
        assert!(report.is_clean(), "{what}: {report:#?}");
        assert!(report.corruptions_fixed > 0, "{what}: {report:#?}");
        block_on(async {
            let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
            let list = image.bitmaps().await.unwrap();
            assert_eq!(list.len(), left, "{what}");
            if left > 0 {
                assert!(list[0].inconsistent && !list[1].inconsistent, "{what}: {list:?}");
            }
            image.write(50 << 20, vec![9; 4096].into(), Durability::Durable).await.unwrap();
            if left > 0 {
                image.remove_bitmap("a").await.unwrap();
                assert_eq!(dirty(&image, "b").await, [(50 << 20, (50 << 20) + 65536)]);
            }
            image.close().await.unwrap();
        });
        let found = qemu_check(&path);
        assert!(found.is_clean(), "{what}: {found:?}");
        let mut model = model.clone();
        model[50 << 20..][..4096].fill(9);
        assert!(raw_of(&path) == model, "{what}");
    }
}
