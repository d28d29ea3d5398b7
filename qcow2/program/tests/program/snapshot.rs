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
    for list in [&list[..], &["snapshot", "a.qcow2"]] {
        assert_eq!(place.qcow2(list).good().out, place.qemu_img(list).good().out);
    }
    place.qcow2(&["snapshot", "-a", "two", "a.qcow2"]).good();
    place.qemu_io("a.qcow2", &["read -P 2 0 2M", "read -P 1 2M 2M"]);
    place.qcow2(&["snapshot", "-d", "one", "a.qcow2"]).good();
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

#[test]
fn a_snapshot_is_deleted_by_name_alone_and_applied_by_id_first() {
    let [ours, theirs] = [Place::new(), Place::new()];
    let listed = |place: &Place| {
        let info = place.qemu_img(&["info", "--output=json", "a.qcow2"]).good().json();
        let list = info["snapshots"].as_array().cloned().unwrap_or_default();
        let names = list.iter().map(|it| format!("{} {}", it["id"], it["name"]));
        names.collect::<Vec<_>>()
    };
    for place in [&ours, &theirs] {
        image(place);
        // Each has the other's id as its name.
        for (name, write) in [("2", "write -P 7 0 1M"), ("1", "write -P 8 0 1M")] {
            place.qemu_io("a.qcow2", &[write]);
            place.qemu_img(&["snapshot", "-c", name, "a.qcow2"]).good();
        }
    }
    for line in [
        ["snapshot", "-a", "1", "a.qcow2"],
        ["snapshot", "-d", "3", "a.qcow2"],
        ["snapshot", "-d", "2", "a.qcow2"],
        // An id that is no name.
        ["snapshot", "-d", "2", "a.qcow2"],
    ] {
        assert_eq!(ours.qcow2(&line).code, theirs.qemu_img(&line).code, "{line:?}");
        assert_eq!(listed(&ours), listed(&theirs), "{line:?}");
    }
    assert_eq!(listed(&ours), [r#""2" "1""#]);
    ours.qemu_io("a.qcow2", &["read -P 7 0 1M"]);
}
