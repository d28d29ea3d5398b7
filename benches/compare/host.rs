//! What the machine tells: processor time and memory of a process, its own description, its caches. Linux only.

use std::path::Path;

use anyhow::{Context, Result};

/// What a process has used so far.
pub(crate) struct Usage {
    /// User and system time of all its threads.
    pub(crate) cpu_secs: f64,
    /// The most memory it ever had resident.
    pub(crate) peak_mib: f64,
}

impl Usage {
    /// Reads `/proc/PID/stat` and `/proc/PID/status`.
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let (_, rest) = stat.rsplit_once(") ").context("an odd /proc/PID/stat")?;
        // Behind the name come state and ten more fields, then utime and stime, in ticks.
        let ticks: f64 = rest
            .split_whitespace()
            .skip(11)
            .take(2)
            .map(|field| field.parse::<f64>().unwrap_or(0.0))
            .sum();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let peak_kib: f64 = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .and_then(|value| value.trim().strip_suffix(" kB"))
            .and_then(|value| value.parse().ok())
            .context("no VmHWM in /proc/PID/status")?;
        #[expect(clippy::cast_precision_loss, reason = "a hundred or a thousand")]
        let ticks_per_sec = rustix::param::clock_ticks_per_second() as f64;
        Ok(Self { cpu_secs: ticks / ticks_per_sec, peak_mib: peak_kib / 1024.0 })
    }
}

/// Writes everything back and forgets what is cached, where the user may.
pub(crate) fn drop_caches() -> Result<()> {
    rustix::fs::sync();
    if std::fs::write("/proc/sys/vm/drop_caches", "3").is_err() {
        eprintln!("caches stay warm: only root may drop them");
    }
    Ok(())
}

/// Sends SIGTERM.
pub(crate) fn terminate(pid: u32) -> Result<()> {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    let pid = pid.context("an odd process number")?;
    Ok(rustix::process::kill_process(pid, rustix::process::Signal::TERM)?)
}

/// Cores, memory, kernel and load of this machine, in a line.
pub(crate) fn describe() -> Result<String> {
    let cores = std::thread::available_parallelism()?;
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let load = std::fs::read_to_string("/proc/loadavg")?;
    let load: Vec<&str> = load.split_whitespace().take(3).collect();
    Ok(format!("{cores} cores, Linux {}, load before the run {}", release.trim(), load.join(" ")))
}

/// The type of the file system that holds `path`.
pub(crate) fn file_system(path: &Path) -> Result<String> {
    const EXT4: i64 = 0xef53;
    const XFS: i64 = 0x5846_5342;
    const TMPFS: i64 = 0x0102_1994;
    const BTRFS: i64 = 0x9123_683e;
    Ok(match rustix::fs::statfs(path)?.f_type {
        EXT4 => "ext4".into(),
        XFS => "xfs".into(),
        TMPFS => "tmpfs".into(),
        BTRFS => "btrfs".into(),
        other => format!("file system {other:#x}"),
    })
}
