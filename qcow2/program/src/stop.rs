//! SIGINT, SIGTERM and SIGHUP: the first ends the work in order, the second at once. What "in order" means is up to each
//! command.

use std::fmt;

use anyhow::Context;
use tokio::signal::unix::{Signal, SignalKind, signal};
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
        let is = |kind: SignalKind| self.signal == kind.as_raw_value();
        let name = if is(SignalKind::interrupt()) {
            "SIGINT"
        } else if is(SignalKind::hangup()) {
            "SIGHUP"
        } else {
            "SIGTERM"
        };
        write!(f, "stopped by {name}")
    }
}

impl std::error::Error for Interrupted {}

impl Stop {
    /// Begins to watch, on a thread of its own: whoever asks twice is heard even where all others are gone or hang.
    ///
    /// # Errors
    /// Where the system refuses to report signals, or has no thread left.
    pub(crate) fn watch() -> anyhow::Result<Self> {
        let cannot = "cannot watch for signals";
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
        let runtime = runtime.context(cannot)?;
        let signals = {
            let _inside = runtime.enter();
            Signals::new().context(cannot)?
        };
        let (sender, receiver) = watch::channel(None);
        let thread = std::thread::Builder::new().name("signals".to_owned());
        thread.spawn(move || runtime.block_on(signals.tell(&sender))).context(cannot)?;
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

    /// Refuses to go on once a signal has come: for work that must not be dropped in the middle of a step.
    ///
    /// # Errors
    /// [`Interrupted`].
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        match *self.signal.borrow() {
            Some(signal) => Err(Interrupted { signal }.into()),
            None => Ok(()),
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

/// The signals that end the program.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    /// None where it was ignored from the beginning: whoever starts it by nohup means it to outlive the terminal.
    hangup: Option<Signal>,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        let hangup = (!ignores_hangup()).then(|| signal(SignalKind::hangup()));
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: hangup.transpose()?,
        })
    }

    /// Tells the first, and ends the process at the second.
    async fn tell(mut self, to: &watch::Sender<Option<i32>>) {
        loop {
            let kind = tokio::select! {
                biased;
                _ = self.interrupt.recv() => SignalKind::interrupt(),
                _ = self.terminate.recv() => SignalKind::terminate(),
                () = received(self.hangup.as_mut()) => SignalKind::hangup(),
            };
            let number = kind.as_raw_value();
            if to.borrow().is_some() {
                // Whoever asks twice does not want to wait for order.
                std::process::exit(128 + number);
            }
            to.send_replace(Some(number));
        }
    }
}

/// Waits for a signal; for ever where there is nothing to wait for.
async fn received(signal: Option<&mut Signal>) {
    match signal {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}

/// Whether SIGHUP was ignored when the program began.
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    is_ignored(&status, SignalKind::hangup().as_raw_value())
}

/// Whether a process whose status the kernel tells so ignores a signal: bit 0 of the mask stands for signal 1.
fn is_ignored(status: &str, signal: i32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    u32::try_from(signal - 1)
        .ok()
        .and_then(|bit| mask.checked_shr(bit))
        .is_some_and(|it| it & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_of_a_process_tells_what_it_ignores() {
        let status = "Name:\tqcow2\nSigIgn:\t0000000000001001\nSigCgt:\t00000000ffffffff\n";
        assert!(is_ignored(status, 1) && is_ignored(status, 13));
        assert!(!is_ignored(status, 2) && !is_ignored(status, 15));
        assert!(!is_ignored("", 1) && !is_ignored(status, 0) && !is_ignored(status, 70));
    }
}
