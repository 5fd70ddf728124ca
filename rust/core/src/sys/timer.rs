//! One-shot deadlines in a poller: `timerfd_create(2)`, with nanosecond resolution and without timer slack.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// A `timerfd` on `CLOCK_MONOTONIC`.
#[derive(Debug)]
pub struct Timer {
    fd: OwnedFd,
    armed: Option<Instant>,
}

impl Timer {
    /// Creates a disarmed timer.
    pub fn new() -> io::Result<Self> {
        let fd = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        Ok(Self { fd, armed: None })
    }

    /// Makes the timer readable at `deadline`, immediately if it has passed. `None` disarms it.
    pub fn set(&mut self, deadline: Option<Instant>) -> io::Result<()> {
        if deadline == self.armed {
            return Ok(());
        }
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = match deadline {
            None => zero,
            // Zero would disarm the timer, so a deadline that has passed is set to one nanosecond from now.
            Some(at) => at
                .saturating_duration_since(Instant::now())
                .max(Duration::from_nanos(1))
                .try_into()
                .unwrap_or(Timespec { tv_sec: i64::MAX / 2, tv_nsec: 0 }),
        };
        let spec = Itimerspec { it_interval: zero, it_value: value };
        timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &spec)?;
        self.armed = deadline;
        Ok(())
    }

    /// Acknowledges an expiry. The timer is disarmed afterwards.
    pub fn drain(&mut self) {
        let mut count = [0u8; 8];
        let _ = rustix::io::read(&self.fd, &mut count);
        self.armed = None;
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
