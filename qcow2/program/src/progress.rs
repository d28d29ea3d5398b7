//! Progress of long work: a bar with rate and remaining time on a terminal, lines that scripts know otherwise. Nothing
//! here decides how far the work is.

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;
use tokio::signal::unix::{SignalKind, signal};

/// Tells the user how far the work is.
#[derive(Clone)]
pub(crate) struct Progress {
    state: Arc<State>,
}

struct State {
    show: Show,
    done: AtomicU64,
    total: AtomicU64,
}

enum Show {
    /// Only who asks.
    Nothing,
    /// A bar on standard error.
    Bar(ProgressBar),
    /// `(12.34/100%)` on standard output; in it the hundredths of a percent that were last written.
    Lines { step: u64, last: Mutex<Option<u64>> },
}

impl Progress {
    /// For `-p` (`wanted`), unless `-q` (`quiet`) forbids it. Lines come in steps of `step_percent`. Without either,
    /// SIGUSR1 makes it write one line on standard error.
    pub(crate) fn new(wanted: bool, quiet: bool, step_percent: u64) -> Self {
        let show = match wanted && !quiet {
            false => Show::Nothing,
            true if std::io::stderr().is_terminal() => Show::Bar(bar()),
            true => Show::Lines { step: step_percent * 100, last: Mutex::new(None) },
        };
        let state = State { show, done: AtomicU64::new(0), total: AtomicU64::new(0) };
        let progress = Self { state: Arc::new(state) };
        progress.listen();
        progress.line(0);
        progress
    }

    /// Says that `done` of `total` bytes are done.
    pub(crate) fn set(&self, done: u64, total: u64) {
        let state = &self.state;
        state.done.store(done, Ordering::Relaxed);
        state.total.store(total, Ordering::Relaxed);
        if let Show::Bar(bar) = &state.show {
            bar.set_length(total);
            bar.set_position(done);
        }
        self.line(state.hundredths());
    }

    /// Says that all is done, or (`false`) that it failed.
    pub(crate) fn end(&self, complete: bool) {
        match &self.state.show {
            Show::Nothing => {}
            Show::Bar(bar) if complete => bar.finish(),
            Show::Bar(bar) => bar.abandon(),
            Show::Lines { .. } => {
                if complete {
                    self.line(10_000);
                }
                let _unheard = writeln!(std::io::stdout());
            }
        }
    }

    fn line(&self, now: u64) {
        let Show::Lines { step, last } = &self.state.show else { return };
        let mut last = last.lock();
        let is_edge = now == 0 || now == 10_000;
        let is_due = match *last {
            None => true,
            Some(last) => now > last && (is_edge || now >= last + step),
        };
        if is_due {
            *last = Some(now);
            let mut out = std::io::stdout().lock();
            let written = write!(out, "    ({}.{:02}/100%)\r", now / 100, now % 100);
            let _unheard = written.and_then(|()| out.flush());
        }
    }

    fn listen(&self) {
        // Without it the signal would end the program; a system that refuses leaves it at that.
        let Ok(mut asked) = signal(SignalKind::user_defined1()) else { return };
        let state = Arc::downgrade(&self.state);
        tokio::spawn(async move {
            while asked.recv().await.is_some() {
                let Some(state) = state.upgrade() else { return };
                let now = state.hundredths();
                let line = format!("    ({}.{:02}/100%)", now / 100, now % 100);
                let _unheard = writeln!(std::io::stderr(), "{line}");
            }
        });
    }
}

impl State {
    /// How far it is, in hundredths of a percent.
    fn hundredths(&self) -> u64 {
        let done = self.done.load(Ordering::Relaxed);
        let total = self.total.load(Ordering::Relaxed);
        let part = u128::from(done) * 10_000 / u128::from(total.max(1));
        u64::try_from(part).unwrap_or(u64::MAX).min(10_000)
    }
}

fn bar() -> ProgressBar {
    let template = "{wide_bar} {percent:>3}% {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} ETA {eta}";
    let style = ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
    ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()).with_style(style)
}
