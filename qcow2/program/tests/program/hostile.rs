//! The program and images that lie: whatever an image says, each command ends by itself, soon, with a code of its own,
//! within 512 MiB and five seconds, and no file that is not the image's is read or written. Attacks that once worked on
//! others stand here by the names under which they became known.

#[path = "../../../tests/hostile/anatomy.rs"]
mod anatomy;
#[path = "../../../tests/hostile/samples.rs"]
mod samples;

use anatomy::{Anatomy, Mutant};
use samples::{KINDS, SECRET, sample};

use crate::rounds::rounds;
use crate::support::{Answer, Place, exists};

/// What no answer and no output may hold.
const TREASURE: &str = "root:x:0:0:the treasure of the host";

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

/// A folder with images, and outside of it a file that is nobody's business.
struct Host {
    place: Place,
    outside: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let host = Self { place: Place::new(), outside: tempfile::tempdir().unwrap() };
        std::fs::write(host.treasure(), treasure()).unwrap();
        host
    }

    fn treasure(&self) -> String {
        self.outside.path().join("passwd").to_str().unwrap().to_owned()
    }

    fn put(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.place.path(name), bytes).unwrap();
    }

    /// Runs a command, which must end by itself.
    fn run(&self, args: &[&str], what: &str) -> Answer {
        let answer = self.place.limited(args);
        assert!((0..=3).contains(&answer.code), "{args:?}, {what}: {answer:?}");
        assert!(!answer.err.contains("panicked"), "{args:?}, {what}: {answer:?}");
        let said = answer.out.clone() + &answer.err;
        assert!(!said.contains("the treasure"), "{args:?}, {what}: {answer:?}");
        answer
    }

    /// Runs all commands that only look at an image: info, check, map, convert.
    fn look(&self, name: &str, what: &str) -> Vec<Answer> {
        let looks = [
            vec!["info", "-f", "qcow2", "--output", "json", name],
            vec!["check", "-f", "qcow2", name],
            vec!["map", "-f", "qcow2", "--output", "json", name],
            vec!["convert", "-f", "qcow2", "-O", "raw", name, "out.raw"],
        ];
        let answers = looks.iter().map(|look| self.run(look, what)).collect();
        self.nothing_leaked(what);
        answers
    }

    /// Runs all commands that change an image, too.
    fn change(&self, name: &str, what: &str) {
        for change in [
            vec!["bench", "-q", "-f", "qcow2", "-w", "-c", "10", "-s", "4096", name],
            vec!["snapshot", "-c", "new", name],
            vec!["snapshot", "-a", "1", name],
            vec!["snapshot", "-d", "1", name],
            vec!["bitmap", "--add", name, "new"],
            vec!["bitmap", "--merge", "new", name, "bitmap 0"],
            vec!["bitmap", "--remove", name, "bitmap 0"],
            vec!["resize", "-f", "qcow2", name, "+1M"],
            vec!["amend", "-f", "qcow2", "-o", "refcount_bits=32", name],
            vec!["commit", "-f", "qcow2", name],
            vec!["rebase", "-f", "qcow2", "-b", "", name],
            vec!["check", "-f", "qcow2", "-r", "leaks", name],
            vec!["check", "-f", "qcow2", "-r", "all", name],
        ] {
            self.run(&change, what);
        }
        self.nothing_leaked(what);
    }

    /// The treasure is as it was, and nowhere else.
    fn nothing_leaked(&self, what: &str) {
        assert_eq!(std::fs::read(self.treasure()).unwrap(), treasure(), "{what}: it was written");
        for name in ["out.raw", "out.qcow2"] {
            if exists(&self.place.path(name)) {
                let out = self.place.read(name);
                let found = out.windows(12).any(|part| part == b"the treasure");
                assert!(!found, "{what}: the treasure is in {name}");
                std::fs::remove_file(self.place.path(name)).unwrap();
            }
        }
    }
}

fn treasure() -> Vec<u8> {
    TREASURE.as_bytes().iter().copied().cycle().take(65536).collect()
}

/// Every command over some lies of these kinds of images.
fn lie_with(kinds: &[&'static str]) {
    let host = Host::new();
    for kind in kinds {
        let sound = block_on(sample(kind));
        let anatomy = Anatomy::of(&sound.bytes);
        let liars = anatomy.liars(rounds(10)).chain(anatomy.overlaps(rounds(4)));
        let stumps = anatomy.stumps().step_by(if rounds(1) > 1 { 1 } else { 20 });
        for Mutant { what, bytes } in liars.chain(stumps) {
            for name in ["data", "below"] {
                host.put(name, &vec![0; 100_000]);
            }
            host.put("disk.qcow2", &bytes);
            let what = format!("{}: {what}", sound.name);
            host.look("disk.qcow2", &what);
            host.change("disk.qcow2", &what);
        }
    }
}

#[test]
fn simple_images_that_lie_end_no_command_by_a_signal() {
    lie_with(&KINDS[..5]);
}

#[test]
fn compressed_and_extended_images_that_lie_end_no_command_by_a_signal() {
    lie_with(&KINDS[5..8]);
}

#[test]
fn images_with_tables_of_more_kinds_that_lie_end_no_command_by_a_signal() {
    lie_with(&KINDS[8..]);
}

/// Looks at and changes a sound image in which these fields hold these numbers.
fn with_fields(kind: &'static str, lies: &[(&str, u64)]) {
    let host = Host::new();
    let sound = block_on(sample(kind));
    let anatomy = Anatomy::of(&sound.bytes);
    for (name, number) in lies {
        let fields = anatomy.fields.iter().filter(|field| field.what.ends_with(name));
        let mut any = false;
        for field in fields {
            let mut bytes = sound.bytes.clone();
            let number = number.to_be_bytes();
            bytes[field.at..field.at + field.len].copy_from_slice(&number[8 - field.len..]);
            host.put("disk.qcow2", &bytes);
            let what = format!("{} is {number:?}", field.what);
            host.look("disk.qcow2", &what);
            host.change("disk.qcow2", &what);
            any = true;
        }
        assert!(any, "no field {name} in {kind}");
    }
}

/// Divisors of zero.
#[test]
fn cve_2014_0142_what_is_divided_by_is_not_zero() {
    with_fields("plain", &[("cluster_bits", 0), ("cluster_bits", 64), ("refcount_order", 64)]);
    with_fields("bitmaps", &[("granularity_bits", 0), ("granularity_bits", 64)]);
}

/// Lengths of tables whose product wraps around.
#[test]
fn cve_2014_0143_lengths_of_tables_do_not_wrap_around() {
    let most = u64::from(u32::MAX);
    with_fields("plain", &[("size", u64::MAX), ("size", i64::MAX.unsigned_abs())]);
    with_fields("plain", &[("l1_size", most), ("l1_size", 0x2000_0001)]);
    with_fields("plain", &[("refcount_table_clusters", 0x0080_0000), ("nb_snapshots", most)]);
    with_fields("snapshots", &[("0 l1_size", 0x2000_0001), ("1 vm_state_size 64", u64::MAX)]);
}

/// Fields of the header that nobody looked at before they were used.
#[test]
fn cve_2014_0144_fields_of_the_header_are_looked_at_before_they_are_used() {
    let most = u64::from(u32::MAX);
    with_fields("backing", &[("header_length", most), ("backing_file_size", most)]);
    with_fields("backing", &[("backing_file_offset", u64::MAX - 3), ("backing_file_offset", 90)]);
    with_fields("plain", &[("refcount_table_offset", 0x201), ("l1_table_offset", 0x1_0000_0201)]);
    with_fields("snapshots", &[("snapshots_offset", 0xffff_ffff_ffff_fe00)]);
}

/// A snapshot with a longer L1 table than the image has, and names that end behind their table.
#[test]
fn cve_2014_0145_a_snapshot_is_no_larger_than_the_place_for_it() {
    with_fields("snapshots", &[("0 l1_size", 0x40_0000), ("0 l1_size", 64), ("0 id_size", 0xffff)]);
    with_fields("snapshots", &[("1 name_size", 0xffff), ("0 extra_data_size", 0xffff_ffff)]);
}

/// Opening that fails half-way, with some tables read and others not.
#[test]
fn cve_2014_0146_opening_that_fails_half_way_ends_well() {
    with_fields("snapshots", &[("snapshots_offset", 0x4000_0000), ("nb_snapshots", 65536)]);
    with_fields("bitmaps", &[("directory_offset", 0x4000_0000), ("directory_size", u64::MAX)]);
}

/// An image in which looking for a free cluster never ends: all are counted, or the counts count themselves.
#[test]
fn cve_2014_0147_looking_for_a_free_cluster_ends() {
    let host = Host::new();
    let sound = block_on(sample("plain"));
    let anatomy = Anatomy::of(&sound.bytes);
    let find = |what| anatomy.structures.iter().find(|part| part.what == what).unwrap().clone();
    let (table, block) = (find("refcount table"), find("refcount block"));
    let mut full = sound.bytes.clone();
    full[block.at..block.at + block.len].fill(0xff);
    let mut own = sound.bytes.clone();
    for at in (table.at..table.at + table.len).step_by(8) {
        own[at..at + 8].copy_from_slice(&(table.at as u64).to_be_bytes());
    }
    let mut none = sound.bytes.clone();
    none[table.at..table.at + table.len].fill(0);
    for (what, bytes) in [("all are counted", full), ("blocks are the table", own), ("none", none)]
    {
        host.put("disk.qcow2", &bytes);
        host.look("disk.qcow2", what);
        host.run(&["bench", "-f", "qcow2", "-w", "-c", "20", "-s", "4096", "disk.qcow2"], what);
        host.change("disk.qcow2", what);
    }
    // Where nothing is counted nothing was written, and the repair at the end has found everything.
    host.put("sound.qcow2", &sound.bytes);
    host.place.qemu_img(&["check", "disk.qcow2"]).good();
    host.place.qemu_img(&["compare", "sound.qcow2", "disk.qcow2"]).good();
}

/// Sizes of blocks of zero, in the other format that has tables.
#[test]
fn cve_2014_0148_blocks_have_a_size() {
    let host = Host::new();
    host.place.qemu_img(&["create", "-q", "-f", "vmdk", "sound.vmdk", "10M"]).good();
    let sound = host.place.read("sound.vmdk");
    // Capacity, grain, descriptor, its length, entries of a table, directories.
    for (at, len) in [(12, 8), (20, 8), (28, 8), (36, 8), (44, 4), (48, 8), (56, 8)] {
        for byte in [0, 0x7f, 0xff] {
            let mut bytes = sound.clone();
            bytes[at..at + len].fill(byte);
            host.put("disk.vmdk", &bytes);
            let what = format!("VMDK {at} is {byte}");
            host.run(&["info", "-f", "vmdk", "disk.vmdk"], &what);
            host.run(&["convert", "-f", "vmdk", "-O", "raw", "disk.vmdk", "out.raw"], &what);
            host.nothing_leaked(&what);
        }
    }
}

/// An uploaded image over a file of the host.
#[test]
fn cve_2015_5163_a_backing_file_outside_is_named_and_not_read() {
    let host = Host::new();
    let treasure = host.treasure();
    let outside = host.outside.path().file_name().unwrap().to_str().unwrap();
    let relative = format!("../{outside}/passwd");
    for name in [&*treasure, &relative, "/etc/passwd"] {
        for format in ["raw", "qcow2"] {
            let line =
                ["create", "-q", "-u", "-f", "qcow2", "-F", format, "-b", name, "disk", "1M"];
            host.place.qemu_img(&line).good();
            let answers = host.look("disk", name);
            assert!(answers[0].code == 0 && answers[0].out.contains(name), "{answers:?}");
            assert!(answers[2].code == 1 && answers[3].code == 1, "{answers:?}");
            let line = ["convert", "-O", "qcow2", "disk", "out.qcow2"];
            host.run(&line, name).bad(1, "--allow-references");
            host.run(&["commit", "-f", "qcow2", "disk"], name).bad(1, "");
            host.run(&["rebase", "-f", "qcow2", "-b", "", "disk"], name).bad(1, "");
            host.change("disk", name);
        }
    }
    // A link inside is no way out.
    std::os::unix::fs::symlink(&treasure, host.place.path("link")).unwrap();
    let line = ["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "link", "disk", "1M"];
    host.place.qemu_img(&line).good();
    assert_eq!(host.look("disk", "a link")[3].code, 1);
}

/// A VMDK descriptor whose extent is a file of the host.
#[test]
fn cve_2022_47951_an_extent_outside_is_not_read() {
    let host = Host::new();
    let treasure = host.treasure();
    for kind in ["monolithicFlat", "twoGbMaxExtentFlat"] {
        for name in [&*treasure, "/etc/passwd"] {
            let descriptor = format!(
                "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n\
                 createType=\"{kind}\"\n\nRW 128 FLAT \"{name}\" 0\n\n\
                 ddb.virtualHWVersion = \"4\"\nddb.adapterType = \"ide\"\n"
            );
            host.put("disk.vmdk", descriptor.as_bytes());
            let line = ["convert", "-f", "vmdk", "-O", "raw", "disk.vmdk", "out.raw"];
            host.run(&line, name).bad(1, "");
            host.run(&["info", "-f", "vmdk", "disk.vmdk"], name);
            // As a backing file, and found out by itself, too.
            let line = ["-f", "qcow2", "-F", "vmdk", "-b", "disk.vmdk", "top", "64k"];
            host.place.qemu_img(&[&["create", "-q", "-u"], &line[..]].concat()).good();
            assert_eq!(host.look("top", name)[3].code, 1);
            host.run(&["convert", "-O", "raw", "disk.vmdk", "out.raw"], name);
            host.nothing_leaked(name);
        }
    }
}

/// An image whose data file is another name than the sample's.
fn with_data_file(name: &str) -> Vec<u8> {
    let mut bytes = block_on(sample("plain")).bytes;
    // Behind the fields that every header of version 3 has.
    let start = 104;
    let mut extension = 0x4441_5441u32.to_be_bytes().to_vec();
    extension.extend_from_slice(&u32::try_from(name.len()).unwrap().to_be_bytes());
    extension.extend_from_slice(name.as_bytes());
    extension.resize(extension.len().next_multiple_of(8) + 8, 0);
    bytes[start..512].fill(0);
    bytes[100..104].copy_from_slice(&104u32.to_be_bytes());
    bytes[start..start + extension.len()].copy_from_slice(&extension);
    bytes[79] |= 4;
    bytes
}

/// A data file whose name is a whole configuration: asking for information must not even try it.
#[test]
fn cve_2024_4467_a_data_file_name_is_no_configuration() {
    let host = Host::new();
    for name in [
        format!("json:{{\"driver\":\"raw\",\"file\":{{\"filename\":\"{}\"}}}}", host.treasure()),
        "json:{\"driver\":\"null-co\",\"size\":9000000000000}".to_owned(),
        "json:{\"file.driver\":\"nbd\",\"file.host\":\"127.0.0.1\"}".to_owned(),
        "nbd://127.0.0.1/x".to_owned(),
        format!("file:{}", host.treasure()),
    ] {
        host.put("disk", &with_data_file(&name));
        let answers = host.look("disk", &name);
        assert_eq!(answers[0].code, 0, "info looks at the image alone: {answers:?}");
        assert!(answers[2].code == 1 && answers[3].code == 1, "{answers:?}");
        host.change("disk", &name);
        let line = ["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", &name, "top", "1M"];
        host.place.qemu_img(&line).good();
        assert_eq!(host.look("top", &name)[3].code, 1);
    }
}

/// An uploaded image whose data file is a file of the host.
#[test]
fn cve_2024_32498_a_data_file_outside_is_neither_read_nor_written() {
    let host = Host::new();
    for name in [host.treasure(), "/etc/passwd".to_owned(), "/dev/zero".to_owned()] {
        host.put("disk", &with_data_file(&name));
        let answers = host.look("disk", &name);
        assert!(answers[2].code == 1 && answers[3].code == 1, "{answers:?}");
        host.run(&["bench", "-f", "qcow2", "-w", "-c", "2", "disk"], &name).bad(1, "");
        host.change("disk", &name);
        // One layer down it is no better.
        let line = ["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "disk", "top", "64k"];
        host.place.qemu_img(&line).good();
        assert_eq!(host.look("top", &name)[3].code, 1);
    }
}

/// A raw disk that holds an image with a data file: what is recorded as raw is read as raw.
#[test]
fn cve_2024_40767_a_raw_disk_is_not_taken_for_the_image_in_it() {
    let host = Host::new();
    let inner = with_data_file(&host.treasure());
    host.put("disk.raw", &inner);
    host.run(&["convert", "-f", "raw", "-O", "raw", "disk.raw", "copy.raw"], "raw").good();
    assert_eq!(host.place.read("copy.raw")[..inner.len()], inner);
    let line = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "disk.raw", "top"];
    host.place.qemu_img(&line).good();
    host.run(&["convert", "-O", "raw", "top", "copy.raw"], "raw below").good();
    assert_eq!(host.place.read("copy.raw")[..inner.len()], inner);
    // Where nothing records the format, nobody guesses.
    let line = ["create", "-q", "-u", "-f", "qcow2", "-b", "disk.raw", "top", "64k"];
    let made = host.place.qemu_img(&line);
    if made.code == 0 {
        assert_eq!(host.look("top", "no format")[3].code, 1);
    }
    // Found out by itself it is an image, whose data file is refused.
    host.run(&["convert", "-O", "raw", "disk.raw", "out.raw"], "found out").bad(1, "");
    host.nothing_leaked("found out");
}

/// A guest writes an image into its raw disk, and the host makes the disk larger.
#[test]
fn cve_2026_24708_a_resize_touches_no_file_that_the_guest_names() {
    let host = Host::new();
    let inner = with_data_file(&host.treasure());
    for line in [
        &["resize", "disk", "10M"][..],
        &["resize", "--shrink", "disk", "512"],
        &["resize", "-f", "qcow2", "disk", "10M"],
        &["resize", "-f", "qcow2", "--shrink", "disk", "512"],
        &["resize", "--image-opts", "driver=qcow2,file.filename=disk", "10M"],
    ] {
        host.put("disk", &inner);
        assert_ne!(host.run(line, "an image in a raw disk").code, 0, "{line:?}");
        assert_eq!(host.place.read("disk"), inner, "{line:?}");
        host.nothing_leaked("resize");
    }
    host.put("disk", &inner);
    host.run(&["resize", "-f", "raw", "disk", "10M"], "as raw").good();
    assert_eq!(host.place.read("disk").len(), 10 << 20);
    host.nothing_leaked("resize as raw");
}

#[test]
fn what_is_no_regular_file_is_not_followed() {
    let host = Host::new();
    host.place.tool("mkfifo", &["pipe"]);
    std::fs::create_dir(host.place.path("folder")).unwrap();
    for name in ["pipe", "folder", ".", "/dev/zero", "/dev/stdin", "/proc/self/mem"] {
        for format in ["raw", "qcow2", "vmdk"] {
            let line = ["create", "-q", "-u", "-f", "qcow2", "-F", format, "-b", name, "top", "1M"];
            host.place.qemu_img(&line).good();
            let answers = host.look("top", name);
            assert!(answers[2].code == 1 && answers[3].code == 1, "{name}: {answers:?}");
        }
        host.put("top", &with_data_file(name));
        assert_eq!(host.look("top", name)[3].code, 1);
    }
    for name in ["pipe", "folder"] {
        for answer in host.look(name, "the image itself") {
            assert_eq!(answer.code, 1, "{name}: {answer:?}");
        }
        for command in ["info", "check", "map", "snapshot", "measure", "resize", "commit", "rebase"]
        {
            let more: &[&str] = match command {
                "resize" => &["+1M"],
                _ => &[],
            };
            let answer = host.run(&[&[command, name], more].concat(), "no format is named");
            assert_eq!(answer.code, 1, "{command} {name}: {answer:?}");
        }
    }
}

#[test]
fn chains_that_never_end_are_refused() {
    let host = Host::new();
    let create = |name: &str, below: &str| {
        let line = ["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", below, name, "1M"];
        host.place.qemu_img(&line).good();
    };
    create("new", "self");
    std::fs::rename(host.place.path("new"), host.place.path("self")).unwrap();
    create("one", "two");
    create("two", "./one");
    host.put("own", &with_data_file("own"));
    create("over", "own");
    for name in ["self", "one", "own", "over"] {
        let answers = host.look(name, "a loop");
        assert!(answers[2].code == 1 && answers[3].code == 1, "{name}: {answers:?}");
        let chain = ["info", "--backing-chain", "-f", "qcow2", name];
        host.run(&chain, "a loop");
    }
    host.run(&["info", "--backing-chain", "-f", "qcow2", "one"], "a loop").bad(1, "");
}

#[test]
fn an_encrypted_image_that_lies_ends_no_command_by_a_signal() {
    let host = Host::new();
    let sound = block_on(sample("luks"));
    let anatomy = Anatomy::of(&sound.bytes);
    let secret = format!("secret,id=s,data={SECRET}");
    for Mutant { what, bytes } in anatomy.liars(20) {
        host.put("disk", &bytes);
        host.look("disk", &what);
        let image = "driver=qcow2,file.filename=disk,encrypt.key-secret=s";
        let line = ["--object", &secret, "--image-opts", image, "-O", "raw", "out.raw"];
        // What asks for much work is to be looked at, not waited for.
        host.run(&[&["convert", "--unlock-seconds", "1"], &line[..]].concat(), &what);
        host.nothing_leaked(&what);
    }
}
