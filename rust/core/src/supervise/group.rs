//! The state machine of a group of workers: failures and stops.

use std::time::Instant;

use super::exit::Exit;
use super::teardown::{GroupAction, StopNotice, StopPlan, Teardown};
use crate::sys::wait::ExitStatus;

/// An event of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupEvent {
    /// Workers exited, in this order. The group sets `order` and `stopped` of each exit. One event contains all exits that the kernel has
    /// reported so far: the group must know all simultaneous exits before it acts.
    Ended(Vec<Exit>),
    /// Stop the group.
    Stop(StopPlan),
    /// Stop the group at the first failure, or now if a worker has already failed.
    StopOnFailure(StopPlan),
    /// The worker is a failed one, for a reason other than its exit. A running worker gets SIGKILL.
    Fail {
        /// The worker.
        index: usize,
    },
    /// End the linger time and the grace period of a running stop: send SIGKILL now.
    EndGrace,
    /// The answer to [`GroupAction::CheckMembers`].
    MembersChecked {
        /// The worker.
        index: usize,
        /// Whether its process group has a living member.
        has_members: bool,
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
    /// A worker that has ended without a failure exit is a failed one.
    has_other_failure: bool,
    teardown: Option<Teardown>,
}

impl GroupState {
    /// A group of `size` running workers.
    #[must_use]
    pub fn new(size: usize) -> Self {
        Self {
            ended: vec![false; size],
            exits: Vec::with_capacity(size),
            on_failure: None,
            has_other_failure: false,
            teardown: None,
        }
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

    /// Whether a stop has started.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.teardown.is_some()
    }

    /// Whether the worker at `index` has failed by itself.
    #[must_use]
    pub fn has_failed(&self, index: usize) -> bool {
        self.exits.iter().any(|exit| exit.index == index && is_failure(exit) && !exit.stopped)
    }

    /// When the next [`GroupEvent::Tick`] is due.
    #[must_use]
    pub fn next_tick(&self) -> Option<Instant> {
        self.teardown.as_ref().and_then(Teardown::next_tick)
    }

    /// The notice of the current stop to the workers; `None` before its first signal.
    #[must_use]
    pub fn notice(&self) -> Option<StopNotice> {
        self.teardown.as_ref().and_then(Teardown::notice)
    }

    /// Handles an event and returns the actions to carry out.
    #[must_use = "dropped actions are signals that are never sent"]
    pub fn step(&mut self, now: Instant, event: GroupEvent) -> Vec<GroupAction> {
        let mut actions = match event {
            GroupEvent::Ended(ended) => self.record_exits(now, ended),
            GroupEvent::Stop(plan) => self.begin(now, plan),
            GroupEvent::StopOnFailure(plan) => {
                self.on_failure = Some(plan);
                self.stop_after_failure(now)
            }
            GroupEvent::Fail { index } => self.fail(now, index),
            GroupEvent::EndGrace => self.teardown.as_mut().map_or_else(Vec::new, |stop| stop.end_grace(now)),
            GroupEvent::MembersChecked { index, has_members } => {
                let stop = self.teardown.as_mut();
                stop.map_or_else(Vec::new, |stop| stop.members_checked(now, index, has_members))
            }
            GroupEvent::Tick => self.teardown.as_mut().map_or_else(Vec::new, |stop| stop.tick(now)),
        };
        actions.extend(self.teardown.as_mut().and_then(|stop| stop.finished(now)).map(GroupAction::Finished));
        actions
    }

    fn record_exits(&mut self, now: Instant, ended: Vec<Exit>) -> Vec<GroupAction> {
        let mut actions = Vec::new();
        for mut exit in ended {
            let index = exit.index;
            if std::mem::replace(&mut self.ended[index], true) {
                continue;
            }
            exit.order = self.exits.len();
            exit.stopped = self.teardown.as_ref().is_some_and(|stop| stop.explains(exit.status));
            self.exits.push(exit);
            if let Some(stop) = &mut self.teardown {
                actions.extend(stop.leader_ended(index));
            }
        }
        actions.extend(self.stop_after_failure(now));
        actions
    }

    /// A running worker is killed, and its exit is the failure. A running stop goes on.
    fn fail(&mut self, now: Instant, index: usize) -> Vec<GroupAction> {
        if self.teardown.is_some() {
            return Vec::new();
        }
        if !self.ended[index] {
            return vec![GroupAction::KillLeader { index }];
        }
        self.has_other_failure = true;
        self.stop_after_failure(now)
    }

    /// Starts the planned stop if a worker has failed.
    fn stop_after_failure(&mut self, now: Instant) -> Vec<GroupAction> {
        match self.on_failure {
            Some(plan) if self.has_other_failure || self.exits.iter().any(is_failure) => self.begin(now, plan),
            _ => Vec::new(),
        }
    }

    /// Starts a stop. Has no effect if a stop has already started.
    fn begin(&mut self, now: Instant, plan: StopPlan) -> Vec<GroupAction> {
        if self.teardown.is_some() {
            return Vec::new();
        }
        let (teardown, actions) = Teardown::begin(now, plan, &self.ended);
        self.teardown = Some(teardown);
        actions
    }
}

/// An unknown status is not a failure.
fn is_failure(exit: &Exit) -> bool {
    !exit.status.is_success() && exit.status != ExitStatus::Unknown
}
