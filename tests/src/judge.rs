//! Outside judges: qemu-img on what we wrote.

use std::path::Path;

use anyhow::{Context, Result};

use crate::run;

/// Runs `qemu-img` to its end.
///
/// # Errors
/// Where it fails.
pub fn qemu_img(arguments: &[&str]) -> Result<String> {
    run("qemu-img", arguments)
}

/// Checks that `qemu-img check` finds neither errors nor leaks.
///
/// # Errors
/// Where it finds some.
pub fn assert_clean(image: &Path) -> Result<()> {
    let image = image.to_str().context("a path in UTF-8")?;
    qemu_img(&["check", "-q", "-f", "qcow2", image]).map(drop)
}

/// Checks that a qcow2 point and a raw disk hold the same bytes, and as many, by `qemu-img`.
///
/// # Errors
/// Where they differ.
pub fn assert_same(raw: &Path, point: &Path) -> Result<()> {
    let len = std::fs::metadata(raw)?.len();
    let raw = raw.to_str().context("a path in UTF-8")?;
    let point = point.to_str().context("a path in UTF-8")?;
    let info = qemu_img(&["info", "-f", "qcow2", "--output=json", point])?;
    let info: serde_json::Value = serde_json::from_str(&info)?;
    anyhow::ensure!(info["virtual-size"] == len, "{point} is not {len} bytes long: {info}");
    qemu_img(&["compare", "-q", "-f", "raw", "-F", "qcow2", raw, point]).map(drop)
}
