//! Bitmaps and snapshots of images through the program: what libnbd and QEMU read of them, while clients write and
//! after a SIGKILL.

use std::path::Path;

use super::{Running, run};

const URI: &str = "nbd+unix:///one?socket=socket";

/// Makes an image of 64 MiB with bitmaps of 64 KiB: `on`, and `off`, which records nothing.
fn create(dir: &Path) {
    run(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "disk.qcow2", "64M"]);
    run(dir, "qemu-img", &["bitmap", "--add", "disk.qcow2", "on"]);
    run(dir, "qemu-img", &["bitmap", "--add", "--disable", "disk.qcow2", "off"]);
    run(dir, "qemu-io", &["-f", "qcow2", "-c", "write -P 1 1M 100k", "disk.qcow2"]);
}

fn serve(dir: &Path, options: &str) -> Running {
    let export = format!("--export=one=disk.qcow2{options}");
    let mut server = Running::start(dir, &["--listen=unix:socket", &export]);
    server.address();
    server
}

/// The lines of a map, without the words for their values.
fn map(dir: &Path, context: &str) -> Vec<[u64; 3]> {
    let text = run(dir, "nbdinfo", &[&format!("--map={context}"), URI]);
    let number = |word: &str| word.parse().unwrap();
    let line = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        [number(words[0]), number(words[1]), number(words[2])]
    };
    text.lines().map(line).collect()
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

#[test]
fn bitmaps_are_listed_and_mapped_while_clients_write() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create(dir);
    let server = serve(dir, ",bitmap=on,bitmap=off");
    let listed = run(dir, "nbdinfo", &["--list", "--json", "nbd+unix:///?socket=socket"]);
    for context in ["base:allocation", "qemu:dirty-bitmap:on", "qemu:dirty-bitmap:off"] {
        assert!(listed.contains(context), "{listed}");
    }
    let clean = [[0, 64 * MIB, 0]];
    let before = [[0, MIB, 0], [MIB, 128 * KIB, 1], [MIB + 128 * KIB, 63 * MIB - 128 * KIB, 0]];
    assert_eq!(map(dir, "qemu:dirty-bitmap:on"), before);
    assert_eq!(map(dir, "qemu:dirty-bitmap:off"), clean);
    // Everything that changes the disk counts, also in one connection with the question.
    let script = "
h.add_meta_context('qemu:dirty-bitmap:on')
h.add_meta_context('base:allocation')
h.connect_uri('nbd+unix:///one?socket=socket')
told = {}
def note(context, offset, extents, error):
    told.setdefault(context, []).append((offset, list(extents)))
h.pwrite(b'x' * 10, 5 * 1024 * 1024)
h.block_status(8 * 1024 * 1024, 0, note)
assert told['qemu:dirty-bitmap:on'] == [(0, [1048576, 0, 131072, 1, 4063232, 0, 65536, 1, 3080192, 0])], told
assert 'base:allocation' in told
h.zero(65536, 40 * 1024 * 1024)
h.trim(65536, 1024 * 1024)
h.trim(65536, 50 * 1024 * 1024)
h.shutdown()
";
    run(dir, "nbdsh", &["-c", script]);
    let dirty: Vec<_> = map(dir, "qemu:dirty-bitmap:on")
        .into_iter()
        .filter(|[_, _, flags]| *flags == 1)
        .map(|[at, len, _]| (at / KIB, len / KIB))
        .collect();
    assert_eq!(dirty, [(1024, 128), (5 * 1024, 64), (40 * 1024, 64), (50 * 1024, 64)]);
    // QEMU as the client: what the bitmap calls dirty is not data to it.
    let options = "driver=nbd,server.type=unix,server.path=socket,export=one,\
                   x-dirty-bitmap=qemu:dirty-bitmap:on";
    let by_qemu = run(dir, "qemu-img", &["map", "--output=json", "--image-opts", options]);
    let holes: Vec<_> = by_qemu
        .lines()
        .filter(|line| line.contains("\"data\": false"))
        .map(|line| line.split("\"start\": ").nth(1).unwrap().split(',').next().unwrap().parse())
        .collect::<Result<Vec<u64>, _>>()
        .unwrap();
    assert_eq!(holes, [MIB, 5 * MIB, 40 * MIB, 50 * MIB], "{by_qemu}");
    assert!(server.stop());
    run(dir, "qemu-img", &["check", "-q", "disk.qcow2"]);
    // What we stored at the end QEMU reads.
    let context = "--map=qemu:dirty-bitmap:on";
    let peer = ["qemu-nbd", "-r", "-f", "qcow2", "-B", "on", "disk.qcow2"];
    let mut arguments = vec![context, "--", "["];
    arguments.extend(peer);
    arguments.push("]");
    let after = run(dir, "nbdinfo", &arguments);
    assert_eq!(after.lines().filter(|line| line.contains("dirty")).count(), 4, "{after}");
}

#[test]
fn the_wildcards_of_qemu_are_understood() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create(dir);
    let server = serve(dir, ",read-only,bitmap=on,bitmap=off");
    let script = "
h.set_opt_mode(True)
h.connect_uri('nbd+unix:///one?socket=socket')
def choose(queries):
    h.clear_meta_contexts()
    for query in queries:
        h.add_meta_context(query)
def ask(queries):
    found = []
    choose(queries)
    h.opt_list_meta_context(found.append)
    return found
on, off, base = 'qemu:dirty-bitmap:on', 'qemu:dirty-bitmap:off', 'base:allocation'
assert ask([]) == [base, on, off]
assert ask(['qemu:']) == [on, off]
assert ask(['qemu:dirty-bitmap:']) == [on, off]
assert ask(['qemu:dirty-bitmap:off']) == [off]
assert ask(['base:', 'qemu:dirty-bitmap:on']) == [base, on]
assert ask(['qemu:dirty-bitmap', 'qemu:allocation-depth', 'qemu:dirty-bitmap:o']) == []
choose(['qemu:', 'qemu:dirty-bitmap:', on])
h.opt_go()
assert h.can_meta_context(on) and not h.can_meta_context(off)
h.shutdown()
";
    run(dir, "nbdsh", &["-c", script]);
    assert!(server.stop());
}

#[test]
fn a_killed_server_leaves_its_bitmap_marked_as_not_saved() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create(dir);
    let mut server = serve(dir, ",bitmap=on");
    run(dir, "qemu-io", &["-f", "raw", "-c", "write 20M 1M", "-c", "flush", URI]);
    server.child.kill().unwrap();
    server.status();
    drop(server);
    let info = run(dir, "qemu-img", &["info", "disk.qcow2"]);
    assert!(info.contains("in-use"), "{info}");
    std::fs::remove_file(dir.join("socket")).unwrap();
    // It is not served again, and the image is, with what else it has.
    let export = "--export=one=disk.qcow2,bitmap=on";
    let mut refused = Running::start(dir, &["--listen=unix:socket", export]);
    assert!(!refused.status().success());
    let errors = refused.errors();
    assert!(errors.contains("not saved"), "{errors}");
    let server = serve(dir, ",bitmap=off");
    run(dir, "qemu-io", &["-f", "raw", "-c", "write 30M 1M", URI]);
    assert!(server.stop());
    let info = run(dir, "qemu-img", &["info", "disk.qcow2"]);
    assert!(info.contains("in-use"), "{info}");
}

#[test]
fn a_snapshot_is_served_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create(dir);
    run(dir, "qemu-img", &["convert", "-O", "raw", "disk.qcow2", "before.img"]);
    run(dir, "qemu-img", &["bitmap", "--remove", "disk.qcow2", "on"]);
    run(dir, "qemu-img", &["bitmap", "--remove", "disk.qcow2", "off"]);
    run(dir, "qemu-img", &["snapshot", "-c", "one, two", "disk.qcow2"]);
    run(dir, "qemu-io", &["-f", "qcow2", "-c", "write -P 2 0 8M", "disk.qcow2"]);
    let server = serve(dir, ",snapshot=one,, two");
    assert!(run(dir, "nbdinfo", &["--json", URI]).contains("\"is_read_only\": true"));
    run(dir, "nbdcopy", &[URI, "copy.img"]);
    run(dir, "qemu-img", &["compare", "-q", "-f", "raw", "-F", "raw", "before.img", "copy.img"]);
    assert!(server.stop());
}

#[test]
fn bitmaps_and_snapshots_that_are_not_there_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create(dir);
    for (options, reason) in [
        (",bitmap=none", "there is no bitmap \"none\" in the image"),
        (",snapshot=none", "none"),
        (",bitmap=on,snapshot=x", "not of a snapshot"),
    ] {
        let export = format!("--export=one=disk.qcow2{options}");
        let mut server = Running::start(dir, &["--listen=unix:socket", &export]);
        assert!(!server.status().success(), "{options}");
        let errors = server.errors();
        assert!(errors.contains(reason), "{options}: {errors}");
    }
}

#[test]
fn a_bitmap_of_an_image_below_is_found_as_qemu_finds_it() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create(dir);
    // An image over it that is larger, and has one bitmap of the same name and one of its own.
    let over = ["-F", "qcow2", "-b", "disk.qcow2", "over.qcow2", "80M"];
    run(dir, "qemu-img", &[&["create", "-q", "-f", "qcow2"][..], &over].concat());
    run(dir, "qemu-img", &["bitmap", "--add", "over.qcow2", "off"]);
    run(dir, "qemu-io", &["-f", "qcow2", "-c", "write -P 2 70M 100k", "over.qcow2"]);
    let mut export = Running::start(
        dir,
        &["--listen=unix:socket", "--export=one=over.qcow2,bitmap=on,bitmap=off"],
    );
    export.address();
    for name in ["on", "off"] {
        let context = format!("qemu:dirty-bitmap:{name}");
        let ours = map(dir, &context);
        assert_eq!(ours.last().map(|part| part[0] + part[1]), Some(80 * MIB));
        let listed = format!("--map={context}");
        let peer = ["qemu-nbd", "-r", "-f", "qcow2", "-B", name, "copy.qcow2"];
        // QEMU may not open what we have open for writing.
        std::fs::copy(dir.join("over.qcow2"), dir.join("copy.qcow2")).unwrap();
        let arguments = [&[listed.as_str(), "--", "["][..], &peer, &["]"]].concat();
        let theirs = run(dir, "nbdinfo", &arguments);
        let number = |line: &str| -> Vec<u64> {
            line.split_whitespace().take(3).map(|word| word.parse().unwrap()).collect()
        };
        let theirs: Vec<Vec<u64>> = theirs.lines().map(number).collect();
        let ours: Vec<Vec<u64>> = ours.iter().map(|part| part.to_vec()).collect();
        assert_eq!(ours, theirs, "{name}");
    }
    assert!(export.stop());
}
