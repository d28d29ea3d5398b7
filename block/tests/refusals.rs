//! What host files and devices refuse, and how they say it: the operation, the file, the bytes, and the class of the
//! cause. That the rest works is tested where it lives.

use std::io;
use std::path::Path;

use block::{
    BlockDevice, ByteRange, DeviceError, Durability, Engine, ErrorKind, HostFile, HostOp,
    MemoryFiles, MemoryStorage, OpKind, OpenOptions, RawDevice, Storage, StorageFacts, ZeroMode,
};
use bytes::Bytes;

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).unwrap()
}

fn over(storage: &MemoryStorage) -> HostFile {
    HostFile::from_storage(Path::new("/x/disk"), storage.clone().into_dyn()).unwrap()
}

fn changed(storage: &MemoryStorage, change: impl FnOnce(&mut StorageFacts)) -> HostFile {
    let mut facts = storage.facts();
    change(&mut facts);
    HostFile::from_storage(Path::new("/dev/disk"), storage.clone().with_facts(facts)).unwrap()
}

fn device(storage: &MemoryStorage) -> HostFile {
    changed(storage, |facts| facts.fixed_len = true)
}

#[tokio::test]
async fn every_operation_that_fails_says_what_it_was_on_which_file_and_where() {
    let storage = MemoryStorage::from_bytes(vec![1; 8192], 1);
    let (file, part) = (over(&storage), range(4096, 4096));
    let other = MemoryStorage::from_bytes(vec![2; 8192], 1);
    let fail = |kind| storage.fail_nth_errno(0, 5, move |op| op.kind == kind);
    let mut said = Vec::new();
    fail(OpKind::Read);
    said.push(file.read(part).await.unwrap_err());
    fail(OpKind::Write);
    said.push(file.write(4096, Bytes::from_static(b"abc"), None).await.unwrap_err());
    fail(OpKind::Copy);
    said.push(file.copy_from(&over(&other), 0, 4096, 4096, None).await.unwrap_err());
    fail(OpKind::Punch);
    said.push(file.punch(part, None).await.unwrap_err());
    fail(OpKind::ZeroRange);
    said.push(file.write_zeroes(part, None).await.unwrap_err());
    fail(OpKind::Map);
    said.push(file.data_ranges(part).await.unwrap_err());
    fail(OpKind::Allocate);
    said.push(file.grow(10_000).await.unwrap_err());
    fail(OpKind::Allocate);
    said.push(file.ensure_capacity(9000).await.unwrap_err());
    fail(OpKind::SetLen);
    said.push(file.set_len(12_288).await.unwrap_err());
    fail(OpKind::Sync);
    said.push(file.sync().await.unwrap_err());
    let said: Vec<_> = said.iter().map(|error| (error.kind(), error.to_string())).collect();
    let started = [
        "cannot read /x/disk (4096 bytes at offset 4096): ",
        "cannot write /x/disk (3 bytes at offset 4096): ",
        "cannot copy into /x/disk (4096 bytes at offset 4096): ",
        "cannot punch /x/disk (4096 bytes at offset 4096): ",
        "cannot punch /x/disk (4096 bytes at offset 4096): ",
        "cannot stat /x/disk (4096 bytes at offset 4096): ",
        "cannot allocate /x/disk (1808 bytes at offset 8192): ",
        "cannot allocate /x/disk (8389416 bytes at offset 8192): ",
        "cannot resize /x/disk: ",
        "cannot sync /x/disk: ",
    ];
    for ((kind, text), start) in said.iter().zip(started) {
        assert!(text.starts_with(start) && text.contains("os error 5"), "{text}, not {start}");
        assert_eq!(*kind, ErrorKind::Io);
    }
    // Nothing of all that had an effect.
    assert!(storage.log().is_empty());
    assert_eq!(storage.snapshot(), vec![1; 8192]);
}

#[tokio::test]
async fn what_the_system_says_becomes_a_class() {
    for (errno, kind) in [
        (libc::ENOSPC, ErrorKind::NoSpace),
        (libc::EDQUOT, ErrorKind::NoSpace),
        (libc::EFBIG, ErrorKind::NoSpace),
        (libc::ENOMEM, ErrorKind::NoMemory),
        (libc::EROFS, ErrorKind::ReadOnly),
        (libc::EOPNOTSUPP, ErrorKind::NotSupported),
        (libc::EIO, ErrorKind::Io),
        (libc::EBADF, ErrorKind::Io),
    ] {
        let storage = MemoryStorage::from_bytes(vec![0; 4096], 1);
        let device = RawDevice::new(over(&storage));
        storage.fail_nth_errno(0, errno, |op| op.kind == OpKind::Write);
        let data = Bytes::from_static(b"x");
        let error = device.write(7, data, Durability::Deferred).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(matches!(&error, DeviceError::Host(host) if host.op == HostOp::Write));
    }
}

#[tokio::test]
async fn a_device_keeps_its_length_and_has_no_room_behind_its_end() {
    let storage = MemoryStorage::from_bytes(vec![1; 8192], 512);
    let file = device(&storage);
    let behind = range(8192 - 512, 1024);
    let full = [
        file.write(behind.start(), vec![2; 1024].into(), None).await.unwrap_err(),
        file.write_zeroes(behind, None).await.unwrap_err(),
        file.punch(behind, None).await.unwrap_err(),
        file.grow(9000).await.unwrap_err(),
        file.copy_from(&file, 0, behind.start(), 1024, None).await.unwrap_err(),
        file.set_len(8193).await.unwrap_err(),
    ];
    for error in full {
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
        assert!(error.to_string().contains("/dev/disk"), "{error}");
    }
    assert_eq!(file.set_len(4096).await.unwrap_err().kind(), ErrorKind::NotSupported);
    // What a file would do by itself is nothing to do here.
    file.set_len(8192).await.unwrap();
    file.ensure_capacity(1 << 20).await.unwrap();
    file.ensure_len(1 << 20).await.unwrap();
    file.give_back().await.unwrap();
    assert_eq!((file.len(), storage.log_len()), (8192, 0));
}

#[tokio::test]
async fn no_file_reaches_behind_what_offsets_can_say() {
    let storage = MemoryStorage::from_bytes(vec![1; 512], 512);
    let file = over(&storage);
    let two = Bytes::from_static(b"ab");
    for at in [u64::MAX, u64::MAX - 1, i64::MAX.unsigned_abs(), i64::MAX.unsigned_abs() - 5] {
        let written = file.write(at, two.clone(), None).await.unwrap_err();
        assert_eq!((written.kind(), written.op), (ErrorKind::NoSpace, HostOp::Write), "{at:#x}");
        let copied = file.copy_from(&file, 0, at, 512, None).await.unwrap_err();
        assert_eq!((copied.kind(), copied.op), (ErrorKind::NoSpace, HostOp::Copy), "{at:#x}");
        let read = file.read(ByteRange::between(at - 1, at)).await;
        assert!(read.is_err_and(|error| error.op == HostOp::Read), "{at:#x}");
    }
    assert_eq!((storage.log_len(), file.len()), (0, 512));
    let raw = RawDevice::new(file);
    let behind = raw.write(u64::MAX, two, Durability::Deferred).await.unwrap_err();
    assert!(matches!(&behind, DeviceError::WritePastEnd { size_bytes: 512, .. }), "{behind}");
}

#[tokio::test]
async fn nothing_is_nothing_to_do_even_where_it_would_fail() {
    let storage = MemoryStorage::from_bytes(vec![1; 512], 1);
    storage.fail_from(0, io::ErrorKind::Other, |_| true);
    let (file, none) = (over(&storage), range(100, 0));
    assert!(file.read(none).await.unwrap().is_empty());
    file.write(100, Bytes::new(), None).await.unwrap();
    file.write_zeroes(none, None).await.unwrap();
    assert!(file.punch(none, None).await.unwrap());
    assert!(file.copy_from(&file, 0, 100, 0, None).await.unwrap());
    assert_eq!(file.data_ranges(none).await.unwrap(), []);
    file.grow(512).await.unwrap();
    file.ensure_len(10).await.unwrap();
    assert!(file.sync().await.is_err());
    storage.clear_faults();
    file.sync().await.unwrap();
}

#[tokio::test]
async fn where_the_host_cannot_allocate_files_grow_by_holes() {
    let storage = MemoryStorage::from_bytes(vec![1; 512], 512);
    storage.without_fallocate();
    let file = over(&storage);
    file.grow(5000).await.unwrap();
    assert_eq!((file.len(), storage.snapshot().len()), (5000, 5000));
    file.ensure_capacity(1 << 20).await.unwrap();
    file.ensure_len(6000).await.unwrap();
    assert_eq!((file.len(), storage.snapshot().len()), (6000, 6000));
    assert!(!file.punch(range(0, 4096), None).await.unwrap() && !file.can_punch());
    file.write_zeroes(range(0, 4096), None).await.unwrap();
    assert!(!file.has_fast_zeroes());
    assert!(block::is_zero(&file.read(range(0, 6000)).await.unwrap()));
    // Its lengths are known to later ones, too.
    storage.fail_nth(0, io::ErrorKind::StorageFull, |op| op.kind == OpKind::SetLen);
    let full = file.ensure_len(7000).await.unwrap_err();
    assert_eq!((full.kind(), full.op, file.len()), (ErrorKind::NoSpace, HostOp::Resize, 6000));
}

#[tokio::test]
async fn a_copy_that_the_host_cannot_make_is_left_to_the_caller() {
    let storage = MemoryStorage::from_bytes(vec![1; 4096], 512);
    let other = MemoryStorage::from_bytes(vec![2; 4096], 512);
    let (file, from) = (over(&storage), over(&other));
    assert!(file.copy_from(&from, 0, 512, 512, None).await.unwrap());
    // Not in whole blocks, and behind the end of the other.
    for (at, to, len) in [(0, 513, 512), (7, 512, 512), (0, 512, 100), (3584, 0, 1024)] {
        assert!(!file.copy_from(&from, at, to, len, None).await.unwrap(), "{at} {to} {len}");
    }
    storage.fail_nth_errno(0, libc::EOPNOTSUPP, |op| op.kind == OpKind::Copy);
    assert!(!file.copy_from(&from, 0, 1024, 512, None).await.unwrap());
    let mut model = vec![1; 4096];
    model[512..1024].fill(2);
    assert_eq!(storage.snapshot(), model);
}

#[tokio::test]
async fn a_read_only_disk_refuses_changes_by_name_and_answers_questions() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.raw");
    std::fs::write(&path, vec![7; 4096]).unwrap();
    let disk = RawDevice::open(&path, true).await.unwrap();
    assert!(disk.limits().read_only && !disk.file().is_empty());
    let part = range(0, 512);
    let refused = [
        disk.write(0, Bytes::from_static(b"x"), Durability::Deferred).await.unwrap_err(),
        disk.write_zeroes(part, ZeroMode::default(), Durability::Deferred).await.unwrap_err(),
        disk.discard(part, Durability::Deferred).await.unwrap_err(),
    ];
    for error in refused {
        assert_eq!(error.kind(), ErrorKind::ReadOnly);
        assert_eq!(error.to_string(), "the device is read-only");
    }
    disk.flush().await.unwrap();
    assert_eq!(disk.read(part).await.unwrap().to_vec(), [7; 512]);
    disk.close().await.unwrap();
    assert!(matches!(disk.extents(part).await, Err(DeviceError::Closed)));
    assert_eq!(DeviceError::Closed.kind(), ErrorKind::ShuttingDown);
}

#[tokio::test]
async fn an_image_in_use_says_by_whom_it_is_used_and_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.raw");
    std::fs::write(&path, vec![7; 4096]).unwrap();
    let mine = RawDevice::open(&path, false).await.unwrap();
    let said = RawDevice::open(&path, false).await.map(drop).unwrap_err();
    let DeviceError::Host(host) = &said else { panic!("{said}") };
    assert_eq!((host.op, host.source.kind()), (HostOp::Lock, io::ErrorKind::ResourceBusy));
    let text = said.to_string();
    assert!(text.starts_with(&format!("cannot lock {}: ", path.display())), "{text}");
    assert!(text.contains("\"write\" permission"), "{text}");
    assert!(text.ends_with("it is to be closed there first"), "{text}");
    mine.close().await.unwrap();
    drop(mine);
    RawDevice::open(&path, false).await.unwrap();
}

#[tokio::test]
async fn files_in_memory_stand_for_real_ones_and_lose_what_was_not_synced() {
    let directory = tempfile::tempdir().unwrap();
    let [first, second, third] =
        ["first", "second", "third"].map(|name| directory.path().join(name));
    for path in [&first, &second, &third] {
        std::fs::write(path, b"on the disk").unwrap();
    }
    let files = MemoryFiles::new();
    files.put(&first, b"replaced".to_vec(), 1).unwrap();
    files.put(&first, b"in memory".to_vec(), 1).unwrap();
    files.put(&second, b"also".to_vec(), 1).unwrap();
    assert!(files.put(&directory.path().join("none"), Vec::new(), 1).is_err());
    assert!(format!("{files:?}").contains("second"));
    let engine = Engine::memory(files.clone());
    let writing = OpenOptions::writing;
    let open = |path| HostFile::open_with(&engine, path, writing());
    let missing = open(&third).await.map(drop).unwrap_err();
    assert_eq!((missing.op, missing.source.kind()), (HostOp::Open, io::ErrorKind::NotFound));
    let (one, two) = (open(&first).await.unwrap(), open(&second).await.unwrap());
    let real = HostFile::open(&first, OpenOptions::reading()).await.unwrap();
    assert_eq!(one.id(), real.id(), "whoever compares files takes it for the real one");
    one.write(0, Bytes::from_static(b"IN"), None).await.unwrap();
    one.sync().await.unwrap();
    one.write(3, Bytes::from_static(b"MEMORY"), None).await.unwrap();
    two.write(0, Bytes::from_static(b"ALSO"), None).await.unwrap();
    assert_eq!(files.events(), 4);
    let texts = |files: &MemoryFiles| {
        [&first, &second]
            .map(|path| String::from_utf8(files.storage(path).unwrap().snapshot()).unwrap())
    };
    assert_eq!(texts(&files), ["IN MEMORY", "ALSO"]);
    // The first loses nothing, the second everything that no sync covers.
    let whole = |seed| texts(&files.crash_seeded(files.events(), seed));
    let mut ends = [whole(0), whole(1)];
    ends.sort();
    assert_eq!(ends, [["IN MEMORY", "ALSO"], ["IN memory", "also"]]);
    assert_eq!(texts(&files.crash_seeded(0, 0)), ["in memory", "also"]);
    assert_eq!(std::fs::read(&first).unwrap(), b"on the disk");
}
