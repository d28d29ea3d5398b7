//! Configuration files, and what a reload makes of them: all of it, or nothing.

use std::path::Path;
use std::process::{Command, Stdio};

use super::{Running, create_qcow2, image, run};

const URI: &str = "nbd+unix:///one?socket=socket";

pub(super) fn write(dir: &Path, name: &str, text: &str) {
    let path = dir.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

/// A main file that adds a folder, and one export in it.
fn two_files(dir: &Path) {
    write(dir, "config", "[generic]\nunixsock = socket\nallowlist = true\nincludedir = conf.d\n");
    write(dir, "conf.d/one.conf", "[one]\nexportname = ../disk.img\ndescription = the first\n");
}

pub(super) fn qemu_io(dir: &Path, command: &str, uri: &str) -> bool {
    // What only reads can be done to a read-only export, too.
    let mode = if command.starts_with("read") { &["-r"][..] } else { &[] };
    let arguments = [&["40", "qemu-io", "-f", "raw", "-c", command], mode, &[uri]].concat();
    let mut qemu = Command::new("timeout");
    qemu.args(arguments).current_dir(dir).stdout(Stdio::null()).stderr(Stdio::null());
    qemu.status().unwrap().success()
}

pub(super) fn names(dir: &Path) -> Vec<String> {
    let list = run(dir, "nbdinfo", &["--list", "nbd+unix:///?socket=socket"]);
    let names = list.lines().filter_map(|line| line.strip_prefix("export=\""));
    names.map(|line| line.split('"').next().unwrap().to_owned()).collect()
}

#[test]
fn a_configuration_is_served_and_follows_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    create_qcow2(dir, "two.qcow2", None);
    two_files(dir);
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    assert_eq!(names(dir), ["one"]);
    assert!(qemu_io(dir, "write -P 9 1M 4k", URI));
    // Added and changed.
    write(dir, "conf.d/one.conf", "[one]\nexportname = ../disk.img\nreadonly = true\n");
    write(dir, "conf.d/two.conf", "[two]\nexportname = ../two.qcow2\nformat = qcow2\n");
    server.signal("-HUP");
    let log = server.log_until("reloaded").concat();
    assert!(log.contains(r#"added=["two"]"#) && log.contains(r#"changed=["one"]"#), "{log}");
    assert_eq!(names(dir), ["one", "two"]);
    assert!(qemu_io(dir, "read -P 9 1M 4k", URI));
    assert!(!qemu_io(dir, "write -P 8 1M 4k", URI));
    assert!(qemu_io(dir, "write -P 7 0 64k", "nbd+unix:///two?socket=socket"));
    // Removed: its image is closed, and another program can have it.
    std::fs::remove_file(dir.join("conf.d/two.conf")).unwrap();
    server.signal("-HUP");
    let log = server.log_until("closed an image").concat();
    assert!(log.contains(r#"removed=["two"]"#), "{log}");
    run(dir, "qemu-img", &["check", "-q", "two.qcow2"]);
    run(dir, "qemu-io", &["-f", "qcow2", "-c", "write 0 4k", "two.qcow2"]);
    // The same again changes nothing.
    server.signal("-HUP");
    let log = server.log_until("reloaded").concat();
    assert!(log.contains("added=[] changed=[] removed=[] kept=1"), "{log}");
    assert!(server.stop());
}

#[test]
fn a_broken_or_half_written_file_keeps_what_was_served() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    two_files(dir);
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    let good = "[two]\nexportname = ../disk.img\nreadonly = true\n";
    for (text, expected) in [
        ("[two]\nexportname = ../missing.img\n", "conf.d/two.conf:1: cannot open"),
        ("[two]\nexportname = ../disk.img\nformat = qcow2\n", "conf.d/two.conf:1: cannot open"),
        ("[two]\nexportname = ../disk.img\nnonsense\n", "conf.d/two.conf:3: "),
        ("[two]\nexportname = ../disk.img\nreadonly = tr\n", "conf.d/two.conf:3: readonly"),
        ("[one]\nexportname = ../disk.img\n", "conf.d/two.conf:1: the section [one] is at"),
        ("", "conf.d/two.conf:1: the file is empty"),
        (&good[..5], "conf.d/two.conf:1: [two] does not say exportname"),
        (&good[..24], "conf.d/two.conf:2: the line has no end"),
        (&good[..good.len() - 1], "conf.d/two.conf:3: the line has no end"),
    ] {
        write(dir, "conf.d/two.conf", text);
        server.signal("-HUP");
        let log = server.log_until("not reloaded").concat();
        assert!(log.contains(expected), "{text:?}: {log}");
        assert_eq!(names(dir), ["one"]);
    }
    // What was opened on the way is closed again.
    create_qcow2(dir, "three.qcow2", None);
    let text = format!("[three]\nexportname = ../three.qcow2\nformat = qcow2\n{good}offset = 1T\n");
    write(dir, "conf.d/two.conf", &text);
    server.signal("-HUP");
    server.log_until("not reloaded");
    run(dir, "qemu-io", &["-f", "qcow2", "-c", "write 0 4k", "three.qcow2"]);
    write(dir, "conf.d/two.conf", good);
    server.signal("-HUP");
    server.log_until("reloaded");
    assert_eq!(names(dir), ["one", "two"]);
    assert!(qemu_io(dir, "write -P 9 1M 4k", URI));
    assert!(server.stop());
}

#[test]
fn files_are_checked_without_touching_what_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    two_files(dir);
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    let program = env!("CARGO_BIN_EXE_nbd-server");
    let told = run(dir, program, &["--config=config", "--check-config"]);
    assert_eq!(told, "1 exports in 2 files: all is well\n");
    for (text, expected) in [
        (
            "[two]\nexportname = /no/such/image\n",
            "conf.d/two.conf:1: cannot open /no/such/image for export \"two\": No such file",
        ),
        ("[two]\nexportname = ../config\nreadonyl = true\n", "conf.d/two.conf:3: there is no key"),
    ] {
        write(dir, "conf.d/two.conf", text);
        let mut check = Running::start(dir, &["--config=config", "--check-config"]);
        assert_eq!(check.status().code(), Some(1));
        let errors = check.errors();
        assert!(errors.contains(expected), "{errors}");
    }
    assert!(qemu_io(dir, "write -P 9 1M 4k", URI));
    assert!(server.stop());
}

#[test]
fn a_raw_image_that_looks_like_another_format_is_not_served_by_accident() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create_qcow2(dir, "two.qcow2", None);
    write(dir, "config", "[generic]\nunixsock = socket\n[two]\nexportname = two.qcow2\n");
    let mut server = Running::start(dir, &["--config=config"]);
    assert_eq!(server.status().code(), Some(1));
    let errors = server.errors();
    assert!(errors.contains("config:3: ") && errors.contains("say format = qcow2"), "{errors}");
}

#[test]
fn what_the_files_promise_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    write(
        dir,
        "config",
        "[generic]\nunixsock = socket\n[made]\nexportname = made.img\nfilesize = 3M\nflush = false\nrotational = true\n\
         blocksize = 128K\nsync = true\ndefault = true\n[all]\nexportname = disk.img\n[same]\nexportname = disk.img\n\
         readonly = true\n",
    );
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    let made = run(dir, "nbdinfo", &["--json", "nbd+unix:///?socket=socket"]);
    for expected in [
        "\"export-size\": 3145728",
        "\"can_flush\": false",
        "\"is_rotational\": true",
        "\"block_size_preferred\": 131072",
    ] {
        assert!(made.contains(expected), "{expected}: {made}");
    }
    // Listing is off, as it is by default in these files.
    let list = ["10", "nbdinfo", "--list", "nbd+unix:///?socket=socket"];
    let listed = Command::new("timeout").args(list).current_dir(dir).output().unwrap();
    assert!(!listed.status.success());
    // Two exports of one image see the same bytes.
    assert!(qemu_io(dir, "write -P 5 0 64k", "nbd+unix:///all?socket=socket"));
    assert!(qemu_io(dir, "read -P 5 0 64k", "nbd+unix:///same?socket=socket"));
    assert!(server.stop());
}

#[test]
fn what_a_client_writes_apart_is_gone_when_it_leaves() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let bytes = image(dir);
    let config = "[generic]\nunixsock = socket\n[apart]\nexportname = disk.img\ncopyonwrite = true\n[same]\nexportname = \
                  disk.img\nreadonly = true\n[gone]\nexportname = here\ntemporary = true\nfilesize = 1M\n";
    write(dir, "config", config);
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    for name in ["apart", "gone"] {
        let uri = format!("nbd+unix:///{name}?socket=socket");
        let write =
            ["-c", "write -P 9 1000 70000", "-c", "write -z 64k 100", "-c", "read -P 9 1000 64000"];
        run(
            dir,
            "qemu-io",
            &[&["-f", "raw"][..], &write, &["-c", "read -P 0 64k 100", &uri]].concat(),
        );
        assert!(!run(dir, "nbdinfo", &["--json", &uri]).contains("\"can_multi_conn\": true"));
    }
    for name in ["apart", "same"] {
        run(dir, "nbdcopy", &[&format!("nbd+unix:///{name}?socket=socket"), "copy.img"]);
        assert!(std::fs::read(dir.join("copy.img")).unwrap() == bytes, "{name}");
    }
    assert!(qemu_io(dir, "read -P 0 0 1M", "nbd+unix:///gone?socket=socket"));
    assert!(server.stop());
    assert!(std::fs::read(dir.join("disk.img")).unwrap() == bytes);
    let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(!names.into_iter().any(|name| name.to_string_lossy().starts_with('.')));
}

#[test]
fn commands_are_run_before_and_after_each_client_and_can_turn_it_away() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let config = "[generic]\nunixsock = socket\n[one]\nexportname = disk.img\nprerun = test ! -e closed && echo before %s >> \
                  log\npostrun = echo after $NBD_EXPORT >> log\n";
    write(dir, "config", config);
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    assert!(qemu_io(dir, "write -P 9 0 4k", URI));
    write(dir, "closed", "");
    let read = ["40", "qemu-io", "-r", "-f", "raw", "-c", "read 0 512", URI];
    let refused = Command::new("timeout").args(read).current_dir(dir).output().unwrap();
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(told.contains("the server failed to prepare the export; its log tells why"), "{told}");
    let log = server.log_until("turned away").concat();
    assert!(log.contains("test ! -e closed") && log.contains("exit status: 1"), "{log}");
    std::fs::remove_file(dir.join("closed")).unwrap();
    assert!(qemu_io(dir, "read -P 9 0 4k", URI));
    assert!(server.stop());
    let log = std::fs::read_to_string(dir.join("log")).unwrap();
    let mut lines: Vec<_> = log.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["after one", "after one", "before disk.img", "before disk.img"]);
}

#[test]
fn the_manual_and_the_completions_come_from_the_same_definition() {
    let dir = tempfile::tempdir().unwrap();
    let program = env!("CARGO_BIN_EXE_nbd-server");
    let manual = run(dir.path(), program, &["--man"]);
    for told in [
        r"\-\-listen",
        r"\-\-check\-config",
        "CONFIGURATION FILES",
        "exportname",
        "SIGHUP",
        r"\-\-listen ADDRESS ... \-\-export NAME=PATH[,...] ...",
    ] {
        assert!(manual.contains(told), "{told}");
    }
    std::fs::write(dir.path().join("manual"), &manual).unwrap();
    match Command::new("groff")
        .args(["-man", "-ww", "-Tutf8", "-rLL=78n", "manual"])
        .current_dir(dir.path())
        .output()
    {
        Ok(set) => assert!(set.stderr.is_empty(), "{}", String::from_utf8_lossy(&set.stderr)),
        Err(error) => eprintln!("nothing sets the manual: {error}"),
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = run(dir.path(), program, &["--completions", shell]);
        assert!(script.contains("check-config"), "{shell}");
    }
    std::fs::write(dir.path().join("script"), run(dir.path(), program, &["--completions=bash"]))
        .unwrap();
    run(dir.path(), "bash", &["-n", "script"]);
}

#[test]
fn the_last_export_can_go_and_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    two_files(dir);
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    std::fs::remove_file(dir.join("conf.d/one.conf")).unwrap();
    server.signal("-HUP");
    let log = server.log_until("reloaded").concat();
    assert!(log.contains("config:1: no export is configured, nothing is served"), "{log}");
    assert!(log.contains(r#"removed=["one"]"#), "{log}");
    assert!(!qemu_io(dir, "read 0 4k", URI));
    two_files(dir);
    server.signal("-HUP");
    server.log_until(r#"added=["one"]"#);
    assert!(qemu_io(dir, "read 0 4k", URI));
    // Nor is a folder needed where others could come to be.
    write(dir, "config", "[generic]\nunixsock = socket\n");
    server.signal("-HUP");
    server.log_until(r#"removed=["one"]"#);
    assert!(server.stop());
    let mut server = Running::start(dir, &["--config=config"]);
    assert_eq!(server.ended_at_once(), Some(false));
    assert!(server.errors().contains("config:1: no export is configured, and no includedir"));
}

#[test]
fn the_configuration_that_the_reference_ships_with_loads_and_takes_exports_later() {
    const SHIPPED: &str = "/usr/share/nbd-server/nbd-server.conf.tmpl";
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let program = env!("CARGO_BIN_EXE_nbd-server");
    // With a folder of our own, and as the user that runs this.
    let shipped = std::fs::read_to_string(SHIPPED).unwrap();
    let ours = |line: &&str| !["user", "group"].iter().any(|key| line.trim().starts_with(key));
    let lines: Vec<_> = shipped.lines().filter(ours).collect();
    let text = lines.join("\n").replace("/etc/nbd-server/conf.d", "conf.d") + "\n";
    assert!(text.contains("includedir = conf.d"), "{text}");
    write(dir, "config", &text);
    std::fs::create_dir(dir.join("conf.d")).unwrap();
    let told = run(dir, program, &["--config=config", "--check-config"]);
    assert!(told.ends_with("all is well\n"), "{told}");
    let mut server = Running::start(dir, &["--config=config", "--listen=unix:socket"]);
    server.address();
    server.log_until("nothing is served");
    write(dir, "conf.d/one.conf", "[one]\nexportname = ../disk.img\n");
    server.signal("-HUP");
    server.log_until(r#"added=["one"]"#);
    assert!(qemu_io(dir, "write -P 9 1M 4k", URI));
    assert!(server.stop());
}

#[test]
fn a_refused_reload_takes_the_images_away_that_it_made() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    two_files(dir);
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    let made = "[made]\nexportname = ../made.img\nfilesize = 1M\n";
    let broken = "[broken]\nexportname = ../missing.img\n";
    write(dir, "conf.d/two.conf", &format!("{made}{broken}"));
    server.signal("-HUP");
    let log = server.log_until("not reloaded").concat();
    assert!(log.contains("conf.d/two.conf:4: "), "{log}");
    assert!(!dir.join("made.img").exists());
    write(dir, "conf.d/two.conf", made);
    server.signal("-HUP");
    server.log_until(r#"added=["made"]"#);
    assert_eq!(std::fs::metadata(dir.join("made.img")).unwrap().len(), 1 << 20);
    // What was there is nobody's to take away.
    write(dir, "conf.d/two.conf", &format!("{}{broken}", made.replace("[made]", "[other]")));
    server.signal("-HUP");
    server.log_until("not reloaded");
    assert!(dir.join("made.img").exists());
    assert!(server.stop());
}

#[test]
fn a_change_to_writable_is_refused_by_a_reload_alone_and_the_next_file_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let text = |more: &str| {
        format!(
            "[generic]\nunixsock = socket\nallowlist = true\n[one]\nexportname = disk.img\n{more}"
        )
    };
    write(dir, "config", &text("readonly = true\n"));
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    write(dir, "config", &text(""));
    let program = env!("CARGO_BIN_EXE_nbd-server");
    let told = run(dir, program, &["--config=config", "--check-config"]);
    assert!(told.ends_with("all is well\n"), "{told}");
    for _ in 0..2 {
        server.signal("-HUP");
        let log = server.log_until("not reloaded").concat();
        assert!(
            log.contains("config:4: cannot open") && log.contains("remove all its exports"),
            "{log}"
        );
        assert_eq!(names(dir), ["one"]);
    }
    // A file without that change is taken, and so are the steps that were told.
    let other = "[two]\nexportname = new.img\nfilesize = 1M\n";
    for (text, expected) in [
        (text(&format!("readonly = true\n{other}")), r#"added=["two"]"#),
        (format!("[generic]\nunixsock = socket\nallowlist = true\n{other}"), r#"removed=["one"]"#),
        (text(other), r#"added=["one"]"#),
    ] {
        write(dir, "config", &text);
        server.signal("-HUP");
        let log = server.log_until("reloaded").concat();
        assert!(log.contains(expected), "{log}");
    }
    assert!(qemu_io(dir, "write -P 9 0 4k", URI));
    server.signal("-TERM");
    server.log_until("stopping");
    assert!(server.ended());
}

#[test]
fn a_hangup_before_anything_is_served_reloads_what_is_served_then() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create_qcow2(dir, "disk.qcow2", None);
    run(dir, "mkfifo", &["secret"]);
    let export = "exportname = disk.qcow2\nformat = qcow2\npassphrase_file = secret\n";
    write(dir, "config", &format!("[generic]\nunixsock = socket\n[one]\n{export}"));
    let mut server = Running::start(dir, &["--config=config"]);
    // Which is opened as soon as it is read: nothing is served by then.
    let mut fifo = std::fs::OpenOptions::new().write(true).open(dir.join("secret")).unwrap();
    server.signal("-HUP");
    std::io::Write::write_all(&mut fifo, b"of nothing\n").unwrap();
    drop(fifo);
    server.address();
    server.log_until("reloaded");
    assert!(qemu_io(dir, "write -P 9 1M 4k", URI));
    assert!(server.stop());
}

#[test]
fn a_list_of_clients_that_does_not_end_is_refused_and_reloads_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    let text = |list: &str| {
        format!("[generic]\nunixsock = socket\n[one]\nexportname = disk.img\nauthfile = {list}\n")
    };
    write(dir, "list", "unix\n");
    write(dir, "config", &text("list"));
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    run(dir, "mkfifo", &["fifo"]);
    write(dir, "long", &"#".repeat((1 << 20) + 1));
    for (list, why) in [
        ("fifo", "config:5: cannot read fifo: it is no regular file"),
        ("/dev/zero", "config:5: cannot read /dev/zero: it is no regular file"),
        ("long", "config:5: cannot read long: it is longer than 1048576 bytes"),
        ("list/x", "config:5: cannot read list/x: Not a directory"),
    ] {
        write(dir, "config", &text(list));
        server.signal("-HUP");
        let log = server.log_until("not reloaded").concat();
        assert!(log.contains(why), "{log}");
        assert!(qemu_io(dir, "read 0 4k", URI));
    }
    write(dir, "list", "10.0.0.1\n");
    write(dir, "config", &text("list"));
    server.signal("-HUP");
    server.log_until(r#"changed=["one"]"#);
    assert!(!qemu_io(dir, "read 0 4k", URI));
    let log = server.log_until("may not use the export").concat();
    assert!(log.contains("the export allows others only, or denies it"), "{log}");
    assert!(server.stop());
}

/// Makes the disk one with a partition of so many sectors.
fn divide(dir: &Path, sectors: u32) {
    use std::os::unix::fs::FileExt;
    let mut record = [0; 512];
    record[450] = 0x83;
    record[454..458].copy_from_slice(&64_u32.to_le_bytes());
    record[458..462].copy_from_slice(&sectors.to_le_bytes());
    record[510..].copy_from_slice(&[0x55, 0xaa]);
    let disk = std::fs::OpenOptions::new().write(true).open(dir.join("disk.img")).unwrap();
    disk.write_all_at(&record, 0).unwrap();
    disk.sync_all().unwrap();
}

#[test]
fn a_partition_that_moved_is_found_again_by_a_reload() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    image(dir);
    divide(dir, 64);
    let export = "[one]\nexportname = disk.img\npartition = 1\n";
    write(dir, "config", &format!("[generic]\nunixsock = socket\n{export}"));
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    for (sectors, told) in [(64, "kept=1"), (128, r#"changed=["one"]"#), (128, "kept=1")] {
        divide(dir, sectors);
        server.signal("-HUP");
        let log = server.log_until("reloaded").concat();
        assert!(log.contains(told), "{log}");
        let size = run(dir, "nbdinfo", &["--size", URI]);
        assert_eq!(size.trim(), (sectors * 512).to_string());
    }
    assert!(server.stop());
}
