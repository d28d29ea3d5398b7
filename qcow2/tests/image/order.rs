//! Requests at once: those that meet in one cluster lose nothing, flushes are shared, and a future that is dropped
//! takes neither its locks nor its clusters with it while the host still works.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use block::{BlockDevice, Durability, LoggedOp, MemoryStorage, OpKind, ZeroMode};

use crate::check::check;
use crate::common::{block_on, pattern, range, read_all};
use crate::crowd::{Crowd, Random, over_stamps};
use crate::memory::{Shape, part_mut, read};

fn poll_once<T>(future: std::pin::Pin<&mut (impl Future<Output = T> + ?Sized)>) -> Poll<T> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

#[test]
fn writers_in_one_new_cluster_lose_nothing() {
    for shape in [Shape::new(65536), Shape::new(65536).over_data(), Shape::new(4096).aligned(4096)]
    {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(4).build().unwrap();
        runtime.block_on(async {
            let storage = shape.create().await;
            let image = shape.open(&storage).await.unwrap();
            let mut model = shape.content();
            let mut tasks = Vec::new();
            for n in 0..256u64 {
                let (at, data) = (n * 700 + 13, pattern(n + 1, 700));
                part_mut(&mut model, range(at, 700)).copy_from_slice(&data);
                let image = image.clone();
                tasks.push(tokio::spawn(async move {
                    image.write(at, data.into(), Durability::Deferred).await.unwrap();
                    if n % 16 == 0 {
                        image.flush().await.unwrap();
                    }
                }));
            }
            for task in tasks {
                task.await.unwrap();
            }
            assert!(read_all(&image).await == model);
            image.close().await.unwrap();
            check(&storage.snapshot()).assert_clean("after many writers");
            assert!(read_all(&shape.open(&storage).await.unwrap()).await == model);
        });
    }
}

#[test]
fn zeros_discards_writes_reads_and_flushes_at_once_lose_nothing() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).build().unwrap();
    let plain = [512, 4096, 65536].map(Shape::new).into_iter();
    let shapes = plain.chain([Shape::new(16384).extended(), Shape::new(4096).old()]);
    for shape in shapes.flat_map(|shape| [shape.clone(), over_stamps(shape)]) {
        let storage = block_on(shape.create());
        let mut crowd = Crowd::new(&shape, &storage, 16, u64::from(shape.cluster_bytes));
        // Slow operations, which finish in any order, on one thread; then fast ones on many.
        block_on(everything_at_once(&shape, &storage, &mut crowd, Some(Random(1))));
        runtime.block_on(everything_at_once(&shape, &storage, &mut crowd, None));
    }
}

async fn everything_at_once(
    shape: &Shape,
    storage: &MemoryStorage,
    crowd: &mut Crowd,
    held: Option<Random>,
) {
    let image = shape.open(storage).await.unwrap();
    match held {
        Some(mut random) => crowd.work_held(&image, 40, &mut random).await,
        None => crowd.work(&image, 40).await,
    }
    crowd.assert_last(&read_all(&image).await, "after everything at once");
    image.close().await.unwrap();
    check(&storage.snapshot()).assert_clean("after everything at once");
    let again = shape.open_read_only(storage).await.unwrap();
    crowd.assert_last(&read_all(&again).await, "reopened");
}

#[test]
fn a_dropped_write_keeps_its_lock_and_its_clusters_until_the_host_is_done() {
    let shape = Shape::new(65536);
    block_on(async {
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        let held = storage.hold(|op| op.kind == OpKind::Write);
        {
            let mut write = pin!(image.write(0, pattern(1, 65536).into(), Durability::Deferred));
            assert!(poll_once(write.as_mut()).is_pending());
        }
        assert_eq!(held.count(), 1, "the write is in flight, its future is gone");

        let mut same = pin!(image.write(0, pattern(2, 65536).into(), Durability::Deferred));
        let mut read_same = pin!(image.read(range(4096, 512)));
        let mut other = pin!(image.write(1 << 20, pattern(3, 65536).into(), Durability::Deferred));
        for _ in 0..3 {
            assert!(poll_once(same.as_mut()).is_pending());
            assert!(poll_once(read_same.as_mut()).is_pending());
            assert!(poll_once(other.as_mut()).is_pending());
        }
        assert_eq!(held.count(), 2, "the same range waits, another does not");

        assert!(held.release_one());
        let _locked_no_more = poll_once(same.as_mut());
        drop(held);
        same.await.unwrap();
        read_same.await.unwrap();
        other.await.unwrap();
        let places: Vec<u64> = storage
            .log()
            .iter()
            .filter_map(|op| match op {
                LoggedOp::Write { at, .. } => Some(*at),
                _ => None,
            })
            .collect();
        assert_ne!(places[0], places[1], "clusters in flight are nobody else's");
        assert!(read(&image, 0, 65536).await == pattern(2, 65536));
        assert!(read(&image, 1 << 20, 65536).await == pattern(3, 65536));
        image.close().await.unwrap();
        check(&storage.snapshot()).assert_clean("the dropped write gave its clusters back");
    });
}

#[test]
fn clearing_the_whole_disk_stops_nobody_where_it_is_not() {
    for zeroes in [false, true] {
        let shape = Shape::new(4096);
        block_on(async {
            let storage = shape.create().await;
            let image = shape.open(&storage).await.unwrap();
            let size = image.limits().size_bytes;
            let data = pattern(1, usize::try_from(size).unwrap());
            image.write(0, data.into(), Durability::Deferred).await.unwrap();
            image.close().await.unwrap();

            // Three tables, none in memory: the first holds the clearing up.
            let image = shape.open(&storage).await.unwrap();
            let loads = storage.hold(|op| op.kind == OpKind::Read);
            let (all, later) = (range(0, size), Durability::Deferred);
            let mut clear = if zeroes {
                image.write_zeroes(all, ZeroMode::default(), later)
            } else {
                image.discard(all, later)
            };
            assert!(poll_once(clear.as_mut()).is_pending());
            let first = 2 << 20;
            let mut near = image.write(4096, pattern(2, 512).into(), later);
            let mut far = image.write(first, pattern(3, 512).into(), later);
            assert!(poll_once(near.as_mut()).is_pending());
            assert!(poll_once(far.as_mut()).is_pending());
            assert_eq!(loads.count(), 2, "the table that is cleared, and that of the other write");
            drop(loads);
            far.await.unwrap();
            assert!(
                read(&image, first, 512).await == pattern(3, 512),
                "before anything is cleared"
            );
            clear.await.unwrap();
            near.await.unwrap();
            let mut model = vec![0; usize::try_from(size).unwrap()];
            part_mut(&mut model, range(4096, 512)).copy_from_slice(&pattern(2, 512));
            assert!(read_all(&image).await == model, "{zeroes}");
            image.close().await.unwrap();
            check(&storage.snapshot()).assert_clean("cleared");
        });
    }
}

#[test]
fn a_dropped_flush_is_made_good_by_the_next() {
    let shape = Shape::new(4096).over_data();
    for releases in 0..12 {
        block_on(async {
            let storage = shape.create().await;
            storage.without_fallocate();
            let image = shape.open(&storage).await.unwrap();
            let data = pattern(1, 200_000);
            image.write(4096, data.clone().into(), Durability::Durable).await.unwrap();
            image.discard(range(8192, 65536), Durability::Deferred).await.unwrap();
            image.write(1 << 20, data.clone().into(), Durability::Deferred).await.unwrap();
            let model = read_all(&image).await;
            let held = storage.hold(|op| op.kind != OpKind::Read);
            {
                let mut flush = pin!(image.flush());
                assert!(poll_once(flush.as_mut()).is_pending());
                for _ in 0..releases {
                    held.release_one();
                    if poll_once(flush.as_mut()).is_ready() {
                        break;
                    }
                }
            }
            let mut next = pin!(image.flush());
            let _waits_for_what_is_in_flight = poll_once(next.as_mut());
            drop(held);
            next.await.unwrap();
            let cut = storage.crash_image_seeded(storage.log_len(), 0);
            check(&cut.snapshot()).assert_consistent("after a dropped flush");
            assert!(read_all(&shape.open(&cut).await.unwrap()).await == model);
            image.close().await.unwrap();
            check(&storage.snapshot()).assert_clean("after a dropped flush");
        });
    }
}

#[test]
fn flushes_that_come_together_are_one() {
    let shape = Shape::new(65536);
    block_on(async {
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        image.write(0, pattern(1, 65536).into(), Durability::Deferred).await.unwrap();
        let before = syncs(&storage.log());
        let held = storage.hold(|op| op.kind == OpKind::Sync);
        let mut all: Vec<_> = (0..50).map(|_| image.flush()).collect();
        for flush in &mut all {
            assert!(poll_once(flush.as_mut()).is_pending());
        }
        drop(held);
        for flush in all {
            flush.await.unwrap();
        }
        // The first needs two; all others share one more, which has nothing left to write.
        assert_eq!(syncs(&storage.log()) - before, 3);
        image.close().await.unwrap();
    });
}

fn syncs(log: &[LoggedOp]) -> usize {
    log.iter().filter(|op| **op == LoggedOp::Sync).count()
}

#[test]
fn closing_waits_for_what_is_in_flight_and_refuses_what_comes_later() {
    let shape = Shape::new(65536);
    block_on(async {
        let storage = shape.create().await;
        let image = Arc::new(shape.open(&storage).await.unwrap());
        let held = storage.hold(|op| op.kind == OpKind::Write);
        let mut write = pin!(image.write(0, pattern(1, 65536).into(), Durability::Deferred));
        assert!(poll_once(write.as_mut()).is_pending());
        let mut close = pin!(image.close());
        assert!(poll_once(close.as_mut()).is_pending());
        let late = image.read(range(0, 1)).await.unwrap_err();
        assert_eq!(late.kind(), block::ErrorKind::ShuttingDown);
        drop(held);
        let (_written_or_refused, closed) = (write.await, close.await);
        closed.unwrap();
        image.close().await.unwrap();
        check(&storage.snapshot()).assert_clean("closed");
    });
}
