//! SIGINT and SIGTERM: the first ends the work in order, the second at once. What "in order" means is up to each
//! command.

use std::fmt;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Tells that the user wants the program to end.
#[derive(Clone)]
pub(crate) struct Stop {
    signal: watch::Receiver<Option<i32>>,
}

/// The error of work that a signal cut short.
#[derive(Debug)]
pub(crate) struct Interrupted {
    signal: i32,
}

impl Interrupted {
    /// What a shell expects of a program that this signal ended.
    pub(crate) fn exit_code(&self) -> u8 {
        u8::try_from(128 + self.signal).unwrap_or(u8::MAX)
    }
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = if self.signal == SignalKind::interrupt().as_raw_value() {
            "SIGINT"
        } else {
            "SIGTERM"
        };
        write!(f, "stopped by {name}")
    }
}

impl std::error::Error for Interrupted {}

impl Stop {
    /// Begins to watch.
    ///
    /// # Errors
    /// Where the system refuses to report signals.
    pub(crate) fn watch() -> anyhow::Result<Self> {
        let cannot = "cannot watch for signals";
        let mut interrupt = signal(SignalKind::interrupt()).context(cannot)?;
        let mut terminate = signal(SignalKind::terminate()).context(cannot)?;
        let (sender, receiver) = watch::channel(None);
        tokio::spawn(async move {
            loop {
                let kind = tokio::select! {
                    _ = interrupt.recv() => SignalKind::interrupt(),
                    _ = terminate.recv() => SignalKind::terminate(),
                };
                let number = kind.as_raw_value();
                if sender.borrow().is_some() {
                    // Whoever asks twice does not want to wait for order.
                    std::process::exit(128 + number);
                }
                sender.send_replace(Some(number));
            }
        });
        Ok(Self { signal: receiver })
    }

    /// Does `work` unless a signal comes first; then it is dropped where it stands.
    ///
    /// # Errors
    /// What the work failed at, or [`Interrupted`].
    pub(crate) async fn or<T, E>(
        &self,
        work: impl Future<Output = Result<T, E>>,
    ) -> anyhow::Result<T>
    where
        anyhow::Error: From<E>,
    {
        tokio::select! {
            done = work => Ok(done?),
            interrupted = self.requested() => Err(interrupted.into()),
        }
    }

    async fn requested(&self) -> Interrupted {
        let mut signal = self.signal.clone();
        loop {
            if let Some(signal) = *signal.borrow_and_update() {
                return Interrupted { signal };
            }
            if signal.changed().await.is_err() {
                // The watcher is gone with the runtime.
                std::future::pending::<()>().await;
            }
        }
    }
}
