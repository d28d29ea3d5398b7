//! Images whose refcounts are lost: what is in use and counts as free is neither overwritten nor cut off, and a repair
//! finds all of it.

use std::path::{Path, PathBuf};

use block::{BlockDevice, Durability};
use qcow2::{AmendOptions, Corruption, Error, Image, OpenOptions, Repair};

use crate::checking::{check, read_by_qemu};
use crate::common::{block_on, qemu_check, qemu_create, qemu_io};

const MIB: u64 = 1 << 20;

/// An image with 4 MiB of data, and where its only refcount block and the entry for it lie.
fn make(dir: &Path) -> (PathBuf, usize, usize) {
    let path = dir.join("disk");
    qemu_create(&path, "cluster_size=64k", "8M", None);
    qemu_io(&path, &["write -P 7 0 4M"]);
    let bytes = std::fs::read(&path).unwrap();
    let offset = |at: usize| {
        usize::try_from(u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap()
    };
    let table = offset(48);
    (path, table, offset(table))
}

fn lose(path: &Path, at: usize, len: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at..at + len].fill(0);
    std::fs::write(path, bytes).unwrap();
}

fn assert_repairable(path: &Path, disk: &[u8]) {
    let report = check(path, Repair::All);
    assert!(report.is_clean(), "{report:?}");
    assert!(qemu_check(path).is_clean());
    assert!(read_by_qemu(path).unwrap() == disk, "it reads as before");
}

#[test]
fn an_image_whose_header_counts_as_free_is_not_opened_for_writing_and_can_be_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let (path, table, block) = make(dir.path());
    let (sound, disk) = (std::fs::read(&path).unwrap(), read_by_qemu(&path).unwrap());
    for (at, len) in [(table, 8), (block, 2), (block, 65536)] {
        std::fs::write(&path, &sound).unwrap();
        lose(&path, at, len);
        let damaged = std::fs::read(&path).unwrap();
        let refused = block_on(Image::open(&path, OpenOptions::writing())).map(drop);
        assert!(
            matches!(refused, Err(Error::Corrupt { what: Corruption::NotCounted { .. }, .. })),
            "{refused:?}"
        );
        let now = std::fs::read(&path).unwrap();
        assert_eq!(now.len(), damaged.len());
        assert!(now[104..] == damaged[104..], "nothing but the header may have changed");
        assert_repairable(&path, &disk);
    }
}

#[test]
fn clusters_at_the_end_that_count_as_free_stay_when_the_image_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _, block) = make(dir.path());
    let (sound, disk) = (std::fs::read(&path).unwrap(), read_by_qemu(&path).unwrap());
    let clusters = sound.len() >> 16;
    for deed in ["overwrite", "overwrite uncounted", "amend", "snapshot", "flush"] {
        std::fs::write(&path, &sound).unwrap();
        lose(&path, block + 2 * (clusters - 16), 32);
        block_on(async {
            let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
            let seven = || bytes::Bytes::from(vec![7; 4096]);
            match deed {
                "overwrite" => image.write(0, seven(), Durability::Durable).await.unwrap(),
                "overwrite uncounted" => {
                    let refused = image.write(4 * MIB - 4096, seven(), Durability::Durable).await;
                    assert!(refused.is_err(), "it counts as free");
                }
                "amend" => {
                    let lazy =
                        AmendOptions { lazy_refcounts: Some(true), ..AmendOptions::default() };
                    image.amend(&lazy).await.unwrap();
                }
                "snapshot" => assert!(image.create_snapshot("one").await.is_err()),
                _ => image.flush().await.unwrap(),
            }
            let _may_say_that_it_is_corrupt = image.close().await;
        });
        assert!(std::fs::metadata(&path).unwrap().len() >= sound.len() as u64, "{deed}");
        assert_repairable(&path, &disk);
    }
}

#[test]
fn what_a_session_frees_at_the_end_is_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let (path, ..) = make(dir.path());
    let before = std::fs::metadata(&path).unwrap().len();
    block_on(async {
        let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
        for at in [3 * MIB, 2 * MIB] {
            let part = crate::common::range(at, MIB);
            image.discard(part, Durability::Deferred).await.unwrap();
        }
        image.close().await.unwrap();
    });
    let after = std::fs::metadata(&path).unwrap().len();
    assert!(after <= before - 2 * MIB, "{before} became {after}");
    assert!(qemu_check(&path).is_clean());
}
