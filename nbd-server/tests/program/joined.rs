//! Exports of several files: what is one disk for clients, and lies in each file as it should.

use std::path::Path;

use super::checks::is_refused;
use super::config::{names, qemu_io, write};
use super::{Running, run};

/// The lengths of three files, of which one is no multiple of anything.
const LENGTHS: [usize; 3] = [1 << 20, 70_001, 1 << 20];
const CONFIG: &str =
    "[generic]\nunixsock = socket\nallowlist = true\n[one]\nexportname = disk\nmultifile = true\n";
const URI: &str = "nbd+unix:///one?socket=socket";

/// Files of different bytes; all of them, one behind the other.
fn files(dir: &Path) -> Vec<u8> {
    for (number, (len, byte)) in LENGTHS.into_iter().zip(1..).enumerate() {
        std::fs::write(dir.join(format!("disk.{number}")), vec![byte; len]).unwrap();
    }
    joined(dir)
}

fn joined(dir: &Path) -> Vec<u8> {
    let file = |number| std::fs::read(dir.join(format!("disk.{number}"))).unwrap();
    (0..LENGTHS.len()).flat_map(file).collect()
}

#[test]
fn numbered_files_are_one_disk_across_their_borders() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut bytes = files(dir);
    write(dir, "config", CONFIG);
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    let size = bytes.len();
    assert_eq!(run(dir, "nbdinfo", &["--size", URI]).trim(), size.to_string());
    let script = format!(
        "h.connect_uri('{URI}')\n\
         a = {a}\nb = {b}\n\
         assert h.pread(4, a - 2) == b'\\1\\1\\2\\2'\n\
         h.pwrite(b'\\7' * 90000, a - 10000)\n\
         h.pwrite(b'\\x08' * 1000, b - 500, nbd.CMD_FLAG_FUA)\n\
         h.zero(5000, b + 5000)\n\
         h.zero(3000, a - 1000, nbd.CMD_FLAG_NO_HOLE)\n\
         h.trim(30000, a - 20000)\n\
         h.flush()\n\
         assert h.pread(1000, b - 500) == b'\\x08' * 1000\n\
         try:\n    h.pwrite(b'x' * 2, h.get_size() - 1)\n    assert False\n\
         except nbd.Error as error:\n    assert error.errno in ('ENOSPC', 'EINVAL'), error\n",
        a = LENGTHS[0],
        b = LENGTHS[0] + LENGTHS[1],
    );
    run(dir, "nbdsh", &["-c", &script]);
    let (a, b) = (LENGTHS[0], LENGTHS[0] + LENGTHS[1]);
    bytes[a - 10_000..a + 80_000].fill(7);
    bytes[b - 500..b + 500].fill(8);
    bytes[b + 5000..b + 10_000].fill(0);
    bytes[a - 1000..a + 2000].fill(0);
    run(dir, "nbdcopy", &[URI, "copy.img"]);
    assert!(server.stop());
    let now = joined(dir);
    assert!(now == std::fs::read(dir.join("copy.img")).unwrap());
    // What was trimmed is zeros, or what it was.
    let trimmed = a - 20_000..a + 10_000;
    for (at, byte) in trimmed.clone().zip(&now[trimmed.clone()]) {
        assert!(*byte == 0 || *byte == bytes[at], "{at}");
    }
    bytes[trimmed.clone()].copy_from_slice(&now[trimmed]);
    assert!(now == bytes);
    for (number, len) in LENGTHS.into_iter().enumerate() {
        let file = std::fs::metadata(dir.join(format!("disk.{number}"))).unwrap();
        assert_eq!(file.len(), len as u64, "no file grows or shrinks");
    }
}

#[test]
fn what_holds_for_one_raw_image_holds_for_joined_ones() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let bytes = files(dir);
    let more = "[read]\nexportname = disk\nmultifile = true\nreadonly = true\n\
                [part]\nexportname = disk\nmultifile = true\noffset = 1048000\nfilesize = 100000\n\
                [apart]\nexportname = disk\nmultifile = true\ncopyonwrite = true\n";
    write(dir, "config", &format!("{CONFIG}{more}"));
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    let uri = |name: &str| format!("nbd+unix:///{name}?socket=socket");
    run(dir, "nbdcopy", &[&uri("part"), "part.img"]);
    assert!(std::fs::read(dir.join("part.img")).unwrap() == bytes[1_048_000..1_148_000]);
    assert!(!qemu_io(dir, "write -P 9 0 4k", &uri("read")));
    let apart = format!(
        "h.connect_uri('{}')\nh.pwrite(b'x' * 2000000, 5000)\n\
         assert h.pread(2000000, 5000) == b'x' * 2000000\n",
        uri("apart")
    );
    run(dir, "nbdsh", &["-c", &apart]);
    assert!(joined(dir) == bytes, "it was written apart");
    // Across the first border, which is 576 bytes behind where the part begins.
    assert!(qemu_io(dir, "write -P 9 0 4k", &uri("part")));
    let read = "assert h.pread(4098, 1047999) == b'\\1' + b'\\x09' * 4096 + b'\\2'";
    run(dir, "nbdsh", &["-u", &uri("read"), "-c", read]);
    assert!(server.stop());
}

#[test]
fn joined_files_are_served_from_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let bytes = files(dir);
    let arguments = ["--listen=unix:socket", "--export=one=disk,multifile,read-only"];
    let mut server = Running::start(dir, &arguments);
    server.address();
    run(dir, "nbdcopy", &[URI, "copy.img"]);
    assert!(std::fs::read(dir.join("copy.img")).unwrap() == bytes);
    assert!(server.stop());
}

#[test]
fn files_that_cannot_be_joined_are_told_by_the_check_and_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    is_refused(dir, CONFIG, &["config:4: cannot open", "disk.0: No such file"]);
    files(dir);
    let path = |name: &str| dir.join(name);
    // The same file twice, in one export and in two.
    std::fs::hard_link(path("disk.0"), path("disk.3")).unwrap();
    is_refused(dir, CONFIG, &["disk.3 is the same as ", "disk.0"]);
    std::fs::remove_file(path("disk.3")).unwrap();
    let second = format!("{CONFIG}[two]\nexportname = disk.1\n");
    is_refused(dir, &second, &["config:7: cannot open", "another export of this server has it"]);
    let size = format!("{CONFIG}filesize = 3M\n");
    is_refused(dir, &size, &["config:4: ", "passes the end of the device"]);
    // What stands where a file should.
    std::os::unix::fs::symlink("nowhere", path("disk.3")).unwrap();
    is_refused(dir, CONFIG, &["disk.3: No such file"]);
    std::fs::remove_file(path("disk.3")).unwrap();
    std::fs::create_dir(path("disk.3")).unwrap();
    is_refused(dir, CONFIG, &["disk.3 is neither a regular file nor a block device"]);
    std::fs::remove_dir(path("disk.3")).unwrap();
    std::fs::write(path("disk.0"), b"QFI\xfb and so on").unwrap();
    is_refused(dir, CONFIG, &["it begins as a qcow2 image does"]);
}

#[test]
fn a_file_that_is_added_is_served_once_the_export_was_removed_and_added() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let bytes = files(dir);
    write(dir, "config", CONFIG);
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    let size = || run(dir, "nbdinfo", &["--size", URI]).trim().parse::<usize>().unwrap();
    // Empty ones are none of the disk, and nothing behind a gap is.
    std::fs::write(dir.join("disk.4"), vec![4; 100]).unwrap();
    server.signal("-HUP");
    server.log_until("disk.4 is left out, because there is no disk.3");
    server.log_until("kept=1");
    std::fs::write(dir.join("disk.3"), "").unwrap();
    server.signal("-HUP");
    let log = server.log_until("not reloaded").concat();
    assert!(log.contains("config:4: ") && log.contains("other files are joined"), "{log}");
    assert_eq!((names(dir), size()), (vec!["one".to_owned()], bytes.len()));
    assert!(qemu_io(dir, "write -P 9 1000k 200k", URI));
    write(dir, "config", "[generic]\nunixsock = socket\nallowlist = true\n");
    server.signal("-HUP");
    server.log_until("closed an image");
    write(dir, "config", CONFIG);
    server.signal("-HUP");
    server.log_until(r#"added=["one"]"#);
    assert_eq!(size(), bytes.len() + 100);
    assert!(server.stop());
}
