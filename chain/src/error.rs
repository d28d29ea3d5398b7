//! Why a repository refused or failed: one variant a rule, always with the file it is about. What is done about it
//! (a new full, a message, a retry) is the caller's business.

use std::io;
use std::path::{Path, PathBuf};

use uuid::Uuid;

/// Why an operation on a repository was refused or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host's file system failed.
    #[error("cannot {op} {}: {source}", path.display())]
    Host {
        /// What was asked of the host.
        op: FileOp,
        /// The file or directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A path that cannot be the path of a layer in this repository.
    #[error("{} is not the path of a layer: {rule}", path.display())]
    Path {
        /// The path as it was given.
        path: PathBuf,
        /// The rule it breaks.
        rule: PathRule,
    },
    /// A request for a layer that contradicts itself.
    #[error("a layer cannot be planned like this: {rule}")]
    Request {
        /// The rule it breaks.
        rule: RequestRule,
    },
    /// A manifest that cannot be believed.
    #[error("the manifest {} cannot be used: {rule}", file.display())]
    Manifest {
        /// The manifest.
        file: PathBuf,
        /// The rule it breaks.
        rule: ManifestRule,
    },
    /// A layer that is no longer what its manifest says.
    #[error("the layer {} is not what was sealed: {rule}", file.display())]
    Layer {
        /// The layer's file.
        file: PathBuf,
        /// What differs.
        rule: LayerRule,
    },
    /// A layer without a manifest: it was never finished, so it is neither a parent nor a point in time.
    #[error("the layer {} was never sealed: it has no manifest, so nothing may stand on it", file.display())]
    NotSealed {
        /// The layer's file.
        file: PathBuf,
    },
    /// A finished layer, where only an unfinished one may be removed.
    #[error("the layer {} is sealed (it has a manifest) and is not discarded", file.display())]
    Sealed {
        /// The layer's file.
        file: PathBuf,
    },
    /// A layer that another one stands on.
    #[error("the layer {} must stay: {child:?} stands on it", file.display())]
    HasChild {
        /// The layer's file.
        file: PathBuf,
        /// The name of a layer on it.
        child: String,
    },
    /// A layer that this process has open for writing.
    #[error("the layer {} is being written", file.display())]
    InUse {
        /// The layer's file.
        file: PathBuf,
    },
    /// A file that is already there; nothing is ever written over.
    #[error("{} exists already", file.display())]
    Exists {
        /// The file in the way.
        file: PathBuf,
    },
    /// The disk is smaller than it was: an incremental cannot say so.
    #[error(
        "the disk has {size_bytes} bytes, but had {parent_bytes} in {}: a disk that shrank needs a new full backup",
        parent.display()
    )]
    Shrunk {
        /// The parent's file.
        parent: PathBuf,
        /// The size of the disk in the parent.
        parent_bytes: u64,
        /// The size of the disk now.
        size_bytes: u64,
    },
    /// Another process works on this repository.
    #[error("the repository {} is in use by another hub ({holder}); two would write over each other", root.display())]
    Leased {
        /// The repository.
        root: PathBuf,
        /// What the holder wrote about itself.
        holder: String,
    },
    /// A repository that was opened for reading only.
    #[error("the repository {} was opened for reading", root.display())]
    ReadOnly {
        /// The repository.
        root: PathBuf,
    },
    /// An image that cannot be made or opened.
    #[error("cannot use the image {}: {source}", file.display())]
    Image {
        /// The layer's file.
        file: PathBuf,
        /// What the format says.
        #[source]
        source: Box<qcow2::Error>,
    },
    /// An image that failed while it was written or closed: what is in it cannot be trusted.
    #[error("the image {} failed, so it is not sealed: {source}", file.display())]
    Device {
        /// The layer's file.
        file: PathBuf,
        /// What failed.
        #[source]
        source: Box<block::DeviceError>,
    },
    /// More directories or files than a repository can hold by any plan of ours.
    #[error("{} holds more than {limit} entries", path.display())]
    TooMany {
        /// The directory.
        path: PathBuf,
        /// The most entries that are looked at.
        limit: usize,
    },
    /// The runtime was shut down before a file operation could run.
    #[error("the runtime stopped before a file operation was run")]
    Stopped,
}

/// What was asked of the host when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileOp {
    /// Opening a file or a directory.
    Open,
    /// Asking for size, kind or file system.
    Stat,
    /// Reading bytes or the entries of a directory.
    Read,
    /// Writing a small file.
    Write,
    /// Making a file or a directory durable.
    Sync,
    /// Renaming a finished file into place.
    Rename,
    /// Removing a file or a directory.
    Remove,
    /// Making a directory.
    MakeDirectory,
    /// Setting who may read and write.
    SetMode,
    /// Taking the lease.
    Lock,
}

impl std::fmt::Display for FileOp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::Stat => "stat",
            Self::Read => "read",
            Self::Write => "write",
            Self::Sync => "sync",
            Self::Rename => "rename",
            Self::Remove => "remove",
            Self::MakeDirectory => "make the directory",
            Self::SetMode => "set the mode of",
            Self::Lock => "lock",
        })
    }
}

impl FileOp {
    /// An error of this operation.
    pub(crate) fn failed(self, path: &Path, source: impl Into<io::Error>) -> Error {
        Error::Host { op: self, path: path.to_path_buf(), source: source.into() }
    }
}

/// The rules for the path of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PathRule {
    /// An absolute path outside the repository.
    #[error("it lies outside the repository")]
    Outside,
    /// `.`, `..`, or an empty part.
    #[error("it must go down by plain names only")]
    NotPlain,
    /// Text that is not UTF-8, or that holds a NUL.
    #[error("it is not UTF-8 text without NUL")]
    NotText,
    /// Another shape than `ctx-…/disk-N/….qcow2`.
    #[error("it has not the form ctx-…/disk-N/….qcow2")]
    Shape,
    /// A part longer than a file system takes.
    #[error("a part of it is longer than {limit} bytes")]
    TooLong {
        /// The most bytes a part may have.
        limit: usize,
    },
    /// A symbolic link on the way.
    #[error("a symbolic link or a file stands where a directory must be")]
    Link,
}

/// The rules for a [`crate::LayerRequest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestRule {
    /// A name or id without text, or with too much.
    #[error("{field} must have 1 to {limit} bytes")]
    Text {
        /// Which.
        field: &'static str,
        /// The most bytes.
        limit: usize,
    },
    /// A disk of no bytes.
    #[error("a disk of 0 bytes cannot be backed up")]
    NoBytes,
    /// A disk that ends inside a sector: QEMU would leave its last bytes out when it reads the layer.
    #[error(
        "a disk of {size_bytes} bytes does not end at a sector of 512 bytes, so QEMU could not read its end"
    )]
    HalfSector {
        /// The size of the disk.
        size_bytes: u64,
    },
    /// An incremental without a parent.
    #[error("an incremental layer needs a parent")]
    NoParent,
    /// A full with a parent.
    #[error("a full layer stands alone, without a parent")]
    ParentOfFull,
    /// A parent that belongs to another disk.
    #[error("the parent is a layer of disk {parent}, not of disk {wanted}")]
    OtherDisk {
        /// The parent's disk.
        parent: u32,
        /// The disk of the request.
        wanted: u32,
    },
    /// A parent that belongs to another virtual machine.
    #[error("the parent is a layer of another virtual machine")]
    OtherContext,
    /// A chain that would get longer than anything here reads.
    #[error("the chain has {limit} layers already: make a new full backup")]
    TooDeep {
        /// The most layers of a chain.
        limit: u32,
    },
}

/// The rules for a manifest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestRule {
    /// Longer than any manifest.
    #[error("it is longer than {limit} bytes")]
    TooLong {
        /// The most bytes.
        limit: usize,
    },
    /// Not the JSON that surrounds a layer's description.
    #[error("it is not a manifest: {0}")]
    NotJson(#[source] serde_json::Error),
    /// Written by a program that knows more.
    #[error("version {found} is unknown (this program reads version {})", crate::manifest::VERSION)]
    Version {
        /// The version in the file.
        found: u64,
    },
    /// Bytes that differ from what was written.
    #[error("its checksum is {recorded:?}, but its text has {computed:?}")]
    Checksum {
        /// What the file says.
        recorded: String,
        /// What its text gives.
        computed: String,
    },
    /// A description with a field that is missing or has the wrong shape.
    #[error("its description of the layer is wrong: {0}")]
    Fields(#[source] serde_json::Error),
    /// A description that lies beside another layer.
    #[error("it describes {recorded:?}")]
    OtherFile {
        /// The file that it names.
        recorded: String,
    },
    /// A parent outside the directory.
    #[error("the parent {recorded:?} is not the plain name of another file beside it")]
    ParentName {
        /// The name in the file.
        recorded: String,
    },
    /// Kind, parent and position in the chain contradict each other.
    #[error("kind, parent and sequence contradict each other")]
    Position,
}

/// What may differ between a layer and its manifest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayerRule {
    /// The file is gone, or was renamed.
    #[error("the file is missing")]
    Missing,
    /// Something else has the file's name.
    #[error("it is not a regular file")]
    NotAFile,
    /// The file is shorter or longer.
    #[error("the file has {found} bytes, not {recorded}")]
    Length {
        /// What the manifest says.
        recorded: u64,
        /// What is there.
        found: u64,
    },
    /// The image stands for another disk.
    #[error("the disk in it has {found} bytes, not {recorded}")]
    DiskSize {
        /// What the manifest or the plan says.
        recorded: u64,
        /// What is there.
        found: u64,
    },
    /// Other bytes in a part that is compared.
    #[error("its {part} is another one")]
    Content {
        /// Which part.
        part: &'static str,
    },
    /// The image names another backing file than the manifest.
    #[error("it stands on {found:?}, not on {recorded:?}")]
    Backing {
        /// What the manifest says.
        recorded: Option<String>,
        /// What is in the image.
        found: Option<String>,
    },
    /// Another layer, sealed as well, has the file's name.
    #[error("it is layer {found}, not {recorded}")]
    Identity {
        /// The layer that was there.
        recorded: Uuid,
        /// The layer that is there now.
        found: Uuid,
    },
    /// The layer below was replaced by another sealed one.
    #[error("its parent {parent:?} is layer {found}, not {recorded}")]
    ParentIdentity {
        /// The parent's file name.
        parent: String,
        /// The parent that it was made on.
        recorded: Uuid,
        /// The layer that is there now.
        found: Uuid,
    },
    /// The layer below does not fit: another disk, not earlier in the chain, or a larger disk.
    #[error("its parent {parent:?} {what}")]
    ParentMismatch {
        /// The parent's file name.
        parent: String,
        /// What does not fit.
        what: &'static str,
    },
}
