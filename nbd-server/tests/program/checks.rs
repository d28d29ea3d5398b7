//! What cannot be served: the check finds it where the start does, and says the same of the same line.

use std::path::Path;

use super::{Running, create_qcow2, image, run};

/// What a start that is refused says, or a check.
fn refusal(dir: &Path, arguments: &[&str]) -> String {
    let mut server = Running::start(dir, arguments);
    assert_eq!(server.ended_at_once(), Some(false), "{arguments:?}: {}", server.errors());
    server.errors()
}

fn is_refused(dir: &Path, text: &str, expected: &[&str]) {
    std::fs::write(dir.join("config"), text).unwrap();
    let before = names(dir);
    for arguments in [&["--config=config", "--check-config"][..], &["--config=config"]] {
        let said = refusal(dir, arguments);
        for expected in expected {
            assert!(
                said.contains(expected),
                "{text}: {arguments:?}: {expected:?} is not in {said}"
            );
        }
        assert_eq!(names(dir), before, "{text}: {arguments:?} left something behind");
    }
}

fn names(dir: &Path) -> Vec<std::ffi::OsString> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names
}

/// A folder with a raw image of 2 MiB, without partitions, and one in qcow2.
fn images() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path());
    create_qcow2(dir.path(), "disk.qcow2", None);
    dir
}

#[test]
fn the_check_finds_what_keeps_exports_from_being_served_where_the_start_does() {
    let dir = images();
    let raw = "exportname = disk.img\n";
    let qcow2 = "exportname = disk.qcow2\nformat = qcow2\n";
    let new = "exportname = new.img\nfilesize = 1M\n";
    for (keys, expected) in [
        ("exportname = missing.img\n", "No such file"),
        ("exportname = missing/new.img\nfilesize = 1M\n", "No such file"),
        (&*format!("{qcow2}bitmap = none\n"), "bitmap \"none\""),
        (&*format!("{qcow2}snapshot = none\n"), "snapshot"),
        (&*format!("{qcow2}passphrase_file = none\n"), "cannot read the passphrase"),
        ("exportname = disk.img\nformat = qcow2\n", "disk.img"),
        (&*format!("{raw}partition = 1\n"), "the disk has no partition table"),
        (&*format!("{raw}offset = 3M\n"), "passes the end of the device"),
        (&*format!("{raw}filesize = 3M\n"), "passes the end of the device"),
        (&*format!("{raw}offset = 1M\nsize = 1025K\n"), "passes the end of the device"),
        (&*format!("{new}offset = 4K\n"), "passes the end of the device"),
        (&*format!("{new}partition = 1\n"), "a partition has its place"),
        (&*format!("{raw}copyonwrite = true\ncowdir = missing\n"), "what clients write"),
        ("exportname = missing/x\nfilesize = 1M\ntemporary = true\n", "what clients write"),
        ("exportname = disk.img/x\nfilesize = 1M\ntemporary = true\n", "what clients write"),
    ] {
        let text = format!("[generic]\nunixsock = socket\n[one]\n{keys}");
        is_refused(dir.path(), &text, &["config:3: ", expected]);
    }
}

#[test]
fn the_check_finds_exports_that_cannot_stand_beside_each_other() {
    let dir = images();
    let raw = "exportname = disk.img\n";
    for (keys, expected) in [
        (
            format!("[one]\n{raw}seal = true\n[two]\n{raw}"),
            ["config:3: ", "the export \"two\" (config:6) writes to the image, too"],
        ),
        (
            format!("[one]\n{raw}default = true\n[two]\n{raw}default = true\n"),
            ["config:6: ", "the export \"one\" is already the default one"],
        ),
        (
            "[one]\nexportname = new.img\nfilesize = 1M\nseal = true\n[two]\nexportname = new.img\nfilesize = 1M\n"
                .to_owned(),
            ["config:3: ", "the export \"two\" (config:7) writes to the image, too"],
        ),
    ] {
        let text = format!("[generic]\nunixsock = socket\n{keys}");
        is_refused(dir.path(), &text, &expected);
    }
}

#[test]
fn the_check_finds_users_groups_and_addresses_that_there_are_not() {
    let dir = images();
    let export = "[one]\nexportname = disk.img\n";
    for (generic, expected) in [
        ("unixsock = socket\nuser = no such user\n", "config:3: user = \"no such user\""),
        ("unixsock = socket\ngroup = no such group\n", "config:3: group = \"no such group\""),
        ("\nlistenaddr = no such host\n", "config:3: cannot listen on no such host:10809"),
        ("\nlisten = no such host:0\n", "config:3: cannot listen on no such host:0"),
        ("unixsock = missing/socket\n", "config:2: cannot listen on unix:missing/socket"),
    ] {
        is_refused(dir.path(), &format!("[generic]\n{generic}{export}"), &[expected]);
    }
}

#[test]
fn everything_that_is_wrong_is_told_at_once() {
    let dir = images();
    let text = "[generic]\nlistenaddr = no such host\n[one]\nexportname = none\n[two]\nexportname = disk.img\noffset = 9M\n\
                [three]\nexportname = disk.img\npartition = 1\n";
    std::fs::write(dir.path().join("config"), text).unwrap();
    let said = refusal(dir.path(), &["--config=config", "--check-config"]);
    let lines: Vec<_> = said.lines().filter(|line| line.contains("config:")).collect();
    assert_eq!(lines.len(), 4, "{said}");
    for (line, number) in lines.iter().zip([2, 3, 5, 8]) {
        assert!(line.contains(&format!("config:{number}: ")), "{said}");
    }
}

#[test]
fn a_check_is_content_with_what_another_process_serves_and_makes_nothing() {
    let dir = images();
    let dir = dir.path();
    run(dir, "qemu-img", &["bitmap", "--add", "disk.qcow2", "on"]);
    let text = "[generic]\nunixsock = socket\n[one]\nexportname = disk.qcow2\nformat = qcow2\nbitmap = on\n\
                [two]\nexportname = disk.img\nseal = true\n";
    std::fs::write(dir.join("config"), text).unwrap();
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    let more = "[three]\nexportname = new.img\nfilesize = 1M\n[four]\nexportname = x\ntemporary = true\nfilesize = 1M\n";
    std::fs::write(dir.join("config"), format!("{text}{more}")).unwrap();
    let before = names(dir);
    let program = env!("CARGO_BIN_EXE_nbd-server");
    let told = run(dir, program, &["--config=config", "--check-config"]);
    assert_eq!(told, "4 exports in 1 files: all is well\n");
    assert_eq!(names(dir), before);
    server.signal("-HUP");
    assert!(!server.log_until("reloaded").concat().contains("not reloaded"));
    assert!(server.stop());
}
