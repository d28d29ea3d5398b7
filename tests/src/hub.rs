//! A `sendense-hub` process with a data folder and repositories of its own, spoken to over REST and through
//! `sendense-ctl`.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{Running, program, wait_until};

/// How a hub is started.
#[derive(Default)]
pub struct HubOptions {
    /// More arguments for `sendense-hub serve`.
    pub arguments: Vec<String>,
    /// A shell command that runs first, in the mount namespace that the hub then has for itself.
    pub mounts: Option<String>,
    /// What `SENDENSE_IO` says, where not what the machine offers is wanted.
    pub io: Option<&'static str>,
}

/// Where a disk's layer of a backup lies, as the hub sees it.
///
/// # Errors
/// Where the backup names none.
pub fn layer(backup: &Value, disk: usize) -> Result<PathBuf> {
    let path = backup["disks"][disk]["path"].as_str();
    Ok(PathBuf::from(path.with_context(|| format!("no layer of disk {disk} in {backup:#}"))?))
}

/// A virtual machine as the hub is told of it.
pub struct Vm<'a> {
    /// Its name.
    pub name: &'a str,
    /// `local` or `external`.
    pub agent: &'a str,
    /// Each disk's source and size.
    pub disks: Vec<(String, u64)>,
}

/// A running hub.
pub struct Hub {
    process: Running,
    url: String,
    data: PathBuf,
    client: reqwest::Client,
    runtime: tokio::runtime::Runtime,
}

impl Hub {
    /// Starts a hub on ports that the kernel chooses, and waits until it listens.
    ///
    /// # Errors
    /// Where it does not come up.
    pub fn start(data: &Path, options: &HubOptions) -> Result<Self> {
        let hub = program("sendense-hub");
        let mut command = match &options.mounts {
            None => Command::new(hub),
            Some(script) => {
                let mut command = Command::new("unshare");
                command.args(["--mount", "--map-root-user", "--", "sh", "-ec"]);
                command.arg(format!("{script}; exec \"$0\" \"$@\"")).arg(hub);
                command
            }
        };
        command.args(["serve", "--listen", "127.0.0.1:0", "--nbd-listen", "127.0.0.1:0"]);
        command.arg("--data").arg(data).args(&options.arguments);
        if let Some(io) = options.io {
            command.env("SENDENSE_IO", io);
        }
        let mut process = Running::start(command.stdout(Stdio::piped()))?;
        let stdout = process.stdout().context("a piped standard output")?;
        let mut lines = BufReader::new(stdout).lines();
        let url = loop {
            let line = lines.next().context("the hub ended before it listened")??;
            if let Some(at) = line.find("http://") {
                break line[at..].trim().to_owned();
            }
        };
        // Keep the pipe empty, so that the hub never waits for us.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = reqwest::Client::new();
        Ok(Self { process, url, data: data.to_owned(), client, runtime })
    }

    /// Where its REST interface is.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The process number.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The file with the administrator's token.
    pub fn token_file(&self) -> PathBuf {
        self.data.join("admin.token")
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn kill(self) -> Result<()> {
        self.process.kill()
    }

    /// SIGTERM, and wait; answers the exit code.
    ///
    /// # Errors
    /// Where it does not end.
    pub fn stop(self) -> Result<i32> {
        self.process.stop()
    }

    /// One REST call; answers status and body.
    ///
    /// # Errors
    /// Where the hub does not answer.
    pub fn call(&self, method: &str, path: &str, body: Option<Value>) -> Result<(u16, Value)> {
        let token = std::fs::read_to_string(self.token_file())?;
        let url = format!("{}/api/v1{path}", self.url);
        let mut request =
            self.client.request(method.parse()?, url).bearer_auth(token.trim().to_owned());
        if let Some(body) = body {
            request = request.json(&body);
        }
        self.runtime.block_on(async {
            let response = request.send().await?;
            let status = response.status().as_u16();
            let bytes = response.bytes().await?;
            Ok((status, serde_json::from_slice(&bytes).unwrap_or(Value::Null)))
        })
    }

    /// A REST call that must succeed.
    ///
    /// # Errors
    /// Where it does not.
    pub fn ok(&self, method: &str, path: &str, body: Option<Value>) -> Result<Value> {
        let (status, answer) = self.call(method, path, body)?;
        anyhow::ensure!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        Ok(answer)
    }

    /// Tells the hub of a repository.
    ///
    /// # Errors
    /// Where it refuses.
    pub fn add_repository(&self, name: &str, path: &Path) -> Result<()> {
        let body = json!({"name": name, "type": "local", "path": path});
        self.ok("POST", "/repositories", Some(body)).map(drop)
    }

    /// Tells the hub of a virtual machine.
    ///
    /// # Errors
    /// Where it refuses.
    pub fn add_vm(&self, vm: &Vm<'_>) -> Result<()> {
        let disks: Vec<Value> = vm
            .disks
            .iter()
            .map(|(source, size)| json!({"source": source, "capacity_bytes": size}))
            .collect();
        let body = json!({"name": vm.name, "agent": vm.agent, "disks": disks});
        self.ok("POST", "/vms", Some(body)).map(drop)
    }

    /// Starts a backup; answers its id.
    ///
    /// # Errors
    /// Where the hub refuses.
    pub fn start_backup(&self, vm: &str, repository: &str, kind: &str) -> Result<String> {
        let body = json!({"vm_name": vm, "repository_id": repository, "backup_type": kind});
        let answer = self.ok("POST", "/backups", Some(body))?;
        Ok(answer["backup_id"].as_str().context("an id")?.to_owned())
    }

    /// All that the hub says of a backup.
    ///
    /// # Errors
    /// Where it is unknown.
    pub fn backup(&self, id: &str) -> Result<Value> {
        self.ok("GET", &format!("/backups/{id}"), None)
    }

    /// Waits until a backup has ended, however it did.
    ///
    /// # Errors
    /// Where it never does.
    pub fn ended(&self, id: &str) -> Result<Value> {
        let mut last = Value::Null;
        wait_until("the end of a backup", || {
            last = self.backup(id)?;
            Ok(!matches!(last["status"].as_str(), Some("pending" | "running")))
        })?;
        Ok(last)
    }

    /// Runs a backup to its end; it must complete.
    ///
    /// # Errors
    /// Where it does not complete.
    pub fn back_up(&self, vm: &str, repository: &str, kind: &str) -> Result<Value> {
        let id = self.start_backup(vm, repository, kind)?;
        let backup = self.ended(&id)?;
        anyhow::ensure!(backup["status"] == "completed", "{backup:#}");
        Ok(backup)
    }

    /// Runs `sendense-ctl` against this hub; answers what it printed.
    ///
    /// # Errors
    /// Where it fails, with its words.
    pub fn ctl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(program("sendense-ctl"));
        command.arg("--hub").arg(&self.url).arg("--token-file").arg(self.token_file());
        let output = command.args(arguments).output()?;
        anyhow::ensure!(
            output.status.success(),
            "{command:?}: {}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Restores one disk of a point through `sendense-ctl`.
    ///
    /// # Errors
    /// Where it fails.
    pub fn restore(&self, backup_id: &str, disk: usize, target: &Path) -> Result<()> {
        let (disk, target) = (disk.to_string(), target.display().to_string());
        let point = ["backup", "restore", "--backup-id", backup_id];
        self.ctl(&[&point[..], &["--disk", &disk, "--target", &target]].concat()).map(drop)
    }
}
