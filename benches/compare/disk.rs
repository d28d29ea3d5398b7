//! The images that are served, made by qemu-img, so that nobody has an advantage by their layout, and judged by it
//! afterwards.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::fio::Load;

/// An image without data.
pub(crate) fn empty(load: &Load<'_>) -> Result<PathBuf> {
    let path = load.folder.join("disk");
    create(&path, None, load.mib)?;
    Ok(path)
}

/// The top of a chain in which each layer holds its stripe of the disk.
pub(crate) fn chain(load: &Load<'_>) -> Result<PathBuf> {
    let stripe = (load.mib << 20) / u64::from(load.case.layers);
    let mut below: Option<PathBuf> = None;
    for layer in 0..load.case.layers {
        let path = load.folder.join(format!("layer-{layer}"));
        create(&path, below.as_deref(), load.mib)?;
        let at = u64::from(layer) * stripe;
        let write = format!("write -q -P {} {at} {stripe}", layer % 255 + 1);
        run(Command::new("qemu-io").args(["-f", "qcow2", "-n", "-c", &write]).arg(&path))?;
        below = Some(path);
    }
    below.context("a chain without layers")
}

/// A server that is fast because it writes a broken image does not count.
pub(crate) fn check(path: &Path) -> Result<()> {
    run(Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(path))
}

fn create(path: &Path, below: Option<&Path>, mib: u64) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]);
    if let Some(below) = below {
        command.args(["-F", "qcow2", "-b"]).arg(below);
    }
    run(command.arg(path).arg(format!("{mib}M")))
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("{command:?} does not start"))?;
    ensure!(status.success(), "{command:?} ended with {status}");
    Ok(())
}
