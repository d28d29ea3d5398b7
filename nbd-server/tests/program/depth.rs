//! `qemu:allocation-depth` of chains of every shape, compared with what qemu-nbd tells of the same files.

use std::path::Path;

use super::{Running, run};

/// Three layers, each longer than the one below it: a raw file, and two qcow2 images with data, zeros and nothing.
fn create(dir: &Path) {
    run(dir, "qemu-img", &["create", "-q", "-f", "raw", "base.img", "1M"]);
    run(dir, "qemu-io", &["-f", "raw", "-c", "write -P 1 0 64k", "base.img"]);
    let make = |name, size, backing: &[&str]| {
        let start = ["create", "-q", "-f", "qcow2"];
        run(dir, "qemu-img", &[&start[..], backing, &[name, size]].concat());
    };
    let write = |name, commands: &[&str]| {
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        let arguments: Vec<_> = ["-f", "qcow2"].into_iter().chain(commands).chain([name]).collect();
        run(dir, "qemu-io", &arguments);
    };
    make("middle.qcow2", "2M", &["-b", "base.img", "-F", "raw"]);
    write("middle.qcow2", &["write -P 2 64k 64k", "write -P 2 1536k 64k"]);
    make("top.qcow2", "3M", &["-b", "middle.qcow2", "-F", "qcow2"]);
    write("top.qcow2", &["write -P 3 128k 64k", "write -z 256k 64k", "write -P 3 2560k 64k"]);
    make("alone.qcow2", "1M", &[]);
    write("alone.qcow2", &["write -P 4 128k 64k", "write -z 512k 64k"]);
    make("over-alone.qcow2", "2M", &["-b", "alone.qcow2", "-F", "qcow2"]);
    write("over-alone.qcow2", &["write -P 5 192k 64k"]);
}

#[test]
fn allocation_depth_is_what_qemu_nbd_tells() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create(dir);
    let map = "--map=qemu:allocation-depth";
    for image in ["top.qcow2", "middle.qcow2", "alone.qcow2", "over-alone.qcow2"] {
        let peer = ["qemu-nbd", "-r", "-f", "qcow2", "-A", image];
        let expected = run(dir, "nbdinfo", &[&[map, "--", "["][..], &peer, &["]"]].concat());
        assert!(expected.lines().count() > 2, "{expected}");
        for access in ["", ",read-only"] {
            let export = format!("--export=one={image},allocation-depth{access}");
            let mut server = Running::start(dir, &["--listen=unix:socket", &export]);
            server.address();
            let uri = "nbd+unix:///one?socket=socket";
            assert_eq!(run(dir, "nbdinfo", &[map, uri]), expected, "{image}");
            assert!(run(dir, "nbdinfo", &["--json", uri]).contains("qemu:allocation-depth"));
            assert!(server.stop());
        }
    }
}

#[test]
fn allocation_depth_of_a_snapshot_is_what_qemu_nbd_tells() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create(dir);
    run(dir, "qemu-img", &["snapshot", "-c", "then", "over-alone.qcow2"]);
    run(dir, "qemu-io", &["-f", "qcow2", "-c", "write -P 6 1M 64k", "over-alone.qcow2"]);
    let map = "--map=qemu:allocation-depth";
    let peer = ["qemu-nbd", "-r", "-f", "qcow2", "-A", "-l", "then", "over-alone.qcow2"];
    let expected = run(dir, "nbdinfo", &[&[map, "--", "["][..], &peer, &["]"]].concat());
    let export = "--export=one=over-alone.qcow2,snapshot=then,allocation-depth";
    let mut server = Running::start(dir, &["--listen=unix:socket", export]);
    server.address();
    assert_eq!(run(dir, "nbdinfo", &[map, "nbd+unix:///one?socket=socket"]), expected);
    assert!(server.stop());
}

#[test]
fn allocation_depth_follows_what_clients_write() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create(dir);
    let export = "--export=one=over-alone.qcow2,allocation-depth";
    let mut server = Running::start(dir, &["--listen=unix:socket", export]);
    server.address();
    let script = "
h.add_meta_context('qemu:allocation-depth')
h.connect_uri('nbd+unix:///one?socket=socket')
def depths():
    told = []
    h.block_status(256 * 1024, 0, lambda context, offset, extents, error: told.extend(extents))
    return told
assert depths() == [131072, 0, 65536, 2, 65536, 1], depths()
h.pwrite(b'x', 0)
h.zero(65536, 128 * 1024)
assert depths() == [65536, 1, 65536, 0, 131072, 1], depths()
";
    run(dir, "nbdsh", &["-c", script]);
    assert!(server.stop());
}

#[test]
fn a_raw_image_has_no_layers_to_tell_of() {
    let dir = tempfile::tempdir().unwrap();
    create(dir.path());
    let export = "--export=one=base.img,format=raw,allocation-depth";
    let mut server = Running::start(dir.path(), &["--listen=unix:socket", export]);
    assert_eq!(server.status().code(), Some(2));
    assert!(server.errors().contains("layers"));
}
