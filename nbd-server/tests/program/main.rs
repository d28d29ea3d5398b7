//! The program as a process: what it prints, what it serves, how it ends.

mod bitmaps;
#[cfg(all(feature = "client", feature = "tls"))]
#[path = "../certificates/mod.rs"]
mod certificates;
mod checks;
mod config;
mod depth;
mod encrypted;
mod joined;
#[cfg(feature = "client")]
mod kills;
mod leaks;
#[cfg(feature = "client")]
mod leases;
mod limits;
#[cfg(feature = "client")]
mod meet;
#[cfg(feature = "metrics")]
mod metrics;
mod parts;
mod reach;
mod seal;
mod stop;
#[cfg(feature = "client")]
mod storm;
#[cfg(all(feature = "client", feature = "tls"))]
mod tls;
mod vanish;
mod waiting;

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// How long a server may take to end, of which every one here needs a small part.
const END_TIMEOUT: Duration = Duration::from_secs(120);

/// A running server, killed when dropped.
struct Running {
    child: Child,
    out: BufReader<ChildStdout>,
    err: BufReader<ChildStderr>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
    fn start(dir: &Path, arguments: &[&str]) -> Self {
        Self::launch(dir, env!("CARGO_BIN_EXE_nbd-server"), arguments)
    }

    fn launch(dir: &Path, program: &str, arguments: &[&str]) -> Self {
        let mut child = Command::new(program)
            .args(arguments)
            .current_dir(dir)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let err = BufReader::new(child.stderr.take().unwrap());
        Self { child, out, err }
    }

    /// The next address it listens on.
    fn address(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ").map(str::to_owned);
        address.unwrap_or_else(|| panic!("{line:?}: {}", self.errors()))
    }

    /// Whether it ended well, where it ends instead of listening.
    fn ended_at_once(&mut self) -> Option<bool> {
        let waiting = self.out.fill_buf().unwrap().is_empty();
        waiting.then(|| self.status().success())
    }

    /// What it logs, up to a line with this text.
    fn log_until(&mut self, text: &str) -> Vec<String> {
        let mut lines = Vec::new();
        while lines.last().is_none_or(|line: &String| !line.contains(text)) {
            let mut line = String::new();
            assert_ne!(self.err.read_line(&mut line).unwrap(), 0, "{text:?} is not in {lines:#?}");
            lines.push(line);
        }
        lines
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    }

    fn errors(&mut self) -> String {
        let mut text = String::new();
        self.err.read_to_string(&mut text).unwrap();
        text
    }

    /// Sends SIGTERM and waits; whether it ended with 0.
    fn stop(self) -> bool {
        self.signal("-TERM");
        self.ended()
    }

    /// Waits for its end; whether that was with 0.
    fn ended(mut self) -> bool {
        let status = self.status();
        if !status.success() {
            eprintln!("{status}: {}", self.errors());
        }
        status.success()
    }

    /// Waits for its end, much longer than it may take: one that hangs fails the test.
    fn status(&mut self) -> ExitStatus {
        let (over, waited) = mpsc::channel::<()>();
        let pid = self.child.id().to_string();
        let watching = std::thread::spawn(move || {
            let hangs = waited.recv_timeout(END_TIMEOUT) == Err(RecvTimeoutError::Timeout);
            if hangs {
                let _ = Command::new("kill").args(["-KILL", &pid]).status();
            }
            hangs
        });
        let status = self.child.wait().unwrap();
        drop(over);
        assert!(!watching.join().unwrap(), "it did not end: {}", self.errors());
        status
    }
}

/// Runs a client to its success; what it printed.
fn run(dir: &Path, program: &str, arguments: &[&str]) -> String {
    // libnbd's Python module belongs to the system's interpreter, which need not be the first one in the path.
    let path = std::env::var("PATH").unwrap_or_default();
    let Output { status, stdout, stderr } = Command::new("timeout")
        .args(["40", program])
        .args(arguments)
        .current_dir(dir)
        .env("PATH", format!("/usr/bin:{path}"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&stdout).into_owned();
    assert!(status.success(), "{program}: {text}{}", String::from_utf8_lossy(&stderr));
    text
}

/// A raw image of 2 MiB with something in it.
fn image(dir: &Path) -> Vec<u8> {
    let mut bytes = vec![0; 2 << 20];
    bytes[70_000..80_000].fill(7);
    std::fs::write(dir.join("disk.img"), &bytes).unwrap();
    bytes
}

#[test]
fn it_serves_raw_images_on_both_kinds_of_listener_and_ends_clean() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = image(dir.path());
    let arguments = [
        "--listen=127.0.0.1:0",
        "--listen=unix:socket",
        "--export=one=disk.img,format=raw,description=first, of all".replace(", ", ",, ").leak(),
    ];
    let mut server = Running::start(dir.path(), &arguments);
    let tcp = server.address();
    assert_eq!(server.address(), "unix:socket");
    let uri = format!("nbd://{tcp}/one");
    run(dir.path(), "qemu-io", &["-f", "raw", "-c", "write -P 9 1M 4k", &uri]);
    bytes[1 << 20..(1 << 20) + 4096].fill(9);
    run(dir.path(), "nbdcopy", &["nbd+unix:///?socket=socket", "copy.img"]);
    assert!(std::fs::read(dir.path().join("copy.img")).unwrap() == bytes);
    assert!(run(dir.path(), "nbdinfo", &["--list", &uri]).contains("first, of all"));
    assert!(server.stop());
    assert!(!dir.path().join("socket").exists());
    assert!(std::fs::read(dir.path().join("disk.img")).unwrap() == bytes);
}

/// Makes a qcow2 image, over a backing file where one is named.
fn create_qcow2(dir: &Path, name: &str, backing: Option<(&str, &str)>) {
    let mut arguments = vec!["create", "-q", "-f", "qcow2"];
    if let Some((file, format)) = backing {
        arguments.extend(["-b", file, "-F", format]);
    }
    arguments.extend([name, "2M"]);
    run(dir, "qemu-img", &arguments);
}

#[test]
fn a_qcow2_chain_is_recognised_written_and_left_clean() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = image(dir.path());
    create_qcow2(dir.path(), "top.qcow2", Some(("disk.img", "raw")));
    let arguments = ["--listen=unix:socket", "--export=one=top.qcow2"];
    let mut server = Running::start(dir.path(), &arguments);
    server.address();
    let uri = "nbd+unix:///one?socket=socket";
    let write = ["-f", "raw", "-c", "write -P 9 75000 10000", "-c", "write -z 64k 1000", uri];
    run(dir.path(), "qemu-io", &write);
    bytes[75_000..85_000].fill(9);
    bytes[65_536..66_536].fill(0);
    run(dir.path(), "nbdcopy", &[uri, "copy.img"]);
    assert!(std::fs::read(dir.path().join("copy.img")).unwrap() == bytes);
    assert!(server.stop());
    run(dir.path(), "qemu-img", &["check", "-q", "top.qcow2"]);
    let compare = ["compare", "-q", "-f", "qcow2", "-F", "raw", "top.qcow2", "copy.img"];
    run(dir.path(), "qemu-img", &compare);
}

#[test]
fn references_outside_the_directory_need_leave() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = image(dir.path());
    let inner = dir.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    create_qcow2(&inner, "top.qcow2", Some(("../disk.img", "raw")));
    let export = "--export=one=inner/top.qcow2,read-only";
    let mut server = Running::start(dir.path(), &["--listen=unix:socket", export]);
    assert!(!server.status().success());
    let errors = server.errors();
    assert!(errors.contains("disk.img") && errors.contains("; --allow-references DIR"), "{errors}");
    for leave in ["--allow-references=.", "--allow-references=any"] {
        let mut server = Running::start(dir.path(), &["--listen=unix:socket", export, leave]);
        server.address();
        run(dir.path(), "nbdcopy", &["nbd+unix:///?socket=socket", "copy.img"]);
        assert!(std::fs::read(dir.path().join("copy.img")).unwrap() == bytes);
        assert!(server.stop());
    }
}

#[test]
fn a_read_only_export_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = image(dir.path());
    let arguments = ["--listen=unix:socket", "--export=one=disk.img,format=raw,read-only"];
    let mut server = Running::start(dir.path(), &arguments);
    server.address();
    let uri = "nbd+unix:///one?socket=socket";
    assert!(run(dir.path(), "nbdinfo", &["--json", uri]).contains("\"is_read_only\": true"));
    run(dir.path(), "nbdcopy", &[uri, "copy.img"]);
    assert!(std::fs::read(dir.path().join("copy.img")).unwrap() == bytes);
    assert!(server.stop());
}

#[test]
fn a_client_that_stays_does_not_keep_it_from_ending() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path());
    let arguments = ["--listen=unix:socket", "--export=one=disk.img,format=raw"];
    let mut server = Running::start(dir.path(), &arguments);
    server.address();
    let stays = std::os::unix::net::UnixStream::connect(dir.path().join("socket")).unwrap();
    assert!(server.stop());
    drop(stays);
}

#[test]
fn what_cannot_be_served_is_refused_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path());
    for (export, reason) in [
        ("--export=one=disk.img", "format=raw"),
        ("--export=one=missing.img,format=raw", "missing.img"),
        ("--export=one=disk.img,format=vmdk", "vmdk"),
        ("--export=one=disk.img,format=raw,snapshot=x", "snapshot=x"),
    ] {
        let mut server = Running::start(dir.path(), &["--listen=unix:socket", export]);
        assert!(!server.status().success(), "{export}");
        let errors = server.errors();
        assert!(errors.contains(reason), "{export}: {errors}");
        assert!(!dir.path().join("socket").exists());
    }
    run(dir.path(), "qemu-img", &["create", "-q", "-f", "vmdk", "disk.vmdk", "2M"]);
    std::fs::write(dir.path().join("short"), "QFI\u{fb}").unwrap();
    create_qcow2(dir.path(), "below.qcow2", None);
    create_qcow2(dir.path(), "top.qcow2", Some(("below.qcow2", "qcow2")));
    for (export, reason) in [
        ("disk.vmdk", "it is a VMDK image, and no qcow2 one: `qcow2 convert`"),
        ("disk.vmdk,format=qcow2", "it is a VMDK image, and no qcow2 one: `qcow2 convert`"),
        ("disk.img,format=qcow2", "it is no qcow2 image; say format=raw"),
        ("short,format=qcow2", "5 bytes are no qcow2 image"),
        ("top.qcow2,bitmap=x", "there is no bitmap \"x\" in the image, nor in those below it"),
    ] {
        let export = format!("--export=one={export}");
        let mut server = Running::start(dir.path(), &["--listen=unix:socket", &export]);
        assert!(!server.status().success(), "{export}");
        let errors = server.errors();
        assert!(errors.contains(reason), "{export}: {errors}");
    }
    std::fs::remove_file(dir.path().join("below.qcow2")).unwrap();
    let mut server =
        Running::start(dir.path(), &["--listen=unix:socket", "--export=one=top.qcow2"]);
    assert!(!server.status().success());
    let errors = server.errors();
    let whose = format!("{}: cannot resolve", dir.path().join("top.qcow2").display());
    assert!(errors.contains(&format!("a file in the chain below {whose}")), "{errors}");
    let mut twice = vec!["--listen=unix:socket"];
    twice.extend(["--export=one=disk.img,format=raw,read-only"; 2]);
    let mut server = Running::start(dir.path(), &twice);
    assert!(!server.status().success());
    assert!(server.errors().contains("already an export named"));
}
