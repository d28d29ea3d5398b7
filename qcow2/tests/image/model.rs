//! Whatever is written, zeroed, discarded and reopened, an image reads like the vector that it imitates, and a clean
//! close leaves neither errors nor leaks.

use std::cell::Cell;

use block::{BlockDevice, MemoryStorage};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use qcow2::Image;

use crate::check::check;
use crate::common::{block_on, qemu_check, range, read_all};
use crate::memory::{Act, Shape, any_act, note_discard, part, part_mut};
use crate::rounds::rounds;

/// How often `qemu-img` has a look, too.
const QEMU_EVERY: usize = 16;

async fn run(shape: &Shape, acts: &[Act]) -> MemoryStorage {
    let storage = shape.create().await;
    let mut image = shape.open(&storage).await.unwrap();
    let mut model = shape.content();
    for act in acts {
        let range = act.range(shape.size_bytes);
        match act {
            Act::Reopen => {
                image.close().await.unwrap();
                check(&storage.snapshot()).assert_clean("closed");
                image = shape.open(&storage).await.unwrap();
            }
            Act::Discard { .. } => {
                act.apply(&image).await.unwrap();
                let now = image.read(range).await.unwrap().to_vec();
                note_discard(&mut model, range, &now, &format!("{act:?}"));
            }
            _ => {
                act.apply(&image).await.unwrap();
                part_mut(&mut model, range).copy_from_slice(&act.data(range));
            }
        }
        let around = block::ByteRange::between(
            range.start().saturating_sub(5000),
            (range.end() + 5000).min(shape.size_bytes),
        );
        assert!(image.read(around).await.unwrap().to_vec() == part(&model, around), "{act:?}");
    }
    assert!(read_all(&image).await == model);
    extents_tell_the_truth(&image, &model).await;
    image.close().await.unwrap();
    check(&storage.snapshot()).assert_clean("closed at the end");
    let again = shape.open_read_only(&storage).await.unwrap();
    assert!(read_all(&again).await == model, "reopened");
    extents_tell_the_truth(&again, &model).await;
    storage
}

async fn extents_tell_the_truth(image: &Image, model: &[u8]) {
    let size = image.limits().size_bytes;
    let mut at = 0;
    while at < size {
        let extents = image.extents(range(at, size - at)).await.unwrap();
        assert!(!extents.is_empty());
        for extent in extents {
            assert_eq!(extent.range.start(), at);
            at = extent.range.end();
            if extent.zero {
                assert!(part(model, extent.range).iter().all(|byte| *byte == 0), "{extent:?}");
            }
        }
    }
    assert_eq!(at, size);
    let map = image.map(range(0, size)).await.unwrap();
    assert_eq!(map.iter().map(|extent| extent.range.len()).sum::<u64>(), size);
    assert!(map.windows(2).all(|pair| pair[0].state != pair[1].state));
}

fn imitates_a_vector(shape: Shape, cases: u32) {
    let config = Config { cases: rounds(cases), failure_persistence: None, ..Config::default() };
    let sectors = shape.size_bytes.div_ceil(512);
    let seen = Cell::new(0usize);
    let mut runner = TestRunner::new(config);
    let acts = proptest::collection::vec(any_act(sectors, true), 1..60);
    let result = runner.run(&acts, |acts| {
        let storage = block_on(run(&shape, &acts));
        seen.set(seen.get() + 1);
        if shape.backing.is_none() && seen.get().is_multiple_of(QEMU_EVERY) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("disk.qcow2");
            std::fs::write(&path, storage.snapshot()).unwrap();
            let found = qemu_check(&path);
            prop_assert!(found.is_clean(), "{:?}", found);
        }
        Ok(())
    });
    result.unwrap();
}

#[test]
fn clusters_of_512_bytes_imitate_a_vector() {
    imitates_a_vector(Shape::new(512), 60);
}

#[test]
fn clusters_of_512_bytes_imitate_a_vector_on_blocks_of_4096() {
    imitates_a_vector(Shape::new(512).aligned(4096).over_data(), 40);
}

#[test]
fn clusters_of_4096_bytes_over_a_backing_file_imitate_a_vector() {
    imitates_a_vector(Shape::new(4096).over_data(), 40);
}

#[test]
fn clusters_of_4096_bytes_imitate_a_vector_at_any_alignment() {
    imitates_a_vector(Shape::new(4096).aligned(1), 40);
}

#[test]
fn clusters_of_64_kib_imitate_a_vector() {
    imitates_a_vector(Shape::new(65536), 40);
}

#[test]
fn clusters_of_64_kib_over_a_backing_file_imitate_a_vector() {
    imitates_a_vector(Shape::new(65536).aligned(4096).over_data(), 40);
}

#[test]
fn clusters_of_2_mib_imitate_a_vector() {
    imitates_a_vector(Shape { size_bytes: (7 << 20) + 512, ..Shape::new(2 << 20) }, 8);
}

#[test]
fn clusters_of_2_mib_over_a_backing_file_imitate_a_vector() {
    imitates_a_vector(Shape { size_bytes: (7 << 20) + 512, ..Shape::new(2 << 20) }.over_data(), 8);
}

#[test]
fn version_2_imitates_a_vector() {
    imitates_a_vector(Shape::new(512).old(), 25);
    imitates_a_vector(Shape::new(4096).old().over_data(), 25);
    imitates_a_vector(Shape::new(65536).old().over_data(), 15);
}

#[test]
fn subclusters_imitate_a_vector() {
    imitates_a_vector(Shape::new(16384).extended(), 30);
    imitates_a_vector(Shape::new(16384).extended().over_data(), 30);
    imitates_a_vector(Shape::new(65536).extended().over_data().aligned(4096), 30);
    let large = Shape { size_bytes: (7 << 20) + 512, ..Shape::new(2 << 20) };
    imitates_a_vector(large.extended().over_data(), 8);
}

#[test]
fn refcounts_of_every_width_imitate_a_vector() {
    for bits in [1, 2, 4, 8, 32, 64] {
        imitates_a_vector(Shape::new(512).refcount_bits(bits), 12);
        imitates_a_vector(Shape::new(4096).refcount_bits(bits).over_data(), 8);
    }
}

#[test]
fn disks_that_end_inside_a_sector_imitate_a_vector() {
    for size_bytes in [1, 511, 513, 70_000, 300_001, 2_097_151] {
        imitates_a_vector(Shape { size_bytes, ..Shape::new(512) }.over_data(), 8);
        imitates_a_vector(Shape { size_bytes, ..Shape::new(65536) }, 8);
        imitates_a_vector(Shape { size_bytes, ..Shape::new(65536) }.extended().over_data(), 8);
        imitates_a_vector(Shape { size_bytes, ..Shape::new(4096) }.old().over_data(), 8);
    }
}
