//! Real servers, killed in the middle of writes and started again: the client goes on, and not a byte is missing.

use std::sync::Arc;

use block::{BlockDevice, Durability};
use bytes::Bytes;
use futures_util::future::join_all;
use nbd_server::client::NbdDevice;
use tokio::sync::watch;

use super::{options, policy, range};
use crate::foreign::{Dice, disk};
use crate::peer::Peer;

const WRITERS: u64 = 4;
/// The part of the disk of each writer, in bytes.
const PART: u64 = crate::foreign::DISK / WRITERS;
const WRITES: u64 = 240;
const KILLS: u64 = 5;

/// Writes here and there, flushes seldom, reads back what it wrote before; what its part holds in the end.
async fn write_on(device: Arc<NbdDevice>, writer: u64, written: watch::Sender<u64>) -> Vec<u8> {
    let mut model = vec![0; usize::try_from(PART).unwrap()];
    let mut dice = Dice(writer + 1);
    for _ in 0..WRITES {
        let sectors = 1 + dice.below(64);
        let at = dice.below(PART / 512 - sectors) * 512;
        let span = usize::try_from(at).unwrap()..usize::try_from(at + sectors * 512).unwrap();
        let start = writer * PART + at;
        match dice.below(12) {
            0 => device.flush().await.unwrap(),
            1 => {
                let zero = range(start, sectors * 512);
                device.write_zeroes(zero, Default::default(), Durability::Deferred).await.unwrap();
                model[span].fill(0);
            }
            2..=4 => {
                let read = device.read(range(start, sectors * 512)).await.unwrap().to_vec();
                assert!(read == model[span], "writer {writer} at {at}");
            }
            kind => {
                let byte = u8::try_from(1 + dice.below(255)).unwrap();
                let how = if kind == 5 { Durability::Durable } else { Durability::Deferred };
                model[span.clone()].fill(byte);
                let data = Bytes::copy_from_slice(&model[span]);
                device.write(start, data, how).await.unwrap();
            }
        }
        written.send_modify(|count| *count += 1);
    }
    model
}

/// Everything that the writers wrote.
async fn holds(device: &NbdDevice, models: &[Vec<u8>]) {
    for (writer, model) in (0..).zip(models) {
        let read = device.read(range(writer * PART, PART)).await.unwrap().to_vec();
        assert!(read == *model, "part {writer}");
    }
}

async fn outlives_kills(peer: Peer, export: &str) {
    let peer = Arc::new(peer);
    let options = options(3, policy());
    let device = NbdDevice::connect(&peer.address(), export, options.clone()).await.unwrap();
    let written = watch::Sender::new(0);
    let mut seen = written.subscribe();
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| tokio::spawn(write_on(Arc::clone(&device), writer, written.clone())))
        .collect();
    drop(written);
    for kill in 1..=KILLS {
        let enough = kill * WRITERS * WRITES / (KILLS + 1);
        if seen.wait_for(|count| *count >= enough).await.is_err() {
            // A writer has failed, and tells of what below.
            break;
        }
        let peer = Arc::clone(&peer);
        let again = move || {
            peer.kill();
            peer.run_again();
        };
        tokio::task::spawn_blocking(again).await.unwrap();
    }
    let models: Vec<_> = join_all(writers).await.into_iter().map(Result::unwrap).collect();
    holds(&device, &models).await;
    device.close().await.unwrap();
    peer.kill();
    peer.run_again();
    let fresh = NbdDevice::connect(&peer.address(), export, options).await.unwrap();
    holds(&fresh, &models).await;
    fresh.close().await.unwrap();
}

#[cfg(feature = "program")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_own_server_is_killed_and_nothing_is_missing() {
    outlives_kills(Peer::ours(disk("qcow2"), &["--export=disk=disk"]), "disk").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_nbd_is_killed_and_nothing_is_missing() {
    let peer = Peer::qemu_nbd(disk("qcow2"), &["--format=qcow2", "disk"]);
    outlives_kills(peer, "").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdkit_is_killed_and_nothing_is_missing() {
    outlives_kills(Peer::nbdkit_in(disk("raw"), &["file", "disk"]), "").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_reference_server_is_killed_and_nothing_is_missing() {
    let export = "flush = true\nfua = true\ntrim = true";
    outlives_kills(Peer::reference(disk("raw"), "", export), "disk").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_storage_daemon_is_killed_and_nothing_is_missing() {
    let arguments = [
        "--blockdev=driver=file,node-name=file,filename=disk",
        "--blockdev=driver=qcow2,node-name=image,file=file",
        "--export=type=nbd,id=e,node-name=image,name=disk,writable=on",
    ];
    outlives_kills(Peer::qemu_storage_daemon(disk("qcow2"), "", &arguments), "disk").await;
}
