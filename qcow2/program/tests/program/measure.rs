//! `measure` beside qemu-img's.

use crate::support::Place;

#[test]
fn measure_says_the_same() {
    let place = Place::new();
    place.write_raw("a.raw", 3_000_000, 1);
    place.qemu_img(&["create", "-f", "qcow2", "sparse.qcow2", "10G"]).good();
    place.qemu_io("sparse.qcow2", &["write 1G 200k", "write -z 2G 1M", "write 5G 1M"]);
    place.qemu_img(&["create", "-f", "qcow2", "-o", "compat=0.10", "old.qcow2", "1G"]).good();
    for args in [
        &["--size", "1G"][..],
        &["-O", "qcow2", "--size", "1G"],
        &["-O", "qcow2", "--size", "0"],
        &["-O", "qcow2", "-o", "cluster_size=4k,refcount_bits=1", "--size", "300G"],
        &["-O", "qcow2", "-o", "extended_l2=on", "--size", "3T"],
        &["-O", "raw", "sparse.qcow2"],
        &["-O", "qcow2", "sparse.qcow2"],
        &["-O", "qcow2", "-o", "cluster_size=2M", "sparse.qcow2"],
        &["-O", "qcow2", "-o", "compat=0.10", "sparse.qcow2"],
        &["-O", "qcow2", "-f", "raw", "a.raw"],
        &["-O", "qcow2", "-o", "preallocation=full", "sparse.qcow2"],
    ] {
        let run = |output| {
            let mut line = vec!["measure", output];
            line.extend(args);
            (place.qcow2(&line).good(), place.qemu_img(&line).good())
        };
        let (ours, theirs) = run("--output=human");
        assert_eq!(ours.out, theirs.out, "{args:?}");
        let (ours, theirs) = run("--output=json");
        assert_eq!(ours.json(), theirs.json(), "{args:?}");
    }
}

#[test]
fn measure_refuses_what_contradicts_itself() {
    let place = Place::new();
    place.qemu_img(&["create", "-f", "qcow2", "a.qcow2", "1M"]).good();
    for args in [
        &["measure"][..],
        &["measure", "--size", "1G", "a.qcow2"],
        &["measure", "-f", "qcow2", "--size", "1G"],
        &["measure", "-O", "qcow2", "-o", "bad=1", "--size", "1G"],
        &["measure", "-O", "qcow2", "--size", "1x"],
        &["measure", "-O", "qcow2", "-o", "cluster_size=3", "--size", "1G"],
    ] {
        let (ours, theirs) = (place.qcow2(args), place.qemu_img(args));
        assert_eq!((ours.code, theirs.code), (1, 1), "{args:?}: {ours:?}");
        assert!(!ours.err.is_empty());
    }
}

#[test]
fn no_image_of_any_kind_is_larger_than_measure_says() {
    let place = Place::new();
    std::fs::write(place.path("key"), "open sesame").unwrap();
    place.write_raw("a.raw", 1 << 20, 3);
    place.qcow2(&["convert", "-f", "raw", "-O", "qcow2", "a.raw", "marked"]).good();
    for (name, granularity) in [("fine", "512"), ("coarse", "64k")] {
        place.qcow2(&["bitmap", "--add", "-g", granularity, "marked", name]).good();
    }
    place.qemu_io("marked", &["write -P 7 0 1M"]);
    let secret = ["--object", "secret,id=k,file=key"];
    let luks = "encrypt.format=luks,encrypt.key-secret=k";
    let clusters = ["cluster_size=512", "cluster_size=4k", "cluster_size=2M"];
    let kinds = ["refcount_bits=1", "refcount_bits=64", "preallocation=full", "extended_l2=on"];
    for options in clusters.iter().flat_map(|size| kinds.map(|kind| format!("{size},{kind}"))) {
        if options.contains("extended") && !options.contains("2M") {
            continue;
        }
        for (source, format, more) in
            [("a.raw", "raw", ""), ("a.raw", "raw", luks), ("marked", "qcow2", "")]
        {
            let options = format!("{options},{more}");
            let options = options.trim_end_matches(',');
            let line = ["-f", format, "-O", "qcow2", "-o", options];
            let measure = [&["measure", "--output=json"], &secret[..], &line, &[source]].concat();
            let said = place.qcow2(&measure).good().json();
            let part = |name: &str| said[name].as_u64().unwrap_or_default();
            let iter_time = match more {
                "" => options.to_owned(),
                _ => format!("{options},encrypt.iter-time=10"),
            };
            let keeps: &[&str] = if source == "marked" { &["--bitmaps"] } else { &[] };
            let line = ["-f", format, "-O", "qcow2", "-o", &iter_time];
            let convert = [&["convert"], &secret[..], keeps, &line, &[source, "new"]].concat();
            place.qcow2(&convert).good();
            let len = std::fs::metadata(place.path("new")).unwrap().len();
            // A list of bitmaps is replaced by a longer one, and what it took may stay free.
            let cluster = place.qcow2(&["info", "--output=json", "new"]).good().json();
            let spare = if source == "marked" { 4 } else { 0 };
            let spare = spare * cluster["cluster-size"].as_u64().unwrap();
            let bound = part("required") + part("bitmaps") + spare;
            assert!(len <= bound, "{source} {options}: {len} bytes, {bound} said");
        }
    }
}

#[test]
fn no_image_is_larger_than_measure_says() {
    let place = Place::new();
    let measured = |args: &[&str]| {
        let answer = place.qcow2(&[&["measure", "--output=json", "-O", "qcow2"], args].concat());
        answer.good().json()["required"].as_u64().unwrap()
    };
    let len = |name: &str| std::fs::metadata(place.path(name)).unwrap().len();
    for size in ["0", "1", "65536", "3000000", "1G"] {
        place.qcow2(&["create", "-f", "raw", "a.raw", size]).good();
        let raw = std::fs::OpenOptions::new().write(true).open(place.path("a.raw")).unwrap();
        let data = 200_000.min(len("a.raw"));
        std::os::unix::fs::FileExt::write_all_at(&raw, &vec![1; usize::try_from(data).unwrap()], 0)
            .unwrap();
        for options in ["cluster_size=512", "cluster_size=64k", "cluster_size=2M"] {
            let required = measured(&["-o", options, "-f", "raw", "a.raw"]);
            let line = ["convert", "-f", "raw", "-O", "qcow2", "-o", options, "a.raw", "a.qcow2"];
            place.qcow2(&line).good();
            place.qemu_img(&["check", "a.qcow2"]).good();
            assert!(len("a.qcow2") <= required, "{size} {options}: {}", len("a.qcow2"));
        }
    }
}
