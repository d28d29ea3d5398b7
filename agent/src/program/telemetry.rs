//! Keeps the hub told while a run goes on: what happened, at most once a second, and a sign of life when nothing did.
//! Stops the run where the hub wishes so.

use std::time::Duration;

use agent::{CancelToken, Event};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use super::hub::{Hub, Wish};

/// How often the hub hears from us.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// The most events that wait for a hub that does not answer; of progress only the last of each disk is kept.
const MAX_WAITING_EVENTS: usize = 1024;

/// Tells the hub until the queue of events is closed and empty.
pub(crate) async fn tell(hub: Hub, mut events: mpsc::Receiver<Event>, cancel: CancelToken) {
    let mut beat = interval(HEARTBEAT);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut waiting = Vec::new();
    loop {
        // What has happened is heard first: the last call tells all of it.
        tokio::select! {
            biased;
            event = events.recv() => match event {
                Some(event) => note(&mut waiting, event),
                None => break,
            },
            _ = beat.tick() => send(&hub, &mut waiting, &cancel).await,
        }
    }
    if !waiting.is_empty() {
        send(&hub, &mut waiting, &cancel).await;
    }
}

async fn send(hub: &Hub, waiting: &mut Vec<Event>, cancel: &CancelToken) {
    match hub.progress(waiting).await {
        Ok(wish) => {
            waiting.clear();
            if wish == Wish::Stop {
                cancel.cancel();
            }
        }
        // The data does not go this way: as long as that flows, the run goes on.
        Err(error) => tracing::warn!("the hub cannot be told of the progress: {error:#}"),
    }
}

/// Adds an event; progress replaces the last of its disk, unless that was followed by something else.
fn note(waiting: &mut Vec<Event>, event: Event) {
    if let Event::Progress { disk_index, .. } = &event {
        let same = |old: &Event| matches!(old, Event::Progress { disk_index: old, .. } if old == disk_index);
        waiting.retain(|old| !same(old));
    }
    // The run's end has calls of its own.
    if !matches!(event, Event::RunFinished { .. } | Event::RunFailed { .. })
        && waiting.len() < MAX_WAITING_EVENTS
    {
        waiting.push(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_progress_only_the_last_of_each_disk_is_told() {
        let progress = |disk_index, bytes_done| Event::Progress {
            disk_index,
            disk_key: 0,
            bytes_done,
            bytes_total: 9,
            read_bytes: 0,
            data_bytes_sent: 0,
            zero_bytes_sent: 0,
        };
        let warning = Event::Warning { disk_index: None, message: "m".into() };
        let mut waiting = Vec::new();
        let told = [
            progress(0, 1),
            progress(1, 1),
            warning.clone(),
            progress(0, 2),
            Event::RunFailed { error: "e".into() },
        ];
        for event in told {
            note(&mut waiting, event);
        }
        assert_eq!(waiting, [progress(1, 1), warning, progress(0, 2)]);
    }
}
