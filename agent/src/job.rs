//! What a run is asked to do and what it reports afterwards. Values only: no I/O.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::blocks::BLOCK_BYTES;
use crate::source_spec::{parse_nbd_uri, write_nbd_uri};
use crate::tls::Tls;
use crate::{Address, SourceSpec, SpecError};

/// How many connections a run opens to each target (and to each NBD source) unless told otherwise.
pub const DEFAULT_CONNECTIONS: usize = 4;

/// How many bytes one read of a source asks for, at most, unless told otherwise.
pub const DEFAULT_EXTENT_BYTES: u64 = 1 << 20;

/// The most that one read asks for, in bytes, whatever the options say.
const MAX_EXTENT_BYTES: u64 = 16 << 20;

/// How many disks of a run are read at once unless told otherwise.
pub const DEFAULT_DISKS_AT_ONCE: usize = 8;

/// The export that receives a disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// Where the server listens.
    pub address: Address,
    /// The export's name.
    pub export: String,
    /// TLS, where the URI demands it.
    pub tls: Option<Tls>,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_nbd_uri(f, &self.address, &self.export, self.tls.as_ref()).map(|_| ())
    }
}

impl FromStr for Target {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let mut uri = parse_nbd_uri(text)?;
        let tls = Tls::of(&mut uri);
        match uri.query.into_iter().next() {
            None => Ok(Self { address: uri.address, export: uri.export, tls }),
            Some((key, _)) => Err(SpecError::Parameter { text: text.to_owned(), key }),
        }
    }
}

/// One disk of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskJob {
    /// The place of the disk in its machine, from 0.
    pub index: u32,
    /// The machine's own key of the disk.
    pub key: i64,
    /// Where it is read from.
    pub source: SourceSpec,
    /// Where it is written to. Its size must be that of the source.
    pub target: Target,
    /// The change id of the state that the target's backing holds.
    pub previous_change_id: Option<String>,
    /// Send everything, whatever `previous_change_id` says.
    pub full: bool,
}

/// How a run is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunOptions {
    /// Where digest files live. Made if it is missing.
    pub state_dir: PathBuf,
    /// The job that the change ids will be recorded under; never empty.
    pub job_id: String,
    /// Connections to each target and to each NBD source.
    pub connections: usize,
    /// The most that one read asks for and one write sends, in bytes; taken as a power of two from
    /// 64 KiB to 16 MiB.
    pub extent_bytes: u64,
    /// Disks that are read at once; the others wait.
    pub disks_at_once: usize,
}

impl RunOptions {
    /// The defaults, for a job whose digest files live in `state_dir`.
    pub fn new(state_dir: impl Into<PathBuf>, job_id: impl Into<String>) -> Self {
        Self {
            state_dir: state_dir.into(),
            job_id: job_id.into(),
            connections: DEFAULT_CONNECTIONS,
            extent_bytes: DEFAULT_EXTENT_BYTES,
            disks_at_once: DEFAULT_DISKS_AT_ONCE,
        }
    }

    /// [`RunOptions::extent_bytes`] as a power of two that holds whole blocks and fits a request.
    pub(crate) fn extent_bytes_in_blocks(&self) -> u64 {
        self.extent_bytes.clamp(BLOCK_BYTES, MAX_EXTENT_BYTES).next_power_of_two()
    }
}

/// What became of one disk. All sizes are bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskReport {
    /// [`DiskJob::index`].
    pub disk_index: u32,
    /// [`DiskJob::key`].
    pub disk_key: i64,
    /// The source as it is spelled.
    pub source: String,
    /// The size of the disk.
    pub capacity_bytes: u64,
    /// Names the state that was sent; the `previous_change_id` of the next run.
    pub change_id: String,
    /// Whether only what changed since `previous_change_id` was sent.
    pub incremental: bool,
    /// Why everything was sent although a previous change id was given and no full was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_reason: Option<String>,
    /// Read from the source; holes are not read.
    pub read_bytes: u64,
    /// What the target was told about: data and zeros. On a full this is the capacity.
    pub changed_bytes: u64,
    /// Payload of the writes.
    pub data_bytes_sent: u64,
    /// Covered by write-zeroes requests, which have no payload.
    pub zero_bytes_sent: u64,
    /// Everything that went out on the target's sockets, headers included.
    pub wire_bytes: u64,
    /// How long it took, in milliseconds.
    pub elapsed_ms: u64,
}

/// What became of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunReport {
    /// [`RunOptions::job_id`].
    pub job_id: String,
    /// One report a disk, by index.
    pub disks: Vec<DiskReport>,
    /// What went otherwise than asked for; empty for a run without blemish.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// How long it took, in milliseconds.
    pub elapsed_ms: u64,
}

/// What a source is, before anything is read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceInfo {
    /// The size of the disk, in bytes.
    pub size_bytes: u64,
    /// Whether the dirty bitmap that the source names is there; `None` where it names none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bitmap_offered: Option<bool>,
    /// Whether a file begins like a qcow2 image: then its raw bytes are hardly what is meant to be backed up.
    #[serde(default)]
    pub looks_like_qcow2: bool,
}
