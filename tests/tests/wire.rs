//! The agent and the NBD server as programs of their own, without a hub: what crosses the wire, counted by a proxy
//! between them, for changes much smaller than a block.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;
use tests::{BLOCK, CountingProxy, Disk, Running, assert_clean, assert_same, program, qemu_img};

const MIB: u64 = 1 << 20;

/// What an incremental may send beyond the blocks that changed, in per cent.
const OVERHEAD_PERCENT: u64 = 1;

/// Starts `nbd-server` for the images in `folder`; answers where it listens.
fn serve(folder: &Path, names: &[&str]) -> Result<(Running, SocketAddr)> {
    let mut command = Command::new(program("nbd-server"));
    command.args(["--listen", "127.0.0.1:0"]).stdout(Stdio::piped());
    for name in names {
        let image = folder.join(format!("{name}.qcow2"));
        command.arg("--export").arg(format!("{name}={}", image.display()));
    }
    let mut server = Running::start(&mut command)?;
    let line = BufReader::new(server.stdout().context("a piped output")?).lines().next();
    let line = line.context("the server ended before it listened")??;
    let address = line.rsplit(' ').next().context("an address")?;
    Ok((server, address.parse().with_context(|| line.clone())?))
}

/// Runs the agent once; answers what it reports of its only disk.
fn migrate(folder: &Path, disk: &Disk, port: u16, export: &str, more: &[&str]) -> Result<Value> {
    let report = folder.join("report.json");
    let status = Command::new(program("sendense-agent"))
        .args(["migrate", "--progress", "none", "--job-id", export, "--export", export])
        .args(["--nbd-host", "127.0.0.1", "--nbd-port", &port.to_string()])
        .args(["--source", &disk.source()])
        .arg("--state")
        .arg(folder.join("state"))
        .arg("--report")
        .arg(&report)
        .args(more)
        .status()?;
    anyhow::ensure!(status.success(), "the agent ended with {status}");
    let report: Value = serde_json::from_slice(&std::fs::read(report)?)?;
    Ok(report["disks"][0].clone())
}

#[test]
fn small_scattered_changes_send_their_blocks_and_hardly_more() -> Result<()> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let folder = folder.path();
    let mut disk = Disk::create(&folder.join("disk.raw"), 2048 * MIB)?;
    disk.scatter(64 * MIB, MIB)?;
    let image = |name: &str| folder.join(format!("{name}.qcow2"));
    let path = |name: &str| image(name).display().to_string();
    qemu_img(&["create", "-q", "-f", "qcow2", &path("full"), "2G"])?;

    let (server, address) = serve(folder, &["full"])?;
    let proxy = CountingProxy::start(address)?;
    let full = migrate(folder, &disk, proxy.port(), "full", &["--full"])?;
    assert_eq!(server.stop()?, 0);
    assert!(proxy.take_to_server() > 64 * MIB);
    assert_same(disk.path(), &image("full"))?;

    let mut touched = BTreeSet::new();
    for round in 0..128 {
        // Odd places and sizes, some across the edge of a block.
        let offset = (round * 15_731_743 + 60_000) % (disk.size_bytes() - BLOCK);
        disk.write(offset, 4096 + round)?;
        touched.extend(offset / BLOCK..=(offset + 4095 + round) / BLOCK);
    }
    let backing = ["-b", "full.qcow2", "-F", "qcow2"];
    qemu_img(&[&["create", "-q", "-f", "qcow2"], &backing[..], &[&path("incr"), "2G"]].concat())?;
    let (server, address) = serve(folder, &["incr"])?;
    let proxy = CountingProxy::start(address)?;
    let previous = full["change_id"].as_str().context("a change id")?;
    let more = ["--previous-change-id", previous];
    let report = migrate(folder, &disk, proxy.port(), "incr", &more)?;
    assert_eq!(server.stop()?, 0);

    let (wire, changed) = (proxy.take_to_server(), touched.len() as u64 * BLOCK);
    assert!(wire >= changed, "{wire} bytes cannot carry {changed} changed ones");
    assert!(
        wire <= changed + changed * OVERHEAD_PERCENT / 100,
        "{wire} sent for {changed} changed"
    );
    assert_eq!(report["wire_bytes"], wire, "the agent's own count");
    assert_clean(&image("incr"))?;
    assert_same(disk.path(), &image("incr"))
}
