//! Connections whose requests meet inside clusters, in several configurations of the image: what each wrote to sectors
//! of its own reads back, whatever the others write and trim around them, and after SIGKILL what was flushed is there.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use block::{BlockDevice, ByteRange, Durability, Segment, ZeroMode};
use futures_util::future::{join_all, try_join_all};
use nbd_server::client::NbdDevice;

use super::kills::connect;
use super::{Running, run};

const CONNECTIONS: u64 = 4;
const SECTOR: u64 = 512;
/// The disk, in sectors. The last part of it is contested: all write and trim all of it, and nobody knows who was last.
const OWNED: u64 = 3072;
const CONTESTED: u64 = 1024;
/// Runs of sectors that have one owner.
const SLOT: u64 = 6;
/// What each connection sends at once, and how often.
const AT_ONCE: u64 = 6;
const BATCHES: u64 = 60;

/// How an image is made.
#[derive(Clone, Copy, Debug)]
struct Shape {
    /// For `qemu-img create -o`.
    options: &'static str,
    origin: Origin,
    /// All of it is in a snapshot, too.
    has_snapshot: bool,
    has_bitmap: bool,
    is_encrypted: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Empty,
    /// It stands on a raw file.
    Below,
    /// It holds a disk, compressed or not.
    Compressed,
    Full,
}

const PLAIN: Shape = Shape {
    options: "cluster_size=64k",
    origin: Origin::Empty,
    has_snapshot: false,
    has_bitmap: false,
    is_encrypted: false,
};

const SMALL: [Shape; 6] = [
    PLAIN,
    Shape { options: "cluster_size=512", origin: Origin::Below, ..PLAIN },
    Shape { options: "cluster_size=4k,compat=0.10", origin: Origin::Below, ..PLAIN },
    Shape { options: "cluster_size=64k,extended_l2=on", origin: Origin::Below, ..PLAIN },
    Shape {
        options: "cluster_size=64k,compression_type=zstd",
        origin: Origin::Compressed,
        ..PLAIN
    },
    Shape { options: "cluster_size=4k,lazy_refcounts=on", origin: Origin::Below, ..PLAIN },
];

const LADEN: [Shape; 6] = [
    Shape { options: "cluster_size=4k,data_file=disk.data", origin: Origin::Below, ..PLAIN },
    Shape { options: LUKS, origin: Origin::Below, is_encrypted: true, ..PLAIN },
    Shape { options: "cluster_size=4k", origin: Origin::Below, has_bitmap: true, ..PLAIN },
    Shape { origin: Origin::Full, has_snapshot: true, ..PLAIN },
    Shape {
        options: "cluster_size=16k",
        origin: Origin::Compressed,
        has_snapshot: true,
        has_bitmap: true,
        ..PLAIN
    },
    Shape { options: "cluster_size=2M", origin: Origin::Below, ..PLAIN },
];

const LUKS: &str =
    "cluster_size=4k,encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10";

/// Sector `sector` of write `number`; 0 for zeros.
fn stamp(sector: u64, number: u64) -> Vec<u8> {
    if number == 0 {
        return vec![0; 512];
    }
    let mut bytes = Vec::with_capacity(512);
    for word in 0..64u64 {
        let salt = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ sector << 8 ^ word >> 3;
        bytes.extend(if word % 8 == 0 { number } else { salt }.to_le_bytes());
    }
    bytes
}

/// The number of the write that left a sector; `None` where it is of nobody, or mixed.
fn number_of(sector: u64, bytes: &[u8]) -> Option<u64> {
    let number = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    (stamp(sector, number) == bytes).then_some(number)
}

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ mixed >> 29) % end
    }
}

/// What one connection knows of its sectors.
struct Owner {
    number: u64,
    random: Random,
    next: u64,
    /// All that a sector may hold: what was last flushed, and what was sent since.
    may: HashMap<u64, Vec<u64>>,
    /// What it holds, where that is known.
    last: HashMap<u64, u64>,
}

#[derive(Clone, Copy)]
enum Kind {
    Write(u64, Durability),
    Zero(bool),
    Trim,
}

impl Owner {
    fn new(number: u64, below: u64) -> Self {
        let mine = (0..OWNED).filter(|sector| sector / SLOT % CONNECTIONS == number);
        let last: HashMap<u64, u64> = mine.map(|sector| (sector, below)).collect();
        let may = last.iter().map(|(sector, below)| (*sector, vec![*below])).collect();
        Self { number, random: Random(number + 1), next: 1 + number, may, last }
    }

    fn slot(&mut self) -> ByteRange {
        let slots = OWNED / SLOT / CONNECTIONS;
        let first = (self.random.below(slots) * CONNECTIONS + self.number) * SLOT;
        let start = first + self.random.below(SLOT);
        ByteRange::between(start, start + 1 + self.random.below(first + SLOT - start))
    }

    fn kind(&mut self) -> Kind {
        self.next += CONNECTIONS;
        match self.random.below(10) {
            0 => Kind::Zero(true),
            1 => Kind::Zero(false),
            2 => Kind::Trim,
            3 => Kind::Write(self.next, Durability::Durable),
            _ => Kind::Write(self.next, Durability::Deferred),
        }
    }

    /// Requests in slots of its own, and one in the contested part, all at once. `false` when the server is gone.
    async fn batch(&mut self, device: &NbdDevice) -> bool {
        let mut owned: Vec<(ByteRange, Kind)> = Vec::new();
        while owned.len() < usize::try_from(AT_ONCE).unwrap() {
            let (slot, kind) = (self.slot(), self.kind());
            if owned.iter().all(|(other, _)| !other.overlaps(slot)) {
                owned.push((slot, kind));
            }
        }
        for (slot, kind) in &owned {
            for sector in slot.start()..slot.end() {
                let value = if let Kind::Write(number, _) = kind { *number } else { 0 };
                self.may.get_mut(&sector).unwrap().push(value);
            }
        }
        let start = OWNED + self.random.below(CONTESTED - 128);
        let contested = ByteRange::between(start, start + 1 + self.random.below(128));
        let anybody = self.kind();
        let requests = owned.iter().copied().chain([(contested, anybody)]);
        if try_join_all(requests.map(|(slot, kind)| send(device, slot, kind))).await.is_err() {
            return false;
        }
        for (slot, kind) in &owned {
            let Some(found) = read(device, *slot).await else { return false };
            for (sector, found) in (slot.start()..slot.end()).zip(found) {
                let wanted = if let Kind::Write(number, _) = kind { *number } else { 0 };
                let found = found.unwrap_or_else(|| panic!("sector {sector} is mixed"));
                // A trim may leave what was there.
                let kept = matches!(kind, Kind::Trim) && found == self.last[&sector];
                assert!(found == wanted || kept, "sector {sector}: {found}, not {wanted}");
                self.last.insert(sector, found);
                if matches!(kind, Kind::Write(_, Durability::Durable)) {
                    self.may.insert(sector, vec![found]);
                }
            }
        }
        if self.random.below(3) == 0 {
            if device.flush().await.is_err() {
                return false;
            }
            for (sector, value) in &self.last {
                self.may.insert(*sector, vec![*value]);
            }
        }
        true
    }

    /// Every sector of its own holds what it may, and that is known from now on.
    async fn holds(&mut self, device: &NbdDevice) {
        let disk = read(device, ByteRange::between(0, OWNED)).await.unwrap();
        for (sector, may) in &mut self.may {
            let found = disk[usize::try_from(*sector).unwrap()];
            let found = found.filter(|number| may.contains(number));
            let found = found.unwrap_or_else(|| panic!("sector {sector} is none of {may:?}"));
            *may = vec![found];
            self.last.insert(*sector, found);
        }
    }
}

async fn send(
    device: &NbdDevice,
    sectors: ByteRange,
    kind: Kind,
) -> Result<(), block::DeviceError> {
    let range = ByteRange::between(sectors.start() * SECTOR, sectors.end() * SECTOR);
    match kind {
        Kind::Write(number, durability) => {
            let stamps = (sectors.start()..sectors.end()).flat_map(|sector| stamp(sector, number));
            let data: Vec<u8> = stamps.collect();
            device.write(range.start(), data.into(), durability).await
        }
        Kind::Zero(keep_allocated) => {
            let mode = ZeroMode { keep_allocated, fast_only: false };
            device.write_zeroes(range, mode, Durability::Deferred).await
        }
        Kind::Trim => device.discard(range, Durability::Deferred).await,
    }
}

/// What sectors hold; `None` when the server is gone.
async fn read(device: &NbdDevice, sectors: ByteRange) -> Option<Vec<Option<u64>>> {
    let range = ByteRange::between(sectors.start() * SECTOR, sectors.end() * SECTOR);
    let mut bytes = Vec::new();
    for segment in device.read(range).await.ok()?.0 {
        match segment {
            Segment::Data(data) => bytes.extend_from_slice(&data),
            Segment::Zero(len) => bytes.resize(bytes.len() + usize::try_from(len).unwrap(), 0),
        }
    }
    let numbered = (sectors.start()..).zip(bytes.chunks(512));
    Some(numbered.map(|(sector, bytes)| number_of(sector, bytes)).collect())
}

impl Shape {
    /// Runs `qemu-img` on the image; the passphrase is the object `key`. What it printed.
    fn qemu_img(self, dir: &Path, command: &str, before: &[&str], after: &[&str]) -> String {
        let key = if self.is_encrypted { ",encrypt.key-secret=key" } else { "" };
        let image = format!("driver=qcow2,file.filename=disk.qcow2{key}");
        let arguments = [command, "--object", "secret,id=key,file=key", "--image-opts"];
        run(dir, "qemu-img", &[&arguments, before, &[&image], after].concat())
    }

    /// The image, full of write 1 from below it or from itself, or of nothing. Which of the two.
    fn create(self, dir: &Path) -> u64 {
        let size = ((OWNED + CONTESTED) * SECTOR).to_string();
        let raw: Vec<u8> = (0..OWNED + CONTESTED).flat_map(|sector| stamp(sector, 1)).collect();
        std::fs::write(dir.join("below"), raw).unwrap();
        std::fs::write(dir.join("key"), "open sesame").unwrap();
        let (command, rest): (&[&str], &[&str]) = match self.origin {
            Origin::Empty => (&["create"], &["disk.qcow2", &size]),
            Origin::Below => (&["create"], &["-b", "below", "-F", "raw", "disk.qcow2", &size]),
            Origin::Full => (&["convert", "-f", "raw"], &["below", "disk.qcow2"]),
            Origin::Compressed => (&["convert", "-c", "-f", "raw"], &["below", "disk.qcow2"]),
        };
        let format = if command[0] == "create" { "-f" } else { "-O" };
        let how = ["--object", "secret,id=key,file=key", format, "qcow2", "-o", self.options, "-q"];
        run(dir, "qemu-img", &[command, &how, rest].concat());
        if self.has_snapshot {
            self.qemu_img(dir, "snapshot", &["-c", "before"], &[]);
        }
        if self.has_bitmap {
            self.qemu_img(dir, "bitmap", &["--add", "-g", "4k"], &["since"]);
        }
        u64::from(self.origin != Origin::Empty)
    }

    /// Nothing is wrong with the image that a kill has left, but for leaks; and the snapshot holds what it did. The
    /// system may still be letting go of its locks.
    fn check(self, dir: &Path) {
        let key = if self.is_encrypted { ",encrypt.key-secret=key" } else { "" };
        let image = format!("driver=qcow2,file.filename=disk.qcow2{key}");
        let checked = Command::new("timeout")
            .args(["40", "qemu-img", "check", "--object", "secret,id=key,file=key"])
            .args(["-U", "--image-opts", &image])
            .current_dir(dir)
            .output()
            .unwrap();
        assert!(matches!(checked.status.code(), Some(0 | 3)), "{self:?}: {checked:?}");
        if self.has_snapshot {
            self.qemu_img(dir, "convert", &["-U", "-O", "raw", "-l", "before"], &["kept"]);
            let kept = std::fs::read(dir.join("kept")).unwrap();
            assert!(kept == std::fs::read(dir.join("below")).unwrap(), "{self:?}: the snapshot");
        }
        if self.has_bitmap {
            // It was being written to, and nobody may take what it says for true.
            let info = run(dir, "qemu-img", &["info", "-U", "-f", "qcow2", "disk.qcow2"]);
            assert!(info.contains("in-use"), "{self:?}: {info}");
        }
    }
}

/// All connections at once, until each has sent what it wanted or the server is gone.
async fn meet(dir: &Path, owners: Vec<Owner>, kill: Option<(&mut Running, u64)>) -> Vec<Owner> {
    let batches = tokio::sync::watch::Sender::new(0);
    let mut seen = batches.subscribe();
    let mut tasks = Vec::new();
    for mut owner in owners {
        let (device, batches) = (connect(dir).await, batches.clone());
        let forever = kill.is_some();
        tasks.push(tokio::spawn(async move {
            let mut sent = 0;
            while (forever || sent < BATCHES) && owner.batch(&device).await {
                sent += 1;
                batches.send_modify(|count| *count += 1);
            }
            assert!(forever || sent == BATCHES, "the server is gone");
            owner
        }));
    }
    if let Some((server, after)) = kill {
        seen.wait_for(|count| *count >= after).await.unwrap();
        server.child.kill().unwrap();
        server.status();
    }
    join_all(tasks).await.into_iter().map(Result::unwrap).collect()
}

async fn meets_and_dies(shape: Shape) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let dir = dir.path();
    let below = shape.create(dir);
    let mut owners: Vec<_> = (0..CONNECTIONS).map(|number| Owner::new(number, below)).collect();
    for owner in &mut owners {
        owner.next += CONNECTIONS;
    }
    let key = if shape.is_encrypted { ",passphrase-file=key" } else { "" };
    let arguments = ["--listen=unix:socket", &format!("--export=one=disk.qcow2{key}")];
    let mut server = Running::start(dir, &arguments);
    server.address();
    owners = meet(dir, owners, None).await;
    for round in 0..2 {
        owners = meet(dir, owners, Some((&mut server, 40 + 31 * round))).await;
        if !shape.options.contains("lazy") {
            shape.check(dir);
        }
        server = Running::start(dir, &arguments);
        server.address();
        let device: Arc<NbdDevice> = connect(dir).await;
        for owner in &mut owners {
            owner.holds(&device).await;
        }
        let contested = ByteRange::between(OWNED, OWNED + CONTESTED);
        let found = read(&device, contested).await.unwrap();
        assert!(found.iter().all(Option::is_some), "{shape:?}: a contested sector is mixed");
        device.disconnect().await;
    }
    assert!(server.stop());
    // What the kills leaked stays until a check repairs it.
    shape.check(dir);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_meet_inside_clusters_lose_nothing_nor_does_a_kill_under_them() {
    for shape in SMALL {
        meets_and_dies(shape).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nor_do_they_with_data_files_ciphers_snapshots_bitmaps_and_clusters_of_2_mib() {
    for shape in LADEN {
        meets_and_dies(shape).await;
    }
}
