//! How a worker ended.

use std::time::Instant;

use crate::sys::wait::{Status, Usage};

/// An instant on the clocks that are reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// For arithmetic.
    pub instant: Instant,
    /// `CLOCK_MONOTONIC` in nanoseconds.
    pub monotonic_ns: u64,
    /// `CLOCK_REALTIME` in nanoseconds since the epoch.
    pub realtime_ns: u64,
}

/// How one worker of a group ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Position of the worker in its group.
    pub index: usize,
    /// Its process id.
    pub pid: i32,
    /// Rank of this exit in the group: 0 is the first the kernel reported.
    pub order: usize,
    /// Exit code or signal.
    pub status: Status,
    /// The kernel's accounting.
    pub usage: Usage,
    /// The exit came after the group's stop had signalled this worker, and that may be why.
    pub stopped: bool,
    /// When it was noticed.
    pub at: Moment,
}

impl Moment {
    /// This instant.
    #[must_use]
    pub fn now() -> Self {
        let nanoseconds = |clock| {
            let time = rustix::time::clock_gettime(clock);
            time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
        };
        Self {
            instant: Instant::now(),
            monotonic_ns: nanoseconds(rustix::time::ClockId::Monotonic),
            realtime_ns: nanoseconds(rustix::time::ClockId::Realtime),
        }
    }
}
