//! What may be added: the rules for names, disks and their sources, before anything is stored.

use jiff::Timestamp;

use super::{MAX_DISKS, MAX_NAME_BYTES};
use crate::db::{NewVm, NewVmDisk};
use crate::error::HubError;
use crate::model::AgentKind;
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
        let source: agent::SourceSpec = match disk.source.parse() {
            Ok(source) => source,
            Err(error) => return invalid(format!("disk {index}: {error}")),
        };
        if matches!(&source, agent::SourceSpec::File(path) if !path.is_absolute()) {
            return invalid(format!("disk {index}: {} needs an absolute path", disk.source));
        }
        match disk.capacity_bytes {
            None if wish.agent == AgentKind::External => {
                return invalid(format!("disk {index}: an external agent needs capacity_bytes"));
            }
            Some(bytes) if bytes == 0 || i64::try_from(bytes).is_err() => {
                return invalid(format!("disk {index}: {bytes} bytes is no size of a disk"));
            }
            _ => {}
        }
        let key = disk.key.unwrap_or(2000 + i64::try_from(index).unwrap_or(0));
        if disks.iter().any(|other| other.key == key) {
            return invalid(format!("disk {index}: another disk has the key {key}"));
        }
        disks.push(NewVmDisk { key, source: disk.source, capacity_bytes: disk.capacity_bytes });
    }
    let (context_id, now) = (names::fresh_id("vm"), Timestamp::now());
    Ok(NewVm { context_id, name: wish.name, agent: wish.agent, disks, now })
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
