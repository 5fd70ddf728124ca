//! A group as the engine thread holds it: leaders, how their exits are noticed, and carrying out the decisions.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use super::progress::{GroupProgress, Leftover, StopReport, Survivor};
use crate::supervise::{Exit, GroupAction, GroupEvent, GroupState, Stopped};
use crate::sys::clock::Moment;
use crate::sys::process::ProcessHandle;
use crate::sys::procfs;
use crate::sys::wait::{Block, Collect, ExitStatus, Usage, reaped_status, wait};

/// Who collects the exit status of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reaper {
    /// This engine.
    Engine,
    /// Somebody else; the engine only observes.
    Other,
}

pub(super) struct Process {
    /// The number under which its readiness is reported.
    pub(super) id: u64,
    pub(super) leader: ProcessHandle,
    pub(super) sentinel: Option<OwnedFd>,
}

impl Process {
    /// The descriptor whose readiness means that the process has ended. None where a thread waits for it.
    pub(super) fn exit_fd(&self) -> Option<BorrowedFd<'_>> {
        self.leader.pidfd().or_else(|| self.sentinel.as_ref().map(AsFd::as_fd))
    }
}

pub(super) struct GroupEntry {
    pub(super) state: GroupState,
    pub(super) processes: Vec<Process>,
    pub(super) progress: Arc<GroupProgress>,
    pub(super) reaper: Reaper,
    pub(super) released: bool,
    /// Processes that outlived the linger time of the stop.
    overdue: Vec<Leftover>,
    is_stopped: bool,
}

impl GroupEntry {
    pub(super) fn new(processes: Vec<Process>, reaper: Reaper) -> Self {
        Self {
            state: GroupState::new(processes.len()),
            processes,
            progress: Arc::default(),
            reaper,
            released: false,
            overdue: Vec::new(),
            is_stopped: false,
        }
    }

    /// How the process at `index` ended, or `None` if it has not.
    pub(super) fn collect(&self, index: usize, at: Moment) -> Option<Exit> {
        let leader = &self.processes[index].leader;
        let collect = match self.reaper {
            Reaper::Engine if leader.may_be_reaped() => Collect::Reap,
            // As a zombie it keeps its number, by which its group is reached until that is empty.
            Reaper::Engine | Reaper::Other => Collect::Observe,
        };
        let (status, usage) = match wait(leader.pid(), collect, Block::No) {
            Ok(None) => return None,
            Ok(Some((ExitStatus::Unknown, usage))) => {
                (leader.pidfd().and_then(reaped_status).unwrap_or(ExitStatus::Unknown), usage)
            }
            Ok(Some(ended)) => ended,
            Err(_) => (ExitStatus::Unknown, Usage::default()),
        };
        Some(Exit::new(index, leader.pid(), status, usage, at))
    }

    /// Feeds an event to the decisions and carries out what they say.
    pub(super) fn step(&mut self, now: Instant, event: GroupEvent) {
        let known = self.state.exits().len();
        let mut actions = self.state.step(now, event);
        // Signals go out before anything else is done, and exits are published before the stop that they complete.
        actions.retain(|action| !self.send(action));
        if self.state.exits().len() > known {
            self.progress.publish_exits(&self.state.exits()[known..]);
        }
        while let Some(action) = actions.pop() {
            match action {
                GroupAction::CheckMembers { index } => {
                    let has_members = !self.processes[index].leader.living_members().is_empty();
                    actions.extend(self.state.step(now, GroupEvent::MembersChecked { index, has_members }));
                }
                GroupAction::Finished(stopped) => self.finish(&stopped, now),
                signal => {
                    self.send(&signal);
                }
            }
        }
    }

    /// Sends the signal of an action; `false` if it is another kind of action.
    fn send(&mut self, action: &GroupAction) -> bool {
        match *action {
            GroupAction::Overdue { index } => self.note_overdue(index),
            GroupAction::Terminate { index, signal } => self.terminate(index, signal),
            GroupAction::KillLeader { index } => {
                let _ = self.processes[index].leader.signal(libc::SIGKILL);
            }
            GroupAction::Kill { index } => {
                let _ = self.processes[index].leader.signal_group(libc::SIGKILL);
            }
            GroupAction::CheckMembers { .. } | GroupAction::Finished(_) => return false,
        }
        true
    }

    fn note_overdue(&mut self, index: usize) {
        let members = self.processes[index].leader.living_members().into_iter();
        self.overdue.extend(members.map(|member| Leftover {
            index,
            pid: member.pid,
            command: procfs::command(member.pid),
        }));
    }

    fn terminate(&self, index: usize, signal: i32) {
        let leader = &self.processes[index].leader;
        // The signal first: a stopped process takes it before anything else when it is continued.
        let delivered = leader.signal_group(signal);
        if matches!(delivered, Ok(true)) && !self.state.has_ended(index) && leader.is_stopped() {
            let _ = leader.signal_group(libc::SIGCONT);
        }
    }

    fn finish(&mut self, stopped: &Stopped, now: Instant) {
        let unfinished = stopped.unfinished.iter();
        let survivors = unfinished.flat_map(|index| {
            let members = self.processes[*index].leader.living_members().into_iter();
            members.map(|member| Survivor {
                index: *index,
                pid: member.pid,
                state: member.state,
                wait_channel: procfs::wait_channel(member.pid),
            })
        });
        let since_then = u64::try_from(now.saturating_duration_since(stopped.began).as_nanos()).unwrap_or(u64::MAX);
        let report = StopReport {
            signalled_ns: Moment::now().monotonic_ns.saturating_sub(since_then),
            elapsed: stopped.elapsed,
            killed: stopped.killed.clone(),
            overdue: std::mem::take(&mut self.overdue),
            survivors: survivors.collect(),
        };
        self.reap_held();
        self.is_stopped = true;
        self.progress.publish_report(report);
    }

    /// Collects the zombies that were held for their number.
    pub(super) fn reap_held(&self) {
        if self.reaper == Reaper::Engine {
            for (index, process) in self.processes.iter().enumerate() {
                if self.state.has_ended(index) && !process.leader.may_be_reaped() {
                    let _ = wait(process.leader.pid(), Collect::Reap, Block::No);
                }
            }
        }
    }

    pub(super) fn all_ended(&self) -> bool {
        (0..self.processes.len()).all(|index| self.state.has_ended(index))
    }

    /// Whether a stop of the group has finished.
    pub(super) fn is_stopped(&self) -> bool {
        self.is_stopped
    }
}
