//! `create` beside qemu-img's.

use crate::support::{Place, without};

/// What differs by nature: host blocks, and lengths that follow from where metadata lies.
const HOST: &[&str] = &["actual-size", "filename", "children"];

#[test]
fn create_says_the_same_and_makes_the_same_image() {
    let place = Place::new();
    for args in [
        &["-f", "qcow2", "a", "1G"][..],
        &["-f", "qcow2", "-o", "cluster_size=4k", "a", "10M"],
        &["-f", "qcow2", "-o", "size=1000", "a"],
        &["-f", "raw", "a", "3M"],
        &["-f", "raw", "-o", "preallocation=falloc", "a", "1M"],
        &["-f", "raw", "-o", "preallocation=full", "a", "1M"],
        &["a", "512"],
    ] {
        let mut line = vec!["create"];
        line.extend(args);
        let theirs = place.qemu_img(&line).good();
        let their_info = place.qemu_img(&["info", "-f", format(args), "--output=json", "a"]).good();
        std::fs::remove_file(place.path("a")).expect("it was made");
        let ours = place.qcow2(&line).good();
        assert_eq!(ours.out, theirs.out, "{args:?}");
        let our_info = place.qemu_img(&["info", "-f", format(args), "--output=json", "a"]).good();
        assert_eq!(without(our_info.json(), HOST), without(their_info.json(), HOST), "{args:?}");
        if format(args) == "qcow2" {
            place.qemu_img(&["check", "a"]).good();
        }
        std::fs::remove_file(place.path("a")).expect("it was made");
    }
}

fn format<'a>(args: &[&'a str]) -> &'a str {
    if args.first() == Some(&"-f") { args[1] } else { "raw" }
}

#[test]
fn create_takes_the_size_of_the_image_below() {
    let place = Place::new();
    place.qemu_img(&["create", "-f", "qcow2", "base", "7M"]).good();
    let line = ["create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top"];
    let theirs = place.qemu_img(&line).good();
    let ours = place.qcow2(&line).good();
    assert_eq!(ours.out, theirs.out);
    let info = place.qemu_img(&["info", "--output=json", "top"]).good().json();
    assert_eq!(info["virtual-size"], 7 << 20);
    assert_eq!(info["backing-filename"], "base");
    assert_eq!(info["backing-filename-format"], "qcow2");
}

#[test]
fn create_without_looking_below_needs_a_size() {
    let place = Place::new();
    let line = ["create", "-q", "-u", "-f", "qcow2", "-b", "missing", "-F", "raw", "top"];
    place.qcow2(&line).bad(1, "Image creation needs a size parameter");
    let mut sized = line.to_vec();
    sized.push("1M");
    assert_eq!(place.qcow2(&sized).good().out, "");
    let info = place.qemu_img(&["info", "-U", "--output=json", "top"]).good().json();
    assert_eq!(info["backing-filename"], "missing");
}

#[test]
fn create_replaces_a_file_that_nobody_has_open() {
    let place = Place::new();
    place.write_raw("a", 1 << 20, 1);
    place.qcow2(&["create", "-q", "-f", "qcow2", "a", "1M"]).good();
    place.qemu_img(&["check", "a"]).good();
    let zero = place.qcow2(&["dd", "if=a", "of=b"]).good();
    assert_eq!(zero.out, "");
    assert!(place.read("b").iter().all(|byte| *byte == 0));
}

#[test]
fn create_lists_the_options_of_a_format() {
    let place = Place::new();
    for format in ["qcow2", "raw"] {
        let line = ["create", "-f", format, "-o", "help"];
        let (ours, theirs) = (place.qcow2(&line).good(), place.qemu_img(&line).good());
        assert_eq!(ours.out.lines().next(), theirs.out.lines().next());
        // Of options that belong to the file qemu tells where there is a name.
        let theirs = place.qemu_img(&[&line[..], &["name"]].concat()).good();
        let names = |text: &str| -> Vec<String> {
            let lines = text.lines().filter(|line| line.starts_with("  "));
            lines.filter_map(|line| line.split('=').next()).map(str::to_owned).collect()
        };
        let theirs = names(&theirs.out);
        for name in names(&ours.out) {
            assert!(theirs.contains(&name), "{name} is not in {theirs:?}");
        }
    }
}

#[test]
fn images_of_every_kind_are_those_that_qemu_makes() {
    let place = Place::new();
    for options in [
        "compat=0.10",
        "compat=v3,lazy_refcounts=on",
        "refcount_bits=1",
        "refcount_bits=64,cluster_size=2M",
        "extended_l2=on",
        "compression_type=zstd",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
        "data_file=a.data",
        "data_file=a.data,data_file_raw=on",
    ] {
        let line = ["create", "-f", "qcow2", "-o", options, "a", "8M"];
        let clean = || {
            for name in ["a", "a.data"] {
                let _ = std::fs::remove_file(place.path(name));
            }
        };
        let theirs = place.qemu_img(&line).good();
        let their_info = place.qemu_img(&["info", "--output=json", "a"]).good().json();
        clean();
        let ours = place.qcow2(&line).good();
        assert_eq!(ours.out, theirs.out, "{options}");
        let our_info = place.qemu_img(&["info", "--output=json", "a"]).good().json();
        assert_eq!(without(our_info, HOST), without(their_info, HOST), "{options}");
        place.qemu_img(&["check", "a"]).good();
        place.qemu_io("a", &["write -P 7 1M 1M", "read -P 7 1M 1M", "read -P 0 0 1M"]);
        clean();
    }
}

#[test]
fn values_that_no_image_can_have_are_refused() {
    let place = Place::new();
    for options in [
        "cluster_size=100",
        "cluster_size=4M",
        "refcount_bits=3",
        "refcount_bits=128",
        "compat=0.10,lazy_refcounts=on",
        "compat=0.9",
        "compat=0.10,compression_type=zstd",
        "compression_type=lz4",
        "extended_l2=on,cluster_size=4k",
        "preallocation=some",
        "data_file_raw=on",
        "encrypt.format=luks",
        "encrypt.cipher-alg=aes-256",
        "encrypt.format=rot13",
        "bad=1",
        "size=2M",
    ] {
        let line = ["create", "-f", "qcow2", "-o", options, "a", "8M"];
        let (ours, theirs) = (place.qcow2(&line), place.qemu_img(&line));
        assert_eq!(ours.code, 1, "{options}: {ours:?}");
        // qemu-img takes encrypt.* without a format, and makes an image that is not encrypted.
        assert!(
            theirs.code == 1 || options == "encrypt.cipher-alg=aes-256",
            "{options}: {theirs:?}"
        );
        assert!(ours.err.starts_with("qcow2: a: "), "{ours:?}");
        let left = place.path("a");
        assert!(theirs.code == 0 || !crate::support::exists(&left) || ours.code == 1, "{options}");
        let _ = std::fs::remove_file(left);
    }
}

#[test]
fn an_encrypted_image_opens_with_its_passphrase_in_both_programs() {
    let place = Place::new();
    std::fs::write(place.path("secret"), "open sesame\n").unwrap();
    let object = "secret,id=s,data=open sesame";
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let line = ["create", "-f", "qcow2", "--object", object, "-o", options, "a", "8M"];
    let theirs = place.qemu_img(&line).good();
    let ours = place.qcow2(&line).good();
    assert_eq!(ours.out, theirs.out);
    let encrypted = "driver=qcow2,encrypt.key-secret=s,file.filename=a";
    place.tool(
        "qemu-io",
        &["--object", object, "--image-opts", "-c", "write -P 9 1M 64k", encrypted],
    );
    place.write_raw("plain.raw", 8 << 20, 3);
    let line = ["convert", "--passphrase-file", "secret", "a", "a.raw"];
    place.qcow2(&line).good();
    let bytes = place.read("a.raw");
    assert_eq!(bytes[1 << 20..(1 << 20) + 65536], [9; 65536]);
    place.qcow2(&["convert", "a", "b.raw"]).bad(1, "passphrase");
    let line = ["convert", "-n", "-f", "raw", "-O", "qcow2", "--object", object, "plain.raw", "a"];
    place.qcow2(&line).good();
    let line = [
        "compare",
        "--object",
        object,
        "--image-opts",
        encrypted,
        "driver=raw,file.filename=plain.raw",
    ];
    place.qemu_img(&line).good();
    place.qcow2(&line).good();
    let text = |answer: crate::support::Answer| answer.good().out;
    assert_eq!(text(place.qcow2(&["info", "a"])), text(place.qemu_img(&["info", "a"])));
    let json = |answer: crate::support::Answer| answer.good().json();
    let line = ["info", "--output=json", "a"];
    assert_eq!(json(place.qcow2(&line)), json(place.qemu_img(&line)));
}

#[test]
fn references_that_nobody_would_follow_are_not_written_down() {
    let place = Place::new();
    for options in [
        "backing_file=json:{\"driver\":\"qcow2\"},backing_fmt=qcow2",
        "backing_file=nbd://localhost/disk,backing_fmt=raw",
        "data_file=json:{}",
    ] {
        for flags in [&[][..], &["-u"]] {
            let line = [&["create", "-f", "qcow2", "-o", options], flags, &["a", "1M"]].concat();
            place.qcow2(&line).bad(1, "protocols or json: names");
            assert!(!crate::support::exists(&place.path("a")), "{options}");
        }
    }
}

#[test]
fn a_name_with_a_colon_stands_behind_file() {
    let place = Place::new();
    place.qcow2(&["create", "-f", "qcow2", "file:a:b", "1M"]).good();
    place.qemu_img(&["check", "file:a:b"]).good();
    assert!(crate::support::exists(&place.path("a:b")));
    place.qcow2(&["create", "-f", "qcow2", "a:b", "1M"]).bad(1, "Unknown protocol 'a'");
}

#[test]
fn a_missing_backing_file_is_told_before_its_format() {
    let place = Place::new();
    let line = ["create", "-f", "qcow2", "-b", "never", "a", "1M"];
    let theirs = place.qemu_img(&line).err.replace("qemu-img: ", "");
    assert_eq!(place.qcow2(&line).err.replace("qcow2: ", ""), theirs);
}

#[test]
fn an_image_over_an_encrypted_one_needs_no_passphrase() {
    let place = Place::new();
    let object = "secret,id=s,data=open sesame";
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let line = ["create", "-q", "-f", "qcow2", "--object", object, "-o", options, "base", "3M"];
    place.qemu_img(&line).good();
    let line = ["create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "a"];
    assert_eq!(place.qcow2(&line).good().out, place.qemu_img(&line).good().out);
}

#[test]
fn a_passphrase_makes_no_image_that_is_not_encrypted() {
    let place = Place::new();
    std::fs::write(place.path("p"), "open sesame\n").unwrap();
    for format in ["qcow2", "raw"] {
        let line = ["create", "-f", format, "--passphrase-file", "p", "a", "1M"];
        let answer = place.qcow2(&line);
        answer.bad(1, "-f qcow2 -o encrypt.format=luks, or leave --passphrase-file out");
        assert!(!crate::support::exists(&place.path("a")), "{format}");
    }
    // qemu-img makes an image that is not encrypted, and does not say so.
    let line = ["create", "-f", "qcow2", "--object", "secret,id=s,file=p", "a", "1M"];
    place.qemu_img(&line).good();
    let answer = place.qcow2(&line).good();
    assert!(answer.err.contains("the new image is not encrypted"), "{answer:?}");
    let options = "encrypt.format=luks,encrypt.iter-time=10";
    let line = ["create", "-f", "qcow2", "-o", options, "--passphrase-file", "p", "a", "1M"];
    place.qcow2(&line).good();
    assert!(place.qemu_img(&["info", "a"]).good().out.contains("encrypted: yes"));
}

#[test]
fn the_secret_that_is_named_opens_an_image_and_no_other_one() {
    let place = Place::new();
    let [right, wrong] = ["secret,id=s0,data=open sesame", "secret,id=s1,data=open barley"];
    let options = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10";
    let line = ["create", "-f", "qcow2", "--object", right, "-o", options, "a", "1M"];
    place.qemu_img(&line).good();
    let convert = |id: &str, objects: &[&str]| {
        let mut line = vec!["convert"];
        line.extend(objects.iter().flat_map(|object| ["--object", object]));
        let image = format!("driver=qcow2,encrypt.key-secret={id},file.filename=a");
        line.extend(["--image-opts", &image, "-O", "raw", "o"]);
        (place.qcow2(&line), place.qemu_img(&line))
    };
    for (id, objects) in
        [("s1", &[right][..]), ("s1", &[right, wrong]), ("s2", &[right, wrong]), ("s0", &[wrong])]
    {
        let (ours, theirs) = convert(id, objects);
        assert_eq!((ours.code, theirs.code), (1, 1), "{id}: {ours:?} {theirs:?}");
        let missing = format!("No secret with id '{id}'");
        assert_eq!(ours.err.contains(&missing), theirs.err.contains(&missing), "{id}: {ours:?}");
    }
    let (ours, theirs) = convert("s0", &[wrong, right]);
    assert_eq!((ours.code, theirs.code), (0, 0), "{ours:?} {theirs:?}");
    // The commands that fold chains open images on their own.
    for command in ["commit", "rebase"] {
        let image = "driver=qcow2,encrypt.key-secret=s1,file.filename=a";
        let mut line = vec![command, "--object", right, "--image-opts", image];
        line.extend(if command == "rebase" { &["-b", ""][..] } else { &[] });
        place.qcow2(&line).bad(1, "No secret with id 's1'");
    }
}

#[test]
fn the_work_for_a_passphrase_is_bounded_in_parts_of_seconds() {
    let place = Place::new();
    std::fs::write(place.path("p"), "open sesame").unwrap();
    let options = "encrypt.format=luks,encrypt.iter-time=10";
    let line = ["create", "-f", "qcow2", "-o", options, "--passphrase-file", "p", "a", "1M"];
    place.qcow2(&line).good();
    let convert = |seconds: &str| {
        let bound = ["--unlock-seconds", seconds, "a", "-O", "raw", "o"];
        place.qcow2(&[&["convert", "--passphrase-file", "p"], &bound[..]].concat())
    };
    convert("0.5").good();
    convert("0.0001").bad(1, "(--unlock-seconds allows more)");
    convert("often").bad(1, "not a number of seconds, like 20 or 0.5");
}

#[test]
fn what_can_be_judged_before_is_judged_before_a_file_is_touched() {
    let place = Place::new();
    place.write_raw("old", 1 << 20, 7);
    place.qemu_img(&["create", "-q", "-f", "qcow2", "source", "1M"]).good();
    let before = place.read("old");
    for (format, options) in [
        ("raw", "preallocation=bogus"),
        ("raw", "preallocation=metadata"),
        ("qcow2", "preallocation=bogus"),
        ("qcow2", "cluster_size=512,extended_l2=on"),
        ("qcow2", "refcount_bits=32,compat=0.10"),
        ("qcow2", "cluster_size=3"),
    ] {
        let answer = place.qcow2(&["create", "-f", format, "-o", options, "old", "2M"]);
        assert_eq!(answer.code, 1, "{options}: {answer:?}");
        assert_eq!(answer.err.matches("old").count(), 1, "{answer:?}");
        let line = ["convert", "-O", format, "-o", options, "source", "old"];
        assert_eq!(place.qcow2(&line).code, 1, "{options}");
        assert!(place.read("old") == before, "{format} {options}");
    }
}

#[test]
fn a_reference_that_leads_outside_is_told_when_it_is_made() {
    let place = Place::new();
    for folder in ["in", "out"] {
        std::fs::create_dir(place.path(folder)).unwrap();
    }
    place.write_raw("out/base", 1 << 20, 7);
    place.write_raw("in/base", 1 << 20, 7);
    let outside = "will need --allow-references";
    let create =
        |more: &[&str]| place.qcow2(&[&["create", "-q", "-f", "qcow2"], more].concat()).good().err;
    for (number, allow) in [&[][..], &["--allow-references", "any"]].into_iter().enumerate() {
        let image = |name: &str| format!("in/{name}{number}");
        let data = format!("data_file=../out/data{number}");
        let far_below = create(&[allow, &["-b", "../out/base", "-F", "raw", &image("a")]].concat());
        let far_data = create(&[allow, &["-o", &data, &image("b"), "1M"]].concat());
        assert_eq!(far_below.contains(outside), allow.is_empty(), "{far_below}");
        assert_eq!(far_data.contains(outside), allow.is_empty(), "{far_data}");
        let data = format!("data_file=data{number}");
        assert_eq!(create(&[allow, &["-b", "base", "-F", "raw", &image("c")]].concat()), "");
        assert_eq!(create(&[allow, &["-o", &data, &image("d"), "1M"]].concat()), "");
    }
}
