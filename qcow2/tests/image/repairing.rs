//! What repairs leave alone, what they survive, and what they make of images that nobody damaged on purpose.

use std::path::Path;
use std::process::Command;

use block::{BlockDevice, Durability, HostFile, MemoryStorage};
use proptest::prelude::*;
use qcow2::{CheckReport, Image, OpenOptions, Refusal, Repair};

use crate::checking::{KINDS, Layout, check, field, make, qemu_check, read_by_qemu};
use crate::common::{block_on, pattern, qemu_create, qemu_img, range, read_all};
use crate::rounds::rounds;

/// The bytes in which two files differ.
fn differing(one: &[u8], other: &[u8]) -> Vec<u64> {
    assert_eq!(one.len(), other.len());
    let pairs = one.iter().zip(other).enumerate();
    pairs.filter(|(_, (a, b))| a != b).map(|(at, _)| at as u64).collect()
}

/// The place of the 16 bit refcount of a cluster.
fn refcount_at(layout: &Layout, cluster: u64) -> u64 {
    let per_block = layout.cluster / 2;
    let table = layout.u64(48);
    layout.u64(table + cluster / per_block * 8) + cluster % per_block * 2
}

fn put(layout: &mut Layout, at: u64, bytes: &[u8]) {
    let at = usize::try_from(at).unwrap();
    let end = layout.bytes.len().max(at + bytes.len());
    layout.bytes.resize(end, 0);
    layout.bytes[at..at + bytes.len()].copy_from_slice(bytes);
}

#[test]
fn repairing_leaks_changes_the_refcounts_of_what_leaked_and_no_other_byte() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), "plain");
    let sound = std::fs::read(&path).unwrap();
    let mut layout = Layout::of(&path);
    let clusters = sound.len() as u64 / layout.cluster;
    // Used by nobody: behind the end, where blocks have room.
    let leaked: Vec<u64> = (0..20).map(|number| clusters + number * 3).collect();
    put(&mut layout, (clusters + 60) * 4096 - 1, &[0]);
    let without = layout.bytes.clone();
    for cluster in &leaked {
        let at = refcount_at(&layout, *cluster);
        put(&mut layout, at, &[0, 2]);
    }
    // Used, and counted once too often: the flag that says so is right, and wrong behind the repair.
    std::fs::write(&path, &layout.bytes).unwrap();
    let report = check(&path, Repair::None);
    assert_eq!((report.leaks, report.corruptions), (20, 0), "{report:#?}");
    let report = check(&path, Repair::Leaks);
    assert_eq!((report.leaks, report.leaks_fixed, report.corruptions_fixed), (0, 20, 0));
    let after = std::fs::read(&path).unwrap();
    assert!(after == without, "nothing but the refcounts that were too high has changed");
    let touched: Vec<_> = differing(&after, &layout.bytes).iter().map(|at| at - 1).collect();
    let places: Vec<_> = leaked.iter().map(|cluster| refcount_at(&layout, *cluster)).collect();
    assert_eq!(touched, places);
    assert_eq!(qemu_check(&path, None).0, 0);
}

#[test]
fn repairing_leaks_leaves_dirty_bits_corruptions_and_lost_refcounts_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), "plain");
    let mut layout = Layout::of(&path);
    layout.bytes[79] = 1;
    std::fs::write(&path, &layout.bytes).unwrap();
    assert!(check(&path, Repair::Leaks).is_clean());
    assert!(std::fs::read(&path).unwrap() == layout.bytes, "nothing leaked, nothing changed");
    let at = refcount_at(&layout, layout.bytes.len() as u64 / layout.cluster - 1);
    put(&mut layout, at, &[0, 0]);
    std::fs::write(&path, &layout.bytes).unwrap();
    let report = check(&path, Repair::Leaks);
    assert_eq!(report.refused, Some(Refusal::NeedsRebuild));
    assert!(std::fs::read(&path).unwrap() == layout.bytes, "what it cannot do it does not begin");
    let report = check(&path, Repair::All);
    assert!(report.is_clean() && report.corruptions_fixed > 0, "{report:#?}");
    assert_eq!(std::fs::read(&path).unwrap()[79], 0, "a clean image is not dirty");
}

#[test]
fn a_leak_that_a_snapshot_left_gets_its_copied_flags_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), "snapshots");
    let mut layout = Layout::of(&path);
    // As if a deletion had been cut off: the snapshots are gone and their references still counted.
    put(&mut layout, 60, &[0; 12]);
    std::fs::write(&path, &layout.bytes).unwrap();
    let by_qemu = dir.path().join("by-qemu");
    std::fs::copy(&path, &by_qemu).unwrap();
    let before = read_by_qemu(&path).unwrap();
    let (_, json) = qemu_check(&by_qemu, Some("leaks"));
    let report = check(&path, Repair::Leaks);
    assert!(report.is_clean() && report.leaks_fixed > 10, "{report:#?}");
    assert_eq!(report.leaks_fixed, field(&json, "leaks-fixed"));
    assert_eq!(report.corruptions_fixed, field(&json, "corruptions-fixed"));
    assert_eq!(qemu_check(&path, None).0, 0);
    assert!(read_by_qemu(&path).unwrap() == before);
}

/// Ways to lose the refcounts of an image.
fn lose(layout: &mut Layout, way: &str) {
    let table = layout.u64(48);
    match way {
        "table behind the end" => layout.put(48, 1 << 40),
        "table unaligned" => layout.put(48, table + 512),
        "no table" => put(layout, 56, &[0; 4]),
        "table over data" => layout.put(48, layout.u64(layout.l2()[0]) & 0x00ff_ffff_ffff_fe00),
        "table over the L1 table" => layout.put(48, layout.u64(40)),
        "table over the header" => layout.put(48, 0),
        "table empty" => layout.put(table, 0),
        "block unaligned" => layout.put(table, layout.u64(table) + 512),
        "block behind the end" => layout.put(table, 1 << 40),
        "block over an L2 table" => layout.put(table, layout.u64(layout.l1()[0]) & ((1 << 40) - 1)),
        "block twice" => layout.put(table + 8, layout.u64(table)),
        "block empty" => {
            let (block, cluster) = (layout.u64(table), layout.cluster);
            put(layout, block, &vec![0; usize::try_from(cluster).unwrap()]);
        }
        other => panic!("{other}"),
    }
}

const LOSSES: [&str; 12] = [
    "table behind the end",
    "table unaligned",
    "no table",
    "table over data",
    "table over the L1 table",
    "table over the header",
    "table empty",
    "block unaligned",
    "block behind the end",
    "block over an L2 table",
    "block twice",
    "block empty",
];

#[test]
fn lost_refcounts_are_made_anew_whatever_else_the_image_holds() {
    let dir = tempfile::tempdir().unwrap();
    for (number, kind) in KINDS.iter().enumerate() {
        let path = make(dir.path(), kind);
        let sound = std::fs::read(&path).unwrap();
        let before = read_by_qemu(&path).unwrap();
        let ways =
            LOSSES.iter().enumerate().filter(|(way, _)| rounds(1) > 1 || way % 3 == number % 3);
        for (_, way) in ways {
            std::fs::write(&path, &sound).unwrap();
            let mut layout = Layout::of(&path);
            lose(&mut layout, way);
            std::fs::write(&path, &layout.bytes).unwrap();
            let found = check(&path, Repair::None);
            assert!(found.corruptions > 0, "{kind}, {way}: {found:#?}");
            let report = check(&path, Repair::All);
            assert!(report.is_clean(), "{kind}, {way}: {report:#?}");
            let (code, json) = qemu_check(&path, None);
            assert_eq!(code, 0, "{kind}, {way}: {json:#}");
            assert!(read_by_qemu(&path).unwrap() == before, "{kind}, {way}: data");
        }
    }
}

#[test]
fn a_dirty_image_gets_exact_refcounts_before_its_first_write() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lazy.qcow2");
    qemu_create(&path, "cluster_size=4k,lazy_refcounts=on", "5M", None);
    // Killed before it could write refcounts.
    let commands = ["write -P1 0 1M", "write -P2 3M 100k", "flush", "sigraise 9"];
    let commands = commands.iter().flat_map(|command| ["-c", command]);
    Command::new("qemu-io").args(["-f", "qcow2"]).args(commands).arg(&path).output().unwrap();
    let layout = Layout::of(&path);
    assert_eq!(layout.bytes[79], 1, "the image is dirty");
    assert!(check(&path, Repair::None).corruptions > 0, "refcounts are behind");
    block_on(async {
        let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
        image.write(2 << 20, pattern(5, 300_000).into(), Durability::Deferred).await.unwrap();
        image.close().await.unwrap();
        let image = Image::open(&path, OpenOptions::reading()).await.unwrap();
        assert!(image.read(range(0, 1 << 20)).await.unwrap().to_vec() == vec![1; 1 << 20]);
        let data = image.read(range(2 << 20, 300_000)).await.unwrap();
        assert!(data.to_vec() == pattern(5, 300_000));
    });
    assert_eq!(qemu_check(&path, None).0, 0);
    assert_eq!(std::fs::read(&path).unwrap()[79], 0);
}

async fn check_memory(storage: &MemoryStorage, repair: Repair) -> CheckReport {
    let file = HostFile::from_storage(Path::new("memory"), storage.clone().into_dyn()).unwrap();
    Image::check_on(&file, repair, |_| {}).await.unwrap()
}

async fn read_memory(storage: &MemoryStorage) -> Vec<u8> {
    let file = HostFile::from_storage(Path::new("memory"), storage.clone().into_dyn()).unwrap();
    let image = Image::open_on(file, None, OpenOptions::reading()).await.unwrap();
    read_all(&image).await
}

#[test]
fn a_repair_that_a_power_cut_ends_can_be_done_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut cuts = 0;
    for kind in ["plain", "snapshots", "wide"] {
        let path = make(dir.path(), kind);
        let sound = std::fs::read(&path).unwrap();
        for way in ["table behind the end", "block empty", "counts", "flags"] {
            std::fs::write(&path, &sound).unwrap();
            let mut layout = Layout::of(&path);
            match way {
                "counts" => {
                    for at in layout.refcount_words().into_iter().step_by(2) {
                        let word = layout.u64(at);
                        layout.put(at, word | 0x0002_0000_0000_0002);
                    }
                }
                "flags" => {
                    for at in layout.l2().into_iter().step_by(3) {
                        let entry = layout.u64(at);
                        if entry > 1 {
                            layout.put(at, entry ^ 1 << 63);
                        }
                    }
                }
                _ => lose(&mut layout, way),
            }
            layout.bytes[79] = 1;
            cuts += block_on(cut_repairs(&sound, &layout.bytes, &format!("{kind}, {way}")));
        }
    }
    assert!(cuts > 60, "{cuts}");
}

/// Cuts the repair of an image at every operation. Says how often.
async fn cut_repairs(sound: &[u8], damaged: &[u8], what: &str) -> usize {
    let content = read_memory(&MemoryStorage::from_bytes(sound.to_vec(), 1)).await;
    let storage = MemoryStorage::from_bytes(damaged.to_vec(), 1);
    let report = check_memory(&storage, Repair::All).await;
    assert!(report.is_clean(), "{what}: {report:#?}");
    assert_eq!(storage.snapshot()[79], 0, "{what}: clean and not dirty");
    let ops = storage.log_len();
    for cut in 0..=ops {
        for seed in [0, 1, cut as u64 * 31 + 2] {
            let left = storage.crash_image_seeded(cut, seed);
            let report = check_memory(&left, Repair::All).await;
            let what = format!("{what}: cut after {cut} of {ops}, seed {seed}");
            assert!(report.is_clean(), "{what}: {report:#?}");
            assert!(read_memory(&left).await == content, "{what}: data");
        }
    }
    ops + 1
}

/// Damage by chance: where (in which table, or anywhere), and with what.
fn any_damage() -> impl Strategy<Value = Vec<(u8, prop::sample::Index, u64)>> {
    let value = prop_oneof![
        any::<u64>(),
        (0u64..80).prop_map(|cluster| cluster << 12),
        (0u64..80).prop_map(|cluster| 1 << 63 | cluster << 12),
        (0u64..1000).prop_map(|sector| 1 << 62 | sector << 9),
        Just(0),
    ];
    prop::collection::vec((0u8..8, any::<prop::sample::Index>(), value), 1..6)
}

fn damage(layout: &mut Layout, kinds: &[(u8, prop::sample::Index, u64)]) {
    for (table, place, value) in kinds {
        let places = match table {
            0 => layout.l1(),
            1 => layout.l2(),
            2 => layout.refcount_table(),
            3 => layout.refcount_words(),
            4 => layout.snapshot_l1(),
            5 => (24..104).step_by(4).collect(),
            6 => (0..40).map(|at| layout.u64(64) + at * 4).collect(),
            _ => (0..layout.bytes.len() as u64 / 8).map(|at| at * 8).collect(),
        };
        // Damage may have hidden a table.
        if !places.is_empty() && layout.bytes.len() < 64 << 20 {
            layout.put(*place.get(&places) % (32 << 20), *value);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: rounds(24), max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test] // A repaired image is clean for QEMU, or we said that it is not.
    fn any_damage_is_repaired_or_reported(kind in 0usize..KINDS.len(), damages in any_damage()) {
        let dir = tempfile::tempdir().unwrap();
        let path = make(dir.path(), KINDS[kind]);
        let mut layout = Layout::of(&path);
        damage(&mut layout, &damages);
        std::fs::write(&path, &layout.bytes).unwrap();
        let judged = |report: &CheckReport| {
            let (code, json) = qemu_check(&path, None);
            // QEMU opens no image whose data file has lost its name; nothing else is wrong with it.
            let unnamed = KINDS[kind] == "data_file" && json.is_null();
            (!report.is_clean() || code == 0 || unnamed).then_some(()).ok_or(json)
        };
        if let Ok(report) = crate::checking::try_check(&path, Repair::None) {
            prop_assert_eq!(judged(&report), Ok(()), "we called it clean");
            if let Ok(report) = crate::checking::try_check(&path, Repair::All) {
                prop_assert_eq!(judged(&report), Ok(()), "repaired: {:#?}", report);
                let again = check(&path, Repair::None);
                prop_assert_eq!(again.is_clean(), report.is_clean());
            }
        }
    }
}

#[test]
fn bitmaps_that_became_worthless_are_given_up_by_a_full_repair() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), "bitmaps");
    let mut layout = Layout::of(&path);
    layout.put(88, 0);
    std::fs::write(&path, &layout.bytes).unwrap();
    let report = check(&path, Repair::None);
    assert!(report.leaks > 2 && report.corruptions == 0, "{report:#?}");
    assert_eq!(report.leaks, field(&qemu_check(&path, None).1, "leaks"));
    let report = check(&path, Repair::All);
    assert!(report.is_clean(), "{report:#?}");
    let info = qemu_img(&["info", "--output=json", path.to_str().unwrap()]);
    assert!(!info.contains("\"bitmaps\":"), "{info}");
}

#[test]
fn a_snapshot_that_does_not_tell_its_disk_is_found_and_told_it_as_qemu_does() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), "v2");
    let mut layout = Layout::of(&path);
    // Version 2 may leave the extra data out: take it away, and move what follows.
    let table = layout.u64(64);
    let mut entry = usize::try_from(table).unwrap();
    for _ in 0..2 {
        layout.bytes[entry + 36..entry + 40].fill(0);
        let texts = entry + 64..entry + 72;
        layout.bytes.copy_within(texts, entry + 40);
        let lens = usize::from(layout.bytes[entry + 13]) + usize::from(layout.bytes[entry + 15]);
        let next = (entry + 64 + lens).next_multiple_of(8);
        let from = (entry + 40 + lens).next_multiple_of(8);
        layout.bytes.copy_within(next..next + 200, from);
        entry = from;
    }
    std::fs::write(&path, &layout.bytes).unwrap();
    let names = qemu_img(&["snapshot", "-l", path.to_str().unwrap()]);
    assert!(names.contains("one") && names.contains("two"), "{names}");
    assert!(check(&path, Repair::None).is_clean(), "version 2 may");
    let short = layout.bytes.clone();
    // The same in version 3.
    put(&mut layout, 4, &3u32.to_be_bytes());
    put(&mut layout, 72, &[0; 40]);
    put(&mut layout, 96, &4u32.to_be_bytes());
    put(&mut layout, 100, &104u32.to_be_bytes());
    assert!(layout.bytes != short);
    std::fs::write(&path, &layout.bytes).unwrap();
    let report = check(&path, Repair::None);
    let (_, json) = qemu_check(&path, None);
    assert_eq!((report.corruptions, field(&json, "corruptions")), (2, 2), "{report:#?} {json:#}");
    let disks = |path: &Path| ["one", "two"].map(|name| read_snapshot(path, name));
    let before = (disks(&path), read_by_qemu(&path));
    let report = check(&path, Repair::Leaks);
    assert_eq!((report.corruptions, report.corruptions_fixed), (2, 0), "not by this");
    let report = check(&path, Repair::All);
    assert!(report.is_clean() && report.corruptions_fixed == 2, "{report:#?}");
    let (code, json) = qemu_check(&path, None);
    assert_eq!(code, 0, "{json:#}");
    assert!((disks(&path), read_by_qemu(&path)) == before, "no disk has changed");
}

/// What a snapshot holds.
fn read_snapshot(path: &Path, name: &str) -> Vec<u8> {
    block_on(async {
        let image = Image::open(path, OpenOptions::reading().snapshot(name)).await.unwrap();
        let bytes = read_all(&image).await;
        image.close().await.unwrap();
        bytes
    })
}
