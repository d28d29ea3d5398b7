//! Image locks against the real QEMU, in both directions. The rules themselves are tested beside the code.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use block::{HostError, HostFile, HostOp, ImageLocked, LockConflict, OpenOptions};

fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    output.unwrap_or_else(|error| panic!("{program} is needed (Debian: qemu-utils): {error}"))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a temporary path in UTF-8")
}

fn image(directory: &tempfile::TempDir) -> PathBuf {
    let path = directory.path().join("image.qcow2");
    let made = run("qemu-img", &["create", "-q", "-f", "qcow2", text(&path), "1M"]);
    assert!(made.status.success(), "{made:?}");
    path
}

/// Asserts that QEMU failed, and because of a lock.
fn assert_locked_out(output: &Output) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "it was let in: {output:?}");
    assert!(message.contains("lock"), "another failure: {message}");
}

fn locked(error: &HostError) -> Option<&ImageLocked> {
    error.source.get_ref()?.downcast_ref()
}

fn conflict(error: &HostError) -> Option<LockConflict> {
    locked(error).map(|locked| locked.conflict)
}

#[tokio::test]
async fn our_writer_keeps_qemu_out() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = image(&directory);
    let file = HostFile::open(&path, OpenOptions::writing()).await.expect("our writer");
    assert_locked_out(&run("qemu-img", &["info", text(&path)]));
    assert_locked_out(&run("qemu-io", &["-c", "write 0 4k", text(&path)]));
    let forced = run("qemu-img", &["info", "-U", text(&path)]);
    assert!(forced.status.success(), "{forced:?}");
    drop(file);
    let free = run("qemu-io", &["-c", "write 0 4k", text(&path)]);
    assert!(free.status.success(), "{free:?}");
}

#[tokio::test]
async fn who_locks_its_own_file_twice_is_told_so() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = image(&directory);
    let file = HostFile::open(&path, OpenOptions::writing()).await.expect("our writer");
    let error = HostFile::open(&path, OpenOptions::reading()).await.expect_err("it is written");
    assert!(error.to_string().contains("this program itself has the image open"), "{error}");
    drop(file);
}

#[tokio::test]
async fn our_readers_let_qemu_read_but_not_write() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = image(&directory);
    let one = HostFile::open(&path, OpenOptions::reading()).await.expect("a reader");
    let two = HostFile::open(&path, OpenOptions::reading()).await.expect("another reader");
    let info = run("qemu-img", &["info", text(&path)]);
    assert!(info.status.success(), "{info:?}");
    assert_locked_out(&run("qemu-io", &["-c", "write 0 4k", text(&path)]));
    drop((one, two));
}

/// A qemu-nbd that serves an image until dropped.
struct QemuNbd {
    pid_file: PathBuf,
}

impl QemuNbd {
    /// Returns when it serves, and so has its locks.
    fn serve(directory: &tempfile::TempDir, image: &Path, more: &[&str]) -> Self {
        let (socket, pid_file) =
            (directory.path().join("socket"), directory.path().join("qemu-nbd.pid"));
        let mut arguments = vec!["--fork", "--persistent", "--pid-file", text(&pid_file)];
        arguments.extend(["--format", "qcow2", "--socket", text(&socket)]);
        arguments.extend(more);
        arguments.push(text(image));
        // Not `output()`: the daemon keeps our pipes open.
        let status = Command::new("qemu-nbd").args(arguments).stdin(Stdio::null()).status();
        assert!(status.expect("qemu-nbd is needed (Debian: qemu-utils)").success());
        Self { pid_file }
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let text = std::fs::read_to_string(&self.pid_file).unwrap_or_default();
        let pid = text.trim().parse().ok().and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            let _gone = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
    }
}

#[tokio::test]
async fn an_image_that_qemu_serves_is_refused_to_us() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = image(&directory);
    let _server = QemuNbd::serve(&directory, &path, &[]);
    for options in [OpenOptions::writing(), OpenOptions::reading()] {
        let error = HostFile::open(&path, options).await.expect_err("qemu-nbd writes to it");
        assert_eq!(error.op, HostOp::Lock);
        assert!(conflict(&error).is_some(), "{error}");
        assert!(error.to_string().contains("qemu-nbd (process "), "{error}");
        assert!(error.to_string().contains(") has the image open"), "{error}");
        let holders = &locked(&error).expect("a lock").holders;
        assert!(matches!(holders.as_slice(), [one] if one.program == "qemu-nbd"), "{holders:?}");
    }
    let options = OpenOptions { lock: false, ..OpenOptions::reading() };
    HostFile::open(&path, options).await.expect("without locks nobody asks");
}

#[tokio::test]
async fn an_image_that_qemu_only_reads_can_be_read_by_us() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = image(&directory);
    let _server = QemuNbd::serve(&directory, &path, &["--read-only"]);
    HostFile::open(&path, OpenOptions::reading()).await.expect("both only read");
    let error = HostFile::open(&path, OpenOptions::writing()).await.expect_err("it is read");
    assert!(matches!(conflict(&error), Some(LockConflict::NotShared { .. })), "{error}");
}
