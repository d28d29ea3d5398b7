//! Agents outside of the hub: one that does its work through the real library and sockets, and ones that fall silent,
//! give up or are told to stop.

use std::sync::Arc;
use std::time::Duration;

use agent::{Address, CancelToken, DiskJob, EventSender, RunOptions, SourceSpec, Target};
use async_trait::async_trait;
use block::{
    BlockDevice, ByteRange, DeviceError, Durability, Extent, Limits, MemoryDevice, Segments,
    ZeroMode,
};
use nbd_server::client::{ClientOptions, NbdDevice};
use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::fixture::{Disk, Fixture, assert_same};

const SIZE: u64 = 3 << 20;

/// Tells progress until the hub has taken it: the job may still be on its way to the agent's step.
async fn speak(f: &Fixture, id: &str) -> Value {
    let event = json!({"event": "warning", "message": "hello"});
    let (status, answer) = f.post(&format!("/backups/{id}/progress"), event).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    answer
}

/// Asks until the job has reached a step.
async fn reach(f: &Fixture, id: &str, step: &str) -> Value {
    loop {
        let (_, view) = f.get(&format!("/backups/{id}")).await;
        if view["step"] == step {
            return view;
        }
        assert!(matches!(view["status"].as_str(), Some("pending" | "running")), "{view:#}");
        tokio::task::yield_now().await;
    }
}

/// Opens the export of the only disk.
async fn connect(view: &Value) -> Arc<NbdDevice> {
    let address = Address::Tcp {
        host: view["nbd"]["host"].as_str().unwrap().to_owned(),
        port: u16::try_from(view["nbd"]["port"].as_u64().unwrap()).unwrap(),
    };
    let export = view["disks"][0]["export_name"].as_str().unwrap();
    NbdDevice::connect(&address, export, ClientOptions::default()).await.unwrap()
}

/// What an agent elsewhere does: asks for its disks, sends them, reports.
async fn send(f: &Fixture, id: &str, disk: &Disk) -> Value {
    let view = reach(f, id, "agent").await;
    let told = &view["disks"][0];
    let job = DiskJob {
        index: 0,
        key: told["disk_key"].as_i64().unwrap(),
        source: SourceSpec::File(disk.path.clone()),
        target: Target {
            address: Address::Tcp {
                host: view["nbd"]["host"].as_str().unwrap().to_owned(),
                port: u16::try_from(view["nbd"]["port"].as_u64().unwrap()).unwrap(),
            },
            export: told["export_name"].as_str().unwrap().to_owned(),
            tls: None,
        },
        previous_change_id: told["previous_change_id"].as_str().map(str::to_owned),
        full: told["full"].as_bool().unwrap(),
    };
    assert_eq!(speak(f, id).await, json!({"status": "running", "cancel": false}));
    let options = RunOptions::new(f.dir.path().join("elsewhere"), id);
    let report =
        agent::run(vec![job], options, EventSender::discard(), CancelToken::new()).await.unwrap();
    let report = serde_json::to_value(report).unwrap();
    let (status, _) = f.post(&format!("/backups/{id}/complete"), report).await;
    assert_eq!(status, StatusCode::ACCEPTED);
    f.ended(id).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_external_agent_makes_full_and_incremental_backups_over_tcp() {
    let f = Fixture::with_repository().await;
    let disk = Disk::new(&f.dir, "far.raw", SIZE);
    f.add_external_vm("far", SIZE).await;
    let id = f.begin("far", "full").await;
    let full = send(&f, &id, &disk).await;
    assert_eq!(full["status"], "completed", "{full:#}");
    assert_eq!(full["disks"][0]["disk_key"], 2016);

    disk.fill(100, 5000, 60);
    let id = f.begin("far", "incremental").await;
    let incremental = send(&f, &id, &disk).await;
    assert_eq!(incremental["status"], "completed", "{incremental:#}");
    assert!(incremental["bytes_transferred"].as_u64().unwrap() < 2 * 65536);
    let (restored, _) = f.restore(&id, 0, "restored.raw").await;
    assert_same(&restored, &disk.path);
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_grew_is_backed_up_incrementally_once_the_hub_was_told_its_size() {
    let f = Fixture::with_repository().await;
    let disk = Disk::new(&f.dir, "far.raw", SIZE);
    f.add_external_vm("far", SIZE).await;
    let id = f.begin("far", "full").await;
    assert_eq!(send(&f, &id, &disk).await["status"], "completed");

    disk.grow(2 * SIZE);
    disk.fill(2 * SIZE - 70_000, 70_000, 61);
    let grown = json!({"disks": [
        {"source": "file:/elsewhere", "key": 2016, "capacity_bytes": 2 * SIZE}
    ]});
    let (status, vm) = f.patch("/vms/far", grown).await;
    assert_eq!(status, StatusCode::OK, "{vm}");
    assert_eq!(vm["disks"][0]["capacity_bytes"], 2 * SIZE);
    let id = f.begin("far", "incremental").await;
    let incremental = send(&f, &id, &disk).await;
    assert_eq!(incremental["status"], "completed", "{incremental:#}");
    assert_eq!(incremental["disks"][0]["kind"], "incremental", "{incremental:#}");
    let (restored, _) = f.restore(&id, 0, "restored.raw").await;
    assert_same(&restored, &disk.path);
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_virtual_machine_is_does_not_change_under_its_backup() {
    let f = Fixture::with_repository().await;
    f.add_external_vm("far", SIZE).await;
    let id = f.begin("far", "full").await;
    let disk = |extra: Value| {
        let mut disk = json!({"source": "file:/moved"});
        disk.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        json!({ "disks": [disk] })
    };
    let (status, body) = f.patch("/vms/far", disk(json!({}))).await;
    assert_eq!(status, StatusCode::CONFLICT);
    assert!(body["detail"].as_str().unwrap().contains(&id));
    f.post(&format!("/backups/{id}/cancel"), json!(null)).await;
    f.ended(&id).await;

    // By its place; the size stays where none is given.
    let (status, vm) = f.patch("/vms/far", disk(json!({}))).await;
    assert_eq!(status, StatusCode::OK, "{vm}");
    let wanted =
        json!({"disk_index": 0, "key": 2016, "source": "file:/moved", "capacity_bytes": SIZE});
    assert_eq!(vm["disks"], json!([wanted]));
    for wrong in [
        disk(json!({"key": 1})),
        disk(json!({"capacity_bytes": 0})),
        json!({"disks": []}),
        json!({"disks": [{"source": "file:relative"}]}),
        json!({"disks": [{"source": "file:/a"}, {"source": "file:/b", "key": 2016}]}),
    ] {
        let (status, body) = f.patch("/vms/far", wrong).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{body}");
    }
    assert_eq!(f.get("/vms/far").await.1["disks"], json!([wanted]));
    assert_eq!(f.patch("/vms/none", disk(json!({}))).await.0, StatusCode::NOT_FOUND);
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bitmap_of_another_source_is_not_built_on() {
    let f = Fixture::with_repository().await;
    let disk = Disk::new(&f.dir, "far.raw", SIZE);
    f.add_external_vm("far", SIZE).await;
    let id = f.begin("far", "full").await;
    assert_eq!(send(&f, &id, &disk).await["status"], "completed");
    let moved = json!({"disks": [{"source": "nbd://other:10809/disk?bitmap=b"}]});
    assert_eq!(f.patch("/vms/far", moved).await.0, StatusCode::OK);
    let id = f.begin("far", "incremental").await;
    let view = reach(&f, &id, "agent").await;
    assert_eq!(view["disks"][0]["kind"], "full", "{view:#}");
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_backup_of_a_busy_virtual_machine_is_409_and_a_cancelled_one_leaves_nothing() {
    let f = Fixture::with_repository().await;
    f.add_external_vm("far", SIZE).await;
    let id = f.begin("far", "full").await;
    reach(&f, &id, "agent").await;
    assert_eq!(f.hub.export_names().len(), 1);
    let again = json!({"vm_name": "far", "repository": "main", "backup_type": "full"});
    let (status, body) = f.post("/backup/start", again).await;
    assert_eq!(status, StatusCode::CONFLICT);
    assert!(body["detail"].as_str().unwrap().contains(&id));
    assert_eq!(f.delete(&format!("/backups/{id}")).await.0, StatusCode::CONFLICT);
    assert_eq!(f.delete("/vms/far").await.0, StatusCode::CONFLICT);

    assert_eq!(f.post(&format!("/backups/{id}/cancel"), json!(null)).await.0, StatusCode::ACCEPTED);
    let ended = f.ended(&id).await;
    assert_eq!(ended["status"], "cancelled", "{ended:#}");
    assert!(f.hub.export_names().is_empty());
    assert!(f.stored("main").is_empty(), "{:?}", f.stored("main"));
    let late = json!({"event": "warning", "message": "late"});
    let (status, _) = f.post(&format!("/backups/{id}/progress"), late).await;
    assert_eq!(status, StatusCode::CONFLICT);
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn data_that_arrived_shows_as_progress_before_the_agent_says_so() {
    let f = Fixture::with_repository().await;
    f.add_external_vm("far", SIZE).await;
    let id = f.begin("far", "full").await;
    let view = reach(&f, &id, "agent").await;
    let device = connect(&view).await;
    let data = bytes::Bytes::from(vec![1; 1 << 20]);
    device.write(0, data, Durability::Deferred).await.unwrap();
    device.flush().await.unwrap();
    let (_, view) = f.get(&format!("/backups/{id}")).await;
    assert_eq!(view["progress"]["bytes_done"], 1 << 20);
    assert_eq!(view["disks"][0]["bytes_transferred"], 1 << 20);
    device.disconnect().await;
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_gives_up_fails_the_job_with_its_reason() {
    let f = Fixture::with_repository().await;
    f.add_external_vm("far", SIZE).await;
    let id = f.begin("far", "full").await;
    reach(&f, &id, "agent").await;
    let (status, _) = f.post(&format!("/backups/{id}/fail"), json!({"error": "no snapshot"})).await;
    assert_eq!(status, StatusCode::ACCEPTED);
    let ended = f.ended(&id).await;
    assert_eq!(
        (&ended["status"], &ended["error_message"]),
        (&json!("failed"), &json!("no snapshot"))
    );
    assert!(f.stored("main").is_empty());
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_must_name_disks_of_the_backup_at_their_size() {
    let f = Fixture::with_repository().await;
    f.add_external_vm("far", SIZE).await;
    let id = f.begin("far", "full").await;
    reach(&f, &id, "agent").await;
    let path = format!("/backups/{id}/complete");
    let other_disk = json!({"change_id": "x/1", "disk_id": 3, "bytes": 1});
    assert_eq!(f.post(&path, other_disk).await.0, StatusCode::NOT_FOUND);
    let no_change_id = json!({"change_id": "", "disk_id": 0, "bytes": 1});
    assert_eq!(f.post(&path, no_change_id).await.0, StatusCode::UNPROCESSABLE_ENTITY);
    let device = connect(&reach(&f, &id, "agent").await).await;
    device.write(0, bytes::Bytes::from(vec![1; 4096]), Durability::Deferred).await.unwrap();
    let rest = ByteRange::between(4096, SIZE);
    device.write_zeroes(rest, ZeroMode::default(), Durability::Deferred).await.unwrap();
    device.flush().await.unwrap();
    let plain = json!({"change_id": "52 de/4", "disk_id": 0, "bytes": 4096});
    assert_eq!(f.post(&path, plain.clone()).await.0, StatusCode::ACCEPTED);
    let ended = f.ended(&id).await;
    assert_eq!((&ended["status"], &ended["change_id"]), (&json!("completed"), &json!("52 de/4")));

    // The agent that did not get the answer asks again; one that says something else is refused.
    let (status, again) = f.post(&path, plain).await;
    assert_eq!((status, &again["status"]), (StatusCode::OK, &json!("completed")));
    let other = json!({"change_id": "52 de/5", "disk_id": 0, "bytes": 4096});
    assert_eq!(f.post(&path, other).await.0, StatusCode::CONFLICT);
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_data_did_not_arrive_fails_whatever_its_agent_reports() {
    let f = Fixture::with_repository().await;
    f.add_external_vm("far", SIZE).await;
    for (written, told, words) in [
        (None, 0, "never opened export"),
        (Some(4096), 8192, "reports 8192 bytes of data but only 4096 arrived through export"),
        (Some(4096), 4096, "a full disk but only 4096"),
    ] {
        let id = f.begin("far", "full").await;
        let view = reach(&f, &id, "agent").await;
        if let Some(len) = written {
            let device = connect(&view).await;
            let data = bytes::Bytes::from(vec![1; len]);
            device.write(0, data, Durability::Deferred).await.unwrap();
            device.flush().await.unwrap();
            device.disconnect().await;
        }
        let plain = json!({"change_id": "52 de/4", "disk_id": 0, "bytes": told});
        let (status, _) = f.post(&format!("/backups/{id}/complete"), plain).await;
        assert_eq!(status, StatusCode::ACCEPTED);
        let ended = f.ended(&id).await;
        assert_eq!(ended["status"], "failed", "{ended:#}");
        assert!(ended["error_message"].as_str().unwrap().contains(words), "{ended:#}");
        assert!(f.stored("main").is_empty());
    }
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_never_connects_or_falls_silent_is_lost() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let f = Fixture::start_in(dir, |config| {
        config.connect_timeout = Duration::from_millis(50);
        config.agent_timeout = Duration::from_millis(50);
    })
    .await;
    f.add_repository("main").await;
    f.add_external_vm("far", SIZE).await;
    let id = f.begin("far", "full").await;
    let ended = f.ended(&id).await;
    assert!(ended["error_message"].as_str().unwrap().contains("never connected"), "{ended:#}");
    let dir = f.stop().await;

    let f = Fixture::start_in(dir, |config| config.agent_timeout = Duration::from_millis(50)).await;
    let id = f.begin("far", "full").await;
    reach(&f, &id, "agent").await;
    speak(&f, &id).await;
    let ended = f.ended(&id).await;
    assert!(ended["error_message"].as_str().unwrap().contains("stopped reporting"), "{ended:#}");
    assert!(f.stored("main").is_empty() && f.hub.export_names().is_empty());
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_that_do_not_come_keep_no_local_job_waiting() {
    let f = Fixture::with_repository().await;
    let mut waiting = Vec::new();
    for number in 0..=hub::MAX_RUNNING_JOBS {
        let vm = format!("far-{number}");
        f.add_external_vm(&vm, SIZE).await;
        waiting.push(f.begin(&vm, "full").await);
    }
    let disk = Disk::new(&f.dir, "near.raw", SIZE);
    f.add_vm("near", &[&disk]).await;
    f.backup("near", "full").await;
    for id in &waiting {
        assert_eq!(reach(&f, id, "agent").await["status"], "running");
    }
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_beyond_the_limit_wait_their_turn_and_can_be_cancelled_while_they_wait() {
    let f = Fixture::with_repository().await;
    let source = mute_source(&f).await;
    let mut ids = Vec::new();
    for number in 0..hub::MAX_RUNNING_JOBS + 2 {
        let vm = format!("mute-{number}");
        f.add_vm_of(&vm, &source).await;
        ids.push(f.begin(&vm, "full").await);
    }
    // They are served in order.
    let (running, waiting) = ids.split_at(hub::MAX_RUNNING_JOBS);
    for id in running {
        reach(&f, id, "monitor").await;
    }
    for id in waiting {
        assert_eq!(f.get(&format!("/backups/{id}")).await.1["status"], "pending");
    }
    let cancel = |id: &str| format!("/backups/{id}/cancel");
    assert_eq!(f.post(&cancel(&waiting[0]), json!(null)).await.0, StatusCode::ACCEPTED);
    assert_eq!(f.ended(&waiting[0]).await["status"], "cancelled");
    f.post(&cancel(&ids[0]), json!(null)).await;
    reach(&f, &waiting[1], "monitor").await;
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_never_answers_fails_the_job_with_its_name() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let f =
        Fixture::start_in(dir, |config| config.stall_timeout = Duration::from_millis(200)).await;
    f.add_repository("main").await;
    // One falls mute after the handshake, the other does not even begin one.
    let mute = mute_source(&f).await;
    let socket = f.dir.path().join("deaf.sock");
    let deaf = tokio::net::UnixListener::bind(&socket).unwrap();
    let deaf_source = format!("nbd+unix:///?socket={}", socket.display());
    for (vm, source, words) in [
        ("mute", &mute, "nothing moved for 200ms: no answer from the source of disk 0"),
        ("deaf", &deaf_source, "does not answer for 200ms"),
    ] {
        f.add_vm_of(vm, source).await;
        let id = f.begin(vm, "full").await;
        let ended = f.ended(&id).await;
        let why = ended["error_message"].as_str().unwrap();
        assert!(ended["status"] == "failed" && why.contains(words), "{ended:#}");
        assert!(why.contains("sock"), "{why}");
    }
    assert!(f.stored("main").is_empty() && f.hub.export_names().is_empty());
    drop(deaf);
    f.stop().await;
}

/// A disk whose server greets, and then never answers.
struct Mute;

#[async_trait]
impl BlockDevice for Mute {
    fn limits(&self) -> Limits {
        MemoryDevice::new(SIZE).limits()
    }

    async fn read(&self, _: ByteRange) -> Result<Segments, DeviceError> {
        std::future::pending().await
    }

    async fn write(&self, _: u64, _: bytes::Bytes, _: Durability) -> Result<(), DeviceError> {
        std::future::pending().await
    }

    async fn write_zeroes(
        &self,
        _: ByteRange,
        _: ZeroMode,
        _: Durability,
    ) -> Result<(), DeviceError> {
        std::future::pending().await
    }

    async fn discard(&self, _: ByteRange, _: Durability) -> Result<(), DeviceError> {
        std::future::pending().await
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        std::future::pending().await
    }

    async fn extents(&self, _: ByteRange) -> Result<Vec<Extent>, DeviceError> {
        std::future::pending().await
    }

    async fn close(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// Serves [`Mute`] for the rest of the test.
async fn mute_source(f: &Fixture) -> String {
    let socket = f.dir.path().join("mute.sock");
    let server = nbd_server::Server::new(nbd_server::ServerConfig::default());
    server.add_export(nbd_server::Export::new("disk", Arc::new(Mute))).unwrap();
    server.listen_unix(&socket).await.unwrap();
    format!("nbd+unix:///disk?socket={}", socket.display())
}
