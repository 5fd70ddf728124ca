//! A group on the engine thread: its leaders, the detection of their exits, and the actions of its state machine.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use super::notice;
use super::progress::{GroupProgress, Leftover, LogFailure, StopReport, Survivor};
use crate::supervise::{Exit, GroupAction, GroupEvent, GroupState, StopNotice, Stopped};
use crate::sys::clock::Moment;
use crate::sys::process::ProcessHandle;
use crate::sys::procfs;
use crate::sys::stop_file::StopFile;
use crate::sys::wait::{Block, Collect, ExitStatus, Usage, reaped_status, wait};
use crate::vocabulary::SignalTarget;

/// The reaper of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reaper {
    Engine,
    /// The program; the engine only observes.
    Program,
}

pub(super) struct Process {
    /// The id in the poller token, unique in this engine.
    pub(super) id: u64,
    pub(super) leader: ProcessHandle,
    pub(super) sentinel: Option<OwnedFd>,
}

impl Process {
    /// The descriptor that becomes readable when the process ends. `None` if a thread waits for the process.
    pub(super) fn exit_fd(&self) -> Option<BorrowedFd<'_>> {
        self.leader.pidfd().or_else(|| self.sentinel.as_ref().map(AsFd::as_fd))
    }
}

/// Where a group announces its stop; `None` for nowhere.
pub(super) type SharedFile = Option<Arc<StopFile>>;

pub(super) struct GroupEntry {
    pub(super) state: GroupState,
    pub(super) processes: Vec<Process>,
    pub(super) progress: Arc<GroupProgress>,
    pub(super) reaper: Reaper,
    pub(super) released: bool,
    /// Processes that outlived the linger time of the stop.
    overdue: Vec<Leftover>,
    is_stopped: bool,
    /// Workers that have failed because of a line in their log.
    log_failed: Vec<usize>,
    /// Where the workers read the notice of their stop.
    stop_file: SharedFile,
    announced: Option<StopNotice>,
}

impl GroupEntry {
    pub(super) fn new(processes: Vec<Process>, reaper: Reaper, stop_file: SharedFile) -> Self {
        Self {
            state: GroupState::new(processes.len()),
            processes,
            progress: Arc::default(),
            reaper,
            released: false,
            overdue: Vec::new(),
            is_stopped: false,
            log_failed: Vec::new(),
            stop_file,
            announced: None,
        }
    }

    /// The exit of the process at `index`; `None` if it has not ended.
    pub(super) fn collect(&self, index: usize, at: Moment) -> Option<Exit> {
        let leader = &self.processes[index].leader;
        let collect = match self.reaper {
            Reaper::Engine if leader.may_be_reaped() => Collect::Reap,
            // The zombie keeps the pid reserved, and the pid addresses the group until the group is empty.
            Reaper::Engine | Reaper::Program => Collect::Observe,
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

    /// Feeds an event to the state machine and carries out the actions.
    pub(super) fn step(&mut self, now: Instant, event: GroupEvent) {
        let published = self.state.exits().len();
        let mut actions = self.state.step(now, event);
        self.announce();
        // Signals are sent first, and exits are published before the report of the stop that they complete.
        actions.retain(|action| !self.send_signal(action));
        if self.state.exits().len() > published {
            self.progress.publish_exits(&self.state.exits()[published..]);
        }
        while let Some(action) = actions.pop() {
            match action {
                GroupAction::CheckMembers { index } => {
                    let has_members = !self.processes[index].leader.living_members().is_empty();
                    actions.extend(self.state.step(now, GroupEvent::MembersChecked { index, has_members }));
                }
                GroupAction::Finished(stopped) => self.finish(&stopped, now),
                signal => {
                    self.send_signal(&signal);
                }
            }
        }
    }

    /// Handles a log line that makes a worker a failed one. The first line of each worker counts.
    ///
    /// During a stop no further worker fails: its peers may log errors because of the stop. A worker that has failed gets the line as an
    /// explanation.
    pub(super) fn fail_by_log(&mut self, now: Instant, failure: LogFailure) {
        let index = failure.index;
        if self.log_failed.contains(&index) || (self.state.is_stopping() && !self.state.has_failed(index)) {
            return;
        }
        self.log_failed.push(index);
        // The failure is published before the exit that it causes.
        self.progress.publish_log_failure(failure);
        self.step(now, GroupEvent::Fail { index });
    }

    /// Tells the workers the deadline of their stop. It is in memory when the signal arrives.
    fn announce(&mut self) {
        let notice = self.state.notice();
        if notice == self.announced {
            return;
        }
        self.announced = notice;
        if let (Some(file), Some(notice)) = (&self.stop_file, notice) {
            // A worker without the notice still gets the signal.
            let _ = file.append(&notice::line(notice, Moment::now()));
        }
    }

    /// Carries out an action that sends a signal or precedes one; `false` for other actions.
    fn send_signal(&mut self, action: &GroupAction) -> bool {
        match *action {
            GroupAction::Overdue { index } => self.record_overdue(index),
            GroupAction::Terminate { index, signal } => self.terminate(index, signal, SignalTarget::Group),
            GroupAction::TerminateLeader { index, signal } => self.terminate(index, signal, SignalTarget::Leader),
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

    fn record_overdue(&mut self, index: usize) {
        let members = self.processes[index].leader.living_members().into_iter();
        self.overdue.extend(members.map(|member| Leftover {
            index,
            pid: member.pid,
            command: procfs::command(member.pid),
        }));
    }

    fn terminate(&self, index: usize, signal: i32, target: SignalTarget) {
        let leader = &self.processes[index].leader;
        // The signal precedes SIGCONT, so a stopped process handles it first when it continues.
        let delivered = match target {
            SignalTarget::Group => leader.signal_group(signal),
            SignalTarget::Leader => leader.signal(signal),
        };
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
        let elapsed_ns = u64::try_from(now.saturating_duration_since(stopped.began).as_nanos()).unwrap_or(u64::MAX);
        let report = StopReport {
            signalled_ns: Moment::now().monotonic_ns.saturating_sub(elapsed_ns),
            elapsed: stopped.elapsed,
            killed: stopped.killed.clone(),
            overdue: std::mem::take(&mut self.overdue),
            survivors: survivors.collect(),
        };
        self.reap_zombies();
        self.is_stopped = true;
        self.progress.publish_report(report);
    }

    /// Reaps the zombies that kept their pids reserved.
    pub(super) fn reap_zombies(&self) {
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
