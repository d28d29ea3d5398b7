//! Clients that leave, for those who wait for their places. How many places there are is kept by who gives them.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

/// Told of everybody who leaves.
#[derive(Debug, Default)]
pub(crate) struct Departures(watch::Sender<()>);

/// Somebody who leaves when this is dropped: what is dropped before is free then.
#[derive(Debug)]
pub(crate) struct Leaving(Arc<Departures>);

/// How long somebody waits for others to leave. Once it is used up, it stays so until [`Self::renew`].
#[derive(Debug, Default)]
pub(crate) struct Patience(Option<Instant>);

/// Sees who leaves from when it was made, or last looked at.
#[derive(Debug)]
pub(crate) struct Watch(watch::Receiver<()>);

impl Departures {
    /// Somebody is here, until what is returned is dropped.
    pub(crate) fn someone(self: &Arc<Self>) -> Leaving {
        Leaving(Arc::clone(self))
    }

    /// Somebody has left a place.
    pub(crate) fn tell(&self) {
        self.0.send_replace(());
    }

    pub(crate) fn watch(&self) -> Watch {
        Watch(self.0.subscribe())
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.tell();
    }
}

impl Watch {
    /// Everybody who left up to now is known.
    pub(crate) fn look(&mut self) {
        self.0.mark_unchanged();
    }

    /// Waits until somebody leaves; false where that takes longer than the patience lasts, which begins with the first
    /// wait.
    pub(crate) async fn wait(&mut self, patience: &mut Patience, at_most: Duration) -> bool {
        let until = *patience.0.get_or_insert_with(|| Instant::now() + at_most);
        // An error means that the server is gone.
        matches!(timeout_at(until, self.0.changed()).await, Ok(Ok(())))
    }
}

impl Patience {
    /// Lasts as long as at first.
    pub(crate) fn renew(&mut self) {
        self.0 = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_left_behind_the_last_look_is_not_missed_and_patience_is_for_all_waits_together() {
        let departures = Arc::new(Departures::default());
        let leave = || drop(departures.someone());
        let second = Duration::from_secs(1);
        let (mut watch, mut patience) = (departures.watch(), Patience::default());
        leave();
        assert!(watch.wait(&mut patience, second).await);
        leave();
        watch.look();
        assert!(!watch.wait(&mut patience, second).await);
        leave();
        watch.look();
        let begun = Instant::now();
        assert!(!watch.wait(&mut patience, second).await);
        assert_eq!(begun.elapsed(), Duration::ZERO, "it was used up");
        patience.renew();
        assert!(!watch.wait(&mut patience, second).await);
        assert_eq!(begun.elapsed(), second);
    }
}
