//! New images in all their kinds, and what is seen of images without opening them, against `qemu-img info` and
//! `qemu-img check`.

use std::path::Path;

use block::{HostFile, LoggedOp, MemoryStorage, Storage, StorageFacts};
use qcow2::{
    BackingFormat, Compression, CreateOptions, Error, Feature, Image, Inspection, InvalidOption,
    OpenOptions, Preallocation, RecordedEncryption, Repair, Version,
};
use serde_json::Value;

use crate::common::{block_on, qemu_check, qemu_create, qemu_img, qemu_io, read_all};

const MIB: u64 = 1 << 20;

fn qemu_info(path: &Path) -> Value {
    let text = qemu_img(&["info", "--output=json", "-f", "qcow2", path.to_str().unwrap()]);
    serde_json::from_str(&text).unwrap()
}

fn inspect(path: &Path) -> Inspection {
    block_on(Image::inspect(path)).unwrap()
}

/// Every field that `qemu-img info` prints says what we see.
fn assert_agrees(path: &Path) {
    let theirs = qemu_info(path);
    let seen = inspect(path);
    let info = &seen.info;
    assert_eq!(theirs["virtual-size"], info.size_bytes / 512 * 512, "{theirs}");
    assert_eq!(theirs["cluster-size"], info.cluster_bytes);
    assert_eq!(theirs["actual-size"], seen.allocated_bytes);
    assert_eq!(theirs["dirty-flag"], info.is_dirty);
    let data = &theirs["format-specific"]["data"];
    let compat = if info.version == 2 { "0.10" } else { "1.1" };
    assert_eq!(data["compat"], compat);
    assert_eq!(data["compression-type"], info.compression.name());
    assert_eq!(data["refcount-bits"], info.refcount_bits);
    if info.version > 2 {
        assert_eq!(data["lazy-refcounts"], info.lazy_refcounts);
        assert_eq!(data["corrupt"], info.is_corrupt);
        assert_eq!(data["extended-l2"], info.extended_l2);
    }
    let file = info.data_file.as_ref();
    let name = file.and_then(|file| file.name.clone());
    assert_eq!(data.get("data-file").and_then(Value::as_str), name.as_deref());
    assert_eq!(data.get("data-file-raw").and_then(Value::as_bool), file.map(|file| file.raw));
    let backing = info.backing.as_ref();
    let name = theirs.get("backing-filename").and_then(Value::as_str);
    assert_eq!(name, backing.map(|backing| backing.name.as_str()));
    let format = theirs.get("backing-filename-format").and_then(Value::as_str);
    assert_eq!(format, backing.and_then(|backing| backing.format.as_deref()));
    let encrypted = theirs.get("encrypted").and_then(Value::as_bool).unwrap_or(false);
    assert_eq!(encrypted, info.encryption != RecordedEncryption::None);
    let bitmaps: Vec<_> = data["bitmaps"].as_array().cloned().unwrap_or_default();
    assert_eq!(bitmaps.len(), seen.bitmaps.len());
    for (theirs, ours) in bitmaps.iter().zip(&seen.bitmaps) {
        assert_eq!(theirs["name"], ours.name);
        assert_eq!(theirs["granularity"], ours.granularity_bytes);
        let flag = |name: &str| theirs["flags"].as_array().unwrap().iter().any(|f| f == name);
        assert_eq!((flag("auto"), flag("in-use")), (ours.auto, ours.in_use));
    }
    let snapshots = theirs["snapshots"].as_array().cloned().unwrap_or_default();
    let names: Vec<_> = snapshots.iter().map(|s| s["name"].as_str().unwrap()).collect();
    assert_eq!(names, seen.snapshots.iter().map(|s| s.name.as_str()).collect::<Vec<_>>());
    assert!(seen.faults.is_empty(), "{:?}", seen.faults);
}

fn every_kind() -> Vec<CreateOptions> {
    let new = || CreateOptions::new(5 * MIB);
    let prepared =
        [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
    let mut all = vec![
        new().version(Version::V2),
        new().version(Version::V2).cluster_bytes(512).preallocation(Preallocation::Metadata),
        new().version(Version::V2).backing("base.raw", BackingFormat::Raw),
        new().lazy_refcounts(true).compression(Compression::Zstd),
        new().backing("base.raw", BackingFormat::Raw),
        new().backing("x".repeat(1023), BackingFormat::Qcow2),
        new().extended_l2(true).backing("base.raw", BackingFormat::Raw),
        CreateOptions::new(0),
        CreateOptions::new(0).preallocation(Preallocation::Full),
        CreateOptions::new(1),
        CreateOptions::new(MIB + 511).preallocation(Preallocation::Metadata),
        CreateOptions::new(64 << 40),
        CreateOptions::new(100 << 30).preallocation(Preallocation::Metadata),
        // The largest disk of clusters of 512 bytes, with the widest refcounts.
        CreateOptions::new(128 << 30).cluster_bytes(512).refcount_bits(64),
    ];
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        all.push(new().refcount_bits(bits).preallocation(Preallocation::Metadata));
        all.push(new().refcount_bits(bits).cluster_bytes(512));
    }
    for cluster_bytes in [512, 4096, 65536, 2 << 20] {
        all.push(new().cluster_bytes(cluster_bytes));
        all.extend(prepared.map(|mode| new().cluster_bytes(cluster_bytes).preallocation(mode)));
    }
    for cluster_bytes in [16384, 65536, 2 << 20] {
        let extended = || new().cluster_bytes(cluster_bytes).extended_l2(true);
        all.extend(prepared.map(|mode| extended().preallocation(mode)));
        let over = || extended().backing("base.raw", BackingFormat::Raw);
        all.extend(prepared.map(|mode| over().preallocation(mode)));
    }
    for raw in [false, true] {
        all.extend(prepared.map(|mode| new().data_file("disk.data", raw).preallocation(mode)));
        all.push(new().data_file("disk.data", raw).extended_l2(true));
        all.push(new().data_file("disk.data", raw).cluster_bytes(512).refcount_bits(1));
    }
    all.push(new().data_file("disk.data", false).backing("base.raw", BackingFormat::Raw));
    all
}

#[test]
fn every_kind_of_new_image_is_what_qemu_says_and_clean() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base.raw"), vec![7; 3 << 20]).unwrap();
    let (path, data) = (dir.path().join("disk.qcow2"), dir.path().join("disk.data"));
    for options in every_kind() {
        block_on(Image::create(&path, &options)).unwrap_or_else(|e| panic!("{options:?}: {e}"));
        assert_agrees(&path);
        let seen = inspect(&path).info;
        assert_eq!(seen.size_bytes, options.size_bytes);
        assert_eq!(seen.refcount_bits, options.refcount_bits);
        assert_eq!(seen.compression, options.compression);
        assert_eq!(seen.data_file.is_some(), options.data_file.is_some());
        let backed = options.backing.as_ref().is_none_or(|backing| backing.path == "base.raw");
        // QEMU looks for the data file in the folder that it runs in.
        if backed && options.data_file.is_none() {
            let check = qemu_check(&path);
            assert!(check.is_clean(), "{options:?}: {check:?}");
        }
        std::fs::remove_file(&path).unwrap();
        if options.data_file.is_some() {
            assert_eq!(std::fs::metadata(&data).unwrap().len(), options.size_bytes);
            std::fs::remove_file(&data).unwrap();
        }
    }
}

#[test]
fn qemu_reads_the_backing_file_through_preallocated_extended_entries_and_zeros_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base.raw"), vec![7; 3 << 20]).unwrap();
    let path = dir.path().join("disk.qcow2");
    for mode in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        let options = CreateOptions::new(5 * MIB).preallocation(mode);
        let over = options.clone().extended_l2(true).backing("base.raw", BackingFormat::Raw);
        for (options, below) in [(over, 7), (options, 0)] {
            block_on(Image::create(&path, &options)).unwrap();
            let reads = format!("read -P {below} 0 3M");
            qemu_io(&path, &[&reads, "read -P 0 3M 2M", "write -P 9 1000 1000"]);
            let head = format!("read -P {below} 0 1000");
            qemu_io(&path, &[&head, "read -P 9 1000 1000", "read -P 0 4M 1M"]);
            assert!(qemu_check(&path).is_clean());
            std::fs::remove_file(&path).unwrap();
        }
    }
}

#[test]
fn a_new_image_on_a_device_shows_nothing_of_what_was_there() {
    use Preallocation::{Falloc, Full, Metadata, Off};
    for (mode, extended, data) in [Off, Metadata, Falloc, Full].into_iter().flat_map(|mode| {
        [(false, None), (true, None), (false, Some(false)), (true, Some(true))]
            .map(|(extended, data)| (mode, extended, data))
    }) {
        // As long as it is for ever, and full of what somebody left.
        let device = || {
            let storage = MemoryStorage::from_bytes(vec![0xdb; 4 << 20], 512);
            let facts = StorageFacts { fixed_len: true, ..storage.facts() };
            HostFile::from_storage(Path::new("/dev/disk"), storage.with_facts(facts)).unwrap()
        };
        let mut options = CreateOptions::new(MIB).cluster_bytes(16384).preallocation(mode);
        options = options.extended_l2(extended);
        if let Some(raw) = data {
            options = options.data_file("data", raw);
        }
        let (file, data) = (device(), data.map(|_| device()));
        block_on(async {
            Image::create_with_data(&file, data.as_ref(), &options).await.unwrap();
            let report = Image::check_on(&file, Repair::None, |_| {}).await.unwrap();
            assert!(report.is_clean(), "{options:?}: {report:?}");
            let reading = OpenOptions::reading();
            let image = Image::open_parts(file, data, None, reading).await.unwrap();
            let disk = read_all(&image).await;
            assert!(disk.iter().all(|byte| *byte == 0), "{options:?}");
        });
    }
}

#[test]
fn space_is_written_where_the_host_cannot_allocate_it() {
    for mode in [Preallocation::Falloc, Preallocation::Full] {
        for data in [false, true] {
            let storage = MemoryStorage::with_alignment(512);
            storage.without_fallocate();
            let file = |storage: &MemoryStorage| {
                let storage = storage.clone().into_dyn();
                HostFile::from_storage(Path::new("disk"), storage).unwrap()
            };
            let mut options = CreateOptions::new(MIB).preallocation(mode);
            let beside = MemoryStorage::with_alignment(512);
            beside.without_fallocate();
            if data {
                options = options.data_file("data", false);
            }
            let other = data.then(|| file(&beside));
            block_on(Image::create_with_data(&file(&storage), other.as_ref(), &options)).unwrap();
            let log = if data { beside.log() } else { storage.log() };
            let len = |op: &LoggedOp| match op {
                LoggedOp::Write { data, .. } => data.len() as u64,
                _ => 0,
            };
            let written: u64 = log.iter().map(len).sum();
            assert!(written >= MIB, "{mode:?}, data file {data}: {written} bytes");
        }
    }
}

#[test]
fn qemu_writes_and_checks_an_image_with_our_data_file() {
    let dir = tempfile::tempdir().unwrap();
    for (raw, extended) in [(false, false), (true, false), (false, true), (true, true)] {
        let path = dir.path().join("disk.qcow2");
        let data = dir.path().join("disk.data");
        // Absolute, because QEMU does not take the name relative to the image.
        let options = CreateOptions::new(3 * MIB)
            .data_file(data.to_str().unwrap(), raw)
            .extended_l2(extended);
        block_on(Image::create(&path, &options)).unwrap();
        assert!(qemu_check(&path).is_clean());
        qemu_io(&path, &["read -P 0 0 3M", "write -P 5 70000 100", "read -P 0 0 70000"]);
        assert!(qemu_check(&path).is_clean());
        assert_agrees(&path);
        let bytes = std::fs::read(&data).unwrap();
        assert_eq!(bytes.len(), 3 << 20);
        assert!(bytes[70000..70100].iter().all(|byte| *byte == 5));
        for file in [path, data] {
            std::fs::remove_file(file).unwrap();
        }
    }
}

#[test]
fn what_no_image_can_be_is_refused_by_name_and_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let refused = |options: CreateOptions| {
        let error = block_on(Image::create(&path, &options)).unwrap_err();
        assert!(!path.exists(), "{error}");
        match error {
            Error::Invalid { what, .. } => what,
            other => panic!("{other}"),
        }
    };
    let new = || CreateOptions::new(MIB);
    assert_eq!(refused(new().cluster_bytes(1000)), InvalidOption::ClusterBytes(1000));
    assert_eq!(
        refused(new().cluster_bytes(8192).extended_l2(true)),
        InvalidOption::ExtendedL2ClusterBytes(8192)
    );
    for bits in [0, 3, 128] {
        assert_eq!(refused(new().refcount_bits(bits)), InvalidOption::RefcountBits(bits));
    }
    for options in [
        new().extended_l2(true),
        new().lazy_refcounts(true),
        new().refcount_bits(8),
        new().data_file("d", false),
        new().compression(Compression::Zstd),
    ] {
        let what = refused(options.version(Version::V2));
        assert!(matches!(what, InvalidOption::NeedsVersion3 { .. }), "{what}");
    }
    let over = || new().backing("base", BackingFormat::Raw);
    assert_eq!(
        refused(over().preallocation(Preallocation::Falloc)),
        InvalidOption::PreallocationOverBackingFile
    );
    assert_eq!(refused(over().data_file("d", true)), InvalidOption::RawDataOverBackingFile);
    for len in [0, 1024] {
        let name = "x".repeat(len);
        let what = refused(new().backing(name.clone(), BackingFormat::Raw));
        assert_eq!(what, InvalidOption::BackingName { len, limit: 1023 });
        assert_eq!(
            refused(new().data_file(name, false)),
            InvalidOption::DataFileName { len, limit: 1023 }
        );
    }
    assert!(matches!(
        refused(new().cluster_bytes(512).backing("x".repeat(400), BackingFormat::Raw)),
        InvalidOption::BackingName { len: 400, limit: 300..400 }
    ));
    assert!(matches!(
        refused(new().cluster_bytes(512).data_file("x".repeat(500), false)),
        InvalidOption::HeaderTooLarge { limit: 512 }
    ));
    assert!(matches!(
        refused(CreateOptions::new((128 << 30) + 1).cluster_bytes(512)),
        InvalidOption::SizeBytes { .. }
    ));
    assert!(matches!(
        refused(
            CreateOptions::new(100 << 30)
                .cluster_bytes(512)
                .refcount_bits(64)
                .preallocation(Preallocation::Metadata)
        ),
        InvalidOption::RefcountTable { .. }
    ));
}

#[test]
fn a_data_file_that_exists_is_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let (path, data) = (dir.path().join("disk.qcow2"), dir.path().join("disk.data"));
    std::fs::write(&data, b"precious").unwrap();
    let options = CreateOptions::new(MIB).data_file("disk.data", false);
    assert!(matches!(block_on(Image::create(&path, &options)), Err(Error::Host(_))));
    assert!(!path.exists());
    assert_eq!(std::fs::read(&data).unwrap(), b"precious");
}

#[test]
fn what_qemu_makes_is_seen_as_qemu_sees_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let text = path.to_str().unwrap();
    for options in [
        "compat=0.10",
        "cluster_size=512",
        "extended_l2=on,compression_type=zstd,lazy_refcounts=on",
        "refcount_bits=1",
        "data_file=/nonexistent-folder-of-a-test/x",
    ] {
        if options.starts_with("data_file") {
            let data = dir.path().join("other.data");
            qemu_create(&path, &format!("data_file={}", data.display()), "3M", None);
            std::fs::remove_file(&data).unwrap();
        } else {
            qemu_create(&path, options, "3M", None);
        }
        if options.starts_with("extended") {
            qemu_img(&["bitmap", "--add", "-g", "32k", text, "first"]);
            qemu_img(&["bitmap", "--add", "--disable", text, "second"]);
            qemu_img(&["snapshot", "-c", "before", text]);
            qemu_img(&["snapshot", "-c", "later", text]);
        }
        assert_agrees(&path);
        std::fs::remove_file(&path).unwrap();
    }
    let secret = dir.path().join("secret");
    std::fs::write(&secret, "open sesame").unwrap();
    let object = format!("secret,id=s,file={}", secret.display());
    let how = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    qemu_img(&["create", "-q", "-f", "qcow2", "--object", &object, "-o", how, text, "1M"]);
    assert_eq!(inspect(&path).info.encryption, RecordedEncryption::Luks);
}

#[test]
fn damaged_dirty_and_corrupt_images_are_seen_and_their_faults_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    qemu_create(&path, "lazy_refcounts=on", "3M", None);
    qemu_img(&["snapshot", "-c", "one", path.to_str().unwrap()]);
    qemu_img(&["bitmap", "--add", path.to_str().unwrap(), "map"]);
    let whole = std::fs::read(&path).unwrap();
    let patched = |at: usize, bytes: &[u8]| {
        let mut all = whole.clone();
        all[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(&path, all).unwrap();
        inspect(&path)
    };
    let seen = patched(79, &[3]);
    assert!(seen.info.is_dirty && seen.info.is_corrupt && seen.faults.is_empty());
    assert_eq!((seen.snapshots.len(), seen.bitmaps.len()), (1, 1));
    // The L1 table, the refcount table, the snapshot table and the backing file of another world.
    let seen = patched(40, &(1u64 << 50).to_be_bytes());
    assert_eq!((seen.faults.len(), seen.snapshots.len()), (1, 1));
    let seen = patched(48, &(1u64 << 50).to_be_bytes());
    assert_eq!((seen.faults.len(), seen.bitmaps.len()), (1, 1));
    let seen = patched(64, &(1u64 << 40).to_be_bytes());
    assert_eq!((seen.faults.len(), seen.snapshots.len(), seen.bitmaps.len()), (1, 0, 1));
    // Only the header is there.
    std::fs::write(&path, &whole[..65536]).unwrap();
    let seen = inspect(&path);
    assert_eq!(seen.info.size_bytes, 3 * MIB);
    assert!(!seen.faults.is_empty());
    // A feature from the future, with its name.
    let mut all = whole.clone();
    all[72] = 128;
    std::fs::write(&path, all).unwrap();
    let refused = block_on(Image::inspect(&path));
    let Err(Error::Unsupported { feature: Feature::Unknown(text), .. }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(text, "bit 63");
}

#[test]
fn looking_at_an_image_opens_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    for name in ["/etc/passwd", "json:{\"driver\":\"file\"}", "nbd://127.0.0.1:1/x", "fifo"] {
        // We would not write such names down.
        qemu_create(&path, "compat=1.1", "1M", None);
        let text = path.to_str().unwrap();
        qemu_img(&["rebase", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", text]);
        assert_eq!(inspect(&path).info.backing.unwrap().name, name);
        std::fs::remove_file(&path).unwrap();
    }
    // Neither hangs nor opens what is no file.
    assert!(block_on(Image::inspect(dir.path())).is_err());
    assert!(block_on(Image::inspect(Path::new("/dev/null"))).is_err());
}
