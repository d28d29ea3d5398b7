//! The same conversation with each of the servers that others wrote, by every kind of headers that they have, over one
//! connection and over several: what is written is read, what is zero is told, and the bytes are those of a model.

use std::process::Command;
use std::sync::Arc;

use block::{BlockDevice, ByteRange, Durability, ZeroMode};
use bytes::Bytes;
use futures_util::future::join_all;
use nbd_server::client::{ClientOptions, NbdDevice};
use nbd_server::wire::{Headers, transmission_flag};
use tempfile::TempDir;

use crate::peer::{Peer, run, scratch};

pub(crate) const DISK: u64 = 32 << 20;
const WRITERS: u64 = 4;
const PART: u64 = DISK / WRITERS;
const STEPS: u64 = 24;

/// What a server can do at best.
struct Abilities {
    export: &'static str,
    headers: Headers,
    contexts: &'static [&'static str],
}

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).expect("a range")
}

fn span(range: ByteRange) -> std::ops::Range<usize> {
    usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap()
}

/// A disk of zeros in a folder of its own.
pub(crate) fn disk(format: &str) -> TempDir {
    let dir = scratch();
    let mut create = Command::new("qemu-img");
    let size = DISK.to_string();
    create.current_dir(dir.path()).args(["create", "-q", "-f", format, "disk", &size]);
    run(&mut create, "qemu-utils");
    dir
}

/// Numbers that look random, the same in every run.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) % end
    }
}

/// Changes its part of the disk, of which it knows every byte, and reads it back.
async fn change(device: Arc<NbdDevice>, part: u64, seed: u64) -> Vec<u8> {
    let mut model = vec![0; usize::try_from(PART).unwrap()];
    let mut dice = Dice(seed * WRITERS + part);
    for _ in 0..STEPS {
        let len = 1 + dice.below(200_000);
        let inside = range(dice.below(PART - len), len);
        let outside = range(part * PART + inside.start(), len);
        let durable = dice.below(8) == 0;
        let how = if durable { Durability::Durable } else { Durability::Deferred };
        let old = &mut model[span(inside)];
        match dice.below(9) {
            0 => device.flush().await.unwrap(),
            1 => {
                let mode = ZeroMode { keep_allocated: dice.below(2) == 0, fast_only: false };
                device.write_zeroes(outside, mode, how).await.unwrap();
                old.fill(0);
            }
            2 => {
                device.discard(outside, how).await.unwrap();
                let now = device.read(outside).await.unwrap().to_vec();
                assert!(now.iter().zip(&*old).all(|(now, old)| *now == 0 || now == old));
                old.copy_from_slice(&now);
            }
            3..=5 => assert!(device.read(outside).await.unwrap().to_vec() == old),
            _ => {
                let byte = u8::try_from(1 + dice.below(255)).unwrap();
                old.fill(byte);
                device.write(outside.start(), Bytes::copy_from_slice(old), how).await.unwrap();
            }
        }
    }
    model
}

/// Whether what is told about the disk is true of the bytes.
async fn tells_the_truth(device: &NbdDevice, bytes: &[u8]) {
    let mut at = 0;
    while at < DISK {
        for extent in device.extents(range(at, DISK - at)).await.unwrap() {
            assert_eq!(extent.range.start(), at);
            at = extent.range.end();
            assert!(!extent.zero || block::is_zero(&bytes[span(extent.range)]), "{extent:?}");
        }
    }
    let contexts: Vec<&str> = device.contexts().iter().map(String::as_str).collect();
    let told = device.block_statuses(&contexts, range(4096, 1 << 20)).await.unwrap();
    assert_eq!(told.len(), contexts.len());
    for extents in told {
        assert_eq!(extents.first().map(|extent| extent.range.start()), Some(4096));
    }
}

async fn converses(peer: &Peer, abilities: &Abilities) {
    let Abilities { export, headers: newest, contexts } = abilities;
    for (seed, headers) in (0..).zip([Headers::Simple, Headers::Structured, Headers::Extended]) {
        for connections in [1, 4] {
            let meta_contexts = contexts.iter().map(|name| (*name).to_owned()).collect();
            let options =
                ClientOptions { headers, connections, meta_contexts, ..Default::default() };
            let opened = NbdDevice::connect(&peer.address(), export, options).await;
            let device = opened.unwrap();
            assert_eq!(device.export().headers, headers.min(*newest));
            assert!(device.export().has(transmission_flag::CAN_MULTI_CONN));
            assert_eq!(device.connections(), connections);
            let granted = if device.export().headers.has_chunks() { *contexts } else { &[] };
            assert_eq!(device.contexts(), granted);
            let all = range(0, DISK);
            device.write_zeroes(all, ZeroMode::default(), Durability::Deferred).await.unwrap();
            let changes =
                (0..WRITERS).map(|part| tokio::spawn(change(Arc::clone(&device), part, seed)));
            let parts = join_all(changes).await.into_iter().map(Result::unwrap);
            let bytes: Vec<u8> = parts.flatten().collect();
            assert!(device.read(all).await.unwrap().to_vec() == bytes);
            tells_the_truth(&device, &bytes).await;
            device.close().await.unwrap();
        }
    }
}

#[tokio::test]
async fn qemu_nbd_is_spoken_to_in_every_way() {
    let dir = disk("qcow2");
    let mut bitmap = Command::new("qemu-img");
    run(bitmap.current_dir(dir.path()).args(["bitmap", "--add", "disk", "b"]), "qemu-utils");
    let arguments = ["--format=qcow2", "--discard=unmap", "-A", "-B", "b", "disk"];
    let peer = Peer::qemu_nbd(dir, &arguments);
    let contexts = &["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b"];
    converses(&peer, &Abilities { export: "", headers: Headers::Extended, contexts }).await;
}

#[tokio::test]
async fn qemu_storage_daemon_is_spoken_to_in_every_way() {
    let arguments = [
        "--blockdev=driver=file,node-name=file,filename=disk,discard=unmap",
        "--blockdev=driver=qcow2,node-name=image,file=file,discard=unmap",
        "--export=type=nbd,id=e,node-name=image,name=disk,writable=on,allocation-depth=on",
    ];
    let peer = Peer::qemu_storage_daemon(disk("qcow2"), "", &arguments);
    let contexts = &["base:allocation", "qemu:allocation-depth"];
    converses(&peer, &Abilities { export: "disk", headers: Headers::Extended, contexts }).await;
}

#[tokio::test]
async fn nbdkit_is_spoken_to_in_every_way() {
    let peer = Peer::nbdkit_in(disk("raw"), &["file", "disk"]);
    let contexts = &["base:allocation"];
    converses(&peer, &Abilities { export: "", headers: Headers::Structured, contexts }).await;
}

#[tokio::test]
async fn the_reference_server_is_spoken_to_in_every_way() {
    let peer = Peer::reference(disk("raw"), "", "flush = true\nfua = true\ntrim = true");
    converses(&peer, &Abilities { export: "disk", headers: Headers::Simple, contexts: &[] }).await;
}
