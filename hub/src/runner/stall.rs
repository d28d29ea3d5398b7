//! Noticing that the agent in this process moves nothing any more: its source does not answer, and no error will ever say
//! so. Looks at counters only.

use std::time::Duration;

use tokio::time::Instant;

use super::disk::DiskWork;
use super::work::{Reason, Work};

/// How often the counters are looked at in the time that a stall takes to become one.
const LOOKS: u32 = 8;

/// The longest time between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Everything that moves while a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Marks {
    done: u64,
    read: u64,
    sent: u64,
    requests: u64,
    flushing: bool,
}

impl Work {
    /// Returns once nothing has moved for the hub's patience, with the reason. Never while a layer is being flushed: how
    /// long that takes is the repository's affair, and no sign of a dead source.
    pub(super) async fn stalled(&self) -> Reason {
        let patience = self.hub.config.stall_timeout;
        let every = (patience / LOOKS).clamp(Duration::from_millis(1), LOOK_EVERY);
        let (mut last, mut since) = (self.marks(), Instant::now());
        loop {
            tokio::time::sleep(every).await;
            let now = self.marks();
            if now != last || now.flushing {
                (last, since) = (now, Instant::now());
            } else if since.elapsed() >= patience {
                return self.stall(patience);
            }
        }
    }

    fn marks(&self) -> Marks {
        let sum = self.progress.sum();
        let exports = self.disks.iter().filter_map(|disk| disk.export.as_deref());
        let requests = exports.map(|export| self.hub.counters(export).requests).sum();
        let flushing = self.disks.iter().any(|disk| disk.fault.is_flushing());
        Marks { done: sum.done, read: sum.read, sent: sum.sent, requests, flushing }
    }

    fn stall(&self, patience: Duration) -> Reason {
        let unfinished = |disk: &&DiskWork| {
            self.progress.disk(disk.index).is_none_or(|progress| progress.done < progress.total)
        };
        let disks: Vec<_> = self
            .disks
            .iter()
            .filter(unfinished)
            .map(|disk| format!("{} ({})", disk.index, disk.source))
            .collect();
        format!(
            "nothing moved for {patience:?}: no answer from the source of disk {}",
            disks.join(", ")
        )
    }
}
