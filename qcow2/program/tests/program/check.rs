//! `check` beside qemu-img's: the same verdicts, numbers and exit codes.

use crate::support::Place;

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
