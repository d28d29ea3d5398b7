//! SIGKILL of the agent, of the hub and of both, early, half way and late. Whatever dies, no half layer becomes a
//! parent, the job ends as failed with its reason, and the next backup completes and restores.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;
use tests::{
    Disk, Hub, HubOptions, Nbdkit, Running, Vm, assert_clean, assert_same, digest, layer, program,
};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 128 * MIB;

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Victim {
    Agent,
    Hub,
    Both,
}

/// A hub with one external machine whose source is slow enough to be caught at any point of a backup.
struct Scene {
    folder: tempfile::TempDir,
    hub: Option<Hub>,
    disk: Disk,
    slow: Option<Nbdkit>,
}

impl Scene {
    fn set() -> Result<Self> {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        std::fs::create_dir(folder.path().join("repository"))?;
        let mut disk = Disk::create(&folder.path().join("disk.raw"), DISK_BYTES)?;
        disk.write(0, DISK_BYTES)?;
        let mut scene = Self { folder, hub: None, disk, slow: None };
        let source = scene.serve_source()?;
        scene.start_hub()?;
        scene.hub()?.add_repository("main", &scene.repository())?;
        let disks = vec![(source, DISK_BYTES)];
        scene.hub()?.add_vm(&Vm { name: "victim", agent: "external", disks })?;
        Ok(scene)
    }

    /// Serves the disk at a bounded rate, anew for each agent: nbdkit itself may die of a client that was killed.
    fn serve_source(&mut self) -> Result<String> {
        self.slow = None;
        let socket = self.folder.path().join("source");
        if socket.exists() {
            std::fs::remove_file(&socket)?;
        }
        let raw = self.disk.path().to_str().context("a path in UTF-8")?;
        let arguments = ["--filter=rate", "file", raw, "rate=512M", "burstiness=0.1"];
        let slow = Nbdkit::start(&socket, &arguments)?;
        let source = slow.source();
        self.slow = Some(slow);
        Ok(source)
    }

    fn start_hub(&mut self) -> Result<()> {
        let arguments = vec!["--agent-timeout".to_owned(), "3".to_owned()];
        let options = HubOptions { arguments, ..HubOptions::default() };
        self.hub = Some(Hub::start(&self.folder.path().join("hub"), &options)?);
        Ok(())
    }

    fn hub(&self) -> Result<&Hub> {
        self.hub.as_ref().context("the hub runs")
    }

    fn repository(&self) -> PathBuf {
        self.folder.path().join("repository")
    }

    fn start_agent(&mut self, job: &str) -> Result<Running> {
        self.serve_source()?;
        let hub = self.hub()?;
        let mut command = Command::new(program("sendense-agent"));
        command.args(["migrate", "--progress", "json", "--job-id", job, "--hub", hub.url()]);
        command.arg("--token-file").arg(hub.token_file());
        command.arg("--state").arg(self.folder.path().join("agent"));
        Running::start(command.stdout(Stdio::piped()))
    }

    /// Starts a backup, kills at `percent`, and answers what the hub says of the job afterwards.
    fn killed(&mut self, kind: &str, victim: Victim, percent: u64) -> Result<Value> {
        let job = self.hub()?.start_backup("victim", "main", kind)?;
        let mut agent = self.start_agent(&job)?;
        wait_for_progress(&mut agent, percent)?;
        if matches!(victim, Victim::Agent | Victim::Both) {
            agent.kill()?;
        }
        if matches!(victim, Victim::Hub | Victim::Both) {
            self.hub.take().context("the hub runs")?.kill()?;
            self.start_hub()?;
        }
        self.hub()?.ended(&job)
    }

    /// A backup that must complete, with the agent that it needs.
    fn completes(&mut self, kind: &str) -> Result<Value> {
        let job = self.hub()?.start_backup("victim", "main", kind)?;
        let mut agent = self.start_agent(&job)?;
        let backup = self.hub()?.ended(&job)?;
        anyhow::ensure!(backup["status"] == "completed", "{backup:#}");
        anyhow::ensure!(matches!(agent.wait()?, 0 | 3), "the agent failed");
        Ok(backup)
    }

    /// The point equals the disk, by qemu-img and by a restore.
    fn equals_the_disk(&self, backup: &Value) -> Result<()> {
        let layer = layer(backup, 0)?;
        assert_clean(&layer)?;
        assert_same(self.disk.path(), &layer)?;
        let target = self.folder.path().join("restored.raw");
        self.hub()?.restore(backup["backup_id"].as_str().context("an id")?, 0, &target)?;
        anyhow::ensure!(digest(&target)? == self.disk.digest()?, "restored to something else");
        Ok(std::fs::remove_file(target)?)
    }

    /// Every image in the repository belongs to a completed backup, and nothing is still exported.
    fn holds_completed_layers_only(&self) -> Result<()> {
        let backups = self.hub()?.ok("GET", "/backups?vm_name=victim", None)?;
        let mut known = BTreeSet::new();
        for backup in backups["backups"].as_array().context("a list")? {
            let id = backup["backup_id"].as_str().context("an id")?;
            if backup["status"] == "completed" {
                known.insert(layer(&self.hub()?.backup(id)?, 0)?);
            }
        }
        let mut found = BTreeSet::new();
        images(&self.repository(), &mut found)?;
        anyhow::ensure!(found == known, "images {found:?}, completed {known:?}");
        Ok(())
    }
}

/// Reads the agent's own events until it has done so much of its disk; the hub hears of that later.
fn wait_for_progress(agent: &mut Running, percent: u64) -> Result<()> {
    for line in BufReader::new(agent.stdout().context("a piped output")?).lines() {
        let event: Value = serde_json::from_str(&line?)?;
        let figure = |name: &str| event[name].as_u64().unwrap_or(0);
        if figure("bytes_total") > 0
            && figure("bytes_done") * 100 >= figure("bytes_total") * percent
        {
            return Ok(());
        }
    }
    anyhow::bail!("the agent ended before {percent} %")
}

fn images(folder: &Path, found: &mut BTreeSet<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            images(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "qcow2") {
            found.insert(path);
        }
    }
    Ok(())
}

fn survives_the_death_of(victim: Victim) -> Result<()> {
    let mut scene = Scene::set()?;
    for percent in [10, 50, 90] {
        let killed = scene.killed("full", victim, percent)?;
        assert_eq!(killed["status"], "failed", "{victim:?} at {percent} %: {killed:#}");
        let reason = killed["error_message"].as_str().unwrap_or_default();
        let culprit = if victim == Victim::Agent { "agent" } else { "hub" };
        assert!(reason.contains(culprit), "{victim:?} at {percent} %: {reason}");
        scene.holds_completed_layers_only()?;
    }
    let full = scene.completes("full")?;
    scene.equals_the_disk(&full)?;

    for percent in [10, 50, 90] {
        scene.disk.write(percent * MIB, 32 * MIB)?;
        let killed = scene.killed("incremental", victim, percent)?;
        assert_eq!(killed["status"], "failed", "{victim:?} at {percent} %: {killed:#}");
        scene.holds_completed_layers_only()?;
    }
    let incremental = scene.completes("incremental")?;
    scene.equals_the_disk(&incremental)?;
    scene.holds_completed_layers_only()
}

#[test]
fn a_killed_agent_fails_its_job_and_nothing_else() -> Result<()> {
    survives_the_death_of(Victim::Agent)
}

#[test]
fn a_killed_hub_fails_its_jobs_when_it_returns() -> Result<()> {
    survives_the_death_of(Victim::Hub)
}

#[test]
fn hub_and_agent_killed_together_leave_no_half_layer() -> Result<()> {
    survives_the_death_of(Victim::Both)
}

#[test]
fn a_second_agent_is_turned_away_from_a_job() -> Result<()> {
    let mut scene = Scene::set()?;
    let job = scene.hub()?.start_backup("victim", "main", "full")?;
    let mut first = scene.start_agent(&job)?;
    wait_for_progress(&mut first, 10)?;
    let hub = scene.hub()?;
    let second = Command::new(program("sendense-agent"))
        .args(["migrate", "--progress", "none", "--job-id", &job, "--hub", hub.url()])
        .arg("--token-file")
        .arg(hub.token_file())
        .arg("--state")
        .arg(scene.folder.path().join("another"))
        .output()?;
    let words = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(1), "{words}");
    assert!(words.contains("another agent"), "{words}");
    let backup = hub.ended(&job)?;
    assert_eq!(backup["status"], "completed", "{backup:#}");
    scene.equals_the_disk(&backup)
}
