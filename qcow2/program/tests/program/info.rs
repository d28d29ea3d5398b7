//! `info` beside qemu-img's, of images that qemu-img made.

use crate::support::Place;

#[test]
fn info_is_the_same_document_and_the_same_text() {
    let place = Place::new();
    place.qemu_img(&["create", "-f", "qcow2", "plain.qcow2", "1G"]).good();
    place
        .qemu_img(&["create", "-f", "qcow2", "-o", "cluster_size=512", "small.qcow2", "1M"])
        .good();
    place
        .qemu_img(&["create", "-f", "qcow2", "-b", "plain.qcow2", "-F", "qcow2", "top.qcow2"])
        .good();
    place.write_raw("disk.raw", 100_000, 1);
    for (name, options) in [
        ("old.qcow2", "compat=0.10"),
        ("lazy.qcow2", "lazy_refcounts=on,refcount_bits=64"),
        ("new.qcow2", "extended_l2=on,compression_type=zstd"),
        ("data.qcow2", "data_file=data.raw,data_file_raw=on"),
    ] {
        place.qemu_img(&["create", "-f", "qcow2", "-o", options, name, "64M"]).good();
    }
    place.qemu_img(&["create", "-f", "qcow2", "full.qcow2", "64M"]).good();
    for bitmap in ["b0", "second one"] {
        place.qemu_img(&["bitmap", "--add", "full.qcow2", bitmap]).good();
    }
    place.qemu_img(&["bitmap", "--disable", "full.qcow2", "b0"]).good();
    for snapshot in ["one", "with a long name that passes the column", "3"] {
        place.qemu_img(&["snapshot", "-c", snapshot, "full.qcow2"]).good();
    }
    std::fs::create_dir(place.path("sub")).unwrap();
    place.qemu_img(&["create", "-f", "qcow2", "sub/base.qcow2", "1M"]).good();
    place
        .qemu_img(&["create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "sub/top.qcow2"])
        .good();
    for args in [
        &["plain.qcow2"][..],
        &["small.qcow2"],
        &["top.qcow2"],
        &["--backing-chain", "top.qcow2"],
        &["-f", "raw", "disk.raw"],
        &["-f", "raw", "plain.qcow2"],
        &["old.qcow2"],
        &["lazy.qcow2"],
        &["new.qcow2"],
        &["full.qcow2"],
        &["sub/top.qcow2"],
        &["--backing-chain", "sub/top.qcow2"],
        &["--image-opts", "driver=qcow2,file.filename=plain.qcow2"],
    ] {
        let line = |extra: &'static str| {
            let mut line = vec!["info", extra];
            line.extend(args);
            line
        };
        let (human, json) = (line("--output=human"), line("--output=json"));
        assert_eq!(place.qcow2(&human).good().out, place.qemu_img(&human).good().out, "{args:?}");
        let (ours, theirs) = (place.qcow2(&json).good(), place.qemu_img(&json).good());
        assert_eq!(ours.json(), theirs.json(), "{args:?}");
    }
}

#[test]
fn info_tells_of_a_data_file_without_opening_it() {
    let place = Place::new();
    let options = "data_file=data.raw,data_file_raw=on";
    place.qemu_img(&["create", "-f", "qcow2", "-o", options, "data.qcow2", "64M"]).good();
    let line = ["info", "--output=json", "data.qcow2"];
    let (ours, theirs) = (place.qcow2(&line).good().json(), place.qemu_img(&line).good().json());
    assert_eq!(ours["format-specific"], theirs["format-specific"]);
    std::fs::remove_file(place.path("data.raw")).unwrap();
    let again = place.qcow2(&line).good().json();
    assert_eq!(again, ours);
}

#[test]
fn info_tells_what_it_can_of_an_image_with_a_broken_part() {
    let place = Place::new();
    place.qemu_img(&["create", "-f", "qcow2", "a.qcow2", "64M"]).good();
    place.qemu_img(&["snapshot", "-c", "one", "a.qcow2"]).good();
    let mut bytes = place.read("a.qcow2");
    // The snapshot table lies far behind the end.
    bytes[64..72].copy_from_slice(&(1_u64 << 40).to_be_bytes());
    std::fs::write(place.path("a.qcow2"), bytes).unwrap();
    let answer = place.qcow2(&["info", "a.qcow2"]).bad(1, "a.qcow2");
    assert!(answer.out.contains("virtual size: 64 MiB"), "{answer:?}");
}

#[test]
fn info_of_an_export_is_that_of_a_raw_disk() {
    let place = Place::new();
    place.write_raw("disk.raw", 1 << 20, 1);
    let socket = place.path("s").display().to_string();
    let _server = crate::support::serve(
        &place,
        &["-r", "-f", "raw", "-t", "-k", &socket, "disk.raw"],
        &socket,
    );
    let uri = format!("nbd+unix:///?socket={socket}");
    let ours = place.qcow2(&["info", "--output=json", &uri]).good().json();
    assert_eq!(ours["virtual-size"], 1 << 20);
    assert_eq!(ours["format"], "raw");
    assert_eq!(ours["children"][0]["info"]["format"], "nbd");
    let text = place.qcow2(&["info", &uri]).good().out;
    assert!(text.contains("disk size: unavailable"), "{text}");
}
