//! Images whose tables are made to cost time and memory: few bytes that seem to refer to terabytes.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use block::{BlockDevice, Durability};
use qcow2::{
    AmendOptions, BitmapError, CheckReport, Error, Feature, Image, OpenOptions, Repair,
    ResizeOptions, Version,
};

use crate::checking::try_check;
use crate::common::{block_on, qemu_check, qemu_create, range};

/// The most memory that a check may take, in KiB.
const MAX_MEMORY_KIB: u64 = 512 << 10;
const COPIED: u64 = 1 << 63;

struct Giant {
    path: PathBuf,
    file: File,
    _dir: tempfile::TempDir,
}

impl Giant {
    /// An image of which nothing but the header matters.
    fn new(options: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("giant.qcow2");
        qemu_create(&path, options, "1M", None);
        let file = File::options().read(true).write(true).open(&path).unwrap();
        Self { path, file, _dir: dir }
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).unwrap();
    }

    fn put_entries(&self, at: u64, entries: impl Iterator<Item = u64>) {
        let bytes: Vec<u8> = entries.flat_map(u64::to_be_bytes).collect();
        self.put(at, &bytes);
    }

    /// Gives it an L1 table of 32 MiB at 64 MiB.
    fn large_l1(&self, entries: impl Iterator<Item = u64>) {
        self.put(36, &(4u32 << 20).to_be_bytes());
        self.put(40, &(64u64 << 20).to_be_bytes());
        self.put_entries(64 << 20, entries);
    }

    /// Says that each of these clusters has one user. They must be among the first 32768 of 64 KiB.
    fn count(&self, clusters: Range<u64>) {
        let mut pointer = [0; 8];
        for at in [48, 0] {
            let at = u64::from_be_bytes(pointer) + at;
            self.file.read_exact_at(&mut pointer, at).unwrap();
        }
        for cluster in clusters {
            self.put(u64::from_be_bytes(pointer) + cluster * 2, &1u16.to_be_bytes());
        }
    }

    fn len(&self, bytes: u64) {
        self.file.set_len(bytes).unwrap();
    }

    fn check(&self) -> Result<CheckReport, Error> {
        let result = try_check(&self.path, Repair::None);
        let peak = peak_memory_kib();
        assert!(peak < MAX_MEMORY_KIB, "{peak} KiB");
        result
    }
}

/// The most memory that this process had, in KiB. Every test is a process of its own where that matters.
fn peak_memory_kib() -> u64 {
    let status = std::fs::read_to_string(Path::new("/proc/self/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn tables_in_holes_are_not_read() {
    let giant = Giant::new("cluster_size=64k");
    giant.len(1 << 42);
    giant.large_l1((0..4 << 20).map(|table| COPIED | ((1 << 30) + (table << 16))));
    let report = giant.check().unwrap();
    assert!(report.corruptions >= 4 << 20, "{}", report.corruptions);
}

#[test]
fn a_table_that_millions_of_entries_point_at_is_read_once() {
    let giant = Giant::new("cluster_size=64k");
    let table = 32u64 << 20;
    giant.put_entries(table, std::iter::repeat_n(COPIED | 48 << 20, 8192));
    giant.large_l1(std::iter::repeat_n(COPIED | table, 4 << 20));
    giant.len(128 << 20);
    let report = giant.check().unwrap();
    assert_eq!(report.allocated_clusters, (4 << 20) * 8192);
    assert!(report.corruptions >= report.allocated_clusters, "the counts do not fit 16 bits");
}

#[test]
fn tables_that_point_at_themselves_and_each_other_end() {
    let giant = Giant::new("cluster_size=64k");
    let l1 = 64u64 << 20;
    // Every L2 table is a part of the L1 table.
    giant.large_l1((0..4 << 20).map(|entry| COPIED | (l1 + ((entry % 512) << 16))));
    giant.len(128 << 20);
    let report = giant.check().unwrap();
    assert!(report.corruptions > 0 && report.check_errors == 0);
}

#[test]
fn tables_that_overlap_inside_of_clusters_are_followed_up_to_a_limit() {
    let giant = Giant::new("cluster_size=2M");
    giant.large_l1((0..4 << 20).map(|entry| COPIED | ((100 << 20) + entry % (1 << 16) * 512)));
    giant.put_entries(100 << 20, (0..5 << 20).map(|entry| COPIED | ((entry % 64) << 21)));
    giant.len(256 << 20);
    let report = giant.check().unwrap();
    assert!(report.check_errors > 0 && report.corruptions > 0);
}

#[test]
fn references_that_are_scattered_over_exabytes_are_refused_by_name() {
    let giant = Giant::new("cluster_size=512");
    giant.len(1 << 43);
    let scattered = (0..4 << 20).map(|entry: u64| COPIED | ((1 << 30) + entry * (1 << 20)));
    giant.large_l1(scattered);
    match giant.check() {
        Err(Error::Unsupported { feature: Feature::ScatteredReferences { .. }, .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn very_many_snapshots_with_one_long_table_are_read_once() {
    let giant = Giant::new("cluster_size=64k");
    giant.large_l1((0..4 << 20).map(|entry| COPIED | ((256 << 20) + ((entry % 16) << 16))));
    giant.len(512 << 20);
    let mut table = Vec::new();
    for snapshot in 0u64..65536 {
        let at = (64 << 20) + ((snapshot % 400) << 16);
        table.extend(at.to_be_bytes());
        table.extend((4u32 << 20).to_be_bytes());
        table.extend([0u8; 24]);
        table.extend([0u8; 4]);
    }
    giant.put(256 << 20, &vec![0; 1 << 20]);
    giant.put(128 << 20, &table);
    giant.put(60, &65536u32.to_be_bytes());
    giant.put(64, &(128u64 << 20).to_be_bytes());
    let report = giant.check().unwrap();
    assert!(report.corruptions > 0);
}

#[test]
fn a_refcount_table_full_of_one_block_ends() {
    let giant = Giant::new("cluster_size=64k");
    giant.put(56, &128u32.to_be_bytes());
    giant.put(48, &(16u64 << 20).to_be_bytes());
    giant.put_entries(16 << 20, std::iter::repeat_n(32 << 20, 1 << 20));
    giant.put(32 << 20, &[1; 65536]);
    giant.len(1 << 43);
    let report = giant.check().unwrap();
    assert!(report.leaks > 1 << 26 && report.corruptions > 1000);
}

/// An image whose refcounts get so many bits.
fn refcount_bits(bits: u32) -> AmendOptions {
    AmendOptions { refcount_bits: Some(bits), ..AmendOptions::default() }
}

#[test]
fn a_table_that_millions_of_entries_point_at_is_not_copied_for_each_of_them() {
    let giant = Giant::new("cluster_size=64k");
    let table = 32u64 << 20;
    giant.put_entries(table, std::iter::repeat_n(COPIED | 48 << 20, 8192));
    giant.large_l1(std::iter::repeat_n(COPIED | table, 4 << 20));
    giant.len(128 << 20);
    // As if the L1 table were the image's own, which it must be to be opened for writing.
    giant.count(1024..1536);
    block_on(async {
        let image = Image::open(&giant.path, OpenOptions::writing()).await.unwrap();
        let version = AmendOptions { version: Some(Version::V2), ..AmendOptions::default() };
        for refused in [
            image.create_snapshot("one").await.map(drop),
            image.amend(&refcount_bits(64)).await,
            image.amend(&version).await,
        ] {
            assert!(matches!(refused, Err(Error::Damaged { .. })), "{refused:?}");
        }
        image.close().await.unwrap();
    });
    // Closing cuts off what nothing uses.
    assert!(giant.file.metadata().unwrap().len() <= 128 << 20, "nothing is written first");
}

#[test]
fn a_table_that_thousands_of_entries_share_and_count_is_copied_once() {
    let giant = Giant::new("cluster_size=64k");
    let (l1, table, data) = (1u64 << 20, 2u64 << 20, 3u64 << 20);
    giant.put(24, &(3000u64 << 29).to_be_bytes());
    giant.put(36, &3000u32.to_be_bytes());
    giant.put(40, &l1.to_be_bytes());
    giant.put_entries(l1, std::iter::repeat_n(table, 3000));
    giant.put_entries(table, std::iter::once(data));
    giant.put(data, &[7; 65536]);
    assert!(try_check(&giant.path, Repair::All).unwrap().is_clean());
    let before = giant.file.metadata().unwrap().len();
    // A flag that has to be changed, as a writer may have left it behind.
    giant.put_entries(table, std::iter::once(COPIED | data));
    block_on(async {
        let image = Image::open(&giant.path, OpenOptions::writing()).await.unwrap();
        let version = AmendOptions { version: Some(Version::V2), ..AmendOptions::default() };
        let refused = image.amend(&version).await;
        let named = matches!(
            refused,
            Err(Error::Unsupported { feature: Feature::TableAtTwoPlaces { at }, .. }) if at.0 == table
        );
        assert!(named, "{refused:?}");
        let snapshot = image.create_snapshot("one").await.unwrap();
        image.amend(&refcount_bits(32)).await.unwrap();
        image.delete_snapshot(&snapshot.id).await.unwrap();
        for at in [0, 5 << 29, 2999 << 29] {
            assert!(image.read(range(at, 65536)).await.unwrap().to_vec() == [7; 65536]);
        }
        image.write(5 << 29, vec![8; 512].into(), Durability::Deferred).await.unwrap();
        image.close().await.unwrap();
    });
    let after = giant.file.metadata().unwrap().len();
    assert!(after < before + (4 << 20), "{before} became {after}");
    assert!(qemu_check(&giant.path).is_clean());
}

#[test]
fn what_an_image_is_changes_without_reading_the_holes_that_tables_lie_in() {
    let giant = Giant::new("cluster_size=64k");
    giant.len(1 << 38);
    giant.large_l1((0..1 << 20).map(|table| COPIED | ((1 << 30) + (table << 16))));
    assert!(try_check(&giant.path, Repair::All).unwrap().is_clean());
    block_on(async {
        let image = Image::open(&giant.path, OpenOptions::writing()).await.unwrap();
        image.amend(&refcount_bits(32)).await.unwrap();
        image.close().await.unwrap();
    });
    assert!(peak_memory_kib() < MAX_MEMORY_KIB);
}

#[test]
fn bitmaps_that_share_their_bits_are_read_up_to_the_memory_for_them() {
    let giant = Giant::new("cluster_size=64k");
    let names = ["one", "two", "three"];
    block_on(async {
        let image = Image::open(&giant.path, OpenOptions::writing()).await.unwrap();
        image.resize(4 << 40, &ResizeOptions::default()).await.unwrap();
        for name in names {
            image.add_bitmap(name, 4096, true).await.unwrap();
        }
        image.close().await.unwrap();
    });
    // Every bitmap has 128 MiB of bits, and all of them lie in one cluster behind the rest: every other bit is set.
    let bytes = std::fs::read(&giant.path).unwrap();
    let be_u64 = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let magic = 0x2385_2875u32.to_be_bytes();
    let extension = (0..4096).step_by(8).find(|at| bytes[*at..*at + 4] == magic).unwrap();
    let mut entry = usize::try_from(be_u64(extension + 24)).unwrap();
    for name in names {
        giant.put_entries(be_u64(entry), std::iter::repeat_n(1 << 30, 2048));
        entry += (24 + name.len()).next_multiple_of(8);
    }
    giant.put(1 << 30, &[0x55; 65536]);
    block_on(async {
        let image = Image::open(&giant.path, OpenOptions::reading()).await.unwrap();
        let mut refused = 0;
        for name in names {
            match image.dirty_extents(name, range(0, 1 << 20)).await {
                Ok(found) => assert!(found.len() > 1),
                Err(Error::Bitmap { reason: BitmapError::Memory, .. }) => refused += 1,
                Err(other) => panic!("{other:?}"),
            }
        }
        assert!((1..3).contains(&refused), "{refused} of three are refused");
    });
    let peak = peak_memory_kib();
    assert!(peak < MAX_MEMORY_KIB, "{peak} KiB");
}
