//! Disks that grow while requests for their old end wait, and that two want to resize at once: what was asked for happens,
//! nothing that others wrote is lost, and no old bytes come to light.

use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Waker};

use block::{BlockDevice, Durability, HeldOps, MemoryStorage, OpKind, OpView, ZeroMode};
use qcow2::{Image, LayerState, Preallocation, ResizeOptions};

use crate::check::check;
use crate::common::{block_on, pattern, range, read_all};
use crate::memory::Shape;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// A disk that ends within a cluster, after some sectors of it.
const ODD: u64 = 3 * 64 * KIB + 10 * 512;

fn noop() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

async fn full(size_bytes: u64) -> (MemoryStorage, Image) {
    let shape = Shape { size_bytes, ..Shape::new(65536) };
    let storage = shape.create().await;
    let image = shape.open(&storage).await.unwrap();
    let disk = pattern(1, usize::try_from(size_bytes).unwrap());
    image.write(0, disk.into(), Durability::Durable).await.unwrap();
    (storage, image)
}

/// Holds the first write that `which` chooses.
fn hold_one(storage: &MemoryStorage, which: fn(&OpView) -> bool) -> HeldOps {
    let first = AtomicBool::new(true);
    storage.hold(move |op| {
        op.kind == OpKind::Write && which(op) && first.swap(false, Ordering::SeqCst)
    })
}

/// Lets `work` run until an operation of it is held.
async fn until_held(held: &HeldOps, mut work: Pin<&mut impl Future>) {
    while held.count() == 0 {
        assert!(work.as_mut().poll(&mut noop()).is_pending());
        tokio::task::yield_now().await;
    }
}

#[test]
fn zeros_for_the_old_end_are_written_though_the_disk_grows_before_their_turn() {
    for mode in [ZeroMode::default(), ZeroMode { keep_allocated: true, fast_only: false }] {
        block_on(async {
            let (storage, image) = full(ODD).await;
            let held = hold_one(&storage, |op| op.range.start() == 0);
            let options = ResizeOptions::default();
            let mut grows = pin!(image.resize(10 * 64 * KIB, &options));
            until_held(&held, grows.as_mut()).await;
            let last = range(3 * 64 * KIB, 10 * 512);
            let mut zeroes = pin!(image.write_zeroes(last, mode, Durability::Deferred));
            assert!(zeroes.as_mut().poll(&mut noop()).is_pending());
            assert!(held.release_one());
            grows.await.unwrap();
            zeroes.await.unwrap();
            let mut model = pattern(1, 3 << 16);
            model.resize(10 << 16, 0);
            assert!(read_all(&image).await == model, "{mode:?}");
            image.close().await.unwrap();
            check(&storage.snapshot()).assert_clean("grown");
        });
    }
}

#[cfg(feature = "compression")]
#[test]
fn a_compressed_last_cluster_leaves_what_came_behind_it_when_the_disk_grew() {
    block_on(async {
        let (storage, image) = full(ODD).await;
        let held = hold_one(&storage, |op| op.range.start() == 0);
        let options = ResizeOptions::default();
        let mut grows = pin!(image.resize(10 * 64 * KIB, &options));
        until_held(&held, grows.as_mut()).await;
        let mut last = pin!(image.write_compressed(3 * 64 * KIB, vec![7; 10 * 512].into()));
        // It has looked at the end of the disk.
        assert!(last.as_mut().poll(&mut noop()).is_pending());
        assert!(held.release_one());
        let tail = async {
            grows.await.unwrap();
            image.write(ODD, vec![9; 4096].into(), Durability::Deferred).await
        };
        let (last, tail) = tokio::join!(last, tail);
        last.unwrap();
        tail.unwrap();
        let mut model = pattern(1, 3 << 16);
        model.resize(usize::try_from(ODD).unwrap(), 7);
        model.resize(model.len() + 4096, 9);
        model.resize(10 << 16, 0);
        assert!(read_all(&image).await == model);
        // Whoever comes first: a stream would have said that zeros follow.
        let cluster = range(3 * 64 * KIB, 64 * KIB);
        let states: Vec<_> = image.map(cluster).await.unwrap().iter().map(|e| e.state).collect();
        assert_eq!(states, [LayerState::Data]);
        image.close().await.unwrap();
        check(&storage.snapshot()).assert_clean("grown");
    });
}

#[test]
fn a_bitmap_that_is_made_or_cleared_while_the_disk_grows_reaches_its_new_end() {
    for clears in [false, true] {
        block_on(async {
            let (storage, image) = full(ODD).await;
            if clears {
                image.add_bitmap("since", 512, true).await.unwrap();
            }
            let held = hold_one(&storage, |op| op.range.start() == 0);
            let options = ResizeOptions::default();
            let mut grows = pin!(image.resize(10 * 64 * KIB, &options));
            until_held(&held, grows.as_mut()).await;
            let mut changes = pin!(async {
                match clears {
                    true => image.clear_bitmap("since").await,
                    false => image.add_bitmap("since", 512, true).await,
                }
            });
            assert!(changes.as_mut().poll(&mut noop()).is_pending());
            assert!(held.release_one());
            let (grown, changed) = tokio::join!(grows, changes);
            grown.unwrap();
            changed.unwrap();
            let end = 10 * 64 * KIB;
            image.write(end - 512, vec![7; 512].into(), Durability::Deferred).await.unwrap();
            let dirty = crate::bitmaps::dirty(&image, "since").await;
            assert_eq!(dirty, [(end - 512, end)], "clears: {clears}");
            image.close().await.unwrap();
            check(&storage.snapshot()).assert_clean("grown");
        });
    }
}

#[test]
fn whoever_resizes_waits_for_the_one_before() {
    block_on(async {
        let below = pattern(5, 16 << 20);
        let shape =
            Shape { size_bytes: 4 * MIB, backing: Some(below.clone()), ..Shape::new(65536) };
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        let held = hold_one(&storage, |op| op.range.len() >= MIB);
        let grown =
            ResizeOptions { preallocation: Preallocation::Full, ..ResizeOptions::default() };
        let mut grows = pin!(image.resize(8 * MIB, &grown));
        until_held(&held, grows.as_mut()).await;
        let cut = ResizeOptions { allow_shrinking: true, ..ResizeOptions::default() };
        let mut shrinks = pin!(image.resize(MIB, &cut));
        for _ in 0..1000 {
            assert!(shrinks.as_mut().poll(&mut noop()).is_pending());
            tokio::task::yield_now().await;
        }
        assert_eq!(image.limits().size_bytes, 4 * MIB);
        assert!(held.release_one());
        let (first, second) = tokio::join!(grows, shrinks);
        first.unwrap();
        second.unwrap();
        assert_eq!(image.limits().size_bytes, MIB);
        image.resize(8 * MIB, &ResizeOptions::default()).await.unwrap();
        let mut model = below[..1 << 20].to_vec();
        model.resize(8 << 20, 0);
        assert!(read_all(&image).await == model);
        image.close().await.unwrap();
        check(&storage.snapshot()).assert_clean("resized three times");
    });
}
