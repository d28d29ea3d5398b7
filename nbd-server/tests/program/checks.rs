//! What cannot be served: the check finds it where the start does, and says the same of the same line.

use std::path::Path;

use super::{Running, create_qcow2, image, run};

/// What a start that is refused says, or a check.
fn refusal(dir: &Path, arguments: &[&str]) -> String {
    let mut server = Running::start(dir, arguments);
    assert_eq!(server.ended_at_once(), Some(false), "{arguments:?}: {}", server.errors());
    server.errors()
}

pub(super) fn is_refused(dir: &Path, text: &str, expected: &[&str]) {
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
fn a_check_refuses_what_a_reload_would() {
    let dir = images();
    let text = "[generic]\nunixsock = socket\n[one]\nexportname = disk.img";
    std::fs::write(dir.path().join("config"), text).unwrap();
    let said = refusal(dir.path(), &["--config=config", "--check-config"]);
    assert!(said.contains("config:4: the line has no end"), "{said}");
    let mut server = Running::start(dir.path(), &["--config=config"]);
    server.address();
    assert!(server.stop());
}

#[test]
fn a_filesize_of_nothing_says_nothing_and_a_size_of_nothing_is_refused() {
    let dir = images();
    let text = "[generic]\nunixsock = socket\n[one]\nexportname = disk.img\nfilesize = 0\n";
    std::fs::write(dir.path().join("config"), text).unwrap();
    let mut server = Running::start(dir.path(), &["--config=config"]);
    server.address();
    let size = run(dir.path(), "nbdinfo", &["--size", "nbd+unix:///one?socket=socket"]);
    assert_eq!(size.trim(), "2097152");
    assert!(server.stop());
    let expected = "it is a number of bytes from 1 on";
    is_refused(dir.path(), &text.replace("filesize", "size"), &["config:5", expected]);
    let said =
        refusal(dir.path(), &["--listen=unix:socket", "--export=a=disk.img,format=raw,size=0"]);
    assert!(said.contains(expected), "{said}");
}

#[test]
fn counters_that_cannot_be_told_are_blamed_on_who_asked_for_them() {
    let dir = images();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let text =
        format!("[generic]\nunixsock = socket\nmetrics = {port}\n[one]\nexportname = disk.img\n");
    std::fs::write(dir.path().join("config"), text).unwrap();
    let said = refusal(dir.path(), &["--config=config"]);
    assert!(said.contains(&format!("127.0.0.1:{port}, as `metrics` of [generic] in")), "{said}");
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
fn files_are_told_of_keys_and_not_of_options() {
    let dir = images();
    std::fs::create_dir(dir.path().join("inner")).unwrap();
    let inner = dir.path().join("inner");
    create_qcow2(&inner, "top.qcow2", Some(("../disk.qcow2", "qcow2")));
    let text =
        "[generic]\nunixsock = socket\n[one]\nexportname = inner/top.qcow2\nformat = qcow2\n";
    is_refused(dir.path(), text, &["config:3: ", "; allow_references = DIR names the folder"]);
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

/// Whether the check finds nothing, and the start serves.
fn is_served(dir: &Path, text: &str) -> [bool; 2] {
    std::fs::write(dir.join("config"), text).unwrap();
    let before = names(dir);
    let mut check = Running::start(dir, &["--config=config", "--check-config"]);
    let is_well = check.status().success();
    assert_eq!(names(dir), before, "{text}: the check left something behind");
    let mut server = Running::start(dir, &["--config=config"]);
    let serves = server.ended_at_once().is_none();
    assert!(!serves || server.stop());
    if !serves {
        assert_eq!(names(dir), before, "{text}: the start left something behind");
    }
    [is_well, serves]
}

/// The same images with more names, a snapshot, and one above.
fn related_images() -> tempfile::TempDir {
    let dir = images();
    let path = dir.path();
    std::fs::hard_link(path.join("disk.img"), path.join("link.img")).unwrap();
    run(path, "qemu-img", &["snapshot", "-c", "before", "disk.qcow2"]);
    create_qcow2(path, "top.qcow2", Some(("disk.qcow2", "qcow2")));
    dir
}

/// Two exports, each by its keys.
fn two(one: &str, other: &str) -> String {
    format!("[generic]\nunixsock = socket\n[one]\n{one}[two]\n{other}")
}

const RAW: &str = "exportname = disk.img\n";
const LINK: &str = "exportname = link.img\n";
const QCOW2: &str = "exportname = disk.qcow2\nformat = qcow2\n";
const TOP: &str = "exportname = top.qcow2\nformat = qcow2\n";
const NEW: &str = "exportname = new.img\nfilesize = 1M\n";
const READ: &str = "readonly = true\n";

#[test]
fn the_check_finds_images_that_could_not_be_open_together() {
    let held = "another export of this server has it open";
    let past = "passes the end of the device";
    let cases = [
        (RAW, LINK, "", held),
        (RAW, LINK, READ, held),
        (QCOW2, QCOW2, "snapshot = before\n", held),
        (TOP, QCOW2, "", held),
        (QCOW2, TOP, READ, held),
        (QCOW2, "exportname = disk.qcow2\nformat = raw\n", "", held),
        (QCOW2, QCOW2, "allow_references = any\n", held),
        (NEW, "exportname = new.img\nfilesize = 2M\n", "", past),
        (NEW, "exportname = new.img\nformat = qcow2\n", "", "new.img"),
    ];
    // A program waits a little for a lock.
    std::thread::scope(|scope| {
        for (one, other, more, expected) in cases {
            scope.spawn(move || {
                let dir = related_images();
                is_refused(dir.path(), &two(one, &[other, more].concat()), &["config:", expected]);
            });
        }
    });
}

#[test]
fn the_check_finds_images_that_only_can_be_read() {
    let dir = images();
    let dir = dir.path();
    let mut image = std::fs::read(dir.join("disk.qcow2")).unwrap();
    // The bit that says corrupt, among the features that are not to be ignored.
    image[79] |= 2;
    std::fs::write(dir.join("disk.qcow2"), image).unwrap();
    let text = |more: &str| format!("[generic]\nunixsock = socket\n[one]\n{QCOW2}{more}");
    is_refused(dir, &text(""), &["config:3: ", "an image that is marked corrupt"]);
    assert_eq!(is_served(dir, &text(READ)), [true; 2]);
}

#[test]
fn the_check_is_content_with_images_that_are_open_together() {
    let dir = related_images();
    let dir = dir.path();
    for (one, other, more) in [
        (RAW, RAW, READ),
        ("exportname = disk.img\nreadonly = true\n", LINK, READ),
        (
            "exportname = disk.qcow2\nformat = qcow2\nreadonly = true\n",
            QCOW2,
            "snapshot = before\n",
        ),
        (TOP, QCOW2, READ),
        (NEW, "exportname = ./new.img\n", READ),
        (NEW, "exportname = new.img\nfilesize = 512K\n", ""),
    ] {
        let text = two(one, &[other, more].concat());
        assert_eq!(is_served(dir, &text), [true; 2], "{text}");
        let _ = std::fs::remove_file(dir.join("new.img"));
    }
}

#[test]
fn the_check_finds_what_the_host_does_not_give() {
    let dir = images();
    let dir = dir.path();
    let export = "[one]\nexportname = disk.img\n";
    // Whether there is a file system that holds it is another question.
    let text = "[generic]\nunixsock = socket\n[one]\nexportname = new.img\nfilesize = 8000000T\n";
    let told = is_served(dir, text);
    assert!(told[0] == told[1], "{told:?}");
    std::fs::create_dir(dir.join("folder")).unwrap();
    let long = format!("unix:{}", "x".repeat(200));
    for (generic, expected) in [
        (
            "unixsock = folder\n".to_owned(),
            "config:2: cannot listen on unix:folder: what is there is no socket",
        ),
        (
            "unixsock = disk.img\n".to_owned(),
            "config:2: cannot listen on unix:disk.img: what is there is no socket",
        ),
        (
            format!("listen = {long}\n"),
            "xx: the path has 200 bytes, and that of a socket at most 107",
        ),
        (
            format!("listen = unix:{}\n", "x".repeat(108)),
            "xx: the path has 108 bytes, and that of a socket at most 107",
        ),
        (
            "unixsock = socket\nlisten = unix:./socket\n".to_owned(),
            "config:2: cannot listen on unix:socket: Address",
        ),
        ("listen = 192.0.2.1:0\n".to_owned(), "config:2: cannot listen on 192.0.2.1:0"),
    ] {
        is_refused(dir, &format!("[generic]\n{generic}{export}"), &[expected]);
    }
}

#[test]
fn the_check_is_made_as_the_user_who_would_serve() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let dir = images();
    let dir = dir.path();
    std::fs::create_dir(dir.join("run")).unwrap();
    let text = |user: &str, more: &str| {
        format!(
            "[generic]\nunixsock = run/socket\nuser = {user}\ngroup = 0\n[one]\nexportname = disk.img\n{more}"
        )
    };
    if std::fs::metadata(dir).unwrap().uid() != 0 {
        is_refused(dir, &text("root", ""), &["cannot "]);
        return;
    }
    let set = |path: &Path, mode| {
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap()
    };
    set(dir, 0o755);
    // Where the user can take the socket away again.
    set(&dir.join("run"), 0o777);
    set(&dir.join("disk.img"), 0o644);
    is_refused(dir, &text("12345", ""), &["config:5: cannot open", "Permission denied"]);
    assert_eq!(is_served(dir, &text("12345", "readonly = true\n")), [true; 2]);
    set(&dir.join("disk.img"), 0o666);
    assert_eq!(is_served(dir, &text("12345", "")), [true; 2]);
    let new = "[two]\nexportname = new.img\nfilesize = 1M\n";
    is_refused(dir, &text("12345", new), &["config:7: cannot open", "Permission denied"]);
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
