//! Reading the clocks, and arithmetic with instants without overflow.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// Upper bound of durations; stands for "no limit". Adding a longer duration to an instant might overflow.
pub const ENDLESS: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// `now + duration`. The duration is at most [`ENDLESS`].
#[must_use]
pub fn later(now: Instant, duration: Duration) -> Instant {
    now + duration.min(ENDLESS)
}

/// The instant `duration` from now. The duration is at most [`ENDLESS`].
#[must_use]
pub fn after(duration: Duration) -> Instant {
    later(Instant::now(), duration)
}

/// `CLOCK_MONOTONIC` in nanoseconds.
#[must_use]
pub fn monotonic_ns() -> u64 {
    nanoseconds(ClockId::Monotonic)
}

/// `CLOCK_REALTIME` in nanoseconds since the epoch.
#[must_use]
pub fn realtime_ns() -> u64 {
    nanoseconds(ClockId::Realtime)
}

fn nanoseconds(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

/// One point in time on each clock that reports use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// The same time for arithmetic.
    pub instant: Instant,
    /// `CLOCK_MONOTONIC` in nanoseconds.
    pub monotonic_ns: u64,
    /// `CLOCK_REALTIME` in nanoseconds since the epoch.
    pub realtime_ns: u64,
}

impl Moment {
    /// The current time.
    #[must_use]
    pub fn now() -> Self {
        Self { instant: Instant::now(), monotonic_ns: monotonic_ns(), realtime_ns: realtime_ns() }
    }

    /// The wall clock, in seconds since the epoch.
    #[must_use]
    pub fn wall_s(&self) -> f64 {
        Duration::from_nanos(self.realtime_ns).as_secs_f64()
    }

    /// Converts a wall clock time to a monotonic instant. Later steps of the wall clock do not change the result.
    /// `None` if the time is too far in the future for an [`Instant`].
    #[must_use]
    pub fn instant_of(&self, wall_s: f64) -> Option<Instant> {
        let ahead_s = wall_s - self.wall_s();
        let ahead = Duration::try_from_secs_f64(ahead_s.abs()).unwrap_or(Duration::MAX);
        if ahead_s >= 0.0 {
            self.instant.checked_add(ahead)
        } else {
            Some(self.instant.checked_sub(ahead).unwrap_or(self.instant))
        }
    }
}
