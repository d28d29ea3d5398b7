//! Large sparse disks through the whole system: a full, five increments of about 5 %, and every point restored. What
//! crosses the wire is what changed.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;
use tests::{BLOCK, Disk, Hub, HubOptions, Vm, assert_clean, assert_same, digest, layer};

const GIB: u64 = 1 << 30;

/// What one incremental may send beyond the blocks that changed, in per cent.
const OVERHEAD_PERCENT: u64 = 1;

fn figure(backup: &Value, name: &str) -> Result<u64> {
    backup["disks"][0][name].as_u64().with_context(|| format!("no {name} in {backup:#}"))
}

/// Restores a point to a raw file and compares it with the digest that the source had.
fn restores_to(hub: &Hub, backup: &Value, expected: &str, folder: &Path) -> Result<()> {
    let target = folder.join("restored.raw");
    let id = backup["backup_id"].as_str().context("an id")?;
    hub.restore(id, 0, &target)?;
    anyhow::ensure!(digest(&target)? == expected, "{id} restores to something else");
    Ok(std::fs::remove_file(&target)?)
}

fn a_chain_of_six_points(size_bytes: u64, data_bytes: u64) -> Result<()> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let repository = folder.path().join("repository");
    std::fs::create_dir(&repository)?;
    let hub = Hub::start(&folder.path().join("hub"), &HubOptions::default())?;
    hub.add_repository("main", &repository)?;
    let mut disk = Disk::create(&folder.path().join("disk.raw"), size_bytes)?;
    disk.scatter(data_bytes, 4 << 20)?;
    let disks = vec![(disk.source(), size_bytes)];
    hub.add_vm(&Vm { name: "big", agent: "local", disks })?;

    let mut points = Vec::new();
    let full = hub.back_up("big", "main", "full")?;
    points.push((full, disk.digest()?));
    for _ in 0..5 {
        let touched = disk.scatter(data_bytes / 20, 1 << 20)?;
        // A guest frees what it no longer needs, too: the hole must reach the point as zeros.
        let hole = touched.first().context("a change")? * BLOCK + 3 * BLOCK;
        disk.punch(hole, 4 * BLOCK)?;
        let incremental = hub.back_up("big", "main", "incremental")?;
        assert_eq!(incremental["backup_type"], "incremental");
        let changed = touched.len() as u64 * BLOCK;
        let wire = figure(&incremental, "bytes_transferred")?;
        let most = changed + changed * OVERHEAD_PERCENT / 100;
        assert!(wire <= most, "{wire} bytes on the wire for {changed} changed");
        let stored = std::fs::metadata(layer(&incremental, 0)?)?;
        let stored = std::os::unix::fs::MetadataExt::blocks(&stored) * 512;
        assert!(stored <= changed * 12 / 10 + (64 << 20), "{stored} stored for {changed} changed");
        points.push((incremental, disk.digest()?));
    }

    let newest = layer(&points.last().context("a point")?.0, 0)?;
    assert_same(disk.path(), &newest)?;
    for (backup, expected) in &points {
        assert_clean(&layer(backup, 0)?)?;
        restores_to(&hub, backup, expected, folder.path())?;
    }
    assert_eq!(hub.stop()?, 0);
    Ok(())
}

#[test]
fn a_10_gib_sparse_disk_costs_what_it_holds() -> Result<()> {
    a_chain_of_six_points(10 * GIB, 2 * GIB)
}

#[test]
fn a_500_gib_sparse_disk_costs_what_it_holds() -> Result<()> {
    a_chain_of_six_points(500 * GIB, 2 * GIB)
}
