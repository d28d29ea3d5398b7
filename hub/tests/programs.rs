//! The two programs as processes: start, commands, exit codes, stop. What they do inside is tested elsewhere.

use std::io::{BufRead, BufReader};
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
    assert!(text(&again.stderr).contains("overwrite"), "{again:?}");

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
    assert_eq!(hub.ctl(&["backup", "start", "--vm", "a", "--type", "half"]).status.code(), Some(2));

    let stranger = Command::new(env!("CARGO_BIN_EXE_sendense-ctl"))
        .args(["--hub", &hub.url, "vm", "list"])
        .env_remove("SENDENSE_TOKEN_FILE")
        .env("SENDENSE_TOKEN", "wrong")
        .output()
        .unwrap();
    assert_eq!(stranger.status.code(), Some(1));
    assert!(text(&stranger.stderr).contains("--token-file"), "{stranger:?}");
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
fn a_hub_stopped_with_a_job_in_work_exits_0_and_tells_the_reason_afterwards() {
    let (dir, hub) = fixture();
    let disk = "file:/elsewhere,size=1048576";
    hub.json(&["vm", "add", "far", "--agent", "external", "--disk", disk]);
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
