//! Loads, made by fio: over NBD, or straight on a file for the limit of the disk. Knows nothing of servers.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::case::{Case, Direction, Pattern};

/// Concurrent fio jobs; each moves its own half of the disk over its own connection.
const JOBS: u32 = 2;

/// What is to be moved, and where the files of the measurement may lie.
#[derive(Clone, Copy)]
pub(crate) struct Load<'a> {
    pub(crate) case: Case,
    /// The size of the disk.
    pub(crate) mib: u64,
    pub(crate) folder: &'a Path,
}

impl Load<'_> {
    /// Runs the load over NBD; answers bytes per second, the final flush included.
    pub(crate) fn over_nbd(&self, uri: &str) -> Result<f64> {
        self.run(&["--ioengine=nbd".into(), format!("--uri={uri}")])
    }

    /// Runs the load on a preallocated file with `O_DIRECT` through io_uring.
    pub(crate) fn on_file(&self, path: &Path) -> Result<f64> {
        let engine = ["--ioengine=io_uring", "--direct=1", "--allow_file_create=0"];
        let mut arguments: Vec<String> = engine.map(String::from).to_vec();
        arguments.push(format!("--filename={}", path.display()));
        self.run(&arguments)
    }

    fn run(&self, engine: &[String]) -> Result<f64> {
        let (direction, key) = match (self.case.pattern, self.case.direction) {
            (Pattern::Sequential, Direction::Write) => ("write", "write"),
            (Pattern::Sequential, Direction::Read) => ("read", "read"),
            (Pattern::Random, Direction::Write) => ("randwrite", "write"),
            (Pattern::Random, Direction::Read) => ("randread", "read"),
        };
        let depth = match self.case.pattern {
            Pattern::Sequential => 16,
            Pattern::Random => 32,
        };
        let jobs = u64::from(JOBS);
        let (share, moves) = (self.mib / jobs, self.case.moved_mib(self.mib) / jobs);
        let output = Command::new("fio")
            .args(["--name=load", "--group_reporting", "--thread", "--output-format=json"])
            // The same places each time, so that contenders differ in nothing else.
            .args(["--end_fsync=1", "--randseed=7", "--allrandrepeat=1"])
            .arg(format!("--bs={}", self.case.request_bytes()))
            .arg(format!("--rw={direction}"))
            .arg(format!("--numjobs={JOBS}"))
            .arg(format!("--iodepth={depth}"))
            .arg(format!("--size={share}M"))
            .arg(format!("--io_size={moves}M"))
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
        anyhow::ensure!(moved == (moves * jobs) << 20, "fio moved {moved} bytes only");
        job[key]["bw_bytes"].as_f64().context("fio reports no bandwidth")
    }
}
