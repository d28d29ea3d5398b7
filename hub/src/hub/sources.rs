//! A look at the sources of a new virtual machine, as far as the hub can see them. A source that is not there yet is
//! worth a warning and no more: it may come later.

use std::path::Path;
use std::time::Duration;

use agent::{SourceInfo, SourceSpec};

use crate::db::{NewVm, NewVmDisk};
use crate::error::{HubError, describe};
use crate::model::AgentKind;

/// How long a look may take, in all: a lost network file system answers late or never.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);

/// The size of a sector, in bytes: disks end at one.
const SECTOR_BYTES: u64 = 512;

/// Looks at the files that the hub itself will read; what is odd about them, in words.
///
/// # Errors
/// [`HubError::Invalid`] where a file has another size than was given for it, or is a container and no disk.
pub(super) async fn look(vm: &NewVm) -> Result<Vec<String>, HubError> {
    if vm.agent != AgentKind::Local {
        return Ok(Vec::new());
    }
    let look = async {
        let mut warnings = Vec::new();
        for (index, disk) in vm.disks.iter().enumerate() {
            warnings.extend(one(index, disk).await?);
        }
        Ok(warnings)
    };
    match tokio::time::timeout(LOOK_TIMEOUT, look).await {
        Ok(found) => found,
        Err(_) => Ok(vec!["the sources do not answer; nothing is known of them".to_owned()]),
    }
}

async fn one(index: usize, disk: &NewVmDisk) -> Result<Option<String>, HubError> {
    let Ok(SourceSpec::File(path)) = disk.source.parse() else { return Ok(None) };
    let info = match info_of(&path).await {
        Ok(info) => info,
        Err(why) => return Ok(Some(format!("disk {index}: {why}"))),
    };
    if info.looks_like_qcow2 {
        let path = path.display();
        return Err(HubError::Invalid(format!(
            "disk {index}: {path} is a qcow2 image, and file: reads raw disks; serve it (qemu-nbd --read-only \
             --format=qcow2, or nbd-server --export NAME={path},read-only) and name that nbd:// export. To keep its \
             raw bytes, serve it with format=raw"
        )));
    }
    match (info.size_bytes, disk.capacity_bytes) {
        (size, Some(given)) if size != given => Err(HubError::Invalid(format!(
            "disk {index}: {} has {size} bytes, not {given}; leave the size out",
            path.display()
        ))),
        (0, _) => Ok(Some(format!("disk {index}: {} is empty", path.display()))),
        (size, _) if !size.is_multiple_of(SECTOR_BYTES) => Ok(Some(format!(
            "disk {index}: {} has {size} bytes, which are no whole sectors of {SECTOR_BYTES}; grow it: \
             truncate -s %{SECTOR_BYTES} {}",
            path.display(),
            path.display()
        ))),
        _ => Ok(None),
    }
}

/// What a regular file or a block device is. Anything else is not opened: a pipe would wait for its other end.
async fn info_of(path: &Path) -> Result<SourceInfo, String> {
    use std::os::unix::fs::FileTypeExt;
    let metadata = tokio::fs::metadata(path).await;
    let kind = metadata.map_err(|error| format!("{}: {error}", path.display()))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(format!("{} is neither a regular file nor a block device", path.display()));
    }
    let found = agent::probe(&SourceSpec::File(path.to_owned())).await;
    found.map_err(|error| describe(&error))
}
