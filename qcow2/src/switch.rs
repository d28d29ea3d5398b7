//! Bringing a changed header to disk: the stages that the header names, with a sync behind each. What changes, and
//! that nothing else happens to the image meanwhile, is the caller's.

use block::{Hold, HostError, HostFile};

use crate::error::Error;
use crate::header::{Header, Stages};

/// Turns the header on disk, which is `old`, into `new`, durably.
///
/// # Errors
/// What [`Header::rewrite`] refuses, before anything is written; [`Error::Host`], after which the header on disk is the
/// old one or the new one.
pub(crate) async fn switch_header(
    file: &HostFile,
    old: &Header,
    new: &mut Header,
) -> Result<(), Error> {
    let stages = old.rewrite(new).map_err(|fault| fault.of(file.path()))?;
    Ok(write_stages(file, stages, &None).await?)
}

/// Performs the steps of [`Header::rewrite`]. `hold` stays with every write.
pub(crate) async fn write_stages(
    file: &HostFile,
    stages: Stages,
    hold: &Hold,
) -> Result<(), HostError> {
    for stage in stages {
        for write in stage {
            file.write(write.at.0, write.bytes.into(), hold.clone()).await?;
        }
        file.sync().await?;
    }
    Ok(())
}
