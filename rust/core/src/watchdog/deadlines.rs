//! The table of deadlines: what expires next, and what has expired. Pure: the time is an argument.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::time::{Duration, Instant};

use super::wire::{NEVER_S, Request};

/// More timers than a host has use for.
pub const MOST_TIMERS: usize = 65_536;

/// Both clocks at one instant. Deadlines are kept on the monotonic one; the wall clock is read when a request comes in and never again,
/// so that stepping it moves no deadline.
#[derive(Clone, Copy, Debug)]
pub struct Clocks {
    /// Monotonic.
    pub now: Instant,
    /// Seconds since the epoch.
    pub wall_s: f64,
}

impl Clocks {
    /// The monotonic instant of a wall clock time; `None` for one that never comes.
    #[must_use]
    pub fn instant_of(&self, wall_s: f64) -> Option<Instant> {
        let ahead_s = wall_s - self.wall_s;
        if ahead_s >= NEVER_S {
            return None;
        }
        let ahead = Duration::try_from_secs_f64(ahead_s.abs()).unwrap_or(Duration::MAX);
        if ahead_s >= 0.0 { self.now.checked_add(ahead) } else { Some(self.now.checked_sub(ahead).unwrap_or(self.now)) }
    }
}

/// An armed timer.
#[derive(Clone, Debug, PartialEq)]
pub struct Timer {
    /// As it was asked for.
    pub request: Request,
    /// When it expires; `None` for never.
    pub at: Option<Instant>,
}

/// The table is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// All armed timers.
#[derive(Debug, Default)]
pub struct Deadlines {
    timers: HashMap<u64, Timer>,
    by_process: HashMap<i32, HashMap<String, u64>>,
    /// Earliest first. Holds timers that are gone as well, until they come up.
    queue: BinaryHeap<Reverse<(Instant, u64)>>,
    last: u64,
}

impl Deadlines {
    /// Arms a timer in place of the one with the same process and scope.
    pub fn arm(&mut self, request: Request, at: Option<Instant>) -> Result<(), Full> {
        self.release(request.pid, &request.scope);
        if self.timers.len() >= MOST_TIMERS {
            return Err(Full);
        }
        self.last += 1;
        let id = self.last;
        self.by_process.entry(request.pid).or_default().insert(request.scope.clone(), id);
        self.timers.insert(id, Timer { request, at });
        if let Some(at) = at {
            self.queue.push(Reverse((at, id)));
        }
        self.compact();
        Ok(())
    }

    /// Forgets one timer.
    pub fn release(&mut self, pid: i32, scope: &str) -> Option<Timer> {
        let scopes = self.by_process.get_mut(&pid)?;
        let id = scopes.remove(scope)?;
        if scopes.is_empty() {
            self.by_process.remove(&pid);
        }
        self.timers.remove(&id)
    }

    /// Forgets all timers of a process.
    pub fn forget(&mut self, pid: i32) -> Vec<Timer> {
        let scopes = self.by_process.remove(&pid).unwrap_or_default();
        scopes.values().filter_map(|id| self.timers.remove(id)).collect()
    }

    /// When the next timer expires. Drops what is in front of it and gone.
    pub fn next_at(&mut self) -> Option<Instant> {
        while let Some(Reverse((at, id))) = self.queue.peek() {
            if self.timers.contains_key(id) {
                return Some(*at);
            }
            self.queue.pop();
        }
        None
    }

    /// Takes out the timers that have expired, earliest first.
    pub fn expired(&mut self, now: Instant) -> Vec<Timer> {
        let mut expired = Vec::new();
        while self.next_at().is_some_and(|at| at <= now)
            && let Some(Reverse((_, id))) = self.queue.pop()
            && let Some(timer) = self.timers.remove(&id)
        {
            if let Some(scopes) = self.by_process.get_mut(&timer.request.pid) {
                scopes.remove(&timer.request.scope);
                if scopes.is_empty() {
                    self.by_process.remove(&timer.request.pid);
                }
            }
            expired.push(timer);
        }
        expired
    }

    /// The armed timers, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Timer> {
        self.timers.values()
    }

    /// The armed timers of one process, in no order.
    pub fn of(&self, pid: i32) -> impl Iterator<Item = &Timer> {
        self.by_process.get(&pid).into_iter().flat_map(|scopes| scopes.values()).filter_map(|id| self.timers.get(id))
    }

    /// How many timers are armed.
    #[must_use]
    pub fn len(&self) -> usize {
        self.timers.len()
    }

    /// Whether none is armed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.timers.is_empty()
    }

    /// Whether a process has a timer.
    #[must_use]
    pub fn has(&self, pid: i32) -> bool {
        self.by_process.contains_key(&pid)
    }

    /// A worker that arms and releases at every step leaves an entry each time: memory follows what is alive.
    fn compact(&mut self) {
        if self.queue.len() > 2 * self.timers.len() + 64 {
            let timers = &self.timers;
            self.queue.retain(|Reverse((_, id))| timers.contains_key(id));
        }
    }

    /// Entries in the queue, the ones of forgotten timers included.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.queue.len()
    }
}
