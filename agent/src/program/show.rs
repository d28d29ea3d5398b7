//! What people and programs see of a run while it goes on: bars, lines of JSON, or nothing but warnings.

use std::collections::HashMap;
use std::io::{IsTerminal, Write};

use agent::Event;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle as BarStyle};

use super::arguments::ProgressStyle;
use super::say;

/// How a bar looks.
const BAR: &str =
    "{prefix:<10} {bar:30} {bytes:>11}/{total_bytes:<11} {binary_bytes_per_sec:>13}  {msg}";

/// Shows events.
pub(crate) enum Show {
    /// A bar for each disk.
    Bars { all: MultiProgress, disks: HashMap<u32, ProgressBar> },
    /// An event a line.
    Json,
    /// Warnings only.
    Quiet,
}

impl Show {
    /// Shows in the style that was asked for.
    pub(crate) fn new(style: ProgressStyle) -> Self {
        let bars = || Self::Bars { all: MultiProgress::new(), disks: HashMap::new() };
        match style {
            ProgressStyle::Bar => bars(),
            ProgressStyle::Auto if std::io::stderr().is_terminal() => bars(),
            ProgressStyle::Json => Self::Json,
            ProgressStyle::Auto | ProgressStyle::None => Self::Quiet,
        }
    }

    /// Shows an event.
    pub(crate) fn show(&mut self, event: &Event) {
        match self {
            Self::Json => print_json(event),
            Self::Quiet => {
                if let Event::Warning { message, .. } = event {
                    say(format_args!("warning: {message}"));
                }
            }
            Self::Bars { all, disks } => show_bar(all, disks, event),
        }
    }
}

fn show_bar(all: &MultiProgress, disks: &mut HashMap<u32, ProgressBar>, event: &Event) {
    match event {
        Event::DiskStarted { disk_index, capacity_bytes, incremental, .. } => {
            let bar = all.add(ProgressBar::new(*capacity_bytes));
            if let Ok(style) = BarStyle::with_template(BAR) {
                bar.set_style(style);
            }
            bar.set_prefix(format!("disk {disk_index}"));
            bar.set_message(if *incremental { "changes" } else { "everything" });
            disks.insert(*disk_index, bar);
        }
        Event::Progress { disk_index, bytes_done, data_bytes_sent, .. } => {
            if let Some(bar) = disks.get(disk_index) {
                bar.set_position(*bytes_done);
                bar.set_message(format!("{} sent", indicatif::BinaryBytes(*data_bytes_sent)));
            }
        }
        Event::DiskFinished { report } => {
            if let Some(bar) = disks.get(&report.disk_index) {
                let sent = indicatif::BinaryBytes(report.data_bytes_sent);
                bar.set_position(report.capacity_bytes);
                bar.finish_with_message(format!("{sent} sent, done"));
            }
        }
        Event::Warning { message, .. } => {
            // A terminal that is gone cannot be warned.
            let _ = all.println(format!("warning: {message}"));
        }
        Event::RunFailed { .. } => disks.values().for_each(ProgressBar::abandon),
        Event::RunFinished { .. } => {}
    }
}

fn print_json(event: &Event) {
    if let Ok(line) = serde_json::to_string(event) {
        // A reader that is gone does not stop a backup.
        let _ = writeln!(std::io::stdout().lock(), "{line}");
    }
}
