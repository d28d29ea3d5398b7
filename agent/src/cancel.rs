//! A switch that asks a run to stop, shared by clones. It knows nothing of signals; programs connect those.

use std::sync::Arc;

use tokio::sync::watch;

/// Asks a run to stop. Clones share one state; it never goes back.
#[derive(Clone, Debug)]
pub struct CancelToken {
    switch: Arc<watch::Sender<bool>>,
}

impl CancelToken {
    /// A token that nobody has cancelled yet.
    pub fn new() -> Self {
        Self { switch: Arc::new(watch::Sender::new(false)) }
    }

    /// Asks everyone who holds a clone to stop. Doing so twice is fine.
    pub fn cancel(&self) {
        self.switch.send_replace(true);
    }

    /// Whether somebody asked to stop.
    pub fn is_cancelled(&self) -> bool {
        *self.switch.borrow()
    }

    /// Returns once somebody asked to stop; at once if that was earlier. May be dropped and called again.
    pub async fn cancelled(&self) {
        let mut receiver = self.switch.subscribe();
        // The sender lives in `self`, so that waiting can only end with the value.
        let _ = receiver.wait_for(|stop| *stop).await;
    }
}

impl Default for CancelToken {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn cancelling_wakes_who_waits_and_who_asks_later() {
        let token = CancelToken::new();
        let waiting = tokio::spawn({
            let token = token.clone();
            async move { token.cancelled().await }
        });
        assert!(!token.is_cancelled());
        token.cancel();
        waiting.await.unwrap();
        token.cancelled().await;
        assert!(token.is_cancelled());
    }
}
