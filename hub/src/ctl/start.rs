//! `backup start`: the start, the wait, and what its end means for the exit code. The hub makes the backup: a waiter
//! that goes away changes nothing.

use std::process::ExitCode;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use super::client::{Client, segment};
use super::commands::{outcome, print};
use super::{EXIT_INTERRUPTED, EXIT_WARNINGS, Output, show, tell, waiting};
use crate::api::{BackupList, BackupView, EventView, StartBackup, StartedBackup, VmView};
use crate::model::{AgentKind, BackupType, Level, Status};

/// Starts a backup, and waits for its end unless told not to.
pub(super) async fn run(
    client: &Client,
    output: Output,
    wish: &StartBackup,
    no_wait: bool,
) -> anyhow::Result<ExitCode> {
    let started: StartedBackup = client.post("/backups", wish).await?;
    let mut interrupted = signal(SignalKind::interrupt()).context("signals")?;
    let id = &started.backup_id;
    tell(id);
    let waited = async {
        explain_agent(client, id, &wish.vm_name).await;
        match no_wait {
            true => Ok(None),
            false => waiting::backup(client, id).await.map(Some),
        }
    };
    let ended = tokio::select! {
        ended = waited => ended?,
        _ = interrupted.recv() => {
            tell(&format!("the backup goes on; stop it with: sendense-ctl backup cancel {id}"));
            return Ok(ExitCode::from(EXIT_INTERRUPTED));
        }
    };
    let Some(ended) = ended else {
        return print(output, &started, |started| started.backup_id.clone());
    };
    print(output, &ended, show::ended)?;
    let warnings = warnings(&ended, stands_on_chain(client, &ended).await);
    for warning in &warnings {
        tell(&format!("sendense-ctl: warning: {warning}"));
    }
    for error in other_errors(&ended) {
        tell(&format!("sendense-ctl: error: {error}"));
    }
    let code = outcome(ended.summary.status, ended.summary.error_message.as_deref())?;
    Ok(if warnings.is_empty() { code } else { ExitCode::from(EXIT_WARNINGS) })
}

/// Says what to run where the hub waits for an agent elsewhere.
async fn explain_agent(client: &Client, id: &str, vm_name: &str) {
    // Only a help: a hub that does not tell is met again by whoever waits.
    let vm: anyhow::Result<VmView> = client.get(&format!("/vms/{}", segment(vm_name)), &[]).await;
    if vm.is_ok_and(|vm| vm.agent == AgentKind::External) {
        tell(&format!(
            "waiting for its agent: sendense-agent migrate --job-id {id} --hub {}{}",
            client.base(),
            if client.has_token() { " --token-file FILE" } else { "" }
        ));
    }
}

/// Whether an incremental had something to stand on: an earlier backup of the virtual machine in the same repository.
/// Only asked where a disk fell back to a full.
async fn stands_on_chain(client: &Client, view: &BackupView) -> bool {
    let one = &view.summary;
    let fell_back =
        view.disks.iter().any(|disk| disk.kind == BackupType::Full && disk.full_reason.is_some());
    if one.status != Status::Completed || !fell_back {
        return false;
    }
    let query = [("vm_name", one.vm_name.as_str()), ("status", Status::Completed.as_str())];
    let list: anyhow::Result<BackupList> = client.get("/backups", &query).await;
    // Where the hub does not tell, a warning too many is the smaller mistake.
    list.map_or(true, |list| {
        list.backups.iter().any(|other| {
            other.backup_id != one.backup_id
                && other.repository_id == one.repository_id
                && other.created_at <= one.created_at
        })
    })
}

/// What did not go as it was asked for: warnings of the log, and disks that were sent whole although `on_chain` says
/// that there was something to stand on.
fn warnings(view: &BackupView, on_chain: bool) -> Vec<String> {
    let logged = view.events.iter().filter(|event| event.level == Level::Warning);
    let mut all: Vec<String> = logged.map(|event| event.message.clone()).collect();
    for disk in &view.disks {
        let Some(reason) = &disk.full_reason else { continue };
        let first_of_all = disk.kind == BackupType::Full && !on_chain;
        if !first_of_all && !all.iter().any(|told| told.contains(reason.as_str())) {
            all.push(format!("disk {}: everything was sent: {reason}", disk.disk_index));
        }
    }
    all
}

/// The errors of the log that the reason of the end does not tell.
fn other_errors(view: &BackupView) -> impl Iterator<Item = &str> {
    let told = view.summary.error_message.as_deref().unwrap_or_default();
    let is_new =
        move |event: &&EventView| event.level == Level::Error && !event.message.contains(told);
    view.events.iter().filter(is_new).map(|event| event.message.as_str())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn view(disks: &[(&str, Option<&str>)], events: &[(&str, &str)]) -> BackupView {
        let disks: Vec<_> = disks
            .iter()
            .enumerate()
            .map(|(index, (kind, reason))| {
                json!({"disk_index": index, "disk_key": 2000, "source": null, "kind": kind, "full": *kind == "full",
                    "full_reason": reason, "status": "completed", "parent_backup_id": null, "change_id": null,
                    "previous_change_id": null, "capacity_bytes": 1, "path": "", "export_name": "", "bytes_done": 1,
                    "bytes_transferred": 1, "bytes_read": 1, "stored_bytes": 1})
            })
            .collect();
        let at = "2026-01-01T00:00:00Z";
        let events: Vec<_> = events
            .iter()
            .map(|(level, text)| json!({"id": 1, "at": at, "step": null, "level": level, "message": text}))
            .collect();
        serde_json::from_value(json!({"backup_id": "b", "vm_name": "v", "backup_type": "incremental",
            "status": "failed", "repository_id": "r", "parent_backup_id": null, "change_id": null,
            "bytes_transferred": 0, "total_bytes": 1, "error_message": "because", "created_at": at,
            "started_at": at, "completed_at": at, "step": null, "progress": crate::api::ProgressView::default(),
            "nbd": null, "disks": disks, "events": events}))
        .unwrap()
    }

    #[test]
    fn the_first_backup_may_be_a_full_without_a_warning_but_a_later_one_may_not() {
        let first = view(&[("full", Some("nothing there"))], &[("info", "began")]);
        assert_eq!(warnings(&first, false), Vec::<String>::new());
        assert_eq!(warnings(&first, true), ["disk 0: everything was sent: nothing there"]);
    }

    #[test]
    fn a_layer_that_was_sent_whole_and_every_warning_of_the_log_count_once() {
        let events = [("warning", "disk 0: everything is sent: lost"), ("error", "because")];
        let one = view(&[("incremental", Some("lost")), ("incremental", None)], &events);
        assert_eq!(warnings(&one, true), ["disk 0: everything is sent: lost"]);
        let silent = view(&[("incremental", Some("lost"))], &[]);
        assert_eq!(warnings(&silent, false), ["disk 0: everything was sent: lost"]);
    }

    #[test]
    fn the_reason_of_a_failure_is_no_second_error() {
        let one = view(&[], &[("error", "failed: because"), ("error", "and more")]);
        assert_eq!(other_errors(&one).collect::<Vec<_>>(), ["and more"]);
    }
}
