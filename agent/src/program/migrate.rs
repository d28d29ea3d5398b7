//! `sendense-agent migrate`: one run, from its flags to its exit code.

use std::path::PathBuf;

use agent::{CancelToken, DiskJob, Event, EventReceiver, RunOptions, RunReport, event_channel};
use anyhow::{Context, Result, anyhow};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::arguments::Migrate;
use super::hub::{Hub, Turned};
use super::show::Show;
use super::{DONE, DONE_WITH_WARNINGS, FAILED, USAGE, disks, report, say, telemetry};

/// Where job ids and hubs are looked for when no flag names them; the second is how older callers say it.
const JOB_ID_VARIABLES: [&str; 2] = ["SENDENSE_JOB_ID", "MIGRATEKIT_JOB_ID"];
const HUB_VARIABLES: [&str; 2] = ["SENDENSE_HUB", "OMA_API_URL"];

/// Where state is kept on a machine.
const SYSTEM_STATE: &str = "/var/lib/sendense/agent";

/// Events on their way to the hub.
const QUEUED_EVENTS: usize = 1024;

/// What the flags and the environment ask for.
struct Asked {
    job_id: String,
    hub: Option<Hub>,
    /// The disks, where the flags alone describe them.
    disks: Vec<DiskJob>,
}

/// Runs, and returns the exit code.
pub(crate) async fn migrate(flags: &Migrate) -> u8 {
    let asked = match asked(flags) {
        Ok(asked) => asked,
        Err(error) => {
            say(format_args!("sendense-agent: {error:#}"));
            return USAGE;
        }
    };
    let outcome = work(flags, &asked).await;
    let failure = outcome.as_ref().err().map(|error| format!("{error:#}"));
    if let Some(error) = &failure {
        say(format_args!("sendense-agent: {error}"));
    }
    if let Some(path) = &flags.report {
        let word = outcome.as_ref().map_err(|_| failure.as_deref().unwrap_or_default());
        if let Err(error) = report::write(path, &asked.job_id, word) {
            say(format_args!("sendense-agent: {error:#}"));
            return FAILED;
        }
    }
    match outcome {
        Ok(report) if report.warnings.is_empty() => DONE,
        Ok(_) => DONE_WITH_WARNINGS,
        Err(_) => FAILED,
    }
}

fn asked(flags: &Migrate) -> Result<Asked> {
    let job_id = flag_or_variable(flags.job_id.as_deref(), JOB_ID_VARIABLES)
        .context("a job id is needed (--job-id, SENDENSE_JOB_ID): without it change ids are recorded nowhere")?;
    // Flags that describe targets leave nothing to ask a hub that only the environment names.
    let by_flags = !flags.exports.is_empty() || !flags.nbd_targets.is_empty();
    let hub = match (&flags.hub, by_flags) {
        (None, true) => None,
        (flag, _) => flag_or_variable(flag.as_deref(), HUB_VARIABLES),
    };
    let Some(url) = hub else {
        return Ok(Asked { job_id, hub: None, disks: disks::from_flags(flags)? });
    };
    let hub = Hub::new(&url, flags.token_file.as_deref(), &job_id)?;
    Ok(Asked { job_id, hub: Some(hub), disks: Vec::new() })
}

async fn work(flags: &Migrate, asked: &Asked) -> Result<RunReport> {
    let cancel = CancelToken::new();
    stop_on_signals(&cancel)?;
    let Some(hub) = &asked.hub else {
        return run(flags, asked, asked.disks.clone(), &cancel).await;
    };
    let running = async {
        let assignment = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(anyhow!("cancelled")),
            assignment = hub.assignment() => assignment?,
        };
        hub.claim().await?;
        run(flags, asked, disks::from_hub(flags, &assignment, hub.host())?, &cancel).await
    };
    match running.await {
        Ok(report) => {
            let told = hub.complete(&report).await;
            told.context("everything was sent, but the hub cannot be told").map(|()| report)
        }
        // The job is not this run's to fail.
        Err(error) if error.is::<Turned>() => Err(error),
        Err(error) => {
            if let Err(untold) = hub.fail(&format!("{error:#}")).await {
                say(format_args!(
                    "sendense-agent: the hub cannot be told of the failure: {untold:#}"
                ));
            }
            Err(error)
        }
    }
}

/// Sends the disks while the events are shown, and told to the hub.
async fn run(
    flags: &Migrate,
    asked: &Asked,
    disks: Vec<DiskJob>,
    cancel: &CancelToken,
) -> Result<RunReport> {
    let state_dir = flags.state.clone().unwrap_or_else(default_state_dir);
    let options = RunOptions {
        connections: flags.connections,
        ..RunOptions::new(state_dir, asked.job_id.clone())
    };
    let (sender, events) = event_channel();
    let telling = asked.hub.clone().map(|hub| spawn_telemetry(hub, cancel));
    let (to_hub, telling) = telling.unzip();
    let (to_screen, shown) = spawn_show(Show::new(flags.progress));
    let forwarded = tokio::spawn(forward(events, to_screen, to_hub));
    let ended = agent::run(disks, options, sender, cancel.clone()).await;
    // These tell of the run and are no part of it: one that died of a bug does not undo what was sent.
    for task in [Some(forwarded), Some(shown), telling].into_iter().flatten() {
        if let Err(error) = task.await {
            tracing::error!("telling of the run ended unexpectedly: {error}");
        }
    }
    // An error of the library says its causes itself.
    ended.map_err(|error| anyhow!("{error}"))
}

fn spawn_telemetry(hub: Hub, cancel: &CancelToken) -> (mpsc::Sender<Event>, JoinHandle<()>) {
    let (to_hub, queue) = mpsc::channel(QUEUED_EVENTS);
    (to_hub, tokio::spawn(telemetry::tell(hub, queue, cancel.clone())))
}

/// Shows events in a task of its own, so that the hub is told whatever becomes of the screen.
fn spawn_show(mut show: Show) -> (mpsc::Sender<Event>, JoinHandle<()>) {
    let (to_screen, mut queue) = mpsc::channel::<Event>(QUEUED_EVENTS);
    let shown = tokio::spawn(async move {
        while let Some(event) = queue.recv().await {
            show.show(&event);
        }
    });
    (to_screen, shown)
}

/// Hands events on to the hub's queue and the screen's.
async fn forward(
    mut events: EventReceiver,
    to_screen: mpsc::Sender<Event>,
    to_hub: Option<mpsc::Sender<Event>>,
) {
    while let Some(event) = events.recv().await {
        if let Some(queue) = &to_hub {
            hand_over(queue, event.clone()).await;
        }
        hand_over(&to_screen, event).await;
    }
}

/// A queue that nobody reads any more is that of a hub that went away, or of a screen that did.
async fn hand_over(queue: &mpsc::Sender<Event>, event: Event) {
    match event {
        // Of progress the next one tells all that this one does: it may be lost.
        Event::Progress { .. } => drop(queue.try_send(event)),
        event => drop(queue.send(event).await),
    }
}

/// The first signal stops the run in good order, the second at once.
fn stop_on_signals(cancel: &CancelToken) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    let cancel = cancel.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if cancel.is_cancelled() {
                std::process::exit(i32::from(FAILED));
            }
            cancel.cancel();
        }
    });
    Ok(())
}

fn flag_or_variable(flag: Option<&str>, variables: [&str; 2]) -> Option<String> {
    let named = flag.map(str::to_owned).into_iter();
    let mut all = named.chain(variables.into_iter().filter_map(|name| std::env::var(name).ok()));
    all.find(|text| !text.trim().is_empty())
}

fn default_state_dir() -> PathBuf {
    match std::env::var_os("XDG_STATE_HOME").filter(|home| !home.is_empty()) {
        Some(home) => PathBuf::from(home).join("sendense").join("agent"),
        None => PathBuf::from(SYSTEM_STATE),
    }
}
