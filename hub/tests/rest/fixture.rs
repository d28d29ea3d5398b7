//! A hub on an ephemeral port with a token, and disks to back up. Asserts nothing of its own but that answers are JSON.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use hub::http::auth::{Auth, TokenDigest};
use hub::{Config, Hub};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

const TOKEN: &str = "the token of this test";

/// A running hub.
pub(crate) struct Fixture {
    pub(crate) dir: Arc<TempDir>,
    pub(crate) hub: Arc<Hub>,
    pub(crate) base: String,
    http: reqwest::Client,
    stop: oneshot::Sender<()>,
    server: JoinHandle<anyhow::Result<()>>,
}

impl Fixture {
    pub(crate) async fn start() -> Self {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        Self::start_in(dir, |_| {}).await
    }

    /// A hub in a directory that may have held one before.
    pub(crate) async fn start_in(dir: Arc<TempDir>, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::new(dir.path().join("data"));
        config.nbd_listen = Some("127.0.0.1:0".parse().unwrap());
        change(&mut config);
        let hub = Hub::start(config).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = oneshot::channel();
        let auth = Auth::Token(TokenDigest::of(TOKEN));
        let server = tokio::spawn(hub::program::run(Arc::clone(&hub), listener, auth, async {
            let _ = stopped.await;
        }));
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { dir, hub, base, http, stop, server }
    }

    /// With a repository `main`.
    pub(crate) async fn with_repository() -> Self {
        let fixture = Self::start().await;
        fixture.add_repository("main").await;
        fixture
    }

    pub(crate) async fn add_repository(&self, name: &str) {
        let path = self.repository_path(name);
        std::fs::create_dir(&path).unwrap();
        let wish = json!({"name": name, "type": "local", "path": path});
        let (status, _) = self.post("/repositories", wish).await;
        assert_eq!(status, StatusCode::CREATED);
    }

    pub(crate) fn repository_path(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("repository-{name}"))
    }

    /// Stops the hub as SIGTERM does, and gives back its directory.
    pub(crate) async fn stop(self) -> Arc<TempDir> {
        let Self { dir, hub, stop, server, .. } = self;
        stop.send(()).unwrap();
        server.await.unwrap().unwrap();
        drop(hub);
        dir
    }

    pub(crate) async fn get(&self, path: &str) -> (StatusCode, Value) {
        self.ask(Method::GET, path, None, Some(TOKEN)).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        self.ask(Method::POST, path, Some(body.to_string()), Some(TOKEN)).await
    }

    pub(crate) async fn patch(&self, path: &str, body: Value) -> (StatusCode, Value) {
        self.ask(Method::PATCH, path, Some(body.to_string()), Some(TOKEN)).await
    }

    pub(crate) async fn delete(&self, path: &str) -> (StatusCode, Value) {
        self.ask(Method::DELETE, path, None, Some(TOKEN)).await
    }

    /// Any request; a refusal has to come as a problem document.
    pub(crate) async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<String>,
        token: Option<&str>,
    ) -> (StatusCode, Value) {
        let mut request = self.http.request(method, format!("{}/api/v1{path}", self.base));
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body);
        }
        let response = request.send().await.unwrap();
        let status = response.status();
        let kind = response.headers().get("content-type").cloned();
        let text = response.text().await.unwrap();
        let value = match text.as_str() {
            "" => Value::Null,
            text => serde_json::from_str(text).unwrap(),
        };
        if !status.is_success() {
            assert_eq!(kind.unwrap(), "application/problem+json");
            assert_eq!(value["status"], status.as_u16());
            assert!(value["detail"].as_str().is_some_and(|detail| !detail.is_empty()));
        }
        (status, value)
    }

    /// Adds a virtual machine whose disks are these files.
    pub(crate) async fn add_vm(&self, name: &str, disks: &[&Disk]) {
        let disks: Vec<_> = disks
            .iter()
            .map(|disk| json!({"source": format!("file:{}", disk.path.display())}))
            .collect();
        let (status, body) = self.post("/vms", json!({"name": name, "disks": disks})).await;
        assert_eq!(status, StatusCode::CREATED, "{body}");
    }

    /// Adds a virtual machine whose one disk the hub reads from this source.
    pub(crate) async fn add_vm_of(&self, name: &str, source: &str) {
        let wish = json!({"name": name, "disks": [{"source": source}]});
        let (status, body) = self.post("/vms", wish).await;
        assert_eq!(status, StatusCode::CREATED, "{body}");
    }

    /// Adds a virtual machine whose one disk an external agent reads.
    pub(crate) async fn add_external_vm(&self, name: &str, capacity: u64) {
        let disks = json!([{"source": "file:/elsewhere", "key": 2016, "capacity_bytes": capacity}]);
        let wish = json!({"name": name, "agent": "external", "disks": disks});
        assert_eq!(self.post("/vms", wish).await.0, StatusCode::CREATED);
    }

    /// Starts a backup and returns its id.
    pub(crate) async fn begin(&self, vm: &str, backup_type: &str) -> String {
        let wish = json!({"vm_name": vm, "repository_id": "main", "backup_type": backup_type});
        let (status, body) = self.post("/backups", wish).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{body}");
        assert_eq!(
            (body["vm_name"].as_str(), body["status"].as_str()),
            (Some(vm), Some("pending"))
        );
        body["backup_id"].as_str().unwrap().to_owned()
    }

    /// Waits for the end of a backup.
    pub(crate) async fn ended(&self, id: &str) -> Value {
        self.hub.backup_ended(id).await;
        self.get(&format!("/backups/{id}")).await.1
    }

    /// Makes a backup that has to succeed.
    pub(crate) async fn backup(&self, vm: &str, backup_type: &str) -> Value {
        let id = self.begin(vm, backup_type).await;
        let ended = self.ended(&id).await;
        assert_eq!(ended["status"], "completed", "{ended:#}");
        ended
    }

    /// Restores a disk, expects it to succeed and returns the file.
    pub(crate) async fn restore(&self, id: &str, disk: u32, name: &str) -> (PathBuf, Value) {
        let target = self.dir.path().join(name);
        let wish = json!({"disk_index": disk, "target": target});
        let (status, body) = self.post(&format!("/backups/{id}/restore"), wish).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{body}");
        let restore_id = body["restore_id"].as_str().unwrap();
        self.hub.restore_ended(restore_id).await.unwrap();
        let (_, ended) = self.get(&format!("/restores/{restore_id}")).await;
        assert_eq!(ended["status"], "completed", "{ended:#}");
        (target, ended)
    }

    /// Every file in a repository but the lease.
    pub(crate) fn stored(&self, name: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut open = vec![self.repository_path(name)];
        while let Some(directory) = open.pop() {
            for entry in std::fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    open.push(path.clone());
                }
                if !path.ends_with(".sendense-lease") {
                    found.push(path);
                }
            }
        }
        found
    }
}

/// A raw disk.
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
}

impl Disk {
    /// A sparse disk with data at its beginning and near its end.
    pub(crate) fn new(dir: &TempDir, name: &str, size: u64) -> Self {
        let path = dir.path().join(name);
        let file = std::fs::File::create_new(&path).unwrap();
        file.set_len(size).unwrap();
        let disk = Self { path };
        disk.fill(0, size / 4, 1);
        disk.fill(size / 8 * 7, size / 16, 2);
        disk
    }

    /// Writes bytes that no pattern repeats.
    pub(crate) fn fill(&self, at: u64, len: u64, seed: u64) {
        let file = std::fs::OpenOptions::new().write(true).open(&self.path).unwrap();
        let mut hash = blake3::Hasher::new();
        hash.update(&seed.to_le_bytes());
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        hash.finalize_xof().fill(&mut bytes);
        file.write_all_at(&bytes, at).unwrap();
    }

    /// Makes the disk larger.
    pub(crate) fn grow(&self, size: u64) {
        let file = std::fs::OpenOptions::new().write(true).open(&self.path).unwrap();
        file.set_len(size).unwrap();
    }

    /// Writes zeros.
    pub(crate) fn clear(&self, at: u64, len: u64) {
        let file = std::fs::OpenOptions::new().write(true).open(&self.path).unwrap();
        file.write_all_at(&vec![0; usize::try_from(len).unwrap()], at).unwrap();
    }

    /// A copy of the disk as it is now.
    pub(crate) fn snapshot(&self, name: &str) -> PathBuf {
        let copy = self.path.with_file_name(name);
        std::fs::copy(&self.path, &copy).unwrap();
        copy
    }
}

pub(crate) fn assert_same(a: &Path, b: &Path) {
    assert!(
        std::fs::read(a).unwrap() == std::fs::read(b).unwrap(),
        "{} {}",
        a.display(),
        b.display()
    );
}

/// Runs qemu-img, which has to be content.
pub(crate) fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img").args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "qemu-img {arguments:?}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}
