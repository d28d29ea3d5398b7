//! Exports that take one writer, and are sealed when it is done.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{Running, create_qcow2, image, run};

const URI: &str = "nbd+unix:///one?socket=socket";

fn writes(dir: &Path, command: &str) -> bool {
    let mut qemu = Command::new("timeout");
    qemu.args(["40", "qemu-io", "-f", "raw", "-c", command, URI]);
    qemu.current_dir(dir).stdout(Stdio::null()).stderr(Stdio::null());
    qemu.status().unwrap().success()
}

#[test]
fn an_image_is_closed_and_read_only_once_its_writer_has_disconnected() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create_qcow2(dir, "disk.qcow2", None);
    let export = "--export=one=disk.qcow2,writers=connection,seal";
    let mut server = Running::start(dir, &["--listen=unix:socket", export]);
    server.address();
    // Whoever only looks around ends nothing.
    run(dir, "nbdinfo", &[URI]);
    drop(UnixStream::connect(dir.join("socket")).unwrap());
    assert!(writes(dir, "write -P 9 1M 64k"));
    server.log_until("sealed");
    assert!(!writes(dir, "write -P 8 1M 64k"));
    assert!(run(dir, "nbdinfo", &["--json", URI]).contains("\"is_read_only\": true"));
    run(dir, "nbdcopy", &[URI, "copy.img"]);
    let copy = std::fs::read(dir.join("copy.img")).unwrap();
    assert!(copy[1 << 20..(1 << 20) + 65_536].iter().all(|byte| *byte == 9));
    // Others may read it by now, because nobody writes to it any more.
    run(dir, "qemu-img", &["check", "-q", "disk.qcow2"]);
    run(dir, "qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "raw", "disk.qcow2", "copy.img"]);
    assert!(server.stop());
}

#[test]
fn a_client_that_has_seen_the_end_of_its_connection_finds_the_image_sealed() {
    for format in ["raw", "qcow2"] {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        run(dir, "qemu-img", &["create", "-q", "-f", format, "disk", "64M"]);
        let export = format!("--export=one=disk,format={format},seal,max-connections=1");
        let mut server = Running::start(dir, &["--listen=unix:socket", &export]);
        server.address();
        // One process, as fast as it can be: libnbd waits for the end when it shuts down.
        let script = "h.connect_uri(uri)\nfor at in range(0, 1 << 24, 1 << 20): h.pwrite(b'x' * (1 << 20), at)\n\
                      h.shutdown()\ng = nbd.NBD()\ng.connect_uri(uri)\nassert g.is_read_only()\n\
                      assert g.pread(3, 9 << 20) == b'xxx'";
        let uri = format!("uri = '{URI}'");
        run(dir, "nbdsh", &["-c", &uri, "-c", script]);
        assert!(server.stop());
    }
}

#[test]
fn an_image_that_two_exports_write_is_not_sealed_by_one_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let exports = ["--export=one=disk.img,format=raw,seal", "--export=two=disk.img,format=raw"];
    let mut server = Running::start(dir, &["--listen=unix:socket", exports[0], exports[1]]);
    assert!(!server.status().success());
    assert!(server.errors().contains("the export \"two\" writes to the image, too"));
}

/// A client that has written and stays, as a process that is told what to do.
struct Writing(std::process::Child);

impl Writing {
    fn begin(dir: &Path, server: &mut Running) -> Self {
        server.address();
        let mut qemu = Command::new("timeout");
        qemu.args(["60", "qemu-io", "-f", "raw", "-n", URI]).current_dir(dir);
        let mut child = qemu.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.as_mut().unwrap().write_all(b"write -P 9 0 4k\nflush\n").unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("wrote 4096") {
            line.clear();
            assert_ne!(out.read_line(&mut line).unwrap(), 0, "it ended");
        }
        child.stdout = Some(out.into_inner());
        Self(child)
    }

    /// Leaves by DISC.
    fn end(mut self) {
        drop(self.0.stdin.take());
        let mut rest = Vec::new();
        self.0.stdout.take().unwrap().read_to_end(&mut rest).unwrap();
        assert!(self.0.wait().unwrap().success());
    }
}

fn reads(dir: &Path, pattern: u8) -> bool {
    let command = format!("read -P {pattern} 0 4k");
    let mut qemu = Command::new("timeout");
    qemu.args(["40", "qemu-io", "-r", "-f", "raw", "-c", &command, URI]).current_dir(dir);
    let output = qemu.output().unwrap();
    output.status.success() && !String::from_utf8_lossy(&output.stdout).contains("failed")
}

fn is_read_only(dir: &Path) -> bool {
    run(dir, "nbdinfo", &["--json", URI]).contains("\"is_read_only\": true")
}

#[test]
fn what_is_sealed_is_the_file_that_was_written_whatever_has_its_name_by_then() {
    for format in ["raw", "qcow2"] {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let create = |name: &str| {
            if format == "raw" {
                std::fs::write(dir.join(name), vec![1; 1 << 20]).unwrap();
            } else {
                create_qcow2(dir, name, None);
            }
        };
        create("disk");
        let export = format!("--export=one=disk,format={format},seal");
        let mut server = Running::start(dir, &["--listen=unix:socket", &export]);
        let writing = Writing::begin(dir, &mut server);
        std::fs::rename(dir.join("disk"), dir.join("old")).unwrap();
        create("disk");
        writing.end();
        server.log_until("its writer is done: sealed");
        assert!(is_read_only(dir) && reads(dir, 9), "{format}");
        // What came in its place is nobody's.
        run(dir, "qemu-io", &["-f", format, "-c", "write 0 4k", "disk"]);
        assert!(reads(dir, 9), "{format}");
        assert!(server.stop());
    }
}

#[test]
fn what_cannot_be_opened_again_is_sealed_and_told() {
    for (format, is_found) in [("raw", true), ("qcow2", false)] {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        image(dir);
        if format == "qcow2" {
            create_qcow2(dir, "disk.img", None);
        }
        let export = format!("--export=one=disk.img,format={format},seal");
        let mut server = Running::start(dir, &["--listen=unix:socket", &export]);
        let writing = Writing::begin(dir, &mut server);
        std::fs::remove_file(dir.join("disk.img")).unwrap();
        writing.end();
        let log = server.log_until("sealed").concat();
        assert!(log.contains("its writer is done: sealed"), "{log}");
        assert_eq!(log.contains("cannot be opened again for reading"), !is_found, "{log}");
        assert!(is_read_only(dir) && !writes(dir, "write 0 4k"), "{format}");
        assert_eq!(reads(dir, 9), is_found, "{format}");
        assert!(server.stop());
    }
}

#[test]
fn a_snapshot_is_served_beside_what_is_only_read() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create_qcow2(dir, "disk.qcow2", None);
    run(dir, "qemu-img", &["snapshot", "-c", "old", "disk.qcow2"]);
    let exports = ["--export=one=disk.qcow2,read-only", "--export=two=disk.qcow2,snapshot=old"];
    for (first, second) in [(0, 1), (1, 0)] {
        let arguments = ["--listen=unix:socket", exports[first], exports[second]];
        let mut server = Running::start(dir, &arguments);
        server.address();
        assert!(is_read_only(dir));
        assert!(server.stop());
    }
    let sections = ["[one]\nreadonly = 1\n", "[two]\nreadonly = 0\nsnapshot = old\n"];
    for (first, second) in [(0, 1), (1, 0)] {
        let section =
            |index: usize| format!("{}exportname = disk.qcow2\nformat = qcow2\n", sections[index]);
        let text = format!("[generic]\nunixsock = socket\n{}{}", section(first), section(second));
        std::fs::write(dir.join("config"), text).unwrap();
        let mut server = Running::start(dir, &["--config=config"]);
        server.address();
        assert!(is_read_only(dir));
        assert!(server.stop());
    }
    // Beside what is written it cannot be, which is told once, with what is to be done.
    let arguments = ["--listen=unix:socket", "--export=one=disk.qcow2", exports[1]];
    let mut server = Running::start(dir, &arguments);
    assert!(!server.status().success());
    let told = server.errors();
    assert!(told.contains("another export of this server has it open"), "{told}");
    for once in ["open with the", "remove one of them, or let both only read"] {
        assert_eq!(told.matches(once).count(), 1, "{told}");
    }
    assert!(!told.contains("this program itself"), "{told}");
}

#[test]
fn a_client_with_many_connections_copies_to_an_export_that_takes_one() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let bytes = image(dir);
    std::fs::write(dir.join("to.img"), vec![1; bytes.len()]).unwrap();
    for option in ["writers=connection", "max-connections=1"] {
        let export = format!("--export=one=to.img,format=raw,{option}");
        let mut server = Running::start(dir, &["--listen=unix:socket", &export]);
        server.address();
        run(dir, "nbdcopy", &["disk.img", URI]);
        assert!(server.stop());
        assert!(std::fs::read(dir.join("to.img")).unwrap() == bytes, "{option}");
    }
}
