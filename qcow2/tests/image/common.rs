//! What the tests of images share: running futures, patterns, and `qemu-img` as the judge.

use std::path::Path;
use std::process::{Command, Output};

use block::{BlockDevice, ByteRange};
use qcow2::Image;

/// Runs a future on this thread.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

/// `len` bytes at `start`.
pub(crate) fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).unwrap()
}

/// Bytes that differ with the seed and hardly ever repeat.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// The whole disk.
pub(crate) async fn read_all(image: &Image) -> Vec<u8> {
    let size = image.limits().size_bytes;
    let mut all = Vec::new();
    for piece in ByteRange::between(0, size).pieces(1 << 20) {
        all.extend(image.read(piece).await.unwrap().to_vec());
    }
    all
}

fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).output();
    output.unwrap_or_else(|error| panic!("cannot run {program} (package qemu-utils): {error}"))
}

/// Runs `qemu-img`, which must succeed.
pub(crate) fn qemu_img(args: &[&str]) -> String {
    let output = run("qemu-img", args);
    assert!(output.status.success(), "qemu-img {args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// Runs commands of `qemu-io` on an image.
pub(crate) fn qemu_io(path: &Path, commands: &[&str]) {
    let mut args = vec!["-f", "qcow2"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(path.to_str().unwrap());
    let output = run("qemu-io", &args);
    let said = text(&output.stdout) + &text(&output.stderr);
    assert!(output.status.success() && !said.contains("failed"), "{said}");
}

/// Lets `qemu-img` make an image.
pub(crate) fn qemu_create(path: &Path, options: &str, size: &str, backing: Option<&str>) {
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
    if let Some(backing) = backing {
        args.extend(["-F", "qcow2", "-b", backing]);
    }
    args.extend([path.to_str().unwrap(), size]);
    qemu_img(&args);
}

/// The disk of an image, as QEMU reads it.
pub(crate) fn raw_of(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("by-qemu.raw");
    qemu_img(&["convert", "-O", "raw", path.to_str().unwrap(), raw.to_str().unwrap()]);
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(&raw).unwrap();
    bytes
}

/// What `qemu-img check` found.
#[derive(Debug)]
pub(crate) struct Check {
    /// 0: clean, 2: corrupt, 3: leaks only.
    pub(crate) code: i32,
    /// What it printed, for messages.
    #[expect(dead_code, reason = "read through Debug when an assertion fails")]
    pub(crate) text: String,
}

impl Check {
    /// No errors and no leaks.
    pub(crate) fn is_clean(&self) -> bool {
        self.code == 0
    }

    /// No errors.
    pub(crate) fn is_consistent(&self) -> bool {
        self.code == 0 || self.code == 3
    }
}

/// Lets `qemu-img` check an image.
pub(crate) fn qemu_check(path: &Path) -> Check {
    let output = run("qemu-img", &["check", "-f", "qcow2", path.to_str().unwrap()]);
    let text = text(&output.stdout) + &text(&output.stderr);
    Check { code: output.status.code().unwrap_or(-1), text }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
