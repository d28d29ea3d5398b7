//! The shape of the I/O: how many operations a request costs, and that huge sparse disks cost nothing.

use block::{BlockDevice, Durability, Extent, LoggedOp, MemoryStorage, ZeroMode};

use crate::check::check;
use crate::common::{block_on, pattern, range};
use crate::memory::{Shape, read};

const MIB: u64 = 1 << 20;

fn writes(storage: &MemoryStorage) -> Vec<(u64, usize)> {
    let log = storage.log();
    let write = |op: &LoggedOp| match op {
        LoggedOp::Write { at, data } => Some((*at, data.len())),
        _ => None,
    };
    log.iter().filter_map(write).collect()
}

fn huge(size_bytes: u64, backing: Option<Vec<u8>>) -> Shape {
    Shape { size_bytes, backing, ..Shape::new(65536) }
}

#[test]
fn a_sequential_write_of_1_mib_is_one_write_behind_the_last() {
    for cluster_bytes in [4096, 65536, 1 << 20] {
        let shape = Shape { size_bytes: 64 * MIB, cluster_bytes, ..Shape::new(65536).aligned(1) };
        block_on(async {
            let storage = shape.create().await;
            let image = shape.open(&storage).await.unwrap();
            for n in 0..32 {
                image
                    .write(n * MIB, pattern(n, 1 << 20).into(), Durability::Deferred)
                    .await
                    .unwrap();
            }
            let found = writes(&storage);
            assert_eq!(found.len(), 32, "clusters of {cluster_bytes}");
            assert!(found.iter().all(|(_, len)| *len == 1 << 20));
            image.close().await.unwrap();
            check(&storage.snapshot()).assert_clean("sequential");
        });
    }
}

#[test]
fn a_flush_costs_two_syncs_and_one_without_metadata() {
    block_on(async {
        let shape = huge(1 << 30, None);
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        let syncs = || storage.log().iter().filter(|op| **op == LoggedOp::Sync).count();
        image.write(0, pattern(1, 1 << 20).into(), Durability::Durable).await.unwrap();
        assert_eq!(syncs(), 2);
        image.write(0, pattern(2, 1 << 20).into(), Durability::Durable).await.unwrap();
        assert_eq!(syncs(), 3, "an overwrite in place");
    });
}

#[test]
fn zeros_as_data_take_no_space() {
    block_on(async {
        for backing in [None, Some(pattern(1, 1 << 20))] {
            let shape = huge(64 * MIB, backing);
            let storage = shape.create().await;
            let image = shape.open(&storage).await.unwrap();
            image.write(0, vec![0; 8 << 20].into(), Durability::Deferred).await.unwrap();
            assert_eq!(writes(&storage), []);
            assert!(read(&image, 0, 8 * MIB).await.iter().all(|byte| *byte == 0));
            image.close().await.unwrap();
            assert_eq!(check(&storage.snapshot()).data_clusters, 0);
        }
    });
}

#[test]
fn clearing_a_sparse_disk_costs_nothing() {
    block_on(async {
        let shape = huge(64 << 40, None);
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        let all = range(0, shape.size_bytes);
        let later = Durability::Deferred;
        image
            .write_zeroes(all, ZeroMode { keep_allocated: false, fast_only: true }, later)
            .await
            .unwrap();
        image.discard(all, later).await.unwrap();
        assert_eq!(storage.log(), []);
        let extents = image.extents(all).await.unwrap();
        assert_eq!(extents, [Extent { range: all, allocated: false, zero: true }]);
        assert_eq!(image.map(all).await.unwrap().len(), 1);
        image.close().await.unwrap();
    });
}

#[test]
fn clearing_hides_the_backing_file_and_no_more_than_that() {
    block_on(async {
        let below = pattern(1, 3 << 20);
        let shape = huge(500 << 30, Some(below));
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        let all = range(0, shape.size_bytes);
        image.write_zeroes(all, ZeroMode::default(), Durability::Durable).await.unwrap();
        // One L2 table: behind the end of the backing file zeros are zeros.
        assert!(writes(&storage).len() <= 4, "{:?}", writes(&storage));
        let extents = image.extents(all).await.unwrap();
        assert_eq!(extents, [Extent { range: all, allocated: false, zero: true }]);
        image.close().await.unwrap();
        check(&storage.snapshot()).assert_clean("cleared");
    });
}

#[test]
fn a_discard_never_shows_the_backing_file_again() {
    block_on(async {
        let shape = huge(4 * MIB, Some(pattern(1, 4 << 20)));
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        image.write(0, pattern(2, 1 << 20).into(), Durability::Deferred).await.unwrap();
        image.discard(range(0, 4 * MIB), Durability::Durable).await.unwrap();
        assert!(read(&image, 0, MIB).await.iter().all(|byte| *byte == 0));
        assert!(read(&image, MIB, MIB).await == pattern(1, 4 << 20)[1 << 20..2 << 20]);
        image.close().await.unwrap();
    });
}

#[test]
fn allocated_zeros_keep_and_take_space() {
    block_on(async {
        let shape = huge(4 * MIB, Some(pattern(1, 4 << 20)));
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        let later = Durability::Deferred;
        image.write(0, pattern(2, 1 << 20).into(), later).await.unwrap();
        let before = writes(&storage).len();
        let mode = ZeroMode { keep_allocated: true, fast_only: false };
        image.write_zeroes(range(0, 2 * MIB), mode, later).await.unwrap();
        assert_eq!(writes(&storage).len(), before);
        let extents = image.extents(range(0, 2 * MIB)).await.unwrap();
        assert_eq!(extents, [Extent { range: range(0, 2 * MIB), allocated: true, zero: true }]);
        // What a reserved cluster held before stays hidden when a part of it is written.
        image.write(1000, pattern(3, 100).into(), later).await.unwrap();
        let mut model = vec![0; 65536];
        model[1000..1100].copy_from_slice(&pattern(3, 100));
        assert!(read(&image, 0, 65536).await == model);
        image.close().await.unwrap();
        let found = check(&storage.snapshot());
        found.assert_clean("reserved");
        assert_eq!(found.data_clusters, 32);
    });
}

#[test]
fn space_that_was_freed_is_used_again() {
    block_on(async {
        let shape = huge(64 * MIB, None);
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        for round in 0..10 {
            image.write(0, pattern(round, 8 << 20).into(), Durability::Durable).await.unwrap();
            image.discard(range(0, 8 * MIB), Durability::Durable).await.unwrap();
        }
        assert!(image.info().file_bytes < 10 * MIB, "{}", image.info().file_bytes);
        image.close().await.unwrap();
        assert!(storage.snapshot().len() < 1 << 20, "a clean close cuts the file");
        check(&storage.snapshot()).assert_clean("reused");
    });
}

#[test]
fn tables_of_many_images_share_one_bounded_cache() {
    // Clusters of 16 KiB: 512 tables, one for each 32 MiB, are 8 MiB an image, and 40 MiB together.
    let shape = Shape { size_bytes: 16 << 30, ..Shape::new(16384) };
    block_on(async {
        let (mut images, mut most) = (Vec::new(), 0);
        for n in 0..5 {
            let storage = shape.create().await;
            let image = shape.open(&storage).await.unwrap();
            for at in (0..shape.size_bytes).step_by(32 << 20) {
                image.write(at, pattern(at + n, 512).into(), Durability::Deferred).await.unwrap();
                most = most.max(qcow2::cache_usage().l2_bytes);
            }
            images.push(image);
        }
        for (n, image) in images.iter().enumerate() {
            for at in (0..shape.size_bytes).step_by(96 << 20) {
                let now = read(image, at, 512).await;
                assert!(now == pattern(at + n as u64, 512), "image {n} at {at}");
                most = most.max(qcow2::cache_usage().l2_bytes);
            }
        }
        let limit = qcow2::L2_CACHE_BYTES;
        assert!(most > limit / 2, "{most}: there is something to bound");
        // What is changed and not flushed comes on top, a sixteenth an image.
        assert!(most < limit + limit * 5 / 16 + MIB, "{most} of {limit}");
        for image in images {
            image.close().await.unwrap();
        }
    });
}

#[test]
fn holes_of_earlier_sessions_are_used_again() {
    // A refcount block of 512 bytes counts 128 KiB.
    let shape = Shape { size_bytes: 4 * MIB, ..Shape::new(512) };
    block_on(async {
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        image.write(0, pattern(1, 2 << 20).into(), Durability::Deferred).await.unwrap();
        image.discard(range(0, MIB), Durability::Deferred).await.unwrap();
        image.close().await.unwrap();
        let before = storage.snapshot().len();
        let image = shape.open(&storage).await.unwrap();
        for at in (2 * MIB..3 * MIB).step_by(4096) {
            image.write(at, pattern(at, 4096).into(), Durability::Deferred).await.unwrap();
        }
        image.close().await.unwrap();
        let grown = storage.snapshot().len() - before;
        assert!(
            grown < 512 << 10,
            "grown by {grown} bytes for 1 MiB of data beside 1 MiB of holes"
        );
        check(&storage.snapshot()).assert_clean("holes used");
    });
}
