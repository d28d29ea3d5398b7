//! Waiting for a backup or a restore to end, with a bar on a terminal. The hub does the work: a waiter that is killed
//! changes nothing.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressStyle};

use super::client::{Client, segment};
use crate::api::{BackupView, ProgressView, RestoreView};
use crate::model::Status;

/// How often the hub is asked.
const ASK_EVERY: Duration = Duration::from_millis(250);

/// Waits until a backup has ended.
pub(crate) async fn backup(client: &Client, id: &str) -> anyhow::Result<BackupView> {
    let path = format!("/backups/{}", segment(id));
    let bar = bar();
    loop {
        let view: BackupView = client.get(&path, &[]).await?;
        draw(&bar, view.step.as_deref().unwrap_or("waiting"), &view.progress);
        if !view.summary.status.is_active() {
            bar.finish_and_clear();
            return Ok(view);
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

/// Waits until a restore has ended.
pub(crate) async fn restore(client: &Client, started: RestoreView) -> anyhow::Result<RestoreView> {
    let path = format!("/restores/{}", segment(&started.restore_id));
    let (bar, mut view) = (bar(), started);
    while view.status == Status::Running {
        draw(&bar, "restore", &view.progress);
        tokio::time::sleep(ASK_EVERY).await;
        view = client.get(&path, &[]).await?;
    }
    bar.finish_and_clear();
    Ok(view)
}

/// A bar on standard error, hidden where that is no terminal.
fn bar() -> ProgressBar {
    let target = match std::io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    };
    // Cleared however the wait ends: what is said next stands alone.
    let bar = ProgressBar::with_draw_target(Some(0), target).with_finish(ProgressFinish::AndClear);
    let template = "{prefix:10} [{wide_bar:.cyan}] {bytes}/{total_bytes} {msg}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

fn draw(bar: &ProgressBar, step: &str, progress: &ProgressView) {
    bar.set_prefix(step.to_owned());
    bar.set_length(progress.bytes_total);
    bar.set_position(progress.bytes_done);
    let rate = indicatif::HumanBytes(progress.bytes_per_second);
    bar.set_message(match progress.eta_seconds {
        Some(seconds) => {
            format!("{rate}/s, {} left", indicatif::HumanDuration(Duration::from_secs(seconds)))
        }
        None => format!("{rate}/s"),
    });
}
