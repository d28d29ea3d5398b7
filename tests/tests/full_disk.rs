//! A repository without room: its job fails with that text, another repository's goes on, and what was backed up
//! before stays whole.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tests::{Disk, Hub, HubOptions, Vm, assert_clean, assert_same, digest, layer};

const MIB: u64 = 1 << 20;

#[test]
fn a_full_repository_fails_its_own_job_only() -> Result<()> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let (tiny, roomy) = (folder.path().join("tiny"), folder.path().join("roomy"));
    std::fs::create_dir(&tiny)?;
    std::fs::create_dir(&roomy)?;
    let mount = format!("mount -t tmpfs -o size=64m tmpfs '{}'", tiny.display());
    let options = HubOptions { mounts: Some(mount), ..HubOptions::default() };
    let hub = Hub::start(&folder.path().join("hub"), &options)?;
    hub.add_repository("tiny", &tiny)?;
    hub.add_repository("roomy", &roomy)?;
    // The small file system is mounted for the hub alone; the judges see it through the hub's eyes.
    let root = PathBuf::from(format!("/proc/{}/root", hub.pid()));
    let seen = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));

    let mut small = Disk::create(&folder.path().join("small.raw"), 64 * MIB)?;
    small.scatter(16 * MIB, MIB)?;
    let mut large = Disk::create(&folder.path().join("large.raw"), 512 * MIB)?;
    large.write(0, 400 * MIB)?;
    for (name, disk) in [("small", &small), ("large", &large), ("other", &large)] {
        let disks = vec![(disk.source(), disk.size_bytes())];
        hub.add_vm(&Vm { name, agent: "local", disks })?;
    }

    let before = hub.back_up("small", "tiny", "full")?;
    let earlier = small.digest()?;
    let failing = hub.start_backup("large", "tiny", "full")?;
    let other = hub.start_backup("other", "roomy", "full")?;

    let failed = hub.ended(&failing)?;
    assert_eq!(failed["status"], "failed", "{failed:#}");
    let reason = failed["error_message"].as_str().context("a reason")?.to_lowercase();
    assert!(reason.contains("no space left"), "{reason}");
    let other = hub.ended(&other)?;
    assert_eq!(other["status"], "completed", "{other:#}");
    assert_same(large.path(), &layer(&other, 0)?)?;

    let point = seen(&layer(&before, 0)?);
    assert_clean(&point)?;
    assert_same(small.path(), &point)?;
    let leftovers = std::fs::read_dir(seen(&tiny))?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("ctx-large"))
        .count();
    assert_eq!(leftovers, 0, "the failed job left its folder");

    // There is room again: the same repository goes on with an incremental of the earlier point.
    small.scatter(4 * MIB, 64 << 10)?;
    let next = hub.back_up("small", "tiny", "incremental")?;
    let target = folder.path().join("restored.raw");
    for (backup, expected) in [(&before, earlier), (&next, small.digest()?)] {
        hub.restore(backup["backup_id"].as_str().context("an id")?, 0, &target)?;
        assert_eq!(digest(&target)?, expected);
        std::fs::remove_file(&target)?;
    }
    assert_eq!(hub.stop()?, 0);
    Ok(())
}
