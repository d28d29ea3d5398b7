//! `sendense-hub demo`: the main job from nothing to a restored disk, with a real hub process, on disks made for it. What
//! the disks hold is told in `machine`, how bytes are compared in `compare`.

mod compare;
mod machine;
mod server;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use comfy_table::{Table, presets};
use indicatif::{HumanBytes, HumanDuration};

use crate::api::{
    AddDisk, AddRepository, AddVm, BackupView, DiskView, RepositoryView, RestoreView, StartBackup,
    StartRestore, StartedBackup, VmView,
};
use crate::ctl::client::{Client, segment};
use crate::ctl::waiting;
use crate::demo::machine::Machine;
use crate::demo::server::Server;
use crate::model::{AgentKind, BackupType, RepositoryType, Status};
use crate::outlet::say;
use crate::restore::copy;

/// The file by which a folder is known to be a demonstration's, so that it may be replaced.
const MARK: &str = ".sendense-demo";
/// The name of the virtual machine.
const VM: &str = "web01";
/// The name of the repository.
const REPOSITORY: &str = "main";

/// What `demo` is told.
#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Where everything is put; a folder that an earlier demonstration left is replaced
    #[arg(long, value_name = "DIR", default_value = "demo")]
    dir: PathBuf,
}

/// The whole demonstration.
///
/// # Errors
/// Where any step of it does not do what it is there to show.
pub(crate) async fn run(options: &Demo) -> anyhow::Result<()> {
    let root = fresh_folder(&options.dir)?;
    let repository = root.join("repository");
    std::fs::create_dir(&repository)?;

    say(&format!("Making a machine with two disks under {}", root.display()));
    let mut machine = Machine::create(&root.join("vm"))?;
    let server = Server::start(&root.join("hub")).await?;
    let client = server.client()?;
    introduce(&client, &machine, &repository).await?;

    say("Full backup");
    let full = back_up(&client, BackupType::Full).await?;
    let before = keep_copies(&machine, &root.join("vm-at-full")).await?;

    let changed = machine.change()?;
    say(&format!("Changed {} on both disks; incremental backup", HumanBytes(changed)));
    let incremental = back_up(&client, BackupType::Incremental).await?;

    say("Comparing both points with the disks, byte for byte");
    let mut points = Vec::new();
    for (backup, disks) in [(&full, &before), (&incremental, &machine.disks())] {
        for (disk, raw) in backup.disks.iter().zip(disks.iter()) {
            let bytes = compare::with_layer(raw, &repository, Path::new(&disk.path)).await?;
            points.push(format!(
                "  {} disk {}: {} equal",
                kind(backup),
                disk.disk_index,
                HumanBytes(bytes)
            ));
        }
    }
    say(&points.join("\n"));

    let target = root.join("restored.raw");
    restore(&client, &incremental, &target).await?;
    let bytes = compare::with_file(&machine.disks()[0], &target).await?;
    machine::check_file_system(&target)?;
    say(&format!(
        "Restored disk 0 to {}: {} equal, its file system is clean",
        target.display(),
        HumanBytes(bytes)
    ));

    say(&format!("\n{}\n", table(&[&full, &incremental])));
    let ratio = percent(sent(&incremental), sent(&full));
    say(&format!("The incremental sent {ratio} of what the full did.\n"));
    server.stop().await?;
    say(&whats_next(&options.dir, &incremental));
    Ok(())
}

/// An empty folder; what is there already is only replaced where it is an earlier demonstration's.
fn fresh_folder(dir: &Path) -> anyhow::Result<PathBuf> {
    if dir.exists() {
        if !dir.join(MARK).exists() && std::fs::read_dir(dir)?.next().is_some() {
            bail!("{} holds something else; name another folder by --dir", dir.display());
        }
        let data = dir.join("hub");
        if data.exists() {
            // A hub may serve what the last demonstration left.
            let _lock = crate::hub::data::open(&data).with_context(|| {
                format!(
                    "{} is in use: stop that hub, or name another folder by --dir",
                    data.display()
                )
            })?;
        }
        std::fs::remove_dir_all(dir)?;
    }
    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    std::fs::write(dir.join(MARK), "made by `sendense-hub demo`, and replaced by the next one\n")?;
    Ok(dir.canonicalize()?)
}

/// Tells the hub of the repository and the machine.
async fn introduce(client: &Client, machine: &Machine, repository: &Path) -> anyhow::Result<()> {
    let wish = AddRepository {
        name: REPOSITORY.to_owned(),
        kind: RepositoryType::Local,
        path: repository.display().to_string(),
    };
    let _: RepositoryView = client.post("/repositories", &wish).await?;
    let disk = |path: &PathBuf| AddDisk {
        source: format!("file:{}", path.display()),
        key: None,
        capacity_bytes: None,
    };
    let disks = machine.disks().iter().map(disk).collect();
    let vm = AddVm { name: VM.to_owned(), agent: AgentKind::Local, disks };
    let _: VmView = client.post("/vms", &vm).await?;
    Ok(())
}

/// Runs a backup to its end.
async fn back_up(client: &Client, backup_type: BackupType) -> anyhow::Result<BackupView> {
    let wish = StartBackup { vm_name: VM.to_owned(), repository_id: None, backup_type };
    let started: StartedBackup = client.post("/backups", &wish).await?;
    let backup = waiting::backup(client, &started.backup_id).await?;
    if backup.summary.status != Status::Completed {
        let reason = backup.summary.error_message.unwrap_or_default();
        bail!("the {backup_type} backup ended as {}: {reason}", backup.summary.status);
    }
    Ok(backup)
}

/// Copies the disks as they are now, holes left out.
async fn keep_copies(machine: &Machine, folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    std::fs::create_dir(folder)?;
    let mut copies = Vec::new();
    for disk in machine.disks() {
        let name = disk.file_name().context("a disk has a name")?;
        let target = folder.join(name);
        let device = block::RawDevice::open(&disk, true).await?;
        copy::copy(device, &target, |_, _| {}).await.map_err(anyhow::Error::msg)?;
        copies.push(target);
    }
    Ok(copies)
}

/// Restores disk 0 of a backup to a raw file.
async fn restore(client: &Client, backup: &BackupView, target: &Path) -> anyhow::Result<()> {
    let target = target.display().to_string();
    let wish = StartRestore { disk_index: 0, target, overwrite: false };
    let path = format!("/backups/{}/restore", segment(&backup.summary.backup_id));
    let started: RestoreView = client.post(&path, &wish).await?;
    let ended = waiting::restore(client, started).await?;
    if ended.status != Status::Completed {
        bail!("the restore ended as {}: {}", ended.status, ended.error_message.unwrap_or_default());
    }
    Ok(())
}

fn kind(backup: &BackupView) -> String {
    backup.summary.backup_type.to_string()
}

fn sent(backup: &BackupView) -> u64 {
    backup.disks.iter().map(|disk| disk.bytes_transferred).sum()
}

fn percent(part: u64, whole: u64) -> String {
    let tenths = (part * 1000).checked_div(whole).unwrap_or(0);
    format!("{}.{} %", tenths / 10, tenths % 10)
}

/// What each backup read, sent and stored, disk by disk and in all.
fn table(backups: &[&BackupView]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["BACKUP", "DISK", "SIZE", "READ", "SENT", "STORED", "SENT / FULL", "TIME"]);
    let full: Vec<u64> = backups[0].disks.iter().map(|disk| disk.bytes_transferred).collect();
    for backup in backups {
        for (disk, full) in backup.disks.iter().zip(&full) {
            let mut row = vec![kind(backup), disk.disk_index.to_string()];
            row.extend(figures(std::slice::from_ref(disk), *full));
            table.add_row(row);
        }
        let mut row = vec![kind(backup), "all".to_owned()];
        row.extend(figures(&backup.disks, full.iter().sum()));
        row.push(took(backup));
        table.add_row(row);
    }
    table
}

fn figures(disks: &[DiskView], full: u64) -> Vec<String> {
    let sum = |figure: fn(&DiskView) -> u64| disks.iter().map(figure).sum::<u64>();
    let bytes = |bytes: u64| HumanBytes(bytes).to_string();
    vec![
        bytes(sum(|disk| disk.capacity_bytes)),
        bytes(sum(|disk| disk.bytes_read)),
        bytes(sum(|disk| disk.bytes_transferred)),
        bytes(sum(|disk| disk.stored_bytes)),
        percent(sum(|disk| disk.bytes_transferred), full),
    ]
}

fn took(backup: &BackupView) -> String {
    let (from, to) = (backup.summary.started_at, backup.summary.completed_at);
    let Some((from, to)) = from.zip(to) else { return String::new() };
    let spent = std::time::Duration::try_from(to.duration_since(from)).unwrap_or_default();
    if spent.as_secs() < 60 {
        format!("{:.1} s", spent.as_secs_f64())
    } else {
        HumanDuration(spent).to_string()
    }
}

/// Where things lie, and the commands that look at them.
fn whats_next(dir: &Path, newest: &BackupView) -> String {
    let dir = dir.display();
    let program = std::env::current_exe().ok();
    let folder = program.as_deref().and_then(Path::parent).unwrap_or(Path::new("")).display();
    let layer = newest.disks.first().map(|disk| disk.path.as_str()).unwrap_or_default();
    format!(
        "Everything is under {dir}/: the disks in vm/, as they were at the full in vm-at-full/, the chains in\n\
         repository/, the hub's database in hub/.\n\n\
         Serve the REST interface on http://127.0.0.1:8082 :\n  \
         {folder}/sendense-hub serve --data {dir}/hub\n\
         and ask it, from another terminal:\n  \
         {folder}/sendense-ctl --token-file {dir}/hub/admin.token backup chain --vm {VM}\n\
         Serve the newest point of disk 0 over NBD:\n  \
         {folder}/nbd-server --listen 127.0.0.1:10809 --export disk={layer},read-only"
    )
}
