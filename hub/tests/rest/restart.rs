//! What a hub finds when it starts after a stop or a crash: interrupted jobs end with a reason, their layers go,
//! completed backups stay.

use std::path::Path;

use chain::{LayerKind, LayerRequest, SealFacts};
use hub::db::{Database, NewDisk, NewJob};
use hub::model::BackupType;
use jiff::Timestamp;
use serde_json::json;

use crate::fixture::{Disk, Fixture};

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_fails_running_jobs_with_a_reason_and_leaves_nothing_of_them() {
    let f = Fixture::with_repository().await;
    f.add_external_vm("far", 1 << 20).await;
    let id = f.begin("far", "full").await;
    let f = Fixture::start_in(f.stop().await, |_| {}).await;
    let (_, view) = f.get(&format!("/backups/{id}")).await;
    assert_eq!(
        (&view["status"], &view["error_message"]),
        (&json!("failed"), &json!("the hub was stopped"))
    );
    assert!(f.stored("main").is_empty());
    f.stop().await;
}

/// What a crash between sealing and committing leaves: a running job whose layer has a manifest. And one in the middle
/// of its data: a layer without.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_ends_jobs_and_removes_even_sealed_layers_that_were_never_committed() {
    let f = Fixture::with_repository().await;
    let (sealed, torn) = (Disk::new(&f.dir, "a.raw", 1 << 20), Disk::new(&f.dir, "b.raw", 1 << 20));
    f.add_vm("web", &[&sealed, &torn]).await;
    let full = f.backup("web", "full").await;
    let dir = f.stop().await;

    let db = Database::open(&dir.path().join("data/hub.db")).unwrap();
    let job = db
        .insert_job(NewJob {
            vm_name: "web".to_owned(),
            repository: "main".to_owned(),
            backup_type: BackupType::Incremental,
            now: Timestamp::now(),
        })
        .await
        .unwrap();
    db.begin(&job.id, Timestamp::now()).await.unwrap();
    db.enter_step(&job.id, "durable", Timestamp::now()).await.unwrap();
    let repository = chain::Repository::open(&dir.path().join("repository-main")).await.unwrap();
    for index in 0..2 {
        let disk = &full["disks"][index];
        let parent = repository.layer_ref(Path::new(disk["path"].as_str().unwrap())).await.unwrap();
        let plan = repository
            .plan_layer(&LayerRequest {
                vm_name: "web".to_owned(),
                context: "web".to_owned(),
                disk_index: u32::try_from(index).unwrap(),
                disk_key: None,
                kind: LayerKind::Incremental,
                timestamp: job.stamp,
                size_bytes: 1 << 20,
                backup_id: job.id.clone(),
                job_id: job.id.clone(),
                parent: Some(&parent),
            })
            .unwrap();
        let row = NewDisk {
            index: u32::try_from(index).unwrap(),
            key: disk["disk_key"].as_i64().unwrap(),
            kind: BackupType::Incremental,
            full_reason: None,
            parent_backup_id: full["backup_id"].as_str().map(str::to_owned),
            previous_change_id: disk["change_id"].as_str().map(str::to_owned),
            capacity_bytes: 1 << 20,
            path: plan.path.to_string(),
            export_name: plan.export_name.clone(),
        };
        db.put_disk(&job.id, row).await.unwrap();
        let layer = repository.create_layer(&plan).await.unwrap();
        if index == 0 {
            let facts = SealFacts { change_id: Some("x/9".to_owned()), ..SealFacts::default() };
            repository.seal_layer(layer, facts).await.unwrap();
        }
    }
    drop((repository, db));

    let f = Fixture::start_in(dir, |_| {}).await;
    let (_, view) = f.get(&format!("/backups/{}", job.id)).await;
    assert_eq!(view["status"], "failed");
    let reason = view["error_message"].as_str().unwrap();
    assert!(reason.contains("the hub stopped while its step durable"), "{reason}");
    let layers = f.stored("main");
    let images = |path: &&std::path::PathBuf| path.extension().is_some_and(|end| end == "qcow2");
    assert_eq!(layers.iter().filter(images).count(), 2, "{layers:?}");

    let (_, kept) = f.get(&format!("/backups/{}", full["backup_id"].as_str().unwrap())).await;
    assert_eq!(kept["status"], "completed");
    let next = f.backup("web", "incremental").await;
    assert_eq!(next["parent_backup_id"], full["backup_id"]);
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_restore_left_is_removed_and_nothing_else() {
    let dir = Fixture::start().await.stop().await;
    let db = Database::open(&dir.path().join("data/hub.db")).unwrap();
    let (left, gone) =
        (dir.path().join(".restore-a.partial"), dir.path().join(".restore-b.partial"));
    let stranger = dir.path().join(".restore-c.partial");
    for path in [&left, &gone] {
        db.note_partial(path, Timestamp::now()).await.unwrap();
    }
    for path in [&left, &stranger] {
        std::fs::write(path, "half").unwrap();
    }
    drop(db);
    Fixture::start_in(dir.clone(), |_| {}).await.stop().await;
    assert!(!left.exists() && stranger.exists());
    let db = Database::open(&dir.path().join("data/hub.db")).unwrap();
    assert!(db.partials().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_that_was_away_at_the_restart_is_cleaned_when_it_is_back() {
    let f = Fixture::with_repository().await;
    f.add_external_vm("far", 1 << 20).await;
    let path = f.repository_path("main");
    let away = path.with_extension("away");
    let dir = f.stop().await;

    // A job of a hub that was killed, with half a layer, in a repository that is not there any more.
    let db = Database::open(&dir.path().join("data/hub.db")).unwrap();
    let job = db
        .insert_job(NewJob {
            vm_name: "far".to_owned(),
            repository: "main".to_owned(),
            backup_type: BackupType::Full,
            now: Timestamp::now(),
        })
        .await
        .unwrap();
    db.begin(&job.id, Timestamp::now()).await.unwrap();
    let layer = "ctx-far-20260101T000000/disk-0/backup-far-20260101T000000-full.qcow2";
    let row = NewDisk {
        index: 0,
        key: 2016,
        kind: BackupType::Full,
        full_reason: None,
        parent_backup_id: None,
        previous_change_id: None,
        capacity_bytes: 1 << 20,
        path: layer.to_owned(),
        export_name: "half".to_owned(),
    };
    db.put_disk(&job.id, row).await.unwrap();
    drop(db);
    std::fs::create_dir_all(path.join(layer).parent().unwrap()).unwrap();
    std::fs::write(path.join(layer), "half").unwrap();
    std::fs::rename(&path, &away).unwrap();

    let f = Fixture::start_in(dir, |_| {}).await;
    let (_, view) = f.get(&format!("/backups/{}", job.id)).await;
    assert_eq!(view["status"], "failed");
    let (_, list) = f.get("/repositories").await;
    assert_eq!(list["repositories"][0]["online"], false);
    let refused = f.begin("far", "full").await;
    let refused = f.ended(&refused).await;
    assert!(refused["error_message"].as_str().unwrap().contains("offline"), "{refused:#}");

    std::fs::rename(&away, &path).unwrap();
    assert_eq!(f.get("/repositories").await.1["repositories"][0]["online"], true);
    assert!(f.stored("main").is_empty(), "{:?}", f.stored("main"));
    f.stop().await;
}
