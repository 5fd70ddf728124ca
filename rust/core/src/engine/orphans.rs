//! Reaps the orphans of workers, which become children of this process when it is PID 1 or a subreaper.
//!
//! Each zombie is reaped by its own pid. The program's own children are left alone, because a program that embeds the agent waits for them
//! itself. The session identifies an orphan of a worker.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use crate::sys::process::inherits_orphans;
use crate::sys::procfs::{self, Stat};
use crate::sys::wait::{Block, Collect, wait};

/// Only `SIGCHLD` reports the end of an orphan, and that signal belongs to the program. So the engine polls.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Orphans {
    /// This process is PID 1 or a subreaper.
    is_subreaper: bool,
    /// All sessions except this process's own belong to workers.
    owns_all: bool,
    /// Sessions of workers, including those of previous rounds.
    sessions: HashSet<i32>,
    next_poll: Option<Instant>,
}

impl Orphans {
    pub(super) fn new() -> Self {
        Self { is_subreaper: inherits_orphans(), owns_all: false, sessions: HashSet::new(), next_poll: None }
    }

    /// All children outside this process's own session belong to workers.
    pub(super) fn own_all(&mut self) {
        self.owns_all = true;
    }

    /// Registers the session of a new worker.
    pub(super) fn add_session(&mut self, session: i32, now: Instant) {
        if self.is_subreaper {
            self.sessions.insert(session);
            self.next_poll = self.next_poll.or(Some(now + POLL_INTERVAL));
        }
    }

    pub(super) fn next_tick(&self) -> Option<Instant> {
        self.next_poll
    }

    /// Reaps the zombies of orphans if a poll is due. `is_known` is true for processes that are reaped elsewhere.
    pub(super) fn reap(&mut self, now: Instant, is_known: impl Fn(i32) -> bool) {
        if self.next_poll.is_none_or(|at| now < at) {
            return;
        }
        self.next_poll = Some(now + POLL_INTERVAL);
        let own = i32::try_from(std::process::id()).unwrap_or(0);
        let own_session = procfs::stat(own).map_or(0, |stat| stat.session);
        let is_of_worker = |stat: &Stat| {
            if self.owns_all { stat.session != own_session } else { self.sessions.contains(&stat.session) }
        };
        for stat in procfs::children(own).into_iter().filter_map(procfs::stat) {
            if stat.state == 'Z' && stat.parent == own && is_of_worker(&stat) && !is_known(stat.pid) {
                let _ = wait(stat.pid, Collect::Reap, Block::No);
            }
        }
    }
}
