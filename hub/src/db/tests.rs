//! Migrations, constraints and the transactions that matter, against real SQLite files.

use jiff::{SignedDuration, Timestamp};
use rusqlite_migration::M;
use tempfile::TempDir;

use super::*;
use crate::model::{AgentKind, Backup, BackupType, RepositoryRow, RepositoryType, Status};

struct Fixture {
    db: Database,
    _dir: TempDir,
}

fn now() -> Timestamp {
    "2026-11-20T10:00:00Z".parse().unwrap()
}

async fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let db = Database::open(&dir.path().join("hub.db")).unwrap();
    db.insert_vm(vm("web")).await.unwrap();
    db.insert_repository(repository("main", "/srv/a")).await.unwrap();
    Fixture { db, _dir: dir }
}

fn vm(name: &str) -> NewVm {
    let disk =
        |key| NewVmDisk { key, source: "file:/dev/null".to_owned(), capacity_bytes: Some(1 << 20) };
    NewVm {
        context_id: format!("vm-{name}"),
        name: name.to_owned(),
        agent: AgentKind::Local,
        disks: vec![disk(2000), disk(2016)],
        now: now(),
    }
}

fn repository(name: &str, path: &str) -> RepositoryRow {
    RepositoryRow {
        id: format!("repository-{name}"),
        name: name.to_owned(),
        kind: RepositoryType::Local,
        path: path.to_owned(),
        created_at: now(),
    }
}

impl Fixture {
    async fn start(&self, backup_type: BackupType) -> DbResult<Backup> {
        self.db
            .insert_job(NewJob {
                vm_name: "web".to_owned(),
                repository: "main".to_owned(),
                backup_type,
                now: now(),
            })
            .await
    }

    /// A job with two disks in work, each on the latest completed layer, if it is an incremental.
    async fn running(&self, backup_type: BackupType) -> Backup {
        let job = self.start(backup_type).await.unwrap();
        self.db.begin(&job.id, now()).await.unwrap();
        let parents = self.db.parents(&job.vm_context_id, &job.repository_id).await.unwrap();
        for index in 0..2 {
            let disk = self.disk(&job, index, backup_type, &parents);
            self.db.put_disk(&job.id, disk).await.unwrap();
        }
        job
    }

    fn disk(&self, job: &Backup, index: u32, kind: BackupType, parents: &[Parent]) -> NewDisk {
        let parent =
            parents.iter().find(|parent| parent.disk_index == index && kind != BackupType::Full);
        NewDisk {
            index,
            key: 2000 + i64::from(index),
            kind,
            full_reason: None,
            parent_backup_id: parent.map(|parent| parent.backup_id.clone()),
            previous_change_id: parent.map(|parent| parent.change_id.clone()),
            capacity_bytes: 1 << 20,
            path: format!("{}/disk-{index}.qcow2", job.id),
            export_name: format!("{}-{index}", job.id),
        }
    }

    async fn completed(&self, backup_type: BackupType) -> Backup {
        let job = self.running(backup_type).await;
        self.db.complete(&job.id, outcomes(&job), now()).await.unwrap();
        self.db.backup(&job.id).await.unwrap()
    }
}

fn outcomes(job: &Backup) -> Vec<DiskOutcome> {
    (0..2)
        .map(|index| DiskOutcome {
            index,
            change_id: format!("{}/{index}", job.sequence),
            full_reason: None,
            bytes_transferred: 100,
            bytes_read: 200,
            stored_bytes: 300,
        })
        .collect()
}

fn refusal<T: std::fmt::Debug>(result: DbResult<T>) -> Refusal {
    match result {
        Err(DbError::Refused(refusal)) => refusal,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[test]
fn the_migrations_are_consistent() {
    schema::migrations().validate().unwrap();
}

#[test]
fn the_schema_goes_down_to_nothing_and_up_again() {
    let dir = tempfile::tempdir().unwrap();
    let migrations = schema::migrations();
    let mut connection = prepare(&dir.path().join("hub.db"), &migrations).unwrap();
    let tables = |connection: &Connection| -> i64 {
        connection
            .query_row(
                "SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'",
                [],
                |row| row.get(0),
            )
            .unwrap()
    };
    assert_eq!(tables(&connection), 8);
    migrations.to_version(&mut connection, 0).unwrap();
    assert_eq!(tables(&connection), 0);
    migrations.to_latest(&mut connection).unwrap();
    assert_eq!(tables(&connection), 8);
}

#[tokio::test]
async fn an_existing_database_is_copied_before_it_is_migrated() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hub.db");
    let db = Database::open(&path).unwrap();
    db.insert_vm(vm("web")).await.unwrap();
    drop(db);

    let mut next = vec![M::up("CREATE TABLE later (x INTEGER) STRICT;")];
    let known = schema::migrations();
    let connection = Connection::open(&path).unwrap();
    let version: i64 =
        connection.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap();
    drop(connection);
    // A schema one version newer, whose first versions are the ones that the file has.
    let mut all: Vec<M<'_>> = (0..version).map(|_| M::up("SELECT 1;")).collect();
    all.append(&mut next);
    prepare(&path, &Migrations::new(all)).unwrap();

    let copies: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "bak"))
        .collect();
    assert_eq!(copies.len(), 1);
    let copy = Database::open(&copies[0]).unwrap();
    assert_eq!(copy.vm("web").await.unwrap().disks.len(), 2);

    // This program now meets a file of the future.
    assert!(matches!(prepare(&path, &known), Err(DbError::Newer(_))));
}

#[tokio::test]
async fn a_database_keeps_what_it_was_told_when_it_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hub.db");
    let db = Database::open(&path).unwrap();
    let odd = "a/b \u{1F5C4} 'quoted\"; DROP TABLE vm_contexts; --";
    db.insert_vm(vm(odd)).await.unwrap();
    drop(db);
    let db = Database::open(&path).unwrap();
    assert_eq!(db.vm(odd).await.unwrap().disks[1].key, 2016);
    assert_eq!(db.vms().await.unwrap().len(), 1);
    assert!(
        std::fs::read_dir(dir.path())
            .unwrap()
            .all(|entry| { !entry.unwrap().file_name().to_string_lossy().ends_with(".bak") })
    );
}

#[tokio::test]
async fn names_are_unique_and_the_unknown_is_named() {
    let f = fixture().await;
    assert!(matches!(refusal(f.db.insert_vm(vm("web")).await), Refusal::Exists { .. }));
    let same_path = f.db.insert_repository(repository("other", "/srv/a")).await;
    assert!(matches!(refusal(same_path), Refusal::Exists { .. }));
    assert!(matches!(refusal(f.db.vm("nobody").await), Refusal::Unknown { .. }));
    assert!(matches!(refusal(f.db.backup("nothing").await), Refusal::Unknown { .. }));
}

#[tokio::test]
async fn a_second_job_of_one_virtual_machine_is_refused_while_the_first_is_active() {
    let f = fixture().await;
    let first = f.start(BackupType::Full).await.unwrap();
    let refused = refusal(f.start(BackupType::Full).await);
    assert_eq!(refused, Refusal::Active { vm: "web".to_owned(), backup_id: first.id.clone() });
    f.db.end(&first.id, Status::Cancelled, "asked", 0, now()).await.unwrap();
    f.start(BackupType::Full).await.unwrap();
}

#[tokio::test]
async fn jobs_of_one_second_and_after_a_step_back_of_the_clock_have_growing_stamps() {
    let f = fixture().await;
    let first = f.completed(BackupType::Full).await;
    let second = f.completed(BackupType::Incremental).await;
    assert!(second.stamp > first.stamp && second.sequence > first.sequence);
    let yesterday = now() - SignedDuration::from_hours(24);
    let third =
        f.db.insert_job(NewJob {
            vm_name: "web".to_owned(),
            repository: "repository-main".to_owned(),
            backup_type: BackupType::Full,
            now: yesterday,
        })
        .await
        .unwrap();
    assert!(third.stamp > second.stamp);
    assert_eq!(third.created_at, yesterday);
    let listed = f.db.backups(Filter { limit: 10, ..Filter::default() }).await.unwrap();
    let order: Vec<_> = listed.iter().map(|backup| backup.sequence).collect();
    assert_eq!(order, [third.sequence, second.sequence, first.sequence]);
}

#[tokio::test]
async fn completing_sets_status_change_ids_and_chains_at_once() {
    let f = fixture().await;
    let full = f.completed(BackupType::Full).await;
    assert_eq!(full.status, Status::Completed);
    assert_eq!(full.change_id.as_deref(), Some("1/0"));
    assert_eq!((full.bytes_transferred, full.total_bytes), (200, 2 << 20));

    let incremental = f.completed(BackupType::Incremental).await;
    assert_eq!(incremental.parent_backup_id, Some(full.id.clone()));
    let parents = f.db.parents("vm-web", "repository-main").await.unwrap();
    assert_eq!(parents.len(), 2);
    assert!(parents.iter().all(|parent| parent.backup_id == incremental.id));
    assert_eq!(parents[1].change_id, "2/1");
    let chain = f.db.chain("web").await.unwrap();
    let order: Vec<_> = chain.iter().map(|(backup, _)| backup.id.as_str()).collect();
    assert_eq!(order, [full.id.as_str(), incremental.id.as_str()]);
}

#[tokio::test]
async fn a_completion_that_lacks_a_disk_changes_nothing() {
    let f = fixture().await;
    let job = f.running(BackupType::Full).await;
    let mut partial = outcomes(&job);
    partial.pop();
    let refused = refusal(f.db.complete(&job.id, partial, now()).await);
    assert_eq!(refused, Refusal::NoChangeId { disk_index: 1 });
    assert_eq!(f.db.backup(&job.id).await.unwrap().status, Status::Running);
    assert!(f.db.parents("vm-web", "repository-main").await.unwrap().is_empty());
}

#[tokio::test]
async fn a_job_that_did_not_commit_is_never_a_parent() {
    let f = fixture().await;
    let full = f.completed(BackupType::Full).await;
    let job = f.running(BackupType::Incremental).await;
    f.db.announce_end(&job.id, "broken").await.unwrap();
    f.db.end(&job.id, Status::Failed, "broken", 7, now()).await.unwrap();
    let parents = f.db.parents("vm-web", "repository-main").await.unwrap();
    assert!(parents.iter().all(|parent| parent.backup_id == full.id));
    let late = refusal(f.db.complete(&job.id, outcomes(&job), now()).await);
    assert!(matches!(late, Refusal::ChainMoved { .. } | Refusal::WrongState { .. }));
    let again = refusal(f.db.end(&job.id, Status::Failed, "twice", 0, now()).await);
    assert!(matches!(again, Refusal::WrongState { .. }));
}

#[tokio::test]
async fn a_new_full_begins_a_second_chain_and_the_first_stays() {
    let f = fixture().await;
    let first = f.completed(BackupType::Full).await;
    let second = f.completed(BackupType::Full).await;
    let parents = f.db.parents("vm-web", "repository-main").await.unwrap();
    assert!(parents.iter().all(|parent| parent.backup_id == second.id));
    assert_eq!(f.db.chain("web").await.unwrap().len(), 2);
    f.db.begin_delete(&first.id, now()).await.unwrap();
    f.db.finish_delete(&first.id).await.unwrap();
    assert_eq!(f.db.parents("vm-web", "repository-main").await.unwrap().len(), 2);
}

#[tokio::test]
async fn a_parent_is_kept_until_its_children_are_gone_and_the_chain_follows() {
    let f = fixture().await;
    let full = f.completed(BackupType::Full).await;
    let incremental = f.completed(BackupType::Incremental).await;
    let refused = refusal(f.db.begin_delete(&full.id, now()).await);
    assert!(matches!(refused, Refusal::HasChildren { .. }));

    let (_, disks) = f.db.begin_delete(&incremental.id, now()).await.unwrap();
    assert_eq!(disks.len(), 2);
    assert_eq!(f.db.half_deleted().await.unwrap().len(), 1);
    f.db.begin_delete(&incremental.id, now()).await.unwrap();
    let parents = f.db.parents("vm-web", "repository-main").await.unwrap();
    assert!(parents.len() == 2 && parents.iter().all(|parent| parent.backup_id == full.id));
    f.db.finish_delete(&incremental.id).await.unwrap();
    assert!(f.db.half_deleted().await.unwrap().is_empty());

    f.db.begin_delete(&full.id, now()).await.unwrap();
    f.db.finish_delete(&full.id).await.unwrap();
    assert!(f.db.parents("vm-web", "repository-main").await.unwrap().is_empty());
    f.db.delete_vm("web").await.unwrap();
}

#[tokio::test]
async fn a_job_in_work_is_not_deleted_and_a_parent_in_use_neither() {
    let f = fixture().await;
    let full = f.completed(BackupType::Full).await;
    let job = f.running(BackupType::Incremental).await;
    let refused = refusal(f.db.begin_delete(&job.id, now()).await);
    assert!(matches!(refused, Refusal::WrongState { .. }));
    let refused = refusal(f.db.begin_delete(&full.id, now()).await);
    assert!(matches!(refused, Refusal::HasChildren { .. }));
}

#[tokio::test]
async fn nothing_is_put_on_a_backup_that_is_being_deleted() {
    let f = fixture().await;
    let full = f.completed(BackupType::Full).await;
    let parents = f.db.parents("vm-web", "repository-main").await.unwrap();
    let job = f.start(BackupType::Incremental).await.unwrap();
    f.db.begin_delete(&full.id, now()).await.unwrap();
    let disk = f.disk(&job, 0, BackupType::Incremental, &parents);
    let refused = refusal(f.db.put_disk(&job.id, disk).await);
    assert_eq!(refused, Refusal::ParentGone { backup_id: full.id });
}

#[tokio::test]
async fn a_virtual_machine_with_backups_stays_and_takes_only_failures_with_it() {
    let f = fixture().await;
    let job = f.running(BackupType::Full).await;
    assert!(matches!(refusal(f.db.delete_vm("web").await), Refusal::HasBackups { .. }));
    f.db.end(&job.id, Status::Failed, "broken", 0, now()).await.unwrap();
    f.db.delete_vm("web").await.unwrap();
    assert!(matches!(refusal(f.db.backup(&job.id).await), Refusal::Unknown { .. }));
}

#[test]
fn the_schema_itself_refuses_what_must_never_be_stored() {
    let dir = tempfile::tempdir().unwrap();
    let connection = prepare(&dir.path().join("hub.db"), &schema::migrations()).unwrap();
    connection
        .execute_batch(
            "INSERT INTO vm_contexts VALUES ('c', 'web', 'local', 't', 't');
             INSERT INTO backup_repositories (id, name, repository_type, config, created_at, updated_at)
                 VALUES ('r', 'main', 'local', '{}', 't', 't');
             INSERT INTO backup_jobs (id, vm_context_id, vm_name, backup_type, repository_id,
                 repository_type, repository_path, stamp, created_at)
                 VALUES ('b', 'c', 'web', 'full', 'r', 'local', '/', 's', 't');",
        )
        .unwrap();
    for refused in [
        "UPDATE backup_jobs SET status = 'done'",
        "UPDATE backup_jobs SET status = 'completed'",
        "UPDATE backup_jobs SET backup_type = 'half'",
        "UPDATE backup_jobs SET bytes_transferred = -1",
        "UPDATE backup_jobs SET bytes_transferred = 'many'",
        "UPDATE backup_jobs SET vm_context_id = 'nobody'",
        "UPDATE backup_jobs SET parent_backup_id = 'nothing'",
        "DELETE FROM backup_repositories",
        "UPDATE backup_repositories SET repository_type = 'tape'",
        "UPDATE backup_repositories SET config = '{'",
        "INSERT INTO backup_jobs (id, vm_context_id, vm_name, backup_type, repository_id,
             repository_type, repository_path, stamp, created_at)
             VALUES ('b2', 'c', 'web', 'full', 'r', 'local', '/', 's2', 't')",
        "INSERT INTO vm_disks (vm_context_id, disk_index, disk_key, source)
             VALUES ('nobody', 0, 1, 'x')",
        "INSERT INTO backup_disks (backup_id, disk_index, disk_key, kind, status, capacity_bytes,
             path, export_name) VALUES ('b', 0, 1, 'full', 'completed', 1, 'p', 'e')",
    ] {
        assert!(connection.execute(refused, []).is_err(), "{refused}");
    }
    let (status, compression, transferred): (String, bool, i64) = connection
        .query_row(
            "SELECT status, compression_enabled, bytes_transferred FROM backup_jobs",
            [],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
        )
        .unwrap();
    assert_eq!((status.as_str(), compression, transferred), ("pending", true, 0));
}
