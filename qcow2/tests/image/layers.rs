//! The map of a chain says of every byte what `qemu-img map` says.

use std::path::Path;

use block::ByteRange;
use qcow2::{Image, MapExtent, OpenOptions};
use serde_json::Value;

use crate::common::{block_on, pattern, qemu_create, qemu_img, qemu_io};

fn ours(path: &Path, size: u64) -> Vec<MapExtent> {
    block_on(async {
        let image = Image::open(path, OpenOptions::reading()).await.unwrap();
        image.map_chain(ByteRange::between(0, size)).await.unwrap()
    })
}

/// Both maps of an image must be equal, extent by extent.
fn is_told_alike(path: &Path, size: u64, what: &str) {
    let json = qemu_img(&["map", "--output=json", path.to_str().unwrap()]);
    let theirs: Vec<Value> = serde_json::from_str(&json).unwrap();
    let ours = ours(path, size);
    for (at, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
        let said = serde_json::json!({
            "start": ours.range.start(), "length": ours.range.len(), "depth": ours.depth,
            "present": ours.present, "zero": ours.zero, "data": ours.data, "compressed": ours.compressed,
        });
        let mut theirs = theirs.clone();
        let offset = theirs.as_object_mut().unwrap().remove("offset");
        assert_eq!(said, theirs, "{what}: extent {at}");
        assert_eq!(ours.host, offset.and_then(|o| o.as_u64()), "{what}: extent {at}: {ours:?}");
    }
    assert_eq!(ours.len(), theirs.len(), "{what}");
}

#[test]
fn chains_of_every_shape_are_told_alike() {
    let shapes = [
        "cluster_size=4k",
        "cluster_size=64k,compat=0.10",
        "cluster_size=64k,extended_l2=on",
        "cluster_size=64k,extended_l2=on,preallocation=metadata",
        "cluster_size=512,compression_type=zstd",
    ];
    for top in shapes {
        for middle in shapes {
            let dir = tempfile::tempdir().unwrap();
            let at = |name: &str| dir.path().join(name);
            let mut bytes = pattern(1, 700_416);
            bytes[65536..300_032].fill(0);
            std::fs::write(at("raw"), &bytes).unwrap();
            let (from, to) = (at("raw"), at("base.qcow2"));
            let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
            qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", from, to]);
            qemu_io(&at("base.qcow2"), &["write -P 1 200k 70k"]);
            let has_no_backing = |options: &str| options.contains("preallocation");
            let below = (!has_no_backing(middle)).then_some("base.qcow2");
            qemu_create(&at("middle.qcow2"), middle, "1500k", below);
            qemu_io(
                &at("middle.qcow2"),
                &["write -P 2 100k 3k", "write -z 400k 100k", "discard 0 64k"],
            );
            let below = (!has_no_backing(top)).then_some("middle.qcow2");
            qemu_create(&at("top.qcow2"), top, "2M", below);
            qemu_io(
                &at("top.qcow2"),
                &["write -P 3 600k 130k", "write -z 640k 64k", "write -P 5 1900k 9k"],
            );
            is_told_alike(&at("top.qcow2"), 2 << 20, &format!("{top} over {middle}"));
        }
    }
}

#[test]
fn a_raw_parent_and_a_data_file_are_told_alike() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut raw = pattern(3, 1 << 20);
    raw.truncate(900 << 10);
    std::fs::write(at("below.raw"), &raw).unwrap();
    let (name, top) = (at("below.raw"), at("top.qcow2"));
    let (name, top_name) = (name.to_str().unwrap(), top.to_str().unwrap());
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", name, top_name, "1M"]);
    qemu_io(&top, &["write -P 3 64k 64k"]);
    is_told_alike(&top, 1 << 20, "over raw");
    assert_eq!(ours(&top, 1 << 20)[0].layer, at("below.raw"));

    let external = at("external.qcow2");
    let options = format!("data_file={}", at("data").display());
    qemu_create(&external, &options, "1M", None);
    qemu_io(&external, &["write -P 3 64k 64k", "write -P 3 0 10k"]);
    is_told_alike(&external, 1 << 20, "with a data file");
    assert_eq!(ours(&external, 1 << 20)[0].layer, at("data"));
}
