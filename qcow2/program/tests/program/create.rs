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
        let theirs = place.qemu_img(&line).good();
        let ours = place.qcow2(&line).good();
        assert_eq!(ours.out.lines().next(), theirs.out.lines().next());
        let names = |text: &str| -> Vec<String> {
            let lines = text.lines().filter(|line| line.starts_with("  "));
            lines.filter_map(|line| line.split('=').next()).map(str::to_owned).collect()
        };
        let theirs = names(&theirs.out);
        for name in names(&ours.out) {
            // `preallocation` of raw belongs to qemu's protocol layer, which it lists with a file name only.
            assert!(theirs.contains(&name) || format == "raw", "{name} is not in {theirs:?}");
        }
    }
}
