//! Sources of changed extents and their streaming over NBD. Placeholder text, replaced below.

mod address;
mod cancel;
mod error;
mod event;
mod job;
mod run;
mod source_spec;

pub use address::Address;
pub use cancel::CancelToken;
pub use error::{AgentError, Cause, DiskId};
pub use event::{Event, EventReceiver, EventSender, event_channel};
pub use job::{
    DEFAULT_CONNECTIONS, DEFAULT_DISKS_AT_ONCE, DEFAULT_EXTENT_BYTES, DiskJob, DiskReport,
    RunOptions, RunReport, SourceInfo, Target,
};
pub use run::{probe, run};
pub use source_spec::{SourceSpec, SpecError};
