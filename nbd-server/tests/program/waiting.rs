//! Exports whose images come later: what is written before is kept, over a crash, too, and gets into the image.

use std::path::Path;

use super::checks::is_refused;
use super::config::{names, qemu_io, write};
use super::{Running, image, run};

const LATE: &str = "nbd+unix:///late?socket=socket";
const GENERIC: &str =
    "[generic]\nunixsock = socket\nallowlist = true\n[one]\nexportname = disk.img\n";
const LEN: usize = 2 << 20;

/// The section of the export that waits.
fn section(keys: &str) -> String {
    format!("[late]\nexportname = late.img\nfilesize = 2M\n{keys}")
}

/// A server with one export that is there, and one that waits.
fn start(dir: &Path) -> Running {
    start_with(dir, &section("waitfile = true\n"))
}

fn start_with(dir: &Path, others: &str) -> Running {
    image(dir);
    write(dir, "config", &format!("{GENERIC}{others}"));
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    server
}

/// The image as it comes, and what it is to be when `changes` are in it: each a place, a length and a byte.
fn come(dir: &Path, changes: &[(usize, usize, u8)]) -> Vec<u8> {
    let mut bytes: Vec<u8> = (1..=251).cycle().take(LEN).collect();
    std::fs::write(dir.join("late.img"), &bytes).unwrap();
    for (at, len, byte) in changes {
        bytes[*at..at + len].fill(*byte);
    }
    bytes
}

fn merge(server: &mut Running) {
    server.signal("-USR1");
    server.log_until("the image has come");
}

fn holds(dir: &Path, expected: &[u8]) {
    assert!(std::fs::read(dir.join("late.img")).unwrap() == expected);
    assert!(!dir.join("late.img.waiting").exists());
}

#[test]
fn what_is_written_before_the_image_is_there_gets_into_it() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut server = start(dir);
    let log = server.log_until("waiting for the image").concat();
    assert!(log.contains("late.img.waiting"), "{log}");
    assert_eq!(names(dir), ["late", "one"]);
    assert_eq!(run(dir, "nbdinfo", &["--size", LATE]).trim(), LEN.to_string());
    assert!(qemu_io(dir, "write -P 7 4k 64k", LATE));
    assert!(qemu_io(dir, "write -z 1M 8k", LATE));
    assert!(qemu_io(dir, "read -P 7 8k 4k", LATE));
    let changes = [(4 << 10, 64 << 10, 7), (1 << 20, 8 << 10, 0)];
    let mut expected = come(dir, &changes);
    merge(&mut server);
    holds(dir, &expected);
    // Served as any other.
    assert!(qemu_io(dir, "read -P 7 4k 64k", LATE) && qemu_io(dir, "write -P 9 512 1k", LATE));
    server.signal("-HUP");
    let log = server.log_until("reloaded").concat();
    assert!(log.contains("added=[] changed=[] removed=[] kept=2"), "{log}");
    write(dir, "config", &format!("{GENERIC}{}", section("")));
    server.signal("-HUP");
    let log = server.log_until("reloaded").concat();
    assert!(log.contains("kept=2"), "{log}");
    assert!(qemu_io(dir, "write -P 9 1536 512", LATE));
    assert!(server.stop());
    expected[512..2048].fill(9);
    holds(dir, &expected);
}

#[test]
fn what_is_not_known_is_told_and_the_connection_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut server = start(dir);
    let script = format!(
        "told = []\n\
         h.set_debug(True)\n\
         h.set_debug_callback(lambda context, text: told.append(text) or 0)\n\
         h.connect_uri('{LATE}')\n\
         def fails(what, text):\n\
         \x20   told.clear()\n\
         \x20   try:\n\
         \x20       what()\n\
         \x20   except nbd.Error as error:\n\
         \x20       assert error.errno == 'EIO', error\n\
         \x20       assert any(text in line for line in told), told\n\
         \x20   else:\n\
         \x20       assert False\n\
         read = 'the image has not come yet, and this was not written'\n\
         part = 'whole blocks of 4096 bytes'\n\
         fails(lambda: h.pread(512, 0), read)\n\
         fails(lambda: h.pwrite(b'\\5' * 512, 0), part)\n\
         fails(lambda: h.pwrite(b'\\5' * 4096, 2048), part)\n\
         fails(lambda: h.zero(4096, 2048), part)\n\
         fails(lambda: h.pread(4096, 0), read)\n\
         h.pwrite(b'\\5' * 8192, 4096, nbd.CMD_FLAG_FUA)\n\
         h.pwrite(b'\\6' * 100, 5000)\n\
         h.zero(4096, 12288, nbd.CMD_FLAG_NO_HOLE)\n\
         h.trim(1 << 20, 0)\n\
         h.flush()\n\
         assert h.pread(200, 4950) == b'\\5' * 50 + b'\\6' * 100 + b'\\5' * 50\n\
         assert h.pread(4096, 12288) == bytes(4096)\n\
         fails(lambda: h.pread(8192, 12288), read)\n"
    );
    run(dir, "nbdsh", &["-c", &script]);
    let changes = [(4096, 8192, 5), (5000, 100, 6), (12_288, 4096, 0)];
    let expected = come(dir, &changes);
    merge(&mut server);
    assert!(server.stop());
    holds(dir, &expected);
}

#[test]
fn what_was_flushed_stays_over_a_kill_and_a_stop() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let server = start(dir);
    assert!(qemu_io(dir, "write -P 7 4k 64k", LATE));
    server.signal("-KILL");
    drop(server);
    let mut server = start(dir);
    assert!(qemu_io(dir, "read -P 7 4k 64k", LATE));
    assert!(qemu_io(dir, "write -P 8 1M 64k", LATE));
    server.signal("-TERM");
    let log = server.log_until("what was written stays in the diff").concat();
    assert!(log.contains("late.img.waiting"), "{log}");
    assert!(server.ended());
    let expected = come(dir, &[(4 << 10, 64 << 10, 7), (1 << 20, 64 << 10, 8)]);
    // That it is there already says nothing: it may not be whole.
    let mut server = start(dir);
    assert!(!qemu_io(dir, "read 0 4k", LATE));
    merge(&mut server);
    assert!(server.stop());
    holds(dir, &expected);
}

#[test]
fn a_merge_that_fails_in_the_middle_is_done_again_by_another_server() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let keys = "[late]\nexportname = late.img\nfilesize = 16M\nwaitfile = true\n";
    image(dir);
    write(dir, "config", &format!("{GENERIC}{keys}"));
    let script = "ulimit -f 4096 && exec \"$0\" --config=config";
    let arguments = ["-c", script, env!("CARGO_BIN_EXE_nbd-server")];
    let mut server = Running::launch(dir, "sh", &arguments);
    server.address();
    let mut expected = vec![3; 16 << 20];
    std::fs::write(dir.join("late.img"), &expected).unwrap();
    for (command, at, byte) in
        [("write -P 7 0 64k", 0, 7), ("write -z 1M 64k", 1, 0), ("write -P 9 12M 64k", 12, 9)]
    {
        assert!(qemu_io(dir, command, LATE));
        expected[at << 20..(at << 20) + (64 << 10)].fill(byte);
    }
    server.signal("-USR1");
    let log = server.log_until("goes on waiting").concat();
    assert!(log.contains("File too large"), "{log}");
    assert!(qemu_io(dir, "read -P 9 12M 64k", LATE) && !qemu_io(dir, "read 2M 4k", LATE));
    server.signal("-KILL");
    drop(server);
    let mut server = start_with(dir, keys);
    merge(&mut server);
    assert!(server.stop());
    holds(dir, &expected);
}

/// A server that merges much, and gets a signal.
fn interrupted(name: &str) {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let keys = "[late]\nexportname = late.img\nfilesize = 64M\nwaitfile = true\n";
    let mut server = start_with(dir, keys);
    assert!(qemu_io(dir, "write -P 7 1M 48M", LATE));
    let mut expected = vec![3; 64 << 20];
    std::fs::write(dir.join("late.img"), &expected).unwrap();
    expected[1 << 20..49 << 20].fill(7);
    server.signal("-USR1");
    server.signal(name);
    let status = server.status();
    assert_eq!(status.success(), name == "-TERM", "{status}: {}", server.errors());
    drop(server);
    let mut server = start_with(dir, keys);
    merge(&mut server);
    assert!(server.stop());
    holds(dir, &expected);
}

#[test]
fn a_kill_while_it_merges_loses_nothing() {
    interrupted("-KILL");
}

#[test]
fn a_stop_while_it_merges_ends_it_and_loses_nothing() {
    interrupted("-TERM");
}

#[test]
fn an_image_that_is_missing_or_too_short_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut server = start(dir);
    assert!(qemu_io(dir, "write -P 7 4k 64k", LATE));
    server.signal("-USR1");
    let log = server.log_until("goes on waiting").concat();
    assert!(log.contains("late.img: No such file"), "{log}");
    std::fs::write(dir.join("late.img"), "short").unwrap();
    server.signal("-USR1");
    let log = server.log_until("goes on waiting").concat();
    assert!(log.contains("has 5 bytes, and filesize says 2097152"), "{log}");
    std::fs::write(dir.join("late.img"), b"QFI\xfb").unwrap();
    server.signal("-USR1");
    let log = server.log_until("goes on waiting").concat();
    assert!(log.contains("it begins as a qcow2 image does"), "{log}");
    assert!(qemu_io(dir, "read -P 7 4k 64k", LATE) && qemu_io(dir, "write -P 8 1M 4k", LATE));
    let expected = come(dir, &[(4 << 10, 64 << 10, 7), (1 << 20, 4 << 10, 8)]);
    merge(&mut server);
    // Nobody waits any more.
    server.signal("-USR1");
    server.log_until("SIGUSR1 has no effect");
    assert!(server.stop());
    holds(dir, &expected);
}

#[test]
fn an_image_to_which_writes_are_kept_is_served_with_them_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let server = start(dir);
    assert!(qemu_io(dir, "write -P 7 4k 64k", LATE));
    assert!(server.stop());
    come(dir, &[]);
    std::fs::create_dir(dir.join("folder")).unwrap();
    std::os::unix::fs::symlink("../late.img", dir.join("folder/link")).unwrap();
    let kept = "late.img.waiting keeps writes that are not in the image: serve it with waitfile";
    for keys in [section(""), section("readonly = true\n"), section("copyonwrite = true\n")] {
        is_refused(dir, &format!("{GENERIC}{keys}"), &["config:6: ", kept]);
    }
    let link = "[a]\nexportname = folder/link\n";
    is_refused(dir, &format!("{GENERIC}{link}"), &["config:6: ", kept]);
    let other = "[late]\nexportname = late.img\nwaitfile = true\nfilesize = 3M\n";
    let size = "keeps writes of a disk of 2097152 bytes, and filesize says 3145728";
    is_refused(dir, &format!("{GENERIC}{other}"), &["config:6: ", size]);
    std::fs::write(dir.join("late.img.waiting"), "something else").unwrap();
    let keys = section("waitfile = true\n");
    is_refused(dir, &format!("{GENERIC}{keys}"), &["config:6: ", "late.img.waiting", "remove it"]);
    // What a merge emptied and could not remove keeps nothing.
    std::fs::write(dir.join("late.img.waiting"), "").unwrap();
    for keys in ["", "waitfile = true\n"] {
        assert!(start_with(dir, &section(keys)).stop());
    }
}

#[test]
fn what_is_kept_can_be_merged_without_a_server() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let server = start(dir);
    assert!(qemu_io(dir, "write -P 7 4k 64k", LATE) && qemu_io(dir, "write -z 1M 8k", LATE));
    assert!(server.stop());
    let expected = come(dir, &[(4 << 10, 64 << 10, 7), (1 << 20, 8 << 10, 0)]);
    run(dir, "qemu-img", &["commit", "-q", "late.img.waiting"]);
    std::fs::remove_file(dir.join("late.img.waiting")).unwrap();
    holds(dir, &expected);
    assert!(start_with(dir, &section("")).stop());
}

#[test]
fn what_cannot_wait_is_refused_and_the_check_makes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let waits = "exportname = late.img\nfilesize = 2M\nwaitfile = true\n";
    for (sections, expected) in [
        ("[a]\nexportname = late.img\nwaitfile = true\n".to_owned(), "waitfile needs filesize"),
        (format!("[a]\n{waits}[b]\n{waits}"), "it waits for an image that the export \"b\" shows"),
        (format!("[a]\n{waits}[b]\nexportname = late.img\nfilesize = 2M\n"), "the export \"b\""),
        (format!("[a]\n{waits}cowdir = missing\n"), "No such file"),
        ("[a]\nexportname = x\nfilesize = 100T\nwaitfile = true\n".to_owned(), "x.waiting"),
    ] {
        is_refused(dir, &format!("{GENERIC}{sections}"), &["config:6: ", expected]);
    }
    write(dir, "config", &format!("{GENERIC}[a]\n{waits}"));
    let program = env!("CARGO_BIN_EXE_nbd-server");
    assert!(run(dir, program, &["--config=config", "--check-config"]).ends_with("all is well\n"));
    assert_eq!(std::fs::read_dir(dir).unwrap().count(), 2, "the image and the configuration");
    let server = start(dir);
    assert!(run(dir, program, &["--config=config", "--check-config"]).ends_with("all is well\n"));
    assert!(server.stop());
}

#[test]
fn a_reload_goes_on_waiting_or_ends_it_and_comes_back_to_it() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::create_dir(dir.join("kept")).unwrap();
    let keys = section("waitfile = true\ncowdir = kept\n");
    let mut server = start_with(dir, &keys);
    server.log_until("waiting for the image");
    assert!(qemu_io(dir, "write -P 7 4k 64k", LATE));
    server.signal("-HUP");
    let log = server.log_until("reloaded").concat();
    assert!(log.contains("added=[] changed=[] removed=[] kept=2"), "{log}");
    // A served image is not waited for, and a disk does not get another size.
    let one = "[one]\nexportname = disk.img\nwaitfile = true\nfilesize = 2M\n";
    let generic = GENERIC.split("[one]").next().unwrap();
    for (text, expected) in [
        (format!("{generic}{one}{keys}"), "there is nothing to wait for"),
        (format!("{GENERIC}{}", keys.replace("2M", "3M")), "filesize stays as it is"),
        (format!("{GENERIC}{}", section("cowdir = kept\n")), "keeps writes that are not in the"),
    ] {
        write(dir, "config", &text);
        server.signal("-HUP");
        let log = server.log_until("the configuration is not reloaded").concat();
        assert!(log.contains(expected), "{log}");
    }
    write(dir, "config", GENERIC);
    server.signal("-HUP");
    let log = server.log_until("closed an image").concat();
    assert!(log.contains("what was written stays in the diff") && log.contains("kept/"), "{log}");
    assert_eq!(names(dir), ["one"]);
    server.signal("-USR1");
    server.log_until("SIGUSR1 has no effect");
    write(dir, "config", &format!("{GENERIC}{keys}"));
    server.signal("-HUP");
    server.log_until("reloaded");
    assert!(qemu_io(dir, "read -P 7 4k 64k", LATE));
    let expected = come(dir, &[(4 << 10, 64 << 10, 7)]);
    merge(&mut server);
    assert!(server.stop());
    holds(dir, &expected);
    assert_eq!(std::fs::read_dir(dir.join("kept")).unwrap().count(), 0);
}
