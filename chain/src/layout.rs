//! Where things lie in a repository, as text:
//! `ctx-{vm}-{time}/disk-{n}/backup-{vm}-{time}-{full|incr}.qcow2` and a manifest beside each layer. No file is touched
//! here.

use std::ffi::OsStr;
use std::fmt;
use std::ops::Deref;
use std::path::{Component, Path, PathBuf};

use jiff::Timestamp;

use crate::error::PathRule;
use crate::names::{LayerKind, compact_timestamp, encode_component};

/// What the name of a layer ends in.
pub(crate) const LAYER_SUFFIX: &str = ".qcow2";

/// What a manifest's name has more than its layer's.
pub(crate) const MANIFEST_SUFFIX: &str = ".json";

/// The lease of the process that works on a repository.
pub(crate) const LEASE_NAME: &str = ".sendense-lease";

/// The longest name of a layer, in bytes: its manifest's temporary file must still fit into the 255 of a file system.
pub const MAX_NAME_BYTES: usize = 240;

/// The path of a layer below the root of its repository: plain names, three of them.
///
/// Whoever holds one knows that joining it to a root cannot leave the root, links aside (those are refused where files
/// are opened).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerPath {
    context: String,
    disk: String,
    file: String,
    whole: PathBuf,
}

impl LayerPath {
    /// The path of a full layer: in a context directory of its own time.
    pub fn full(context: &str, disk_index: u32, timestamp: Timestamp) -> Self {
        let directory =
            format!("ctx-{}-{}", encode_component(context), compact_timestamp(timestamp));
        let file = file_name(context, timestamp, LayerKind::Full);
        Self::assemble(directory, format!("disk-{disk_index}"), file)
    }

    /// The path of an incremental layer: beside its parent.
    pub fn beside(parent: &LayerPath, context: &str, timestamp: Timestamp) -> Self {
        let file = file_name(context, timestamp, LayerKind::Incremental);
        Self::assemble(parent.context.clone(), parent.disk.clone(), file)
    }

    /// Reads a path below the root.
    ///
    /// # Errors
    /// The [`PathRule`] that it breaks.
    pub fn parse(path: &Path) -> Result<Self, PathRule> {
        let mut parts = Vec::new();
        for component in path.components() {
            match component {
                Component::Normal(part) => parts.push(plain(part)?),
                Component::RootDir | Component::Prefix(_) => return Err(PathRule::Outside),
                Component::CurDir | Component::ParentDir => return Err(PathRule::NotPlain),
            }
        }
        let [context, disk, file] = parts.as_slice() else { return Err(PathRule::Shape) };
        if !is_context_name(context) || !is_disk_name(disk) || !is_layer_name(file) {
            return Err(PathRule::Shape);
        }
        Ok(Self::assemble((*context).to_owned(), (*disk).to_owned(), (*file).to_owned()))
    }

    fn assemble(context: String, disk: String, file: String) -> Self {
        let whole = Path::new(&context).join(&disk).join(&file);
        Self { context, disk, file, whole }
    }

    /// Another layer in the same directory.
    pub(crate) fn sibling(&self, file: &str) -> Result<Self, PathRule> {
        Self::parse(&Path::new(&self.context).join(&self.disk).join(file))
    }

    /// The name of the context directory.
    pub fn context_directory(&self) -> &str {
        &self.context
    }

    /// The name of the disk directory.
    pub fn disk_directory(&self) -> &str {
        &self.disk
    }

    /// The name of the file, which is also how a child names it as its backing file.
    pub fn file_name(&self) -> &str {
        &self.file
    }

    /// The name of the manifest beside it.
    pub fn manifest_name(&self) -> String {
        manifest_name(&self.file)
    }
}

impl Deref for LayerPath {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.whole
    }
}

impl AsRef<Path> for LayerPath {
    fn as_ref(&self) -> &Path {
        &self.whole
    }
}

impl fmt::Display for LayerPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.context, self.disk, self.file)
    }
}

/// The name of the manifest of the layer `file`.
pub(crate) fn manifest_name(file: &str) -> String {
    format!("{file}{MANIFEST_SUFFIX}")
}

/// Whether `name` is one that a layer may have.
pub(crate) fn is_layer_name(name: &str) -> bool {
    name.len() > LAYER_SUFFIX.len()
        && name.len() <= MAX_NAME_BYTES
        && name.ends_with(LAYER_SUFFIX)
        && !name.starts_with('.')
        && !name.contains(['/', '\0'])
}

/// Whether `name` is one that a context directory may have.
pub(crate) fn is_context_name(name: &str) -> bool {
    name.strip_prefix("ctx-").is_some_and(|rest| !rest.is_empty())
}

/// Whether `name` is one that a disk directory may have.
pub(crate) fn is_disk_name(name: &str) -> bool {
    let Some(digits) = name.strip_prefix("disk-") else { return false };
    digits.parse::<u32>().is_ok_and(|index| index.to_string() == digits)
}

fn file_name(context: &str, timestamp: Timestamp, kind: LayerKind) -> String {
    let (vm, time) = (encode_component(context), compact_timestamp(timestamp));
    format!("backup-{vm}-{time}-{}{LAYER_SUFFIX}", kind.suffix())
}

fn plain(part: &OsStr) -> Result<&str, PathRule> {
    let part = part.to_str().ok_or(PathRule::NotText)?;
    if part.contains('\0') {
        return Err(PathRule::NotText);
    }
    if part.len() > MAX_NAME_BYTES {
        return Err(PathRule::TooLong { limit: MAX_NAME_BYTES });
    }
    Ok(part)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use proptest::prelude::*;

    use super::*;
    use crate::names::parse_timestamp;

    fn at(text: &str) -> Timestamp {
        parse_timestamp(text).unwrap()
    }

    #[test]
    fn layers_of_a_chain_lie_in_the_directory_of_their_full() {
        let full = LayerPath::full("web 01", 2, at("20251007T143022"));
        assert_eq!(
            full.to_string(),
            "ctx-web%2001-20251007T143022/disk-2/backup-web%2001-20251007T143022-full.qcow2"
        );
        let child = LayerPath::beside(&full, "web 01", at("20251008T020000"));
        assert_eq!(
            child.to_string(),
            "ctx-web%2001-20251007T143022/disk-2/backup-web%2001-20251008T020000-incr.qcow2"
        );
        assert_eq!(child.manifest_name(), "backup-web%2001-20251008T020000-incr.qcow2.json");
    }

    #[test]
    fn paths_that_leave_the_root_or_have_another_shape_are_refused() {
        for (path, rule) in [
            ("/ctx-a/disk-0/b.qcow2", PathRule::Outside),
            ("../ctx-a/disk-0/b.qcow2", PathRule::NotPlain),
            ("ctx-a/../disk-0/b.qcow2", PathRule::NotPlain),
            ("ctx-a/disk-0/../../x.qcow2", PathRule::NotPlain),
            ("./ctx-a/disk-0/b.qcow2", PathRule::NotPlain),
            ("", PathRule::Shape),
            ("ctx-a/disk-0", PathRule::Shape),
            ("ctx-a/disk-0/c/b.qcow2", PathRule::Shape),
            ("ctx-/disk-0/b.qcow2", PathRule::Shape),
            ("etc/disk-0/b.qcow2", PathRule::Shape),
            ("ctx-a/disk-01/b.qcow2", PathRule::Shape),
            ("ctx-a/disk-+1/b.qcow2", PathRule::Shape),
            ("ctx-a/disk-4294967296/b.qcow2", PathRule::Shape),
            ("ctx-a/disk-0/.qcow2", PathRule::Shape),
            ("ctx-a/disk-0/.b.qcow2", PathRule::Shape),
            ("ctx-a/disk-0/b.qcow2.json", PathRule::Shape),
            ("ctx-a/disk-0/b\0.qcow2", PathRule::NotText),
        ] {
            assert_eq!(LayerPath::parse(Path::new(path)), Err(rule), "{path:?}");
        }
        let raw = OsStr::from_bytes(b"ctx-a/disk-0/\xff.qcow2");
        assert_eq!(LayerPath::parse(Path::new(raw)), Err(PathRule::NotText));
        let long = format!("ctx-a/disk-0/{}.qcow2", "x".repeat(MAX_NAME_BYTES));
        let limit = PathRule::TooLong { limit: MAX_NAME_BYTES };
        assert_eq!(LayerPath::parse(Path::new(&long)), Err(limit));
    }

    proptest! {
        #[test]
        fn every_planned_path_reads_back(
            context in "\\PC{0,200}", disk: u32, second in 0_i64..253_000_000_000, later in 0_i64..253_000_000_000,
        ) {
            let moment = |second| Timestamp::from_second(second).unwrap();
            let full = LayerPath::full(&context, disk, moment(second));
            prop_assert_eq!(LayerPath::parse(&full), Ok(full.clone()));
            let child = LayerPath::beside(&full, &context, moment(later));
            prop_assert_eq!(LayerPath::parse(&child), Ok(child.clone()));
            prop_assert_eq!(full.parent(), child.parent());
            prop_assert_ne!(full, child);
        }

        #[test]
        fn a_path_that_is_read_never_leaves_the_root(
            path in "[a-z./\\-0-9]{0,30}|ctx-[a./]{1,9}/disk-0/[a./]{1,9}\\.qcow2",
        ) {
            if let Ok(layer) = LayerPath::parse(Path::new(&path)) {
                prop_assert!(layer.components().all(|c| matches!(c, Component::Normal(_))));
                prop_assert_eq!(layer.components().count(), 3);
            }
        }
    }
}
