//! Bitmaps of whole images: what they record against a model, that QEMU reads what we write and the other way round,
//! and that no power cut leaves one that looks right and misses a change.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use block::{BlockDevice, ByteRange, Durability, LoggedOp, MemoryStorage, ZeroMode};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use qcow2::{BitmapError, CreateOptions, Error, Image, OpenOptions};

use crate::check::check;
use crate::common::{
    block_on, pattern, qemu_check, qemu_create, qemu_img, qemu_io, range, read_all,
};
use crate::memory::{Act, Shape, any_act};
use crate::rounds::rounds;

const MIB: u64 = 1 << 20;

/// The dirty ranges of a bitmap, joined.
pub(crate) async fn dirty(image: &Image, name: &str) -> Vec<(u64, u64)> {
    let size = image.limits().size_bytes;
    let mut found: Vec<(u64, u64)> = Vec::new();
    let mut at = 0;
    while at < size {
        for extent in image.dirty_extents(name, ByteRange::between(at, size)).await.unwrap() {
            assert_eq!(extent.range.start(), at, "extents leave no gap");
            at = extent.range.end();
            match found.last_mut() {
                Some(last) if extent.dirty && last.1 == extent.range.start() => last.1 = at,
                _ if extent.dirty => found.push((extent.range.start(), at)),
                _ => {}
            }
        }
    }
    found
}

/// The same as QEMU tells it over NBD.
pub(crate) fn dirty_by_qemu(path: &Path, name: &str) -> Vec<(u64, u64)> {
    let context = format!("--map=qemu:dirty-bitmap:{name}");
    let path = path.to_str().unwrap();
    let output = Command::new("nbdinfo")
        .args([
            "--json", &context, "--", "[", "qemu-nbd", "-r", "-f", "qcow2", "-B", name, path, "]",
        ])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let map: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut found: Vec<(u64, u64)> = Vec::new();
    for extent in map.as_array().unwrap() {
        let number = |key: &str| extent[key].as_u64().unwrap();
        let (start, end) = (number("offset"), number("offset") + number("length"));
        match found.last_mut() {
            _ if number("type") == 0 => {}
            Some(last) if last.1 == start => last.1 = end,
            _ => found.push((start, end)),
        }
    }
    found
}

/// Name, granularity and flags of all bitmaps, as `qemu-img info` tells them.
fn list_by_qemu(path: &Path) -> Vec<(String, u64, String)> {
    let text = qemu_img(&["info", "--output=json", path.to_str().unwrap()]);
    let info: serde_json::Value = serde_json::from_str(&text).unwrap();
    let Some(list) = info["format-specific"]["data"]["bitmaps"].as_array() else {
        return Vec::new();
    };
    let one = |bitmap: &serde_json::Value| {
        let flags = bitmap["flags"].as_array().unwrap().iter().map(|flag| flag.as_str().unwrap());
        let flags = flags.collect::<Vec<_>>().join(",");
        (
            bitmap["name"].as_str().unwrap().to_owned(),
            bitmap["granularity"].as_u64().unwrap(),
            flags,
        )
    };
    list.iter().map(one).collect()
}

async fn write(image: &Image, at: u64, len: u64) {
    let data = pattern(at + len, usize::try_from(len).unwrap());
    image.write(at, data.into(), Durability::Deferred).await.unwrap();
}

#[test]
fn what_qemu_recorded_is_read_and_carried_on() {
    let dir = tempfile::tempdir().unwrap();
    for (cluster, granularity) in
        [("512", "512"), ("4096", "65536"), ("65536", "4096"), ("2M", "64M")]
    {
        let path = dir.path().join(format!("{cluster}.qcow2"));
        let name = path.to_str().unwrap();
        qemu_create(&path, &format!("cluster_size={cluster}"), "301M", None);
        qemu_img(&["bitmap", "--add", "-g", granularity, name, "on"]);
        qemu_img(&["bitmap", "--add", "--disable", "-g", granularity, name, "off"]);
        qemu_io(&path, &["write 0 70k", "write -z 9M 3M", "discard 100M 1M", "write 300M 1M"]);
        block_on(async {
            let image = Image::open(&path, OpenOptions::reading()).await.unwrap();
            let list = image.bitmaps().await.unwrap();
            assert_eq!(list.len(), 2);
            assert_eq!((&*list[0].name, list[0].enabled), ("on", true));
            assert_eq!((&*list[1].name, list[1].enabled), ("off", false));
            assert_eq!(list[1].dirty_bytes, Some(0));
            let found = dirty(&image, "on").await;
            assert_eq!(found, dirty_by_qemu(&path, "on"), "clusters of {cluster}");
            let sum: u64 = found.iter().map(|(start, end)| end - start).sum();
            assert_eq!(list[0].dirty_bytes, Some(sum));
            image.close().await.unwrap();

            let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
            write(&image, 200 * MIB, 5).await;
            let after = dirty(&image, "on").await;
            assert!(after.iter().any(|(start, end)| (*start..*end).contains(&(200 * MIB))));
            image.close().await.unwrap();
            let found = qemu_check(&path);
            assert!(found.is_clean(), "{found:?}");
            assert_eq!(dirty_by_qemu(&path, "on"), after);
            assert_eq!(dirty_by_qemu(&path, "off"), []);
        });
        assert_eq!(list_by_qemu(&path).iter().map(|one| &*one.2).collect::<Vec<_>>(), ["auto", ""]);
    }
}

#[test]
fn qemu_reads_merges_and_extends_what_we_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let name = path.to_str().unwrap();
    block_on(async {
        Image::create(&path, &CreateOptions::new(300 * MIB + 512)).await.unwrap();
        let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
        image.add_bitmap("fine", 512, true).await.unwrap();
        image.add_bitmap("coarse", MIB, true).await.unwrap();
        image.add_bitmap("still", 65536, false).await.unwrap();
        write(&image, 1000, 10).await;
        write(&image, 300 * MIB, 512).await;
        image.close().await.unwrap();
    });
    let found = qemu_check(&path);
    assert!(found.is_clean(), "{found:?}");
    let expected = [("fine", 512, "auto"), ("coarse", MIB, "auto"), ("still", 65536, "")];
    let expected = expected.map(|(name, bytes, flags)| (name.to_owned(), bytes, flags.to_owned()));
    assert_eq!(list_by_qemu(&path), expected);
    let end = 300 * MIB + 512;
    assert_eq!(dirty_by_qemu(&path, "fine"), [(512, 1024), (300 * MIB, end)]);
    assert_eq!(dirty_by_qemu(&path, "coarse"), [(0, MIB), (300 * MIB, end)]);
    qemu_img(&["bitmap", "--merge", "fine", name, "still"]);
    qemu_img(&["bitmap", "--clear", name, "coarse"]);
    qemu_io(&path, &["write 8M 4k"]);
    qemu_img(&["bitmap", "--remove", name, "fine"]);
    block_on(async {
        let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
        assert_eq!(dirty(&image, "still").await, [(0, 65536), (300 * MIB, end)]);
        assert_eq!(dirty(&image, "coarse").await, [(8 * MIB, 9 * MIB)]);
        image.merge_bitmap("coarse", &image, "still").await.unwrap();
        image.remove_bitmap("still").await.unwrap();
        image.close().await.unwrap();
    });
    assert_eq!(dirty_by_qemu(&path, "coarse"), [(0, MIB), (8 * MIB, 9 * MIB), (300 * MIB, end)]);
    assert!(qemu_check(&path).is_clean());
    block_on(async {
        let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
        image.remove_bitmap("coarse").await.unwrap();
        image.close().await.unwrap();
    });
    assert_eq!(list_by_qemu(&path), []);
    assert!(qemu_check(&path).is_clean());
}

#[test]
fn a_bitmap_moves_from_image_to_image_at_another_granularity() {
    block_on(async {
        let storage = Shape::new(4096).create().await;
        let from = Shape::new(4096).open(&storage).await.unwrap();
        from.add_bitmap("a", 512, true).await.unwrap();
        write(&from, 5000, 1).await;
        let other = Shape::new(65536).create().await;
        let to = Shape::new(65536).open(&other).await.unwrap();
        to.add_bitmap("b", 2048, false).await.unwrap();
        to.merge_bitmap("b", &from, "a").await.unwrap();
        assert_eq!(dirty(&to, "b").await, [(4096, 6144)]);
        from.close().await.unwrap();
        to.close().await.unwrap();
        let to = Shape::new(65536).open_read_only(&other).await.unwrap();
        assert_eq!(dirty(&to, "b").await, [(4096, 6144)]);
    });
}

#[test]
fn a_huge_disk_keeps_a_bitmap_of_few_changes_small() {
    block_on(async {
        let shape = Shape { size_bytes: 64 << 40, ..Shape::new(65536) };
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        image.add_bitmap("b", 65536, true).await.unwrap();
        write(&image, 63 << 40, 512).await;
        image.close().await.unwrap();
        let image = shape.open(&storage).await.unwrap();
        assert_eq!(dirty(&image, "b").await, [(63 << 40, (63 << 40) + 65536)]);
        image.close().await.unwrap();
        assert!(storage.snapshot().len() < 4 << 20, "{}", storage.snapshot().len());
        check(&storage.snapshot()).assert_clean("huge");
    });
}

#[test]
fn an_image_that_nobody_changes_stays_as_it_is_to_the_byte() {
    block_on(async {
        let shape = Shape::new(4096);
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        image.add_bitmap("b", 512, true).await.unwrap();
        write(&image, 0, 100).await;
        image.close().await.unwrap();
        let before = storage.snapshot();
        for read_only in [true, false] {
            let image = if read_only {
                shape.open_read_only(&storage).await.unwrap()
            } else {
                shape.open(&storage).await.unwrap()
            };
            assert_eq!(dirty(&image, "b").await, [(0, 512)]);
            read_all(&image).await;
            image.flush().await.unwrap();
            image.close().await.unwrap();
            assert!(storage.snapshot() == before);
        }
        let image = shape.open_read_only(&storage).await.unwrap();
        let refused = image.clear_bitmap("b").await;
        assert!(matches!(refused, Err(Error::Request(_))), "{refused:?}");
    });
}

#[test]
fn the_mark_is_durable_before_the_first_change_and_made_once() {
    block_on(async {
        let shape = Shape::new(65536);
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        image.add_bitmap("b", 65536, true).await.unwrap();
        let before = storage.log_len();
        write(&image, 0, 65536).await;
        write(&image, 65536, 65536).await;
        let log = storage.log();
        let kinds: Vec<_> = log[before..]
            .iter()
            .filter_map(|op| match op {
                LoggedOp::Write { data, .. } => Some(data.len()),
                LoggedOp::Sync => Some(0),
                _ => None,
            })
            .collect();
        assert_eq!(kinds, [512, 0, 65536, 65536], "mark, sync, data, data");
    });
}

#[test]
fn a_bitmap_that_was_not_saved_is_kept_and_shown_and_can_only_be_removed() {
    block_on(async {
        let shape = Shape::new(4096);
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        image.add_bitmap("lost", 4096, true).await.unwrap();
        image.add_bitmap("off", 4096, false).await.unwrap();
        write(&image, 0, 100).await;
        image.flush().await.unwrap();
        drop(image); // As after a power cut.
        for _ in 0..2 {
            let image = shape.open(&storage).await.unwrap();
            let list = image.bitmaps().await.unwrap();
            assert!(list[0].inconsistent && list[0].enabled && list[0].dirty_bytes.is_none());
            assert!(!list[1].inconsistent, "a disabled bitmap misses nothing");
            let all = range(0, 4096);
            let refused = image.dirty_extents("lost", all).await;
            let inconsistent = |error: &Error| {
                matches!(error, Error::Bitmap { reason: BitmapError::Inconsistent, .. })
            };
            assert!(inconsistent(&refused.unwrap_err()));
            assert!(inconsistent(&image.clear_bitmap("lost").await.unwrap_err()));
            assert!(inconsistent(&image.merge_bitmap("off", &image, "lost").await.unwrap_err()));
            assert!(inconsistent(&image.disable_bitmap("lost").await.unwrap_err()));
            write(&image, 8192, 100).await;
            image.close().await.unwrap();
            check(&storage.snapshot()).assert_clean("kept");
        }
        let image = shape.open(&storage).await.unwrap();
        image.remove_bitmap("lost").await.unwrap();
        assert_eq!(image.bitmaps().await.unwrap().len(), 1);
        image.close().await.unwrap();
        check(&storage.snapshot()).assert_clean("removed");
    });
}

#[test]
fn what_cannot_be_done_is_refused_with_the_reason_and_changes_nothing() {
    block_on(async {
        let shape = Shape::new(4096);
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        image.add_bitmap("b", 4096, true).await.unwrap();
        let list = image.bitmaps().await.unwrap();
        let reason = |result: Result<(), Error>| match result {
            Err(Error::Bitmap { reason, .. }) => reason,
            other => panic!("{other:?}"),
        };
        assert_eq!(reason(image.add_bitmap("b", 512, true).await), BitmapError::Exists);
        assert_eq!(reason(image.add_bitmap("", 512, true).await), BitmapError::Name { bytes: 0 });
        let long = "x".repeat(1024);
        assert_eq!(
            reason(image.add_bitmap(&long, 512, true).await),
            BitmapError::Name { bytes: 1024 }
        );
        for bytes in [0, 256, 513, 1 << 32] {
            let refused = reason(image.add_bitmap("c", bytes, true).await);
            assert_eq!(refused, BitmapError::Granularity { bytes });
        }
        for refused in [
            image.remove_bitmap("c").await,
            image.clear_bitmap("c").await,
            image.enable_bitmap("c").await,
            image.merge_bitmap("c", &image, "b").await,
            image.merge_bitmap("b", &image, "c").await,
        ] {
            assert_eq!(reason(refused), BitmapError::Unknown);
        }
        assert_eq!(image.bitmaps().await.unwrap(), list);
        image.add_bitmap(&long[1..], 512, true).await.unwrap();
        image.close().await.unwrap();
        check(&storage.snapshot()).assert_clean("refusals");

        let huge = Shape { size_bytes: 64 << 40, ..Shape::new(65536) };
        let image = huge.open(&huge.create().await).await.unwrap();
        let refused = reason(image.add_bitmap("b", 512, true).await);
        assert_eq!(refused, BitmapError::TooLarge { bytes: 16 << 30 });
    });
}

#[test]
fn a_full_disk_refuses_a_bitmap_and_leaves_everything_usable() {
    block_on(async {
        let shape = Shape::new(4096);
        let storage = shape.create().await;
        storage.without_fallocate();
        let image = shape.open(&storage).await.unwrap();
        image.add_bitmap("a", 512, true).await.unwrap();
        write(&image, 0, 4096).await;
        let before = image.bitmaps().await.unwrap();
        image.flush().await.unwrap();
        // Two clusters for the old state of what is about to be rewritten may be free; six are needed.
        storage.limit_len(storage.snapshot().len() as u64);
        image.add_bitmap("b", 512, true).await.unwrap_err();
        image.clear_bitmap("a").await.unwrap_err();
        assert_eq!(image.bitmaps().await.unwrap(), before);
        storage.limit_len(u64::MAX);
        write(&image, 8192, 512).await;
        image.add_bitmap("b", 512, true).await.unwrap();
        image.close().await.unwrap();
        check(&storage.snapshot()).assert_clean("no space for a while");
        let image = shape.open(&storage).await.unwrap();
        assert_eq!(dirty(&image, "a").await, [(0, 4096), (8192, 8704)]);
        assert_eq!(dirty(&image, "b").await, []);
    });
}

#[test]
fn compressed_clusters_are_changes_too() {
    block_on(async {
        let shape = Shape::new(65536);
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        image.add_bitmap("b", 65536, true).await.unwrap();
        let text = vec![7; 3 << 16];
        image.write_compressed(1 << 20, text.into()).await.unwrap();
        image.close().await.unwrap();
        let image = shape.open(&storage).await.unwrap();
        assert_eq!(dirty(&image, "b").await, [(MIB, MIB + (3 << 16))]);
        // A part of a compressed cluster.
        image.clear_bitmap("b").await.unwrap();
        write(&image, MIB + 70_000, 10).await;
        assert_eq!(dirty(&image, "b").await, [(MIB + 65536, MIB + (2 << 16))]);
        image.close().await.unwrap();
    });
}

#[test]
fn bitmaps_survive_that_snapshots_come_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    block_on(async {
        Image::create(&path, &CreateOptions::new(64 * MIB)).await.unwrap();
        let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
        image.add_bitmap("on", 65536, true).await.unwrap();
        write(&image, 0, 100).await;
        image.create_snapshot("one").await.unwrap();
        write(&image, 8 * MIB, 100).await;
        image.delete_snapshot("one").await.unwrap();
        image.create_snapshot("two").await.unwrap();
        write(&image, 16 * MIB, 100).await;
        image.close().await.unwrap();
    });
    assert!(qemu_check(&path).is_clean());
    let expected = [0, 8 * MIB, 16 * MIB].map(|at| (at, at + 65536));
    assert_eq!(dirty_by_qemu(&path, "on"), expected);
    block_on(async {
        let view = OpenOptions::reading().snapshot("two");
        let image = Image::open(&path, view).await.unwrap();
        assert_eq!(image.bitmaps().await.unwrap(), [], "they tell of the present disk");
    });
}

/// What a bitmap may say: `least` changed since it began, `most` was asked to.
#[derive(Clone, Default)]
struct Model {
    enabled: bool,
    granularity: u64,
    least: BTreeSet<u64>,
    most: BTreeSet<u64>,
}

fn sectors(ranges: &[(u64, u64)]) -> BTreeSet<u64> {
    ranges.iter().flat_map(|(start, end)| start / 512..end.div_ceil(512)).collect()
}

impl Model {
    fn record(&mut self, range: ByteRange, before: &[u8], now: &[u8], cluster: u64) {
        if !self.enabled || range.is_empty() {
            return;
        }
        let changed = |at: &u64| {
            let at = usize::try_from(at * 512).unwrap();
            let end = (at + 512).min(before.len());
            before[at..end] != now[at..end]
        };
        let touched = range.widen(512);
        self.least.extend((touched.start() / 512..touched.end() / 512).filter(changed));
        let size = before.len() as u64;
        let widest = range.widen(cluster).widen(self.granularity);
        self.most.extend(widest.start() / 512..widest.end().min(size).div_ceil(512));
    }

    fn assert_fits(&self, found: &[(u64, u64)], what: &str) {
        let found = sectors(found);
        assert!(self.least.is_subset(&found), "{what}: a change is missing");
        assert!(found.is_subset(&self.most), "{what}: more is dirty than was touched");
    }
}

#[derive(Clone, Debug)]
enum Step {
    Guest(Act),
    Clear(usize),
    Switch(usize, bool),
    Merge(usize, usize),
    Replace(usize),
}

fn any_step(size: u64) -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => any_act(size / 512, true).prop_map(Step::Guest),
        1 => (0usize..3).prop_map(Step::Clear),
        1 => (0usize..3, any::<bool>()).prop_map(|(at, on)| Step::Switch(at, on)),
        1 => (0usize..3, 0usize..3).prop_map(|(to, from)| Step::Merge(to, from)),
        1 => (0usize..3).prop_map(Step::Replace),
    ]
}

const NAMES: [&str; 3] = ["fine", "middle", "coarse"];
const GRANULARITIES: [u64; 3] = [512, 4096, 65536];

async fn follows_the_model(shape: &Shape, steps: &[Step]) -> MemoryStorage {
    let cluster = u64::from(shape.cluster_bytes);
    let storage = shape.create().await;
    let mut image = shape.open(&storage).await.unwrap();
    let mut models = Vec::new();
    for (name, granularity) in NAMES.into_iter().zip(GRANULARITIES) {
        image.add_bitmap(name, granularity, true).await.unwrap();
        models.push(Model { enabled: true, granularity, ..Model::default() });
    }
    for step in steps {
        match step {
            Step::Guest(Act::Reopen) => {
                image.close().await.unwrap();
                check(&storage.snapshot()).assert_clean("closed");
                image = shape.open(&storage).await.unwrap();
            }
            Step::Guest(act) => {
                let before = read_all(&image).await;
                act.apply(&image).await.unwrap();
                let now = read_all(&image).await;
                let range = act.range(shape.size_bytes);
                models.iter_mut().for_each(|model| model.record(range, &before, &now, cluster));
            }
            Step::Clear(at) => {
                image.clear_bitmap(NAMES[*at]).await.unwrap();
                models[*at].least.clear();
                models[*at].most.clear();
            }
            Step::Switch(at, on) => {
                if *on {
                    image.enable_bitmap(NAMES[*at]).await.unwrap();
                } else {
                    image.disable_bitmap(NAMES[*at]).await.unwrap();
                }
                models[*at].enabled = *on;
            }
            Step::Merge(to, from) => {
                image.merge_bitmap(NAMES[*to], &image, NAMES[*from]).await.unwrap();
                let from = models[*from].clone();
                let to = &mut models[*to];
                to.least.extend(&from.least);
                for sector in from.most {
                    let wide = range(sector * 512, 512).widen(to.granularity);
                    to.most.extend(wide.start() / 512..wide.end() / 512);
                }
            }
            Step::Replace(at) => {
                image.remove_bitmap(NAMES[*at]).await.unwrap();
                image.add_bitmap(NAMES[*at], GRANULARITIES[*at], true).await.unwrap();
                models[*at] =
                    Model { enabled: true, granularity: GRANULARITIES[*at], ..Model::default() };
            }
        }
        for (name, model) in NAMES.iter().zip(&models) {
            model.assert_fits(&dirty(&image, name).await, &format!("{name} after {step:?}"));
        }
    }
    image.close().await.unwrap();
    check(&storage.snapshot()).assert_clean("closed at the end");
    let image = shape.open_read_only(&storage).await.unwrap();
    for (name, model) in NAMES.iter().zip(&models) {
        model.assert_fits(&dirty(&image, name).await, &format!("{name} at the end"));
    }
    let list = image.bitmaps().await.unwrap();
    for info in &list {
        let at = NAMES.iter().position(|name| *name == info.name).unwrap();
        assert_eq!((info.enabled, info.inconsistent), (models[at].enabled, false));
    }
    storage
}

fn records_every_change(shape: &Shape, cases: u32) {
    let config = Config { cases: rounds(cases), failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new(config);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let steps = proptest::collection::vec(any_step(shape.size_bytes), 1..30);
    let result = runner.run(&steps, |steps| {
        let storage = block_on(follows_the_model(shape, &steps));
        if shape.backing.is_none() {
            std::fs::write(&path, storage.snapshot()).unwrap();
            let found = qemu_check(&path);
            prop_assert!(found.is_clean(), "{:?}", found);
        }
        Ok(())
    });
    result.unwrap();
}

#[test]
fn bitmaps_in_clusters_of_512_bytes_record_every_change_and_no_more() {
    records_every_change(&Shape { size_bytes: (200 << 10) + 512, ..Shape::new(512) }, 16);
}

#[test]
fn bitmaps_in_clusters_of_4096_bytes_over_a_backing_file_record_every_change() {
    let shape = Shape { size_bytes: (300 << 10) + 512, ..Shape::new(4096) };
    records_every_change(&shape.over_data(), 16);
}

#[test]
fn bitmaps_in_clusters_of_64_kib_record_every_change() {
    records_every_change(&Shape { size_bytes: (700 << 10) + 512, ..Shape::new(65536) }, 16);
}

/// A power cut after every operation: the image is consistent, and a bitmap that is has every change since it began.
async fn survives_cuts(shape: &Shape, acts: &[Act], seeds: u64) {
    let storage = shape.create().await;
    storage.without_fallocate();
    let empty = shape.content();
    let mut image = shape.open(&storage).await.unwrap();
    image.add_bitmap("fine", 512, true).await.unwrap();
    for (number, act) in acts.iter().enumerate() {
        match act {
            Act::Reopen => {
                image.close().await.unwrap();
                image = shape.open(&storage).await.unwrap();
            }
            Act::Flush if number % 3 == 0 => {
                // Something that stores all bitmaps while the image stays open.
                let name = format!("more {number}");
                image.add_bitmap(&name, 65536, number % 2 == 0).await.unwrap();
                if number % 4 == 0 {
                    image.remove_bitmap(&name).await.unwrap();
                }
            }
            act => act.apply(&image).await.unwrap(),
        }
    }
    image.close().await.unwrap();
    let (mut saved, mut lost) = (0, 0);
    for ops in 0..=storage.log_len() {
        for seed in 0..seeds {
            let what = format!("power cut after {ops} operations, seed {seed}");
            let left = storage.crash_image_seeded(ops, seed + ops as u64 * 31);
            check(&left.snapshot()).assert_consistent(&what);
            let image = shape.open_read_only(&left).await.unwrap();
            let list = image.bitmaps().await.unwrap();
            let fine = list.iter().find(|info| info.name == "fine");
            if fine.is_none_or(|info| info.inconsistent) {
                lost += 1;
                continue;
            }
            saved += 1;
            let now = read_all(&image).await;
            let found = sectors(&dirty(&image, "fine").await);
            for (sector, (old, new)) in (0..).zip(empty.chunks(512).zip(now.chunks(512))) {
                assert!(
                    old == new || found.contains(&sector),
                    "{what}: sector {sector} is missing"
                );
            }
        }
    }
    assert!(saved > 0 && lost > 0, "{saved} {lost}: both must have been looked at");
}

fn cuts(shape: &Shape, runs: u32, acts: usize, seeds: u64) {
    for run in 0..rounds(runs) {
        let mut seed = [9; 32];
        seed[..4].copy_from_slice(&run.to_le_bytes());
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
        let mut runner = TestRunner::new_with_rng(Config::default(), rng);
        let any = proptest::collection::vec(any_act(shape.size_bytes / 512, false), acts);
        let mut acts = any.new_tree(&mut runner).unwrap().current();
        acts.insert(acts.len() / 2, Act::Reopen);
        block_on(survives_cuts(shape, &acts, seeds));
    }
}

#[test]
fn no_power_cut_leaves_a_bitmap_that_misses_a_change_in_clusters_of_512_bytes() {
    cuts(&Shape { size_bytes: 60 << 10, ..Shape::new(512) }, 10, 16, 3);
}

#[test]
fn no_power_cut_leaves_a_bitmap_that_misses_a_change_in_clusters_of_4096_bytes() {
    cuts(&Shape { size_bytes: 200 << 10, ..Shape::new(4096) }.over_data(), 8, 16, 4);
}

#[test]
fn qemu_agrees_after_power_cuts() {
    let shape = Shape { size_bytes: 200 << 10, ..Shape::new(4096) };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    block_on(async {
        let storage = shape.create().await;
        storage.without_fallocate();
        let image = shape.open(&storage).await.unwrap();
        image.add_bitmap("a", 512, true).await.unwrap();
        write(&image, 0, 9000).await;
        image.add_bitmap("b", 4096, false).await.unwrap();
        write(&image, 50_000, 9000).await;
        image.remove_bitmap("b").await.unwrap();
        image.close().await.unwrap();
        for ops in 0..=storage.log_len() {
            std::fs::write(&path, storage.crash_image_seeded(ops, ops as u64).snapshot()).unwrap();
            let found = qemu_check(&path);
            assert!(found.is_consistent(), "after {ops} operations: {found:?}");
        }
    });
}

#[test]
fn many_writers_while_bitmaps_come_and_go_lose_no_change() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).build().unwrap();
    runtime.block_on(async {
        let shape = Shape { size_bytes: 8 << 20, ..Shape::new(4096) };
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        image.add_bitmap("all", 4096, true).await.unwrap();
        let writer = |writer: u64| {
            let image = image.clone();
            tokio::spawn(async move {
                let mut done = Vec::new();
                for n in 0..60 {
                    let at = (n * 977 + writer * 131) % 2040 * 4096 + writer;
                    match n % 3 {
                        0 => image
                            .write_zeroes(
                                range(at, 4096),
                                ZeroMode::default(),
                                Durability::Deferred,
                            )
                            .await
                            .unwrap(),
                        _ => write(&image, at, 5000).await,
                    }
                    done.push((at, at + 4096));
                }
                done
            })
        };
        let writers: Vec<_> = (0..6).map(writer).collect();
        for n in 0..10 {
            let name = format!("b{n}");
            image.add_bitmap(&name, 512, true).await.unwrap();
            dirty(&image, "all").await;
            image.flush().await.unwrap();
            image.remove_bitmap(&name).await.unwrap();
        }
        let mut done = Vec::new();
        for writer in writers {
            done.extend(writer.await.unwrap());
        }
        assert!(sectors(&done).is_subset(&sectors(&dirty(&image, "all").await)));
        image.close().await.unwrap();
        check(&storage.snapshot()).assert_clean("after all");
        let again = shape.open_read_only(&storage).await.unwrap();
        assert!(sectors(&done).is_subset(&sectors(&dirty(&again, "all").await)));
    });
}

#[test]
fn clearing_waits_for_writes_in_flight() {
    block_on(async {
        let shape = Shape::new(65536);
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        image.add_bitmap("b", 4096, true).await.unwrap();
        write(&image, 0, 512).await;
        let held = storage.hold(|op| op.kind == block::OpKind::Write && op.range.start() != 0);
        let (writer, clearer) = (image.clone(), image.clone());
        let writing = tokio::task::LocalSet::new();
        writing
            .run_until(async move {
                let write = tokio::task::spawn_local(async move { write(&writer, 0, 512).await });
                while held.count() == 0 {
                    tokio::task::yield_now().await;
                }
                let clear =
                    tokio::task::spawn_local(async move { clearer.clear_bitmap("b").await });
                for _ in 0..100 {
                    tokio::task::yield_now().await;
                }
                assert!(!clear.is_finished(), "the write could be missed");
                drop(held);
                write.await.unwrap();
                clear.await.unwrap().unwrap();
            })
            .await;
        assert_eq!(dirty(&image, "b").await, []);
        image.close().await.unwrap();
    });
}

/// Changes bytes of an image with one bitmap and says how writing, reading and listing go.
async fn damaged(change: impl FnOnce(&mut [u8], usize)) -> (bool, bool, bool) {
    let shape = Shape::new(4096);
    let storage = shape.create().await;
    let image = shape.open(&storage).await.unwrap();
    image.add_bitmap("b", 512, true).await.unwrap();
    write(&image, 0, 10_000).await;
    image.close().await.unwrap();
    let mut bytes = storage.snapshot();
    let header_bytes =
        usize::try_from(u32::from_be_bytes(bytes[100..104].try_into().unwrap())).unwrap();
    let directory = &bytes[header_bytes + 24..header_bytes + 32];
    let directory = usize::try_from(u64::from_be_bytes(directory.try_into().unwrap())).unwrap();
    change(&mut bytes, directory);
    let storage = MemoryStorage::from_bytes(bytes, 512);
    let image = shape.open(&storage).await.unwrap();
    let read = image.read(range(0, 4096)).await.is_ok();
    let list = image.bitmaps().await.is_ok();
    let wrote = image.write(0, vec![1; 512].into(), Durability::Deferred).await.is_ok();
    image.close().await.unwrap();
    (read, list, wrote)
}

#[test]
fn a_damaged_directory_stops_writing_and_not_reading() {
    block_on(async {
        for (at, byte) in [(7, 1), (0, 0x80), (11, 0), (12, 1), (16, 7), (17, 3), (19, 200)] {
            let found = damaged(|bytes, directory| bytes[directory + at] = byte).await;
            assert_eq!(found, (true, false, false), "byte {at}");
        }
    });
}

#[test]
fn a_damaged_table_loses_its_bitmap_alone() {
    block_on(async {
        let table = |bytes: &[u8], directory: usize| {
            usize::try_from(u64::from_be_bytes(bytes[directory..directory + 8].try_into().unwrap()))
                .unwrap()
        };
        // Reserved bits, an unaligned place, one behind the file, one over the header's neighbour.
        for entry in [1u64 << 60, 0x1200, 1 << 40, 0x1001] {
            let found = damaged(|bytes, directory| {
                let at = table(bytes, directory);
                bytes[at..at + 8].copy_from_slice(&entry.to_be_bytes());
            })
            .await;
            assert_eq!(found, (true, true, true), "entry {entry:#x}");
        }
    });
}

#[test]
fn extra_data_is_kept_and_keeps_a_bitmap_from_being_used() {
    block_on(async {
        let shape = Shape::new(4096);
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        image.add_bitmap("abcdefgh", 512, false).await.unwrap();
        image.close().await.unwrap();
        let mut bytes = storage.snapshot();
        let header_bytes =
            usize::try_from(u32::from_be_bytes(bytes[100..104].try_into().unwrap())).unwrap();
        let directory = &bytes[header_bytes + 24..header_bytes + 32];
        let at = usize::try_from(u64::from_be_bytes(directory.try_into().unwrap())).unwrap();
        // The first four bytes of the name become extra data.
        bytes[at + 19] = 4;
        bytes[at + 23] = 4;
        let storage = MemoryStorage::from_bytes(bytes, 512);
        let image = shape.open(&storage).await.unwrap();
        let list = image.bitmaps().await.unwrap();
        assert_eq!((&*list[0].name, list[0].inconsistent), ("efgh", true));
        let refused = image.clear_bitmap("efgh").await.unwrap_err();
        assert!(matches!(refused, Error::Bitmap { reason: BitmapError::ExtraData, .. }));
        image.add_bitmap("b", 512, true).await.unwrap();
        write(&image, 0, 100).await;
        image.close().await.unwrap();
        let after = storage.snapshot();
        assert!(after.windows(8).any(|window| window == b"abcdefgh"), "kept byte for byte");
        let image = shape.open(&storage).await.unwrap();
        image.remove_bitmap("efgh").await.unwrap();
        image.close().await.unwrap();
        check(&storage.snapshot()).assert_clean("removed");
    });
}
