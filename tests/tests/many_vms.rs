//! Several machines at once: one hub, one repository, every disk right.

use anyhow::Result;
use tests::{Disk, Hub, HubOptions, Vm, assert_clean, assert_same, digest, layer};

const MIB: u64 = 1 << 20;

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
        for (id, pair) in ids.iter().zip(&mut disks) {
            let backup = hub.ended(id)?;
            assert_eq!(backup["status"], "completed", "{backup:#}");
            for (number, disk) in pair.iter_mut().enumerate() {
                let layer = layer(&backup, number)?;
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
