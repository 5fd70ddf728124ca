//! Stopping a group: all workers in parallel, with common deadlines, until every process group is verified to be empty.

use std::time::{Duration, Instant};

use crate::sys::wait::ExitStatus;
use crate::vocabulary::{SignalTarget, StopReason};

/// How to stop a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StopPlan {
    /// Time to finish without a signal. Zero signals immediately.
    pub linger: Duration,
    /// The signal that requests termination. SIGKILL has no grace period.
    pub signal: i32,
    /// The receivers of that signal.
    pub target: SignalTarget,
    /// Grace period from that signal to SIGKILL. `Duration::MAX` never kills.
    pub grace: Duration,
    /// Timeout from SIGKILL to giving up on processes that survive it, for example in an uninterruptible system call.
    pub kill_wait: Duration,
    /// Why the group is stopped.
    pub reason: StopReason,
}

impl StopPlan {
    /// SIGKILL at once.
    #[must_use]
    pub fn kill(kill_wait: Duration) -> Self {
        Self {
            linger: Duration::ZERO,
            signal: libc::SIGKILL,
            target: SignalTarget::Group,
            grace: Duration::ZERO,
            kill_wait,
            reason: StopReason::Shutdown,
        }
    }
}

/// The facts about a stop that help workers to use their grace period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StopNotice {
    /// Why the group is stopped.
    pub reason: StopReason,
    /// The signal that requests termination.
    pub signal: i32,
    /// The time of SIGKILL. `None` if none is planned.
    pub kill_at: Option<Instant>,
}

/// Outcome of a finished stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// When the stop began, before the first signal.
    pub began: Instant,
    /// Duration of the stop.
    pub elapsed: Duration,
    /// Workers whose group outlived the grace period and was sent SIGKILL.
    pub killed: Vec<usize>,
    /// Workers whose group was not empty at the last deadline.
    pub unfinished: Vec<usize>,
}

/// An action that the engine must carry out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupAction {
    /// Send `signal` to the process group of a worker, and SIGCONT if it is stopped.
    Terminate {
        /// The worker.
        index: usize,
        /// The signal.
        signal: i32,
    },
    /// Send `signal` to a worker alone, and SIGCONT to its process group if the worker is stopped.
    TerminateLeader {
        /// The worker.
        index: usize,
        /// The signal.
        signal: i32,
    },
    /// Record the members of this group for the report: they have outlived the linger time. They are signalled next.
    Overdue {
        /// The worker.
        index: usize,
    },
    /// Send SIGKILL to the worker alone, not to its process group.
    KillLeader {
        /// The worker.
        index: usize,
    },
    /// Send SIGKILL to the process group of a worker.
    Kill {
        /// The worker.
        index: usize,
    },
    /// Check whether the process group of this worker, which has ended, has living members. Answer with
    /// [`super::GroupEvent::MembersChecked`].
    CheckMembers {
        /// The worker.
        index: usize,
    },
    /// The stop is over.
    Finished(Stopped),
}

/// First and longest pause between two checks of a process group whose members outlive their leader. The group is polled because the kernel
/// has no event for a group that becomes empty (only for a cgroup).
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const MAX_PAUSE: Duration = Duration::from_millis(32);

/// From the SIGKILL of a leader to that of its group. In this time the helpers of a killed worker can clean up: Python's resource tracker,
/// which ignores SIGTERM, unlinks its shared memory.
const GROUP_KILL_DELAY: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StopPhase {
    /// No signal was sent yet.
    Linger,
    /// The signal of the plan was sent.
    Grace,
    /// SIGKILL was sent to the leaders. Their groups are sent it at this time.
    KillingLeaders(Instant),
    /// SIGKILL was sent to all groups.
    Killing,
    Over,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WorkerStop {
    /// The leader has not ended.
    LeaderAlive,
    /// The leader has ended, but its group may have other members.
    Orphaned { check_at: Option<Instant>, pause: Duration },
    /// The group is empty.
    Empty,
}

/// The state of one stop.
#[derive(Debug)]
pub(super) struct Teardown {
    plan: StopPlan,
    phase: StopPhase,
    began: Instant,
    deadline: Option<Instant>,
    workers: Vec<WorkerStop>,
    killed: Vec<usize>,
    notice: Option<StopNotice>,
}

impl Teardown {
    /// Begins the stop. Includes the groups of leaders that have already ended.
    pub(super) fn begin(now: Instant, plan: StopPlan, leader_ended: &[bool]) -> (Self, Vec<GroupAction>) {
        let workers =
            leader_ended.iter().map(|ended| if *ended { Self::orphaned() } else { WorkerStop::LeaderAlive }).collect();
        let mut teardown = Self {
            plan,
            phase: StopPhase::Linger,
            began: now,
            deadline: None,
            workers,
            killed: Vec::new(),
            notice: None,
        };
        let mut actions = if plan.linger.is_zero() {
            teardown.signal(now)
        } else {
            teardown.deadline = now.checked_add(plan.linger);
            Vec::new()
        };
        let ended = (0..leader_ended.len()).filter(|index| leader_ended[*index]);
        actions.extend(ended.map(|index| GroupAction::CheckMembers { index }));
        (teardown, actions)
    }

    /// Sends the signal of the plan to all groups that are not empty, or to their leaders. The grace period begins.
    fn signal(&mut self, now: Instant) -> Vec<GroupAction> {
        let signal = self.plan.signal;
        if signal == libc::SIGKILL {
            return self.kill(now);
        }
        self.phase = StopPhase::Grace;
        self.deadline = now.checked_add(self.plan.grace);
        self.notice = Some(StopNotice { reason: self.plan.reason, signal, kill_at: self.deadline });
        let terminate = |index: usize| match (self.plan.target, self.workers[index]) {
            (SignalTarget::Leader, WorkerStop::LeaderAlive) => GroupAction::TerminateLeader { index, signal },
            _ => GroupAction::Terminate { index, signal },
        };
        self.unfinished().into_iter().map(terminate).collect()
    }

    /// Sends SIGKILL to the leaders, and to the groups whose leader has ended.
    fn kill(&mut self, now: Instant) -> Vec<GroupAction> {
        let delay = GROUP_KILL_DELAY.min(self.plan.kill_wait / 2);
        self.deadline = now.checked_add(self.plan.kill_wait);
        if self.notice.is_none_or(|notice| notice.kill_at.is_none_or(|at| at > now)) {
            self.notice = Some(StopNotice { reason: self.plan.reason, signal: self.plan.signal, kill_at: Some(now) });
        }
        self.killed = self.unfinished();
        if delay.is_zero() {
            self.phase = StopPhase::Killing;
            return self.killed.iter().map(|index| GroupAction::Kill { index: *index }).collect();
        }
        self.phase = StopPhase::KillingLeaders(now + delay);
        let kill = |index: &usize| match self.workers[*index] {
            WorkerStop::LeaderAlive => GroupAction::KillLeader { index: *index },
            WorkerStop::Orphaned { .. } | WorkerStop::Empty => GroupAction::Kill { index: *index },
        };
        self.killed.iter().map(kill).collect()
    }

    /// Whether this stop may have caused this exit. A worker that died of SIGKILL before this stop sent it was killed by something else,
    /// such as the out-of-memory killer.
    pub(super) fn explains(&self, status: ExitStatus) -> bool {
        let is_kill = matches!(status, ExitStatus::Signalled { signal: libc::SIGKILL, .. });
        !(self.phase == StopPhase::Linger || (self.phase == StopPhase::Grace && is_kill))
    }

    /// The facts for the workers; `None` before the first signal.
    pub(super) fn notice(&self) -> Option<StopNotice> {
        self.notice
    }

    /// The leader of a group has ended. In the grace period, the rest of its group gets SIGTERM now if only the leader was signalled.
    pub(super) fn leader_ended(&mut self, index: usize) -> Vec<GroupAction> {
        if self.workers[index] != WorkerStop::LeaderAlive {
            return Vec::new();
        }
        self.workers[index] = Self::orphaned();
        let mut actions = vec![GroupAction::CheckMembers { index }];
        if self.phase == StopPhase::Grace && self.plan.target == SignalTarget::Leader {
            actions.push(GroupAction::Terminate { index, signal: libc::SIGTERM });
        }
        actions
    }

    /// The answer to [`GroupAction::CheckMembers`].
    pub(super) fn members_checked(&mut self, now: Instant, index: usize, has_members: bool) -> Vec<GroupAction> {
        let WorkerStop::Orphaned { pause, .. } = self.workers[index] else {
            return Vec::new();
        };
        if !has_members {
            self.workers[index] = WorkerStop::Empty;
            return Vec::new();
        }
        self.workers[index] =
            WorkerStop::Orphaned { check_at: now.checked_add(pause), pause: (pause * 2).min(MAX_PAUSE) };
        // A process may have joined the group after SIGKILL was sent to it.
        match self.phase {
            StopPhase::Killing => vec![GroupAction::Kill { index }],
            StopPhase::Linger | StopPhase::Grace | StopPhase::KillingLeaders(_) | StopPhase::Over => Vec::new(),
        }
    }

    /// Ends the linger time and the grace period.
    pub(super) fn end_grace(&mut self, now: Instant) -> Vec<GroupAction> {
        match self.phase {
            StopPhase::Linger | StopPhase::Grace => self.kill(now),
            StopPhase::KillingLeaders(_) | StopPhase::Killing | StopPhase::Over => Vec::new(),
        }
    }

    /// Handles the deadlines that have passed.
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
        for (index, worker) in self.workers.iter_mut().enumerate() {
            if let WorkerStop::Orphaned { check_at, .. } = worker
                && check_at.is_some_and(|at| at <= now)
            {
                *check_at = None;
                actions.push(GroupAction::CheckMembers { index });
            }
        }
        actions
    }

    /// The outcome when all groups are empty or the last deadline has passed. Returns it only once.
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

    /// The next time at which [`Teardown::tick`] has something to do.
    pub(super) fn next_tick(&self) -> Option<Instant> {
        if self.phase == StopPhase::Over {
            return None;
        }
        let checks = self.workers.iter().filter_map(|worker| match worker {
            WorkerStop::Orphaned { check_at, .. } => *check_at,
            WorkerStop::LeaderAlive | WorkerStop::Empty => None,
        });
        let group_kill = match self.phase {
            StopPhase::KillingLeaders(at) => Some(at),
            _ => None,
        };
        checks.chain(self.deadline).chain(group_kill).min()
    }

    fn unfinished(&self) -> Vec<usize> {
        let workers = self.workers.iter().enumerate();
        workers.filter(|(_, worker)| **worker != WorkerStop::Empty).map(|(index, _)| index).collect()
    }

    fn orphaned() -> WorkerStop {
        WorkerStop::Orphaned { check_at: None, pause: FIRST_PAUSE }
    }
}
