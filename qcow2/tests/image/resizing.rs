//! Disks that get another size while they have bitmaps, and while requests wait: bitmaps follow as QEMU's do, at every
//! power cut they fit the size that the header says, and nothing is written behind a new end.

use std::path::Path;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Waker};

use block::{BlockDevice, Durability, MemoryStorage, OpKind, OpView, ZeroMode};
use qcow2::{ChangeError, CreateOptions, Error, Image, OpenOptions, ResizeOptions};

use crate::bitmaps::{dirty, dirty_by_qemu};
use crate::check::check;
use crate::common::{block_on, pattern, qemu_check, qemu_create, qemu_img, qemu_io, read_all};
use crate::memory::Shape;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn shrinking() -> ResizeOptions {
    ResizeOptions { allow_shrinking: true, ..ResizeOptions::default() }
}

async fn write(image: &Image, at: u64, len: usize) {
    image.write(at, pattern(at + 1, len).into(), Durability::Deferred).await.unwrap();
}

async fn resize(path: &Path, size_bytes: u64) {
    let image = Image::open(path, OpenOptions::writing()).await.unwrap();
    image.resize(size_bytes, &shrinking()).await.unwrap();
    image.close().await.unwrap();
}

#[test]
fn bitmaps_grow_and_are_cut_as_qemu_does_it() {
    let dir = tempfile::tempdir().unwrap();
    for (cluster, granularity) in [("512", "512"), ("4096", "65536"), ("65536", "4096")] {
        let path = dir.path().join(format!("{cluster}.qcow2"));
        let copy = dir.path().join(format!("{cluster}.copy.qcow2"));
        let name = path.to_str().unwrap();
        qemu_create(&path, &format!("cluster_size={cluster}"), "11M", None);
        qemu_img(&["bitmap", "--add", "-g", granularity, name, "on"]);
        qemu_img(&["bitmap", "--add", "--disable", "-g", granularity, name, "off"]);
        qemu_io(&path, &["write 0 70k", "write 5M 1M", "discard 8M 1M", "write 10M 1M"]);
        qemu_img(&["bitmap", "--merge", "on", name, "off"]);
        for size in [11 * MIB + 512, 700 * MIB, 6 * MIB, 5 * MIB + 64 * KIB, 12 * MIB] {
            std::fs::copy(&path, &copy).unwrap();
            block_on(resize(&path, size));
            let size = size.to_string();
            let copied = copy.to_str().unwrap();
            qemu_img(&["resize", "-q", "--shrink", "-f", "qcow2", copied, &size]);
            let found = qemu_check(&path);
            assert!(found.is_clean(), "{cluster} {size}: {found:?}");
            for bitmap in ["on", "off"] {
                let (ours, theirs) = (dirty_by_qemu(&path, bitmap), dirty_by_qemu(&copy, bitmap));
                assert_eq!(ours, theirs, "{bitmap} of clusters of {cluster} at {size} bytes");
            }
        }
        block_on(async {
            let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
            image.resize(20 * MIB, &ResizeOptions::default()).await.unwrap();
            write(&image, 19 * MIB, 100).await;
            assert!(dirty(&image, "on").await.iter().any(|part| part.1 > 19 * MIB));
            image.close().await.unwrap();
        });
        let found = qemu_check(&path);
        assert!(found.is_clean(), "{found:?}");
        assert!(dirty_by_qemu(&path, "on").iter().any(|part| part.1 > 19 * MIB));
    }
}

#[test]
fn a_bitmap_that_cannot_follow_the_disk_stops_it_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    block_on(async {
        Image::create(&path, &CreateOptions::new(MIB)).await.unwrap();
        let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
        image.add_bitmap("b", 512, true).await.unwrap();
        let before = std::fs::read(&path).unwrap();
        for (size_bytes, bytes) in [(0, 0), (4 << 40, 1 << 30)] {
            let refused = image.resize(size_bytes, &shrinking()).await;
            let Err(Error::Change { what, .. }) = refused else { panic!("{refused:?}") };
            assert_eq!(what, ChangeError::BitmapBytes { name: "b".into(), bytes });
        }
        assert!(std::fs::read(&path).unwrap() == before);
        write(&image, 0, 512).await;
        image.flush().await.unwrap();
        // Left behind as after a power cut.
        drop(image);
        let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
        let refused = image.resize(2 * MIB, &ResizeOptions::default()).await;
        let Err(Error::Change { what, .. }) = refused else { panic!("{refused:?}") };
        assert_eq!(what, ChangeError::InconsistentBitmap { name: "b".into() });
        image.remove_bitmap("b").await.unwrap();
        image.resize(2 * MIB, &ResizeOptions::default()).await.unwrap();
        image.close().await.unwrap();
    });
    assert!(qemu_check(&path).is_clean());
}

/// The states that the bitmaps of a disk may be in after a power cut.
struct States {
    sizes: [u64; 2],
    /// What the bitmap that records says at each size.
    on: [Vec<(u64, u64)>; 2],
    /// What the one that does not says.
    off: [Vec<(u64, u64)>; 2],
}

/// Looks at every power cut of what `storage` logged from `from` on. Counts those that left the old and the new size.
async fn look_at_cuts(shape: &Shape, storage: &MemoryStorage, from: usize, states: &States) {
    let mut seen = [0, 0];
    for ops in from..=storage.log_len() {
        for seed in 0..4 {
            let what = format!("cut after {ops}, seed {seed}");
            let left = storage.crash_image_seeded(ops, seed + ops as u64 * 31);
            check(&left.snapshot()).assert_consistent(&what);
            let image = shape.open_read_only(&left).await.unwrap();
            let size = image.limits().size_bytes;
            let at = states.sizes.iter().position(|one| *one == size).expect("one of the sizes");
            seen[at] += 1;
            let list = image.bitmaps().await.unwrap();
            assert_eq!(list.len(), 2, "{what}");
            assert!(!list[1].inconsistent, "{what}: nobody writes what is switched off");
            assert_eq!(dirty(&image, "off").await, states.off[at], "{what}");
            if !list[0].inconsistent {
                assert_eq!(dirty(&image, "on").await, states.on[at], "{what}");
            }
        }
    }
    assert!(seen.iter().all(|times| *times > 0), "{seen:?}");
}

#[test]
fn size_and_bitmaps_switch_together_at_every_power_cut() {
    for cluster_bytes in [512, 4096] {
        block_on(async {
            let old = 200 * KIB;
            let shape = Shape { size_bytes: old, ..Shape::new(cluster_bytes) };
            let storage = shape.create().await;
            storage.without_fallocate();
            let image = shape.open(&storage).await.unwrap();
            image.add_bitmap("on", 512, true).await.unwrap();
            image.add_bitmap("off", 4096, false).await.unwrap();
            write(&image, 0, 5000).await;
            write(&image, 190 * KIB, 10 << 10).await;
            image.merge_bitmap("off", &image, "on").await.unwrap();
            let mut sizes = [old, old];
            // The table of the finer bitmap gets longer with the smaller clusters, and short again.
            for size in [5 * MIB, 100 * KIB, 150 * KIB] {
                image.flush().await.unwrap();
                sizes = [sizes[1], size];
                let (on, off) = (dirty(&image, "on").await, dirty(&image, "off").await);
                let from = storage.log_len();
                image.resize(size, &shrinking()).await.unwrap();
                let cut = |parts: &[(u64, u64)]| -> Vec<(u64, u64)> {
                    let inside = parts.iter().filter(|part| part.0 < size);
                    inside.map(|part| (part.0, part.1.min(size))).collect()
                };
                let states =
                    States { sizes, on: [on.clone(), cut(&on)], off: [off.clone(), cut(&off)] };
                assert_eq!(dirty(&image, "on").await, states.on[1]);
                assert_eq!(dirty(&image, "off").await, states.off[1]);
                look_at_cuts(&shape, &storage, from, &states).await;
            }
            image.close().await.unwrap();
            check(&storage.snapshot()).assert_clean("resized");
        });
    }
}

#[test]
fn a_host_that_fails_while_bitmaps_are_stored_leaves_size_and_bitmaps_as_they_were() {
    block_on(async {
        let shape = Shape { size_bytes: 200 * KIB, ..Shape::new(512) };
        let mut failed = 0;
        for nth in 0.. {
            let storage = shape.create().await;
            let image = shape.open(&storage).await.unwrap();
            image.add_bitmap("on", 512, true).await.unwrap();
            write(&image, 0, 5000).await;
            image.flush().await.unwrap();
            let before = dirty(&image, "on").await;
            storage.fail_nth_errno(nth, 28, |op| op.kind == OpKind::Write);
            let resized = image.resize(9 * MIB, &ResizeOptions::default()).await;
            storage.clear_faults();
            if resized.is_ok() {
                break;
            }
            failed += 1;
            if image.limits().size_bytes == shape.size_bytes
                && let Ok(()) = image.flush().await
            {
                assert_eq!(dirty(&image, "on").await, before, "{nth}");
                image.resize(9 * MIB, &ResizeOptions::default()).await.unwrap();
                write(&image, 8 * MIB, 512).await;
                image.close().await.unwrap();
                check(&storage.snapshot()).assert_clean("tried again");
            }
        }
        assert!(failed > 3, "{failed} writes failed");
    });
}

#[test]
fn a_write_that_waited_while_the_disk_shrank_is_refused_and_takes_no_space() {
    block_on(async {
        let shape = Shape { size_bytes: MIB, ..Shape::new(4096) };
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        // The first write keeps its lock until the host has finished. The switch to the new size waits for it, and what
        // comes then waits for the switch.
        let began = AtomicBool::new(false);
        let is_first =
            move |op: &OpView| op.kind == OpKind::Write && !began.swap(true, Ordering::Relaxed);
        let held = storage.hold(is_first);
        let noop = || Context::from_waker(Waker::noop());
        let mut first = pin!(image.write(0, vec![1; 4096].into(), Durability::Deferred));
        assert!(first.as_mut().poll(&mut noop()).is_pending());
        assert_eq!(held.count(), 1);
        let smaller = shrinking();
        let mut resizing = pin!(image.resize(64 * KIB, &smaller));
        assert!(resizing.as_mut().poll(&mut noop()).is_pending());
        let (at, part) = (512 * KIB, crate::common::range(513 * KIB, 512));
        let keep = ZeroMode { keep_allocated: true, fast_only: false };
        let mut write = pin!(image.write(at, vec![2; 200].into(), Durability::Deferred));
        let mut zeroes = pin!(image.write_zeroes(part, keep, Durability::Deferred));
        let mut compressed = pin!(image.write_compressed(at, vec![3; 4096].into()));
        let pending = [
            write.as_mut().poll(&mut noop()).is_pending(),
            zeroes.as_mut().poll(&mut noop()).is_pending(),
            compressed.as_mut().poll(&mut noop()).is_pending(),
        ];
        assert_eq!((pending, image.limits().size_bytes), ([true; 3], MIB));
        assert!(held.release_one());
        first.await.unwrap();
        let (resized, write, zeroes, compressed) =
            tokio::join!(resizing, write, zeroes, compressed);
        resized.unwrap();
        for refused in [write, zeroes, compressed.map_err(Into::into)] {
            let Err(error) = &refused else { panic!("it was written") };
            assert!(error.to_string().contains("passes the end"), "{error}");
        }
        let mut model = vec![0; 64 << 10];
        model[..4096].fill(1);
        assert!(read_all(&image).await == model);
        image.close().await.unwrap();
        let found = storage.snapshot();
        check(&found).assert_clean("shrunk");
        assert!(found.len() as u64 <= 32 * KIB, "{} bytes", found.len());
    });
}

#[test]
fn whatever_waited_while_the_disk_shrank_is_refused_behind_its_new_end_and_no_further() {
    block_on(async {
        let shape = Shape { size_bytes: MIB, ..Shape::new(65536) };
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        // The last cluster stays, and half of it leaves the disk: what was there in place stays in place.
        write(&image, MIB - 64 * KIB, 65536).await;
        image.flush().await.unwrap();
        let began = AtomicBool::new(false);
        let is_first =
            move |op: &OpView| op.kind == OpKind::Write && !began.swap(true, Ordering::Relaxed);
        let held = storage.hold(is_first);
        let noop = || Context::from_waker(Waker::noop());
        let mut first = pin!(image.write(0, vec![1; 65536].into(), Durability::Deferred));
        assert!(first.as_mut().poll(&mut noop()).is_pending());
        let (smaller, later) = (shrinking(), Durability::Deferred);
        let end = MIB - 32 * KIB;
        let mut resizing = pin!(image.resize(end, &smaller));
        assert!(resizing.as_mut().poll(&mut noop()).is_pending());
        let zeroes = ZeroMode::default();
        let last = crate::common::range(MIB - 64 * KIB, 64 * KIB);
        let mut requests = [
            image.write(end, pattern(5, 512).into(), later),
            image.write(end - 256, pattern(6, 512).into(), later),
            image.write_zeroes(last, zeroes, later),
            image.discard(last, later),
            image.write(end - 512, pattern(7, 512).into(), later),
            image.discard(crate::common::range(128 * KIB, 64 * KIB), later),
        ];
        for request in &mut requests {
            assert!(request.as_mut().poll(&mut noop()).is_pending());
        }
        assert_eq!(image.limits().size_bytes, MIB);
        assert!(held.release_one());
        // Together: they wait for each other's locks.
        let [a, b, c, d, e, f] = requests;
        let (resized, first, a, b, c, d, e, f) = tokio::join!(resizing, first, a, b, c, d, e, f);
        resized.unwrap();
        first.unwrap();
        let behind = [a, b, c, d, e, f].map(|answer| {
            answer.is_err_and(|error| {
                assert_eq!(error.kind(), block::ErrorKind::NoSpace, "{error}");
                assert!(error.to_string().contains(&format!("{end}")), "{error}");
                true
            })
        });
        assert_eq!(behind, [true, true, true, true, false, false]);
        let mut model = vec![0; usize::try_from(end).unwrap()];
        model[..65536].fill(1);
        let kept = pattern(MIB - 64 * KIB + 1, 32 << 10);
        let last = model.len() - kept.len();
        model[last..].copy_from_slice(&kept);
        let at = model.len() - 512;
        model[at..].copy_from_slice(&pattern(7, 512));
        assert!(read_all(&image).await == model);
        image.close().await.unwrap();
        check(&storage.snapshot()).assert_clean("shrunk within a cluster");
        // What left the disk does not come back with it.
        let image = shape.open(&storage).await.unwrap();
        image.resize(MIB, &ResizeOptions::default()).await.unwrap();
        model.resize(1 << 20, 0);
        assert!(read_all(&image).await == model);
        image.close().await.unwrap();
    });
}
