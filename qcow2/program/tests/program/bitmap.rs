//! `bitmap` beside qemu-img's.

use serde_json::Value;

use crate::support::{Place, serve};

/// What `info` tells of the bitmaps.
fn bitmaps(place: &Place, name: &str) -> Value {
    let info = place.qemu_img(&["info", "--output=json", name]).good().json();
    info["format-specific"]["data"]["bitmaps"].clone()
}

/// What qemu-nbd tells of the content of a bitmap.
fn dirty(place: &Place, name: &str, bitmap: &str) -> String {
    let socket = place.path(&format!("{name}.{bitmap}.s")).display().to_string();
    let args = ["-r", "-f", "qcow2", "-t", "-B", bitmap, "-k", &socket, name];
    let _server = serve(place, &args, &socket);
    let uri = format!("nbd+unix:///?socket={socket}");
    let context = format!("--map=qemu:dirty-bitmap:{bitmap}");
    place.tool("nbdinfo", &[&context, &uri]).out
}

fn image(place: &Place, name: &str) {
    place.qemu_img(&["create", "-f", "qcow2", name, "16M"]).good();
}

#[test]
fn the_same_actions_leave_the_same_bitmaps() {
    let place = Place::new();
    let steps: [&[&str]; 8] = [
        &["--add", "NAME", "a"],
        &["--add", "-g", "4k", "NAME", "b"],
        &["--disable", "NAME", "a"],
        &["--add", "--disable", "NAME", "c"],
        &["--merge", "b", "--merge", "a", "NAME", "c"],
        &["--enable", "--clear", "NAME", "a"],
        &["--remove", "--add", "-g", "128k", "NAME", "b"],
        &["--merge", "c", "-b", "other.qcow2", "-F", "qcow2", "NAME", "b"],
    ];
    image(&place, "other.qcow2");
    place.qemu_img(&["bitmap", "--add", "other.qcow2", "c"]).good();
    place.qemu_io("other.qcow2", &["write 3M 1M"]);
    for name in ["ours.qcow2", "theirs.qcow2"] {
        image(&place, name);
        for (number, step) in steps.iter().enumerate() {
            let mut line = vec!["bitmap"];
            line.extend(step.iter().map(|word| if *word == "NAME" { name } else { word }));
            let answer =
                if name == "ours.qcow2" { place.qcow2(&line) } else { place.qemu_img(&line) };
            assert_eq!(answer.good().out, "");
            let write = format!("write {number}M 300k");
            place.qemu_io(name, &[&write]);
        }
        place.qemu_img(&["check", name]).good();
    }
    assert_eq!(bitmaps(&place, "ours.qcow2"), bitmaps(&place, "theirs.qcow2"));
    for bitmap in ["a", "b", "c"] {
        let (ours, theirs) =
            (dirty(&place, "ours.qcow2", bitmap), dirty(&place, "theirs.qcow2", bitmap));
        assert_eq!(ours, theirs, "{bitmap}");
    }
}

#[test]
fn a_copy_takes_its_bitmaps_along() {
    let place = Place::new();
    image(&place, "a.qcow2");
    for bitmap in ["x", "y"] {
        place.qemu_img(&["bitmap", "--add", "a.qcow2", bitmap]).good();
    }
    place.qemu_img(&["bitmap", "--disable", "a.qcow2", "y"]).good();
    place.qemu_io("a.qcow2", &["write -P 3 1M 1M"]);
    for options in [&[][..], &["-c"]] {
        let mut line = vec!["convert", "--bitmaps", "-O", "qcow2"];
        line.extend(options);
        line.extend(["a.qcow2", "b.qcow2"]);
        place.qcow2(&line).good();
        assert_eq!(bitmaps(&place, "b.qcow2"), bitmaps(&place, "a.qcow2"));
        assert_eq!(dirty(&place, "b.qcow2", "x"), dirty(&place, "a.qcow2", "x"));
        place.qemu_img(&["check", "b.qcow2"]).good();
    }
    place.qcow2(&["convert", "--bitmaps", "a.qcow2", "b.raw"]).bad(1, "does not support bitmaps");
    let line = ["measure", "-O", "qcow2", "a.qcow2"];
    assert_eq!(place.qcow2(&line).good().out, place.qemu_img(&line).good().out);
}

#[test]
fn what_bitmaps_cannot_be_is_refused() {
    let place = Place::new();
    image(&place, "a.qcow2");
    place.qemu_img(&["bitmap", "--add", "a.qcow2", "x"]).good();
    for args in [
        &["a.qcow2", "x"][..],
        &["--add", "a.qcow2", "x"],
        &["--remove", "a.qcow2", "never"],
        &["--add", "-g", "1000", "a.qcow2", "z"],
        &["--clear", "-g", "64k", "a.qcow2", "x"],
        &["--add", "-F", "qcow2", "a.qcow2", "z"],
        &["--add", "-b", "a.qcow2", "a.qcow2", "z"],
        &["--merge", "never", "a.qcow2", "x"],
        &["--add", "a.qcow2"],
    ] {
        let mut line = vec!["bitmap"];
        line.extend(args);
        let (ours, theirs) = (place.qcow2(&line), place.qemu_img(&line));
        assert_eq!((ours.code, theirs.code), (1, 1), "{args:?}: {ours:?}");
        let text = ours.err.contains("Operation");
        assert_eq!(text, theirs.err.contains("Operation"), "{ours:?} {theirs:?}");
    }
}

#[test]
fn a_bitmap_that_was_not_saved_comes_with_what_to_do() {
    let place = Place::new();
    place.qemu_img(&["create", "-q", "-f", "qcow2", "a", "1M"]).good();
    place.qemu_img(&["bitmap", "--add", "a", "b"]).good();
    let mut bytes = place.read("a");
    let extension = [0x23, 0x85, 0x28, 0x75];
    let at = bytes.windows(4).position(|word| word == extension).expect("the extension");
    let directory = u64::from_be_bytes(bytes[at + 24..at + 32].try_into().unwrap());
    // Of the flags of the entry: in use.
    bytes[usize::try_from(directory).unwrap() + 15] |= 1;
    std::fs::write(place.path("a"), bytes).unwrap();
    let line = ["bitmap", "--clear", "a", "b"];
    let advice = "it can only be removed (qcow2 bitmap --remove a \"b\")";
    place.qcow2(&line).bad(1, advice);
    assert_eq!(place.qemu_img(&line).code, 1);
    // What is advised is never about what is in order.
    place.qcow2(&["bitmap", "--add", "a", "sound"]).good();
    place.qcow2(&["bitmap", "--merge", "b", "a", "sound"]).bad(1, advice);
    place.qemu_img(&["create", "-q", "-f", "qcow2", "other", "1M"]).good();
    place.qcow2(&["bitmap", "--add", "other", "sound"]).good();
    let from_a = ["bitmap", "--merge", "b", "-b", "a", "-F", "qcow2", "other", "sound"];
    place.qcow2(&from_a).bad(1, advice);
    let socket = place.path("s").display().to_string();
    let busy = serve(&place, &["-f", "qcow2", "-k", &socket, "other"], &socket);
    let from_other = ["bitmap", "--merge", "sound", "-b", "other", "-F", "qcow2", "a", "sound"];
    let locked = place.qcow2(&from_other).bad(1, "qemu-nbd");
    assert!(!locked.err.contains("-U"), "there is no such option: {locked:?}");
    drop(busy);
    place.qcow2(&["bitmap", "--remove", "a", "b"]).good();
}
