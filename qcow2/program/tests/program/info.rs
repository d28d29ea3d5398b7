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
fn info_follows_a_chain_as_far_as_opening_does() {
    let place = Place::new();
    std::fs::create_dir(place.path("jail")).unwrap();
    place.qemu_img(&["create", "-f", "qcow2", "secret.qcow2", "77M"]).good();
    place.qemu_img(&["snapshot", "-c", "treasure", "secret.qcow2"]).good();
    place.write_raw("secret.raw", 65536, 1);
    std::os::unix::fs::symlink("../secret.qcow2", place.path("jail/link.qcow2")).unwrap();
    let socket = place.path("socket");
    let server = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    server.set_nonblocking(true).unwrap();
    let export = format!("nbd+unix:///e?socket={}", socket.display());
    for (name, format, text) in [
        ("../secret.qcow2", "qcow2", "outside"),
        ("link.qcow2", "qcow2", "outside"),
        ("../secret.raw", "raw", "outside"),
        ("/etc/passwd", "raw", "outside"),
        (export.as_str(), "raw", "protocols"),
        ("json:{\"driver\":\"null-co\"}", "raw", "protocols"),
    ] {
        let line = ["create", "-u", "-f", "qcow2", "-b", name, "-F", format, "jail/top", "1M"];
        place.qemu_img(&line).good();
        place.qcow2(&["info", "jail/top"]).good();
        for option in ["-b", "--backing-chain"] {
            let answer = place.qcow2(&["info", option, "jail/top"]).bad(1, text);
            assert_eq!(answer.out, "", "{name}");
        }
    }
    let knocked = server.accept().map(drop).unwrap_err();
    assert_eq!(knocked.kind(), std::io::ErrorKind::WouldBlock);
    let line = ["create", "-u", "-f", "qcow2", "-b", "../secret.qcow2", "-F", "qcow2"];
    place.qemu_img(&[&line[..], &["jail/top", "1M"]].concat()).good();
    let theirs = place.qemu_img(&["info", "--backing-chain", "jail/top"]).good().out;
    for allowed in ["any", "."] {
        let line = ["info", "--backing-chain", "--allow-references", allowed, "jail/top"];
        assert_eq!(place.qcow2(&line).good().out, theirs, "{allowed}");
    }
}

#[test]
fn info_of_a_chain_ends_at_loops_under_any_name_and_at_the_limit() {
    let place = Place::new();
    let line = ["create", "-u", "-f", "qcow2", "-b", "l000", "-F", "qcow2", "sample", "1M"];
    place.qemu_img(&line).good();
    let sample = place.read("sample");
    let at = sample.windows(4).position(|name| name == b"l000").unwrap();
    let put = |name: &str, below: &str| {
        let mut bytes = sample.clone();
        bytes[at..at + 4].copy_from_slice(below.as_bytes());
        std::fs::write(place.path(name), bytes).unwrap();
    };
    for number in 0..300 {
        put(&format!("l{number:03}"), &format!("l{:03}", number + 1));
    }
    let chain = |name: &str| place.qcow2(&["info", "--backing-chain", name]);
    // The image is named that refers too far, not the one that it refers to.
    let deep = chain("l000").bad(1, "l255 refers to ");
    assert!(deep.err.contains("l256\": the chain has more than 256 layers"), "{deep:?}");
    put("one1", "two2");
    put("two2", "ano1");
    std::fs::hard_link(place.path("one1"), place.path("ano1")).unwrap();
    let turning = chain("one1").bad(1, "comes back to the same file");
    assert!(turning.err.len() < 500, "{turning:?}");
}

#[test]
fn info_of_a_vmdk_does_not_look_for_its_extents() {
    let place = Place::new();
    let option = "subformat=monolithicFlat";
    place.qemu_img(&["create", "-f", "vmdk", "-o", option, "disk.vmdk", "3M"]).good();
    let line = ["info", "--output=json", "-f", "vmdk", "disk.vmdk"];
    let whole = place.qcow2(&line).good().json();
    assert_eq!(whole["virtual-size"], 3 << 20);
    std::fs::remove_file(place.path("disk-flat.vmdk")).unwrap();
    assert_eq!(place.qcow2(&line).good().json(), whole);
    place.qcow2(&["map", "-f", "vmdk", "disk.vmdk"]).bad(1, "disk-flat.vmdk");
    let line = ["create", "-u", "-f", "qcow2", "-b", "disk.vmdk", "-F", "vmdk", "top", "3M"];
    place.qemu_img(&line).good();
    let chain = place.qcow2(&["info", "--backing-chain", "--output=json", "top"]).good().json();
    assert_eq!(chain[1], whole);
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

#[test]
fn an_export_that_is_named_by_options_is_told_by_its_address() {
    let place = Place::new();
    place.write_raw("a.raw", 1 << 20, 1);
    let socket = place.path("s").display().to_string();
    let _server = crate::support::serve(
        &place,
        &["-f", "raw", "-r", "-t", "-e", "9", "-x", "disk", "-k", &socket, "a.raw"],
        &socket,
    );
    let options = format!("driver=nbd,server.type=unix,server.path={socket},export=disk");
    let line = ["info", "--output=json", "--image-opts", &options];
    let (ours, theirs) = (place.qcow2(&line).good().json(), place.qemu_img(&line).good().json());
    assert_eq!(ours["filename"], theirs["filename"]);
    let name = ours["filename"].as_str().expect("a name");
    place.qcow2(&["info", name]).good();
}
