//! What each command asks of the hub and which exit code its answer means.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail};
use serde::Serialize;

use super::client::{Client, segment};
use super::{BackupCommand, Cli, Command, Output, RepositoryCommand, VmCommand, show, waiting};
use crate::api::{
    AddDisk, AddRepository, AddVm, BackupList, BackupView, ChainView, ChangeVm, RepositoryList,
    RepositoryView, RestoreView, StartBackup, StartRestore, StartedBackup, VmList, VmView,
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
            let disks = disks.iter().map(|spec| disk(spec, agent)).collect::<Result<_, _>>()?;
            let vm: VmView = client.post("/vms", &AddVm { name, agent, disks }).await?;
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
            let disks = disks.iter().map(|spec| disk(spec, vm.agent)).collect::<Result<_, _>>()?;
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
            start(client, output, vm, backup_type, repository, no_wait).await
        }
        BackupCommand::List { vm } => {
            let query: Vec<_> = vm.iter().map(|vm| ("vm_name", vm.as_str())).collect();
            let list: BackupList = client.get("/backups", &query).await?;
            print(output, &list, |list| show::backups(&list.backups))
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

async fn start(
    client: &Client,
    output: Output,
    vm_name: String,
    backup_type: BackupType,
    repository_id: Option<String>,
    no_wait: bool,
) -> anyhow::Result<ExitCode> {
    let wish = StartBackup { vm_name, repository_id, backup_type };
    let started: StartedBackup = client.post("/backups", &wish).await?;
    if no_wait {
        return print(output, &started, |started| started.backup_id.clone());
    }
    let ended = waiting::backup(client, &started.backup_id).await?;
    print(output, &ended, show::backup)?;
    outcome(ended.summary.status, ended.summary.error_message.as_deref())
}

/// The exit code of something that was waited for.
fn outcome(status: Status, error: Option<&str>) -> anyhow::Result<ExitCode> {
    match status {
        Status::Completed => Ok(ExitCode::SUCCESS),
        status => bail!("{status}: {}", error.unwrap_or("without a reason")),
    }
}

fn print<T: Serialize>(
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

/// Reads `SOURCE[,key=NUMBER][,size=BYTES]`. Only these endings are options: a comma may be part of a path.
fn disk(spec: &str, agent: AgentKind) -> anyhow::Result<AddDisk> {
    let (mut source, mut key, mut capacity_bytes) = (spec, None, None);
    while let Some((rest, last)) = source.rsplit_once(',') {
        match last.split_once('=') {
            Some(("key", number)) if key.is_none() => {
                key = Some(number.parse().with_context(|| format!("--disk {spec}: key"))?);
            }
            Some(("size", number)) if capacity_bytes.is_none() => {
                capacity_bytes =
                    Some(number.parse().with_context(|| format!("--disk {spec}: size"))?);
            }
            _ => break,
        }
        source = rest;
    }
    let source = match source.strip_prefix("file:") {
        // The hub may run in another directory; an external agent's paths are its own.
        Some(path) if agent == AgentKind::Local => format!("file:{}", absolute(Path::new(path))?),
        _ => source.to_owned(),
    };
    Ok(AddDisk { source, key, capacity_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_may_name_its_key_and_size_and_have_commas_in_its_path() {
        let found = disk("file:/a,b=c,size=5,key=2016", AgentKind::Local).unwrap();
        assert_eq!(found.source, "file:/a,b=c");
        assert_eq!((found.key, found.capacity_bytes), (Some(2016), Some(5)));
        let plain = disk("nbd://h:1/e?bitmap=b", AgentKind::External).unwrap();
        assert_eq!((plain.key, plain.capacity_bytes), (None, None));
        assert!(disk("file:/a,size=big", AgentKind::Local).is_err());
    }
}
