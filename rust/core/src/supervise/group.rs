//! A group of workers: what their exits mean, and the course of a stop.

use std::time::Instant;

use super::exit::Exit;
use super::teardown::{Action, StopPlan, Teardown};
use crate::sys::clock::Moment;
use crate::sys::wait::{Status, Usage};

/// An exit that the kernel reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Position of the worker in its group.
    pub index: usize,
    /// Its process id.
    pub pid: i32,
    /// Exit code or signal.
    pub status: Status,
    /// The kernel's accounting.
    pub usage: Usage,
    /// When it was noticed.
    pub at: Moment,
}

/// What happens to a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Workers ended, in this order. What the kernel has reported by one look belongs into one event, so that workers that died
    /// together are all known as dead before the first consequence.
    Ended(Vec<Ended>),
    /// Stop the group.
    Stop(StopPlan),
    /// Stop the group at the first failure, or now if there was one.
    StopOnFailure(StopPlan),
    /// Send SIGKILL now, if a stop is under way: its linger time and its grace are over.
    Hurry,
    /// The answer to [`Action::Look`].
    Looked {
        /// Whose group was looked at.
        index: usize,
        /// Whether anybody lives in it.
        anybody: bool,
    },
    /// A deadline may have passed.
    Tick,
}

/// The state of a group.
#[derive(Debug)]
pub struct GroupState {
    ended: Vec<bool>,
    exits: Vec<Exit>,
    on_failure: Option<StopPlan>,
    teardown: Option<Teardown>,
}

impl GroupState {
    /// A group of `size` running workers.
    #[must_use]
    pub fn new(size: usize) -> Self {
        Self { ended: vec![false; size], exits: Vec::with_capacity(size), on_failure: None, teardown: None }
    }

    /// The exits so far, in order.
    #[must_use]
    pub fn exits(&self) -> &[Exit] {
        &self.exits
    }

    /// Whether the worker at `index` has ended.
    #[must_use]
    pub fn has_ended(&self, index: usize) -> bool {
        self.ended[index]
    }

    /// When the next [`Event::Tick`] is due.
    #[must_use]
    pub fn next_tick(&self) -> Option<Instant> {
        self.teardown.as_ref().and_then(Teardown::next_tick)
    }

    /// Takes note of an event; returns what to do about it.
    pub fn step(&mut self, now: Instant, event: Event) -> Vec<Action> {
        let mut actions = match event {
            Event::Ended(ended) => self.note(now, ended),
            Event::Stop(plan) => self.begin(now, plan),
            Event::StopOnFailure(plan) => {
                self.on_failure = Some(plan);
                self.react(now)
            }
            Event::Hurry => self.teardown.as_mut().map_or_else(Vec::new, |stop| stop.hurry(now)),
            Event::Looked { index, anybody } => {
                let stop = self.teardown.as_mut();
                stop.map_or_else(Vec::new, |stop| stop.looked(now, index, anybody))
            }
            Event::Tick => self.teardown.as_mut().map_or_else(Vec::new, |stop| stop.tick(now)),
        };
        actions.extend(self.teardown.as_mut().and_then(|stop| stop.finished(now)).map(Action::Finished));
        actions
    }

    fn note(&mut self, now: Instant, ended: Vec<Ended>) -> Vec<Action> {
        let mut actions = Vec::new();
        for Ended { index, pid, status, usage, at } in ended {
            if std::mem::replace(&mut self.ended[index], true) {
                continue;
            }
            self.exits.push(Exit {
                index,
                pid,
                order: self.exits.len(),
                status,
                usage,
                stopped: self.teardown.as_ref().is_some_and(|stop| stop.explains(status)),
                at,
            });
            if let Some(stop) = &mut self.teardown {
                actions.extend(stop.leader_ended(index));
            }
        }
        actions.extend(self.react(now));
        actions
    }

    /// Carries out "stop at the first failure". A status that nobody here knows is not a failure.
    fn react(&mut self, now: Instant) -> Vec<Action> {
        let is_failure = |exit: &Exit| !exit.status.is_success() && exit.status != Status::Unknown;
        match self.on_failure {
            Some(plan) if self.exits.iter().any(is_failure) => self.begin(now, plan),
            _ => Vec::new(),
        }
    }

    /// A stop that runs or is over stays as it is.
    fn begin(&mut self, now: Instant, plan: StopPlan) -> Vec<Action> {
        if self.teardown.is_some() {
            return Vec::new();
        }
        let (teardown, actions) = Teardown::begin(now, plan, &self.ended);
        self.teardown = Some(teardown);
        actions
    }
}
