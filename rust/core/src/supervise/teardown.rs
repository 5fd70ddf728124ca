//! Stopping a group: one deadline for all, in parallel, until every process group is verified empty.

use std::time::{Duration, Instant};

use crate::sys::wait::ExitStatus;

/// How to stop a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StopPlan {
    /// Time to finish without any signal. Zero signals at once.
    pub linger: Duration,
    /// The signal that asks to end. SIGKILL has no grace.
    pub signal: i32,
    /// From that signal to SIGKILL. `Duration::MAX` never kills.
    pub grace: Duration,
    /// From SIGKILL to giving up on processes that the kernel does not let go.
    pub kill_wait: Duration,
}

/// What a finished stop has to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// Just before the first signal.
    pub began: Instant,
    /// From there to the end.
    pub elapsed: Duration,
    /// Workers whose group outlived the grace and got SIGKILL.
    pub killed: Vec<usize>,
    /// Workers whose group was not empty at the last deadline.
    pub unfinished: Vec<usize>,
}

/// What the shell must do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupAction {
    /// Send `signal` to the process group of a worker, and SIGCONT if it is stopped.
    Terminate {
        /// Whose group.
        index: usize,
        /// Which signal.
        signal: i32,
    },
    /// Note the members of this group: they have outlived the linger time, and are signalled next.
    Overdue {
        /// Whose group.
        index: usize,
    },
    /// Send SIGKILL to the leader of a process group alone.
    KillLeader {
        /// Which worker.
        index: usize,
    },
    /// Send SIGKILL to the process group of a worker.
    Kill {
        /// Whose group.
        index: usize,
    },
    /// See whether anybody lives in the group of this worker, whose leader has ended; answer with [`super::GroupEvent::Looked`].
    Look {
        /// Whose group.
        index: usize,
    },
    /// The stop is over.
    Finished(Stopped),
}

/// The kernel has no event for a process group that became empty (only a cgroup has one). Where members outlive their leader, the
/// group is looked at again after a pause that grows from the first value to the second.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(32);

/// From the SIGKILL of a leader to that of its group. A worker's helpers see its end and clean up: Python's resource tracker, which
/// ignores SIGTERM, unlinks the shared memory of a killed worker.
const GROUP_KILL_DELAY: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StopPhase {
    /// Nobody was signalled yet.
    Linger,
    /// Everybody has the signal of the plan.
    Grace,
    /// Leaders have SIGKILL; their groups get it at this moment.
    KillingLeaders(Instant),
    /// All groups have SIGKILL.
    Killing,
    Over,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WorkerStop {
    /// The leader has not ended.
    Led,
    /// The leader has ended, others may live in its group.
    Orphaned { look_at: Option<Instant>, pause: Duration },
    /// Nobody is left.
    Empty,
}

/// The state of one stop.
#[derive(Debug)]
pub(super) struct Teardown {
    plan: StopPlan,
    phase: StopPhase,
    began: Instant,
    deadline: Option<Instant>,
    members: Vec<WorkerStop>,
    killed: Vec<usize>,
}

impl Teardown {
    /// Begins: everybody is asked to end, also the group of a leader that is already dead.
    pub(super) fn begin(now: Instant, plan: StopPlan, leader_ended: &[bool]) -> (Self, Vec<GroupAction>) {
        let members =
            leader_ended.iter().map(|ended| if *ended { Self::orphaned() } else { WorkerStop::Led }).collect();
        let mut teardown =
            Self { plan, phase: StopPhase::Linger, began: now, deadline: None, members, killed: Vec::new() };
        let mut actions = if plan.linger.is_zero() {
            teardown.signal(now)
        } else {
            teardown.deadline = now.checked_add(plan.linger);
            Vec::new()
        };
        let dead = (0..leader_ended.len()).filter(|index| leader_ended[*index]);
        actions.extend(dead.map(|index| GroupAction::Look { index }));
        (teardown, actions)
    }

    /// Sends the signal of the plan to everybody that is left; the grace begins.
    fn signal(&mut self, now: Instant) -> Vec<GroupAction> {
        let signal = self.plan.signal;
        if signal == libc::SIGKILL {
            return self.kill(now);
        }
        self.phase = StopPhase::Grace;
        self.deadline = now.checked_add(self.plan.grace);
        self.unfinished().into_iter().map(|index| GroupAction::Terminate { index, signal }).collect()
    }

    /// Sends SIGKILL: to leaders first, and to groups whose leader is dead.
    fn kill(&mut self, now: Instant) -> Vec<GroupAction> {
        let delay = GROUP_KILL_DELAY.min(self.plan.kill_wait / 2);
        self.deadline = now.checked_add(self.plan.kill_wait);
        self.killed = self.unfinished();
        if delay.is_zero() {
            self.phase = StopPhase::Killing;
            return self.killed.iter().map(|index| GroupAction::Kill { index: *index }).collect();
        }
        self.phase = StopPhase::KillingLeaders(now + delay);
        let kill = |index: &usize| match self.members[*index] {
            WorkerStop::Led => GroupAction::KillLeader { index: *index },
            WorkerStop::Orphaned { .. } | WorkerStop::Empty => GroupAction::Kill { index: *index },
        };
        self.killed.iter().map(kill).collect()
    }

    /// Whether this stop may be why a worker ended. SIGKILL is no reaction to another signal: where this stop has not sent it, somebody
    /// else has, the out-of-memory killer for one.
    pub(super) fn explains(&self, status: ExitStatus) -> bool {
        let is_kill = matches!(status, ExitStatus::Signalled { signal: libc::SIGKILL, .. });
        !(self.phase == StopPhase::Linger || (self.phase == StopPhase::Grace && is_kill))
    }

    /// The leader of a group has ended.
    pub(super) fn leader_ended(&mut self, index: usize) -> Vec<GroupAction> {
        if self.members[index] != WorkerStop::Led {
            return Vec::new();
        }
        self.members[index] = Self::orphaned();
        vec![GroupAction::Look { index }]
    }

    /// The answer to [`GroupAction::Look`].
    pub(super) fn looked(&mut self, now: Instant, index: usize, anybody: bool) -> Vec<GroupAction> {
        let WorkerStop::Orphaned { pause, .. } = self.members[index] else {
            return Vec::new();
        };
        if !anybody {
            self.members[index] = WorkerStop::Empty;
            return Vec::new();
        }
        self.members[index] =
            WorkerStop::Orphaned { look_at: now.checked_add(pause), pause: (pause * 2).min(LONGEST_PAUSE) };
        // Somebody may have joined the group since it was killed.
        match self.phase {
            StopPhase::Killing => vec![GroupAction::Kill { index }],
            StopPhase::Linger | StopPhase::Grace | StopPhase::KillingLeaders(_) | StopPhase::Over => Vec::new(),
        }
    }

    /// Kills now.
    pub(super) fn end_grace(&mut self, now: Instant) -> Vec<GroupAction> {
        match self.phase {
            StopPhase::Linger | StopPhase::Grace => self.kill(now),
            StopPhase::KillingLeaders(_) | StopPhase::Killing | StopPhase::Over => Vec::new(),
        }
    }

    /// Time has passed.
    pub(super) fn tick(&mut self, now: Instant) -> Vec<GroupAction> {
        let mut actions = Vec::new();
        let is_due = self.deadline.is_some_and(|deadline| deadline <= now);
        match self.phase {
            StopPhase::Linger if is_due => {
                actions.extend(self.unfinished().into_iter().map(|index| GroupAction::Overdue { index }));
                actions.extend(self.signal(now));
            }
            StopPhase::Grace if is_due => actions.extend(self.kill(now)),
            StopPhase::KillingLeaders(at) if at <= now => {
                self.phase = StopPhase::Killing;
                actions.extend(self.unfinished().into_iter().map(|index| GroupAction::Kill { index }));
            }
            _ => {}
        }
        for (index, member) in self.members.iter_mut().enumerate() {
            if let WorkerStop::Orphaned { look_at, .. } = member
                && look_at.is_some_and(|at| at <= now)
            {
                *look_at = None;
                actions.push(GroupAction::Look { index });
            }
        }
        actions
    }

    /// The outcome, once: when all groups are empty or the last deadline has passed.
    pub(super) fn finished(&mut self, now: Instant) -> Option<Stopped> {
        let unfinished = self.unfinished();
        let out_of_time = self.phase == StopPhase::Killing && self.deadline.is_some_and(|deadline| deadline <= now);
        if self.phase == StopPhase::Over || !(unfinished.is_empty() || out_of_time) {
            return None;
        }
        self.phase = StopPhase::Over;
        Some(Stopped {
            began: self.began,
            elapsed: now.saturating_duration_since(self.began),
            killed: std::mem::take(&mut self.killed),
            unfinished,
        })
    }

    /// When [`Teardown::tick`] has something to do.
    pub(super) fn next_tick(&self) -> Option<Instant> {
        if self.phase == StopPhase::Over {
            return None;
        }
        let looks = self.members.iter().filter_map(|member| match member {
            WorkerStop::Orphaned { look_at, .. } => *look_at,
            WorkerStop::Led | WorkerStop::Empty => None,
        });
        let group_kill = match self.phase {
            StopPhase::KillingLeaders(at) => Some(at),
            _ => None,
        };
        looks.chain(self.deadline).chain(group_kill).min()
    }

    fn unfinished(&self) -> Vec<usize> {
        let members = self.members.iter().enumerate();
        members.filter(|(_, member)| **member != WorkerStop::Empty).map(|(index, _)| index).collect()
    }

    fn orphaned() -> WorkerStop {
        WorkerStop::Orphaned { look_at: None, pause: FIRST_PAUSE }
    }
}
