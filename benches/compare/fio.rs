//! Loads, made by fio: over NBD, or straight on a file for the limit of the disk. Knows nothing of servers.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::case::Case;

/// Concurrent fio jobs; each moves its own half of the disk over its own connection.
const JOBS: u32 = 2;
/// Requests of 1 MiB in flight in each job.
const DEPTH: u32 = 16;

/// What is to be moved, and where the files of the measurement may lie.
#[derive(Clone, Copy)]
pub(crate) struct Load<'a> {
    pub(crate) case: Case,
    pub(crate) mib: u64,
    pub(crate) folder: &'a Path,
}

impl Load<'_> {
    /// Runs the load over NBD on a Unix socket; answers bytes per second, the final flush included.
    pub(crate) fn over_nbd(&self, case: Case, socket: &Path, export: &str) -> Result<f64> {
        let uri = format!("nbd+unix:///{export}?socket={}", socket.display());
        self.run(case, &["--ioengine=nbd".into(), format!("--uri={uri}")])
    }

    /// Runs the load on a preallocated file with `O_DIRECT` through io_uring.
    pub(crate) fn on_file(&self, path: &Path) -> Result<f64> {
        let engine = ["--ioengine=io_uring", "--direct=1", "--allow_file_create=0"];
        let mut arguments: Vec<String> = engine.map(String::from).to_vec();
        arguments.push(format!("--filename={}", path.display()));
        self.run(self.case, &arguments)
    }

    fn run(&self, case: Case, engine: &[String]) -> Result<f64> {
        let (direction, key) = match case {
            Case::SeqWrite => ("write", "write"),
            Case::SeqRead => ("read", "read"),
        };
        let share = self.mib / u64::from(JOBS);
        let output = Command::new("fio")
            .args(["--name=load", "--group_reporting", "--thread", "--output-format=json"])
            .args(["--bs=1M", "--end_fsync=1"])
            .arg(format!("--rw={direction}"))
            .arg(format!("--numjobs={JOBS}"))
            .arg(format!("--iodepth={DEPTH}"))
            .arg(format!("--size={share}M"))
            .arg(format!("--offset_increment={share}M"))
            .args(engine)
            .output()
            .context("fio does not start")?;
        if !output.status.success() {
            bail!("fio failed: {}", String::from_utf8_lossy(&output.stderr));
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let json_start = text.find('{').context("fio printed no JSON")?;
        let report: serde_json::Value = serde_json::from_str(&text[json_start..])?;
        let job = &report["jobs"][0];
        anyhow::ensure!(job["error"] == 0, "fio reports error {}", job["error"]);
        let moved = job[key]["io_bytes"].as_u64().unwrap_or(0);
        anyhow::ensure!(moved == (share * u64::from(JOBS)) << 20, "fio moved {moved} bytes only");
        job[key]["bw_bytes"].as_f64().context("fio reports no bandwidth")
    }
}
