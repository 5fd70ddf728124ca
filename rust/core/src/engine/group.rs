//! The handle of a group of supervised processes.

use std::sync::Arc;
use std::time::Duration;

use super::order::{EngineOrder, Line, StartedGroup};
use super::progress::{GroupProgress, LogFailure, StopReport};
use crate::error::{Error, Result};
use crate::logs::{LogRules, LogScan, ScanFile, ScanSpec, TeeThread};
use crate::published::{CallerFds, Wake};
use crate::supervise::{Exit, GroupEvent, StopPlan};

/// Processes that were started together, each the leader of its own session and process group.
#[derive(Debug)]
pub struct Group {
    line: Arc<Line>,
    tee_thread: Arc<TeeThread>,
    id: u64,
    pids: Vec<i32>,
    progress: Arc<GroupProgress>,
    warm: Vec<usize>,
}

impl Group {
    pub(super) fn new(line: &Arc<Line>, tee_thread: &Arc<TeeThread>, started: StartedGroup) -> Self {
        Self {
            line: Arc::clone(line),
            tee_thread: Arc::clone(tee_thread),
            id: started.id,
            pids: started.pids,
            progress: started.progress,
            warm: started.warm,
        }
    }

    /// Process ids by index.
    #[must_use]
    pub fn pids(&self) -> &[i32] {
        &self.pids
    }

    /// Indices of the workers that were released from a pool, ascending.
    #[must_use]
    pub fn warm(&self) -> &[usize] {
        &self.warm
    }

    /// A counter that grows with every batch of exits, at the end of a stop and at the end of the engine.
    pub fn generation(&self) -> Result<u64> {
        self.line.check_owner()?;
        Ok(self.progress.generation())
    }

    /// The exits in the order in which the kernel reported them, without the first `since`.
    pub fn exits(&self, since: usize) -> Result<Vec<Exit>> {
        self.line.check_owner()?;
        Ok(self.progress.exits(since))
    }

    /// Searches log files of the workers for lines that match `rules`.
    pub fn scan_logs(&self, files: Vec<ScanFile>, rules: Arc<LogRules>) -> Result<LogScan> {
        LogScan::open(&self.tee_thread, ScanSpec { group: self.id, files, rules })
    }

    /// The workers that have failed because of a line in their log, in the order of detection.
    pub fn log_failures(&self) -> Result<Vec<LogFailure>> {
        self.line.check_owner()?;
        Ok(self.progress.log_failures())
    }

    /// Blocks until the generation exceeds `generation`, `timeout` has passed (`None`: no limit), or one of `others` is readable.
    pub fn wait(&self, generation: u64, timeout: Option<Duration>, others: CallerFds<'_>) -> Result<Wake> {
        self.line.check_owner()?;
        self.progress.wait(generation, timeout, others)
    }

    /// Signals the process group of one worker, or its leader alone; `false` if no process was left.
    pub fn signal(&self, index: usize, signal: i32, leader_only: bool) -> Result<bool> {
        let group = self.id;
        let delivered = self.line.ask(|reply| EngineOrder::Signal { group, index, signal, leader_only, reply })?;
        delivered.map_err(|source| Error::os("signal", format!("worker {index} (pid {})", self.pids[index]), source))
    }

    /// Starts to stop the group. Idempotent: a running stop keeps its plan.
    pub fn stop(&self, plan: StopPlan) -> Result<()> {
        self.send(GroupEvent::Stop(plan))
    }

    /// From now on the engine starts the stop itself at the first failure.
    pub fn stop_on_failure(&self, plan: StopPlan) -> Result<()> {
        self.send(GroupEvent::StopOnFailure(plan))
    }

    /// Ends the grace period of a running stop now.
    pub fn end_grace(&self) -> Result<()> {
        self.send(GroupEvent::EndGrace)
    }

    /// The outcome of the stop; `None` before its end.
    pub fn stop_report(&self) -> Result<Option<StopReport>> {
        self.line.check_owner()?;
        Ok(self.progress.report())
    }

    fn send(&self, event: GroupEvent) -> Result<()> {
        let group = self.id;
        self.line.send(EngineOrder::GroupEvent { group, event })
    }
}

impl Drop for Group {
    /// Running processes continue; the engine reaps them when they end.
    fn drop(&mut self) {
        let _ = self.line.send(EngineOrder::Release { group: self.id });
    }
}
