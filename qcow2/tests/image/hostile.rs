//! Images that lie: whatever stands in header and tables, the answer is an error, never a panic, never an allocation
//! that the file does not pay for, and never a write over metadata.

use block::{BlockDevice, Durability, MemoryStorage, ZeroMode};
use proptest::prelude::*;
use qcow2::{Corruption, CreateOptions, Error, Feature, Image, OpenOptions};

use crate::common::{block_on, pattern, qemu_create, qemu_img, qemu_io, range};
use crate::memory::{Shape, host};
use crate::rounds::rounds;

/// An image with some data, closed.
fn sound(cluster_bytes: u32) -> Vec<u8> {
    let shape = Shape::new(cluster_bytes);
    block_on(async {
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        for n in 0..6 {
            let data = pattern(n + 1, 5000);
            image.write(n * 40_000, data.into(), Durability::Deferred).await.unwrap();
        }
        image.close().await.unwrap();
        storage.snapshot()
    })
}

/// Opens whatever this is and uses it in every way. Errors are fine.
fn use_it(bytes: Vec<u8>, options: OpenOptions) -> Result<(), Error> {
    block_on(async {
        let storage = MemoryStorage::from_bytes(bytes, 1);
        storage.limit_len(64 << 20);
        let image = Image::open_on(host(&storage), None, options).await?;
        let size = image.limits().size_bytes;
        let area = range(0, size.min(400_000));
        let _may_fail = image.read(area).await;
        let _may_fail = image.extents(range(0, size.min(1 << 40))).await;
        let later = Durability::Deferred;
        if area.len() > 100_000 {
            let _may_fail = image.write(30_000, pattern(1, 30_000).into(), later).await;
            let _may_fail =
                image.write_zeroes(range(1000, 60_000), ZeroMode::default(), later).await;
            let _may_fail = image.discard(range(70_000, 30_000), later).await;
        }
        let _may_fail = image.flush().await;
        let _may_fail = image.close().await;
        Ok(())
    })
}

#[test]
fn every_header_field_may_hold_anything() {
    for cluster_bytes in [512, 4096] {
        let sound = sound(cluster_bytes);
        use_it(sound.clone(), OpenOptions::writing()).unwrap();
        let fields =
            (0..112).step_by(4).map(|at| (at, 4)).chain((8..112).step_by(8).map(|at| (at, 8)));
        for (at, len) in fields {
            let values =
                (0..64).map(|bit| 1u64 << bit).chain([0, u64::MAX, u64::MAX >> 1, 511, 513]);
            for value in values {
                let mut bytes = sound.clone();
                bytes[at..at + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
                let _refused = use_it(bytes.clone(), OpenOptions::reading());
                let _refused = use_it(bytes, OpenOptions::writing());
            }
        }
    }
}

#[test]
fn an_image_may_end_anywhere() {
    let sound = sound(512);
    for len in (0..1200).chain((1200..sound.len()).step_by(331)) {
        let _refused = use_it(sound[..len].to_vec(), OpenOptions::reading());
        let _refused = use_it(sound[..len].to_vec(), OpenOptions::writing());
    }
    for len in 0..104 {
        assert!(use_it(sound[..len].to_vec(), OpenOptions::reading()).is_err(), "{len} bytes");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: rounds(400), failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn tables_may_hold_anything(
        small: bool,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>(), 0u32..4), 1..40),
    ) {
        let mut bytes = sound(if small { 512 } else { 4096 });
        let words = bytes.len() / 8;
        for (place, value, how) in changes {
            let at = place.index(words) * 8;
            let value = match how {
                0 => value,
                1 => value & 0x0000_0000_000f_fe00 | 1 << 63,
                2 => value & 0x0000_0000_000f_fe01,
                _ => 0,
            };
            bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
        let _refused = use_it(bytes.clone(), OpenOptions::reading());
        let _refused = use_it(bytes, OpenOptions::writing());
    }
}

#[test]
fn entries_that_point_at_metadata_are_never_written_through() {
    let shape = Shape::new(4096);
    block_on(async {
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        image.write(0, pattern(1, 8192).into(), Durability::Deferred).await.unwrap();
        image.close().await.unwrap();
        let bytes = storage.snapshot();
        let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        let l1_at = usize::try_from(word(40)).unwrap();
        let l2_at = usize::try_from(word(l1_at) & 0x00ff_ffff_ffff_fe00).unwrap();
        let block_at = word(usize::try_from(word(48)).unwrap());
        for target in [word(40), word(48), block_at, l2_at as u64] {
            let mut bytes = bytes.clone();
            bytes[l2_at..l2_at + 8].copy_from_slice(&(target | 1 << 63).to_be_bytes());
            let storage = MemoryStorage::from_bytes(bytes.clone(), 1);
            let image = shape.open(&storage).await.unwrap();
            let later = Durability::Deferred;
            // What comes before is kept.
            image.write(4096, pattern(3, 4096).into(), later).await.unwrap();
            assert!(image.write(0, pattern(2, 4096).into(), later).await.is_err());
            assert!(image.write_zeroes(range(0, 4096), ZeroMode::default(), later).await.is_err());
            assert!(image.discard(range(0, 4096), later).await.is_err());
            let refused = image.write(8192, pattern(4, 4096).into(), later).await.unwrap_err();
            assert!(refused.to_string().contains("marked corrupt"), "{refused}");
            assert!(image.read(range(4096, 4096)).await.unwrap().to_vec() == pattern(3, 4096));
            assert_eq!(storage.crash_image_seeded(storage.log_len(), 0).snapshot()[79], 2);
            image.close().await.unwrap();
            let after = storage.snapshot();
            let at = usize::try_from(target).unwrap();
            assert_eq!(after[at..at + 4096], bytes[at..at + 4096]);
        }
        let mut bytes = bytes.clone();
        bytes[l1_at..l1_at + 8].copy_from_slice(&(word(40) | 1 << 63).to_be_bytes());
        let image = shape.open(&MemoryStorage::from_bytes(bytes, 1)).await.unwrap();
        assert!(image.read(range(0, 1)).await.is_err());
    });
}

#[test]
fn tables_that_are_not_counted_are_not_given_away() {
    let shape = Shape::new(4096);
    block_on(async {
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        image.write(0, pattern(1, 8192).into(), Durability::Deferred).await.unwrap();
        image.close().await.unwrap();
        let mut bytes = storage.snapshot();
        let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        let l2_at = word(usize::try_from(word(40)).unwrap()) & 0x00ff_ffff_ffff_fe00;
        let block_at = word(usize::try_from(word(48)).unwrap());
        for table in [l2_at, block_at] {
            let place = usize::try_from(block_at + table / 4096 * 2).unwrap();
            bytes[place..place + 2].fill(0);
        }
        let storage = MemoryStorage::from_bytes(bytes, 1);
        let image = shape.open(&storage).await.unwrap();
        for at in 3..20 {
            image.write(at * 4096, pattern(at, 4096).into(), Durability::Durable).await.unwrap();
        }
        image.close().await.unwrap();
        let again = shape.open_read_only(&storage).await.unwrap();
        assert!(again.read(range(0, 8192)).await.unwrap().to_vec() == pattern(1, 8192));
        for at in 3..20 {
            let read = again.read(range(at * 4096, 4096)).await.unwrap().to_vec();
            assert!(read == pattern(at, 4096));
        }
    });
}

#[test]
fn an_unknown_feature_is_refused_with_its_name() {
    let mut bytes = sound(4096);
    bytes[72] = 0x80;
    let error = use_it(bytes.clone(), OpenOptions::reading()).unwrap_err();
    assert!(error.to_string().contains("incompatible features bit 63"), "{error}");
    // Give the second entry of the feature name table to that bit.
    let table = (0..4096).find(|at| bytes[*at..at + 4] == 0x6803_f857u32.to_be_bytes()).unwrap();
    bytes[table + 8 + 48 + 1] = 63;
    bytes[table + 8 + 48 + 2..][..6].copy_from_slice(b"magic\0");
    let error = use_it(bytes, OpenOptions::reading()).unwrap_err();
    assert!(error.to_string().contains("\"magic\" (bit 63)"), "{error}");
}

#[test]
fn a_corrupt_image_is_for_reading_only_and_a_dirty_one_is_counted_anew_for_writing() {
    let mut bytes = sound(4096);
    for bits in [1, 2, 3] {
        bytes[79] = bits;
        use_it(bytes.clone(), OpenOptions::reading()).unwrap();
        match use_it(bytes.clone(), OpenOptions::writing()) {
            Err(Error::Unsupported { feature, .. }) => {
                assert_eq!((bits & 2, feature), (2, Feature::WritingCorrupt));
            }
            other => assert!(bits == 1 && other.is_ok(), "{other:?}"),
        }
    }
}

#[test]
fn unknown_bits_stay_until_the_first_change_and_compatible_ones_for_ever() {
    let shape = Shape::new(4096);
    let mut bytes = sound(4096);
    (bytes[80], bytes[88]) = (0x40, 0x20);
    block_on(async {
        let storage = MemoryStorage::from_bytes(bytes.clone(), 1);
        let image = shape.open(&storage).await.unwrap();
        image.read(range(0, 512)).await.unwrap();
        image.close().await.unwrap();
        assert!(storage.log().is_empty(), "nothing changed, nothing written");
        let image = shape.open(&storage).await.unwrap();
        image.write(0, pattern(1, 512).into(), Durability::Deferred).await.unwrap();
        image.close().await.unwrap();
        let after = storage.snapshot();
        bytes[88] = 0;
        assert_eq!(after[..4096], bytes[..4096], "the rest of the header is as it was");
    });
    let mut bytes = sound(4096);
    bytes[95] = 1;
    match use_it(bytes, OpenOptions::reading()) {
        Err(Error::Corrupt { what, .. }) => assert_eq!(what, Corruption::BitmapsWithoutExtension),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_snapshot_keeps_what_it_saw() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let name = path.to_str().unwrap();
    qemu_create(&path, "cluster_size=64k", "4M", None);
    qemu_io(&path, &["write -P 17 0 2M"]);
    qemu_img(&["snapshot", "-c", "before", name]);
    block_on(async {
        let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
        let later = Durability::Deferred;
        image.write(1000, pattern(1, 300_000).into(), later).await.unwrap();
        image.write_zeroes(range(1 << 20, 200_000), ZeroMode::default(), later).await.unwrap();
        image.discard(range(3 << 19, 1 << 18), later).await.unwrap();
        image.write(100, pattern(2, 512).into(), later).await.unwrap();
        let read = image.read(range(1000, 300_000)).await.unwrap().to_vec();
        assert!(read[512..] == pattern(1, 300_000)[512..]);
        image.close().await.unwrap();
    });
    qemu_img(&["check", "-q", name]);
    qemu_img(&["snapshot", "-a", "before", name]);
    qemu_io(&path, &["read -P 17 0 2M"]);
}

#[test]
fn what_no_image_can_be_is_not_created() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let refused = |options: CreateOptions| match block_on(Image::create(&path, &options)) {
        Err(Error::Invalid { what, .. }) => what.to_string(),
        other => panic!("{other:?}"),
    };
    refused(CreateOptions::new(1).cluster_bytes(1000));
    refused(CreateOptions::new(1).cluster_bytes(256));
    refused(CreateOptions::new(u64::MAX));
    refused(CreateOptions::new((128 << 30) + 1).cluster_bytes(512));
    refused(CreateOptions::new(1).backing("x".repeat(1024), qcow2::BackingFormat::Raw));
    refused(CreateOptions::new(1).backing("", qcow2::BackingFormat::Raw));
    refused(
        CreateOptions::new(1)
            .cluster_bytes(512)
            .backing("x".repeat(500), qcow2::BackingFormat::Raw),
    );
    assert!(!path.exists());
    block_on(async {
        Image::create(&path, &CreateOptions::new(1 << 20)).await.unwrap();
        assert!(Image::create(&path, &CreateOptions::new(1 << 20)).await.is_err());
        Image::open(&path, OpenOptions::reading()).await.unwrap();
    });
}
