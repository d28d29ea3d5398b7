//! Several machines at once: one hub, one repository, every disk right.

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde_json::Value;
use tests::{Disk, Hub, HubOptions, Vm, assert_clean, assert_same, digest, layer};

const MIB: u64 = 1 << 20;

/// Whether every job had begun before any of them was over.
fn overlapped(backups: &[Value]) -> Result<bool> {
    let times = |name: &str| -> Result<Vec<Timestamp>> {
        let time = |backup: &Value| Ok(backup[name].as_str().context("a time")?.parse()?);
        backups.iter().map(time).collect()
    };
    Ok(times("started_at")?.iter().max() < times("completed_at")?.iter().min())
}

#[test]
fn six_vms_with_two_disks_each_are_backed_up_at_once() -> Result<()> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let repository = folder.path().join("repository");
    std::fs::create_dir(&repository)?;
    let hub = Hub::start(&folder.path().join("hub"), &HubOptions::default())?;
    hub.add_repository("main", &repository)?;

    let names: Vec<String> = (0..6).map(|n| format!("vm {n}/ä")).collect();
    let mut disks = Vec::new();
    for (index, name) in names.iter().enumerate() {
        let mut pair = Vec::new();
        for number in 0..2 {
            let path = folder.path().join(format!("{index}-{number}.raw"));
            // The second disk's size is no multiple of a block, nor of a cluster.
            let mut disk = Disk::create(&path, 256 * MIB + number * 512)?;
            disk.scatter(48 * MIB, MIB)?;
            pair.push(disk);
        }
        let sources = pair.iter().map(|disk| (disk.source(), disk.size_bytes())).collect();
        hub.add_vm(&Vm { name, agent: "local", disks: sources })?;
        disks.push(pair);
    }

    for kind in ["full", "incremental"] {
        let ids: Vec<String> =
            names.iter().map(|name| hub.start_backup(name, "main", kind)).collect::<Result<_>>()?;
        let backups = ids.iter().map(|id| hub.ended(id)).collect::<Result<Vec<_>>>()?;
        if kind == "full" {
            assert!(overlapped(&backups)?, "the jobs ran one after the other");
        }
        for ((id, backup), pair) in ids.iter().zip(&backups).zip(&mut disks) {
            assert_eq!(backup["status"], "completed", "{backup:#}");
            for (number, disk) in pair.iter_mut().enumerate() {
                let layer = layer(backup, number)?;
                assert_clean(&layer)?;
                assert_same(disk.path(), &layer)?;
                let target = folder.path().join("restored.raw");
                hub.restore(id, number, &target)?;
                assert_eq!(digest(&target)?, disk.digest()?);
                std::fs::remove_file(&target)?;
                disk.scatter(2 * MIB, 128 << 10)?;
            }
        }
    }
    assert_eq!(hub.stop()?, 0);
    Ok(())
}

#[test]
fn the_thread_pool_backs_up_what_io_uring_does() -> Result<()> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let repository = folder.path().join("repository");
    std::fs::create_dir(&repository)?;
    let options = HubOptions { io: Some("blocking"), ..HubOptions::default() };
    let hub = Hub::start(&folder.path().join("hub"), &options)?;
    hub.add_repository("main", &repository)?;
    let mut disk = Disk::create(&folder.path().join("disk.raw"), 256 * MIB)?;
    disk.scatter(48 * MIB, MIB)?;
    let disks = vec![(disk.source(), disk.size_bytes())];
    hub.add_vm(&Vm { name: "pool", agent: "local", disks })?;
    for kind in ["full", "incremental"] {
        let backup = hub.back_up("pool", "main", kind)?;
        assert_clean(&layer(&backup, 0)?)?;
        assert_same(disk.path(), &layer(&backup, 0)?)?;
        disk.scatter(2 * MIB, 4096)?;
    }
    assert_eq!(hub.stop()?, 0);
    Ok(())
}
