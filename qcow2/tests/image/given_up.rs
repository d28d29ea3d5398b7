//! Flushes that are given up half-way, because their future is dropped or the host is full, and power that goes while
//! the next one runs: what the first has linked already names nothing that is not there.

use std::io;
use std::pin::pin;
use std::task::{Context, Waker};

use block::{BlockDevice, Durability, MemoryStorage, OpKind, OpView};
use qcow2::Image;

use crate::check::check;
use crate::common::{block_on, pattern, range, read_all};
use crate::memory::{Shape, part, part_mut, read};

/// So much of the disk is written that its refcounts fill the first table nearly.
const FILLED: usize = 1980 << 10;

fn changes(op: &OpView) -> bool {
    matches!(op.kind, OpKind::Write | OpKind::Sync)
}

/// Drops the future of a flush when `after` of its operations have taken effect; one more is on its way then.
async fn drop_flush(image: &Image, storage: &MemoryStorage, after: usize) -> bool {
    let held = storage.hold(changes);
    let mut flush = pin!(image.flush());
    let mut done = 0;
    loop {
        if flush.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready() {
            return false;
        }
        if done == after && held.count() > 0 {
            return true;
        }
        if held.release_one() {
            done += 1;
        }
        tokio::task::yield_now().await;
    }
}

/// Lets the host be full for one write of a flush.
async fn fail_flush(image: &Image, storage: &MemoryStorage, after: usize) -> bool {
    storage.fail_nth(after, io::ErrorKind::StorageFull, |op| op.kind == OpKind::Write);
    let failed = image.flush().await.is_err();
    storage.clear_faults();
    failed
}

/// Gives a flush up that writes what the image does not know yet, at any of its operations.
async fn survives(shape: &Shape, old: &MemoryStorage, at: u64, full: bool) {
    let len = if shape.refcount_bits == 64 { 64 << 10 } else { 4096 };
    // What is left of a power cut: nothing, all, and parts in several ways; less often where it takes its time.
    let seeds = if shape.refcount_bits == 64 { 5..6 } else { 0..8 };

    let mut model = read_all(&shape.open_read_only(old).await.unwrap()).await;
    let [first, second] = [1, 2].map(|seed| pattern(seed, usize::try_from(len).unwrap()));
    part_mut(&mut model, range(at, len)).copy_from_slice(&first);
    part_mut(&mut model, range(at + len, len)).copy_from_slice(&second);
    for after in 0.. {
        let storage = MemoryStorage::from_bytes(old.snapshot(), shape.align);
        let image = shape.open(&storage).await.unwrap();
        image.write(at, first.clone().into(), Durability::Deferred).await.unwrap();
        let given_up = match full {
            true => fail_flush(&image, &storage, after).await,
            false => drop_flush(&image, &storage, after).await,
        };
        if !given_up {
            assert!(after > 2, "nothing was given up");
            return;
        }
        let since = storage.log_len();
        image.write(at + len, second.clone().into(), Durability::Deferred).await.unwrap();
        image.flush().await.unwrap();
        let what = format!("full: {full}, given up after {after}");
        for ops in since..=storage.log_len() {
            for seed in seeds.clone() {
                let left = storage.crash_image_seeded(ops, seed);
                let what = format!("{what}, power cut after {ops}, {seed}");
                check(&left.snapshot()).assert_consistent(&what);
                let image = shape.open_read_only(&left).await.unwrap();
                let disk = read(&image, at, 2 * len).await;
                let mut wanted = disk.iter().zip(part(&model, range(at, 2 * len)));
                let wrong = wanted.any(|(is, wanted)| is != wanted && *is != 0);
                assert!(!wrong, "{what}: neither old nor new");
            }
        }
        image.close().await.unwrap();
        check(&storage.snapshot()).assert_clean(&what);
        let image = shape.open_read_only(&storage).await.unwrap();
        assert!(read_all(&image).await == model, "{what}: closed");
    }
}

#[test]
fn a_new_table_that_a_given_up_flush_has_linked_is_changed_in_order() {
    let shape = Shape { size_bytes: 60 << 10, ..Shape::new(512) };
    for full in [false, true] {
        block_on(async {
            let old = shape.create().await;
            survives(&shape, &old, 1024, full).await;
        });
    }
}

#[test]
fn a_refcount_table_that_a_given_up_flush_has_moved_is_changed_in_order() {
    // 64 refcounts a block, and 64 blocks in the first table.
    let shape = Shape { size_bytes: 3 << 20, ..Shape::new(512).refcount_bits(64) };
    for full in [false, true] {
        block_on(async {
            let old = shape.create().await;
            let image = shape.open(&old).await.unwrap();
            let fill = pattern(3, FILLED);
            image.write(0, fill.into(), Durability::Deferred).await.unwrap();
            image.close().await.unwrap();
            let table = |bytes: &[u8]| bytes[48..60].to_vec();
            let before = table(&old.snapshot());
            survives(&shape, &old, FILLED as u64, full).await;
            let image = shape.open(&old).await.unwrap();
            let data = pattern(1, 64 << 10);
            image.write(FILLED as u64, data.into(), Durability::Durable).await.unwrap();
            assert!(table(&old.snapshot()) != before, "the table has moved");
        });
    }
}
