//! Host files against a plain vector, over every storage: strict memory with faults, the thread pool, and io_uring on
//! real files. What the engines do inside is tested beside them.

mod copying;

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::{ErrorKind, LoggedOp, MemoryStorage, OpKind};

const FILE_BYTES: u64 = 3 << 20;

#[derive(Clone, Debug)]
enum Step {
    Write { at: u64, len: u64, skew: usize, fill: u8 },
    Zero { at: u64, len: u64 },
    Punch { at: u64, len: u64 },
    Read { at: u64, len: u64 },
    SetLen(u64),
    Grow(u64),
    Ahead(u64),
    GiveBack,
    Sync,
}

fn any_step() -> impl Strategy<Value = Step> {
    let at = || prop_oneof![0..20_000_u64, (0..40_u64).prop_map(|n| n * 512), 0..FILE_BYTES];
    let len = || {
        prop_oneof![
            6 => 1..10_000_u64,
            4 => (1..40_u64).prop_map(|n| n * 512),
            1 => 1_000_000..2_500_000_u64
        ]
    };
    prop_oneof![
        8 => (at(), len(), 0..9_usize, 1..=255_u8)
            .prop_map(|(at, len, skew, fill)| Step::Write { at, len, skew, fill }),
        2 => (at(), len()).prop_map(|(at, len)| Step::Zero { at, len }),
        2 => (at(), len()).prop_map(|(at, len)| Step::Punch { at, len }),
        4 => (at(), len()).prop_map(|(at, len)| Step::Read { at, len }),
        1 => at().prop_map(Step::SetLen),
        1 => at().prop_map(Step::Grow),
        1 => at().prop_map(Step::Ahead),
        1 => Just(Step::GiveBack),
        1 => Just(Step::Sync),
    ]
}

/// Bytes at an address that is `skew` behind an aligned one: patterned, so that a shifted copy shows.
fn pattern(len: u64, skew: usize, fill: u8) -> Bytes {
    let len = usize::try_from(len).expect("a test length");
    let mut buffer = BufferPool::shared().get_now(len + skew);
    for (index, byte) in buffer.iter_mut().enumerate() {
        *byte = fill ^ u8::try_from(index % 251).expect("below 251");
    }
    buffer.freeze().slice(skew..)
}

fn places(at: u64, len: u64) -> std::ops::Range<usize> {
    let start = usize::try_from(at).expect("a test offset");
    start..start + usize::try_from(len).expect("a test length")
}

fn ensure(model: &mut Vec<u8>, end: usize) {
    if model.len() < end {
        model.resize(end, 0);
    }
}

async fn apply(file: &HostFile, model: &mut Vec<u8>, step: &Step) -> Result<(), HostError> {
    match *step {
        Step::Write { at, len, skew, fill } => {
            let data = pattern(len, skew, fill);
            let places = places(at, len);
            ensure(model, places.end);
            model[places].copy_from_slice(&data);
            file.write(at, data, None).await?;
        }
        Step::Zero { at, len } => {
            let places = places(at, len);
            ensure(model, places.end);
            model[places].fill(0);
            file.write_zeroes(ByteRange::between(at, at + len), None).await?;
        }
        Step::Punch { at, len } => {
            if file.punch(ByteRange::between(at, at + len), None).await? {
                let places = places(at, len);
                let end = places.end.min(model.len());
                model[places.start.min(end)..end].fill(0);
            }
        }
        Step::Read { at, len } => {
            let read = file.read(ByteRange::between(at, at + len)).await?;
            let mut expected = model.clone();
            ensure(&mut expected, places(at, len).end);
            assert_eq!(read, &expected[places(at, len)], "{step:?}");
        }
        Step::SetLen(len) => {
            model.resize(places(0, len).end, 0);
            file.set_len(len).await?;
        }
        Step::Grow(len) => {
            ensure(model, places(0, len).end);
            file.grow(len).await?;
        }
        Step::Ahead(len) => file.ensure_capacity(len).await?,
        Step::GiveBack => file.give_back().await?,
        Step::Sync => file.sync().await?,
    }
    assert_eq!(file.len(), model.len() as u64, "{step:?}");
    Ok(())
}

async fn imitate(file: &HostFile, steps: &[Step]) -> Vec<u8> {
    let mut model = Vec::new();
    for step in steps {
        apply(file, &mut model, step).await.expect("a step");
    }
    let all = file.read(ByteRange::between(0, model.len() as u64)).await.expect("the end");
    assert!(all == model, "the file differs from its model after {steps:?}");
    file.give_back().await.expect("give back");
    model
}

fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(future)
}

fn poll_once<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

fn over(storage: &MemoryStorage) -> HostFile {
    HostFile::from_storage("memory".as_ref(), storage.clone().into_dyn()).expect("a host file")
}

/// Where tests make real files: beside the build, so usually on a disk file system.
fn disk_directory() -> tempfile::TempDir {
    let target = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/tmp");
    std::fs::create_dir_all(&target).expect("the target directory");
    tempfile::tempdir_in(target).expect("a temporary directory")
}

fn memory_directory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").expect("a temporary directory")
}

/// Both engines; only the pool where the environment says that this machine has no io_uring to test.
fn engines() -> Vec<Engine> {
    let mut engines = vec![Engine::blocking(3)];
    if std::env::var(crate::ENGINE_VARIABLE).as_deref() != Ok("blocking") {
        let why = "no io_uring here; SENDENSE_IO=blocking tests without it";
        engines.push(Engine::uring().expect(why));
    }
    engines
}

fn imitate_on_disk(directory: &tempfile::TempDir, steps: &[Step]) {
    for engine in engines() {
        for direct in [true, false] {
            let path = directory.path().join("image");
            let options = OpenOptions { direct, lock: false, ..OpenOptions::creating() };
            block_on(async {
                let file = HostFile::open_with(&engine, &path, options).await.expect("open");
                let model = imitate(&file, steps).await;
                file.sync().await.expect("sync");
                drop(file);
                assert!(std::fs::read(&path).expect("the file") == model, "on {}", engine.name());
                let options = OpenOptions { direct, lock: false, ..OpenOptions::reading() };
                let file = HostFile::open_with(&engine, &path, options).await.expect("reopen");
                let all = ByteRange::between(0, model.len() as u64 + 5000);
                let read = file.read(all).await.expect("read all");
                assert!(read[..model.len()] == model && crate::is_zero(&read[model.len()..]));
            });
            std::fs::remove_file(path).expect("remove");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_strictly_aligned_file_reads_like_a_vector(
        align in prop_oneof![Just(1_u16), Just(512), Just(4096)],
        fallocate: bool,
        steps in vec(any_step(), 1..40),
    ) {
        let storage = MemoryStorage::with_alignment(align);
        if !fallocate {
            storage.without_fallocate();
        }
        let model = block_on(imitate(&over(&storage), &steps));
        prop_assert!(storage.snapshot() == model, "what is stored differs");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn a_file_on_a_disk_reads_like_a_vector(steps in vec(any_step(), 1..25)) {
        imitate_on_disk(&disk_directory(), &steps);
    }

    #[test]
    fn a_file_on_tmpfs_reads_like_a_vector(steps in vec(any_step(), 1..25)) {
        imitate_on_disk(&memory_directory(), &steps);
    }
}

#[tokio::test]
async fn a_file_that_ends_within_a_block_bypasses_the_cache_where_it_may_become_longer() {
    let directory = disk_directory();
    for engine in engines() {
        let path = directory.path().join(engine.name());
        std::fs::write(&path, [1; 8192]).unwrap();
        let open = async |can_lengthen| {
            let options = OpenOptions { can_lengthen, lock: false, ..OpenOptions::writing() };
            HostFile::open_with(&engine, &path, options).await.unwrap()
        };
        let whole_blocks = open(false).await.alignment_bytes();
        for len in [10_001_u64, 20_007, 4095] {
            for can_lengthen in [false, true] {
                let mut expected = vec![1; places(0, len).end];
                std::fs::write(&path, &expected).unwrap();
                let file = open(can_lengthen).await;
                let align = if can_lengthen { whole_blocks } else { 1 };
                assert_eq!((file.alignment_bytes(), file.len()), (align, len));
                for (at, count) in
                    [(len - 30, 10), (3, 600), (len - 1, 1), (len - 5, 25), (len + 40, 7)]
                {
                    file.write(at, Bytes::from(vec![2; places(0, count).end]), None).await.unwrap();
                    let end = places(0, at + count).end;
                    expected.resize(expected.len().max(end), 0);
                    expected[places(0, at).end..end].fill(2);
                    assert_eq!(file.len(), expected.len() as u64);
                    assert!(
                        file.read(ByteRange::between(0, file.len())).await.unwrap() == expected
                    );
                }
                file.sync().await.unwrap();
                file.give_back().await.unwrap();
                drop(file);
                assert!(std::fs::read(&path).unwrap() == expected, "{len}, {can_lengthen}");
            }
        }
    }
}

#[tokio::test]
async fn a_file_in_memory_takes_what_is_long_and_reserves_nothing_ahead() {
    let directory = memory_directory();
    for engine in engines() {
        let path = directory.path().join(engine.name());
        let options = OpenOptions { lock: false, ..OpenOptions::creating() };
        let file = HostFile::open_with(&engine, &path, options).await.unwrap();
        // Longer than what is copied on the caller's thread.
        let long = pattern(9 << 20, 0, 3);
        file.write(100, long.clone(), None).await.unwrap();
        let room = rustix::fs::statvfs(&path).unwrap();
        let is_ample = room.f_bavail * room.f_frsize > 2 << 30;
        file.ensure_capacity(20 << 20).await.unwrap();
        assert_eq!(file.len(), 100 + (9 << 20));
        assert_eq!(file.host_len().unwrap() == file.len(), is_ample);
        assert!(file.read(ByteRange::between(100, file.len())).await.unwrap() == long);
        file.grow(10 << 20).await.unwrap();
        assert_eq!(file.host_len().unwrap(), 10 << 20);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn neighbours_in_one_block_never_lose_bytes() {
    const WRITERS: u64 = 32;
    const PIECE: u64 = 100;
    let directory = disk_directory();
    let mut files = vec![over(&MemoryStorage::with_alignment(4096))];
    for (index, engine) in engines().iter().enumerate() {
        let path = directory.path().join(format!("image{index}"));
        let options = OpenOptions { lock: false, ..OpenOptions::creating() };
        files.push(HostFile::open_with(engine, &path, options).await.expect("open"));
    }
    for file in files {
        // Behind the end all writes would take turns anyhow.
        file.set_len(2 << 20).await.expect("length");
        let writers = (0..WRITERS).map(|writer| {
            let file = file.clone();
            tokio::spawn(async move {
                let fill = u8::try_from(writer + 1).expect("few writers");
                for round in 0..20_u64 {
                    let at = (round * WRITERS + writer) * PIECE;
                    let data = Bytes::from(vec![fill; places(0, PIECE).end]);
                    file.write(at, data, None).await.expect("write");
                }
                // And whole blocks further on, which the unaligned ones must not undo.
                let at = (1 << 20) + writer * 4096;
                file.write(at, pattern(4096, 0, fill), None).await.expect("an aligned write");
                file.write(at + 10, Bytes::from_static(b"mark"), None).await.expect("mark");
            })
        });
        for writer in writers.collect::<Vec<_>>() {
            writer.await.expect("a writer");
        }
        let end = 20 * WRITERS * PIECE;
        let bytes = file.read(ByteRange::between(0, end)).await.expect("read");
        for (piece, at) in bytes.chunks(places(0, PIECE).end).zip(0_u64..) {
            let fill = u8::try_from(at % WRITERS + 1).expect("few writers");
            assert!(piece.iter().all(|byte| *byte == fill), "piece {at}");
        }
        for writer in 0..WRITERS {
            let at = (1 << 20) + writer * 4096;
            let block = file.read(ByteRange::between(at, at + 4096)).await.expect("a block");
            let fill = u8::try_from(writer + 1).expect("few writers");
            let mut expected = pattern(4096, 0, fill).to_vec();
            expected[10..14].copy_from_slice(b"mark");
            assert!(block == expected, "block {writer}");
        }
    }
}

#[test]
fn more_operations_than_a_ring_holds_all_complete() {
    const BLOCKS: u64 = 3000;
    let directory = disk_directory();
    for engine in engines() {
        let path = directory.path().join(engine.name());
        let options = OpenOptions { lock: false, ..OpenOptions::creating() };
        block_on(async {
            let file = HostFile::open_with(&engine, &path, options).await.expect("open");
            let fill = |block: u64| u8::try_from(block % 255 + 1).expect("a byte");
            let writes = (0..BLOCKS).map(|block| {
                let (file, data) = (file.clone(), pattern(4096, 0, fill(block)));
                async move { file.write(block * 4096, data, None).await }
            });
            crate::try_join_all(writes).await.expect("writes");
            file.sync().await.expect("sync");
            let reads = (0..BLOCKS).map(|block| {
                let file = file.clone();
                let range = ByteRange::between(block * 4096, (block + 1) * 4096);
                async move { file.read(range).await.map(|bytes| (block, bytes)) }
            });
            let read = crate::try_join_all(reads).await.expect("reads");
            for (block, bytes) in read {
                assert!(bytes == pattern(4096, 0, fill(block)), "block {block}");
            }
        });
    }
}

#[test]
fn writes_on_a_real_file_that_nobody_waits_for_finish_before_the_file_is_cut() {
    let directory = disk_directory();
    for engine in engines() {
        let path = directory.path().join(engine.name());
        let options = OpenOptions { lock: false, ..OpenOptions::creating() };
        block_on(async {
            let file = HostFile::open_with(&engine, &path, options).await.expect("open");
            let reservation: Arc<dyn std::any::Any + Send + Sync> = Arc::new("clusters");
            for block in 0..64_u64 {
                let hold = Some(Arc::clone(&reservation));
                let mut write = Box::pin(file.write(block << 16, pattern(1 << 16, 0, 5), hold));
                // Either it is done at once or the engine has it: both ways it happens.
                let _ready = poll_once(write.as_mut());
            }
            // The cut lies before all of them: one that came to its end later would lengthen the file again.
            file.set_len(0).await.expect("length");
            assert_eq!(Arc::strong_count(&reservation), 1, "every operation has let go");
            assert_eq!(file.len(), 0);
            assert_eq!(std::fs::metadata(&path).expect("the file").len(), 0);

            file.set_len(64 << 16).await.expect("length");
            let all = file.read(ByteRange::between(0, 64 << 16)).await.expect("read");
            assert!(all.iter().all(|byte| *byte == 0), "what was cut off is back");
        });
    }
}

#[test]
fn a_file_outlives_the_engine_that_opened_it() {
    let directory = disk_directory();
    for engine in engines() {
        let path = directory.path().join(engine.name());
        block_on(async {
            let options = OpenOptions { lock: false, ..OpenOptions::creating() };
            let file = HostFile::open_with(&engine, &path, options).await.expect("open");
            drop(engine);
            file.write(7, Bytes::from_static(b"still here"), None).await.expect("write");
            file.sync().await.expect("sync");
        });
        assert_eq!(&std::fs::read(&path).expect("the file")[7..], b"still here");
    }
}

#[test]
fn a_dropped_write_keeps_its_reservation_and_its_lock_until_the_host_is_done() {
    let storage = MemoryStorage::with_alignment(512);
    let file = over(&storage);
    let held = storage.hold(|op| op.kind == OpKind::Write);
    let reservation: Arc<dyn std::any::Any + Send + Sync> = Arc::new("a cluster");
    let mut write = Box::pin(file.write(0, pattern(512, 0, 7), Some(Arc::clone(&reservation))));
    assert!(poll_once(write.as_mut()).is_pending());
    drop(write);
    assert_eq!(Arc::strong_count(&reservation), 2, "the operation owns it");

    // The neighbour in the same block must wait for the write that nobody waits for any more.
    let mut neighbour = pin!(file.write(3, Bytes::from_static(b"x"), None));
    assert!(poll_once(neighbour.as_mut()).is_pending());
    assert_eq!(held.count(), 1);
    assert!(held.release_one());
    assert_eq!(Arc::strong_count(&reservation), 1);
    assert_eq!(file.len(), 512, "the length counts it");
    assert!(poll_once(neighbour.as_mut()).is_pending());
    assert_eq!(held.count(), 1, "now the neighbour writes");
    drop(held);
    assert!(matches!(poll_once(neighbour.as_mut()), Poll::Ready(Ok(()))));
    let mut expected = pattern(512, 0, 7).to_vec();
    expected[3] = b'x';
    assert_eq!(storage.snapshot(), expected);
}

#[test]
fn a_read_modify_write_keeps_every_other_writer_of_its_block_out() {
    let storage = MemoryStorage::from_bytes(vec![0; 2048], 512);
    let file = over(&storage);
    let held = storage.hold(|op| op.kind == OpKind::Read);
    let mut first = pin!(file.write(10, Bytes::from_static(b"first"), None));
    assert!(poll_once(first.as_mut()).is_pending());
    assert_eq!(held.count(), 1, "it reads what is around it");
    let mut second = pin!(file.write(20, Bytes::from_static(b"second"), None));
    let mut aligned = pin!(file.write(0, pattern(512, 0, 9), None));
    let mut elsewhere = pin!(file.write(512, pattern(512, 0, 4), None));
    assert!(poll_once(second.as_mut()).is_pending());
    assert!(poll_once(aligned.as_mut()).is_pending());
    assert!(matches!(poll_once(elsewhere.as_mut()), Poll::Ready(Ok(()))));
    assert_eq!((held.count(), storage.log_len()), (1, 1));
    drop(held);
    assert!(matches!(poll_once(first.as_mut()), Poll::Ready(Ok(()))));
    assert!(matches!(poll_once(second.as_mut()), Poll::Ready(Ok(()))));
    assert_eq!(&storage.snapshot()[8..28], b"\0\0first\0\0\0\0\0second\0\0");
    assert!(matches!(poll_once(aligned.as_mut()), Poll::Ready(Ok(()))));
    assert_eq!(storage.snapshot()[..512], pattern(512, 0, 9));
}

#[test]
fn aligned_writes_go_out_as_they_came_in() {
    let storage = MemoryStorage::with_alignment(4096);
    let file = over(&storage);
    let data = pattern(3 << 20, 0, 9);
    block_on(file.write(4096, data.clone(), None)).expect("write");
    let log = storage.log();
    let [LoggedOp::Write { at: 4096, data: written }] = log.as_slice() else {
        panic!("one write: {log:?}")
    };
    assert_eq!(written.as_ptr(), data.as_ptr(), "no copy was made");
}

#[test]
fn an_odd_end_is_cut_without_losing_what_lies_behind() {
    let storage = MemoryStorage::with_alignment(4096);
    let file = over(&storage);
    let held = storage.hold(|op| op.kind == OpKind::SetLen);
    let mut odd = pin!(file.write(0, Bytes::from_static(b"odd"), None));
    assert!(poll_once(odd.as_mut()).is_pending());
    assert_eq!(held.count(), 1, "the rounded write waits to be cut");
    let mut behind = pin!(file.write(8192, pattern(4096, 0, 3), None));
    assert!(poll_once(behind.as_mut()).is_pending(), "it would be cut off");
    drop(held);
    assert!(matches!(poll_once(odd.as_mut()), Poll::Ready(Ok(()))));
    assert_eq!(storage.snapshot(), b"odd");
    assert!(matches!(poll_once(behind.as_mut()), Poll::Ready(Ok(()))));
    assert_eq!(storage.snapshot().len(), 12_288);
}

#[test]
fn a_full_host_is_no_space_and_growing_ahead_takes_what_there_is() {
    block_on(async {
        let storage = MemoryStorage::with_alignment(512);
        storage.limit_len(1 << 20);
        let file = over(&storage);
        file.ensure_capacity(1000 << 10).await.expect("smaller steps fit");
        assert_eq!(file.len(), 0);
        assert!(storage.snapshot().len() >= 1000 << 10);
        let error = file.ensure_capacity((1 << 20) + 1).await.expect_err("full");
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        let error = file.write(1 << 20, pattern(512, 0, 1), None).await.expect_err("full");
        assert_eq!((error.kind(), error.op), (ErrorKind::NoSpace, HostOp::Write));
        file.write(0, pattern(512, 0, 1), None).await.expect("room inside");
        file.give_back().await.expect("give back");
        assert_eq!(storage.snapshot().len(), 512);
    });
}

#[test]
fn errors_name_file_operation_and_place() {
    let storage = MemoryStorage::new();
    let file = over(&storage);
    storage.fail_nth_errno(0, 5, |op| op.kind == OpKind::Sync);
    let error = block_on(file.sync()).expect_err("the sync fails");
    assert_eq!((error.kind(), error.op), (ErrorKind::Io, HostOp::Sync));
    storage.fail_nth(0, io::ErrorKind::StorageFull, |op| op.kind == OpKind::Write);
    let error = block_on(file.write(5, Bytes::from_static(b"ab"), None)).expect_err("full");
    assert!(error.to_string().starts_with("cannot write memory (2 bytes at offset 5)"));
}

#[test]
fn a_read_only_file_refuses_every_change() {
    let directory = disk_directory();
    let path = directory.path().join("image");
    std::fs::write(&path, b"content").expect("a file");
    block_on(async {
        let options = OpenOptions { lock: false, ..OpenOptions::reading() };
        let file = HostFile::open_with(&Engine::blocking(1), &path, options).await.expect("open");
        let range = ByteRange::between(0, 100);
        let errors = [
            file.write(0, Bytes::from_static(b"x"), None).await.err(),
            file.write_zeroes(range, None).await.err(),
            file.punch(range, None).await.err(),
            file.set_len(0).await.err(),
            file.grow(100).await.err(),
            file.ensure_capacity(100).await.err(),
        ];
        for error in errors {
            assert_eq!(error.map(|e| e.kind()), Some(ErrorKind::ReadOnly));
        }
        assert_eq!(file.read(ByteRange::between(0, 9)).await.expect("read"), &b"content\0\0"[..]);
    });
}

#[test]
fn what_exists_is_not_created_again_and_directories_are_refused() {
    let directory = disk_directory();
    let path = directory.path().join("image");
    std::fs::write(&path, b"content").expect("a file");
    let engine = Engine::blocking(1);
    let open = |path: PathBuf, options| {
        let engine = engine.clone();
        block_on(async move { HostFile::open_with(&engine, &path, options).await.map(drop) })
    };
    let error = open(path.clone(), OpenOptions::creating()).expect_err("it exists");
    assert_eq!(error.source.kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(error.op, HostOp::Open);
    open(directory.path().to_owned(), OpenOptions::reading()).expect_err("a directory");
    assert_eq!(std::fs::read(path).expect("untouched"), b"content");
}

#[test]
fn holes_are_found_on_a_disk() {
    let directory = disk_directory();
    block_on(async {
        let path = directory.path().join("image");
        let options = OpenOptions { lock: false, ..OpenOptions::creating() };
        let file = HostFile::open_with(&Engine::blocking(1), &path, options).await.expect("open");
        file.set_len(1 << 20).await.expect("length");
        file.write(512 << 10, pattern(64 << 10, 0, 1), None).await.expect("write");
        let all = ByteRange::between(0, 1 << 20);
        let data = file.data_ranges(all).await.expect("ranges");
        assert_eq!(data, [ByteRange::between(512 << 10, 576 << 10)]);
    });
}

#[tokio::test]
async fn a_file_that_somebody_else_cuts_tells_its_length_on_the_host() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("cut.raw");
    std::fs::write(&path, vec![7; 8192]).unwrap();
    let options = OpenOptions { lock: false, ..OpenOptions::reading() };
    let file = HostFile::open(&path, options).await.unwrap();
    assert_eq!((file.len(), file.host_len().unwrap()), (8192, 8192));
    let other = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    other.set_len(4096).unwrap();
    assert_eq!((file.len(), file.host_len().unwrap()), (8192, 4096));
    let cut = file.read(ByteRange::between(4096, 8192)).await.unwrap_err().source.kind();
    assert_eq!(cut, std::io::ErrorKind::UnexpectedEof);
    assert!(file.read(ByteRange::between(0, 4096)).await.is_ok());
    other.set_len(10_000).unwrap();
    assert_eq!((file.len(), file.host_len().unwrap()), (8192, 10_000));
    assert!(crate::is_zero(&file.read(ByteRange::between(4096, 9000)).await.unwrap()));
    // Behind the end that it had, zeros are the rule: images end within their last cluster.
    other.set_len(8192).unwrap();
    assert!(crate::is_zero(&file.read(ByteRange::between(8100, 9000)).await.unwrap()[92..]));
}

#[test]
fn what_is_to_be_cut_is_reached_by_nobody() {
    let lengths = crate::storage::Lengths::new(8192);
    lengths.physical.store(16_384, std::sync::atomic::Ordering::Release);
    assert!(lengths.reach(12_000));
    assert_eq!(lengths.begin_cut(9000), 12_000, "somebody has been told that it is so long");
    assert!(lengths.reach(12_000) && !lengths.reach(12_001));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_is_never_shorter_than_somebody_was_told() {
    for round in 0..300_u64 {
        let storage = MemoryStorage::with_alignment(4096);
        let file = over(&storage);
        let end = 4096 * (round % 7 + 1);
        let (writer, reacher) = (file.clone(), file.clone());
        // Rounded up to its block, and cut again.
        let writing = tokio::spawn(async move {
            writer.write(end - 3000, pattern(512, 0, 1), None).await.unwrap();
        });
        let reaching = tokio::spawn(async move {
            for _ in 0..round % 50 {
                tokio::task::yield_now().await;
            }
            reacher.ensure_len(end).await.unwrap();
        });
        writing.await.unwrap();
        reaching.await.unwrap();
        assert_eq!((file.len(), file.host_len().unwrap()), (end, end), "round {round}");
        file.check_uncut(ByteRange::between(0, end)).await.unwrap();
    }
}

#[test]
fn what_an_allocation_that_failed_has_taken_is_given_back() {
    for grows_ahead in [true, false] {
        let storage = MemoryStorage::with_alignment(512);
        let file = HostFile::from_storage("memory".as_ref(), storage.clone().into_dyn()).unwrap();
        block_on(file.write(0, pattern(4096, 0, 1), None)).unwrap();
        // Every step of growing ahead takes some.
        for _ in 0..10 {
            storage.fill_up_nth(0, 1 << 16, |op| op.kind == OpKind::Allocate);
        }
        let failed = match grows_ahead {
            true => block_on(file.ensure_capacity(1 << 20)),
            false => block_on(file.grow(1 << 20)),
        };
        assert_eq!(failed.expect_err("full").kind(), ErrorKind::NoSpace);
        assert_eq!((file.host_len().unwrap(), file.len()), (4096, 4096), "{grows_ahead}");
    }
}

#[test]
fn holes_that_could_not_be_zeroed_whole_are_holes_again_and_data_is_not() {
    let storage = MemoryStorage::with_alignment(512);
    let file = HostFile::from_storage("memory".as_ref(), storage.clone().into_dyn()).unwrap();
    block_on(file.set_len(4 << 20)).unwrap();
    block_on(file.write(1 << 20, pattern(8192, 0, 1), None)).unwrap();
    let before = storage.log_len();
    storage.fill_up_nth(0, 1 << 16, |op| op.kind == OpKind::ZeroRange);
    let zeroed = ByteRange::between(0, 3 << 20);
    let error = block_on(file.write_zeroes(zeroed, None)).expect_err("full");
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    let punched =
        |start, end| LoggedOp::Zero { range: ByteRange::between(start, end), grows: false };
    let expected = [punched(0, 1 << 20), punched((1 << 20) + 8192, 3 << 20)];
    assert_eq!(storage.log()[before + 1..], expected);
    assert_eq!(storage.snapshot()[1 << 20..][..8192], pattern(8192, 0, 1)[..]);
}
