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
