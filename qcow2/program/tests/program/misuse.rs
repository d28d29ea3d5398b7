//! What goes wrong, and what is said about it.

use crate::support::{Place, exists};

#[test]
fn an_option_that_there_is_not_is_not_taken_for_a_name() {
    let answer = Place::new().qcow2(&["info", "-Z", "a"]).bad(1, "'-Z'");
    assert!(!answer.err.contains("-- -Z"), "{answer:?}");
}

#[test]
fn a_command_line_that_cannot_be_understood_ends_with_1() {
    let place = Place::new();
    for line in [
        &["frobnicate"][..],
        &["info", "--bad", "x"],
        &["info"],
        &["info", "a", "b"],
        &["create", "-f", "bochs", "x", "1M"],
        &["create", "-f", "qcow2", "x", "-1"],
        &["create", "-f", "qcow2", "x", "1x"],
    ] {
        let answer = place.qcow2(line);
        assert_eq!(answer.code, 1, "{answer:?}");
        assert!(answer.err.starts_with("qcow2: ") && answer.err.len() > 20, "{answer:?}");
        assert_eq!(place.qemu_img(line).code, 1, "{line:?}");
    }
    assert!(!exists(&place.path("x")));
}

#[test]
fn help_and_version_are_no_failures() {
    let place = Place::new();
    for line in [&["--help"][..], &["-h"], &["--version"], &["-V"], &["info", "--help"], &["man"]] {
        assert!(!place.qcow2(line).good().out.is_empty(), "{line:?}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = place.qcow2(&["completions", shell]).good().out;
        assert!(script.contains("backing-chain"), "{shell}");
    }
    let manual = place.qcow2(&["man"]).good().out;
    assert!(manual.contains("backing") && manual.contains(".TH"), "{manual}");
}

#[test]
fn an_image_that_is_not_there_is_named() {
    let place = Place::new();
    let answer = place.qcow2(&["info", "nofile"]).bad(1, "Could not open 'nofile'");
    assert!(answer.err.contains("No such file"), "{answer:?}");
}

#[test]
fn a_raw_image_must_be_said_to_be_one() {
    let place = Place::new();
    place.write_raw("a.raw", 4096, 1);
    place.qcow2(&["info", "a.raw"]).bad(1, "say -f raw");
    place.qcow2(&["dd", "if=a.raw", "of=b"]).bad(1, "say -f raw");
    assert!(!exists(&place.path("b")));
}

#[test]
fn an_image_that_is_open_elsewhere_is_neither_read_nor_replaced() {
    let place = Place::new();
    place.qemu_img(&["create", "-f", "qcow2", "a.qcow2", "1M"]).good();
    let socket = place.path("s").display().to_string();
    let _server =
        crate::support::serve(&place, &["-f", "qcow2", "-t", "-k", &socket, "a.qcow2"], &socket);
    place.qcow2(&["info", "a.qcow2"]).bad(1, "-U");
    place.qcow2(&["info", "-U", "a.qcow2"]).good();
    place.qcow2(&["create", "-f", "qcow2", "a.qcow2", "2M"]).bad(1, "has the image open");
    let info = place.qemu_img(&["info", "-U", "--output=json", "a.qcow2"]).good().json();
    assert_eq!(info["virtual-size"], 1 << 20);
}

#[test]
fn a_target_that_is_read_or_is_no_file_is_left_alone() {
    let place = Place::new();
    place.qemu_img(&["create", "-f", "qcow2", "a.qcow2", "1M"]).good();
    let before = place.read("a.qcow2");
    place.qcow2(&["dd", "-U", "if=a.qcow2", "of=./a.qcow2"]).bad(1, "images that are read");
    assert_eq!(place.read("a.qcow2"), before);
    std::fs::create_dir(place.path("folder")).unwrap();
    place.qcow2(&["dd", "if=a.qcow2", "of=folder"]).bad(1, "neither a regular file");
}

#[test]
fn no_layer_below_a_source_is_written() {
    let place = Place::new();
    place.qemu_img(&["create", "-f", "qcow2", "base", "1M"]).good();
    place.qemu_img(&["create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "mid"]).good();
    place.qemu_img(&["create", "-f", "qcow2", "-b", "mid", "-F", "qcow2", "top"]).good();
    let before = place.read("base");
    for line in [
        &["convert", "-U", "-O", "qcow2", "top", "base"][..],
        &["convert", "-U", "-n", "-O", "qcow2", "top", "base"],
        &["convert", "-O", "qcow2", "-B", "mid", "-F", "qcow2", "top", "base"],
        &["dd", "-U", "if=top", "of=base"],
        &["create", "-f", "qcow2", "-b", "top", "-F", "qcow2", "base"],
    ] {
        let answer = place.qcow2(line);
        assert_eq!(answer.code, 1, "{line:?}: {answer:?}");
        assert!(answer.err.contains("images that are read"), "{line:?}: {answer:?}");
        assert_eq!(place.read("base"), before, "{line:?}");
    }
}

#[test]
fn what_could_not_be_finished_is_not_left_behind() {
    let place = Place::new();
    place
        .qcow2(&["create", "-f", "qcow2", "-o", "cluster_size=3", "x", "1M"])
        .bad(1, "power of two");
    assert!(!exists(&place.path("x")));
}

#[test]
fn of_an_option_that_is_given_twice_the_last_counts() {
    let place = Place::new();
    place.qcow2(&["create", "-f", "raw", "-q", "-q", "-f", "qcow2", "a", "1M"]).good();
    for line in [
        &["info", "--output", "json", "--output=human", "a"][..],
        &["convert", "-c", "-O", "raw", "-c", "-O", "qcow2", "a", "b"],
        &["measure", "-O", "raw", "-O", "qcow2", "--size", "1M", "--size", "64M"],
    ] {
        let (ours, theirs) = (place.qcow2(line).good(), place.qemu_img(line).good());
        if line[0] != "info" {
            assert_eq!(ours.out, theirs.out, "{line:?}");
        }
        assert!(!ours.out.starts_with('{'), "{line:?}");
    }
    assert_eq!(place.qcow2(&["info", "b"]).good().out.matches("qcow2").count(), 1);
}

#[test]
fn a_link_named_qemu_img_answers_as_scripts_expect() {
    let place = Place::new();
    let link = place.path("qemu-img");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_qcow2"), &link).unwrap();
    let link = link.display().to_string();
    let version = place.tool(&link, &["--version"]).out;
    assert!(version.starts_with("qemu-img version 10.0.2 (answered by qcow2 "), "{version}");
    assert!(place.tool(&link, &["--help"]).out.contains("Supported image formats:\n\n  qcow2 raw"));
    assert!(place.qcow2(&["--version"]).good().out.starts_with("qcow2 "));
}

#[test]
fn a_reader_who_has_seen_enough_is_no_failure() {
    let place = Place::new();
    place.qcow2(&["create", "-q", "-f", "qcow2", "a", "1M"]).good();
    for line in
        [&["map", "--output=json", "a"][..], &["info", "--output=json", "a"], &["info", "a"]]
    {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = place.ours(line);
        command.stdout(writer).stderr(std::process::Stdio::piped());
        let ended = command.output().expect("the program runs");
        assert_eq!((ended.status.code(), ended.stderr), (Some(0), Vec::new()), "{line:?}");
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("a Linux");
        let ended = place.ours(line).stdout(full).status().expect("the program runs");
        assert_eq!(ended.code(), Some(1), "{line:?}");
    }
}

#[test]
fn a_wrong_format_is_told_as_that() {
    let place = Place::new();
    place.write_raw("a.raw", 4096, 1);
    for command in ["info", "map", "check"] {
        let answer = place.qcow2(&[command, "-f", "qcow2", "a.raw"]);
        assert_eq!(answer.code, 1, "{answer:?}");
        assert!(answer.err.contains("a.raw is not in qcow2 format"), "{answer:?}");
    }
}

#[test]
fn the_manual_names_no_pages_that_are_not_there_and_shells_learn_the_formats() {
    let place = Place::new();
    let manual = place.qcow2(&["man"]).good().out;
    assert!(!manual.contains("(1)"), "{manual}");
    assert!(manual.contains("convert") && manual.contains("Supported image formats"), "{manual}");
    let script = place.qcow2(&["completions", "bash"]).good().out;
    assert!(script.contains("\"qcow2 raw vmdk\""), "{script}");
}

#[test]
fn what_is_sure_to_fail_empties_no_file() {
    let place = Place::new();
    place.qemu_img(&["create", "-f", "qcow2", "a", "1M"]).good();
    std::fs::hard_link(place.path("a"), place.path("b")).unwrap();
    let before = place.read("a");
    let long = "x".repeat(1023);
    for (options, text) in [
        (vec!["-o", "data_file=a"], "the image itself"),
        (vec!["-o", "data_file=./b"], "the image itself"),
        (vec!["-o", "cluster_size=512", "-u", "-F", "raw", "-b", &long], "1023"),
        (vec!["-F", "raw"], "no backing file"),
    ] {
        let line = [&["create", "-f", "qcow2"], &options[..], &["a", "1M"]].concat();
        place.qcow2(&line).bad(1, text);
        assert_eq!(place.read("a"), before, "{line:?}");
    }
    place.qemu_img(&["create", "-q", "-f", "qcow2", "marked", "1M"]).good();
    place.qemu_img(&["bitmap", "--add", "marked", "since"]).good();
    for target in [&["-O", "raw"][..], &["-O", "qcow2", "-o", "compat=0.10"]] {
        let line = [&["convert", "--bitmaps"], target, &["marked", "a"]].concat();
        place.qcow2(&line).bad(1, "does not support bitmaps");
        assert_eq!(place.read("a"), before, "{line:?}");
    }
}
