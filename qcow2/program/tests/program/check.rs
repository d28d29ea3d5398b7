//! `check` beside qemu-img's: the same verdicts, numbers and exit codes.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;

use crate::support::{Place, serve};

fn image(place: &Place) {
    place.qemu_img(&["create", "-f", "qcow2", "a.qcow2", "64M"]).good();
    place.qemu_io("a.qcow2", &["write -P 1 0 4M", "write -P 2 20M 1M", "discard 1M 1M"]);
}

fn be64(bytes: &[u8], at: usize) -> usize {
    let value = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    usize::try_from(value & 0x00ff_ffff_ffff_fe00).unwrap()
}

/// Where the refcounts of the first clusters lie.
fn refcounts(bytes: &[u8]) -> usize {
    be64(bytes, be64(bytes, 48))
}

/// Changes bytes of the image.
fn spoil(place: &Place, spoil: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = place.read("a.qcow2");
    spoil(&mut bytes);
    std::fs::write(place.path("a.qcow2"), bytes).unwrap();
}

/// The numbers and the codes of both programs are the same, for people and for programs.
fn both_say_the_same(place: &Place, args: &[&str], code: i32) {
    let line = |output| {
        let mut line = vec!["check", output];
        line.extend(args);
        line.push("a.qcow2");
        line
    };
    let spoilt = place.read("a.qcow2");
    let restore = || std::fs::write(place.path("a.qcow2"), &spoilt).unwrap();
    let theirs = place.qemu_img(&line("--output=human"));
    restore();
    let ours = place.qcow2(&line("--output=human"));
    assert_eq!((theirs.code, ours.code), (code, code), "{theirs:?} {ours:?}");
    assert_eq!(ours.out, theirs.out, "{args:?}");
    restore();
    let theirs = place.qemu_img(&line("--output=json"));
    restore();
    let ours = place.qcow2(&line("--output=json"));
    assert_eq!((theirs.code, ours.code), (code, code), "{theirs:?} {ours:?}");
    assert_eq!(ours.json(), theirs.json(), "{args:?}");
}

#[test]
fn a_good_image_is_called_good() {
    let place = Place::new();
    image(&place);
    both_say_the_same(&place, &[], 0);
    both_say_the_same(&place, &["-f", "qcow2", "-r", "all"], 0);
    assert_eq!(place.qcow2(&["check", "-q", "a.qcow2"]).good().out, "");
}

#[test]
fn a_leak_is_found_and_repaired() {
    let place = Place::new();
    image(&place);
    spoil(&place, |bytes| {
        let at = refcounts(bytes) + 2 * 95;
        bytes[at + 1] = 1;
        bytes.resize(bytes.len().max(97 * 65536), 0);
    });
    both_say_the_same(&place, &[], 3);
    let answer = place.qcow2(&["check", "a.qcow2"]);
    assert!(answer.err.contains("Leaked cluster "), "{answer:?}");
    both_say_the_same(&place, &["-r", "leaks"], 0);
}

#[test]
fn what_is_repaired_is_told_in_the_words_of_qemu() {
    let place = Place::new();
    image(&place);
    spoil(&place, |bytes| {
        // The header counts twice, and the flag of the L2 table is off.
        let at = refcounts(bytes);
        bytes[at + 1] = 2;
        let l1 = be64(bytes, 40);
        bytes[l1] &= 0x7f;
    });
    let spoilt = place.read("a.qcow2");
    let theirs = place.qemu_img(&["check", "-r", "all", "a.qcow2"]).good();
    std::fs::write(place.path("a.qcow2"), &spoilt).unwrap();
    let ours = place.qcow2(&["check", "-r", "all", "a.qcow2"]).good();
    assert_eq!(ours.err, theirs.err);
    assert_eq!(ours.out, theirs.out);
    assert!(ours.err.contains("Leaked") && ours.err.contains("Repairing OFLAG_COPIED"), "{ours:?}");
}

#[test]
fn a_refcount_that_is_too_low_is_found_and_repaired() {
    let place = Place::new();
    image(&place);
    spoil(&place, |bytes| {
        // The first data cluster.
        let data = be64(bytes, be64(bytes, be64(bytes, 40)));
        let at = refcounts(bytes) + 2 * (data / 65536);
        bytes[at..at + 2].copy_from_slice(&[0, 0]);
    });
    let answer = place.qcow2(&["check", "a.qcow2"]).bad(2, "ERROR");
    assert!(answer.out.contains("Data may be corrupted"), "{answer:?}");
    assert_eq!(place.qemu_img(&["check", "a.qcow2"]).code, 2);
    let repaired = place.qcow2(&["check", "-r", "all", "a.qcow2"]).good();
    assert!(repaired.out.contains("were found and repaired"), "{repaired:?}");
    place.qemu_img(&["check", "a.qcow2"]).good();
    place.qemu_io("a.qcow2", &["read -P 1 0 1M", "read -P 1 2M 2M", "read -P 2 20M 1M"]);
}

#[test]
fn formats_without_checks_have_their_own_code() {
    let place = Place::new();
    place.write_raw("a.raw", 4096, 1);
    let text = "This image format does not support checks";
    place.qcow2(&["check", "-f", "raw", "a.raw"]).bad(63, text);
    place.qemu_img(&["check", "-f", "raw", "a.raw"]).bad(63, text);
    place.qcow2(&["check", "missing"]).bad(1, "missing");
    place.qcow2(&["check", "-r", "some", "a.raw"]).bad(1, "some");
}

#[test]
fn a_repair_withdraws_what_it_does_not_keep_up_to_date() {
    let place = Place::new();
    for what in ["leaks", "all"] {
        image(&place);
        // The last autoclear bit, which nobody knows.
        spoil(&place, |bytes| bytes[88] |= 0x80);
        place.qcow2(&["check", "a.qcow2"]).good();
        assert_eq!(place.read("a.qcow2")[88], 0x80);
        place.qcow2(&["check", "-r", what, "a.qcow2"]).good();
        assert_eq!(place.read("a.qcow2")[88], 0, "-r {what}");
    }
}

#[test]
fn nothing_is_repaired_where_the_l1_table_is_too_short() {
    let place = Place::new();
    image(&place);
    spoil(&place, |bytes| bytes[36..40].fill(0));
    let spoilt = place.read("a.qcow2");
    for args in [&[][..], &["-r", "leaks"], &["-r", "all"]] {
        let line = [&["check"], args, &["a.qcow2"]].concat();
        place.qcow2(&line).bad(1, "L1 table");
        assert_eq!(place.qemu_img(&line).code, 1, "{args:?}");
        assert_eq!(place.read("a.qcow2"), spoilt, "{args:?}");
    }
}

/// Both end with the same code, whatever was to be repaired. Each meets the image as it is now.
fn both_end_alike(place: &Place, code: i32, what: &str) {
    let spoilt = place.read("a.qcow2");
    for args in [&[][..], &["-r", "leaks"], &["-r", "all"]] {
        let line = [&["check", "-f", "qcow2"], args, &["a.qcow2"]].concat();
        let theirs = place.qemu_img(&line);
        std::fs::write(place.path("a.qcow2"), &spoilt).unwrap();
        let ours = place.qcow2(&line);
        std::fs::write(place.path("a.qcow2"), &spoilt).unwrap();
        assert_eq!((theirs.code, ours.code), (code, code), "{what} {args:?}: {theirs:?} {ours:?}");
        assert!(ours.err.starts_with("qcow2: "), "{what} {args:?}: {ours:?}");
    }
}

#[test]
fn an_image_that_cannot_be_checked_is_no_corrupted_one() {
    let place = Place::new();
    image(&place);
    let sound = place.read("a.qcow2");
    for (what, at, bytes) in [
        ("another format", 0, &b"X"[..]),
        ("version 9", 7, &[9]),
        ("clusters of 8 bytes", 23, &[3]),
        ("an encryption that nobody knows", 35, &[9]),
        ("an L1 table without end", 36, &[0x7f]),
        ("an L1 table that is not aligned", 47, &[1]),
        ("a refcount table without end", 56, &[0x7f]),
        ("an unknown incompatible feature", 79, &[1 << 6]),
        ("refcounts of 128 bits", 99, &[7]),
    ] {
        spoil(&place, |spoilt| spoilt[at..at + bytes.len()].copy_from_slice(bytes));
        both_end_alike(&place, 1, what);
        std::fs::write(place.path("a.qcow2"), &sound).unwrap();
    }
    for bytes in [0, 50] {
        spoil(&place, |spoilt| spoilt.truncate(bytes));
        both_end_alike(&place, 1, "a truncated header");
    }
}

#[test]
fn a_repair_that_is_refused_is_no_check_that_was_made() {
    let place = Place::new();
    image(&place);
    // No refcounts at all: this can be told, and only a full repair makes them anew.
    spoil(&place, |bytes| bytes[56..60].fill(0));
    let spoilt = place.read("a.qcow2");
    for (args, code) in [(&[][..], 2), (&["-r", "leaks"], 1), (&["-r", "all"], 0)] {
        let line = [&["check"], args, &["a.qcow2"]].concat();
        let theirs = place.qemu_img(&line);
        std::fs::write(place.path("a.qcow2"), &spoilt).unwrap();
        let ours = place.qcow2(&line);
        assert_eq!((theirs.code, ours.code), (code, code), "{args:?}: {theirs:?} {ours:?}");
        assert_eq!(ours.err.contains("not repaired"), code == 1, "{ours:?}");
    }
    place.qemu_img(&["check", "a.qcow2"]).good();
}

#[test]
fn an_image_that_must_not_be_written_is_checked_and_not_repaired() {
    let place = Place::new();
    image(&place);
    let permit = |name: &str, mode: u32| {
        std::fs::set_permissions(place.path(name), Permissions::from_mode(mode)).unwrap();
    };
    permit("", 0o755);
    for (mode, codes) in [(0o444, [0, 1, 1]), (0o000, [1, 1, 1])] {
        permit("a.qcow2", mode);
        for (args, code) in [&[][..], &["-r", "leaks"], &["-r", "all"]].into_iter().zip(codes) {
            let line = [&["check"], args, &["a.qcow2"]].concat();
            let theirs = place.as_nobody("qemu-img", &line);
            let ours = place.as_nobody(env!("CARGO_BIN_EXE_qcow2"), &line);
            assert_eq!((theirs.code, ours.code), (code, code), "{args:?}: {theirs:?} {ours:?}");
            assert!(code == 0 || ours.err.contains("Permission denied"), "{ours:?}");
        }
    }
    permit("a.qcow2", 0o644);
    for option in ["read-only=on", "force-share=on"] {
        let named = format!("driver=qcow2,file.filename=a.qcow2,{option}");
        for (args, code) in [(&[][..], 0), (&["-r", "all"], 1)] {
            let line = [&["check", "--image-opts"], args, &[named.as_str()]].concat();
            let (theirs, ours) = (place.qemu_img(&line), place.qcow2(&line));
            assert_eq!((theirs.code, ours.code), (code, code), "{args:?}: {theirs:?} {ours:?}");
        }
    }
}

#[test]
fn an_image_in_use_is_neither_checked_nor_repaired() {
    let place = Place::new();
    image(&place);
    let socket = place.path("s").display().to_string();
    let _server = serve(&place, &["-f", "qcow2", "-t", "-k", &socket, "a.qcow2"], &socket);
    let unlocked = "driver=qcow2,file.filename=a.qcow2,file.locking=off";
    for (line, code) in [
        (&["check", "a.qcow2"][..], 1),
        (&["check", "-r", "leaks", "a.qcow2"], 1),
        (&["check", "-r", "all", "a.qcow2"], 1),
        (&["check", "-U", "a.qcow2"], 0),
        (&["check", "-U", "-r", "all", "a.qcow2"], 1),
        (&["check", "--image-opts", unlocked], 0),
    ] {
        let (theirs, ours) = (place.qemu_img(line), place.qcow2(line));
        assert_eq!((theirs.code, ours.code), (code, code), "{line:?}: {theirs:?} {ours:?}");
    }
}

#[test]
fn options_that_mean_nothing_here_are_taken_and_unknown_ones_named() {
    let place = Place::new();
    image(&place);
    for (option, code) in [
        ("discard=unmap", 0),
        ("cache.direct=on", 0),
        ("cache.no-flush=on", 0),
        ("file.cache.direct=on", 0),
        ("file.aio=threads", 0),
        ("file.aio-max-batch=3", 0),
        ("file.drop-cache=off", 0),
        ("lazy-refcounts=on", 0),
        ("overlap-check=all", 0),
        ("overlap-check.template=none", 0),
        ("overlap-check.bitmap-directory=off", 0),
        ("cache-size=2M", 0),
        ("l2-cache-size=1M", 0),
        ("l2-cache-entry-size=4096", 0),
        ("refcount-cache-size=1M", 0),
        ("cache-clean-interval=5", 0),
        ("pass-discard-request=on", 0),
        ("pass-discard-snapshot=on", 0),
        ("pass-discard-other=on", 0),
        ("discard-no-unref=on", 0),
        ("detect-zeroes=on", 0),
        ("node-name=top", 0),
        ("auto-read-only=on", 0),
        ("active=on", 0),
        ("cache.speed=on", 1),
        ("overlap-check.everything=on", 1),
        ("pass-discard-foo=on", 1),
        ("file.speed=on", 1),
        ("speed=on", 1),
        ("discard=often", 1),
        ("lazy-refcounts=maybe", 1),
        ("l2-cache-size=much", 1),
        ("overlap-check=some", 1),
    ] {
        let named = format!("driver=qcow2,file.filename=a.qcow2,{option}");
        let line = ["check", "--image-opts", &named];
        let (theirs, ours) = (place.qemu_img(&line), place.qcow2(&line));
        assert_eq!((theirs.code, ours.code), (code, code), "{option}: {theirs:?} {ours:?}");
        let name = option.split('=').next().unwrap();
        assert!(code == 0 || ours.err.contains(&format!("'{name}'")), "{ours:?}");
    }
}

#[test]
fn what_a_lost_table_led_to_is_not_freed() {
    let place = Place::new();
    place.qemu_img(&["create", "-q", "-f", "qcow2", "a", "16M"]).good();
    place.qemu_io("a", &["write -P 1 0 3M"]);
    place.qemu_img(&["bitmap", "--add", "a", "b"]).good();
    let whole = place.read("a");
    let l1 = be64(&whole, 40);
    let mut bytes = whole.clone();
    bytes[l1 + 6] ^= 0x10;
    std::fs::write(place.path("a"), &bytes).unwrap();
    for what in ["leaks", "all"] {
        place.qcow2(&["check", "-r", what, "a"]).bad(1, "a table of guest data leads astray");
        place.qcow2(&["check", "a"]).bad(2, "");
    }
    // Somebody who knows where the table is has everything again.
    let mut bytes = place.read("a");
    bytes[l1..l1 + 8].copy_from_slice(&whole[l1..l1 + 8]);
    std::fs::write(place.path("a"), &bytes).unwrap();
    place.qemu_img(&["check", "a"]).good();
    place.qemu_io("a", &["read -P 1 0 3M"]);
}
