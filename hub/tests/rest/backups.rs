//! The main job: full and incremental backups, their chain, restores and deletions.

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::fixture::{Disk, Fixture, assert_same, qemu_img};

const MIB: u64 = 1 << 20;

fn id(backup: &Value) -> &str {
    backup["backup_id"].as_str().unwrap()
}

/// qemu-img finds nothing wrong with any layer of a backup, and reads the same as `disks`.
fn judge(f: &Fixture, backup: &Value, disks: &[&std::path::Path]) {
    for (layer, disk) in backup["disks"].as_array().unwrap().iter().zip(disks) {
        let path = f.repository_path("main").join(layer["path"].as_str().unwrap());
        let path = path.to_str().unwrap();
        qemu_img(&["check", "-q", path]);
        qemu_img(&["compare", "-f", "qcow2", "-F", "raw", path, disk.to_str().unwrap()]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_and_an_incremental_of_two_disks_restore_to_what_the_source_was() {
    let f = Fixture::with_repository().await;
    let (system, data) =
        (Disk::new(&f.dir, "a.raw", 16 * MIB), Disk::new(&f.dir, "b.raw", 5 * MIB));
    let vm = "web / \u{fc}\u{1F5C4} 100% \"x\"";
    f.add_vm(vm, &[&system, &data]).await;

    let full = f.backup(vm, "full").await;
    let then = (system.snapshot("a.then"), data.snapshot("b.then"));
    judge(&f, &full, &[&then.0, &then.1]);
    assert_eq!(full["change_id"], full["disks"][0]["change_id"]);
    assert_ne!(full["disks"][0]["change_id"], full["disks"][1]["change_id"]);
    assert_eq!(full["progress"]["percent"], 100.0);

    system.fill(3 * MIB, 70_000, 9);
    system.clear(MIB, 2 * 65536);
    let incremental = f.backup(vm, "incremental").await;
    judge(&f, &incremental, &[&system.path, &data.path]);
    judge(&f, &full, &[&then.0, &then.1]);
    assert_eq!(incremental["parent_backup_id"], full["backup_id"]);
    assert_eq!(incremental["disks"][0]["kind"], "incremental");
    assert_eq!(incremental["disks"][1]["previous_change_id"], full["disks"][1]["change_id"]);
    let sent = incremental["bytes_transferred"].as_u64().unwrap();
    assert!((70_000..5 * 65536).contains(&sent), "{sent}");

    for (backup, disk, wanted) in [
        (&full, 0, &then.0),
        (&full, 1, &then.1),
        (&incremental, 0, &system.path),
        (&incremental, 1, &data.path),
    ] {
        let name = format!("restored-{}-{disk}", id(backup));
        let (restored, told) = f.restore(id(backup), disk, &name).await;
        assert_same(&restored, wanted);
        assert_eq!(told["status"], "completed");
    }
    assert!(f.hub.export_names().is_empty());
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_leaves_holes_and_replaces_a_file_only_when_asked() {
    use std::os::unix::fs::MetadataExt;
    let f = Fixture::with_repository().await;
    let disk = Disk::new(&f.dir, "a.raw", 64 * MIB);
    f.add_vm("web", &[&disk]).await;
    let full = f.backup("web", "full").await;
    let (restored, _) = f.restore(id(&full), 0, "restored.raw").await;
    let metadata = std::fs::metadata(&restored).unwrap();
    assert_eq!(metadata.len(), 64 * MIB);
    assert!(metadata.blocks() * 512 <= 22 * MIB, "{}", metadata.blocks());

    let path = format!("/backups/{}/restore", id(&full));
    let wish = json!({"disk_index": 0, "target": restored});
    assert_eq!(f.post(&path, wish).await.0, StatusCode::CONFLICT);
    std::fs::write(&restored, "old").unwrap();
    let wish = json!({"target": restored, "overwrite": true});
    let (status, started) = f.post(&path, wish).await;
    assert_eq!(status, StatusCode::ACCEPTED);
    f.hub.restore_ended(started["restore_id"].as_str().unwrap()).await.unwrap();
    assert_same(&restored, &disk.path);

    for target in [
        f.repository_path("main").join("x.raw"),
        f.dir.path().join("data/x.raw"),
        f.dir.path().join("missing/x.raw"),
        f.dir.path().to_owned(),
        "relative.raw".into(),
    ] {
        let (status, body) = f.post(&path, json!({"target": target})).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{target:?} {body}");
    }
    let (status, _) = f.post(&path, json!({"disk_index": 7, "target": "/tmp/x"})).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_newest_first_and_chains_in_order_under_both_spellings() {
    let f = Fixture::with_repository().await;
    let disk = Disk::new(&f.dir, "a.raw", 2 * MIB);
    f.add_vm("a/b", &[&disk]).await;
    f.add_vm("chain", &[&disk]).await;
    let mut made = Vec::new();
    for (number, kind) in ["full", "incremental", "incremental"].into_iter().enumerate() {
        disk.fill(65536 * number as u64, 1000, 40 + number as u64);
        made.push(f.backup("a/b", kind).await["backup_id"].clone());
    }
    f.backup("chain", "full").await;

    let (_, chain) = f.get("/backups/chain/a%2Fb").await;
    let order: Vec<_> =
        chain["backups"].as_array().unwrap().iter().map(|link| link["backup_id"].clone()).collect();
    assert_eq!(order, made);
    assert_eq!(chain["total_backups"], 3);
    let sum: u64 = chain["backups"]
        .as_array()
        .unwrap()
        .iter()
        .map(|link| link["stored_bytes"].as_u64().unwrap())
        .sum();
    assert!(sum > 0 && chain["total_stored_bytes"] == sum);
    assert_eq!(f.get("/backup/chain?vm_name=a%2Fb").await.1, chain);

    made.reverse();
    let (_, list) = f.get("/backups?vm_name=a%2Fb").await;
    let order: Vec<_> =
        list["backups"].as_array().unwrap().iter().map(|one| one["backup_id"].clone()).collect();
    assert_eq!(order, made);
    assert_eq!(f.get("/backup/list?vm_name=a%2Fb").await.1, list);
    assert_eq!(f.get("/backups?status=completed").await.1["backups"].as_array().unwrap().len(), 4);
    assert_eq!(f.get("/backups?status=failed").await.1["backups"], json!([]));
    assert_eq!(f.get("/backups?limit=1").await.1["backups"].as_array().unwrap().len(), 1);
    let path = made[0].as_str().unwrap();
    assert_eq!(f.get(&format!("/backup/{path}")).await, f.get(&format!("/backups/{path}")).await);

    let (_, events) = f.get(&format!("/backups/{path}/events")).await;
    let steps: Vec<_> = events["events"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|event| event["message"] == "begun")
        .map(|event| event["step"].as_str().unwrap())
        .collect();
    let all =
        ["validate", "repository", "layers", "exports", "agent", "monitor", "durable", "complete"];
    assert_eq!(steps, all);
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_incremental_without_a_fitting_parent_becomes_a_full_that_says_why() {
    let f = Fixture::with_repository().await;
    let disk = Disk::new(&f.dir, "a.raw", 4 * MIB);
    f.add_vm("web", &[&disk]).await;
    let first = f.backup("web", "incremental").await;
    assert_eq!(first["disks"][0]["kind"], "full");
    let why = |backup: &Value| backup["disks"][0]["full_reason"].as_str().unwrap().to_owned();
    assert!(why(&first).contains("no completed backup"), "{first}");

    let file = std::fs::OpenOptions::new().write(true).open(&disk.path).unwrap();
    file.set_len(2 * MIB).unwrap();
    let shrunk = f.backup("web", "incremental").await;
    assert!(why(&shrunk).contains("shrank"), "{shrunk}");
    judge(&f, &shrunk, &[&disk.path]);

    file.set_len(3 * MIB).unwrap();
    disk.fill(2 * MIB + 500, 1000, 77);
    let grown = f.backup("web", "incremental").await;
    assert_eq!(grown["disks"][0]["kind"], "incremental", "{grown}");
    judge(&f, &grown, &[&disk.path]);

    // A parent that is no longer what was sealed is found before anything is put on it.
    let layer = f.repository_path("main").join(grown["disks"][0]["path"].as_str().unwrap());
    std::fs::OpenOptions::new().append(true).open(&layer).unwrap().set_len(1).unwrap();
    let fresh = f.backup("web", "incremental").await;
    assert!(why(&fresh).contains("cannot be built on"), "{fresh}");
    judge(&f, &fresh, &[&disk.path]);
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_point_can_be_deleted_and_the_chain_goes_on_from_its_parent() {
    let f = Fixture::with_repository().await;
    let disk = Disk::new(&f.dir, "a.raw", 2 * MIB);
    f.add_vm("web", &[&disk]).await;
    let full = f.backup("web", "full").await;
    let then = disk.snapshot("then.raw");
    disk.fill(0, 4096, 50);
    let second = f.backup("web", "incremental").await;

    let (status, body) = f.delete(&format!("/backups/{}", id(&full))).await;
    assert_eq!(status, StatusCode::CONFLICT);
    assert!(body["detail"].as_str().unwrap().contains(id(&second)));
    assert_eq!(f.delete("/vms/web").await.0, StatusCode::CONFLICT);
    assert_eq!(f.delete(&format!("/backup/{}", id(&second))).await.0, StatusCode::NO_CONTENT);
    assert_eq!(f.get(&format!("/backups/{}", id(&second))).await.0, StatusCode::NOT_FOUND);

    disk.fill(65536, 4096, 51);
    let third = f.backup("web", "incremental").await;
    assert_eq!(third["parent_backup_id"], full["backup_id"]);
    judge(&f, &third, &[&disk.path]);
    judge(&f, &full, &[&then]);

    for backup in [&third, &full] {
        let (status, body) = f.delete(&format!("/backups/{}", id(backup))).await;
        assert_eq!(status, StatusCode::NO_CONTENT, "{body}");
    }
    assert!(f.stored("main").is_empty(), "{:?}", f.stored("main"));
    assert_eq!(f.delete("/vms/web").await.0, StatusCode::NO_CONTENT);
    assert_eq!(f.get("/vms").await.1["vms"], json!([]));
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_missing_fails_the_job_and_leaves_nothing() {
    let f = Fixture::with_repository().await;
    let disk = Disk::new(&f.dir, "a.raw", 2 * MIB);
    let gone = Disk::new(&f.dir, "b.raw", 2 * MIB);
    f.add_vm("web", &[&disk, &gone]).await;
    std::fs::rename(&gone.path, f.dir.path().join("away.raw")).unwrap();
    let id = f.begin("web", "full").await;
    let failed = f.ended(&id).await;
    assert_eq!(failed["status"], "failed");
    let reason = failed["error_message"].as_str().unwrap();
    assert!(reason.contains("b.raw") && reason.contains("No such file"), "{reason}");
    assert!(f.hub.export_names().is_empty());
    assert!(f.stored("main").is_empty());

    std::fs::rename(f.dir.path().join("away.raw"), &gone.path).unwrap();
    let retried = f.backup("web", "incremental").await;
    judge(&f, &retried, &[&disk.path, &gone.path]);
    assert_eq!(f.delete(&format!("/backups/{id}")).await.0, StatusCode::NO_CONTENT);
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_virtual_machines_are_backed_up_at_once() {
    let f = Fixture::with_repository().await;
    let mut disks = Vec::new();
    for number in 0..6 {
        let vm = format!("vm-{number}");
        let pair = [0, 1].map(|part| Disk::new(&f.dir, &format!("{vm}-{part}.raw"), 3 * MIB));
        f.add_vm(&vm, &[&pair[0], &pair[1]]).await;
        disks.push((vm, pair));
    }
    let mut ids = Vec::new();
    for (vm, _) in &disks {
        ids.push(f.begin(vm, "full").await);
    }
    for (id, (_, pair)) in ids.iter().zip(&disks) {
        let ended = f.ended(id).await;
        assert_eq!(ended["status"], "completed", "{ended:#}");
        judge(&f, &ended, &[&pair[0].path, &pair[1].path]);
    }
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_does_not_replace_what_is_being_backed_up() {
    let f = Fixture::with_repository().await;
    let disk = Disk::new(&f.dir, "disk.raw", 3 << 20);
    f.add_vm("web", &[&disk]).await;
    let full = f.backup("web", "full").await;
    let before = disk.snapshot("before.raw");
    let path = format!("/backups/{}/restore", id(&full));
    let link = f.dir.path().join("link.raw");
    std::fs::hard_link(&disk.path, &link).unwrap();
    for target in [&disk.path, &link] {
        let wish = json!({"target": target, "overwrite": true});
        let (status, body) = f.post(&path, wish).await;
        assert_eq!(status, StatusCode::CONFLICT, "{body}");
        assert!(body["detail"].as_str().unwrap().contains("disk 0 of \"web\""), "{body}");
    }
    assert_same(&disk.path, &before);

    // A disk that is lost may be restored to its place.
    std::fs::remove_file(&disk.path).unwrap();
    let (restored, _) = f.restore(id(&full), 0, "disk.raw").await;
    assert_same(&restored, &before);
    f.stop().await;
}
