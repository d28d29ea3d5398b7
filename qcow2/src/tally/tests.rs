//! The counts of images that QEMU made, against the refcounts that QEMU keeps in them.

use std::path::Path;
use std::process::Command;

use block::{ByteRange, HostFile};

use crate::header::Header;
use crate::refcount::RefcountWidth;
use crate::tally::{Finding, Tally};
use crate::units::HostCluster;

fn run(program: &str, args: &[&str], path: &Path) {
    let output = Command::new(program).args(args).arg(path).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
}

async fn counts(path: &Path) -> (Tally, Vec<Finding>, Vec<(u64, u64)>) {
    let file = HostFile::open(path, block::OpenOptions::reading()).await.unwrap();
    let cluster = file.read(ByteRange::between(0, 1 << 16)).await.unwrap();
    let header = Header::parse(&cluster).unwrap();
    let mut findings = Vec::new();
    let mut visit = |finding, _| findings.push(finding);
    let tally = Tally::of_image(&file, &header, &mut visit).await.unwrap();
    let width = RefcountWidth::new(header.refcount_order).unwrap();
    let per_block = width.per_block(header.geometry);
    let mut kept = Vec::new();
    for (number, at) in (0u64..).zip(&tally.refcount_table).filter(|(_, at)| **at != 0) {
        let range = ByteRange::between(*at, at + header.geometry.bytes());
        let block = file.read(range).await.unwrap();
        let counts =
            (0..per_block).map(|slot| (number * per_block + slot, width.get(&block, slot)));
        kept.extend(counts.filter(|(_, count)| *count != 0));
    }
    (tally, findings, kept)
}

#[test]
fn every_reference_of_an_image_with_snapshots_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    for options in [
        "cluster_size=512,refcount_bits=64",
        "cluster_size=4096,refcount_bits=8",
        "cluster_size=64k",
    ] {
        let make = ["create", "-q", "-f", "qcow2", "-o", options];
        Command::new("qemu-img").args(make).arg(&path).arg("9M").status().unwrap();
        run("qemu-io", &["-c", "write -P1 0 1M", "-c", "write -c -P 2 5M 64k"], &path);
        run("qemu-img", &["snapshot", "-c", "first"], &path);
        run("qemu-io", &["-c", "write -P3 500k 1M", "-c", "write -z 3M 256k"], &path);
        run("qemu-img", &["snapshot", "-c", "second"], &path);
        run("qemu-io", &["-c", "write -P4 8M 100k", "-c", "discard 0 256k"], &path);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (tally, findings, kept) = runtime.block_on(counts(&path));
        assert_eq!(findings, [], "{options}");
        assert!(!tally.incomplete && !tally.broken_refcounts);
        let counted: Vec<_> = tally.counts.iter().map(|(at, count)| (at.0, count)).collect();
        assert_eq!(counted, kept, "{options}");
        assert!(tally.counts.iter().any(|(_, count)| count == 3), "snapshots share clusters");
        assert_eq!(tally.counts.get(HostCluster(0)), 1);
        assert!(tally.active.compressed > 0);
    }
}
