//! Images that are broken in ways that only several entries together show: shared tables, shared clusters, clusters
//! that count as free. Writing must not make two guests of one cluster; reading goes on.

use block::{BlockDevice, Durability, MemoryStorage, OpKind};
use qcow2::Image;

use crate::common::{block_on, pattern, qemu_check, range, read_all};
use crate::memory::Shape;

const CLUSTER: usize = 4096;
/// The guest bytes of one L2 table.
const TABLE: u64 = 2 << 20;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// The bytes of an image, to be broken.
struct Broken(Vec<u8>);

impl Broken {
    /// Two L2 tables, with three clusters of data in each.
    async fn new(shape: &Shape) -> Self {
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        for at in [0, TABLE] {
            let data = pattern(at + 1, 3 * CLUSTER);
            image.write(at, data.into(), Durability::Deferred).await.unwrap();
        }
        image.close().await.unwrap();
        Self(storage.snapshot())
    }

    fn word(&self, at: u64) -> u64 {
        let at = usize::try_from(at).unwrap();
        u64::from_be_bytes(self.0[at..at + 8].try_into().unwrap())
    }

    fn set(&mut self, at: u64, value: u64) {
        let at = usize::try_from(at).unwrap();
        self.0[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }

    fn l1(&self, index: u64) -> u64 {
        self.word(40) + index * 8
    }

    fn l2(&self, table: u64, index: u64) -> u64 {
        (self.word(self.l1(table)) & OFFSET) + index * 8
    }

    fn count(&mut self, host: u64, refcount: u16) {
        let block = self.word(self.word(48));
        let at = usize::try_from(block + (host & OFFSET) / CLUSTER as u64 * 2).unwrap();
        self.0[at..at + 2].copy_from_slice(&refcount.to_be_bytes());
    }

    fn storage(&self) -> MemoryStorage {
        MemoryStorage::from_bytes(self.0.clone(), 1)
    }
}

/// A write to `at` must be refused, change no guest byte, and set the corrupt bit; reading goes on.
async fn is_refused(shape: &Shape, broken: &Broken, at: u64, why: &str) {
    let storage = broken.storage();
    let image: Image = shape.open(&storage).await.unwrap();
    let before = read_all(&image).await;
    let error = image.write(at, pattern(9, 600).into(), Durability::Durable).await.unwrap_err();
    assert!(error.to_string().contains(why), "{error}");
    let again = image.write(at + TABLE, pattern(9, 600).into(), Durability::Durable).await;
    assert!(again.unwrap_err().to_string().contains("corrupt"));
    assert!(read_all(&image).await == before, "{why}: reading goes on");
    image.close().await.unwrap();
    assert_eq!(storage.snapshot()[79], 2, "the corrupt bit");
    let error = shape.open(&storage).await.map(drop).unwrap_err();
    assert!(error.to_string().contains("marked corrupt"), "{error}");
    assert!(read_all(&shape.open_read_only(&storage).await.unwrap()).await == before);
}

#[test]
fn a_table_of_two_l1_entries_is_not_written_where_it_counts_once() {
    let shape = Shape::new(4096);
    block_on(async {
        let mut broken = Broken::new(&shape).await;
        broken.set(broken.l1(1), broken.word(broken.l1(0)));
        // An overwrite in place is an overwrite for both: only a new cluster needs the table.
        is_refused(&shape, &broken, 5 * 4096, "another entry").await;
    });
}

#[test]
fn a_table_of_two_l1_entries_that_counts_twice_is_copied() {
    let shape = Shape::new(4096);
    block_on(async {
        let mut broken = Broken::new(&shape).await;
        let (gone, kept) = (broken.word(broken.l1(1)), broken.word(broken.l1(0)));
        broken.set(broken.l1(1), kept);
        broken.count(kept, 2);
        for index in 0..3 {
            broken.count(broken.word(broken.l2(0, index)), 2);
        }
        let lost = usize::try_from(gone & OFFSET).unwrap();
        for entry in broken.0.clone()[lost..lost + 24].chunks(8) {
            broken.count(u64::from_be_bytes(entry.try_into().unwrap()), 0);
        }
        broken.count(gone, 0);
        let storage = broken.storage();
        let image = shape.open(&storage).await.unwrap();
        let mut model = read_all(&image).await;
        for at in [4096u64, TABLE + 8192, 5 * 4096] {
            let data = pattern(at, 600);
            model[usize::try_from(at).unwrap()..][..600].copy_from_slice(&data);
            image.write(at, data.into(), Durability::Deferred).await.unwrap();
            assert!(read_all(&image).await == model, "only where it was written");
        }
        image.close().await.unwrap();
        let again = shape.open_read_only(&storage).await.unwrap();
        assert!(read_all(&again).await == model);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        std::fs::write(&path, storage.snapshot()).unwrap();
        // Flags of what is shared still may say that it is not; counts must be right.
        assert!(!format!("{:?}", qemu_check(&path)).contains("refcount=0"));
    });
}

#[test]
fn a_cluster_that_two_entries_call_their_own_is_not_written() {
    let shape = Shape::new(4096);
    block_on(async {
        let mut broken = Broken::new(&shape).await;
        broken.set(broken.l2(0, 2), broken.word(broken.l2(0, 0)));
        is_refused(&shape, &broken, 0, "another entry").await;
        is_refused(&shape, &broken, 2 * 4096, "another entry").await;
    });
}

#[test]
fn a_cluster_that_counts_twice_is_copied_whatever_its_flag_says() {
    let shape = Shape::new(4096);
    block_on(async {
        let mut broken = Broken::new(&shape).await;
        let shared = broken.word(broken.l2(0, 1));
        broken.count(shared, 2);
        let storage = broken.storage();
        let image = shape.open(&storage).await.unwrap();
        let host = usize::try_from(shared & OFFSET).unwrap();
        let before = storage.snapshot()[host..host + CLUSTER].to_vec();
        image.write(4096 + 7, pattern(5, 100).into(), Durability::Durable).await.unwrap();
        assert!(storage.snapshot()[host..host + CLUSTER] == before, "somebody else's");
        let mut expected = pattern(1, 3 * CLUSTER)[CLUSTER..2 * CLUSTER].to_vec();
        expected[7..107].copy_from_slice(&pattern(5, 100));
        assert!(image.read(range(4096, 4096)).await.unwrap().to_vec() == expected);
        image.close().await.unwrap();
    });
}

#[test]
fn a_cluster_in_use_that_counts_as_free_is_not_written() {
    let shape = Shape::new(4096);
    block_on(async {
        let mut broken = Broken::new(&shape).await;
        broken.count(broken.word(broken.l2(1, 1)), 0);
        is_refused(&shape, &broken, TABLE + 4096, "refcount of 0").await;
    });
}

#[test]
fn a_flush_without_room_can_be_tried_again() {
    let shape = Shape::new(4096).over_data();
    for nth in 0..4 {
        block_on(async {
            let storage = shape.create().await;
            storage.without_fallocate();
            let image = shape.open(&storage).await.unwrap();
            let mut model = shape.content();
            for at in [0usize, 2 << 20, 4 << 20] {
                let data = pattern(at as u64 + 3, 9000);
                model[at..at + 9000].copy_from_slice(&data);
                image.write(at as u64, data.into(), Durability::Deferred).await.unwrap();
            }
            storage.fail_nth(nth, std::io::ErrorKind::StorageFull, |op| op.kind == OpKind::Write);
            let error = image.flush().await.unwrap_err();
            assert_eq!(error.kind(), block::ErrorKind::NoSpace);
            assert!(read_all(&image).await == model, "nothing is lost");
            let cut = storage.crash_image_seeded(storage.log_len(), nth as u64);
            crate::check::check(&cut.snapshot()).assert_consistent("after the failed flush");
            image.flush().await.unwrap();
            let cut = storage.crash_image_seeded(storage.log_len(), 0);
            assert!(read_all(&shape.open_read_only(&cut).await.unwrap()).await == model);
            image.close().await.unwrap();
            crate::check::check(&storage.snapshot()).assert_clean("closed");
        });
    }
}

#[test]
fn a_snapshot_whose_table_would_lie_behind_the_file_moves_nothing_and_is_not_written_over() {
    let shape = Shape::new(4096);
    block_on(async {
        let storage = Broken::new(&shape).await.storage();
        let image = shape.open(&storage).await.unwrap();
        image.create_snapshot("lost").await.unwrap();
        image.close().await.unwrap();
        let sound = Broken(storage.snapshot());
        let len = sound.0.len() as u64;
        let entry = sound.word(64);
        let entries = u64::from(u32::MAX) << 32 | sound.word(entry + 8) & 0xffff_ffff;
        for (place, entries) in [
            (1 << 40, sound.word(entry + 8)),
            (1 << 62, entries),
            (u64::MAX - 4095, entries),
            (len, sound.word(entry + 8)),
        ] {
            let mut broken = Broken(sound.0.clone());
            broken.set(entry, place);
            broken.set(entry + 8, entries);
            let storage = broken.storage();
            let image = shape.open(&storage).await.unwrap();
            assert_eq!(image.info().file_bytes, len, "{place:#x}");
            let mut model = read_all(&image).await;
            let data = pattern(7, 20 * CLUSTER);
            model[1 << 20..][..data.len()].copy_from_slice(&data);
            image.write(1 << 20, data.into(), Durability::Durable).await.unwrap();
            assert!(read_all(&image).await == model);
            image.close().await.unwrap();
            let after = storage.snapshot();
            let most = usize::try_from(len).unwrap() + 24 * CLUSTER;
            assert!(after.len() <= most, "{} bytes", after.len());
            if place == len {
                let table = after[usize::try_from(len).unwrap()..][..CLUSTER].iter();
                assert!(table.copied().all(|byte| byte == 0), "kept free");
            }
            let again = shape.open_read_only(&storage).await.unwrap();
            assert!(read_all(&again).await == model);
        }
    });
}
