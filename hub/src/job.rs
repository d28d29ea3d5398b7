//! The life of a backup job as a pure machine: events in, effects out. It does no I/O, reads no clock and knows neither
//! database nor agent; the runner performs what it asks for and tells it what came of it.

use std::fmt;

use crate::model::{AgentKind, Status};

/// The steps of a backup, in the order in which they are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// The virtual machine, its sources and their sizes.
    Validate,
    /// The repository answers and has its lease.
    Repository,
    /// A parent is chosen for each disk and its layer made.
    Layers,
    /// Each layer is served under its export name.
    Exports,
    /// The agent is started, or one that connects is awaited.
    Agent,
    /// The data flows.
    Monitor,
    /// Exports are drained, layers sealed: everything is on stable storage.
    Durable,
    /// One transaction makes it a completed backup.
    Complete,
}

impl Step {
    /// All steps, in order.
    pub const ALL: [Self; 8] = [
        Self::Validate,
        Self::Repository,
        Self::Layers,
        Self::Exports,
        Self::Agent,
        Self::Monitor,
        Self::Durable,
        Self::Complete,
    ];

    /// The step that follows, or `None` after the last.
    pub const fn next(self) -> Option<Self> {
        match self {
            Self::Validate => Some(Self::Repository),
            Self::Repository => Some(Self::Layers),
            Self::Layers => Some(Self::Exports),
            Self::Exports => Some(Self::Agent),
            Self::Agent => Some(Self::Monitor),
            Self::Monitor => Some(Self::Durable),
            Self::Durable => Some(Self::Complete),
            Self::Complete => None,
        }
    }

    /// How the step is spelt in the job log.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Validate => "validate",
            Self::Repository => "repository",
            Self::Layers => "layers",
            Self::Exports => "exports",
            Self::Agent => "agent",
            Self::Monitor => "monitor",
            Self::Durable => "durable",
            Self::Complete => "complete",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A wait that must not last for ever. The driver owns the clock and says when one has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// An external agent has to speak for the first time.
    Connect,
    /// An external agent has to speak again.
    Heartbeat,
}

/// Why a job ends without a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending {
    /// Whether somebody asked for it.
    pub cancelled: bool,
    /// In words for people.
    pub reason: String,
}

impl Ending {
    fn failed(reason: String) -> Self {
        Self { cancelled: false, reason }
    }

    /// The status that the job will have.
    pub const fn status(&self) -> Status {
        if self.cancelled { Status::Cancelled } else { Status::Failed }
    }
}

/// Where a job stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Accepted; waits for its turn.
    Pending,
    /// This step is being made.
    Running(Step),
    /// This step was interrupted and has not answered yet.
    Stopping(Step, Ending),
    /// Exports, layers and the agent are being removed.
    Undoing(Ending),
    /// The backup exists.
    Completed,
    /// It does not, and nothing of it is left.
    Ended(Ending),
}

/// What happened to a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It is its turn.
    Begin,
    /// A step succeeded.
    Done(Step),
    /// A step failed, with the reason in words for people.
    Failed(Step, String),
    /// The external agent reported something.
    AgentSpoke,
    /// A wait lasted too long.
    Passed(Deadline),
    /// Somebody, or the end of the hub, wants it to stop.
    Stop(Ending),
    /// Cleaning up has finished.
    Undone,
}

/// What the driver has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Make this step and answer with [`Event::Done`] or [`Event::Failed`].
    Perform(Step),
    /// Wait for this word of the external agent; replaces an earlier wait.
    Await(Deadline),
    /// Make the step in work give up early. It still answers.
    Interrupt,
    /// Remove every trace of the job, record its end, answer with [`Event::Undone`].
    Undo(Ending),
}

/// The machine of one job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    agent: AgentKind,
    state: State,
}

impl Job {
    /// A job that waits for its turn.
    pub const fn new(agent: AgentKind) -> Self {
        Self { agent, state: State::Pending }
    }

    /// Where it stands.
    pub const fn state(&self) -> &State {
        &self.state
    }

    /// The status that others see. Cleaning up still counts as running: an ended job has left nothing behind.
    pub const fn status(&self) -> Status {
        match &self.state {
            State::Pending => Status::Pending,
            State::Running(_) | State::Stopping(..) | State::Undoing(_) => Status::Running,
            State::Completed => Status::Completed,
            State::Ended(ending) => ending.status(),
        }
    }

    /// Whether nothing more will happen.
    pub const fn is_over(&self) -> bool {
        matches!(self.state, State::Completed | State::Ended(_))
    }

    /// Takes note of an event. One that means nothing in this state (an answer that comes late, a deadline already
    /// met, a second wish to stop) changes nothing and asks for nothing.
    pub fn on(&mut self, event: Event) -> Vec<Effect> {
        let state = std::mem::replace(&mut self.state, State::Pending);
        let (state, effects) = self.step(state, event);
        self.state = state;
        effects
    }

    fn step(&self, state: State, event: Event) -> (State, Vec<Effect>) {
        match (state, event) {
            (State::Pending, Event::Begin) => self.enter(Step::Validate),
            (State::Pending, Event::Stop(ending)) => undo(ending),
            (State::Running(at), Event::Done(done)) if at == done => self.after(at),
            (State::Running(at), Event::Failed(failed, reason)) if at == failed => {
                undo(Ending::failed(reason))
            }
            (State::Running(Step::Agent), Event::AgentSpoke) if self.is_external() => {
                self.enter(Step::Monitor)
            }
            (State::Running(Step::Monitor), Event::AgentSpoke) if self.is_external() => {
                (State::Running(Step::Monitor), vec![Effect::Await(Deadline::Heartbeat)])
            }
            (State::Running(at), Event::Passed(deadline)) if self.awaits(at, deadline) => {
                undo(Ending::failed(lost(deadline)))
            }
            // Once the transaction is on its way, it alone decides.
            (State::Running(at), Event::Stop(ending)) if at != Step::Complete => {
                if self.is_external() && matches!(at, Step::Agent | Step::Monitor) {
                    return undo(ending);
                }
                (State::Stopping(at, ending), vec![Effect::Interrupt])
            }
            (State::Stopping(at, ending), Event::Done(step) | Event::Failed(step, _))
                if at == step =>
            {
                undo(ending)
            }
            (State::Undoing(ending), Event::Undone) => (State::Ended(ending), Vec::new()),
            (state, _) => (state, Vec::new()),
        }
    }

    fn after(&self, done: Step) -> (State, Vec<Effect>) {
        match done.next() {
            Some(next) => self.enter(next),
            None => (State::Completed, Vec::new()),
        }
    }

    fn enter(&self, step: Step) -> (State, Vec<Effect>) {
        let effect = match step {
            Step::Agent if self.is_external() => Effect::Await(Deadline::Connect),
            Step::Monitor if self.is_external() => Effect::Await(Deadline::Heartbeat),
            step => Effect::Perform(step),
        };
        (State::Running(step), vec![effect])
    }

    fn is_external(&self) -> bool {
        self.agent == AgentKind::External
    }

    fn awaits(&self, at: Step, deadline: Deadline) -> bool {
        self.is_external()
            && matches!(
                (at, deadline),
                (Step::Agent, Deadline::Connect) | (Step::Monitor, Deadline::Heartbeat)
            )
    }
}

fn undo(ending: Ending) -> (State, Vec<Effect>) {
    (State::Undoing(ending.clone()), vec![Effect::Undo(ending)])
}

fn lost(deadline: Deadline) -> String {
    match deadline {
        Deadline::Connect => "agent lost: it never connected".to_owned(),
        Deadline::Heartbeat => "agent lost: it stopped reporting".to_owned(),
    }
}

#[cfg(test)]
mod tests;
