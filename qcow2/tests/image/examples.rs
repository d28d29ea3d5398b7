//! The examples run, and tell what they should: nobody copies one that no longer works.

use std::path::Path;

use crate::common::{block_on, qemu_check, qemu_img};

#[expect(dead_code, reason = "main is for those who run it")]
#[path = "../../examples/chain.rs"]
mod chain;
#[expect(dead_code, reason = "main is for those who run it")]
#[path = "../../examples/convert.rs"]
mod convert;
#[expect(dead_code, reason = "main is for those who run it")]
#[path = "../../examples/create_write_read.rs"]
mod create_write_read;
#[expect(dead_code, reason = "main is for those who run it")]
#[path = "../../examples/points_in_time.rs"]
mod points_in_time;

fn sound(path: &Path) {
    let check = qemu_check(path);
    assert_eq!(check.code, 0, "{check:?}");
}

fn says(told: &str, all: &[&str]) {
    for text in all {
        assert!(told.contains(text), "{text:?} is not in {told:?}");
    }
}

#[test]
fn an_image_is_made_written_and_read() {
    let dir = tempfile::tempdir().unwrap();
    let told = block_on(create_write_read::run(dir.path())).unwrap();
    says(&told, &["read back: in the middle of the disk", "allocated true", "refused: "]);
    sound(&dir.path().join("disk.qcow2"));
}

#[test]
fn a_chain_is_mapped_merged_and_checked() {
    let dir = tempfile::tempdir().unwrap();
    let told = block_on(chain::run(dir.path())).unwrap();
    let clean = ["full.qcow2 is clean: true", "tuesday.qcow2 is clean: true"];
    says(
        &told,
        &["data, 2 below the top, in full.qcow2", "data, 0 below the top", clean[0], clean[1]],
    );
    assert!(!dir.path().join("monday.qcow2").exists());
    for name in ["full.qcow2", "tuesday.qcow2"] {
        sound(&dir.path().join(name));
    }
}

#[test]
fn a_snapshot_is_looked_at_and_gone_back_to() {
    let dir = tempfile::tempdir().unwrap();
    let told = block_on(points_in_time::run(dir.path())).unwrap();
    says(&told, &["changed: ", "then: the old days", "refused: ", "now: the old days"]);
    sound(&dir.path().join("machine.qcow2"));
}

#[test]
fn a_disk_is_copied_smaller_and_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let told = block_on(convert::run(dir.path())).unwrap();
    says(&told, &["smaller: true", "the same: true"]);
    let [raw, small] = ["disk.raw", "small.qcow2"].map(|name| dir.path().join(name));
    let [raw, small] = [&raw, &small].map(|path| path.to_str().unwrap());
    qemu_img(&["compare", "-f", "raw", "-F", "qcow2", raw, small]);
}
