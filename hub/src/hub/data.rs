//! The data directory: made for its owner only, locked by the one hub that works in it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

use super::StartError;

/// Makes the data directory, for its owner only, and takes its lock.
pub(crate) fn open(data: &Path) -> Result<File, StartError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| StartError::Data { path, source }
    };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(data).map_err(failed(data))?;
    let mode = std::fs::metadata(data).map_err(failed(data))?.permissions().mode();
    if mode & 0o077 != 0 {
        tracing::warn!("{} may be entered by others than its owner; chmod 700 it", data.display());
    }
    let path = data.join("hub.lock");
    let lock = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(failed(&path))?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(StartError::InUse(data.to_owned())),
        Err(error) => Err(failed(&path)(error.into())),
    }
}
