//! One pool of warm workers on the engine thread: its zygote and their children.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::guard::GuardSlot;
use super::warnings::Warnings;
use crate::sys::channel::Channel;
use crate::sys::poller::{Interest, Poller};
use crate::sys::probe::Support;
use crate::sys::process::ProcessHandle;
use crate::sys::procfs;
use crate::sys::spawn::{Command, Stdio, open_log};
use crate::sys::wait::{Block, Collect, ExitStatus, wait};
use crate::thread::Reply;
use crate::warm::wire::{Report, fork_order};
use crate::warm::{ImportedFiles, WarmPhase, WarmProgress, WarmState};

/// From a release to the order for new children. The released workers start in this time, undisturbed.
pub(super) const REFILL_DELAY: Duration = Duration::from_millis(200);
/// A pool whose children end this often before they have parked is given up.
pub(super) const MAX_EARLY_ENDS: u32 = 3;
/// A pool whose parked children end this often without a release is given up.
pub(super) const MAX_PARKED_ENDS: u32 = 16;

/// A child of a zygote.
pub(super) struct Child {
    pub(super) leader: ProcessHandle,
    pub(super) state: ChildState,
}

pub(super) enum ChildState {
    Forked,
    /// With the agent's end of its channel.
    Parked(Channel),
    /// It was parked and has ended, but its end was not handled yet.
    Ended,
    /// It was suspended while it was parked. It was killed, and the log says so.
    Discarded,
}

impl Child {
    pub(super) fn is_parked(&self) -> bool {
        matches!(self.state, ChildState::Parked(_))
    }
}

pub(super) struct Pool {
    pub(super) zygote: Option<ProcessHandle>,
    pub(super) channel: Channel,
    pub(super) children: HashMap<i32, Child>,
    /// Process ids of children with one report of two.
    pub(super) half_reported: HashSet<i32>,
    pub(super) wanted: usize,
    /// Children of the last order that the zygote has not forked yet. A second order would fork them twice.
    pub(super) ordered: usize,
    pub(super) began: Instant,
    /// When the zygote is killed, unless it is ready.
    pub(super) deadline: Option<Instant>,
    pub(super) timeout: Duration,
    pub(super) refill_at: Option<Instant>,
    pub(super) early_ends: u32,
    pub(super) parked_ends: u32,
    pub(super) is_closing: bool,
    /// Waits for the end of all processes.
    pub(super) closed: Option<Reply<()>>,
    pub(super) shared: Arc<WarmProgress>,
}

/// The poller tokens of pools.
#[derive(Clone, Copy)]
pub(super) struct WarmTokens {
    /// The token of a zygote's channel, by pool.
    pub(super) channel: fn(u64) -> u64,
    /// The token of a zygote or of a child, by pid.
    pub(super) process: fn(i32) -> u64,
}

/// The parts of the engine that pools use.
#[derive(Clone, Copy)]
pub(super) struct PoolHost<'a> {
    pub(super) support: Support,
    pub(super) poller: &'a Poller,
    pub(super) guard: &'a GuardSlot,
}

impl Pool {
    pub(super) fn contains(&self, pid: i32) -> bool {
        self.zygote.as_ref().is_some_and(|zygote| zygote.pid() == pid) || self.children.contains_key(&pid)
    }

    pub(super) fn publish(&self, change: impl FnOnce(&mut WarmState)) {
        let parked = self.children.values().filter(|child| child.is_parked()).count();
        self.shared.state.publish(|state| {
            state.parked = parked;
            change(state);
        });
    }

    pub(super) fn phase(&self) -> WarmPhase {
        self.shared.state.read(|state| state.phase)
    }

    /// Gives the zygote up, unless it was given up before.
    pub(super) fn give_up(&mut self, phase: WarmPhase, reason: &str, warnings: &Warnings) {
        if !self.is_closing && !matches!(self.phase(), WarmPhase::Lost | WarmPhase::Refused) {
            warnings.add(format!("The zygote prepares no further workers: {reason}"));
            self.publish(|state| {
                state.phase = phase;
                reason.clone_into(&mut state.reason);
            });
        }
        (self.deadline, self.refill_at) = (None, None);
        self.kill_zygote();
    }

    /// Reaps children that a killed zygote has not reported. They were still in its session, and were killed with its group.
    pub(super) fn reap_unreported(&self, zygote: i32) {
        let own = i32::try_from(std::process::id()).unwrap_or(0);
        for stat in procfs::pids().into_iter().filter_map(procfs::stat) {
            let is_unreported = stat.parent == own && stat.session == zygote && stat.pid != zygote;
            if is_unreported && !self.children.contains_key(&stat.pid) {
                let _ = wait(stat.pid, Collect::Reap, Block::Yes);
            }
        }
    }

    pub(super) fn kill_zygote(&self) {
        if let Some(zygote) = &self.zygote {
            let _ = zygote.signal_group(libc::SIGKILL);
        }
    }

    pub(super) fn kill(&mut self) {
        self.is_closing = true;
        self.refill_at = None;
        self.kill_zygote();
        for child in self.children.values() {
            let _ = child.leader.signal_group(libc::SIGKILL);
        }
    }

    /// A parked child that can run. Kills children that are suspended.
    pub(super) fn next_parked(&mut self, warnings: &Warnings) -> Option<i32> {
        let parked: Vec<i32> =
            self.children.iter().filter(|(_, child)| child.is_parked()).map(|(pid, _)| *pid).collect();
        for pid in parked {
            let child = self.children.get_mut(&pid)?;
            if !child.leader.is_stopped() {
                return Some(pid);
            }
            let _ = child.leader.signal_group(libc::SIGKILL);
            child.state = ChildState::Discarded;
            warnings.add(format!("A parked process (pid {pid}) was suspended. It was killed and is replaced"));
        }
        None
    }

    /// Orders the missing children, unless the zygote still works on an order. The end of an order calls this again.
    pub(super) fn refill(&mut self, warnings: &Warnings) {
        self.refill_at = None;
        let missing = self.wanted.saturating_sub(self.children.len());
        if missing > 0 && self.ordered == 0 && self.phase() == WarmPhase::Ready && !self.is_closing {
            let count = u32::try_from(missing).unwrap_or(u32::MAX);
            self.publish(|state| state.shortage.clear());
            match self.channel.send(&fork_order(count), &[]) {
                Ok(()) => self.ordered = missing,
                Err(error) => {
                    let reason = format!("the zygote does not accept orders: {error}");
                    self.give_up(WarmPhase::Lost, &reason, warnings);
                }
            }
        }
    }

    pub(super) fn count_end(&mut self, had_parked: bool, warnings: &Warnings) {
        let (count, limit) = if had_parked {
            self.parked_ends += 1;
            (self.parked_ends, MAX_PARKED_ENDS)
        } else {
            self.early_ends += 1;
            (self.early_ends, MAX_EARLY_ENDS)
        };
        if count >= limit {
            let reason = format!("{count} processes of the zygote ended before they were used");
            self.give_up(WarmPhase::Refused, &reason, warnings);
        } else {
            self.refill_at = self.refill_at.or(Some(Instant::now() + REFILL_DELAY));
        }
    }

    /// Watches a new child at the first of its two reports. The child's report may overtake the zygote's, which may come after the release
    /// of the child, or never if the zygote was killed.
    pub(super) fn adopt(&mut self, pid: i32, host: PoolHost<'_>, tokens: WarmTokens, warnings: &Warnings) {
        let PoolHost { support, poller, guard } = host;
        if !self.half_reported.insert(pid) {
            self.half_reported.remove(&pid);
            return;
        }
        self.ordered = self.ordered.saturating_sub(1);
        // A process that is no child was reaped as an orphan, and its pid may have been reused. A child keeps its pid.
        if matches!(wait(pid, Collect::Observe, Block::No), Ok(Some((ExitStatus::Unknown, _)))) {
            return;
        }
        let watched = ProcessHandle::open(pid, support).and_then(|leader| {
            let pidfd = leader.pidfd().ok_or(io::ErrorKind::Unsupported)?;
            poller.add(pidfd, (tokens.process)(pid), Interest::Readable)?;
            Ok(leader)
        });
        match watched {
            Ok(leader) => {
                guard.add_worker(pid, leader.pidfd());
                if self.is_closing {
                    let _ = leader.signal_group(libc::SIGKILL);
                }
                self.children.insert(pid, Child { leader, state: ChildState::Forked });
            }
            Err(error) => {
                warnings.add(format!("A process of the zygote (pid {pid}) cannot be watched ({error}). It was killed"));
                let _ = ProcessHandle::spawned(pid, None, support).signal(libc::SIGKILL);
                let _ = wait(pid, Collect::Reap, Block::Yes);
            }
        }
        if self.ordered == 0 {
            self.refill(warnings);
        }
    }

    pub(super) fn handle(
        &mut self,
        report: Report,
        fd: Option<OwnedFd>,
        host: PoolHost<'_>,
        tokens: WarmTokens,
        warnings: &Warnings,
    ) {
        match report {
            Report::Ready => {
                let Some(imported) = fd else { return };
                let _ = self.shared.imported.set(ImportedFiles::from(imported));
                self.deadline = None;
                let ready_after = self.began.elapsed();
                self.publish(|state| {
                    if state.phase == WarmPhase::Importing {
                        (state.phase, state.ready_after) = (WarmPhase::Ready, Some(ready_after));
                    }
                });
                self.refill(warnings);
            }
            Report::Refused(reason) => self.give_up(WarmPhase::Refused, &reason, warnings),
            Report::Shortage(reason) => {
                self.ordered = 0;
                warnings.add(format!(
                    "The zygote cannot fork another worker ({reason}); {} of {} are parked",
                    self.children.len(),
                    self.wanted
                ));
                self.publish(|state| state.shortage = reason);
            }
            Report::Forked { pid } => self.adopt(pid, host, tokens, warnings),
            Report::Parked { pid } => {
                self.adopt(pid, host, tokens, warnings);
                if let (Some(child), Some(fd)) = (self.children.get_mut(&pid), fd) {
                    child.state = ChildState::Parked(Channel::from(fd));
                }
                self.publish(|_| {});
            }
        }
    }
}

/// The standard streams of a command: its files, or the agent's streams.
pub(super) fn streams_of(command: &Command) -> io::Result<[OwnedFd; 3]> {
    let open = |stdio: &Stdio, own: BorrowedFd<'_>| match stdio {
        Stdio::Inherit => own.try_clone_to_owned(),
        Stdio::File(path) => open_log(path),
    };
    let stdin = match &command.stdin {
        Some(stdin) => stdin.try_clone()?,
        None => rustix::stdio::stdin().try_clone_to_owned()?,
    };
    Ok([stdin, open(&command.stdout, rustix::stdio::stdout())?, open(&command.stderr, rustix::stdio::stderr())?])
}

#[cfg(test)]
mod tests;
