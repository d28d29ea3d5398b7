//! `snapshot` beside qemu-img's.

use crate::support::Place;

fn image(place: &Place) {
    place.qemu_img(&["create", "-f", "qcow2", "a.qcow2", "16M"]).good();
    place.qemu_io("a.qcow2", &["write -P 1 0 4M"]);
}

#[test]
fn snapshots_are_made_listed_applied_and_deleted() {
    let place = Place::new();
    image(&place);
    assert_eq!(place.qcow2(&["snapshot", "-l", "a.qcow2"]).good().out, "");
    place.qcow2(&["snapshot", "-c", "one", "a.qcow2"]).good();
    place.qemu_img(&["check", "a.qcow2"]).good();
    place.qemu_io("a.qcow2", &["write -P 2 0 2M"]);
    place.qcow2(&["snapshot", "-q", "-c", "two", "a.qcow2"]).good();
    place.qemu_io("a.qcow2", &["write -P 3 0 1M"]);
    let list = ["snapshot", "-l", "a.qcow2"];
    assert_eq!(place.qcow2(&list).good().out, place.qemu_img(&list).good().out);
    place.qcow2(&["snapshot", "-a", "two", "a.qcow2"]).good();
    place.qemu_io("a.qcow2", &["read -P 2 0 2M", "read -P 1 2M 2M"]);
    place.qcow2(&["snapshot", "-d", "1", "a.qcow2"]).good();
    assert_eq!(place.qcow2(&list).good().out, place.qemu_img(&list).good().out);
    place.qcow2(&["snapshot", "-d", "two", "a.qcow2"]).good();
    assert_eq!(place.qcow2(&list).good().out, "");
    place.qemu_img(&["check", "a.qcow2"]).good();
    place.qemu_io("a.qcow2", &["read -P 2 0 2M", "read -P 1 2M 2M"]);
}

#[test]
fn a_snapshot_that_is_not_there_is_named() {
    let place = Place::new();
    image(&place);
    for (letter, verb) in [("-a", "apply"), ("-d", "delete")] {
        let text = format!("Could not {verb} snapshot 'never'");
        place.qcow2(&["snapshot", letter, "never", "a.qcow2"]).bad(1, &text);
        place.qemu_img(&["snapshot", letter, "never", "a.qcow2"]).bad(1, &text);
    }
    place.qcow2(&["snapshot", "-l", "-c", "x", "a.qcow2"]).bad(1, "cannot be used with");
    place.qcow2(&["snapshot", "-U", "-c", "x", "a.qcow2"]).bad(1, "-U is for reading");
}
