//! `convert` judged by qemu-img, and what is left of it when it is stopped.

use std::os::unix::fs::MetadataExt;

use crate::support::{Place, exists, serve};

/// A sparse qcow2 image with data, zeros, and holes, over another.
fn source(place: &Place) {
    place.qemu_img(&["create", "-f", "qcow2", "base.qcow2", "64M"]).good();
    place.qemu_io("base.qcow2", &["write -P 1 0 1M", "write -P 2 10M 3M", "write -P 3 63M 1M"]);
    place
        .qemu_img(&["create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"])
        .good();
    place.qemu_io("top.qcow2", &["write -P 4 11M 100k", "write -z 512k 1M", "write -P 5 30M 64k"]);
}

/// Both programs take two images for equal, and qemu-img finds no fault in the second.
fn same(place: &Place, first: &[&str; 2], second: &[&str; 2]) {
    let line = ["compare", "-f", first[0], "-F", second[0], first[1], second[1]];
    place.qemu_img(&line).good();
    place.qcow2(&line).good();
    if second[0] == "qcow2" {
        place.qemu_img(&["check", "-f", "qcow2", second[1]]).good();
    }
}

#[test]
fn convert_makes_images_that_qemu_takes_for_the_same() {
    let place = Place::new();
    source(&place);
    for args in [
        &["-O", "raw"][..],
        &["-O", "qcow2"],
        &["-O", "qcow2", "-o", "cluster_size=4k"],
        &["-O", "raw", "-S", "0"],
        &["-O", "raw", "-S", "64k", "-m", "16", "-W"],
        &["-O", "qcow2", "-t", "none", "-T", "none", "-p"],
        &["-O", "qcow2", "-t", "writeback", "-r", "1G"],
        &["-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2"],
        &["-O", "qcow2", "-c"],
        &["-O", "qcow2", "-c", "-o", "compression_type=zstd", "-m", "4"],
        &["-O", "qcow2", "-c", "-B", "base.qcow2", "-F", "qcow2"],
        &["-O", "qcow2", "-o", "compat=0.10"],
        &["-O", "qcow2", "-o", "extended_l2=on"],
        &["-O", "qcow2", "-o", "preallocation=metadata"],
    ] {
        let mut line = vec!["convert"];
        line.extend(args);
        line.extend(["top.qcow2", "out"]);
        place.qcow2(&line).good();
        let format = args[1];
        same(&place, &["qcow2", "top.qcow2"], &[format, "out"]);
        let mut theirs = line.clone();
        theirs.pop();
        theirs.push("theirs");
        place.qemu_img(&theirs).good();
        same(&place, &[format, "theirs"], &[format, "out"]);
    }
    assert_eq!(place.qcow2(&["convert", "top.qcow2", "out"]).good().out, "");
    same(&place, &["qcow2", "top.qcow2"], &["raw", "out"]);
}

#[test]
fn a_copy_over_a_backing_file_holds_only_the_difference() {
    let place = Place::new();
    source(&place);
    let line = ["convert", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", "top.qcow2", "thin"];
    place.qcow2(&line).good();
    let map = |name: &str| place.qemu_img(&["map", "--output=json", name]).good().json();
    let own = |map: &serde_json::Value| -> u64 {
        let list = map.as_array().expect("a list").iter();
        let own = list.filter(|extent| extent["depth"] == 0 && extent["data"] == true);
        own.filter_map(|extent| extent["length"].as_u64()).sum()
    };
    assert_eq!(own(&map("thin")), own(&map("top.qcow2")));
}

#[test]
fn several_sources_become_one() {
    let place = Place::new();
    place.write_raw("a.raw", 100_000, 1);
    place.write_raw("b.raw", 70_000, 2);
    for format in ["raw", "qcow2"] {
        let line = |target| ["convert", "-f", "raw", "-O", format, "a.raw", "b.raw", target];
        place.qcow2(&line("ours")).good();
        place.qemu_img(&line("theirs")).good();
        same(&place, &[format, "theirs"], &[format, "ours"]);
    }
}

#[test]
fn vmdk_images_are_read() {
    let place = Place::new();
    source(&place);
    for subformat in ["monolithicSparse", "streamOptimized", "monolithicFlat"] {
        let options = format!("subformat={subformat}");
        let line = ["convert", "-O", "vmdk", "-o", &options, "top.qcow2", "a.vmdk"];
        place.qemu_img(&line).good();
        place.qcow2(&["convert", "-f", "vmdk", "-O", "qcow2", "a.vmdk", "out"]).good();
        same(&place, &["qcow2", "top.qcow2"], &["qcow2", "out"]);
        place.qcow2(&["compare", "-f", "vmdk", "-F", "qcow2", "a.vmdk", "top.qcow2"]).good();
        let info = place.qcow2(&["info", "-f", "vmdk", "--output=json", "a.vmdk"]).good().json();
        assert_eq!(info["virtual-size"], 64 << 20);
    }
    place.qcow2(&["convert", "-O", "vmdk", "top.qcow2", "x"]).bad(1, "only read");
    place.qcow2(&["create", "-f", "vmdk", "x", "1M"]).bad(1, "only read");
}

#[test]
fn a_compressed_copy_takes_less_space() {
    let place = Place::new();
    std::fs::write(place.path("a.raw"), vec![b'x'; 8 << 20]).unwrap();
    place.qcow2(&["convert", "-f", "raw", "-O", "qcow2", "-c", "a.raw", "a.qcow2"]).good();
    same(&place, &["raw", "a.raw"], &["qcow2", "a.qcow2"]);
    assert!(place.read("a.qcow2").len() < 1 << 20);
    let line = ["convert", "-f", "raw", "-O", "qcow2", "-c", "--compression-level", "1", "a.raw"];
    place.qcow2(&[&line[..], &["b.qcow2"]].concat()).good();
    same(&place, &["raw", "a.raw"], &["qcow2", "b.qcow2"]);
}

#[test]
fn a_snapshot_is_copied_by_name_or_id() {
    let place = Place::new();
    source(&place);
    place.qemu_img(&["snapshot", "-c", "before", "top.qcow2"]).good();
    place.qemu_io("top.qcow2", &["write -P 9 0 8M"]);
    for name in ["before", "1"] {
        place.qcow2(&["convert", "-l", name, "top.qcow2", "ours"]).good();
        place.qemu_img(&["convert", "-l", name, "top.qcow2", "theirs"]).good();
        same(&place, &["raw", "theirs"], &["raw", "ours"]);
    }
    place.qcow2(&["convert", "-l", "never", "top.qcow2", "none"]).bad(1, "never");
    assert!(!exists(&place.path("none")));
}

#[test]
fn a_target_that_is_there_is_filled() {
    let place = Place::new();
    source(&place);
    place.write_raw("full.raw", 64 << 20, 9);
    place.qcow2(&["convert", "-n", "-O", "raw", "top.qcow2", "full.raw"]).good();
    same(&place, &["qcow2", "top.qcow2"], &["raw", "full.raw"]);
    place.qemu_img(&["create", "-f", "qcow2", "there.qcow2", "64M"]).good();
    place.qemu_io("there.qcow2", &["write -P 7 0 64M"]);
    place.qcow2(&["convert", "-n", "-O", "qcow2", "top.qcow2", "there.qcow2"]).good();
    same(&place, &["qcow2", "top.qcow2"], &["qcow2", "there.qcow2"]);
    place.write_raw("small.raw", 1 << 20, 9);
    let before = place.read("small.raw");
    let line = ["convert", "-n", "-O", "raw", "top.qcow2", "small.raw"];
    place.qcow2(&line).bad(1, "output file is smaller than input file");
    assert_eq!(place.read("small.raw"), before);
}

#[test]
fn exports_are_read_and_written() {
    let place = Place::new();
    source(&place);
    place.write_raw("far.raw", 64 << 20, 9);
    let socket = place.path("s").display().to_string();
    let _server = serve(&place, &["-f", "raw", "-t", "-e", "9", "-k", &socket, "far.raw"], &socket);
    let uri = format!("nbd+unix:///?socket={socket}");
    place.qcow2(&["convert", "-O", "raw", "top.qcow2", &uri]).good();
    place.qcow2(&["compare", "-F", "raw", "top.qcow2", &uri]).good();
    place.qcow2(&["convert", "-O", "qcow2", &uri, "back.qcow2"]).good();
    same(&place, &["qcow2", "top.qcow2"], &["qcow2", "back.qcow2"]);
    place.qcow2(&["convert", "-O", "qcow2", "top.qcow2", &uri]).bad(1, "an NBD export is a disk");
}

#[test]
fn a_copy_that_is_stopped_leaves_nothing_behind() {
    let place = Place::new();
    place.write_raw("a.raw", 64 << 20, 1);
    for (signal, code) in [("TERM", 143), ("INT", 130), ("HUP", 129)] {
        for format in ["raw", "qcow2"] {
            let line = ["convert", "-f", "raw", "-O", format, "-r", "1M", "a.raw", "half"];
            let mut child = place.ours(&line).spawn().expect("the program starts");
            while !exists(&place.path("half")) {
                assert!(child.try_wait().expect("a child of ours").is_none());
                std::thread::yield_now();
            }
            place.tool("kill", &["-s", signal, &child.id().to_string()]);
            let ended = child.wait().expect("it ends");
            assert_eq!(ended.code(), Some(code), "{format}");
            assert!(!exists(&place.path("half")), "{signal} {format}");
        }
    }
}

/// A source that cannot be copied to its end.
fn damaged_source(place: &Place) {
    source(place);
    // An L2 table entry that points behind the end of the file: found when the copy comes by.
    let mut bytes = place.read("top.qcow2");
    let l1_at = usize::try_from(u64::from_be_bytes(bytes[40..48].try_into().unwrap())).unwrap();
    let l1: [u8; 8] = bytes[l1_at..l1_at + 8].try_into().unwrap();
    let l2_at = usize::try_from(u64::from_be_bytes(l1) & 0x00ff_ffff_ffff_fe00).unwrap();
    let entry = l2_at + 8 * (30 << 20 >> 16);
    bytes[entry..entry + 8].copy_from_slice(&0x8000_0000_0000_0200_u64.to_be_bytes());
    std::fs::write(place.path("top.qcow2"), bytes).unwrap();
}

#[test]
fn a_copy_that_fails_leaves_nothing_behind() {
    let place = Place::new();
    damaged_source(&place);
    let answer = place.qcow2(&["convert", "-O", "qcow2", "top.qcow2", "out"]);
    assert_eq!(answer.code, 1, "{answer:?}");
    assert!(answer.err.contains("top.qcow2 is corrupt at"), "{answer:?}");
    assert!(!exists(&place.path("out")));
}

#[test]
fn a_copy_that_fails_leaves_what_others_made_and_says_so() {
    let place = Place::new();
    damaged_source(&place);
    std::fs::create_dir(place.path("elsewhere")).unwrap();
    for format in ["raw", "qcow2"] {
        for name in ["old", "link"] {
            place.write_raw("elsewhere/file", 100_000, 1);
            place.write_raw("old", 100_000, 2);
            let _ = std::fs::remove_file(place.path("link"));
            std::os::unix::fs::symlink("elsewhere/file", place.path("link")).unwrap();
            let answer = place.qcow2(&["convert", "-O", format, "top.qcow2", name]);
            let answer = answer.bad(1, "top.qcow2 is corrupt at");
            let told = format!("{name} was there before and stays");
            assert!(answer.err.contains(&told), "{answer:?}");
            assert!(exists(&place.path(name)), "{name} {format}");
            let link = std::fs::read_link(place.path("link"));
            assert_eq!(link.unwrap(), std::path::Path::new("elsewhere/file"));
        }
    }
}

#[test]
fn options_that_contradict_each_other_are_refused() {
    let place = Place::new();
    source(&place);
    for args in [
        &["-n", "-o", "cluster_size=4k", "top.qcow2", "x"][..],
        &["--target-is-zero", "top.qcow2", "x"],
        &["-C", "-S", "4k", "top.qcow2", "x"],
        &["-S", "1000", "top.qcow2", "x"],
        &["-m", "0", "top.qcow2", "x"],
        &["-O", "qcow2", "-B", "base.qcow2", "top.qcow2", "x"],
        &["-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", "base.qcow2", "base.qcow2", "x"],
        &["-l", "a", "top.qcow2", "base.qcow2", "x"],
        &["-c", "-O", "raw", "top.qcow2", "x"],
        &["-c", "-C", "-O", "qcow2", "top.qcow2", "x"],
        &["-c", "-O", "qcow2", "-o", "preallocation=full", "top.qcow2", "x"],
        &["--skip-broken-bitmaps", "-O", "qcow2", "top.qcow2", "x"],
        &["-O", "bochs", "top.qcow2", "x"],
        &["top.qcow2"],
    ] {
        let mut line = vec!["convert"];
        line.extend(args);
        let (ours, theirs) = (place.qcow2(&line), place.qemu_img(&line));
        assert_eq!((ours.code, theirs.code), (1, 1), "{args:?}: {ours:?}");
        assert!(!exists(&place.path("x")), "{args:?}");
    }
}

#[test]
fn zeros_take_space_where_everything_is_to_be_allocated() {
    let place = Place::new();
    place.qemu_img(&["create", "-f", "qcow2", "a", "8M"]).good();
    // Data, zeros as data, zeros that are known, and nothing.
    place.qemu_io("a", &["write -P 1 0 1M", "write -P 0 1M 1M", "write -z 2M 1M"]);
    for options in ["cluster_size=4k", "cluster_size=64k", "cluster_size=2M", "extended_l2=on"] {
        place.qcow2(&["convert", "-O", "qcow2", "-S", "0", "-o", options, "a", "b"]).good();
        same(&place, &["qcow2", "a"], &["qcow2", "b"]);
        let map = place.qemu_img(&["map", "--output=json", "b"]).good().json();
        for extent in map.as_array().expect("a list") {
            assert!(extent["offset"].is_u64(), "{options}: {extent} takes no space");
        }
    }
}

#[test]
fn an_id_of_a_snapshot_is_not_taken_for_a_name() {
    let place = Place::new();
    place.qemu_img(&["create", "-f", "qcow2", "a", "1M"]).good();
    // The first snapshot has the id 1, and the second is called so.
    for (value, name) in [(5, "first"), (6, "1")] {
        place.qemu_io("a", &[&format!("write -P {value} 0 1M")]);
        place.qemu_img(&["snapshot", "-c", name, "a"]).good();
    }
    for name in ["snapshot.id=1", "snapshot.name=1", "snapshot.name=first", "snapshot.id=2"] {
        place.qcow2(&["convert", "-l", name, "a", "ours"]).good();
        place.qemu_img(&["convert", "-l", name, "a", "theirs"]).good();
        same(&place, &["raw", "theirs"], &["raw", "ours"]);
    }
    for name in ["snapshot.id=first", "snapshot.name=2", "snapshot.what=1"] {
        let line = ["convert", "-l", name, "a", "none"];
        assert_eq!((place.qcow2(&line).code, place.qemu_img(&line).code), (1, 1), "{name}");
        assert!(!exists(&place.path("none")));
    }
}

#[test]
fn only_the_layer_is_copied_to_a_target_that_stands_over_the_same_backing_file() {
    let place = Place::new();
    source(&place);
    let line = ["create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "thin"];
    place.qemu_img(&line).good();
    let line = ["convert", "-n", "-B", "base.qcow2", "-O", "qcow2", "top.qcow2", "thin"];
    place.qcow2(&line).good();
    same(&place, &["qcow2", "top.qcow2"], &["qcow2", "thin"]);
    let map = |name: &str| place.qemu_img(&["map", "--output=json", name]).good().json();
    let own = |map: serde_json::Value| {
        let list = map.as_array().expect("a list").clone();
        list.iter().filter(|extent| extent["depth"] == 0 && extent["data"] == true).count()
    };
    assert_eq!(own(map("thin")), own(map("top.qcow2")));
}

#[test]
fn a_data_file_may_be_named_on_the_command_line() {
    let place = Place::new();
    let line = ["create", "-f", "qcow2", "-o", "data_file=a.data", "a", "1M"];
    place.qemu_img(&line).good();
    place.qemu_io("a", &["write -P 7 0 64k"]);
    std::fs::rename(place.path("a.data"), place.path("moved")).unwrap();
    assert_eq!(place.qcow2(&["convert", "a", "out"]).code, 1);
    let image = "driver=qcow2,file.filename=a,data-file.driver=file,data-file.filename=moved,\
                 l2-cache-size=1M,read-only=on";
    place.qcow2(&["convert", "--image-opts", image, "out"]).good();
    place.qemu_img(&["convert", "--image-opts", image, "theirs"]).good();
    same(&place, &["raw", "theirs"], &["raw", "out"]);
    place.qcow2(&["amend", "--image-opts", "-o", "compat=v3", image]).bad(1, "read-only");
}

#[test]
fn what_is_made_in_advance_stays_when_a_copy_is_filled_in() {
    let place = Place::new();
    place.qemu_img(&["create", "-f", "qcow2", "a", "64M"]).good();
    place.qemu_io("a", &["write -P 1 1M 1M", "write -z 20M 1M"]);
    for mode in ["metadata", "falloc", "full"] {
        let options = format!("preallocation={mode}");
        place.qcow2(&["convert", "-O", "qcow2", "-o", &options, "a", "ours"]).good();
        place.qemu_img(&["convert", "-O", "qcow2", "-o", &options, "a", "theirs"]).good();
        same(&place, &["qcow2", "a"], &["qcow2", "ours"]);
        let allocated = |name: &str| {
            let check = place.qemu_img(&["check", "--output=json", name]).good().json();
            check["allocated-clusters"].as_u64()
        };
        assert_eq!(allocated("ours"), allocated("theirs"), "{mode}");
    }
    for mode in ["falloc", "full"] {
        let options = format!("preallocation={mode}");
        place.qcow2(&["convert", "-O", "raw", "-o", &options, "a", "ours.raw"]).good();
        same(&place, &["qcow2", "a"], &["raw", "ours.raw"]);
        let blocks = std::fs::metadata(place.path("ours.raw")).unwrap().blocks();
        assert!(blocks * 512 >= 64 << 20, "{mode}: {blocks} blocks");
    }
}

#[test]
fn a_copy_that_is_to_outlive_its_terminal_does() {
    let place = Place::new();
    place.write_raw("a.raw", 64 << 20, 1);
    let program = env!("CARGO_BIN_EXE_qcow2");
    let line = format!("trap '' HUP; exec {program} convert -f raw -O raw -r 1M a.raw half");
    let mut child = place.start("sh", &["-c", &line]);
    while !exists(&place.path("half")) {
        assert!(child.0.try_wait().expect("a child of ours").is_none());
        std::thread::yield_now();
    }
    for signal in ["HUP", "TERM"] {
        place.tool("kill", &["-s", signal, &child.0.id().to_string()]);
    }
    assert_eq!(child.0.wait().expect("it ends").code(), Some(143));
    assert!(!exists(&place.path("half")));
}

#[test]
fn levels_that_a_way_to_compress_does_not_have_are_refused() {
    let place = Place::new();
    place.qemu_img(&["create", "-q", "-f", "qcow2", "a", "1M"]).good();
    let line = |level: &'static str, rest: &[&'static str]| {
        let begin = ["convert", "-O", "qcow2", "-c", "--compression-level", level];
        place.qcow2(&[&begin[..], rest, &["a", "b"]].concat())
    };
    line("99", &[]).bad(1, "zlib goes from 1 to 9");
    line("0", &[]).bad(1, "zlib goes from 1 to 9");
    line("20", &["-o", "compression_type=zstd"]).bad(1, "zstd goes from 1 to 19");
    assert!(!exists(&place.path("b")));
    line("19", &["-o", "compression_type=zstd"]).good();
    line("99", &["-n"]).bad(1, "zstd goes from 1 to 19");
    line("9", &[]).good();
}

#[test]
fn a_snapshot_that_is_copied_is_named_by_id_by_name_or_by_both() {
    let place = Place::new();
    place.qemu_img(&["create", "-q", "-f", "qcow2", "a", "1M"]).good();
    for (name, write) in [("2", "write -P 7 0 1M"), ("1", "write -P 8 0 1M")] {
        place.qemu_io("a", &[write]);
        place.qemu_img(&["snapshot", "-c", name, "a"]).good();
    }
    for wanted in ["1", "snapshot.id=1", "snapshot.name=1", "snapshot.id=2,snapshot.name=1"] {
        let line = |target: &'static str| ["convert", "-O", "raw", "-l", wanted, "a", target];
        place.qcow2(&line("ours")).good();
        place.qemu_img(&line("theirs")).good();
        assert!(place.read("ours") == place.read("theirs"), "{wanted}");
    }
    let line = ["convert", "-O", "raw", "-l", "snapshot.id=1,snapshot.name=1", "a", "none"];
    place.qcow2(&line).bad(1, "there is no");
    assert_eq!(place.qemu_img(&line).code, 1);
}

#[test]
fn a_data_file_outside_the_folder_is_written_and_told() {
    let place = Place::new();
    std::fs::create_dir(place.path("in")).unwrap();
    place.write_raw("a.raw", 1 << 20, 5);
    let line = ["convert", "-f", "raw", "-O", "qcow2", "-o", "data_file=../out", "a.raw", "in/new"];
    place.qcow2(&line).good_saying("will need --allow-references");
    place.qcow2(&["map", "in/new"]).bad(1, "--allow-references");
    let compare = ["compare", "--allow-references", "any", "-F", "raw", "in/new", "a.raw"];
    place.qcow2(&compare).good();
    assert_eq!(place.read("out").len(), 1 << 20);
}
