//! Exports that take one writer, and are sealed when it is done.

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
fn an_image_that_two_exports_write_is_not_sealed_by_one_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let exports = ["--export=one=disk.img,format=raw,seal", "--export=two=disk.img,format=raw"];
    let mut server = Running::start(dir, &["--listen=unix:socket", exports[0], exports[1]]);
    assert!(!server.status().success());
    assert!(server.errors().contains("the export \"two\" writes to the image, too"));
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
