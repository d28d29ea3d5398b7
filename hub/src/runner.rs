//! The driver of a job: performs what [`crate::job`] asks for, keeps its deadlines, and tells it what happened. What a
//! step does is in `work`; how jobs are found and stopped is in [`crate::hub`].

mod arrival;
mod base;
mod disk;
mod layers;
mod stall;
mod work;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, OnceLock};

use agent::{CancelToken, DiskReport};
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;

use crate::hub::Hub;
use crate::job::{Deadline, Effect, Ending, Event, Job, State, Step};
use crate::model::{AgentKind, Backup, Level};
use crate::progress::Progress;

use work::Work;
pub(crate) use work::{note, remove_layers};

/// How many messages wait for a driver.
const MAILBOX: usize = 64;

/// What others tell a job.
#[derive(Debug)]
pub(crate) enum Message {
    /// The external agent gave a sign of life, perhaps with something to be logged.
    Spoke(Vec<String>),
    /// The external agent finished these disks.
    Finished(Vec<DiskReport>),
    /// The external agent gave up.
    GaveUp(String),
    /// The job shall end.
    Stop(Ending),
}

/// The hub's hold on a job in work.
#[derive(Clone, Debug)]
pub(crate) struct JobHandle {
    pub(crate) mailbox: mpsc::Sender<Message>,
    pub(crate) progress: Arc<Progress>,
    pub(crate) agent: AgentKind,
    /// Raised once the job was told to stop.
    pub(crate) stop: CancelToken,
    /// Which run of an external agent does the job: the first that asked.
    claim: Arc<OnceLock<String>>,
}

impl JobHandle {
    /// Gives the job to `agent` if nobody has it yet; whether it is that agent's.
    pub(crate) fn belongs_to(&self, agent: &str) -> bool {
        self.claim.get_or_init(|| agent.to_owned()) == agent
    }
}

/// One job and everything that its life needs.
pub(crate) struct Driver {
    hub: Arc<Hub>,
    backup_id: String,
    agent: AgentKind,
    machine: Job,
    /// What the steps work on; away while one of them runs.
    work: Option<Work>,
    current: Option<BoxFuture<'static, (Work, Event)>>,
    deadline: Option<(Deadline, Instant)>,
    entered: Option<Step>,
    reports: BTreeMap<u32, DiskReport>,
    mailbox: mpsc::Receiver<Message>,
    stop: CancelToken,
}

/// Makes a driver and the handle on it.
pub(crate) fn prepare(hub: &Arc<Hub>, backup: Backup, agent: AgentKind) -> (Driver, JobHandle) {
    let (sender, mailbox) = mpsc::channel(MAILBOX);
    let progress = Arc::new(Progress::default());
    let stop = CancelToken::new();
    let handle = JobHandle {
        mailbox: sender,
        progress: Arc::clone(&progress),
        agent,
        stop: stop.clone(),
        claim: Arc::default(),
    };
    let driver = Driver {
        hub: Arc::clone(hub),
        backup_id: backup.id.clone(),
        agent,
        machine: Job::new(agent),
        work: Some(Work::new(Arc::clone(hub), backup, progress, stop.clone())),
        current: None,
        deadline: None,
        entered: None,
        reports: BTreeMap::new(),
        mailbox,
        stop,
    };
    (driver, handle)
}

impl Driver {
    /// Lives the job to its end.
    pub(crate) async fn run(mut self) {
        let (first, _slot) = self.turn().await;
        let mut events = VecDeque::from(vec![first]);
        while !self.machine.is_over() {
            let event = match events.pop_front() {
                Some(event) => event,
                None => self.next(&mut events).await,
            };
            for effect in self.machine.on(event) {
                self.perform(effect).await;
            }
        }
        tracing::info!(backup = %self.backup_id, status = %self.machine.status(), "job over");
    }

    /// Waits for a free slot, or for the wish to stop before there is one.
    async fn turn(&mut self) -> (Event, Option<OwnedSemaphorePermit>) {
        let slots = self.hub.slots(self.agent);
        let slot = slots.acquire_owned();
        tokio::pin!(slot);
        loop {
            tokio::select! {
                slot = &mut slot => return (Event::Begin, slot.ok()),
                message = self.mailbox.recv() => if let Some(Message::Stop(ending)) = message {
                    return (Event::Stop(ending), None);
                },
            }
        }
    }

    /// The next thing that happens.
    async fn next(&mut self, more: &mut VecDeque<Event>) -> Event {
        loop {
            let deadline = self.deadline;
            let passed = async {
                match deadline {
                    Some((deadline, at)) => {
                        tokio::time::sleep_until(at).await;
                        deadline
                    }
                    None => std::future::pending().await,
                }
            };
            let finished = async {
                match &mut self.current {
                    Some(step) => step.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                (work, event) = finished => {
                    (self.work, self.current) = (Some(work), None);
                    return event;
                }
                Some(message) = self.mailbox.recv() => {
                    more.extend(self.read(message).await);
                    if let Some(event) = more.pop_front() {
                        return event;
                    }
                }
                deadline = passed => {
                    self.deadline = None;
                    return Event::Passed(deadline);
                }
            }
        }
    }

    /// What a message means for the machine.
    async fn read(&mut self, message: Message) -> Vec<Event> {
        match message {
            Message::Stop(ending) => vec![Event::Stop(ending)],
            Message::GaveUp(reason) => {
                vec![Event::AgentSpoke, Event::Failed(Step::Monitor, reason)]
            }
            Message::Spoke(warnings) => {
                for warning in warnings {
                    self.hub.log(&self.backup_id, self.entered, Level::Warning, &warning).await;
                }
                vec![Event::AgentSpoke]
            }
            Message::Finished(reports) => {
                self.reports.extend(reports.into_iter().map(|report| (report.disk_index, report)));
                let all = self.work.as_mut().is_some_and(|work| work.take_reports(&self.reports));
                let mut events = vec![Event::AgentSpoke];
                events.extend(all.then_some(Event::Done(Step::Monitor)));
                events
            }
        }
    }

    async fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Perform(step) => {
                self.deadline = None;
                self.enter(step).await;
                let Some(mut work) = self.work.take() else { return };
                self.current = Some(Box::pin(async move {
                    let event = match work.perform(step).await {
                        Ok(()) => Event::Done(step),
                        Err(reason) => Event::Failed(step, reason),
                    };
                    (work, event)
                }));
            }
            Effect::Await(deadline) => {
                let (step, patience) = match deadline {
                    Deadline::Connect => (Step::Agent, self.hub.config.connect_timeout),
                    Deadline::Heartbeat => (Step::Monitor, self.hub.config.agent_timeout),
                };
                self.enter(step).await;
                self.deadline = Some((deadline, Instant::now() + patience));
            }
            Effect::Interrupt => self.stop.cancel(),
            Effect::Undo(ending) => {
                self.deadline = None;
                self.stop.cancel();
                let Some(mut work) = self.work.take() else { return };
                self.current = Some(Box::pin(async move {
                    work.undo(&ending).await;
                    (work, Event::Undone)
                }));
            }
        }
    }

    /// Notes that a step begins, the first time that it does.
    async fn enter(&mut self, step: Step) {
        if self.entered == Some(step) {
            return;
        }
        if self.entered.is_none()
            && let Err(error) = self.hub.db.begin(&self.backup_id, Timestamp::now()).await
        {
            tracing::error!(backup = %self.backup_id, %error, "the start of a job was not noted");
        }
        self.entered = Some(step);
        let noted = self.hub.db.enter_step(&self.backup_id, step.as_str(), Timestamp::now()).await;
        if let Err(error) = noted {
            tracing::error!(backup = %self.backup_id, %step, %error, "a step was not noted");
        }
        debug_assert!(!matches!(self.machine.state(), State::Pending));
    }
}
