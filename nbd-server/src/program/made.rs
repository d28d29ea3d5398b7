//! Files that are made for exports, and taken away again where nothing comes of them. What is put into them is not known
//! here.

use std::fs::Metadata;
use std::path::PathBuf;

use block::{BlockDevice, RawDevice};

use super::images::FileId;
use super::options::ExportSpec;

/// What was made since the exports that are served last changed.
#[derive(Debug, Default)]
pub(super) struct Made(Vec<(PathBuf, FileId)>);

impl Made {
    /// Makes the raw image of an export where there is none and one is to be made.
    pub(super) async fn make(&mut self, spec: &ExportSpec) -> anyhow::Result<()> {
        let asked = spec.clone();
        let Some(bytes) = tokio::task::spawn_blocking(move || wanting(&asked)).await? else {
            return Ok(());
        };
        let device = RawDevice::create(&spec.path, bytes).await?;
        // A name that somebody else has taken by now is not ours to give back.
        if let Some(file) = id(std::fs::symlink_metadata(&spec.path)) {
            self.0.push((spec.path.clone(), file));
        }
        device.close().await?;
        tracing::info!(image = %spec.path.display(), bytes, "made an image");
        Ok(())
    }

    /// They stay.
    pub(super) fn keep(&mut self) {
        self.0.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for (path, file) in &self.0 {
            let is_ours = id(std::fs::symlink_metadata(path)).as_ref() == Some(file);
            match is_ours.then(|| std::fs::remove_file(path)) {
                Some(Ok(())) => {
                    tracing::info!(image = %path.display(), "removed the image that was made");
                }
                Some(Err(error)) => tracing::warn!("cannot remove {}: {error}", path.display()),
                None => {}
            }
        }
    }
}

fn id(metadata: std::io::Result<Metadata>) -> Option<FileId> {
    metadata.ok().as_ref().and_then(FileId::of)
}

/// The length, in bytes, of the image that is to be made for an export, if one is. Blocks.
pub(super) fn wanting(spec: &ExportSpec) -> Option<u64> {
    let is_missing = || matches!(spec.path.try_exists(), Ok(false));
    spec.makes_bytes.filter(|_| !spec.read_only && is_missing())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_made_goes_unless_it_is_kept_and_nothing_else_does() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let spec = |name: &str| ExportSpec {
            path: path(name),
            makes_bytes: Some(4096),
            ..ExportSpec::default()
        };
        std::fs::write(path("there"), "abc").unwrap();
        let mut made = Made::default();
        for name in ["there", "replaced", "goes"] {
            made.make(&spec(name)).await.unwrap();
        }
        assert_eq!(std::fs::metadata(path("goes")).unwrap().len(), 4096);
        std::fs::write(path("other"), "def").unwrap();
        std::fs::rename(path("other"), path("replaced")).unwrap();
        drop(made);
        assert!(!path("goes").exists());
        assert_eq!(std::fs::read(path("there")).unwrap(), b"abc");
        assert_eq!(std::fs::read(path("replaced")).unwrap(), b"def");
        let mut made = Made::default();
        made.make(&spec("stays")).await.unwrap();
        made.keep();
        drop(made);
        assert!(path("stays").exists());
        let unread = ExportSpec { read_only: true, ..spec("not made") };
        assert_eq!(wanting(&unread), None);
    }
}
