//! SIGKILL in the middle of writes, again and again: what a flush had promised is there afterwards, the image is sound
//! but for leaks, and the next server can start at once.

use std::collections::HashMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use block::{BlockDevice, ByteRange, Durability, Segment};
use bytes::Bytes;
use futures_util::future::{join_all, try_join_all};
use nbd_server::client::{Address, ClientOptions, NbdDevice};
use tokio::sync::watch;

use super::{Running, run};

const ROUNDS: u64 = 6;
const WRITERS: u64 = 4;
/// Blocks of one writer; each lies in a cluster of its own, so that most writes change metadata.
const SLOTS: u64 = 2048;
const CLUSTER_BYTES: u64 = 64 << 10;
const BLOCK_BYTES: usize = 4096;
/// Blocks that are written together and then flushed.
const BATCH: u64 = 8;
const ARGUMENTS: [&str; 2] = ["--listen=unix:socket", "--export=one=disk.qcow2"];

/// What one writer knows of its blocks, over all rounds.
#[derive(Default)]
struct Ledger {
    writer: u64,
    /// The number of the last write that was sent.
    sent: u64,
    /// For each slot that was ever written, the number of the last write that a flush was answered for; 0 for none.
    durable: HashMap<u64, u64>,
}

/// The content of a block: which write of which slot it is, in all of it.
fn stamp(writer: u64, slot: u64, number: u64) -> Bytes {
    let word = (writer << 56) | (slot << 40) | number;
    let salted = |at: u64| word.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17) ^ at;
    let words = std::iter::once(word).chain((1..BLOCK_BYTES as u64 / 8).map(salted));
    words.flat_map(u64::to_le_bytes).collect()
}

fn offset(writer: u64, slot: u64) -> u64 {
    (writer * SLOTS + slot) * CLUSTER_BYTES
}

impl Ledger {
    /// Writes and flushes until the server is gone.
    async fn write_on(mut self, device: Arc<NbdDevice>, flushes: watch::Sender<u64>) -> Self {
        loop {
            let first = self.sent.wrapping_mul(0x9e37_79b9) % SLOTS;
            let batch: Vec<_> =
                (1..=BATCH).map(|step| ((first + step * 37) % SLOTS, self.sent + step)).collect();
            self.sent += BATCH;
            for (slot, _) in &batch {
                self.durable.entry(*slot).or_default();
            }
            let writes = batch.iter().map(|(slot, number)| {
                let data = stamp(self.writer, *slot, *number);
                device.write(offset(self.writer, *slot), data, Durability::Deferred)
            });
            if try_join_all(writes).await.is_err() || device.flush().await.is_err() {
                return self;
            }
            self.durable.extend(batch);
            flushes.send_modify(|count| *count += 1);
        }
    }

    /// Every block holds the write that was last flushed or a later one, whole.
    async fn holds(&self, device: &NbdDevice) {
        for (slot, durable) in &self.durable {
            let start = offset(self.writer, *slot);
            let range = ByteRange::between(start, start + BLOCK_BYTES as u64);
            let mut found = Vec::new();
            for segment in device.read(range).await.unwrap().0 {
                match segment {
                    Segment::Data(bytes) => found.extend_from_slice(&bytes),
                    Segment::Zero(len) => {
                        found.resize(found.len() + usize::try_from(len).unwrap(), 0)
                    }
                }
            }
            let word = u64::from_le_bytes(found[..8].try_into().unwrap());
            let number = word & ((1 << 40) - 1);
            let what = format!("writer {}, slot {slot}: {number}, {durable} flushed", self.writer);
            assert!((*durable..=self.sent).contains(&number), "{what}");
            let whole = match number {
                0 => found.iter().all(|byte| *byte == 0),
                _ => found == stamp(self.writer, *slot, number),
            };
            assert!(whole, "{what}: mixed content");
        }
    }
}

/// A load beside the writers, in a part of the disk that nobody reads.
struct Load(Child);

impl Load {
    fn start(dir: &Path) -> Self {
        let after = format!("--offset={}", offset(WRITERS, 0));
        let child = Command::new("fio")
            .args(["--name=load", "--thread", "--ioengine=nbd", "--rw=randwrite"])
            .args(["--uri=nbd+unix:///one?socket=socket", "--bsrange=4k-256k", "--fsync=16"])
            .args(["--iodepth=16", "--size=256M", "--time_based", "--runtime=60", &after])
            .current_dir(dir)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Self(child.unwrap_or_else(|error| panic!("fio is needed: {error}")))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(super) async fn connect(dir: &Path) -> Arc<NbdDevice> {
    let options = ClientOptions { connections: 1, ..ClientOptions::default() };
    NbdDevice::connect(&Address::Unix(dir.join("socket")), "one", options).await.unwrap()
}

/// Whether the image, which a server may have open, is sound; clusters that nobody uses are allowed.
fn check(dir: &Path) {
    let checked = Command::new("timeout")
        .args(["40", "qemu-img", "check", "-U", "disk.qcow2"])
        .current_dir(dir)
        .output()
        .unwrap();
    let code = checked.status.code();
    assert!(matches!(code, Some(0 | 3)), "{code:?}: {}", String::from_utf8_lossy(&checked.stdout));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_loses_nothing_that_was_flushed_and_restarts_at_once() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let dir = dir.path();
    run(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "disk.qcow2", "1G"]);
    let mut ledgers: Vec<_> =
        (0..WRITERS).map(|writer| Ledger { writer, ..Ledger::default() }).collect();
    let mut server = Running::start(dir, &ARGUMENTS);
    server.address();
    for round in 0..ROUNDS {
        let mut load = Load::start(dir);
        let flushes = watch::Sender::new(0);
        let mut seen = flushes.subscribe();
        let mut writers = Vec::new();
        for ledger in ledgers.drain(..) {
            let device = connect(dir).await;
            writers.push(tokio::spawn(ledger.write_on(device, flushes.clone())));
        }
        seen.wait_for(|count| *count >= 20 + 7 * round).await.unwrap();
        server.child.kill().unwrap();
        // Lest it finds the next server.
        load.0.kill().unwrap();
        server.status();
        server = Running::start(dir, &ARGUMENTS);
        server.address();
        drop(load);
        ledgers.extend(join_all(writers).await.into_iter().map(Result::unwrap));
        // Nothing has been written since the kill.
        check(dir);
        let device = connect(dir).await;
        for ledger in &ledgers {
            ledger.holds(&device).await;
        }
        device.disconnect().await;
    }
    assert!(server.stop());
    check(dir);
}
