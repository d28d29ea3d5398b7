//! A flag that is raised once and can be waited for. What follows from it is up to who waits.

use tokio::sync::watch;
use tokio::task::unconstrained;

/// Raised once, never lowered. Clones are the same flag.
#[derive(Clone, Debug)]
pub(crate) struct Signal(watch::Sender<bool>);

impl Default for Signal {
    fn default() -> Self {
        Self(watch::Sender::new(false))
    }
}

impl Signal {
    /// Raises the flag; again does nothing.
    pub(crate) fn raise(&self) {
        self.0.send_replace(true);
    }

    /// Whether it is raised.
    pub(crate) fn is_raised(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits until it is raised.
    pub(crate) async fn raised(&self) {
        // An error would mean that the sender is gone, but `self` holds it.
        let _ = self.0.subscribe().wait_for(|raised| *raised).await;
    }

    /// The outcome of `part`; `None` where the flag is raised while it waits.
    pub(crate) async fn bounds<T>(&self, part: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            // What needs no waiting is done even then.
            biased;
            done = part => Some(done),
            // A part that is always busy must not use up what the task may do at a time.
            () = unconstrained(self.raised()) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_raised_flag_bounds_what_waits_or_is_always_busy_and_nothing_else() {
        let signal = Signal::default();
        assert_eq!(signal.bounds(async { 1 }).await, Some(1));
        signal.raise();
        assert_eq!(signal.bounds(async { 2 }).await, Some(2));
        assert_eq!(signal.bounds(std::future::pending::<()>()).await, None);
        let busy = async {
            loop {
                tokio::task::consume_budget().await;
            }
        };
        assert_eq!(signal.bounds::<()>(busy).await, None);
    }
}
