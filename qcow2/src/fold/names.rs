//! The names that folding records. That a disk reads the same over what they lead to is seen to by the callers.

use std::path::{Component, Path, PathBuf};

use crate::backing::has_protocol;
use crate::change::ChangeError;
use crate::create::BackingName;
use crate::error::{Error, InvalidOption};
use crate::header::MAX_BACKING_NAME_BYTES;

/// Refuses names that no header takes, before anything is copied for them.
pub(super) fn check(file: &Path, backing: Option<&BackingName>) -> Result<(), Error> {
    let Some(BackingName { path, .. }) = backing else { return Ok(()) };
    if path.is_empty() || path.len() > MAX_BACKING_NAME_BYTES || path.contains('\0') {
        let what = InvalidOption::BackingName { len: path.len(), limit: MAX_BACKING_NAME_BYTES };
        return Err(Error::Invalid { file: file.to_owned(), what });
    }
    if has_protocol(path) {
        let what = ChangeError::Protocol(path.clone());
        return Err(Error::Change { file: file.to_owned(), what });
    }
    Ok(())
}

/// The way from the folder of the image `from` to the file `to`, so that both can be moved together. `None` where a
/// path cannot be resolved or is no text.
pub(super) fn relative(from: &Path, to: &Path) -> Option<String> {
    let from = std::fs::canonicalize(from).ok()?;
    let to = std::fs::canonicalize(to).ok()?;
    let folder = from.parent()?;
    let (here, there): (Vec<Component<'_>>, Vec<Component<'_>>) =
        (folder.components().collect(), to.components().collect());
    let shared = here.iter().zip(&there).take_while(|(a, b)| a == b).count();
    let up = here.iter().skip(shared).map(|_| Component::ParentDir);
    let path: PathBuf = up.chain(there.iter().skip(shared).copied()).collect();
    let path = path.to_str()?;
    // A colon must not make a protocol of a folder or a file.
    Some(if has_protocol(path) { format!("./{path}") } else { path.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_between_two_images_is_as_short_as_it_can_be() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        for name in ["top", "a/middle", "a/b/low", "a:b"] {
            std::fs::write(dir.path().join(name), b"").unwrap();
        }
        let way = |from: &str, to: &str| relative(&dir.path().join(from), &dir.path().join(to));
        assert_eq!(way("top", "a/b/low").as_deref(), Some("a/b/low"));
        assert_eq!(way("a/b/low", "top").as_deref(), Some("../../top"));
        assert_eq!(way("a/middle", "a/middle").as_deref(), Some("middle"));
        assert_eq!(way("a/middle", "nothing"), None);
        assert_eq!(way("top", "a:b").as_deref(), Some("./a:b"));
    }
}
