//! How a client finds back to a server that it lost: how patiently, how often, and with how much to send again. Plain
//! numbers; who waits and what is sent is told in `links`.

use std::time::Duration;

/// How a client finds back to a server whose connections broke.
///
/// Requests without an answer are sent again: reads and questions about extents, and changes, which do the same twice.
/// What was answered and not flushed may be lost where the server died, though the client has been told that it is
/// done. So the client keeps such changes ([`Reconnect::unflushed_bytes`]) and makes them again, in their order, before
/// anything else is asked of the server that came back; nobody ever reads what was there before a change that was
/// answered. A connection that broke while another one proves that the server lives needs none of that: the server has
/// promised that a flush covers all connections.
///
/// The export must be the same as before, in size, flags, block sizes, contexts and headers. Where it is not, and where
/// a change cannot be made again, every later request fails: see [`ClientError::Gone`](super::ClientError::Gone).
///
/// # What it cannot know
/// A server that lives on behind a broken network may execute a request late: after the client has sent it again, got an
/// answer, and changed the same bytes once more. NBD has no means to call a request back. Where the network breaks more
/// often than the server, and the same bytes are changed again and again without a flush of the file system above, leave
/// it off. Two servers that take each other's place behind one address must show one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reconnect {
    /// How long requests wait until there is a connection again, before they fail.
    pub patience: Duration,
    /// The pause after a first attempt that failed; each further one is twice as long. The first attempt comes at once.
    pub first_delay: Duration,
    /// The longest pause between two attempts.
    pub longest_delay: Duration,
    /// How often one request is sent again before it fails: it may be what kills the server.
    pub resends: u32,
    /// The most memory, in bytes, for changes that were answered and not flushed; what is in flight comes on top. Beyond
    /// it a change waits for a flush of the client's own, and fails where that fails. They keep the buffers that they
    /// came in: it must be less than the pool that those are from.
    pub unflushed_bytes: u64,
}

impl Default for Reconnect {
    fn default() -> Self {
        Self {
            patience: Duration::from_secs(60),
            first_delay: Duration::from_millis(100),
            longest_delay: Duration::from_secs(5),
            resends: 16,
            unflushed_bytes: 64 << 20,
        }
    }
}

impl Reconnect {
    /// The pause before an attempt, when so many before it brought no answer.
    pub(super) fn delay(&self, failures: u32) -> Duration {
        match failures {
            0 => Duration::ZERO,
            _ => {
                let doubled = 1_u32.checked_shl(failures - 1).unwrap_or(u32::MAX);
                self.first_delay.saturating_mul(doubled).min(self.longest_delay)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest() {
        let policy = Reconnect::default();
        let delays: Vec<_> =
            [0, 1, 2, 3, 6, 7, 32, u32::MAX].map(|n| policy.delay(n).as_millis()).into();
        assert_eq!(delays, [0, 100, 200, 400, 3200, 5000, 5000, 5000]);
    }
}
