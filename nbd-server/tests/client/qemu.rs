//! Against qemu-nbd: qcow2 images with holes and with a persistent dirty bitmap.

use std::process::Command;

use block::{BlockDevice, ByteRange, Durability, Segment, ZeroMode};
use bytes::Bytes;
use nbd_server::client::{ClientOptions, NbdDevice, StatusExtent};
use nbd_server::wire::Headers;
use tempfile::TempDir;

use crate::peer::{Peer, run, scratch};

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).expect("a range")
}

fn qemu_img(dir: &TempDir, arguments: &[&str]) {
    let mut command = Command::new("qemu-img");
    command.current_dir(dir.path()).args(arguments).stdout(std::process::Stdio::null());
    run(&mut command, "qemu-utils");
}

fn qemu_io(dir: &TempDir, commands: &[&str]) {
    let mut command = Command::new("qemu-io");
    command.current_dir(dir.path()).stdout(std::process::Stdio::null());
    for line in commands {
        command.args(["-c", line]);
    }
    run(command.arg("disk.qcow2"), "qemu-utils");
}

/// Everything that the context says of the first `len` bytes, with equal neighbours joined.
async fn status(device: &NbdDevice, context: &str, len: u64) -> Vec<(u64, u64, u64)> {
    let mut all: Vec<(u64, u64, u64)> = Vec::new();
    let mut at = 0;
    while at < len {
        for StatusExtent { range, flags } in
            device.block_status(context, range(at, len - at)).await.unwrap()
        {
            assert_eq!(range.start(), at);
            at = range.end();
            match all.last_mut() {
                Some((_, end, last)) if *last == flags => *end = at,
                _ => all.push((range.start(), at, flags)),
            }
        }
    }
    all
}

#[tokio::test]
async fn a_dirty_bitmap_tells_what_changed_since_it_was_made() {
    let dir = scratch();
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "disk.qcow2", "64M"]);
    qemu_io(&dir, &["write -P 1 0 1M"]);
    qemu_img(&dir, &["bitmap", "--add", "disk.qcow2", "daily 1"]);
    qemu_io(&dir, &["write -P 2 512k 64k", "write -P 3 32M 128k"]);
    let peer = Peer::qemu_nbd(dir, &["--read-only", "-f", "qcow2", "-B", "daily 1", "disk.qcow2"]);
    let context = "qemu:dirty-bitmap:daily 1".to_owned();
    let options = ClientOptions {
        meta_contexts: vec!["base:allocation".to_owned(), context.clone(), "x:none".to_owned()],
        ..Default::default()
    };
    let device = NbdDevice::connect(&peer.address(), "", options).await.unwrap();
    assert_eq!(device.contexts(), ["base:allocation", context.as_str()]);
    assert!(device.limits().read_only);
    let (k, m) = (1 << 10, 1 << 20);
    let expected = [
        (0, 512 * k, 0),
        (512 * k, 576 * k, 1),
        (576 * k, 32 * m, 0),
        (32 * m, 32 * m + 128 * k, 1),
        (32 * m + 128 * k, 64 * m, 0),
    ];
    assert_eq!(status(&device, &context, 64 * m).await, expected);
    let allocated = [(0, m, 0), (m, 32 * m, 3), (32 * m, 32 * m + 128 * k, 0)];
    assert_eq!(status(&device, "base:allocation", 64 * m).await[..3], allocated);
    let extents = device.extents(range(0, 64 * m)).await.unwrap();
    let stored: u64 = extents.iter().filter(|e| e.allocated).map(|e| e.range.len()).sum();
    assert_eq!(stored, m + 128 * k);
    let read = device.read(range(512 * k - 1, 3)).await.unwrap();
    assert_eq!(read.to_vec(), [1, 2, 2]);
    let hole = device.read(range(4 * m, 8 * m)).await.unwrap();
    assert!(hole.0 == [Segment::Zero(8 * m)], "a hole came as bytes");
    device.close().await.unwrap();
}

#[tokio::test]
async fn with_extended_headers_a_large_disk_takes_few_requests() {
    let dir = scratch();
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "disk.qcow2", "16G"]);
    qemu_img(&dir, &["bitmap", "--add", "disk.qcow2", "b"]);
    qemu_io(&dir, &["write -P 1 8G 64k"]);
    let arguments = ["-f", "qcow2", "-A", "-B", "b", "--discard=unmap", "disk.qcow2"];
    let peer = Peer::qemu_nbd(dir, &arguments);
    let contexts = ["qemu:dirty-bitmap:b", "qemu:allocation-depth", "base:allocation"];
    let size = 16 << 30;
    for (headers, last) in [(Headers::Extended, size), (Headers::Structured, 1 << 31)] {
        let meta_contexts = contexts.map(str::to_owned).to_vec();
        let options = ClientOptions { headers, meta_contexts, ..Default::default() };
        let device = NbdDevice::connect(&peer.address(), "", options).await.unwrap();
        assert_eq!(device.export().headers, headers);
        let told = device.block_statuses(&contexts, range(0, size)).await.unwrap();
        let ends: Vec<u64> = told.iter().map(|all| all.last().unwrap().range.end()).collect();
        assert_eq!(ends, [last; 3]);
        for (context, expected) in contexts.into_iter().zip([1, 1, 0]) {
            let told = status(&device, context, size).await;
            let middle = (8 << 30, (8 << 30) + (64 << 10), expected);
            assert!(told.contains(&middle), "{context}: {told:?}");
        }
        device.close().await.unwrap();
    }
    let device = NbdDevice::connect(&peer.address(), "", ClientOptions::default()).await.unwrap();
    device.discard(range(0, size), Durability::Deferred).await.unwrap();
    let mode = ZeroMode::default();
    device.write_zeroes(range(0, size), mode, Durability::Deferred).await.unwrap();
    let zero = device.extents(range(0, size)).await.unwrap();
    assert!(zero.iter().all(|extent| extent.zero), "{zero:?}");
    device.close().await.unwrap();
}

#[tokio::test]
async fn a_qcow2_image_is_written_over_several_connections() {
    let dir = scratch();
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "disk.qcow2", "32M"]);
    let peer = Peer::qemu_nbd(dir, &["-f", "qcow2", "--discard=unmap", "disk.qcow2"]);
    let device = NbdDevice::connect(&peer.address(), "", ClientOptions::default()).await.unwrap();
    assert_eq!(device.connections(), 4);
    let writes = (0..64_u64).map(|index| {
        let data = Bytes::from(vec![u8::try_from(index).unwrap() + 1; 100_000]);
        device.write(index << 18, data, Durability::Deferred)
    });
    for written in futures_util::future::join_all(writes).await {
        written.unwrap();
    }
    device
        .write_zeroes(range(1 << 18, 1 << 18), Default::default(), Durability::Durable)
        .await
        .unwrap();
    for index in 0..64_u64 {
        let read = device.read(range(index << 18, 100_001)).await.unwrap().to_vec();
        let byte = if index == 1 { 0 } else { u8::try_from(index).unwrap() + 1 };
        assert!(read[..100_000].iter().all(|found| *found == byte), "block {index}");
        assert_eq!(read[100_000], 0);
    }
    device.close().await.unwrap();
}
