//! Parts of images and block devices, judged by nbdkit's partitioning plugin and partition filter.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Running, run};

/// A disk that nbdkit divides, with partitions of these bytes; the bytes of each partition.
fn divided(dir: &Path, kind: &str, count: usize) -> Vec<Vec<u8>> {
    let mut parts = Vec::new();
    let mut command = format!("nbdkit -U - partitioning partition-type={kind}");
    for index in 0..count {
        let byte = u8::try_from(index).unwrap() + 1;
        let bytes = vec![byte; 100 * 1024 + index * 512];
        std::fs::write(dir.join(format!("part{index}")), &bytes).unwrap();
        command += &format!(" file=part{index}");
        parts.push(bytes);
    }
    run(dir, "sh", &["-c", &format!("{command} --run 'nbdcopy \"$uri\" disk.img'")]);
    parts
}

fn copy(dir: &Path, name: &str) -> Vec<u8> {
    let uri = format!("nbd+unix:///{name}?socket=socket");
    run(dir, "nbdcopy", &[&uri, "copy.img"]);
    std::fs::read(dir.join("copy.img")).unwrap()
}

#[test]
fn partitions_are_served_as_nbdkit_makes_and_finds_them() {
    for (kind, count) in [("mbr", 6), ("gpt", 5)] {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let parts = divided(dir, kind, count);
        // nbdkit makes the fourth of an MBR with more an extended one.
        let number = |index: usize| if kind == "mbr" && index >= 3 { index + 2 } else { index + 1 };
        let mut arguments = vec!["--listen=unix:socket".to_owned()];
        for index in 0..count {
            let (number, mode) = (number(index), if index == 0 { "" } else { ",read-only" });
            arguments
                .push(format!("--export=p{index}=disk.img,format=raw,partition={number}{mode}"));
        }
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let mut server = Running::start(dir, &arguments);
        server.address();
        for (index, part) in parts.iter().enumerate() {
            assert!(copy(dir, &format!("p{index}")) == *part, "{kind} {index}");
        }
        let uri = "nbd+unix:///p0?socket=socket";
        run(dir, "qemu-io", &["-f", "raw", "-c", "write -P 99 4k 4k", uri]);
        assert!(server.stop());
        let filter = "nbdkit -U - --filter=partition file disk.img partition=1 --run 'nbdcopy \"$uri\" other.img'";
        run(dir, "sh", &["-c", filter]);
        let mut expected = parts[0].clone();
        expected[4096..8192].fill(99);
        assert!(std::fs::read(dir.join("other.img")).unwrap() == expected);
        let missing = format!("--export=p=disk.img,format=raw,partition={}", number(count));
        let mut server = Running::start(dir, &["--listen=unix:socket", &missing]);
        assert!(!server.status().success());
        assert!(server.errors().contains("no partition"));
    }
}

#[test]
fn a_part_of_an_image_is_served_by_offset_and_size() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let bytes: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    std::fs::write(dir.join("disk.img"), &bytes).unwrap();
    let arguments = [
        "--listen=unix:socket",
        "--export=middle=disk.img,format=raw,offset=1000,size=100K",
        "--export=tail=disk.img,format=raw,offset=200000",
    ];
    let mut server = Running::start(dir, &arguments);
    server.address();
    assert!(copy(dir, "middle") == bytes[1000..1000 + 102_400]);
    assert!(copy(dir, "tail") == bytes[200_000..]);
    assert!(server.stop());
    let past = "--export=a=disk.img,format=raw,offset=200K,size=200K";
    let mut server = Running::start(dir, &["--listen=unix:socket", past]);
    assert!(!server.status().success());
    assert!(server.errors().contains("passes the end of the device"));
}

/// A loop device, given back when dropped.
struct Loop(PathBuf);

impl Loop {
    /// `None` where this machine has none to give.
    fn new(dir: &Path) -> Option<Self> {
        let made = Command::new("losetup")
            .args(["--find", "--show", "disk.img"])
            .current_dir(dir)
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .output();
        match made {
            Ok(made) if made.status.success() => {
                Some(Self(String::from_utf8(made.stdout).unwrap().trim().into()))
            }
            other => {
                eprintln!("block devices are not tested: no loop device here: {other:?}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("/usr/sbin/losetup").arg("-d").arg(&self.0).status();
    }
}

#[test]
fn block_devices_are_served_beside_files() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut bytes = vec![5; 1 << 20];
    std::fs::write(dir.join("disk.img"), &bytes).unwrap();
    std::fs::write(dir.join("file.img"), &bytes).unwrap();
    let Some(device) = Loop::new(dir) else { return };
    let export = format!("--export=device={},format=raw", device.0.display());
    let arguments = ["--listen=unix:socket", &export, "--export=file=file.img,format=raw"];
    let mut server = Running::start(dir, &arguments);
    server.address();
    let uri = "nbd+unix:///device?socket=socket";
    let commands = [
        "-c",
        "write -P 9 4k 8k",
        "-c",
        "write -z 64k 64k",
        "-c",
        "discard 128k 64k",
        "-c",
        "flush",
        "-c",
        "write -f -P 8 300000 70000",
        "-c",
        "write -z -u -f 512k 64k",
    ];
    run(dir, "qemu-io", &[&["-f", "raw"][..], &commands, &[uri]].concat());
    bytes[4096..12_288].fill(9);
    bytes[65_536..131_072].fill(0);
    bytes[300_000..370_000].fill(8);
    bytes[512 << 10..576 << 10].fill(0);
    // A device tells nobody of its holes.
    let map = run(dir, "nbdinfo", &["--map", uri]);
    let words: Vec<_> = map.split_whitespace().take(4).collect();
    assert_eq!(words, ["0", "1048576", "0", "data"]);
    let (copied, file) = (copy(dir, "device"), copy(dir, "file"));
    assert!(copied[..131_072] == bytes[..131_072] && copied[196_608..] == bytes[196_608..]);
    assert!(file == vec![5; 1 << 20]);
    assert!(server.stop());
    // To wipe a device behind its mapping is up to whoever closes it.
    assert!(std::fs::read(&device.0).unwrap()[..65_536] == bytes[..65_536]);
}
