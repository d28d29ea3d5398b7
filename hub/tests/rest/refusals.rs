//! What the interface refuses, with which status, and that it says so as a problem document.

use reqwest::{Method, StatusCode};
use serde_json::json;

use crate::fixture::{Disk, Fixture};

#[tokio::test(flavor = "multi_thread")]
async fn every_route_but_health_wants_the_token() {
    let f = Fixture::start().await;
    for (method, path) in [
        (Method::GET, "/vms"),
        (Method::POST, "/vms"),
        (Method::GET, "/vms/a"),
        (Method::PATCH, "/vms/a"),
        (Method::DELETE, "/vms/a"),
        (Method::GET, "/repositories"),
        (Method::POST, "/repositories"),
        (Method::GET, "/backups"),
        (Method::POST, "/backups"),
        (Method::GET, "/backups/a"),
        (Method::DELETE, "/backups/a"),
        (Method::GET, "/backups/chain/a"),
        (Method::GET, "/backups/a/events"),
        (Method::POST, "/backups/a/cancel"),
        (Method::POST, "/backups/a/restore"),
        (Method::POST, "/backups/a/progress"),
        (Method::POST, "/backups/a/complete"),
        (Method::POST, "/backups/a/fail"),
        (Method::GET, "/restores/a"),
        (Method::POST, "/backup/start"),
        (Method::GET, "/backup/list"),
        (Method::GET, "/backup/chain"),
        (Method::GET, "/nothing"),
    ] {
        for token in [None, Some("wrong"), Some("")] {
            let (status, _) = f.ask(method.clone(), path, None, token).await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{method} {path} {token:?}");
        }
    }
    let health = reqwest::get(format!("{}/health", f.base)).await.unwrap();
    assert_eq!(health.status(), StatusCode::OK);
    assert!(health.text().await.unwrap().contains("\"status\":\"ok\""));
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_404_and_what_cannot_be_read_is_400() {
    let f = Fixture::with_repository().await;
    for path in [
        "/vms/nobody",
        "/backups/nothing",
        "/backups/nothing/events",
        "/backups/chain/nobody",
        "/backup/chain?vm_name=nobody",
        "/restores/nothing",
        "/nowhere",
    ] {
        assert_eq!(f.get(path).await.0, StatusCode::NOT_FOUND, "{path}");
    }
    let start = json!({"vm_name": "nobody", "repository_id": "main", "backup_type": "full"});
    assert_eq!(f.post("/backups", start).await.0, StatusCode::NOT_FOUND);
    for path in ["/backups", "/vms", "/repositories"] {
        let answer = f.ask(Method::POST, path, Some("{".to_owned()), Some(TOKEN)).await;
        assert_eq!(answer.0, StatusCode::BAD_REQUEST, "{path}");
    }
    assert_eq!(f.get("/backups?status=done").await.0, StatusCode::BAD_REQUEST);
    assert_eq!(f.get("/backup/chain").await.0, StatusCode::BAD_REQUEST);
    assert_eq!(f.get("/vms/%ff").await.0, StatusCode::BAD_REQUEST);
    assert_eq!(f.delete("/backups").await.0, StatusCode::METHOD_NOT_ALLOWED);
    let large = format!("\"{}\"", "x".repeat(hub::http::MAX_BODY_BYTES));
    let (status, _) = f.ask(Method::POST, "/vms", Some(large), Some(TOKEN)).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    f.stop().await;
}

const TOKEN: &str = "the token of this test";

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_sense_is_422() {
    let f = Fixture::with_repository().await;
    let disk = |source: &str| json!([{"source": source}]);
    for wish in [
        json!({"name": "", "disks": disk("file:/a")}),
        json!({"name": "..", "disks": disk("file:/a")}),
        json!({"name": "nul\u{0}", "disks": disk("file:/a")}),
        json!({"name": "a", "disks": []}),
        json!({"name": "a", "disks": disk("file:relative")}),
        json!({"name": "a", "disks": disk("/no/scheme")}),
        json!({"name": "a", "disks": disk("nbd://h/e?color=red")}),
        json!({"name": "a", "agent": "external", "disks": disk("file:/a")}),
        json!({"name": "a", "agent": "elsewhere", "disks": disk("file:/a")}),
        json!({"name": "a", "disks": [{"source": "file:/a", "key": 1}, {"source": "file:/b", "key": 1}]}),
        json!({"name": "a", "disks": disk("file:/a"), "typo": 1}),
    ] {
        let (status, body) = f.post("/vms", wish.clone()).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{wish} {body}");
    }
    for wish in [
        json!({"name": "r", "type": "s3", "path": "/srv"}),
        json!({"name": "r", "path": "relative"}),
        json!({"name": "r", "path": "/does/not/exist"}),
        json!({"name": "r", "path": "/dev/null"}),
    ] {
        let (status, body) = f.post("/repositories", wish.clone()).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{wish} {body}");
    }
    let disk = Disk::new(&f.dir, "a.raw", 1 << 20);
    f.add_vm("web", &[&disk]).await;
    for backup_type in ["differential", "weekly"] {
        let wish = json!({"vm_name": "web", "backup_type": backup_type});
        assert_eq!(f.post("/backups", wish).await.0, StatusCode::UNPROCESSABLE_ENTITY);
    }
    f.add_repository("second").await;
    let several = json!({"vm_name": "web", "backup_type": "full"});
    assert_eq!(f.post("/backups", several).await.0, StatusCode::UNPROCESSABLE_ENTITY);
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qcow2_container_is_no_raw_disk() {
    let f = Fixture::with_repository().await;
    let image = f.dir.path().join("disk.qcow2");
    std::fs::write(&image, [b"QFI\xfb".as_slice(), &[0; 65532]].concat()).unwrap();
    let disks = json!([{"source": format!("file:{}", image.display())}]);
    let (status, problem) = f.post("/vms", json!({"name": "boxed", "disks": disks})).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    assert!(problem["detail"].as_str().unwrap().contains("nbd://"), "{problem}");
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_taken_is_409() {
    let f = Fixture::with_repository().await;
    let disk = Disk::new(&f.dir, "a.raw", 1 << 20);
    f.add_vm("web", &[&disk]).await;
    let again = json!({"name": "web", "disks": [{"source": "file:/a"}]});
    assert_eq!(f.post("/vms", again).await.0, StatusCode::CONFLICT);
    let same_name = json!({"name": "main", "path": f.dir.path()});
    assert_eq!(f.post("/repositories", same_name).await.0, StatusCode::CONFLICT);
    let same_path = json!({"name": "other", "path": f.repository_path("main")});
    assert_eq!(f.post("/repositories", same_path).await.0, StatusCode::CONFLICT);

    let full = f.backup("web", "full").await;
    let id = full["backup_id"].as_str().unwrap();
    assert_eq!(f.post(&format!("/backups/{id}/cancel"), json!(null)).await.0, StatusCode::CONFLICT);
    let done = json!({"change_id": "x/1", "disk_id": 0, "bytes": 1});
    assert_eq!(f.post(&format!("/backups/{id}/complete"), done).await.0, StatusCode::CONFLICT);
    f.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn repositories_tell_their_live_space_and_a_second_hub_is_kept_out() {
    let f = Fixture::with_repository().await;
    let (_, list) = f.get("/repositories").await;
    let one = &list["repositories"][0];
    assert_eq!((&one["name"], &one["online"]), (&json!("main"), &json!(true)));
    let (total, free) =
        (one["total_bytes"].as_u64().unwrap(), one["available_bytes"].as_u64().unwrap());
    assert!(total > 0 && free <= total);

    let other = Fixture::start().await;
    let theirs = json!({"name": "theirs", "path": f.repository_path("main")});
    let (status, body) = other.post("/repositories", theirs).await;
    assert_eq!(status, StatusCode::CONFLICT, "{body}");
    let same_data = hub::Hub::start(hub::Config::new(f.dir.path().join("data"))).await;
    assert!(matches!(same_data, Err(hub::StartError::InUse(_))));
    other.stop().await;
    f.stop().await;
}
