//! Copies inside the host, over memory, ext4 (or whatever the build is on) and tmpfs, with both engines. That extents
//! are shared where a file system can is tested with images.

use super::*;
use crate::{LoggedOp, MemoryStorage, OpKind};

const BYTES: u64 = 1 << 20;

/// A copy of a part, at another place; what became of it.
async fn copied(from: &HostFile, to: &HostFile, at: [u64; 2], len: u64) -> bool {
    from.write(0, pattern(BYTES, 0, 1), None).await.expect("the source");
    to.write(0, pattern(BYTES, 0, 99), None).await.expect("the target");
    let done = to.copy_from(from, at[0], at[1], len, None).await.expect("a copy or none");
    let mut model = pattern(BYTES, 0, 99).to_vec();
    ensure(&mut model, places(at[1], len).end);
    if done {
        let source = pattern(BYTES, 0, 1);
        model[places(at[1], len)].copy_from_slice(&source[places(at[0], len)]);
        assert_eq!(to.len(), model.len() as u64);
    }
    let now = to.read(ByteRange::between(0, model.len() as u64)).await.expect("read");
    let around = |bytes: &[u8]| {
        let part = places(at[1], len);
        [&bytes[..part.start], &bytes[part.end..]].concat()
    };
    // Where it was not done, any part of it may be there, but nothing else has changed.
    assert!(if done { now == model } else { around(&now) == around(&model) });
    to.set_len(0).await.expect("emptied");
    done
}

async fn open(engine: &Engine, path: PathBuf, direct: bool) -> HostFile {
    let options = OpenOptions { direct, lock: false, ..OpenOptions::creating() };
    HostFile::open_with(engine, &path, options).await.expect("open")
}

#[test]
fn files_of_one_file_system_are_copied_by_the_host() {
    for directory in [disk_directory(), memory_directory()] {
        for (number, engine) in engines().iter().enumerate() {
            for direct in [true, false] {
                block_on(async {
                    let path = |name| directory.path().join(format!("{name}{number}{direct}"));
                    let from = open(engine, path("from"), direct).await;
                    let to = open(engine, path("to"), direct).await;
                    assert!(copied(&from, &to, [8192, 65536], 200 << 10).await);
                    assert!(copied(&from, &to, [0, 0], BYTES).await);
                    assert!(copied(&from, &to, [4096, BYTES], BYTES / 2).await, "it grows");
                    assert!(!copied(&from, &to, [4096, 0], BYTES).await, "the source is short");
                    let odd = copied(&from, &to, [700, 9], 100_000).await;
                    assert_eq!(odd, from.alignment_bytes() == 1);
                });
            }
        }
    }
}

#[test]
fn what_cannot_be_copied_by_the_host_is_said() {
    let (disk, memory) = (disk_directory(), memory_directory());
    let engine = Engine::blocking(2);
    block_on(async {
        let from = open(&engine, disk.path().join("from"), false).await;
        let to = open(&engine, memory.path().join("to"), false).await;
        // Kernels differ in whether they copy from one file system to another.
        copied(&from, &to, [0, 4096], 8192).await;
        let unreal = over(&MemoryStorage::new());
        assert!(!copied(&unreal, &to, [0, 4096], 8192).await);
        assert!(!copied(&from, &unreal, [0, 4096], 8192).await);
        let options = OpenOptions { lock: false, ..OpenOptions::reading() };
        let fixed = HostFile::open_with(&engine, from.path(), options).await.expect("reopen");
        let error = fixed.copy_from(&to, 0, 0, 512, None).await.expect_err("read-only");
        assert_eq!(error.source.kind(), io::ErrorKind::ReadOnlyFilesystem);
    });
}

#[test]
fn a_copy_in_memory_is_logged_as_a_write_and_fails_like_one() {
    let (from, to) = (MemoryStorage::with_alignment(512), MemoryStorage::with_alignment(512));
    let (source, target) = (over(&from), over(&to));
    block_on(async {
        assert!(copied(&source, &target, [512, 1024], 4096).await);
        assert!(copied(&source, &target, [0, 1024], BYTES).await);
        assert!(!copied(&source, &target, [1, 1024], 4096).await);
        let before = to.log_len();
        assert!(target.copy_from(&source, 512, 0, 1024, None).await.expect("a copy"));
        let data = pattern(BYTES, 0, 1).slice(512..1536);
        assert_eq!(to.log()[before..], [LoggedOp::Write { at: 0, data }]);
        assert!(target.copy_from(&target, 512, 0, 512, None).await.expect("from itself"));
        to.fail_nth(0, io::ErrorKind::Unsupported, |op| op.kind == OpKind::Copy);
        assert!(!target.copy_from(&source, 512, 0, 1024, None).await.expect("not done"));
        to.fail_nth(0, io::ErrorKind::StorageFull, |op| op.kind == OpKind::Copy);
        let error = target.copy_from(&source, 512, 0, 1024, None).await.expect_err("full");
        assert_eq!((error.kind(), error.op), (ErrorKind::NoSpace, HostOp::Copy));
        assert_eq!(to.log_len(), before + 2);
    });
}
