//! `dd` beside qemu-img's.

use crate::support::Place;

#[test]
fn dd_copies_the_same_bytes() {
    let place = Place::new();
    place.write_raw("a.raw", 3 * 512 * 1024, 7);
    place.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "a.raw", "a.qcow2"]).good();
    for operands in [
        &["if=a.qcow2"][..],
        &["bs=1k", "count=3", "if=a.qcow2"],
        &["bs=1k", "skip=5", "if=a.qcow2"],
        &["bs=1k", "count=9", "skip=5", "if=a.qcow2"],
        &["bs=1M", "count=100000", "skip=1", "if=a.qcow2"],
        &["-f", "raw", "bs=64k", "count=2", "if=a.raw"],
        &["-O", "qcow2", "bs=64k", "count=2", "if=a.qcow2"],
        &["bs=1M", "skip=100", "if=a.qcow2"],
    ] {
        let run = |of: &'static str| {
            let mut line = vec!["dd"];
            line.extend(operands);
            line.push(of);
            line
        };
        place.qemu_img(&run("of=theirs")).good();
        place.qcow2(&run("of=ours")).good();
        if operands.contains(&"-O") {
            place.qemu_img(&["compare", "-s", "ours", "theirs"]).good();
        } else {
            assert_eq!(place.read("ours"), place.read("theirs"), "{operands:?}");
        }
    }
}

#[test]
fn dd_skips_behind_the_end_with_a_warning() {
    let place = Place::new();
    place.write_raw("a.raw", 1024, 7);
    let answer = place.qcow2(&["dd", "-f", "raw", "if=a.raw", "of=b", "skip=3"]).good();
    assert!(answer.err.contains("cannot skip to specified offset"), "{answer:?}");
    assert_eq!(place.read("b"), b"");
}
