//! The table of deadlines: the next deadline and the expired timers. Pure: the time is an argument.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::time::Instant;

use super::wire::{NEVER_S, TimerRequest};
use crate::sys::clock::Moment;

/// Limit on armed timers, far above the needs of one host.
pub const MAX_TIMERS: usize = 65_536;

/// The monotonic instant of an expiration time in seconds since the epoch; `None` if it is at least [`NEVER_S`] ahead. The conversion
/// happens once, when the request arrives, so later steps of the wall clock do not move deadlines.
#[must_use]
pub fn expiry_instant(received: Moment, expiration_time: f64) -> Option<Instant> {
    let is_never = expiration_time - received.wall_s() >= NEVER_S;
    if is_never { None } else { received.instant_of(expiration_time) }
}

/// An armed timer.
#[derive(Clone, Debug, PartialEq)]
pub struct ArmedTimer {
    /// The request that armed it.
    pub request: TimerRequest,
    /// When it expires; `None` means never.
    pub at: Option<Instant>,
}

/// The table is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// All armed timers.
#[derive(Debug, Default)]
pub struct Deadlines {
    timers: HashMap<u64, ArmedTimer>,
    by_process: HashMap<i32, HashMap<String, u64>>,
    /// Earliest first. Entries of removed timers stay until they reach the front or until a compaction.
    queue: BinaryHeap<Reverse<(Instant, u64)>>,
    last_id: u64,
}

impl Deadlines {
    /// Arms a timer. It replaces the timer of the same process and scope.
    pub fn arm(&mut self, request: TimerRequest, at: Option<Instant>) -> Result<(), Full> {
        self.release(request.pid, &request.scope);
        if self.timers.len() >= MAX_TIMERS {
            return Err(Full);
        }
        self.last_id += 1;
        let id = self.last_id;
        self.by_process.entry(request.pid).or_default().insert(request.scope.clone(), id);
        self.timers.insert(id, ArmedTimer { request, at });
        if let Some(at) = at {
            self.queue.push(Reverse((at, id)));
        }
        self.compact();
        Ok(())
    }

    /// Removes one timer.
    pub fn release(&mut self, pid: i32, scope: &str) -> Option<ArmedTimer> {
        let scopes = self.by_process.get_mut(&pid)?;
        let id = scopes.remove(scope)?;
        if scopes.is_empty() {
            self.by_process.remove(&pid);
        }
        self.timers.remove(&id)
    }

    /// Removes all timers of a process.
    pub fn release_all(&mut self, pid: i32) -> Vec<ArmedTimer> {
        let scopes = self.by_process.remove(&pid).unwrap_or_default();
        scopes.values().filter_map(|id| self.timers.remove(id)).collect()
    }

    /// When the next timer expires. Drops entries of removed timers from the front of the queue.
    pub fn next_at(&mut self) -> Option<Instant> {
        while let Some(Reverse((at, id))) = self.queue.peek() {
            if self.timers.contains_key(id) {
                return Some(*at);
            }
            self.queue.pop();
        }
        None
    }

    /// Removes and returns the expired timers, earliest first.
    pub fn expired(&mut self, now: Instant) -> Vec<ArmedTimer> {
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

    /// The armed timers, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = &ArmedTimer> {
        self.timers.values()
    }

    /// The armed timers of one process, in no particular order.
    pub fn of(&self, pid: i32) -> impl Iterator<Item = &ArmedTimer> {
        self.by_process.get(&pid).into_iter().flat_map(|scopes| scopes.values()).filter_map(|id| self.timers.get(id))
    }

    /// The number of armed timers.
    #[must_use]
    pub fn len(&self) -> usize {
        self.timers.len()
    }

    /// Whether no timer is armed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.timers.is_empty()
    }

    /// Whether a process has an armed timer.
    #[must_use]
    pub fn has(&self, pid: i32) -> bool {
        self.by_process.contains_key(&pid)
    }

    /// Bounds the queue by the number of armed timers: a worker that arms and releases a timer at every step adds a stale entry each time.
    fn compact(&mut self) {
        if self.queue.len() > 2 * self.timers.len() + 64 {
            let timers = &self.timers;
            self.queue.retain(|Reverse((_, id))| timers.contains_key(id));
        }
    }

    /// The number of entries in the queue, including those of removed timers.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.queue.len()
    }
}
