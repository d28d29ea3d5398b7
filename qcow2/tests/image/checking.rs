//! Checking and repairing images that QEMU made and that were damaged in every table, with `qemu-img check` as the
//! judge of both.

use std::path::{Path, PathBuf};
use std::process::Command;

use block::{BlockDevice, Durability};
use qcow2::{CheckOptions, CheckReport, Error, Finding, Image, OpenOptions, Repair};
use serde_json::Value;

use crate::common::{block_on, qemu_create, qemu_img, qemu_io, read_all};
use crate::rounds::rounds;

const SECRET: [&str; 2] = ["--object", "secret,id=key,data=passphrase"];

/// What the tests damage, by name.
pub(crate) const KINDS: [&str; 10] = [
    "plain",
    "small",
    "narrow",
    "wide",
    "snapshots",
    "compressed",
    "extended",
    "v2",
    "data_file",
    "bitmaps",
];

/// Makes an image of a kind with all that is special of it.
pub(crate) fn make(dir: &Path, kind: &str) -> PathBuf {
    let path = dir.join(format!("{kind}.qcow2"));
    let data_file = format!("data_file={}", dir.join("data.raw").display());
    let options = match kind {
        "plain" | "bitmaps" | "snapshots" => "cluster_size=4k",
        "small" => "cluster_size=512",
        "narrow" => "cluster_size=4k,refcount_bits=1",
        "wide" => "cluster_size=1k,refcount_bits=64",
        "compressed" => "cluster_size=16k",
        "extended" => "cluster_size=16k,extended_l2=on",
        "v2" => "cluster_size=4k,compat=0.10",
        "data_file" => data_file.as_str(),
        other => panic!("{other}"),
    };
    qemu_create(&path, options, "5M", None);
    let io = |commands: &[&str]| qemu_io(&path, commands);
    io(&["write -P1 0 100k", "write -P2 1M 64k", "write -P3 3000k 40k"]);
    match kind {
        "compressed" => {
            io(&["write -c -P 4 2M 256k", "write -c -P 5 4M 16k", "write -P 6 2064k 16k"])
        }
        "extended" => {
            io(&["write -P4 2M 1k", "write -z 2050k 2k", "write -z 1M 4k", "write -c -P5 4M 16k"])
        }
        "v2" => io(&["write -c -P 4 2M 64k", "discard 0 16k"]),
        _ => io(&["write -z 4k 8k", "write -z -u 2M 64k"]),
    }
    if matches!(kind, "snapshots" | "v2") {
        let name = path.to_str().unwrap();
        qemu_img(&["snapshot", "-c", "one", name]);
        io(&["write -P7 1M 8k", "write -P8 4M 8k"]);
        qemu_img(&["snapshot", "-c", "two", name]);
        io(&["write -P9 0 4k"]);
    }
    if kind == "bitmaps" {
        let name = path.to_str().unwrap();
        for bitmap in ["a", "b"] {
            qemu_img(&["bitmap", "--add", "-g", "512", name, bitmap]);
        }
        io(&["write -P7 1M 300k", "write -P8 4M 100k"]);
    }
    path
}

/// An image in memory, with the places of its entries.
pub(crate) struct Layout {
    pub(crate) bytes: Vec<u8>,
    pub(crate) cluster: u64,
}

impl Layout {
    pub(crate) fn of(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let mut layout = Self { bytes, cluster: 0 };
        layout.cluster = 1 << layout.u32(20);
        layout
    }

    pub(crate) fn u32(&self, at: u64) -> u32 {
        let at = usize::try_from(at).unwrap();
        self.bytes.get(at..at + 4).map_or(0, |b| u32::from_be_bytes(b.try_into().unwrap()))
    }

    pub(crate) fn u64(&self, at: u64) -> u64 {
        u64::from(self.u32(at)) << 32 | u64::from(self.u32(at + 4))
    }

    pub(crate) fn put(&mut self, at: u64, value: u64) {
        let at = usize::try_from(at).unwrap();
        if self.bytes.len() < at + 8 {
            self.bytes.resize(at + 8, 0);
        }
        self.bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }

    /// The places of all entries of a table that are not 0, as far as it lies in the file.
    pub(crate) fn entries(&self, at: u64, bytes: u64, step: u64) -> Vec<u64> {
        let inside = (self.bytes.len() as u64).saturating_sub(at).min(bytes);
        let slots = (0..inside / step).map(|slot| at + slot * step);
        slots.filter(|at| self.u64(*at) != 0).collect()
    }

    pub(crate) fn l1(&self) -> Vec<u64> {
        self.entries(self.u64(40), u64::from(self.u32(36)) * 8, 8)
    }

    pub(crate) fn l2(&self) -> Vec<u64> {
        let step = if self.u32(4) == 3 && self.u64(72) & 16 != 0 { 16 } else { 8 };
        let tables = self.l1().into_iter().map(|at| self.u64(at) & 0x00ff_ffff_ffff_fe00);
        tables.flat_map(|at| self.entries(at, self.cluster, step)).collect()
    }

    pub(crate) fn refcount_table(&self) -> Vec<u64> {
        self.entries(self.u64(48), u64::from(self.u32(56)) * self.cluster, 8)
    }

    pub(crate) fn refcount_words(&self) -> Vec<u64> {
        let blocks = self.refcount_table().into_iter().map(|at| self.u64(at));
        blocks.flat_map(|at| self.entries(at, self.cluster, 8)).collect()
    }

    /// The L1 tables of the snapshots.
    pub(crate) fn snapshot_l1(&self) -> Vec<u64> {
        let mut at = self.u64(64);
        let mut found = Vec::new();
        for _ in 0..self.u32(60) {
            if at >= self.bytes.len() as u64 {
                break;
            }
            found.extend(self.entries(self.u64(at), u64::from(self.u32(at + 8)) * 8, 8));
            let texts = u64::from(self.u32(at + 12) >> 16) + u64::from(self.u32(at + 12) & 0xffff);
            at = (at + 40 + u64::from(self.u32(at + 36)) + texts).next_multiple_of(8);
        }
        found
    }
}

/// What `qemu-img check` says: exit code and JSON.
pub(crate) fn qemu_check(path: &Path, repair: Option<&str>) -> (i32, Value) {
    let mut command = Command::new("qemu-img");
    command.args(["check", "-f", "qcow2", "--output=json"]);
    if let Some(repair) = repair {
        command.args(["-r", repair]);
    }
    let output = command.arg(path).output().unwrap();
    let json = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    (output.status.code().unwrap_or(-1), json)
}

pub(crate) fn check(path: &Path, repair: Repair) -> CheckReport {
    try_check(path, repair).unwrap()
}

pub(crate) fn try_check(path: &Path, repair: Repair) -> Result<CheckReport, Error> {
    let options = CheckOptions { repair, ..CheckOptions::default() };
    block_on(Image::check(path, options, |_| {}))
}

pub(crate) fn field(json: &Value, name: &str) -> u64 {
    json.get(name).and_then(Value::as_u64).unwrap_or(0)
}

/// Whether a report has what QEMU's check does not look for: data in clusters of metadata where the refcount says so,
/// and zero flags where entries have none.
fn is_stricter(report: &CheckReport) -> bool {
    let qemu_overlooks = 0xc0ff_ffff_ffff_fe01;
    report.findings.iter().any(|finding| match finding {
        Finding::Overlap { .. } => true,
        Finding::ReservedBits { raw, .. } => raw & !qemu_overlooks == 0,
        _ => false,
    })
}

/// Our report says what QEMU's does.
fn assert_agrees(path: &Path, what: &str) -> CheckReport {
    let report = check(path, Repair::None);
    let (code, json) = qemu_check(path, None);
    if code == 1 || code < 0 {
        // QEMU gives up at some faults behind which we go on.
        assert!(!report.is_clean(), "{what}: QEMU could not check it");
        return report;
    }
    let text = format!("{what}: {report:#?} {json:#}");
    assert_eq!(report.leaks, field(&json, "leaks"), "leaks, {text}");
    if is_stricter(&report) {
        assert!(report.corruptions >= field(&json, "corruptions"), "corruptions, {text}");
    } else {
        assert_eq!(report.corruptions, field(&json, "corruptions"), "corruptions, {text}");
    }
    assert_eq!(report.check_errors, field(&json, "check-errors"), "errors, {text}");
    assert_eq!(report.image_end_bytes, field(&json, "image-end-offset"), "end, {text}");
    assert_eq!(report.total_clusters, field(&json, "total-clusters"), "total, {text}");
    assert_eq!(report.allocated_clusters, field(&json, "allocated-clusters"), "allocated, {text}");
    assert_eq!(
        report.fragmented_clusters,
        field(&json, "fragmented-clusters"),
        "fragmented, {text}"
    );
    assert_eq!(
        report.compressed_clusters,
        field(&json, "compressed-clusters"),
        "compressed, {text}"
    );
    report
}

#[test]
fn images_that_qemu_made_are_clean_and_counted_as_qemu_counts_them() {
    let dir = tempfile::tempdir().unwrap();
    for kind in KINDS {
        let path = make(dir.path(), kind);
        let report = assert_agrees(&path, kind);
        assert!(report.is_clean(), "{kind}: {report:#?}");
        assert!(report.allocated_clusters > 0);
    }
}

#[test]
fn the_header_of_luks_is_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("luks.qcow2");
    let name = path.to_str().unwrap();
    let options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10";
    let create = ["create", "-q", "-f", "qcow2", "-o", options, name, "5M"];
    qemu_img(&[&create[..1], &SECRET[..], &create[1..]].concat());
    // QEMU wants the key even for a check.
    let report = check(&path, Repair::None);
    assert!(report.is_clean(), "{report:#?}");
    let image = format!("driver=qcow2,file.filename={name},encrypt.key-secret=key");
    let judge = ["check", "--output=json", "--image-opts", image.as_str()];
    let json = qemu_img(&[&judge[..1], &SECRET[..], &judge[1..]].concat());
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(report.image_end_bytes, field(&json, "image-end-offset"));
    assert!(report.image_end_bytes > 1 << 20, "key material takes more than a megabyte");
}

/// Values that an entry is damaged with.
fn damages(entry: u64, cluster: u64, end: u64) -> Vec<(&'static str, u64)> {
    vec![
        ("zeroed", 0),
        ("copied flag turned", entry ^ 1 << 63),
        ("zero flag turned", entry ^ 1),
        ("compressed flag turned", entry ^ 1 << 62),
        ("reserved bit", entry | 1 << 57),
        ("reserved low bit", entry | 4),
        ("unaligned", entry ^ 512),
        ("next cluster", entry.wrapping_add(cluster)),
        ("behind the end", (entry & !0x00ff_ffff_ffff_fe00) | (end + 16 * cluster)),
        ("at the header", entry & !0x00ff_ffff_ffff_fe00),
        ("far away", entry | 1 << 55),
    ]
}

/// A few of many, always the first and the last.
fn some<T: Copy>(all: &[T], most: usize) -> Vec<T> {
    let step = all.len().div_ceil(most).max(1);
    all.iter().copied().step_by(step).chain(all.last().copied()).collect()
}

/// The entries of an image that are damaged, by the kind of their table.
fn targets(layout: &Layout) -> Vec<(&'static str, u64)> {
    let mut found = Vec::new();
    for (table, places, most) in [
        ("L1", layout.l1(), 2),
        ("L2", layout.l2(), 5),
        ("refcount table", layout.refcount_table(), 1),
        ("refcounts", layout.refcount_words(), 2),
        ("snapshot L1", layout.snapshot_l1(), 2),
    ] {
        found.extend(some(&places, most).into_iter().map(|at| (table, at)));
    }
    found
}

/// Damages entries of all tables of an image, one at a time, in all ways that there are (by default, a part of them).
fn damage_and_judge(kind: &str) {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), kind);
    let layout = Layout::of(&path);
    let end = layout.bytes.len() as u64;
    let mut all = Vec::new();
    for (table, at) in targets(&layout) {
        let entry = layout.u64(at);
        let damages = damages(entry, layout.cluster, end);
        let real = damages.into_iter().filter(|(_, value)| *value != entry);
        all.extend(real.map(|(damage, value)| (table, at, damage, value)));
    }
    let (mut repaired, mut not) = (0, 0);
    let step = usize::try_from(5 / rounds(1)).unwrap().max(1);
    for (table, at, damage, value) in all.into_iter().step_by(step) {
        let what = format!("{kind}: {table} entry at {at:#x} {damage}");
        let mut damaged = Layout { bytes: layout.bytes.clone(), cluster: layout.cluster };
        damaged.put(at, value);
        std::fs::write(&path, &damaged.bytes).unwrap();
        assert_agrees(&path, &what);
        if judge_repair(&path, &what) { repaired += 1 } else { not += 1 }
    }
    assert!(repaired > 5, "{kind}: {repaired} repaired, {not} not");
}

#[test]
fn damage_is_found_and_repaired_in_plain_images() {
    for kind in ["plain", "small", "data_file"] {
        damage_and_judge(kind);
    }
}

#[test]
fn damage_is_found_and_repaired_with_other_widths_of_refcounts() {
    for kind in ["narrow", "wide"] {
        damage_and_judge(kind);
    }
}

#[test]
fn damage_is_found_and_repaired_with_snapshots() {
    for kind in ["snapshots", "v2"] {
        damage_and_judge(kind);
    }
}

#[test]
fn damage_is_found_and_repaired_with_compression_subclusters_and_bitmaps() {
    for kind in ["compressed", "extended", "bitmaps"] {
        damage_and_judge(kind);
    }
}

/// The disk as we read it.
async fn read_by_us(path: &Path) -> Vec<u8> {
    let image = Image::open(path, OpenOptions::reading()).await.unwrap();
    let content = read_all(&image).await;
    image.close().await.unwrap();
    content
}

#[test]
fn a_copied_flag_without_a_place_is_read_and_judged_as_qemu_does() {
    const COPIED: u64 = 1 << 63;
    for (kind, flags) in [
        ("plain", COPIED),
        ("plain", COPIED | 1),
        ("compressed", COPIED),
        ("extended", COPIED),
        ("data_file", COPIED | 1),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = make(dir.path(), kind);
        let mut layout = Layout::of(&path);
        let damaged = *layout.l2().last().unwrap();
        layout.put(damaged, flags);
        if kind == "extended" {
            // Half of its subclusters read as zeros.
            layout.put(damaged + 8, 0xffff << 32);
        }
        std::fs::write(&path, &layout.bytes).unwrap();
        let what = format!("{kind} {flags:#x}");
        let report = assert_agrees(&path, &what);
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}");
        block_on(async {
            assert!(Some(read_by_us(&path).await) == read_by_qemu(&path), "{what}");
            let image = Image::open(&path, OpenOptions::writing()).await.unwrap();
            let (at, bytes) = (4 << 20, vec![0xaa; 64 << 10]);
            image.write(at, bytes.into(), Durability::Deferred).await.unwrap();
            image
                .write(3000 << 10, vec![0xbb; 40 << 10].into(), Durability::Deferred)
                .await
                .unwrap();
            image.close().await.unwrap();
            assert!(Some(read_by_us(&path).await) == read_by_qemu(&path), "{what}, written");
        });
        let report = assert_agrees(&path, &what);
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}, written");
    }
}

#[test]
fn a_copied_flag_without_a_table_is_read_as_qemu_does_and_called_corrupt() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), "plain");
    let mut layout = Layout::of(&path);
    let damaged = *layout.l1().first().unwrap();
    layout.put(damaged, 1 << 63);
    std::fs::write(&path, &layout.bytes).unwrap();
    // QEMU takes the header for a table, and so counts it twice.
    let report = assert_agrees(&path, "no table");
    assert!(report.corruptions > 0, "{report:#?}");
    let content = block_on(read_by_us(&path));
    assert!(content.iter().any(|byte| *byte != 0));
    assert!(Some(content) == read_by_qemu(&path));
}

/// The disk as QEMU reads it, where it can.
pub(crate) fn read_by_qemu(path: &Path) -> Option<Vec<u8>> {
    let raw = path.with_extension("raw");
    let output = Command::new("qemu-img")
        .args(["convert", "-f", "qcow2", "-O", "raw"])
        .args([path, &raw])
        .output();
    output.unwrap().status.success().then(|| std::fs::read(&raw).unwrap())
}

/// Repairs two copies, ours and QEMU's. Whether ours ends clean.
fn judge_repair(path: &Path, what: &str) -> bool {
    let by_qemu = path.with_extension("by-qemu");
    std::fs::copy(path, &by_qemu).unwrap();
    let report = check(path, Repair::All);
    let (qemu_code, qemu_json) = qemu_check(&by_qemu, Some("all"));
    let (judged, json) = qemu_check(path, None);
    if report.is_clean() {
        assert_eq!(judged, 0, "{what}: {report:#?} {json:#}");
    }
    if qemu_code == 0 && !is_stricter(&report) {
        assert!(report.is_clean(), "{what}: QEMU could repair it {report:#?} {qemu_json:#}");
        let (ours, theirs) = (read_by_qemu(path), read_by_qemu(&by_qemu));
        // What was read out of metadata is copied by us as it was, and changes with the metadata in QEMU's.
        let is_apart = |finding: &Finding| matches!(finding, Finding::Shared { .. });
        assert!(
            report.repaired.iter().any(is_apart) || ours == theirs,
            "{what}: the disk reads otherwise than QEMU's"
        );
    }
    let again = check(path, Repair::None);
    assert_eq!(again.corruptions, report.corruptions, "{what}: a second look sees another image");
    report.is_clean()
}
