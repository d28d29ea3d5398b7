//! The two programs as processes: start, commands, exit codes, stop. What they do inside is tested elsewhere.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

struct Hub {
    process: Child,
    url: String,
    data: PathBuf,
}

impl Hub {
    fn start(dir: &Path) -> Self {
        let data = dir.join("data");
        let mut process = Command::new(env!("CARGO_BIN_EXE_sendense-hub"))
            .args(["serve", "--listen", "127.0.0.1:0", "--nbd-listen", "127.0.0.1:0", "--data"])
            .arg(&data)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.trim().strip_prefix("listening on ").unwrap().to_owned();
        Self { process, url, data }
    }

    fn ctl(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_sendense-ctl"))
            .args(["--hub", &self.url, "--token-file"])
            .arg(self.data.join("admin.token"))
            .args(arguments)
            .env_remove("SENDENSE_TOKEN")
            .output()
            .unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.ctl(&[arguments, &["--output", "json"]].concat());
        assert!(output.status.success(), "{arguments:?} {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// SIGTERM; the exit code.
    fn stop(mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.process.wait().unwrap().code()
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        // One that has ended already is what is wanted.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn fixture() -> (TempDir, Hub) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("disk.raw"), vec![7; 300_000]).unwrap();
    std::fs::OpenOptions::new()
        .write(true)
        .open(dir.path().join("disk.raw"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    std::fs::create_dir(dir.path().join("repository")).unwrap();
    let hub = Hub::start(dir.path());
    let repository = dir.path().join("repository");
    hub.json(&["repository", "add", "main", repository.to_str().unwrap()]);
    (dir, hub)
}

#[test]
fn the_main_job_by_command_line() {
    let (dir, hub) = fixture();
    let disk = dir.path().join("disk.raw");
    let name = "web / 1 ..";
    hub.json(&["vm", "add", name, "--disk", &format!("file:{}", disk.display())]);
    let full = hub.json(&["backup", "start", "--vm", name, "--type", "full"]);
    assert_eq!(full["status"], "completed");
    let incremental = hub.json(&["backup", "start", "--vm", name, "--type", "incremental"]);
    let id = incremental["backup_id"].as_str().unwrap();
    assert_eq!(
        incremental["disks"][0]["bytes_transferred"].as_u64().map(|sent| sent < 65536),
        Some(true)
    );

    let chain = hub.ctl(&["backup", "chain", "--vm", name]);
    assert!(chain.status.success());
    let chain = text(&chain.stdout);
    assert!(chain.contains(id) && chain.contains("2 backups of web / 1 .."), "{chain}");
    let list = hub.json(&["backup", "list", "--vm", name]);
    assert_eq!(list["backups"][0]["backup_id"], id);

    let target = dir.path().join("restored.raw");
    let words = [
        "backup",
        "restore",
        "--backup-id",
        id,
        "--disk",
        "0",
        "--target",
        target.to_str().unwrap(),
    ];
    let restored = hub.json(&words);
    assert_eq!(restored["status"], "completed");
    assert!(std::fs::read(&target).unwrap() == std::fs::read(&disk).unwrap());
    let again = hub.ctl(&words);
    assert_eq!(again.status.code(), Some(1));
    assert!(text(&again.stderr).contains("add --overwrite to replace it"), "{again:?}");
    let mode = std::fs::metadata(&target).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "what a disk holds is for its owner only");

    assert_eq!(
        hub.ctl(&["backup", "delete", full["backup_id"].as_str().unwrap()]).status.code(),
        Some(1)
    );
    assert_eq!(hub.ctl(&["backup", "delete", id]).status.code(), Some(0));
    assert_eq!(hub.stop(), Some(0));
}

#[test]
fn failures_exit_1_and_wrong_usage_exits_2_with_words_that_help() {
    let (dir, hub) = fixture();
    hub.json(&["vm", "add", "web", "--disk", "file:/does/not/exist"]);
    let failed = hub.ctl(&["backup", "start", "--vm", "web", "--type", "full"]);
    assert_eq!(failed.status.code(), Some(1));
    assert!(text(&failed.stderr).contains("No such file"), "{failed:?}");
    let unknown = hub.ctl(&["backup", "show", "nothing"]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(text(&unknown.stderr).contains("there is no backup"), "{unknown:?}");
    assert_eq!(hub.ctl(&["backup", "start"]).status.code(), Some(2));
    for kind in ["half", "differential"] {
        let refused = hub.ctl(&["backup", "start", "--vm", "a", "--type", kind]);
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    }
    let told = text(&failed.stderr);
    assert_eq!(told.matches("No such file").count(), 1, "{told}");
    assert!(!text(&failed.stdout).contains("No such file"), "{failed:?}");

    let stranger = Command::new(env!("CARGO_BIN_EXE_sendense-ctl"))
        .args(["--hub", &hub.url, "vm", "list"])
        .env_remove("SENDENSE_TOKEN_FILE")
        .env("SENDENSE_TOKEN", "wrong")
        .output()
        .unwrap();
    assert_eq!(stranger.status.code(), Some(1));
    let told = text(&stranger.stderr);
    assert!(
        told.contains("this token is not the hub's") && told.contains("--token-file"),
        "{told}"
    );
    let url = hub.url.clone();
    assert_eq!(hub.stop(), Some(0));
    let nobody = Command::new(env!("CARGO_BIN_EXE_sendense-ctl"))
        .args(["--hub", &url, "vm", "list"])
        .output()
        .unwrap();
    assert_eq!(nobody.status.code(), Some(1));
    assert!(text(&nobody.stderr).contains("does not answer"), "{nobody:?}");
    drop(dir);
}

#[test]
fn an_incremental_that_falls_back_to_a_full_ends_with_3_only_where_there_was_a_chain() {
    let (dir, hub) = fixture();
    let disk = dir.path().join("disk.raw");
    hub.json(&["vm", "add", "web", "--disk", &format!("file:{}", disk.display())]);
    let first = hub.ctl(&["backup", "start", "--vm", "web"]);
    assert_eq!(first.status.code(), Some(0), "{first:?}");
    let (shown, told) = (text(&first.stdout), text(&first.stderr));
    assert!(shown.contains("full (asked: incremental) backup of web: completed"), "{shown}");
    let id = shown.lines().next().unwrap();
    assert_eq!(told.trim(), id, "the id, and no warning");
    for words in [&["backup", "list"][..], &["backup", "chain", "--vm", "web"]] {
        let shown = text(&hub.ctl(words).stdout);
        assert!(shown.contains("full (asked: incremental)"), "{shown}");
    }

    std::fs::OpenOptions::new().write(true).open(&disk).unwrap().set_len(1 << 19).unwrap();
    let second = hub.ctl(&["backup", "start", "--vm", "web"]);
    assert_eq!(second.status.code(), Some(3), "{second:?}");
    let told = text(&second.stderr);
    assert!(told.contains("warning: disk 0") && told.contains("shrank"), "{told}");

    let agent_dir = hub.data.join("agent");
    let kept = || std::fs::read_dir(&agent_dir).unwrap().count();
    assert_eq!(kept(), 1);
    for line in [text(&second.stdout), shown] {
        let deleted = hub.ctl(&["backup", "delete", line.lines().next().unwrap()]);
        assert_eq!(deleted.status.code(), Some(0), "{deleted:?}");
    }
    assert_eq!(hub.ctl(&["vm", "delete", "web"]).status.code(), Some(0));
    assert_eq!(kept(), 0, "the digests go with the virtual machine");
    assert_eq!(hub.stop(), Some(0));
}

#[test]
fn a_wait_that_is_interrupted_leaves_the_backup_and_says_how_to_stop_it() {
    let (_dir, hub) = fixture();
    let refused = hub.ctl(&["vm", "add", "far", "--agent", "external", "--disk", "file:/x"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused.stderr).contains("blockdev --getsize64"), "{refused:?}");
    hub.json(&["vm", "add", "far", "--agent", "external", "--disk", "file:/x,size=1M"]);
    let mut wait = Command::new(env!("CARGO_BIN_EXE_sendense-ctl"))
        .args(["--hub", &hub.url, "--token-file"])
        .arg(hub.data.join("admin.token"))
        .args(["backup", "start", "--vm", "far"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(wait.stderr.take().unwrap()).lines().map(Result::unwrap);
    let id = lines.next().unwrap();
    let hint = lines.next().unwrap();
    let command = format!("sendense-agent migrate --job-id {id} --hub {} --token-file", hub.url);
    assert!(hint.contains(&command), "{hint}");
    let pid = rustix::process::Pid::from_child(&wait);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let farewell = lines.next().unwrap();
    assert!(farewell.ends_with(&format!("sendense-ctl backup cancel {id}")), "{farewell}");
    assert_eq!(wait.wait().unwrap().code(), Some(130));
    let view = hub.json(&["backup", "show", &id]);
    assert!(["pending", "running"].contains(&view["status"].as_str().unwrap()), "{view}");
    assert_eq!(hub.stop(), Some(0));
}

#[test]
fn odd_sources_and_places_are_told_with_the_way_out() {
    let (dir, hub) = fixture();
    let disk = format!("file:{}", dir.path().join("disk.raw").display());
    let lost = hub.ctl(&["vm", "add", "lost", "--disk", "file:/does/not/exist"]);
    assert_eq!(lost.status.code(), Some(0));
    assert!(text(&lost.stderr).contains("warning: disk 0: /does/not/exist"), "{lost:?}");
    let wrong = hub.ctl(&["vm", "add", "wrong", "--disk", &format!("{disk},size=2M")]);
    assert_eq!(wrong.status.code(), Some(1));
    assert!(text(&wrong.stderr).contains("has 1048576 bytes, not 2097152"), "{wrong:?}");
    assert_eq!(
        hub.ctl(&["vm", "add", "right", "--disk", &format!("{disk},size=1M")]).status.code(),
        Some(0)
    );
    let typo = hub.ctl(&["vm", "add", "typo", "--disk", &format!("{disk},sise=1M")]);
    assert_eq!(typo.status.code(), Some(2));
    assert!(text(&typo.stderr).contains("key=NUMBER and size=BYTES"), "{typo:?}");

    std::fs::write(dir.path().join("half.raw"), vec![1; 1000]).unwrap();
    let half = format!("file:{}", dir.path().join("half.raw").display());
    hub.json(&["vm", "add", "half", "--disk", &half]);
    let half = hub.ctl(&["backup", "start", "--vm", "half"]);
    assert_eq!(half.status.code(), Some(1));
    assert!(text(&half.stderr).contains("truncate -s %512"), "{half:?}");

    let taken = dir.path().join("repository");
    for (words, said) in [
        (["repository", "add", "main", "/does/not/exist"], "the name \"main\" is taken"),
        (["repository", "add", "other", taken.to_str().unwrap()], "is the repository \"main\""),
        (["repository", "add", "other", "/does/not/exist"], "mkdir -p /does/not/exist"),
    ] {
        let refused = hub.ctl(&words);
        assert_eq!(refused.status.code(), Some(1));
        assert!(text(&refused.stderr).contains(said), "{refused:?}");
    }
    assert_eq!(hub.stop(), Some(0));
}

#[test]
fn an_address_in_use_is_told_once() {
    let dir = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let refused = Command::new(env!("CARGO_BIN_EXE_sendense-hub"))
        .args(["serve", "--listen", "127.0.0.1:0", "--nbd-listen", &address, "--data"])
        .arg(dir.path())
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(1));
    let told = text(&refused.stderr);
    assert_eq!(told.matches("Address already in use").count(), 1, "{told}");
}

#[test]
fn a_hub_stopped_with_a_job_in_work_exits_0_and_tells_the_reason_afterwards() {
    let (dir, hub) = fixture();
    let disk = "file:/elsewhere,size=1048576";
    hub.json(&["vm", "add", "far", "--agent", "external", "--disk", disk]);
    let larger = "file:/elsewhere,size=2097152";
    let vm = hub.json(&["vm", "update", "far", "--disk", larger]);
    assert_eq!(vm["disks"][0]["capacity_bytes"], 2_097_152);
    assert_eq!(hub.ctl(&["vm", "update", "near", "--disk", larger]).status.code(), Some(1));
    let started = hub.json(&["backup", "start", "--vm", "far", "--type", "full", "--no-wait"]);
    let id = started["backup_id"].as_str().unwrap().to_owned();
    assert_eq!(hub.stop(), Some(0));
    let hub = Hub::start(dir.path());
    let view = hub.json(&["backup", "show", &id]);
    assert_eq!(
        (&view["status"], &view["error_message"]),
        (&"failed".into(), &"the hub was stopped".into())
    );
    assert_eq!(hub.stop(), Some(0));
}

#[test]
fn a_hub_without_authentication_only_starts_on_loopback() {
    let dir = tempfile::tempdir().unwrap();
    let refused = Command::new(env!("CARGO_BIN_EXE_sendense-hub"))
        .args(["serve", "--listen", "0.0.0.0:0", "--nbd-listen", "off", "--auth", "off", "--data"])
        .arg(dir.path())
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("loopback"), "{refused:?}");
}

/// The files of restores in work.
fn partials(dir: &Path) -> usize {
    let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().ends_with(".partial")).count()
}

#[test]
fn a_hub_killed_during_a_restore_removes_the_half_file_at_its_next_start() {
    let (dir, mut hub) = fixture();
    let disk = dir.path().join("large.raw");
    let mut data = vec![0; 256 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut data);
    std::fs::write(&disk, data).unwrap();
    hub.json(&["vm", "add", "web", "--disk", &format!("file:{}", disk.display())]);
    let full = hub.json(&["backup", "start", "--vm", "web", "--type", "full"]);
    let folder = dir.path().join("restored");
    std::fs::create_dir(&folder).unwrap();
    let target = folder.join("disk.raw");
    let mut restore = Command::new(env!("CARGO_BIN_EXE_sendense-ctl"))
        .args(["--hub", &hub.url, "--token-file"])
        .arg(hub.data.join("admin.token"))
        .args(["backup", "restore", "--backup-id", full["backup_id"].as_str().unwrap()])
        .arg("--target")
        .arg(&target)
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    while partials(&folder) == 0 {
        assert!(!target.exists(), "the restore was too fast to be killed");
        std::thread::yield_now();
    }
    hub.process.kill().unwrap();
    hub.process.wait().unwrap();
    restore.wait().unwrap();
    assert_eq!((partials(&folder), target.exists()), (1, false));
    let hub = Hub::start(dir.path());
    assert_eq!(partials(&folder), 0);
    assert_eq!(hub.stop(), Some(0));
}

/// A pipe that nobody reads any more.
fn closed_pipe() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    Stdio::from(writer)
}

#[test]
fn programs_that_nobody_listens_to_do_what_they_would_have_done() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let process = Command::new(env!("CARGO_BIN_EXE_sendense-hub"))
        .args(["serve", "--listen", "127.0.0.1:0", "--nbd-listen", "127.0.0.1:0", "--data"])
        .arg(&data)
        .stdout(closed_pipe())
        .stderr(closed_pipe())
        .spawn()
        .unwrap();
    let mut hub = Hub { process, url: String::new(), data };
    while !hub.data.join("admin.token").exists() {
        assert_eq!(hub.process.try_wait().unwrap(), None);
        std::thread::yield_now();
    }
    assert_eq!(hub.stop(), Some(0));

    let refused = Command::new(env!("CARGO_BIN_EXE_sendense-ctl"))
        .args(["--hub", "http://127.0.0.1:1", "vm", "list"])
        .stdout(closed_pipe())
        .stderr(closed_pipe())
        .status()
        .unwrap();
    assert_eq!(refused.code(), Some(1));
}
