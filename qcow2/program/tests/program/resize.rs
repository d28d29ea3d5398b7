//! `resize` and `amend` beside qemu-img's.

use crate::support::{Place, without};

const HOST: &[&str] = &["actual-size", "filename", "children"];

#[test]
fn disks_grow_and_shrink_as_with_qemu() {
    let place = Place::new();
    for format in ["qcow2", "raw"] {
        for name in ["ours", "theirs"] {
            place.qemu_img(&["create", "-f", format, name, "8M"]).good();
        }
        for args in [
            &["16M"][..],
            &["+1M"],
            &["--preallocation=falloc", "+1M"],
            &["--shrink", "-2M"],
            &["-q", "--shrink", "1M"],
            &["3G"],
        ] {
            let (size, flags) = args.split_last().expect("a size");
            let line = |name: &'static str| {
                let mut line = vec!["resize", "-f", format];
                line.extend(flags);
                line.extend([name, *size]);
                line
            };
            let theirs = place.qemu_img(&line("theirs")).good();
            let ours = place.qcow2(&line("ours")).good();
            assert_eq!(ours.out, theirs.out, "{args:?}");
            let info = |name| {
                let line = ["info", "-f", format, "--output=json", name];
                without(place.qemu_img(&line).good().json(), HOST)
            };
            assert_eq!(info("ours"), info("theirs"), "{format} {args:?}");
        }
        if format == "qcow2" {
            place.qemu_img(&["check", "ours"]).good();
        }
    }
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    let place = Place::new();
    place.qemu_img(&["create", "-f", "qcow2", "a", "8M"]).good();
    for (args, text) in [
        (&["a", "1M"][..], "Use the --shrink option to perform a shrink operation."),
        (&["a", "-8M"], "New image size must be positive"),
        (&["a", "-9M"], "New image size must be positive"),
        (&["a", "0"], "New image size must be positive"),
        (&["--preallocation=full", "--shrink", "a", "1M"], "Preallocation can only be used"),
        (&["a", "9000001"], "multiple of 512"),
        (&["a", "1x"], "1x"),
        (&["a"], ""),
        (&["--preallocation=some", "a", "9M"], "some"),
    ] {
        let mut line = vec!["resize"];
        line.extend(args);
        place.qcow2(&line).bad(1, text);
        assert_eq!(place.qemu_img(&line).code, 1, "{args:?}");
    }
    let info = place.qemu_img(&["info", "--output=json", "a"]).good().json();
    assert_eq!(info["virtual-size"], 8 << 20);
}

#[test]
fn options_are_amended_as_with_qemu() {
    let place = Place::new();
    for name in ["ours", "theirs"] {
        place.qemu_img(&["create", "-f", "qcow2", name, "8M"]).good();
        place.qemu_io(name, &["write -P 4 1M 1M", "write -z 3M 1M"]);
    }
    for options in [
        "lazy_refcounts=on",
        "lazy_refcounts=off",
        "refcount_bits=32",
        "refcount_bits=16",
        "size=9M",
        "compat=0.10",
        "compat=v3",
        "refcount_bits=8",
    ] {
        let line = |name| ["amend", "-f", "qcow2", "-o", options, name];
        place.qemu_img(&line("theirs")).good();
        assert_eq!(place.qcow2(&line("ours")).good().out, "");
        let info = |name| {
            let line = ["info", "--output=json", name];
            without(place.qemu_img(&line).good().json(), HOST)
        };
        assert_eq!(info("ours"), info("theirs"), "{options}");
        place.qemu_img(&["check", "ours"]).good();
    }
    place.qemu_img(&["compare", "ours", "theirs"]).good();
}

#[test]
fn options_that_cannot_be_amended_are_refused() {
    let place = Place::new();
    place.qemu_img(&["create", "-f", "qcow2", "a", "8M"]).good();
    for args in [
        &["a"][..],
        &["-o", "cluster_size=4k", "a"],
        &["-o", "bad=1", "a"],
        &["-o", "backing_file=b,backing_fmt=raw", "a"],
        &["-o", "refcount_bits=3", "a"],
        &["-o", "lazy_refcounts=on,compat=0.10", "a"],
        &["-f", "raw", "-o", "size=1M", "a"],
        &["-o", "compat=1.1"],
    ] {
        let mut line = vec!["amend"];
        line.extend(args);
        let (ours, theirs) = (place.qcow2(&line), place.qemu_img(&line));
        assert_eq!((ours.code, theirs.code), (1, 1), "{args:?}: {ours:?} {theirs:?}");
    }
    let help = place.qcow2(&["amend", "-o", "help", "-f", "qcow2"]).good().out;
    assert!(help.starts_with("Amend options for 'qcow2':"), "{help}");
    assert!(!help.contains("cluster_size"), "{help}");
}

#[test]
fn passphrases_are_added_and_removed() {
    let place = Place::new();
    let [old, new] = ["secret,id=old,data=first", "secret,id=new,data=second"];
    let options = "encrypt.format=luks,encrypt.key-secret=old,encrypt.iter-time=10";
    let line = ["create", "-q", "-f", "qcow2", "--object", old, "-o", options, "a", "1M"];
    place.qcow2(&line).good();
    let opens = |id: &str, object: &str| {
        let image = format!("driver=qcow2,encrypt.key-secret={id},file.filename=a");
        place.qemu_img(&["map", "--object", object, "--image-opts", &image]).code == 0
    };
    let add = "encrypt.state=active,encrypt.new-secret=new,encrypt.iter-time=10";
    place.qcow2(&["amend", "--object", old, "--object", new, "-o", add, "a"]).good();
    assert!(opens("old", old) && opens("new", new));
    let remove = "encrypt.state=inactive,encrypt.old-secret=old";
    place.qcow2(&["amend", "--object", old, "--object", new, "-o", remove, "a"]).good();
    assert!(!opens("old", old) && opens("new", new));
    let last = "encrypt.state=inactive,encrypt.old-secret=new";
    assert_eq!(place.qcow2(&["amend", "--object", new, "-o", last, "a"]).code, 1);
    assert!(opens("new", new));
}

#[test]
fn what_is_made_in_advance_behind_a_short_image_hides_a_long_backing_file() {
    let place = Place::new();
    place.write_raw("base", 128 << 10, 3);
    for mode in ["metadata", "falloc", "full"] {
        for (from, to) in [
            ("31k", "32k"),
            ("31k", "64k"),
            ("31k", "96k"),
            ("31k", "128k"),
            ("31k", "200k"),
            ("33k", "96k"),
            ("64k", "128k"),
            ("96k", "200k"),
            // Nothing shows through here.
            ("128k", "256k"),
            ("130k", "200k"),
        ] {
            let line = ["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw"];
            for name in ["ours", "theirs"] {
                place.qemu_img(&[&line[..], &[name, from]].concat()).good();
            }
            let mode = format!("--preallocation={mode}");
            place.qcow2(&["resize", &mode, "ours", to]).good();
            place.qemu_img(&["resize", &mode, "theirs", to]).good();
            let compared = place.qemu_img(&["compare", "-s", "ours", "theirs"]);
            assert_eq!(compared.code, 0, "{mode} {from} {to}: {compared:?}");
            place.qemu_img(&["check", "ours"]).good();
        }
    }
}

#[test]
fn a_resize_without_room_leaves_the_size_and_the_space_as_they_were() {
    let place = Place::new();
    std::fs::create_dir(place.path("tiny")).unwrap();
    let program = env!("CARGO_BIN_EXE_qcow2");
    for (format, mode) in
        [("raw", "full"), ("raw", "falloc"), ("qcow2", "full"), ("qcow2", "falloc")]
    {
        // What is mounted is seen by this shell alone, and goes with it.
        let script = format!(
            "set -e; mount -t tmpfs -o size=24m tmpfs tiny; cd tiny
            qemu-img create -q -f {format} a 4M
            stat -c %s a
            {program} resize -f {format} --preallocation={mode} a 200M && exit 7
            stat -c %s a; du -m a | cut -f 1
            qemu-img info -f {format} --output=json a | grep virtual-size | tail -n 1
            test {format} = raw || qemu-img check -q a"
        );
        let answer = place.tool("unshare", &["--mount", "sh", "-c", &script]);
        assert!(answer.err.contains("No space left on device"), "{answer:?}");
        let told: Vec<_> = answer.out.lines().map(str::trim).collect();
        let [before, after, space_mib, size] = told.as_slice() else { panic!("{answer:?}") };
        let (before, after): (u64, u64) = (before.parse().unwrap(), after.parse().unwrap());
        // The tables of a qcow2 image may stay longer.
        let more = if format == "raw" { 0 } else { 1 << 20 };
        assert!((before..=before + more).contains(&after), "{format} {mode}: {answer:?}");
        assert!(space_mib.parse::<u64>().unwrap() <= 1, "{format} {mode}: {answer:?}");
        assert!(size.contains("4194304"), "{format} {mode}: {answer:?}");
    }
}
