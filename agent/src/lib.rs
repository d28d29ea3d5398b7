//! Sources of changed extents and their streaming over NBD: what the `sendense-agent` program runs and the hub embeds.
//! It writes to whatever NBD server it is pointed at; what is stored there, and how, is not known here.
//!
//! A [`run`] sends the disks of one machine, several at once. Each disk goes the same way: the source's extents tell
//! what has to be read; what was read is told apart into blocks of 64 KiB, each of them zeros or data with a digest;
//! a merge-join with the digests of the previous state decides what the target must be told; neighbours that need the
//! same become one request. Memory is bounded, whatever the size of the disk.
//!
//! What a disk held is remembered under a [`ChangeId`], which the caller keeps and hands back with the next run. The
//! agent never trusts a baseline that it cannot verify: it sends everything instead, and says why
//! ([`DiskReport::full_reason`]).
//!
//! ```no_run
//! use agent::{CancelToken, DiskJob, RunOptions, event_channel, run};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let disk = DiskJob {
//!     index: 0,
//!     key: 2000,
//!     source: "file:/dev/vg0/mail-snapshot".parse()?,
//!     target: "nbd://backup.example:10808/mail-disk0".parse()?,
//!     previous_change_id: None, // What the last report said: only changes are sent.
//!     full: false,
//! };
//! let (events, mut told) = event_channel();
//! let telling = tokio::spawn(async move {
//!     while let Some(event) = told.recv().await {
//!         println!("{event:?}");
//!     }
//! });
//! let options = RunOptions::new("/var/lib/sendense/agent", "job-17");
//! let report = run(vec![disk], options, events, CancelToken::new()).await?;
//! telling.await?;
//! println!("keep {} for the next run", report.disks[0].change_id);
//! # Ok(())
//! # }
//! ```

mod blocks;
mod budget;
mod cancel;
mod change_id;
mod coalesce;
mod compare;
mod digest_file;
mod disk;
mod error;
mod event;
mod job;
mod ledger;
mod outline;
mod pipeline;
mod plan;
mod progress;
mod run;
mod source;
mod source_spec;
mod sweep;
mod tls;
mod walk;

pub use cancel::CancelToken;
pub use change_id::{ChangeId, ChangeIdError, StateId};
pub use digest_file::DigestError;
pub use error::{AgentError, Cause, DiskId};
pub use event::{Event, EventReceiver, EventSender, event_channel};
pub use job::{
    DEFAULT_CONNECTIONS, DEFAULT_DISKS_AT_ONCE, DEFAULT_EXTENT_BYTES, DiskJob, DiskReport,
    RunOptions, RunReport, SourceInfo, Target,
};
pub use nbd_server::client::Address;
pub use run::{probe, run};
pub use source_spec::{SourceSpec, SpecError};
pub use tls::Tls;
