//! Answers as tables for people. Names come from elsewhere: what could move the cursor or change colours is escaped.

use std::collections::HashSet;
use std::fmt::Write;
use std::time::Duration;

use comfy_table::{Table, presets};
use indicatif::{HumanBytes, HumanDuration};
use jiff::Timestamp;

use crate::api::{
    BackupSummary, BackupView, ChainView, DiskView, RepositoryView, RestoreView, VmView,
};
use crate::model::{BackupType, Level, Status};

/// A text without control characters.
pub(super) fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => plain.push('\n'),
            c if c.is_control() => plain.extend(c.escape_unicode()),
            c => plain.push(c),
        }
    }
    plain
}

fn table(columns: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(columns);
    table
}

fn line(text: &str) -> String {
    plain(text).replace('\n', "\\n")
}

fn bytes(bytes: u64) -> String {
    HumanBytes(bytes).to_string()
}

fn time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%S").to_string()
}

pub(super) fn vms(vms: &[VmView]) -> String {
    let mut table = table(&["NAME", "AGENT", "DISK", "KEY", "SOURCE", "SIZE"]);
    for vm in vms {
        for (at, disk) in vm.disks.iter().enumerate() {
            let name = if at == 0 { line(&vm.name) } else { String::new() };
            let agent = if at == 0 { vm.agent.to_string() } else { String::new() };
            table.add_row([
                name,
                agent,
                disk.disk_index.to_string(),
                disk.key.to_string(),
                line(&disk.source),
                disk.capacity_bytes.map_or_else(|| "-".to_owned(), bytes),
            ]);
        }
    }
    table.to_string()
}

pub(super) fn repositories(repositories: &[RepositoryView]) -> String {
    let mut table = table(&["NAME", "TYPE", "PATH", "SIZE", "FREE", "STATE"]);
    for one in repositories {
        let size = |size: Option<u64>| size.map_or_else(|| "-".to_owned(), bytes);
        table.add_row([
            line(&one.name),
            one.kind.to_string(),
            line(&one.path),
            size(one.total_bytes),
            size(one.available_bytes),
            one.message.as_deref().map_or_else(|| "online".to_owned(), line),
        ]);
    }
    table.to_string()
}

/// What a backup holds: what was asked for, unless every disk became a full.
fn held(asked: BackupType, all_full: bool) -> String {
    match asked {
        BackupType::Full => asked.to_string(),
        asked if all_full => format!("{} (asked: {asked})", BackupType::Full),
        asked => asked.to_string(),
    }
}

fn all_full(disks: &[DiskView]) -> bool {
    !disks.is_empty() && disks.iter().all(|disk| disk.kind == BackupType::Full)
}

/// A list; `fulls` names those whose disks are all fulls.
pub(super) fn backups(backups: &[BackupSummary], fulls: &HashSet<String>) -> String {
    let mut table =
        table(&["BACKUP", "VM", "TYPE", "STATUS", "CREATED (UTC)", "SIZE", "SENT", "NOTE"]);
    for one in backups {
        table.add_row([
            line(&one.backup_id),
            line(&one.vm_name),
            held(one.backup_type, fulls.contains(&one.backup_id)),
            one.status.to_string(),
            time(one.created_at),
            bytes(one.total_bytes),
            bytes(one.bytes_transferred),
            one.error_message.as_deref().map(line).unwrap_or_default(),
        ]);
    }
    table.to_string()
}

/// The lines that name a backup and say how it stands.
fn heading(view: &BackupView) -> String {
    let one = &view.summary;
    format!(
        "{}\n{} backup of {}: {}{}\n",
        line(&one.backup_id),
        held(one.backup_type, all_full(&view.disks)),
        line(&one.vm_name),
        one.status,
        took(one.started_at, one.completed_at)
    )
}

/// What came out of a backup that was waited for: short, without the log. Why it failed is told on standard error.
pub(super) fn ended(view: &BackupView) -> String {
    let mut table = table(&["DISK", "KIND", "SIZE", "READ", "SENT", "STORED", "NOTE"]);
    for disk in &view.disks {
        table.add_row([
            disk.disk_index.to_string(),
            disk.kind.to_string(),
            bytes(disk.capacity_bytes),
            bytes(disk.bytes_read),
            bytes(disk.bytes_transferred),
            bytes(disk.stored_bytes),
            disk.full_reason.as_deref().map(line).unwrap_or_default(),
        ]);
    }
    match view.summary.status {
        Status::Completed => format!("{}{table}", heading(view)),
        // Nothing of its disks is left.
        _ => heading(view),
    }
}

/// Everything about a backup.
pub(super) fn backup(view: &BackupView) -> String {
    let one = &view.summary;
    let mut text = heading(view);
    // Writing into a String does not fail.
    if one.status.is_active() {
        let _ = writeln!(
            text,
            "step {}, {:.1} %, {}/s",
            view.step.as_deref().unwrap_or("waiting"),
            view.progress.percent,
            bytes(view.progress.bytes_per_second)
        );
    }
    let logged = |error: &str| {
        view.events.iter().any(|event| event.level == Level::Error && event.message.contains(error))
    };
    if let Some(error) = one.error_message.as_deref().filter(|error| !logged(error)) {
        let _ = writeln!(text, "{}", line(error));
    }
    if !view.disks.is_empty() {
        let _ = writeln!(text, "{}", disks(&view.disks));
    }
    for event in &view.events {
        let _ = writeln!(
            text,
            "{} {:10} {} {}",
            time(event.at),
            event.step.as_deref().unwrap_or("-"),
            event.level,
            line(&event.message)
        );
    }
    text
}

fn disks(disks: &[DiskView]) -> Table {
    let mut table = table(&[
        "DISK",
        "KEY",
        "KIND",
        "STATUS",
        "SIZE",
        "READ",
        "SENT",
        "STORED",
        "CHANGE ID",
        "NOTE",
    ]);
    for disk in disks {
        table.add_row([
            disk.disk_index.to_string(),
            disk.disk_key.to_string(),
            disk.kind.to_string(),
            disk.status.to_string(),
            bytes(disk.capacity_bytes),
            bytes(disk.bytes_read),
            bytes(disk.bytes_transferred),
            bytes(disk.stored_bytes),
            disk.change_id.as_deref().map(line).unwrap_or_default(),
            disk.full_reason.as_deref().map(line).unwrap_or_default(),
        ]);
    }
    table
}

pub(super) fn chain(chain: &ChainView) -> String {
    let mut table =
        table(&["#", "BACKUP", "TYPE", "CREATED (UTC)", "DISKS", "SIZE", "SENT", "STORED", "ON"]);
    for (at, link) in chain.backups.iter().enumerate() {
        let one = &link.summary;
        table.add_row([
            (at + 1).to_string(),
            line(&one.backup_id),
            held(one.backup_type, all_full(&link.disks)),
            time(one.created_at),
            link.disks.len().to_string(),
            bytes(one.total_bytes),
            bytes(one.bytes_transferred),
            bytes(link.stored_bytes),
            one.parent_backup_id.as_deref().map_or_else(|| "-".to_owned(), line),
        ]);
    }
    format!(
        "{table}\n{} backups of {}, {} stored",
        chain.total_backups,
        line(&chain.vm_name),
        bytes(chain.total_stored_bytes)
    )
}

pub(super) fn restore(view: &RestoreView) -> String {
    format!(
        "{} disk {} to {}: {}{}\n{} of data",
        line(&view.backup_id),
        view.disk_index,
        line(&view.target),
        view.status,
        took(Some(view.created_at), view.completed_at),
        bytes(view.data_bytes)
    )
}

/// How long it took, where it has begun and ended.
fn took(from: Option<Timestamp>, to: Option<Timestamp>) -> String {
    let (Some(from), Some(to)) = (from, to) else { return String::new() };
    let millis = to.duration_since(from).as_millis().max(0);
    match u64::try_from(millis) {
        Ok(millis) if millis < 10_000 => format!(" in {millis} ms"),
        Ok(millis) => format!(" in {}", HumanDuration(Duration::from_millis(millis))),
        Err(_) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_steer_the_terminal() {
        assert_eq!(line("a\u{1b}[31m\nb"), "a\\u{1b}[31m\\nb");
        assert_eq!(plain("ü\n"), "ü\n");
    }
}
