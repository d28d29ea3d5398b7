//! `commit`, `rebase` and `merge`: the first two beside qemu-img's.

use crate::support::{Place, exists};

/// A chain of four: base, a, b, top.
fn chain(place: &Place) {
    place.qemu_img(&["create", "-f", "qcow2", "base", "16M"]).good();
    place.qemu_io("base", &["write -P 1 0 8M"]);
    for (below, name) in [("base", "a"), ("a", "b"), ("b", "top")] {
        place.qemu_img(&["create", "-f", "qcow2", "-b", below, "-F", "qcow2", name]).good();
    }
    place.qemu_io("a", &["write -P 2 1M 2M", "write -z 5M 1M"]);
    place.qemu_io("b", &["write -P 3 2M 2M", "write -P 3 12M 1M"]);
    place.qemu_io("top", &["write -P 4 3M 2M"]);
    place.qemu_img(&["convert", "-O", "raw", "top", "top.raw"]).good();
}

fn reads_as_before(place: &Place, name: &str) {
    place.qemu_img(&["compare", "-F", "raw", name, "top.raw"]).good();
    for image in ["base", "a", "b", "top"].iter().filter(|name| exists(&place.path(name))) {
        place.qemu_img(&["check", "-U", image]).good();
    }
}

fn backing(place: &Place, name: &str) -> String {
    let info = place.qemu_img(&["info", "-U", "--output=json", name]).good().json();
    info["backing-filename"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn commit_moves_what_an_image_holds_down() {
    for args in [&[][..], &["-d"], &["-b", "a"], &["-b", "base"], &["-r", "1G", "-p"]] {
        let [ours, theirs] = [Place::new(), Place::new()];
        for place in [&ours, &theirs] {
            chain(place);
        }
        let mut line = vec!["commit"];
        line.extend(args);
        line.push("top");
        let dry = [&line[..], &["--dry-run"]].concat();
        let before = ["base", "a", "b", "top"].map(|name| ours.read(name));
        let plan = ours.qcow2(&dry).good();
        assert!(plan.out.contains("Nothing has been changed"), "{plan:?}");
        assert_eq!(before, ["base", "a", "b", "top"].map(|name| ours.read(name)));
        let [answer, their] = [ours.qcow2(&line).good(), theirs.qemu_img(&line).good()];
        assert!(answer.out.ends_with("Image committed.\n"), "{answer:?}");
        assert!(their.out.ends_with("Image committed.\n"), "{their:?}");
        reads_as_before(&ours, "top");
        let base = if args.first() == Some(&"-b") { args[1] } else { "b" };
        reads_as_before(&ours, base);
        let map = |place: &Place| {
            let map = place.qemu_img(&["map", "--output=json", "top"]).good().json();
            let list = map.as_array().expect("a list").clone();
            list.iter().filter(|extent| extent["depth"] == 0 && extent["data"] == true).count()
        };
        assert_eq!(map(&ours), map(&theirs), "{args:?}");
    }
}

#[test]
fn rebase_keeps_what_an_image_reads() {
    for args in [
        &["-b", "a", "-F", "qcow2"][..],
        &["-b", "base", "-F", "qcow2"],
        &["-b", "other", "-F", "qcow2", "-p"],
        &["-b", "", "-q"],
        &["-c", "-b", "base", "-F", "qcow2"],
    ] {
        let place = Place::new();
        chain(&place);
        place.qemu_img(&["create", "-f", "qcow2", "other", "4M"]).good();
        place.qemu_io("other", &["write -P 1 0 512k", "write -P 9 1M 64k"]);
        let mut line = vec!["rebase"];
        line.extend(args);
        line.push("top");
        let before = place.read("top");
        let plan = place.qcow2(&[&line[..], &["--dry-run"]].concat()).good();
        assert!(plan.out.contains("Nothing has been changed"), "{plan:?}");
        assert_eq!(place.read("top"), before);
        place.qcow2(&line).good();
        reads_as_before(&place, "top");
        let expected = args[args.iter().position(|word| *word == "-b").unwrap() + 1];
        assert_eq!(backing(&place, "top"), expected);
    }
}

#[test]
fn a_new_backing_file_that_is_not_there_is_no_fault_of_the_chain() {
    let place = Place::new();
    chain(&place);
    let before = place.read("top");
    for more in [&[][..], &["--dry-run"]] {
        let line = [&["rebase", "-b", "sub/gone", "-F", "qcow2", "top"], more].concat();
        let told = place.qcow2(&line).bad(1, "Could not open new backing file");
        assert!(told.err.contains("sub/gone") && !told.err.contains("rebase -u"), "{told:?}");
    }
    assert_eq!(place.read("top"), before);
}

#[test]
fn merge_says_that_nothing_is_between_the_top_and_its_base() {
    let place = Place::new();
    chain(&place);
    place.qcow2(&["merge", "--last", "b", "--remove", "top"]).good();
    for more in [&[][..], &["--dry-run"]] {
        place.qcow2(&[&["merge", "top"], more].concat()).bad(1, "nothing to merge");
    }
    reads_as_before(&place, "top");
}

#[test]
fn an_unsafe_rebase_only_writes_a_name_down() {
    let place = Place::new();
    chain(&place);
    let plan = ["rebase", "-u", "-b", "gone", "-F", "raw", "--dry-run", "top"];
    let told = "top would get another backing file\nNothing has been changed.\n";
    assert_eq!(place.qcow2(&plan).good().out, told);
    place.qcow2(&["rebase", "-u", "-b", "gone", "-F", "raw", "top"]).good();
    assert_eq!(backing(&place, "top"), "gone");
    place.qcow2(&["map", "top"]).bad(1, "gone");
    place.qcow2(&["rebase", "-u", "-b", "b", "-F", "qcow2", "top"]).good();
    reads_as_before(&place, "top");
}

#[test]
fn merge_folds_increments_into_their_base() {
    for (args, folded) in [
        (&[][..], vec!["a"]),
        (&["--last", "b"], vec!["a", "b"]),
        (&["--base", "a"], vec!["b"]),
        (&["--last", "b", "--remove"], vec!["a", "b"]),
    ] {
        let place = Place::new();
        chain(&place);
        let mut line = vec!["merge"];
        line.extend(args);
        line.push("top");
        let before = ["base", "a", "b", "top"].map(|name| place.read(name));
        let plan = place.qcow2(&[&line[..], &["--dry-run"]].concat()).good();
        assert!(plan.out.contains("would get another backing file"), "{plan:?}");
        assert_eq!(before, ["base", "a", "b", "top"].map(|name| place.read(name)));
        assert_eq!(place.qcow2(&line).good().out, "Increments merged.\n");
        reads_as_before(&place, "top");
        for name in &folded {
            assert_eq!(exists(&place.path(name)), !args.contains(&"--remove"), "{name}");
        }
        let above = if folded.contains(&"b") { "top" } else { "b" };
        let base = if args.contains(&"--base") { "a" } else { "base" };
        assert_eq!(backing(&place, above), base, "{args:?}");
    }
}

#[test]
fn merge_takes_nothing_from_others_without_being_told_to() {
    let place = Place::new();
    chain(&place);
    place.qemu_img(&["snapshot", "-c", "precious", "a"]).good();
    place.qemu_img(&["bitmap", "--add", "b", "changes"]).good();
    for (below, name) in [("base", "sibling"), ("b", "cousin"), ("top", "child")] {
        place.qemu_img(&["create", "-f", "qcow2", "-b", below, "-F", "qcow2", name]).good();
    }
    let names = ["base", "a", "b", "top"];
    let before = names.map(|name| place.read(name));
    let line = ["merge", "--last", "b", "--remove", "top"];
    let lost =
        ["cousin is over", "sibling is over", "snapshot 'precious' of a", "bitmap 'changes' of b"];
    let plan = place.qcow2(&[&line[..], &["--dry-run"]].concat()).good();
    for text in lost {
        place.qcow2(&line).bad(1, text);
        assert!(plan.out.contains(&format!("Needs --force: {text}")), "{text}: {plan:?}");
    }
    assert!(!plan.out.contains("child") && !plan.out.contains('/'), "{plan:?}");
    // Images elsewhere change without --remove, too; what stays in its file is only told.
    for gone in ["sibling", "cousin"] {
        place.qcow2(&["merge", "--last", "b", "top"]).bad(1, gone);
        assert_eq!(before, names.map(|name| place.read(name)));
        std::fs::remove_file(place.path(gone)).unwrap();
    }
    place.qcow2(&["merge", "top"]).good_saying("snapshot 'precious' of a stays behind");
    place.qcow2(&["merge", "--remove", "top"]).bad(1, "bitmap 'changes' of b");
    place.qcow2(&["merge", "--remove", "--force", "top"]).good_saying("bitmap 'changes' of b");
    assert!(!exists(&place.path("b")));
    reads_as_before(&place, "top");
}

#[test]
fn no_name_is_written_down_that_nothing_would_follow() {
    let place = Place::new();
    chain(&place);
    let before = place.read("top");
    for name in ["nbd://x/y", "nbd:localhost:10809", "json:{}", "file:b", "http://x/y"] {
        for flags in [&[][..], &["-u"], &["--dry-run"]] {
            let line = [&["rebase"], flags, &["-b", name, "-F", "raw", "top"]].concat();
            place.qcow2(&line).bad(1, "protocols or json: names");
        }
        let option = format!("data_file={name}");
        place.qcow2(&["amend", "-o", &option, "top"]).bad(1, "protocols or json: names");
        assert_eq!(place.read("top"), before, "{name}");
    }
}

#[test]
fn chains_that_cannot_be_folded_are_refused() {
    let place = Place::new();
    chain(&place);
    for (line, text) in [
        (&["commit", "base"][..], "Image does not have a backing file"),
        (&["commit", "-b", "never", "top"], "Did not find"),
        (&["rebase", "top"], "Must specify backing file"),
        (&["rebase", "-b", "never", "-F", "qcow2", "top"], "never"),
    ] {
        place.qcow2(line).bad(1, text);
        assert_eq!(place.qemu_img(line).code, 1, "{line:?}");
    }
    place.qcow2(&["rebase", "-b", "a", "top"]).bad(1, "backing format must be specified");
    place.qcow2(&["merge", "base"]).bad(1, "base: Image does not have a backing file");
    place.qcow2(&["merge", "--last", "top", "top"]).bad(1, "top");
    place.qemu_img(&["rebase", "-u", "-b", "gone", "-F", "qcow2", "b"]).good();
    place.qcow2(&["rebase", "-b", "a", "-F", "qcow2", "top"]).bad(1, "rebase -u records another");
    place.qcow2(&["rebase", "-u", "-b", "a", "-F", "qcow2", "b"]).good();
    place.qcow2(&["merge", "a"]).bad(1, "nothing to merge");
    reads_as_before(&place, "top");
}

#[test]
fn a_base_is_named_as_the_image_names_it_before_it_is_sought_here() {
    let place = Place::new();
    std::fs::create_dir(place.path("sub")).unwrap();
    for name in ["base", "sub/base", "sub/top"] {
        let below = ["-b", "base", "-F", "qcow2"];
        let below = if name == "sub/top" { &below[..] } else { &[] };
        let line = [&["create", "-q", "-f", "qcow2"], below, &[name, "1M"]].concat();
        place.qemu_img(&line).good();
    }
    place.qemu_io("sub/top", &["write -P 5 0 1M"]);
    let stranger = place.read("base");
    place.qcow2(&["commit", "-b", "base", "sub/top"]).good();
    place.qemu_io("sub/base", &["read -P 5 0 1M"]);
    assert_eq!(place.read("base"), stranger);
    place.qcow2(&["commit", "-b", "sub/base", "sub/top"]).good();
}

#[test]
fn the_drivers_of_files_are_the_raw_format_below_an_image() {
    let place = Place::new();
    place.write_raw("base.raw", 1 << 20, 3);
    // As qemu-img records it.
    place.qemu_img(&["create", "-f", "qcow2", "-b", "base.raw", "-F", "file", "a.qcow2"]).good();
    place.qemu_img(&["create", "-f", "qcow2", "b.qcow2", "1M"]).good();
    let line = ["rebase", "-u", "-b", "base.raw", "-F", "host_device", "b.qcow2"];
    place.qemu_img(&line).good();
    for name in ["a.qcow2", "b.qcow2"] {
        place.qcow2(&["compare", "-F", "raw", name, "base.raw"]).good();
    }
    // What we record is what all read.
    place.qcow2(&["create", "-f", "qcow2", "-b", "base.raw", "-F", "file", "c.qcow2"]).good();
    place.qcow2(&["rebase", "-u", "-b", "base.raw", "-F", "host_device", "b.qcow2"]).good();
    for name in ["b.qcow2", "c.qcow2"] {
        let info = place.qcow2(&["info", "--output=json", name]).good().json();
        assert_eq!(info["backing-filename-format"], "raw", "{name}");
        place.qemu_img(&["compare", "-F", "raw", name, "base.raw"]).good();
    }
}
