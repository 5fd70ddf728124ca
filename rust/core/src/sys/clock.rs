//! Reading the clocks, and arithmetic with instants that cannot overflow.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// Stands for "no limit". Longer durations cannot be added to every instant.
pub const ENDLESS: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// `now + duration`, with [`ENDLESS`] as the upper bound of the duration.
#[must_use]
pub fn later(now: Instant, duration: Duration) -> Instant {
    now + duration.min(ENDLESS)
}

/// The instant `duration` from now, with [`ENDLESS`] as its upper bound.
#[must_use]
pub fn after(duration: Duration) -> Instant {
    later(Instant::now(), duration)
}

/// `CLOCK_MONOTONIC` in nanoseconds.
#[must_use]
pub fn monotonic_ns() -> u64 {
    nanoseconds(ClockId::Monotonic)
}

fn nanoseconds(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

/// One instant on all clocks that reports use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// For arithmetic.
    pub instant: Instant,
    /// `CLOCK_MONOTONIC` in nanoseconds.
    pub monotonic_ns: u64,
    /// `CLOCK_REALTIME` in nanoseconds since the epoch.
    pub realtime_ns: u64,
}

impl Moment {
    /// This instant.
    #[must_use]
    pub fn now() -> Self {
        Self { instant: Instant::now(), monotonic_ns: monotonic_ns(), realtime_ns: nanoseconds(ClockId::Realtime) }
    }

    /// The wall clock, in seconds since the epoch.
    #[must_use]
    pub fn wall_s(&self) -> f64 {
        Duration::from_nanos(self.realtime_ns).as_secs_f64()
    }

    /// The monotonic instant of a wall clock time, by the wall clock of this moment. A later step of the wall clock does not move it.
    /// `None` if it is too far ahead for an instant.
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
