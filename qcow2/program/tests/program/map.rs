//! `map` beside qemu-img's.

use crate::support::Place;

#[test]
fn map_is_the_same_list_and_the_same_table() {
    let place = Place::new();
    place.qemu_img(&["create", "-f", "qcow2", "base.qcow2", "64M"]).good();
    place.qemu_io("base.qcow2", &["write -P 1 0 1M", "write -P 2 10M 3M", "write -z 40M 1M"]);
    let line = ["create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", "80M"];
    place.qemu_img(&line).good();
    place.qemu_io("top.qcow2", &["write -P 4 11M 100k", "write -z 512k 1M", "write -P 5 30M 64k"]);
    std::fs::create_dir(place.path("sub")).unwrap();
    let line = ["create", "-f", "qcow2", "-b", "../top.qcow2", "-F", "qcow2", "sub/third.qcow2"];
    place.qemu_img(&line).good();
    place.qemu_io("sub/third.qcow2", &["write -P 4 70M 1M", "discard 0 64k"]);
    place.qemu_img(&["convert", "-c", "-O", "qcow2", "top.qcow2", "small.qcow2"]).good();
    let line = ["create", "-f", "qcow2", "-o", "extended_l2=on", "parts.qcow2", "8M"];
    place.qemu_img(&line).good();
    place.qemu_io("parts.qcow2", &["write 6k 4k", "write 1M 2k", "write -z 1100k 4k"]);
    let line = ["create", "-f", "qcow2", "-o", "data_file=d.data", "data.qcow2", "8M"];
    place.qemu_img(&line).good();
    place.qemu_io("data.qcow2", &["write 1M 1M"]);
    let mut raw = vec![0; 1 << 20];
    raw[65536..131_072].fill(7);
    std::fs::write(place.path("a.raw"), raw).unwrap();
    for args in [
        &["base.qcow2"][..],
        &["top.qcow2"],
        &["--start-offset=11M", "--max-length=20M", "top.qcow2"],
        &["-s", "500k", "-l", "100k", "top.qcow2"],
        &["parts.qcow2"],
        &["data.qcow2"],
        &["-f", "raw", "a.raw"],
        &["--allow-references", "any", "sub/third.qcow2"],
    ] {
        let line = |output, ours: bool| {
            let mut line = vec!["map", output];
            let theirs = args.iter().filter(|word| !matches!(**word, "--allow-references" | "any"));
            if ours {
                line.extend(args)
            } else {
                line.extend(theirs)
            }
            line
        };
        let json = [
            place.qcow2(&line("--output=json", true)),
            place.qemu_img(&line("--output=json", false)),
        ];
        let [ours, theirs] = json.map(|answer| answer.good().out);
        assert_eq!(ours, theirs, "{args:?}");
        let text = [
            place.qcow2(&line("--output=human", true)),
            place.qemu_img(&line("--output=human", false)),
        ];
        let [ours, theirs] = text.map(|answer| answer.good().out);
        assert_eq!(ours, theirs, "{args:?}");
    }
    let line = ["map", "--output=json", "small.qcow2"];
    assert_eq!(place.qcow2(&line).good().out, place.qemu_img(&line).good().out);
    let text = "File contains external, encrypted or compressed clusters.";
    place.qcow2(&["map", "small.qcow2"]).bad(1, text);
    place.qemu_img(&["map", "small.qcow2"]).bad(1, text);
}

#[test]
fn references_are_confined_unless_the_user_says_otherwise() {
    let place = Place::new();
    std::fs::create_dir(place.path("sub")).unwrap();
    place.qemu_img(&["create", "-f", "qcow2", "base.qcow2", "1M"]).good();
    let line = ["create", "-f", "qcow2", "-b", "../base.qcow2", "-F", "qcow2", "sub/top.qcow2"];
    let answer = place.qcow2(&line).good();
    assert!(answer.err.contains("--allow-references"), "{answer:?}");
    place.qcow2(&["map", "sub/top.qcow2"]).bad(1, "--allow-references");
    place.qcow2(&["map", "--allow-references", "any", "sub/top.qcow2"]).good();
    place.qcow2(&["map", "--allow-references", ".", "sub/top.qcow2"]).good();
    place.qcow2(&["info", "--backing-chain", "sub/top.qcow2"]).bad(1, "--allow-references");
    let line = ["info", "--backing-chain", "--allow-references", "any", "sub/top.qcow2"];
    place.qcow2(&line).good();
}

#[test]
fn what_a_vmdk_file_does_not_tell_is_told_as_that() {
    let place = Place::new();
    place.write_raw("a.raw", 1 << 20, 1);
    place.qemu_img(&["convert", "-f", "raw", "-O", "vmdk", "a.raw", "a.vmdk"]).good();
    place
        .qemu_img(&["create", "-q", "-f", "qcow2", "-b", "a.vmdk", "-F", "vmdk", "a.qcow2"])
        .good();
    for line in [&["map", "-f", "vmdk", "a.vmdk"][..], &["map", "a.qcow2"]] {
        place.qcow2(line).bad(1, "a.vmdk: where in a vmdk file bytes lie is not told");
        place.qcow2(&[line, &["--output=json"]].concat()).good();
    }
    place.qcow2(&["check", "-f", "vmdk", "a.vmdk"]).bad(63, "only qcow2 does");
}
