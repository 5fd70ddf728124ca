//! Processes of workers that their parents have left to this process, because it is PID 1 or a subreaper: their zombies are collected.
//!
//! Each is collected by its own pid, and only if it is no child of the program's own: a program that embeds the agent waits for those
//! itself. An orphan of a worker is known by its session.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use crate::sys::process::inherits_orphans;
use crate::sys::procfs::{self, Stat};
use crate::sys::wait::{Block, Collect, wait};

/// Between two looks. Nothing reports the end of an orphan but `SIGCHLD`, which belongs to the program.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Orphans {
    /// This process is given orphans.
    is_heir: bool,
    /// All sessions but this process's own are those of workers.
    owns_all: bool,
    /// Sessions of workers, those of former rounds included.
    sessions: HashSet<i32>,
    look_at: Option<Instant>,
}

impl Orphans {
    pub(super) fn new() -> Self {
        Self { is_heir: inherits_orphans(), owns_all: false, sessions: HashSet::new(), look_at: None }
    }

    /// This process has no children of its own in sessions of their own.
    pub(super) fn own_all(&mut self) {
        self.owns_all = true;
    }

    /// A worker was started.
    pub(super) fn expect(&mut self, session: i32, now: Instant) {
        if self.is_heir {
            self.sessions.insert(session);
            self.look_at = self.look_at.or(Some(now + PAUSE));
        }
    }

    pub(super) fn next_tick(&self) -> Option<Instant> {
        self.look_at
    }

    /// Collects the zombies of orphans, if that is due. `is_known` tells processes that are waited for elsewhere.
    pub(super) fn reap(&mut self, now: Instant, is_known: impl Fn(i32) -> bool) {
        if self.look_at.is_none_or(|at| now < at) {
            return;
        }
        self.look_at = Some(now + PAUSE);
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
