//! Files that a command makes or makes anew: they are locked while they grow, and new ones are removed again if the
//! command does not come to its end. What is written into them is the commands' business.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use block::{Create, HostFile, OpenOptions};

use crate::cache::Cache;
use crate::place::folder;

/// A file that is being made. Dropped before it is kept, it is removed if it is new: nobody shall take half an image
/// for a whole one. One that was there before stays, as for qemu-img: somebody else made it, and may know it by other
/// names.
pub(crate) struct Target {
    path: PathBuf,
    /// The file, by device and inode.
    id: Option<(u64, u64)>,
    kind: Kind,
    is_kept: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// It was not there before.
    New,
    /// A file that was there, and was emptied.
    Emptied,
    /// It holds what it held, where nothing is written.
    Device,
}

impl Target {
    /// Makes a file, or empties the one that is there. A block device is taken as it is. `sources` are the files, by
    /// device and inode, that the command still reads.
    ///
    /// # Errors
    /// A file that somebody else has open, that is one of the sources, or that is neither a regular file nor a block
    /// device.
    pub(crate) async fn make(
        path: &Path,
        cache: Cache,
        sources: &[(u64, u64)],
    ) -> anyhow::Result<(Self, HostFile)> {
        let cannot = || format!("{}: error while creating the image", path.display());
        let options = OpenOptions { direct: cache.direct, ..OpenOptions::creating() };
        match HostFile::open(path, options.clone()).await {
            Ok(file) => return Ok((Self::of(path, &file, Kind::New), file)),
            Err(error) if error.source.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(cannot),
        }
        let facts = std::fs::metadata(path).with_context(|| match std::fs::read_link(path) {
            Ok(to) => format!("{}: it is a link to {}", cannot(), to.display()),
            Err(_) => cannot(),
        })?;
        let is_device = facts.file_type().is_block_device();
        ensure!(
            facts.is_file() || is_device,
            "{}: it exists, and is neither a regular file nor a block device",
            cannot()
        );
        ensure!(
            !sources.contains(&(facts.dev(), facts.ino())),
            "{}: it is one of the images that are read",
            cannot()
        );
        let options = OpenOptions { create: Create::No, ..options };
        let file = HostFile::open(path, options).await.with_context(cannot)?;
        if is_device {
            return Ok((Self::of(path, &file, Kind::Device), file));
        }
        file.set_len(0).await.with_context(cannot)?;
        Ok((Self::of(path, &file, Kind::Emptied), file))
    }

    fn of(path: &Path, file: &HostFile, kind: Kind) -> Self {
        Self { path: path.to_owned(), id: file.id(), kind, is_kept: false }
    }

    /// Whether it was made, or made anew: a device holds what it held.
    pub(crate) fn is_new(&self) -> bool {
        self.kind != Kind::Device
    }

    /// Says that it is complete, and makes its name durable.
    ///
    /// # Errors
    /// Where its folder cannot be synced.
    pub(crate) fn keep(mut self) -> anyhow::Result<()> {
        self.is_kept = true;
        let folder = folder(&self.path);
        let synced = std::fs::File::open(folder).and_then(|folder| folder.sync_all());
        synced.with_context(|| format!("cannot make {} durable", folder.display()))
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.is_kept {
            return;
        }
        let path = self.path.display();
        match self.kind {
            Kind::New => {
                // Not what somebody has put in its place.
                let is_there = std::fs::symlink_metadata(&self.path);
                let is_there = is_there.is_ok_and(|now| Some((now.dev(), now.ino())) == self.id);
                if is_there && let Err(error) = std::fs::remove_file(&self.path) {
                    let text = format!("cannot remove {path}, which is incomplete: {error}");
                    crate::output::warn(&text);
                }
            }
            Kind::Emptied => crate::output::warn(&format!(
                "{path} was there before and stays: what it held is lost, and what it holds now is incomplete"
            )),
            Kind::Device => crate::output::warn(&format!("what {path} holds now is incomplete")),
        }
    }
}

/// How a file is recognised under any name: by device and inode.
pub(crate) fn file_id(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|facts| (facts.dev(), facts.ino()))
}
