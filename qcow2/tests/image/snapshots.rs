//! Internal snapshots: those that qemu-img makes, read by us, and those that we make, judged by qemu-img.

use std::path::Path;

use block::BlockDevice;
use qcow2::{Error, Image, OpenOptions, SnapshotError};

use crate::common::{block_on, qemu_create, qemu_img, qemu_io, raw_of, read_all};

fn str(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The disk as a snapshot has it, read by qemu-img.
fn raw_of_snapshot(path: &Path, name: &str) -> Vec<u8> {
    let raw = path.with_extension("snapshot.raw");
    qemu_img(&["convert", "-O", "raw", "-l", name, str(path), str(&raw)]);
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(&raw).unwrap();
    bytes
}

#[test]
fn snapshots_of_qemu_are_listed_and_read() {
    for options in ["compat=1.1", "compat=1.1,cluster_size=512", "compat=1.1,refcount_bits=64"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        qemu_create(&path, options, "1M", None);
        let mut states = Vec::new();
        for (number, name) in ["first", "second, with a longer name", "3"].iter().enumerate() {
            let write = format!("write -P {} {}k 100k", number + 1, number * 70);
            qemu_io(&path, &[&write]);
            states.push(raw_of(&path));
            qemu_img(&["snapshot", "-c", name, str(&path)]);
        }
        qemu_io(&path, &["write -P 9 0 1M"]);
        block_on(async {
            let image = Image::open(&path, OpenOptions::reading()).await.unwrap();
            let listed = image.snapshots().await.unwrap();
            let names: Vec<_> = listed.iter().map(|s| (s.id.as_str(), s.name.as_str())).collect();
            let wanted = [("1", "first"), ("2", "second, with a longer name"), ("3", "3")];
            assert_eq!(names, wanted, "{options}");
            assert!(listed.iter().all(|s| s.disk_bytes == 1 << 20 && s.vm_state_bytes == 0));
            assert!(read_all(&image).await == vec![9; 1 << 20]);
            image.close().await.unwrap();
            for ((id, name), state) in wanted.iter().zip(&states) {
                for wanted in [id, name] {
                    let options = OpenOptions::reading().snapshot(*wanted);
                    let view = Image::open(&path, options).await.unwrap();
                    assert!(read_all(&view).await == *state, "{name} {wanted}");
                    view.close().await.unwrap();
                }
            }
            assert!(states[1] == raw_of_snapshot(&path, "2"));
        });
    }
}

#[test]
fn snapshots_that_are_not_there_and_writing_to_one_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    qemu_create(&path, "compat=1.1", "1M", None);
    qemu_img(&["snapshot", "-c", "one", str(&path)]);
    block_on(async {
        let open = |options: OpenOptions| Image::open(&path, options);
        let missing = open(OpenOptions::reading().snapshot("two")).await.map(drop).unwrap_err();
        assert!(matches!(missing, Error::Snapshot { what: SnapshotError::NotFound(_), .. }));
        let writing = open(OpenOptions::writing().snapshot("one")).await.map(drop).unwrap_err();
        assert!(matches!(writing, Error::Snapshot { what: SnapshotError::ReadOnly, .. }));
    });
}
