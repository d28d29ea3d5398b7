//! The machine against every event in every state, and against long random lives. No driver takes part.

use proptest::prelude::*;

use super::*;

fn cancel() -> Ending {
    Ending { cancelled: true, reason: "asked".to_owned() }
}

fn every_event() -> Vec<Event> {
    let mut events = vec![
        Event::Begin,
        Event::AgentSpoke,
        Event::Passed(Deadline::Connect),
        Event::Passed(Deadline::Heartbeat),
        Event::Stop(cancel()),
        Event::Undone,
    ];
    for step in Step::ALL {
        events.push(Event::Done(step));
        events.push(Event::Failed(step, "broke".to_owned()));
    }
    events
}

/// Every state that can be reached, with the machine in it.
fn every_state(agent: AgentKind) -> Vec<Job> {
    let mut found = vec![Job::new(agent)];
    let mut next = 0;
    while next < found.len() {
        for event in every_event() {
            let mut job = found[next].clone();
            job.on(event);
            if !found.contains(&job) {
                found.push(job);
            }
        }
        next += 1;
    }
    found
}

fn walk(agent: AgentKind, until: Step) -> Job {
    let mut job = Job::new(agent);
    job.on(Event::Begin);
    for step in Step::ALL {
        if step == until {
            return job;
        }
        match (agent, step) {
            (AgentKind::External, Step::Agent) => job.on(Event::AgentSpoke),
            _ => job.on(Event::Done(step)),
        };
    }
    job
}

#[test]
fn a_job_without_trouble_performs_every_step_once_and_completes() {
    let mut job = Job::new(AgentKind::Local);
    let mut wanted = job.on(Event::Begin);
    for step in Step::ALL {
        assert_eq!(wanted, [Effect::Perform(step)]);
        assert_eq!(job.status(), Status::Running);
        wanted = job.on(Event::Done(step));
    }
    assert!(wanted.is_empty());
    assert_eq!(job.state(), &State::Completed);
}

#[test]
fn every_state_is_reached_and_no_event_breaks_any() {
    for agent in AgentKind::ALL {
        let states = every_state(*agent);
        for step in Step::ALL {
            assert!(states.iter().any(|job| job.state() == &State::Running(step)), "{step}");
        }
        assert!(states.iter().any(|job| job.state() == &State::Completed));
        for job in &states {
            for event in every_event() {
                let mut after = job.clone();
                let effects = after.on(event.clone());
                if job.is_over() {
                    assert_eq!((&after, effects.as_slice()), (job, [].as_slice()), "{event:?}");
                }
                let undoing = matches!(after.state(), State::Undoing(_));
                let was_undoing = matches!(job.state(), State::Undoing(_));
                let asks = effects.iter().any(|effect| matches!(effect, Effect::Undo(_)));
                assert_eq!(asks, undoing && !was_undoing, "{job:?} {event:?}");
            }
        }
    }
}

#[test]
fn completed_is_only_reached_from_the_transaction_and_that_only_from_durable() {
    for agent in AgentKind::ALL {
        for job in every_state(*agent) {
            for event in every_event() {
                let mut after = job.clone();
                let effects = after.on(event.clone());
                if after.state() == &State::Completed && job.state() != &State::Completed {
                    assert_eq!(job.state(), &State::Running(Step::Complete));
                    assert_eq!(event, Event::Done(Step::Complete));
                }
                if effects.contains(&Effect::Perform(Step::Complete)) {
                    assert_eq!(job.state(), &State::Running(Step::Durable));
                    assert_eq!(event, Event::Done(Step::Durable));
                }
            }
        }
    }
}

#[test]
fn a_failed_step_is_undone_with_its_reason_before_the_job_ends() {
    for step in Step::ALL {
        let mut job = walk(AgentKind::Local, step);
        let ending = Ending { cancelled: false, reason: "disk full".to_owned() };
        assert_eq!(
            job.on(Event::Failed(step, "disk full".to_owned())),
            [Effect::Undo(ending.clone())]
        );
        assert_eq!(job.status(), Status::Running);
        assert!(job.on(Event::Undone).is_empty());
        assert_eq!(job.state(), &State::Ended(ending));
        assert_eq!(job.status(), Status::Failed);
    }
}

#[test]
fn a_wish_to_stop_interrupts_and_then_waits_for_the_step() {
    for step in Step::ALL.into_iter().filter(|step| *step != Step::Complete) {
        let mut job = walk(AgentKind::Local, step);
        assert_eq!(job.on(Event::Stop(cancel())), [Effect::Interrupt]);
        assert!(job.on(Event::Stop(cancel())).is_empty());
        assert_eq!(job.on(Event::Done(step)), [Effect::Undo(cancel())]);
        job.on(Event::Undone);
        assert_eq!(job.status(), Status::Cancelled);
    }
}

#[test]
fn the_transaction_is_not_stopped_once_it_is_on_its_way() {
    let mut job = walk(AgentKind::Local, Step::Complete);
    assert!(job.on(Event::Stop(cancel())).is_empty());
    job.on(Event::Done(Step::Complete));
    assert_eq!(job.status(), Status::Completed);
}

#[test]
fn an_external_agent_that_never_connects_or_falls_silent_is_lost() {
    let mut job = walk(AgentKind::External, Step::Agent);
    assert!(job.on(Event::Passed(Deadline::Heartbeat)).is_empty());
    assert!(matches!(job.on(Event::Passed(Deadline::Connect))[..], [Effect::Undo(_)]));

    let mut job = walk(AgentKind::External, Step::Agent);
    assert_eq!(job.on(Event::AgentSpoke), [Effect::Await(Deadline::Heartbeat)]);
    assert!(job.on(Event::Passed(Deadline::Connect)).is_empty());
    assert_eq!(job.on(Event::AgentSpoke), [Effect::Await(Deadline::Heartbeat)]);
    let effects = job.on(Event::Passed(Deadline::Heartbeat));
    assert!(matches!(&effects[..], [Effect::Undo(ending)] if ending.reason.contains("agent lost")));
}

fn any_event() -> impl Strategy<Value = Event> {
    prop::sample::select(every_event())
}

proptest! {
    #[test] // Whatever happens in whatever order, a job completes only after a durable step that it asked for.
    fn a_random_life_never_completes_before_it_is_durable(
        external in any::<bool>(),
        luck in prop::collection::vec((any::<bool>(), any_event()), 1..80),
    ) {
        let agent = if external { AgentKind::External } else { AgentKind::Local };
        let mut job = Job::new(agent);
        let (mut durable, mut undone) = (false, 0);
        for (follow, event) in luck {
            // Half of the time the step in work succeeds, so that late states are reached, too.
            let event = match job.state() {
                State::Running(step) if follow => Event::Done(*step),
                State::Pending if follow => Event::Begin,
                _ => event,
            };
            durable |= job.state() == &State::Running(Step::Durable)
                && event == Event::Done(Step::Durable);
            let effects = job.on(event);
            undone += effects.iter().filter(|effect| matches!(effect, Effect::Undo(_))).count();
            prop_assert!(undone <= 1);
            if job.status() == Status::Completed {
                prop_assert!(durable && undone == 0);
            }
            if matches!(job.state(), State::Ended(_)) {
                prop_assert_eq!(undone, 1);
            }
        }
    }
}
