//! Exports whose images come later: they are served when they are there, and keep nobody from anything until then.

use std::path::Path;

use super::config::{names, qemu_io, write};
use super::{Running, create_qcow2, image, run};

const LATE: &str = "nbd+unix:///late?socket=socket";
const GENERIC: &str =
    "[generic]\nunixsock = socket\nallowlist = true\n[one]\nexportname = disk.img\n";
const WAITS: &str = "[late]\nexportname = late.img\nwaitfile = true\n";

/// A server with one export that is there, and others that may not be.
fn start(dir: &Path, others: &str) -> Running {
    image(dir);
    write(dir, "config", &format!("{GENERIC}{others}"));
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    server
}

/// Gives a file its name when it is whole.
fn put(dir: &Path, name: &str, bytes: &[u8]) {
    let path = dir.join(format!("{name}.new"));
    std::fs::write(&path, bytes).unwrap();
    std::fs::rename(path, dir.join(name)).unwrap();
}

#[test]
fn an_image_that_comes_later_is_served_when_it_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut server = start(dir, WAITS);
    let log = server.log_until("waiting for the image of an export").concat();
    assert!(
        log.contains("config:8: waitfile takes no writes") && log.contains("late.img"),
        "{log}"
    );
    assert_eq!(names(dir), ["one"]);
    assert!(!qemu_io(dir, "read 0 4k", LATE));
    // An empty file is none yet.
    std::fs::write(dir.join("late.img"), "").unwrap();
    assert_eq!(names(dir), ["one"]);
    put(dir, "late.img", &[7; 1 << 20]);
    server.log_until("its image is there: the export is served");
    assert_eq!(names(dir), ["late", "one"]);
    assert!(qemu_io(dir, "read -P 7 0 1M", LATE));
    assert!(qemu_io(dir, "write -P 9 4k 4k", LATE));
    // Served as any other: a reload keeps it.
    server.signal("-HUP");
    let log = server.log_until("reloaded").concat();
    assert!(log.contains("added=[] changed=[] removed=[] kept=2"), "{log}");
    assert!(server.stop());
    assert_eq!(std::fs::read(dir.join("late.img")).unwrap()[4096..8192], [9; 4096]);
}

#[test]
fn an_image_that_is_there_is_served_from_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    put(dir, "late.img", &[7; 4096]);
    let server = start(dir, WAITS);
    assert_eq!(names(dir), ["late", "one"]);
    assert!(server.stop());
}

#[test]
fn an_image_that_is_broken_is_told_once_and_mended_while_others_are_served() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let qcow2 = "[late]\nexportname = late.img\nwaitfile = true\nformat = qcow2\n";
    let other = "[other]\nexportname = other.img\nwaitfile = true\n";
    let mut server = start(dir, &format!("{qcow2}{other}"));
    let mut log = server.log_until("other.img");
    put(dir, "late.img", b"QFI\xfb and nothing else");
    log.extend(server.log_until("waits until that changes"));
    assert!(log.last().unwrap().contains("cannot open"), "{log:#?}");
    // The one comes though the other does not. It takes two looks, in which the other is not told again.
    put(dir, "other.img", &[7; 4096]);
    log.extend(server.log_until("its image is there"));
    assert_eq!(names(dir), ["one", "other"]);
    create_qcow2(dir, "good.img", None);
    std::fs::rename(dir.join("good.img"), dir.join("late.img")).unwrap();
    log.extend(server.log_until("its image is there"));
    let told = log.iter().filter(|line| line.contains("waits until that changes")).count();
    assert_eq!(told, 1, "{log:#?}");
    assert_eq!(names(dir), ["late", "one", "other"]);
    assert!(qemu_io(dir, "write -P 9 0 4k", LATE));
    assert!(server.stop());
    run(dir, "qemu-img", &["check", "-q", "late.img"]);
}

#[test]
fn an_image_that_is_broken_at_the_start_is_waited_for_and_let_go_of() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create_qcow2(dir, "late.img", None);
    let other = "[late]\nexportname = late.img\nformat = qcow2\nwaitfile = true\nbitmap = b\n";
    let mut server = start(dir, other);
    let log = server.log_until("waits until that changes").concat();
    assert!(log.contains("config:6: ") && log.contains("bitmap"), "{log}");
    assert_eq!(names(dir), ["one"]);
    // Nobody has it open: it can be mended.
    run(dir, "qemu-img", &["bitmap", "--add", "late.img", "b"]);
    server.log_until("its image is there");
    assert_eq!(names(dir), ["late", "one"]);
    assert!(server.stop());
}

#[test]
fn a_signal_to_look_at_once_ends_no_server_and_finds_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut server = start(dir, WAITS);
    server.log_until("waiting for the image");
    server.signal("-USR1");
    put(dir, "late.img", &[7; 4096]);
    server.signal("-USR1");
    server.log_until("its image is there");
    server.signal("-USR1");
    assert!(qemu_io(dir, "read -P 7 0 4k", LATE));
    assert!(server.stop());
}

#[test]
fn a_reload_goes_on_waiting_or_ends_it() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let other = "[other]\nexportname = other.img\nwaitfile = true\n";
    let mut server = start(dir, &format!("{WAITS}{other}"));
    server.log_until("other.img");
    server.signal("-HUP");
    let log = server.log_until("reloaded").concat();
    assert!(log.contains("added=[] changed=[] removed=[] kept=1"), "{log}");
    assert!(!log.contains("waiting for"), "it goes on: {log}");
    write(dir, "config", &format!("{GENERIC}{other}"));
    server.signal("-HUP");
    server.log_until("reloaded");
    // One look finds both, and only one of them is looked for.
    put(dir, "late.img", &[7; 4096]);
    put(dir, "other.img", &[7; 4096]);
    server.log_until("its image is there");
    assert_eq!(names(dir), ["one", "other"]);
    assert!(server.stop());
}

#[test]
fn a_server_that_waits_stops_when_it_is_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let arguments = ["--listen=unix:socket", "--export=one=missing/late.img,format=raw,waitfile"];
    let mut server = Running::start(dir, &arguments);
    server.address();
    server.log_until("waiting for the image");
    assert!(names(dir).is_empty());
    assert!(server.stop());
}

#[test]
fn the_check_is_content_with_a_missing_image_and_not_with_a_broken_one() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    write(dir, "config", &format!("{GENERIC}{WAITS}"));
    let program = env!("CARGO_BIN_EXE_nbd-server");
    let check = ["--config=config", "--check-config"];
    assert!(run(dir, program, &check).ends_with("all is well\n"));
    std::fs::create_dir(dir.join("late.img")).unwrap();
    let mut checked = Running::start(dir, &check);
    assert_eq!(checked.status().code(), Some(1));
    let errors = checked.errors();
    assert!(errors.contains("config:6: cannot open"), "{errors}");
    // Two of one name are two of one name, wherever their images are.
    write(dir, "config", &format!("{GENERIC}default = true\n{WAITS}default = true\n"));
    std::fs::remove_dir(dir.join("late.img")).unwrap();
    let mut checked = Running::start(dir, &check);
    assert_eq!(checked.status().code(), Some(1));
    let errors = checked.errors();
    assert!(errors.contains("is already the default one"), "{errors}");
}

#[test]
fn exports_of_one_image_that_comes_are_served_together() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let joined = "exportname = late\nmultifile = true\nwaitfile = true\n";
    let mut server = start(dir, &format!("[a]\n{joined}readonly = true\n[late]\n{joined}"));
    server.log_until("waiting for the image");
    put(dir, "late.1", &[8; 4096]);
    put(dir, "late.0", &[7; 4096]);
    server.log_until("its image is there");
    server.log_until("its image is there");
    assert_eq!(names(dir), ["a", "late", "one"]);
    assert!(qemu_io(dir, "read -P 8 4k 4k", "nbd+unix:///a?socket=socket"));
    assert!(qemu_io(dir, "write -P 9 2k 4k", LATE), "one that only reads does not come first");
    assert!(server.stop());
}
