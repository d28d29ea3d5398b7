//! What may be added: the rules for names, disks and their sources, before anything is stored.

use jiff::Timestamp;

use super::{MAX_DISKS, MAX_NAME_BYTES};
use crate::db::{ChangedDisk, NewVm, NewVmDisk};
use crate::error::HubError;
use crate::model::{AgentKind, Vm, VmDisk};
use crate::{api, names};

/// Checks a virtual machine before it is stored.
pub(super) fn vm(wish: api::AddVm) -> Result<NewVm, HubError> {
    let invalid = |text: String| Err(HubError::Invalid(text));
    name("a virtual machine", &wish.name)?;
    if wish.disks.is_empty() || wish.disks.len() > MAX_DISKS {
        return invalid(format!("a virtual machine has 1 to {MAX_DISKS} disks"));
    }
    let mut disks: Vec<NewVmDisk> = Vec::with_capacity(wish.disks.len());
    for (index, disk) in wish.disks.into_iter().enumerate() {
        if disk.capacity_bytes.is_none() && wish.agent == AgentKind::External {
            return invalid(format!(
                "disk {index}: an external agent needs capacity_bytes (blockdev --getsize64 DEVICE shows it)"
            ));
        }
        one_disk(index, &disk)?;
        let key = disk.key.unwrap_or(2000 + i64::try_from(index).unwrap_or(0));
        if disks.iter().any(|other| other.key == key) {
            return invalid(format!("disk {index}: another disk has the key {key}"));
        }
        disks.push(NewVmDisk { key, source: disk.source, capacity_bytes: disk.capacity_bytes });
    }
    let (context_id, now) = (names::fresh_id("vm"), Timestamp::now());
    Ok(NewVm { context_id, name: wish.name, agent: wish.agent, disks, now })
}

/// Checks what changed about a virtual machine, and says what its disks shall be.
pub(super) fn changed(vm: &Vm, wish: api::ChangeVm) -> Result<Vec<ChangedDisk>, HubError> {
    let invalid = |text: String| Err(HubError::Invalid(text));
    if wish.disks.is_empty() {
        return invalid("name the disks that changed".to_owned());
    }
    let mut changes: Vec<ChangedDisk> = Vec::with_capacity(wish.disks.len());
    for (place, disk) in wish.disks.into_iter().enumerate() {
        one_disk(place, &disk)?;
        let wanted = |known: &&VmDisk| match disk.key {
            Some(key) => known.key == key,
            None => usize::try_from(known.index) == Ok(place),
        };
        let Some(known) = vm.disks.iter().find(wanted) else {
            return invalid(match disk.key {
                Some(key) => format!("{:?} has no disk with the key {key}", vm.name),
                None => format!("{:?} has no disk {place}", vm.name),
            });
        };
        if changes.iter().any(|other| other.index == known.index) {
            return invalid(format!("disk {} is named twice", known.index));
        }
        changes.push(ChangedDisk {
            index: known.index,
            capacity_bytes: disk.capacity_bytes.or(known.capacity_bytes),
            starts_over: known.source != disk.source
                && (has_bitmap(&known.source) || has_bitmap(&disk.source)),
            source: disk.source,
        });
    }
    Ok(changes)
}

/// Whether changes are told by a bitmap, which says nothing about what another source held.
fn has_bitmap(source: &str) -> bool {
    matches!(source.parse(), Ok(agent::SourceSpec::Nbd { bitmap: Some(_), .. }))
}

/// Checks what every disk has to keep to.
fn one_disk(place: usize, disk: &api::AddDisk) -> Result<(), HubError> {
    let invalid = |text: String| Err(HubError::Invalid(format!("disk {place}: {text}")));
    let source: agent::SourceSpec = match disk.source.parse() {
        Ok(source) => source,
        Err(error) => return invalid(format!("{error}")),
    };
    if matches!(&source, agent::SourceSpec::File(path) if !path.is_absolute()) {
        return invalid(format!("{} needs an absolute path", disk.source));
    }
    match disk.capacity_bytes {
        Some(bytes) if bytes == 0 || i64::try_from(bytes).is_err() => {
            invalid(format!("{bytes} bytes is no size of a disk"))
        }
        _ => Ok(()),
    }
}

/// Names are any text, but one: a path segment `.` or `..` cannot be asked for, and a NUL ends names elsewhere.
pub(super) fn name(what: &str, name: &str) -> Result<(), HubError> {
    if name.is_empty() || name.len() > MAX_NAME_BYTES {
        return Err(HubError::Invalid(format!(
            "the name of {what} has 1 to {MAX_NAME_BYTES} bytes"
        )));
    }
    if name.contains('\0') || matches!(name, "." | "..") {
        return Err(HubError::Invalid(format!("{name:?} cannot be the name of {what}")));
    }
    Ok(())
}
