//! What an image would take, as `qemu-img measure` tells it, over a table of options.

use std::path::Path;
use std::process::Command;

use block::{BlockDevice, Durability, RawDevice};
use qcow2::{BitmapSize, MeasureOptions, MeasureTarget, Measured, measure, measure_size};

use crate::common::{block_on, pattern};

fn qemu_measures(source: &[&str], format: &str, options: &str) -> Option<Measured> {
    let mut command = Command::new("qemu-img");
    command.args(["measure", "--output", "json", "-O", format]);
    if !options.is_empty() {
        command.args(["-o", options]);
    }
    let output = command.args(source).output().expect("qemu-img runs");
    if !output.status.success() {
        return None;
    }
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    Some(Measured {
        required_bytes: json["required"].as_u64().expect("a number"),
        fully_allocated_bytes: json["fully-allocated"].as_u64().expect("a number"),
        bitmaps_bytes: json["bitmaps"].as_u64(),
    })
}

fn spelled(options: &MeasureOptions) -> String {
    let mut text = format!(
        "cluster_size={},refcount_bits={},extended_l2={}",
        options.cluster_bytes,
        options.refcount_bits,
        if options.extended_l2 { "on" } else { "off" }
    );
    if options.allocate_data {
        text += ",preallocation=falloc";
    }
    if options.backing {
        text += ",backing_file=base,backing_fmt=raw";
    }
    text
}

fn options(cluster_bytes: u32, refcount_bits: u32, extended_l2: bool) -> MeasureOptions {
    MeasureOptions { cluster_bytes, refcount_bits, extended_l2, ..MeasureOptions::default() }
}

#[test]
fn empty_disks_measure_as_qemu_says() {
    let mut refused = 0;
    for size in [0, 1, 65_536, (1 << 30) + 512, 1 << 40, (64 << 40) + 1, 1 << 60] {
        for cluster in [512, 4096, 65_536, 2 << 20] {
            for (bits, extended) in [(1, false), (16, true), (16, false), (64, false)] {
                let options = options(cluster, bits, extended);
                let theirs =
                    qemu_measures(&["--size", &size.to_string()], "qcow2", &spelled(&options));
                let ours = measure_size(size, &MeasureTarget::Qcow2(options.clone())).ok();
                assert_eq!(ours, theirs, "{size} bytes, {options:?}");
                refused += u32::from(ours.is_none());
            }
        }
    }
    assert!(refused > 0, "the table goes beyond what an image can be");
}

#[test]
fn raw_images_measure_as_qemu_says() {
    for size in [0, 1, 511, 512, 5_000_000] {
        let theirs = qemu_measures(&["--size", &size.to_string()], "raw", "");
        assert_eq!(measure_size(size, &MeasureTarget::Raw).ok(), theirs);
    }
    assert!(measure_size(u64::MAX, &MeasureTarget::Raw).is_err());
}

async fn sparse(path: &Path) -> std::sync::Arc<RawDevice> {
    let disk = RawDevice::create(path, (300 << 20) + 1000).await.expect("a file");
    for (at, len) in [(0, 100), (5_000_000, 3_000_000), (100 << 20, 4096), ((300 << 20) + 512, 400)]
    {
        disk.write(at, pattern(at + 1, len).into(), Durability::Deferred).await.expect("room");
    }
    disk.flush().await.expect("a good disk");
    disk
}

#[test]
fn what_a_disk_holds_measures_as_qemu_says() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("disk.raw");
    block_on(async {
        let disk = sparse(&path).await;
        let source = ["-f", "raw", path.to_str().expect("UTF-8")];
        for cluster in [512, 16_384, 65_536, 2 << 20] {
            for (allocate_data, backing) in [(false, false), (true, false), (false, true)] {
                let extended = cluster == 16_384;
                let options =
                    MeasureOptions { allocate_data, backing, ..options(cluster, 16, extended) };
                let theirs = qemu_measures(&source, "qcow2", &spelled(&options));
                let ours = measure(&*disk, &MeasureTarget::Qcow2(options.clone())).await;
                assert_eq!(ours.ok(), theirs, "{options:?}");
            }
        }
        let theirs = qemu_measures(&source, "raw", "").expect("an answer");
        assert_eq!(measure(&*disk, &MeasureTarget::Raw).await.expect("an answer"), theirs);
        disk.close().await.expect("a good disk");
    });
}

#[test]
fn bitmaps_measure_as_qemu_says() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("disk.qcow2");
    let size = 5_u64 << 30;
    let qemu = |args: &[&str]| {
        let status = Command::new("qemu-img").args(args).arg(&path).status().expect("it runs");
        assert!(status.success(), "{args:?}");
    };
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&path)
        .arg(size.to_string())
        .status();
    assert!(made.expect("it runs").success());
    let bitmap = |path: &Path, granularity: &str, name: &str| {
        let status = Command::new("qemu-img")
            .args(["bitmap", "--add", "-g", granularity])
            .arg(path)
            .arg(name)
            .status();
        assert!(status.expect("it runs").success());
    };
    bitmap(&path, "65536", "b0");
    bitmap(&path, "512", "a name that is longer");
    qemu(&["check", "-q"]);
    let bitmaps = vec![
        BitmapSize { name_bytes: 2, granularity_bytes: 65_536 },
        BitmapSize { name_bytes: 21, granularity_bytes: 512 },
    ];
    for cluster in [4096, 65_536] {
        let options =
            MeasureOptions { bitmaps: Some(bitmaps.clone()), ..options(cluster, 16, false) };
        let source = ["-f", "qcow2", path.to_str().expect("UTF-8")];
        let theirs = qemu_measures(&source, "qcow2", &spelled(&options)).expect("an answer");
        let ours = measure_size(size, &MeasureTarget::Qcow2(options)).expect("an answer");
        assert_eq!(ours, theirs);
    }
}
