//! What each command asks of the hub and which exit code its answer means.

use std::collections::HashSet;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail};
use serde::Serialize;

use super::client::{Client, segment};
use super::disk_spec::DiskSpec;
use super::{
    BackupCommand, Cli, Command, Output, RepositoryCommand, Usage, VmCommand, show, start, tell,
    waiting,
};
use crate::api::{
    AddDisk, AddRepository, AddVm, BackupList, BackupSummary, BackupView, ChainView, ChangeVm,
    RepositoryList, RepositoryView, RestoreView, StartBackup, StartRestore, StartedBackup, VmList,
    VmView,
};
use crate::model::{AgentKind, BackupType, RepositoryType, Status};

/// Runs a command.
///
/// # Errors
/// What the hub refused, or why it was not reached, in words that say what to do.
pub(super) async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let client = Client::new(&cli.global)?;
    let output = cli.global.output;
    match cli.command {
        Command::Vm(command) => vm(&client, output, command).await,
        Command::Repository(command) => repository(&client, output, command).await,
        Command::Backup(command) => backup(&client, output, command).await,
    }
}

async fn vm(client: &Client, output: Output, command: VmCommand) -> anyhow::Result<ExitCode> {
    match command {
        VmCommand::Add { name, disks, agent } => {
            let agent = agent.into();
            let unsized_disk = disks.iter().position(|spec| spec.size_bytes.is_none());
            if let (AgentKind::External, Some(at)) = (agent, unsized_disk) {
                return Err(Usage(format!(
                    "disk {at}: the hub cannot see how large it is: add ,size=BYTES (blockdev --getsize64 DEVICE shows it)"
                ))
                .into());
            }
            let disks = all_disks(disks, agent)?;
            let vm: VmView = client.post("/vms", &AddVm { name, agent, disks }).await?;
            for warning in &vm.warnings {
                tell(&format!("sendense-ctl: warning: {warning}"));
            }
            print(output, &vm, |vm| show::vms(std::slice::from_ref(vm)))
        }
        VmCommand::List => {
            let list: VmList = client.get("/vms", &[]).await?;
            print(output, &list, |list| show::vms(&list.vms))
        }
        VmCommand::Show { name } => {
            let vm: VmView = client.get(&format!("/vms/{}", segment(&name)), &[]).await?;
            print(output, &vm, |vm| show::vms(std::slice::from_ref(vm)))
        }
        VmCommand::Update { name, disks } => {
            let path = format!("/vms/{}", segment(&name));
            // Who reads the disks decides what a relative path means.
            let vm: VmView = client.get(&path, &[]).await?;
            let disks = all_disks(disks, vm.agent)?;
            let vm: VmView = client.patch(&path, &ChangeVm { disks }).await?;
            print(output, &vm, |vm| show::vms(std::slice::from_ref(vm)))
        }
        VmCommand::Delete { name } => {
            client.delete(&format!("/vms/{}", segment(&name))).await?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn repository(
    client: &Client,
    output: Output,
    command: RepositoryCommand,
) -> anyhow::Result<ExitCode> {
    match command {
        RepositoryCommand::Add { name, path } => {
            let wish = AddRepository { name, kind: RepositoryType::Local, path: absolute(&path)? };
            let repository: RepositoryView = client.post("/repositories", &wish).await?;
            print(output, &repository, |one| show::repositories(std::slice::from_ref(one)))
        }
        RepositoryCommand::List => {
            let list: RepositoryList = client.get("/repositories", &[]).await?;
            print(output, &list, |list| show::repositories(&list.repositories))
        }
    }
}

async fn backup(
    client: &Client,
    output: Output,
    command: BackupCommand,
) -> anyhow::Result<ExitCode> {
    match command {
        BackupCommand::Start { vm, backup_type, repository, wait: _, no_wait } => {
            let (vm_name, backup_type) = (vm, backup_type.into());
            let wish = StartBackup { vm_name, repository_id: repository, backup_type };
            start::run(client, output, &wish, no_wait).await
        }
        BackupCommand::List { vm } => {
            let query: Vec<_> = vm.iter().map(|vm| ("vm_name", vm.as_str())).collect();
            let list: BackupList = client.get("/backups", &query).await?;
            let fulls = match output {
                Output::Table => fallen_back(client, &list.backups).await,
                Output::Json => HashSet::new(),
            };
            print(output, &list, |list| show::backups(&list.backups, &fulls))
        }
        BackupCommand::Show { id } => {
            let view: BackupView = client.get(&format!("/backups/{}", segment(&id)), &[]).await?;
            print(output, &view, show::backup)
        }
        BackupCommand::Chain { vm } => {
            let chain: ChainView = client.get("/backup/chain", &[("vm_name", &vm)]).await?;
            print(output, &chain, show::chain)
        }
        BackupCommand::Restore { backup_id, disk, target, overwrite } => {
            let wish = StartRestore { disk_index: disk, target: absolute(&target)?, overwrite };
            let path = format!("/backups/{}/restore", segment(&backup_id));
            let started: RestoreView = client.post(&path, &wish).await?;
            let ended = waiting::restore(client, started).await?;
            print(output, &ended, show::restore)?;
            outcome(ended.status, ended.error_message.as_deref())
        }
        BackupCommand::Cancel { id } => {
            let path = format!("/backups/{}/cancel", segment(&id));
            let started: StartedBackup = client.post(&path, &()).await?;
            print(output, &started, |started| format!("{}: {}", started.backup_id, started.message))
        }
        BackupCommand::Delete { id } => {
            client.delete(&format!("/backups/{}", segment(&id))).await?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// The exit code of something that was waited for.
pub(super) fn outcome(status: Status, error: Option<&str>) -> anyhow::Result<ExitCode> {
    match status {
        Status::Completed => Ok(ExitCode::SUCCESS),
        status => bail!("{status}: {}", error.unwrap_or("without a reason")),
    }
}

pub(super) fn print<T: Serialize>(
    output: Output,
    value: &T,
    table: impl FnOnce(&T) -> String,
) -> anyhow::Result<ExitCode> {
    use std::io::Write;
    let text = match output {
        Output::Table => table(value),
        Output::Json => serde_json::to_string_pretty(value)?,
    };
    match writeln!(std::io::stdout(), "{}", text.trim_end()) {
        // A reader that has seen enough is not an error.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// A path as the hub needs it.
fn absolute(path: &Path) -> anyhow::Result<String> {
    let absolute = std::path::absolute(path)
        .with_context(|| format!("{} cannot be made an absolute path", path.display()))?;
    let text = absolute.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok(text.to_owned())
}

/// The disks as the hub needs them.
fn all_disks(disks: Vec<DiskSpec>, agent: AgentKind) -> anyhow::Result<Vec<AddDisk>> {
    disks.into_iter().enumerate().map(|(at, spec)| disk(at, spec, agent)).collect()
}

/// A disk as the hub needs it.
fn disk(at: usize, spec: DiskSpec, agent: AgentKind) -> anyhow::Result<AddDisk> {
    let DiskSpec { source, key, size_bytes } = spec;
    let source = match source.strip_prefix("file:") {
        // The hub may run in another directory; an external agent's paths are its own.
        Some(path) if agent == AgentKind::Local && !path.is_empty() => {
            format!("file:{}", absolute(Path::new(path))?)
        }
        _ => source,
    };
    if let Err(error) = source.parse::<agent::SourceSpec>() {
        return Err(Usage(format!("disk {at}: {error}")).into());
    }
    Ok(AddDisk { source, key, capacity_bytes: size_bytes })
}

/// Which of these were asked for as incrementals and hold only fulls. One without a parent may: its disks tell.
async fn fallen_back(client: &Client, backups: &[BackupSummary]) -> HashSet<String> {
    let mut fulls = HashSet::new();
    for one in backups {
        let may = one.status == Status::Completed
            && one.backup_type == BackupType::Incremental
            && one.parent_backup_id.is_none();
        if !may {
            continue;
        }
        let path = format!("/backups/{}", segment(&one.backup_id));
        // One that was deleted meanwhile is shown as the list tells it.
        let Ok(view) = client.get::<BackupView>(&path, &[]).await else { continue };
        if !view.disks.is_empty() && view.disks.iter().all(|disk| disk.kind == BackupType::Full) {
            fulls.insert(one.backup_id.clone());
        }
    }
    fulls
}
