//! What the library says when it refuses: which file, where in it, which rule, and what to do where something can be
//! done. That a refusal is right is tested where its rule lives; here people read it.

use std::path::Path;
use std::sync::Arc;

use block::{
    BlockDevice, Durability, ErrorKind, HostFile, MemoryDevice, MemoryStorage, OpKind, RawDevice,
    Storage, StorageFacts, ZeroMode,
};
use qcow2::{
    AmendOptions, BackingFormat, BackingName, CreateOptions, Error, Image, OpenOptions, Version,
};

use crate::common::{block_on, pattern, range};
use crate::memory::{Shape, host};

/// Changes of bytes: where, and to what.
type Patch<'a> = &'a [(usize, &'a [u8])];

/// An image with some data in clusters of 4 KiB.
async fn sound() -> Vec<u8> {
    let shape = Shape::new(4096);
    let storage = shape.create().await;
    let image = shape.open(&storage).await.unwrap();
    image.write(0, pattern(1, 12_288).into(), Durability::Deferred).await.unwrap();
    image.close().await.unwrap();
    storage.snapshot()
}

fn patched(sound: &[u8], patch: Patch<'_>) -> MemoryStorage {
    let mut bytes = sound.to_vec();
    for (at, new) in patch {
        bytes[*at..*at + new.len()].copy_from_slice(new);
    }
    MemoryStorage::from_bytes(bytes, 1)
}

async fn open(storage: &MemoryStorage) -> Result<Image, Error> {
    Image::open_on(host(storage), None, OpenOptions::writing()).await
}

fn word(bytes: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).unwrap();
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn a_header_that_breaks_a_rule_is_refused_by_field_place_and_value() {
    let be4 = u32::to_be_bytes;
    let be8 = u64::to_be_bytes;
    let corrupt: &[(Patch<'_>, &str)] = &[
        (&[(3, b"\0")], "0x0: no qcow2 magic number"),
        (&[(20, &be4(8))], "0x14: header field cluster_bits holds 8, which the format forbids"),
        (&[(32, &be4(2))], "0x20: the image is encrypted by LUKS without an encryption header"),
        (&[(36, &be4(1))], "0x24: the L1 table has 1 entries and the disk needs 3"),
        (
            &[(40, &be8(0x1234))],
            "0x28: the L1 table starts at 0x1234, which is no cluster of this file",
        ),
        (&[(40, &be8(0))], "0x28: the L1 table starts at 0x0, which is no cluster of this file"),
        (
            &[(48, &be8(1 << 40))],
            "0x30: the refcount table starts at 0x10000000000, which is no cluster of this file",
        ),
        (
            &[(56, &be4(0))],
            "0x38: header field refcount_table_clusters holds 0, which the format forbids",
        ),
        (
            &[(60, &be4(65_537))],
            "0x3c: header field nb_snapshots holds 65537, which the format forbids",
        ),
        (
            &[(60, &be4(1)), (64, &be8(4097))],
            "0x40: header field snapshots_offset holds 4097, which the format forbids",
        ),
        (&[(88, &be8(1))], "0x58: the bitmaps bit is set without a bitmaps extension"),
        (
            &[(88, &be8(2))],
            "0x58: the raw external data bit is set without a data file, or with a backing file",
        ),
        (&[(96, &be4(7))], "0x60: header field refcount_order holds 7, which the format forbids"),
        (&[(100, &be4(90))], "0x64: header field header_length holds 90, which the format forbids"),
        (&[(104, &[1])], "0x68: header field compression_type holds 1, which the format forbids"),
        (
            &[(116, &be4(0xffff_0000))],
            "0x70: header extension 0x6803f857 of 4294901760 bytes passes the end of the header",
        ),
        (
            &[(112, &be4(0)), (116, &be4(3977))],
            "0x70: header extension 0x00000000 of 3977 bytes passes the end of the header",
        ),
        (
            &[(112, &be4(0x0537_be77)), (116, &be4(8))],
            "0x70: header extension 0x0537be77: it must have 16 bytes",
        ),
        (
            &[(8, &be8(4090)), (16, &be4(100))],
            "0x8: the backing file name of 100 bytes at 0xffa does not fit the header",
        ),
        (
            &[(8, &be8(1000)), (16, &be4(1024))],
            "0x8: the backing file name of 1024 bytes at 0x3e8 does not fit the header",
        ),
    ];
    let unsupported: &[(Patch<'_>, &str)] = &[
        (&[(4, &be4(4))], "version 4 of the format"),
        (&[(20, &be4(22))], "clusters of 2^22 bytes (at most 2 MiB)"),
        (&[(32, &be4(3))], "encryption (method 3)"),
        (
            &[(32, &be4(1))],
            "legacy AES encryption, which is not safe: convert the image with qemu-img to one with LUKS or without",
        ),
        (&[(36, &be4((4 << 20) + 1))], "a L1 table of 33554440 bytes (at most 33554432)"),
        (&[(56, &be4(2049))], "a refcount table of 8392704 bytes (at most 8388608)"),
        (&[(72, &be8(8)), (104, &[2])], "compression type 2"),
        (&[(72, &be8(1 << 62))], "incompatible features bit 62"),
        (&[(72, &be8(2))], "writing to an image that is marked corrupt: repair it first"),
    ];
    block_on(async {
        let sound = sound().await;
        for (patch, wanted) in corrupt {
            let said = open(&patched(&sound, patch)).await.map(drop).unwrap_err();
            assert_eq!(said.to_string(), format!("memory.qcow2 is corrupt at {wanted}"));
        }
        for (patch, wanted) in unsupported {
            let said = open(&patched(&sound, patch)).await.map(drop).unwrap_err();
            let whole = format!("memory.qcow2 needs what is not supported: {wanted}");
            assert_eq!(said.to_string(), whole);
        }
        let short = MemoryStorage::from_bytes(sound[..90].to_vec(), 1);
        let said = open(&short).await.map(drop).unwrap_err().to_string();
        assert_eq!(said, "memory.qcow2 is corrupt at 0x0: the file ends inside the header");
    });
}

#[test]
fn a_table_entry_that_breaks_a_rule_is_refused_with_its_place_and_what_it_holds() {
    block_on(async {
        let sound = sound().await;
        let l1_at = word(&sound, 40);
        let l2_at = word(&sound, l1_at) & 0x00ff_ffff_ffff_fe00;
        let [l1, l2] = [l1_at, l2_at].map(|at| usize::try_from(at).unwrap());
        let own = 1u64 << 63;
        let far = 1 << 50;
        let cases = [
            (l1, own | (l2_at + 512), "L1 table entry {raw} is not aligned to a cluster"),
            (l1, own | 1 << 56 | l2_at, "L1 table entry {raw} sets reserved bits"),
            (l1, own | far, "L1 table entry points at 0x4000000000000, behind the end of the file"),
            (l1, own | l1_at, "L1 table entry points at {l1}, where metadata lives"),
            (l2, own | (l2_at + 512), "L2 table entry {raw} is not aligned to a cluster"),
            (l2, own | 1 << 61 | l2_at, "L2 table entry {raw} sets reserved bits"),
        ];
        for (at, raw, rule) in cases {
            let storage = patched(&sound, &[(at, &raw.to_be_bytes())]);
            let image = open(&storage).await.unwrap();
            let said = image.read(range(0, 512)).await.unwrap_err();
            assert_eq!(said.kind(), ErrorKind::Io);
            let said = said.to_string();
            let rule = rule.replace("{raw}", &format!("{raw:#018x}"));
            let rule = rule.replace("{l1}", &format!("{l1_at:#x}"));
            assert!(said.starts_with("memory.qcow2 is corrupt at 0x"), "{said}");
            assert!(said.ends_with(&format!(": {rule}")), "{said}, not {rule}");
            // What does not depend on it is there.
            if at == l2 {
                let rest = image.read(range(4096, 8192)).await.unwrap().to_vec();
                assert!(rest == pattern(1, 12_288)[4096..]);
            }
        }
    });
}

#[test]
fn requests_that_cannot_be_say_the_range_and_the_size() {
    let shape = Shape { size_bytes: 1 << 20, ..Shape::new(4096) };
    block_on(async {
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        let (behind, later) = (range((1 << 20) - 512, 1024), Durability::Deferred);
        let at = behind.start();
        let zeroes = ZeroMode::default();
        let said = [
            image.read(behind).await.map(drop).unwrap_err().to_string(),
            image.extents(behind).await.map(drop).unwrap_err().to_string(),
            image.discard(behind, later).await.unwrap_err().to_string(),
            image.map(behind).await.map(drop).unwrap_err().to_string(),
        ];
        let passes =
            "1024 bytes at offset 1048064 passes the end of the device, which has 1048576 bytes";
        for text in said {
            assert_eq!(text, passes);
        }
        let said = [
            image.write(at, vec![1; 1024].into(), later).await.unwrap_err(),
            image.write_zeroes(behind, zeroes, later).await.unwrap_err(),
            image.write_compressed(at, vec![1; 1024].into()).await.unwrap_err().into(),
        ];
        for error in said {
            assert_eq!(error.to_string(), format!("no space: writing {passes}"));
            assert_eq!(error.kind(), ErrorKind::NoSpace);
        }
        let beyond = image.write(u64::MAX - 1, vec![1; 1024].into(), later).await.unwrap_err();
        assert!(beyond.to_string().contains("passes the end"), "{beyond}");
        image.close().await.unwrap();
        assert_eq!(storage.log_len(), 0, "nothing of this was written");
        for error in [
            image.write(0, vec![1; 512].into(), later).await.unwrap_err(),
            image.discard(range(0, 512), later).await.unwrap_err(),
            image.flush().await.unwrap_err(),
            image.read(range(0, 512)).await.map(drop).unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::ShuttingDown, "{error}");
        }
        let closed = image.create_snapshot("late").await.unwrap_err().to_string();
        assert_eq!(closed, "memory.qcow2 is closed");
        let image = shape.open_read_only(&storage).await.unwrap();
        let refused = [
            image.write(0, vec![1; 512].into(), later).await.unwrap_err(),
            image.write_zeroes(range(0, 512), zeroes, later).await.unwrap_err(),
            image.discard(range(0, 512), later).await.unwrap_err(),
            image.write_compressed(0, vec![1; 4096].into()).await.unwrap_err().into(),
            image.resize(2 << 20, &qcow2::ResizeOptions::default()).await.unwrap_err().into(),
            image.create_snapshot("never").await.map(drop).unwrap_err().into(),
            image.apply_snapshot("never").await.unwrap_err().into(),
            image.delete_snapshot("never").await.unwrap_err().into(),
            image.add_bitmap("never", 65_536, true).await.unwrap_err().into(),
        ];
        for error in refused {
            assert_eq!(error.kind(), ErrorKind::ReadOnly, "{error}");
        }
    });
}

#[test]
fn options_that_do_not_go_together_are_refused_with_what_would_do() {
    let new = || CreateOptions::new(1 << 20);
    let raw = BackingFormat::Raw;
    let old = Version::V2;
    let cases = [
        (
            new().cluster_bytes(1000),
            "a cluster size of 1000 bytes (a power of two from 512 to 2097152 is needed)",
        ),
        (new().refcount_bits(5), "refcounts of 5 bits (a power of two from 1 to 64 is needed)"),
        (
            new().extended_l2(true).cluster_bytes(8192),
            "extended L2 entries with clusters of 8192 bytes (at least 16384 are needed)",
        ),
        (new().version(old).extended_l2(true), "extended L2 entries in version 2 (compat=0.10)"),
        (new().version(old).lazy_refcounts(true), "lazy refcounts in version 2 (compat=0.10)"),
        (new().backing("x".repeat(1024), raw), "a backing file name of 1024 bytes (at most 1023)"),
        (new().backing("a\0b", raw), "a backing file name of 3 bytes (at most 1023)"),
        (new().data_file("", false), "a data file name of 0 bytes (at most 1023)"),
        (
            new().data_file("data", true).backing("below", raw),
            "data_file_raw with a backing file: a raw data file alone has to read as the disk does",
        ),
        (
            new().backing("below", raw).preallocation(qcow2::Preallocation::Metadata),
            "preallocation over a backing file without extended L2 entries",
        ),
        (
            CreateOptions::new(u64::MAX / 4).cluster_bytes(512),
            "a disk of 4611686018427387903 bytes: with this cluster size at most 137438953472",
        ),
    ];
    block_on(async {
        let dir = tempfile::tempdir().unwrap();
        for (options, wanted) in cases {
            let path = dir.path().join("new.qcow2");
            let said = Image::create(&path, &options).await.map(drop).unwrap_err();
            assert_eq!(said.kind(), ErrorKind::Invalid, "{said}");
            assert_eq!(said.to_string(), format!("cannot create {}: {wanted}", path.display()));
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "{wanted}");
        }
    });
}

#[test]
fn a_device_that_is_full_fails_the_request_by_name_and_stays_an_image() {
    block_on(async {
        let storage = MemoryStorage::from_bytes(vec![0; 40 * 4096], 512);
        let device = || {
            // As long as it is for ever, like a block device.
            let facts = StorageFacts { fixed_len: true, ..storage.facts() };
            let storage = storage.clone().with_facts(facts);
            HostFile::from_storage(Path::new("/dev/disk"), storage).unwrap()
        };
        let options = CreateOptions::new(1 << 20).cluster_bytes(4096);
        Image::create_on(&device(), &options).await.unwrap();
        let image = Image::open_on(device(), None, OpenOptions::writing()).await.unwrap();
        let mut written = 0u64;
        let full = loop {
            let data = pattern(written + 1, 4096);
            match image.write(written * 4096, data.into(), Durability::Durable).await {
                Ok(()) => written += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(full.kind(), ErrorKind::NoSpace, "{full}");
        let text = full.to_string();
        assert!(
            text.starts_with("cannot allocate /dev/disk (4096 bytes at offset 163840)"),
            "{text}"
        );
        assert!(written > 30, "{written}");
        // What is given back can be written again.
        image.discard(range(0, 4096), Durability::Durable).await.unwrap();
        let data = pattern(99, 4096);
        image.write(1 << 19, data.clone().into(), Durability::Durable).await.unwrap();
        image.close().await.unwrap();
        let image = Image::open_on(device(), None, OpenOptions::reading()).await.unwrap();
        assert!(image.read(range(1 << 19, 4096)).await.unwrap().to_vec() == data);
        for number in 1..written {
            let read = image.read(range(number * 4096, 4096)).await.unwrap().to_vec();
            assert!(read == pattern(number + 1, 4096), "{number}");
        }
        assert_eq!(storage.snapshot().len(), 40 * 4096);
        crate::check::check(&storage.snapshot()).assert_clean("a full device");
    });
}

#[test]
fn a_backing_file_that_fails_is_named_as_one_and_its_cause_is_told() {
    let shape = Shape::new(4096).over_data();
    block_on(async {
        let storage = shape.create().await;
        let below = MemoryStorage::from_bytes(pattern(99, 1 << 20), 512);
        let raw = || {
            let file = HostFile::from_storage(Path::new("below.raw"), below.clone().into_dyn());
            RawDevice::new(file.unwrap()) as Arc<dyn BlockDevice>
        };
        let options = OpenOptions::writing();
        let image = Image::open_on(host(&storage), Some(raw()), options).await.unwrap();
        for errno in [5, 12] {
            let fail = || below.fail_nth_errno(0, errno, |op| op.kind == OpKind::Read);
            fail();
            let read = image.read(range(4096, 8192)).await.map(drop).unwrap_err();
            fail();
            // A part of a cluster needs the rest from below.
            let later = Durability::Deferred;
            let write = image.write(5000, vec![1; 10].into(), later).await.unwrap_err();
            for error in [read, write] {
                let text = error.to_string();
                let start = "backing file of memory.qcow2: cannot read below.raw (";
                assert!(text.starts_with(start), "{text}");
                let kind = if errno == 12 { ErrorKind::NoMemory } else { ErrorKind::Io };
                assert_eq!(error.kind(), kind, "{text}");
            }
        }
        // It is over with the fault.
        image.write(5000, vec![1; 10].into(), Durability::Durable).await.unwrap();
        image.close().await.unwrap();
    });
}

#[test]
fn parts_that_the_header_does_not_know_or_misses_are_refused_with_their_name() {
    let (alone, over) = (Shape::new(4096), Shape::new(4096).over_data());
    block_on(async {
        let (alone, over) = (alone.create().await, over.create().await);
        let below = || Some(MemoryDevice::read_only(vec![0; 512]) as Arc<dyn BlockDevice>);
        let data = host(&MemoryStorage::new());
        let open = |storage, data, below| {
            Image::open_parts(host(storage), data, below, OpenOptions::reading())
        };
        for (refused, wanted) in [
            (
                open(&alone, None, below()).await,
                "refers to \"\": the caller gave a device for it, and the image records none",
            ),
            (
                open(&over, None, None).await,
                "refers to \"below\": the caller gave no device for it",
            ),
            (
                open(&alone, Some(data), None).await,
                "refers to \"memory.qcow2\": the caller gave an external data file, and the image has none",
            ),
        ] {
            let error = refused.map(drop).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert_eq!(error.to_string(), format!("memory.qcow2 {wanted}"));
        }
    });
}

#[test]
fn amendments_that_cannot_be_are_refused_and_change_nothing() {
    let shape = Shape::new(4096);
    let none = AmendOptions::default;
    let name =
        |path: &str| Some(Some(BackingName { path: path.to_owned(), format: BackingFormat::Raw }));
    let cases = [
        (
            AmendOptions { refcount_bits: Some(3), ..none() },
            "refcounts of 3 bits (a power of two from 1 to 64 is needed)",
        ),
        (
            AmendOptions { refcount_bits: Some(128), ..none() },
            "refcounts of 128 bits (a power of two from 1 to 64 is needed)",
        ),
        (
            AmendOptions { data_file: Some("data".to_owned()), ..none() },
            "the image has no external data file",
        ),
        (
            AmendOptions { data_file_raw: Some(true), ..none() },
            "an existing data file cannot become raw",
        ),
        (
            AmendOptions { backing: name(""), ..none() },
            "a file name of 0 bytes (1 to 1023, without NUL)",
        ),
        (
            AmendOptions { backing: name(&"x".repeat(1024)), ..none() },
            "a file name of 1024 bytes (1 to 1023, without NUL)",
        ),
        (
            AmendOptions { version: Some(Version::V2), lazy_refcounts: Some(true), ..none() },
            "the image has lazy refcounts, and version 2 (compat=0.10) has not",
        ),
        (
            AmendOptions { version: Some(Version::V2), refcount_bits: Some(64), ..none() },
            "the image has refcounts that have not 16 bits, and version 2 (compat=0.10) has not",
        ),
    ];
    block_on(async {
        let storage = shape.create().await;
        let before = storage.snapshot();
        let image = shape.open(&storage).await.unwrap();
        for (options, wanted) in cases {
            let said = image.amend(&options).await.unwrap_err();
            assert_eq!(said.kind(), ErrorKind::Invalid, "{said}");
            assert_eq!(said.to_string(), format!("cannot change memory.qcow2: {wanted}"));
        }
        image.close().await.unwrap();
        assert!(storage.snapshot() == before);
        let image = shape.open_read_only(&storage).await.unwrap();
        let lazy = AmendOptions { lazy_refcounts: Some(true), ..none() };
        let refused = image.amend(&lazy).await.unwrap_err();
        assert!(matches!(refused, Error::Request(block::DeviceError::ReadOnly)), "{refused}");
        let old = shape.clone().old();
        let storage = old.create().await;
        let image = old.open(&storage).await.unwrap();
        let refused = image.amend(&lazy).await.unwrap_err().to_string();
        assert!(
            refused.ends_with("lazy refcounts, and version 2 (compat=0.10) has not"),
            "{refused}"
        );
    });
}

#[test]
fn snapshots_that_cannot_be_say_why() {
    let shape = Shape::new(4096);
    block_on(async {
        let storage = shape.create().await;
        let image = shape.open(&storage).await.unwrap();
        let said = |error: Error| {
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
            let text = error.to_string();
            text.strip_prefix("memory.qcow2: ").unwrap_or_else(|| panic!("{text}")).to_owned()
        };
        let long = image.create_snapshot(&"x".repeat(300)).await.map(drop).unwrap_err();
        assert_eq!(said(long), "a snapshot name of 300 bytes (at most 255, without NUL)");
        let odd = image.create_snapshot("a\0b").await.map(drop).unwrap_err();
        assert_eq!(said(odd), "a snapshot name of 3 bytes (at most 255, without NUL)");
        let gone = "there is no snapshot with the id or name \"gone\"";
        assert_eq!(said(image.apply_snapshot("gone").await.unwrap_err()), gone);
        assert_eq!(said(image.delete_snapshot("gone").await.unwrap_err()), gone);
        image.create_snapshot("kept").await.unwrap();
        image.add_bitmap("changes", 65_536, true).await.unwrap();
        let bitmaps = image.apply_snapshot("kept").await.unwrap_err();
        let wanted =
            "the image has dirty bitmaps, which would not tell of the change: remove them first";
        assert_eq!(said(bitmaps), wanted);
        image.close().await.unwrap();
        let open = |options| shape.open_with(&storage, options);
        let missing = open(OpenOptions::reading().snapshot("gone")).await.map(drop).unwrap_err();
        assert_eq!(said(missing), gone);
        let writing = open(OpenOptions::writing().snapshot("kept")).await.map(drop).unwrap_err();
        assert_eq!(said(writing), "a snapshot can be opened for reading only");
        // An L1 table that no disk needs.
        let mut bytes = storage.snapshot();
        let entry = usize::try_from(word(&bytes, 64)).unwrap();
        bytes[entry + 8..entry + 12].copy_from_slice(&u32::MAX.to_be_bytes());
        let storage = MemoryStorage::from_bytes(bytes, 1);
        let options = OpenOptions::reading().snapshot("kept");
        let huge = shape.open_with(&storage, options).await.map(drop).unwrap_err();
        assert_eq!(
            huge.to_string(),
            "memory.qcow2 needs what is not supported: a snapshot's L1 table of 34359738360 bytes (at most 33554432)"
        );
        let narrow = shape.clone().refcount_bits(1);
        let storage = narrow.create().await;
        let image = narrow.open(&storage).await.unwrap();
        let refused = image.create_snapshot("never").await.map(drop).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::NotSupported);
        assert!(refused.to_string().ends_with("a refcount of 2, where refcounts have 1 bits"));
    });
}

#[test]
fn a_backing_format_that_nobody_reads_is_refused_by_its_name() {
    block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("top.qcow2");
        let options = CreateOptions::new(1 << 20).backing("below", BackingFormat::Raw);
        Image::create(&path, &options).await.unwrap();
        let good = std::fs::read(&path).unwrap();
        let mut bytes = good.clone();
        let kind = 0xe279_2acau32.to_be_bytes();
        let at = bytes.windows(4).position(|four| four == kind).unwrap();
        assert_eq!(&bytes[at + 8..at + 11], b"raw");
        bytes[at + 8..at + 11].copy_from_slice(b"qed");
        std::fs::write(&path, bytes).unwrap();
        let refused = Image::open(&path, OpenOptions::reading()).await.map(drop).unwrap_err();
        let text = refused.to_string();
        assert!(text.ends_with("needs what is not supported: backing format \"qed\""), "{text}");
        std::fs::write(&path, good).unwrap();
        let missing = Image::open(&path, OpenOptions::reading()).await.map(drop).unwrap_err();
        assert!(missing.to_string().contains("below"), "{missing}");
    });
}
