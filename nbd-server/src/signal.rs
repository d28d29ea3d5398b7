//! A flag that is raised once and can be waited for. What follows from it is up to who waits.

use tokio::sync::watch;

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
}
