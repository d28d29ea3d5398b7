//! `compare` beside qemu-img's.

use crate::support::Place;

#[test]
fn compare_says_the_same_and_ends_with_the_same_code() {
    let place = Place::new();
    place.write_raw("a.raw", 3 << 20, 1);
    let mut bytes = place.read("a.raw");
    // The start of a sector: qemu-img rounds down to one.
    bytes[3906 * 512] ^= 0xf0;
    std::fs::write(place.path("b.raw"), &bytes).unwrap();
    bytes.truncate(1 << 20);
    std::fs::write(place.path("short.raw"), &bytes).unwrap();
    bytes.resize(2 << 20, 0);
    std::fs::write(place.path("padded.raw"), &bytes).unwrap();
    place.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "a.raw", "a.qcow2"]).good();
    place
        .qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-S", "0", "padded.raw", "full.qcow2"])
        .good();
    for args in [
        &["-f", "raw", "-F", "raw", "a.raw", "a.raw"][..],
        &["-f", "raw", "-F", "qcow2", "a.raw", "a.qcow2"],
        &["-f", "raw", "-F", "raw", "a.raw", "b.raw"],
        &["-f", "raw", "-F", "qcow2", "b.raw", "a.qcow2"],
        &["-f", "raw", "-F", "raw", "a.raw", "short.raw"],
        &["-f", "raw", "-F", "raw", "short.raw", "padded.raw"],
        &["-f", "raw", "-F", "raw", "padded.raw", "short.raw"],
        &["-s", "-f", "raw", "-F", "raw", "padded.raw", "short.raw"],
        &["-s", "-f", "raw", "-F", "qcow2", "padded.raw", "full.qcow2"],
        &["-q", "-f", "raw", "-F", "raw", "a.raw", "b.raw"],
        &["-f", "raw", "-F", "raw", "a.raw", "missing"],
    ] {
        let mut line = vec!["compare"];
        line.extend(args);
        let (ours, theirs) = (place.qcow2(&line), place.qemu_img(&line));
        assert_eq!((ours.code, &ours.out), (theirs.code, &theirs.out), "{args:?}: {ours:?}");
    }
}

#[test]
fn compare_tells_the_very_byte() {
    let place = Place::new();
    place.write_raw("a.raw", 3 << 20, 1);
    let mut bytes = place.read("a.raw");
    bytes[2_000_001] ^= 0xf0;
    std::fs::write(place.path("b.raw"), &bytes).unwrap();
    let answer = place.qcow2(&["compare", "-f", "raw", "-F", "raw", "a.raw", "b.raw"]);
    assert_eq!((answer.code, answer.out.as_str()), (1, "Content mismatch at offset 2000001!\n"));
}

#[test]
fn compare_never_takes_misuse_for_a_difference() {
    let place = Place::new();
    assert_eq!(place.qcow2(&["compare", "a"]).code, 2);
    assert_eq!(place.qcow2(&["compare", "--bad", "a", "b"]).code, 2);
}

#[test]
fn progress_comes_in_the_lines_that_scripts_know() {
    let place = Place::new();
    place.write_raw("a.raw", 3 << 20, 1);
    let line = ["compare", "-p", "-f", "raw", "-F", "raw", "a.raw", "a.raw"];
    let (ours, theirs) = (place.qcow2(&line).good(), place.qemu_img(&line).good());
    for answer in [&ours, &theirs] {
        assert!(answer.out.starts_with("    (0.00/100%)\r"), "{answer:?}");
        assert!(answer.out.contains("    (100.00/100%)\r"), "{answer:?}");
        assert!(answer.out.contains("Images are identical."), "{answer:?}");
    }
    let quiet = place.qcow2(&["compare", "-p", "-q", "-f", "raw", "-F", "raw", "a.raw", "a.raw"]);
    assert_eq!(quiet.good().out, "");
}

#[test]
fn strictness_asks_how_bytes_are_stored_as_qemu_does() {
    let place = Place::new();
    for name in ["empty", "zeros", "low", "high", "kept"] {
        place.qemu_img(&["create", "-q", "-f", "qcow2", name, "4M"]).good();
    }
    place.qemu_io("zeros", &["write -z 1M 1M"]);
    for name in ["low", "kept"] {
        place.qemu_io(name, &["write -P 1 0 1M"]);
    }
    // The same bytes, elsewhere in the file.
    place.qemu_io("high", &["write -P 2 3M 64k", "write -P 1 0 1M", "discard 3M 64k"]);
    place.qemu_io("low", &["write -z 1M 1M"]);
    place.qemu_io("kept", &["write -P 3 1M 1M", "write -z 1M 1M"]);
    place.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "low", "-F", "qcow2", "over"]).good();
    place.qemu_img(&["convert", "-c", "-O", "qcow2", "low", "small"]).good();
    place.qemu_img(&["convert", "-O", "raw", "low", "low.raw"]).good();
    place.qemu_img(&["create", "-q", "-f", "raw", "empty.raw", "4M"]).good();
    for (first, second) in [
        ("empty", "zeros"),
        ("zeros", "empty"),
        ("empty", "empty.raw"),
        ("empty.raw", "empty.raw"),
        ("low", "low"),
        ("low", "kept"),
        ("low", "over"),
        ("low", "small"),
        ("low", "low.raw"),
        ("low.raw", "empty.raw"),
        ("low", "zeros"),
    ] {
        let format = |name: &str| if name.ends_with(".raw") { "raw" } else { "qcow2" };
        let line = ["compare", "-s", "-f", format(first), "-F", format(second), first, second];
        let (ours, theirs) = (place.qcow2(&line), place.qemu_img(&line));
        // qemu-img also counts whether a run reaches the end of the disk, and so names an earlier place.
        let words = |text: &str| text.replace(|letter: char| letter.is_ascii_digit(), "");
        let (our_words, their_words) = (words(&ours.out), words(&theirs.out));
        assert_eq!((ours.code, our_words), (theirs.code, their_words), "{line:?}: {ours:?}");
    }
    assert_eq!(place.qcow2(&["compare", "high", "low"]).code, 0);
}
