//! What a run tells while it goes on, as values that serialise to tagged JSON. Who listens, and how it is shown, is
//! not decided here.

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::{DiskReport, RunReport};

/// How many events wait for a slow listener before progress is left out and the rest waits.
const QUEUE_EVENTS: usize = 1024;

/// The end of the queue that a listener reads.
pub type EventReceiver = mpsc::Receiver<Event>;

/// Something that happened. JSON: an object whose `event` names the variant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// Source and target of a disk are open and fit each other.
    DiskStarted {
        /// The place of the disk.
        disk_index: u32,
        /// The key of the disk.
        disk_key: i64,
        /// The source as it is spelled.
        source: String,
        /// The size of the disk.
        capacity_bytes: u64,
        /// Whether only changes are sent.
        incremental: bool,
    },
    /// A disk got further. Rate-limited; left out where the listener is slow.
    Progress {
        /// The place of the disk.
        disk_index: u32,
        /// The key of the disk.
        disk_key: i64,
        /// How much of the disk has been decided about, holes included.
        bytes_done: u64,
        /// The size of the disk.
        bytes_total: u64,
        /// Read from the source so far.
        read_bytes: u64,
        /// Written to the target as data so far.
        data_bytes_sent: u64,
        /// Written to the target as zero ranges so far.
        zero_bytes_sent: u64,
    },
    /// Something went otherwise than asked for; the run goes on.
    Warning {
        /// The disk that it is about, if one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        disk_index: Option<u32>,
        /// What, in words.
        message: String,
    },
    /// A disk is complete, and durable on the target.
    DiskFinished {
        /// What became of it.
        report: DiskReport,
    },
    /// All disks are complete.
    RunFinished {
        /// What became of them.
        report: RunReport,
    },
    /// The run ended early.
    RunFailed {
        /// Why, in words.
        error: String,
    },
}

/// Where a run tells its events. A listener that is gone is no error.
#[derive(Clone, Debug)]
pub struct EventSender {
    queue: mpsc::Sender<Event>,
}

/// A bounded queue of events. The receiver must be read (or dropped), else the run waits for it in the end.
pub fn event_channel() -> (EventSender, EventReceiver) {
    let (queue, receiver) = mpsc::channel(QUEUE_EVENTS);
    (EventSender { queue }, receiver)
}

impl EventSender {
    /// A sender that nobody listens to.
    pub fn discard() -> Self {
        event_channel().0
    }

    /// Tells an event that must not be lost: waits for room.
    pub(crate) async fn tell(&self, event: Event) {
        // A listener that went away does not want to know.
        let _ = self.queue.send(event).await;
    }

    /// Tells an event that a later one replaces: left out where there is no room.
    pub(crate) fn tell_if_room(&self, event: Event) {
        let _ = self.queue.try_send(event);
    }
}
