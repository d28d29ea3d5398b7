//! `bench` beside qemu-img's.

use crate::support::Place;

#[test]
fn bench_announces_the_same_and_completes() {
    let place = Place::new();
    place.qemu_img(&["create", "-f", "qcow2", "a.qcow2", "1M"]).good();
    for args in [
        &["-c", "100", "-d", "4"][..],
        &["-c", "100", "-s", "64k", "-S", "4k", "-o", "8k"],
        &["-w", "-c", "64", "-d", "8", "--pattern=0x41", "-t", "none"],
        &["-w", "-c", "64", "-d", "8", "--flush-interval=16"],
        &["-w", "-c", "64", "-d", "8", "--flush-interval=16", "--no-drain", "-t", "writethrough"],
    ] {
        let mut line = vec!["bench"];
        line.extend(args);
        line.push("a.qcow2");
        let head = |text: &str| -> Vec<String> {
            text.lines().filter(|line| line.starts_with("Sending")).map(str::to_owned).collect()
        };
        let (ours, theirs) = (place.qcow2(&line).good(), place.qemu_img(&line).good());
        assert_eq!(head(&ours.out), head(&theirs.out), "{args:?}");
        assert!(ours.out.contains("Run completed in "), "{ours:?}");
    }
    place.qemu_img(&["check", "a.qcow2"]).good();
    let bytes = place.qcow2(&["dd", "if=a.qcow2", "of=a.raw"]).good();
    assert_eq!(bytes.out, "");
    assert_eq!(place.read("a.raw")[..64 * 4096], [0x00; 64 * 4096]);
}

#[test]
fn bench_refuses_what_contradicts_itself() {
    let place = Place::new();
    place.qemu_img(&["create", "-f", "qcow2", "a.qcow2", "1M"]).good();
    let line = ["bench", "--flush-interval=16", "a.qcow2"];
    place.qcow2(&line).bad(1, "only available in write tests");
    let line = ["bench", "-w", "-d", "32", "--flush-interval=16", "a.qcow2"];
    place.qcow2(&line).bad(1, "can't be smaller than depth");
    place.qcow2(&["bench", "-s", "2M", "-c", "1", "a.qcow2"]).bad(1, "does not fit");
}

#[test]
fn bench_does_not_take_nothing_for_something() {
    let place = Place::new();
    place.qemu_img(&["create", "-f", "qcow2", "a.qcow2", "1M"]).good();
    for (args, text) in [(["-c", "0"], "request count"), (["-s", "0"], "buffer size")] {
        let line = ["bench", args[0], args[1], "a.qcow2"];
        place.qcow2(&line).bad(1, text);
        assert_eq!(place.qemu_img(&line).code, 1, "{line:?}");
    }
}
