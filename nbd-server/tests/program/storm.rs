//! Reloads under clients: a storm of them loses nothing, and an image whose path changed stays until its last client.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use block::{BlockDevice, ByteRange, Durability};
use bytes::Bytes;
use futures_util::future::join_all;
use nbd_server::client::{Address, ClientOptions, NbdDevice};

use super::{Running, create_qcow2, run};

/// How often the configuration changes.
const ROUNDS: usize = 300;

fn put(dir: &Path, name: &str, text: &str) {
    // As careful people write configurations: whole, under another name, then in their place.
    std::fs::write(dir.join("new"), text).unwrap();
    std::fs::rename(dir.join("new"), dir.join(name)).unwrap();
}

async fn connect(dir: &Path, name: &str) -> Arc<NbdDevice> {
    let address = Address::Unix(dir.join("socket"));
    NbdDevice::connect(&address, name, ClientOptions::default()).await.unwrap()
}

async fn write(device: &NbdDevice, at: u64, byte: u8) {
    device.write(at, Bytes::from(vec![byte; 4096]), Durability::Deferred).await.unwrap();
}

async fn read(device: &NbdDevice, at: u64) -> Vec<u8> {
    device.read(ByteRange::between(at, at + 4096)).await.unwrap().to_vec()
}

/// Writes over its part of the disk again and again, and reads each write back; the byte that each place holds.
async fn work(device: Arc<NbdDevice>, part: u64, stop: Arc<AtomicBool>) -> Vec<u8> {
    let mut held = vec![0; 16];
    let mut round = 0_usize;
    while !stop.load(Ordering::Relaxed) || round < held.len() {
        let slot = round % held.len();
        let at = (part * 16 + slot as u64) * 4096;
        held[slot] = u8::try_from(round % 250).unwrap() + 1;
        write(&device, at, held[slot]).await;
        assert!(read(&device, at).await == vec![held[slot]; 4096], "part {part}, round {round}");
        round += 1;
    }
    held
}

/// CVE-2015-0847: signals at any moment, while clients come, work and go.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_reloads_under_load_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create_qcow2(dir, "stays.qcow2", None);
    std::fs::create_dir(dir.join("conf.d")).unwrap();
    for index in 0..4 {
        std::fs::write(dir.join(format!("{index}.img")), vec![0; 65_536]).unwrap();
    }
    put(dir, "config", "[generic]\nunixsock = socket\nincludedir = conf.d\n");
    put(dir, "conf.d/stays.conf", "[stays]\nexportname = ../stays.qcow2\nformat = qcow2\n");
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    let stop = Arc::new(AtomicBool::new(false));
    let mut workers = Vec::new();
    for part in 0..4 {
        let device = connect(dir, "stays").await;
        workers.push(tokio::spawn(work(device, part, Arc::clone(&stop))));
    }
    for round in 0..ROUNDS {
        let image = round % 4;
        let text = match round % 5 {
            // A broken one, now and then.
            0 => "[passing]\nexportname".to_owned(),
            1 => format!("[stays]\nexportname = ../{image}.img\n"),
            _ => format!(
                "[passing]\nexportname = ../{image}.img\n[round{round}]\nexportname = ../{image}.img\n"
            ),
        };
        put(dir, "conf.d/passing.conf", &text);
        server.signal("-HUP");
        if round % 10 == 9 {
            // This one has been taken, not only those between it and the next.
            let log = server.log_until(&format!("round{round}"));
            let closed =
                log.iter().any(|line| line.contains("closed an image") && line.contains("stays"));
            assert!(!closed, "{log:?}");
        }
    }
    put(dir, "conf.d/passing.conf", "[last]\nexportname = ../0.img\n");
    server.signal("-HUP");
    server.log_until(r#"added=["last""#);
    stop.store(true, Ordering::Relaxed);
    let mut held = Vec::new();
    for worker in workers {
        held.push(worker.await.unwrap());
    }
    assert!(server.stop());
    run(dir, "qemu-img", &["check", "-q", "stays.qcow2"]);
    run(dir, "qemu-img", &["convert", "-O", "raw", "stays.qcow2", "stays.img"]);
    let disk = std::fs::read(dir.join("stays.img")).unwrap();
    for (slot, byte) in held.into_iter().flatten().enumerate() {
        assert!(disk[slot * 4096..][..4096] == vec![byte; 4096], "slot {slot}");
    }
}

/// How often the export that is in use changes or goes.
const CUTS: usize = 40;
/// What one client has in flight.
const AT_ONCE: usize = 4;

/// A client that comes back whenever it is cut off, and knows what each place of its part holds.
struct Stubborn {
    part: u64,
    /// What was answered last, or found.
    held: Vec<u8>,
    /// What may be there instead, because its write was not answered.
    doubted: Vec<Option<u8>>,
    next: u8,
    /// How many writes were answered.
    answered: Arc<AtomicUsize>,
    /// How often it was cut off.
    cuts: usize,
}

impl Stubborn {
    fn new(part: u64, answered: Arc<AtomicUsize>) -> Self {
        let (held, doubted) = (vec![0; 16], vec![None; 16]);
        Self { part, held, doubted, next: 0, answered, cuts: 0 }
    }

    /// The byte that a place holds throughout; `None` where the connection is gone.
    async fn found(&self, device: &NbdDevice, slot: usize) -> Option<u8> {
        let at = (self.part * 16 + slot as u64) * 4096;
        let bytes = device.read(ByteRange::between(at, at + 4096)).await.ok()?.to_vec();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "part {}, slot {slot}", self.part);
        Some(bytes[0])
    }

    /// Every place holds what was answered last, or what may be there instead. `None` where the connection is gone.
    async fn look(&mut self, device: &NbdDevice) -> Option<()> {
        for slot in 0..self.held.len() {
            let found = self.found(device, slot).await?;
            let fits = found == self.held[slot] || Some(found) == self.doubted[slot];
            let (held, doubted) = (self.held[slot], self.doubted[slot]);
            assert!(fits, "part {}, slot {slot}: {found}, not {held} or {doubted:?}", self.part);
            (self.held[slot], self.doubted[slot]) = (found, None);
        }
        Some(())
    }

    /// Some writes at once. `None` where the connection is gone.
    async fn write(&mut self, device: &NbdDevice, round: usize) -> Option<()> {
        let slots: Vec<_> = (0..AT_ONCE).map(|index| (round * AT_ONCE + index) % 16).collect();
        self.next = self.next % 250 + 1;
        let byte = self.next;
        let writes = slots.iter().map(|slot| {
            let at = (self.part * 16 + *slot as u64) * 4096;
            device.write(at, Bytes::from(vec![byte; 4096]), Durability::Deferred)
        });
        let results = join_all(writes).await;
        let all = results.iter().all(Result::is_ok);
        for (slot, result) in slots.into_iter().zip(results) {
            match result {
                Ok(()) => self.held[slot] = byte,
                Err(_) => self.doubted[slot] = Some(byte),
            }
        }
        all.then_some(())
    }

    /// Works until it is told to stop, and then until nothing is in doubt.
    async fn work(mut self, dir: PathBuf, stop: Arc<AtomicBool>) -> Self {
        loop {
            let Some(device) = try_connect(&dir, "stays").await else {
                tokio::task::yield_now().await;
                continue;
            };
            let (mut round, mut here) = (0, self.look(&device).await);
            while here.is_some() && !stop.load(Ordering::Relaxed) {
                here = self.write(&device, round).await;
                if here.is_some() {
                    self.answered.fetch_add(1, Ordering::Relaxed);
                }
                round += 1;
            }
            match here {
                Some(()) => return self,
                None => self.cuts += 1,
            }
        }
    }
}

async fn try_connect(dir: &Path, name: &str) -> Option<Arc<NbdDevice>> {
    let address = Address::Unix(dir.join("socket"));
    NbdDevice::connect(&address, name, ClientOptions::default()).await.ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_that_is_changed_and_cut_under_load_loses_nothing_that_was_answered() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create_qcow2(dir, "stays.qcow2", None);
    let config = |more: &str| {
        let export = "[stays]\nexportname = stays.qcow2\nformat = qcow2\n";
        put(dir, "config", &format!("[generic]\nunixsock = socket\nremoval = cut\n{export}{more}"));
    };
    config("");
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    let stop = Arc::new(AtomicBool::new(false));
    let answered: Vec<_> = (0..4).map(|_| Arc::new(AtomicUsize::new(0))).collect();
    let mut workers = Vec::new();
    for (part, answered) in (0..).zip(&answered) {
        let worker = Stubborn::new(part, Arc::clone(answered));
        workers.push(tokio::spawn(worker.work(dir.to_owned(), Arc::clone(&stop))));
    }
    for round in 0..CUTS {
        // Everybody works on it before it goes.
        let before: Vec<_> = answered.iter().map(|one| one.load(Ordering::Relaxed)).collect();
        for (one, before) in answered.iter().zip(before) {
            while one.load(Ordering::Relaxed) < before + 2 {
                tokio::task::yield_now().await;
            }
        }
        for number in 0..4 {
            let sync = if number % 2 == 0 { "true" } else { "false" };
            config(&format!("description = {round} {number}\nsync = {sync}\n"));
            server.signal("-HUP");
        }
        put(dir, "config", "[generic]\nunixsock = socket\nremoval = cut\n");
        server.signal("-HUP");
        server.log_until(r#"removed=["stays"]"#);
        config(&format!("description = again {round}\n"));
        server.signal("-HUP");
        server.log_until(r#"added=["stays"]"#);
    }
    stop.store(true, Ordering::Relaxed);
    let mut held = Vec::new();
    for worker in workers {
        let worker = worker.await.unwrap();
        assert!(worker.cuts > 0, "it was never cut off");
        held.extend(worker.held);
    }
    assert!(server.stop());
    run(dir, "qemu-img", &["check", "-q", "stays.qcow2"]);
    run(dir, "qemu-img", &["convert", "-O", "raw", "stays.qcow2", "stays.img"]);
    let disk = std::fs::read(dir.join("stays.img")).unwrap();
    for (slot, byte) in held.into_iter().enumerate() {
        assert!(disk[slot * 4096..][..4096] == vec![byte; 4096], "slot {slot}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_whose_path_changed_is_closed_when_its_clients_have_left() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    create_qcow2(dir, "old.qcow2", None);
    create_qcow2(dir, "new.qcow2", None);
    let config = |image: &str, removal: &str| {
        format!(
            "[generic]\nunixsock = socket\nremoval = {removal}\n[disk]\nexportname = {image}.qcow2\nformat = qcow2\n"
        )
    };
    put(dir, "config", &config("old", "drain"));
    let mut server = Running::start(dir, &["--config=config"]);
    server.address();
    let old = connect(dir, "disk").await;
    write(&old, 0, 1).await;
    put(dir, "config", &config("new", "drain"));
    server.signal("-HUP");
    server.log_until(r#"changed=["disk"]"#);
    let new = connect(dir, "disk").await;
    write(&old, 4096, 2).await;
    write(&new, 0, 3).await;
    assert_eq!((read(&old, 0).await, read(&new, 0).await), (vec![1; 4096], vec![3; 4096]));
    // Back again while it still has a client: the image is open, and is not opened twice.
    put(dir, "config", &config("old", "drain"));
    server.signal("-HUP");
    server.log_until(r#"changed=["disk"]"#);
    let again = connect(dir, "disk").await;
    assert_eq!(read(&again, 4096).await, vec![2; 4096]);
    drop(new);
    assert!(server.log_until("closed an image").concat().contains("new.qcow2"));
    run(dir, "qemu-io", &["-f", "qcow2", "-c", "read -P 3 0 4k", "new.qcow2"]);
    // Another file in the same place is another image.
    std::fs::rename(dir.join("new.qcow2"), dir.join("old.qcow2")).unwrap();
    server.signal("-HUP");
    server.log_until(r#"changed=["disk"]"#);
    let new = connect(dir, "disk").await;
    assert_eq!(read(&new, 0).await, vec![3; 4096]);
    drop((old, again));
    server.log_until("closed an image");
    // And what is removed can be cut off.
    let other =
        "[generic]\nunixsock = socket\nremoval = cut\n[other]\nexportname = x.img\nfilesize = 4K\n";
    put(dir, "config", other);
    server.signal("-HUP");
    server.log_until(r#"removed=["disk"]"#);
    assert!(new.read(ByteRange::between(0, 1)).await.is_err());
    assert!(server.stop());
}
