//! Images of several kinds damaged by chance, and repaired by us and by `qemu-img`: ours may end no worse. The seed of
//! each damage is told where that fails.

use std::path::Path;

use qcow2::{CheckReport, Finding, GuestOffset, Repair, TableKind};

use crate::checking::{Layout, check, make, qemu_check, read_by_qemu, try_check};
use crate::common::{qemu_img, qemu_io};
use crate::rounds::rounds;

const KINDS: [&str; 6] = ["plain", "small", "snapshots", "extended", "v2", "compressed"];
const DAMAGES: u64 = 60;
const HOST_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Numbers that look like chance and are the same each time.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn one_of(&mut self, all: &[u64]) -> u64 {
        all[usize::try_from(self.below(all.len() as u64)).unwrap()]
    }
}

/// Where a word of metadata may be damaged.
fn places(layout: &Layout, chance: &mut Chance) -> Vec<u64> {
    let mut places = layout.l1();
    for at in layout.l1() {
        let table = layout.u64(at) & HOST_OFFSET;
        places.extend((0..8).map(|_| table + chance.below(layout.cluster / 8) * 8));
    }
    for at in layout.refcount_table() {
        let block = layout.u64(at);
        places.extend([at; 4]);
        places.extend((0..8).map(|_| block + chance.below(layout.cluster.min(320) / 8) * 8));
    }
    places.extend(layout.snapshot_l1());
    if layout.u32(60) > 0 {
        // Place and length of an L1 table, and the lengths of id and name.
        places.extend([layout.u64(64), layout.u64(64) + 8]);
    }
    places
}

/// Damages one to three words. Says how.
fn damage(layout: &mut Layout, chance: &mut Chance) -> String {
    let places = places(layout, chance);
    let (cluster, end) = (layout.cluster, layout.bytes.len() as u64);
    let (l1, refcounts) = (layout.u64(40), layout.u64(48));
    let mut what = String::new();
    for _ in 0..chance.one_of(&[1, 1, 2, 3]) {
        let at = chance.one_of(&places);
        let old = layout.u64(at);
        let values = [
            0,
            old ^ 1 << 63,
            old.wrapping_add(cluster),
            old.saturating_sub(cluster),
            cluster,
            old ^ 1 << 62,
            l1 | 1 << 63,
            refcounts | 1 << 63,
            (chance.below(end / cluster) * cluster) | 1 << 63,
            old ^ 1 << chance.below(64),
            1,
            u64::MAX,
            (end + cluster * 3) | 1 << 63,
        ];
        let new = chance.one_of(&values);
        layout.put(at, new);
        what += &format!(" {at:#x}: {old:#x} -> {new:#x}");
    }
    what
}

/// How bad an exit code of `qemu-img check` is.
fn badness(code: i32) -> u32 {
    match code {
        0 => 0,
        3 => 1,
        2 => 2,
        _ => 3,
    }
}

/// Whether a repair was complete but for bits that QEMU does not look at: zero flags where entries have none.
fn is_complete(report: &CheckReport) -> bool {
    let overlooked = |finding: &Finding| match finding {
        Finding::ReservedBits { entry, raw } => {
            entry.table == TableKind::L2 && raw & !0xc0ff_ffff_ffff_fe01 == 0
        }
        _ => false,
    };
    let all_overlooked = report.findings.iter().all(overlooked);
    all_overlooked && report.leaks == 0 && report.check_errors == 0 && report.refused.is_none()
}

/// Damages an image once and compares the repairs. Whether QEMU's was complete, or what is wrong with ours.
fn judge(sound: &[u8], path: &Path, kind: &str, seed: u64) -> Result<bool, String> {
    std::fs::write(path, sound).unwrap();
    let mut layout = Layout::of(path);
    let how = damage(&mut layout, &mut Chance(seed));
    let by_qemu = path.with_extension("by-qemu");
    std::fs::write(path, &layout.bytes).unwrap();
    std::fs::write(&by_qemu, &layout.bytes).unwrap();
    qemu_check(&by_qemu, Some("all"));
    let (theirs, _) = qemu_check(&by_qemu, None);
    let report = try_check(path, Repair::All);
    let (ours, _) = qemu_check(path, None);
    let is_ours = report.as_ref().is_ok_and(is_complete);
    let wrong = match () {
        () if badness(ours) > badness(theirs) => "it is worse than QEMU's",
        () if is_ours && ours != 0 => "it calls complete what QEMU does not",
        () if !is_ours && theirs == 0 => "QEMU's is complete",
        () => return Ok(theirs == 0),
    };
    let findings = report.as_ref().map(|report| report.findings.iter().take(5).collect::<Vec<_>>());
    Err(format!("{kind}, seed {seed}:{how}: {wrong} ({ours}, {theirs}): {findings:?}"))
}

#[test]
fn damage_by_chance_is_repaired_at_least_as_well_as_by_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let images = KINDS.map(|kind| {
        let path = make(dir.path(), kind);
        let sound = std::fs::read(&path).unwrap();
        (kind, path, sound)
    });
    let all = DAMAGES * u64::from(rounds(1));
    let (mut complete, mut wrong) = (0, Vec::new());
    for seed in 0..all {
        let (kind, path, sound) = &images[usize::try_from(seed % 6).unwrap()];
        match judge(sound, path, kind, seed) {
            Ok(is_complete) => complete += u64::from(is_complete),
            Err(what) => wrong.push(what),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(complete > all / 3, "{complete} of {all} can be repaired");
}

#[test]
fn guest_data_in_a_cluster_of_metadata_is_copied_and_reads_as_before() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), "plain");
    let sound = read_by_qemu(&path).unwrap();
    let mut layout = Layout::of(&path);
    let (entry, refcounts) = (layout.l2()[0], layout.u64(48));
    layout.put(entry, 1 << 63 | refcounts);
    std::fs::write(&path, &layout.bytes).unwrap();
    let report = check(&path, Repair::All);
    assert!(report.is_clean(), "{report:#?}");
    let guest = report.repaired.iter().find_map(|finding| match finding {
        Finding::Shared { guest, .. } => *guest,
        _ => None,
    });
    assert_eq!(guest, Some(GuestOffset(0)));
    assert_eq!(qemu_check(&path, None).0, 0);
    let (len, at) = (4096, usize::try_from(refcounts).unwrap());
    let disk = read_by_qemu(&path).unwrap();
    assert!(disk[..len] == layout.bytes[at..at + len], "what the guest read is what it reads");
    assert!(disk[len..] == sound[len..]);
}

#[test]
fn what_more_entries_name_than_a_refcount_can_say_is_copied_for_each_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), "narrow");
    let sound = Layout::of(&path);
    for (shared, lost) in [("data", false), ("data", true), ("a table", false), ("both", true)] {
        let mut layout = Layout { bytes: sound.bytes.clone(), cluster: sound.cluster };
        if shared != "a table" {
            let (first, last) = (layout.l2()[0], layout.l2()[9]);
            layout.put(last, layout.u64(first));
        }
        if shared != "data" {
            let (first, second) = (layout.l1()[0], layout.l1()[1]);
            layout.put(second, layout.u64(first));
        }
        if lost {
            layout.put(48, 0);
        }
        std::fs::write(&path, &layout.bytes).unwrap();
        let mut disk = read_by_qemu(&path).unwrap();
        let what = format!("{shared}, refcounts lost: {lost}");
        let found = check(&path, Repair::None);
        let is_crowded = |finding: &Finding| matches!(finding, Finding::CountOverflow { .. });
        assert!(found.findings.iter().any(is_crowded), "{what}: {found:#?}");
        let report = check(&path, Repair::All);
        assert!(report.is_clean(), "{what}: {report:#?}");
        assert_eq!(qemu_check(&path, None).0, 0, "{what}");
        assert!(disk == read_by_qemu(&path).unwrap(), "{what}: it reads as before");
        // What is written to one of them is seen there alone.
        qemu_io(&path, &["write -P 99 0 4k"]);
        disk[..4096].fill(99);
        assert!(disk == read_by_qemu(&path).unwrap(), "{what}, written");
    }
}

#[test]
fn snapshots_that_cannot_be_read_are_removed_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), "snapshots");
    let (sound, disk) = (Layout::of(&path), read_by_qemu(&path).unwrap());
    let first = sound.u64(64);
    let texts = u64::from(sound.u32(first + 12) >> 16) + u64::from(sound.u32(first + 12) & 0xffff);
    let second = (first + 40 + u64::from(sound.u32(first + 36)) + texts).next_multiple_of(8);
    // The place of its L1 table, and the length of its extra data with what stands before it.
    let behind = sound.bytes.len() as u64 * 4;
    for (at, value) in [(second, behind), (second, 512), (second + 32, u64::from(u32::MAX))] {
        let mut layout = Layout { bytes: sound.bytes.clone(), cluster: sound.cluster };
        layout.put(at, value);
        std::fs::write(&path, &layout.bytes).unwrap();
        let report = check(&path, Repair::All);
        assert!(report.is_clean(), "{report:#?}");
        let named = report.repaired.iter().any(|finding| match finding {
            Finding::SnapshotLost { snapshot, name, .. } => *snapshot == 1 && name == "two",
            Finding::SnapshotsLost { snapshot, count } => (*snapshot, *count) == (1, 1),
            _ => false,
        });
        assert!(named, "{report:#?}");
        assert_eq!(qemu_check(&path, None).0, 0);
        let left = qemu_img(&["snapshot", "-l", path.to_str().unwrap()]);
        assert!(left.contains("one") && !left.contains("two"), "{left}");
        assert!(read_by_qemu(&path).unwrap() == disk);
    }
}
