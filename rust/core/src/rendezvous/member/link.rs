//! The connection of an agent to its host, and the lease that it renews.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Heartbeats that an agent sends within the silence timeout.
const BEATS_PER_SILENCE: u32 = 15;

/// Fraction of the silence timeout without an answer after which the workers are stopped.
const STOP_FRACTION: (u32, u32) = (4, 5);

/// Fraction of the silence timeout without an answer after which the workers are killed.
const KILL_FRACTION: (u32, u32) = (19, 20);

/// How long the workers of a node may run.
///
/// The host declares an agent lost when it has heard nothing from it for the silence timeout. The agent counts the same time from when it
/// *sent* the last message that the host has answered. That is earlier, so its workers are gone before others take their ranks, even if
/// messages are lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// When this agent sent the last message that the host has answered.
    pub renewed: Instant,
    /// When the workers are stopped.
    pub stop_at: Instant,
    /// When the workers are killed.
    pub kill_at: Instant,
}

#[derive(Debug)]
pub(super) enum Link {
    Down,
    /// Pausing between two attempts to connect.
    Pausing {
        next: Instant,
    },
    Connecting,
    /// Connected; the host has not welcomed the agent yet.
    Entering {
        since: Instant,
    },
    Up(Up),
    /// Given up because the host has not answered in time. The workers are being stopped.
    Lapsed(Lease),
}

/// The state of a connection that the host has welcomed.
#[derive(Debug)]
pub(super) struct Up {
    last_heard: Instant,
    next_beat_at: Instant,
    silence: Duration,
    /// Number of heartbeats sent, and the unanswered ones with the time of sending.
    beats_sent: u64,
    unanswered: VecDeque<(u64, Instant)>,
    renewed: Instant,
}

impl Link {
    /// The host has answered the introduction, which was sent at `since`.
    pub(super) fn up(since: Instant, now: Instant, silence: Duration) -> Self {
        let next_beat_at = now + silence / BEATS_PER_SILENCE;
        Self::Up(Up {
            last_heard: now,
            next_beat_at,
            silence,
            beats_sent: 0,
            unanswered: VecDeque::new(),
            renewed: since,
        })
    }

    pub(super) fn lease(&self) -> Option<Lease> {
        match self {
            Self::Up(up) => Some(up.lease()),
            Self::Lapsed(lease) => Some(*lease),
            Self::Down | Self::Pausing { .. } | Self::Connecting | Self::Entering { .. } => None,
        }
    }
}

impl Up {
    fn lease(&self) -> Lease {
        let fraction = |(numerator, denominator): (u32, u32)| self.renewed + self.silence / denominator * numerator;
        Lease { renewed: self.renewed, stop_at: fraction(STOP_FRACTION), kill_at: fraction(KILL_FRACTION) }
    }

    /// A message of the host has arrived.
    pub(super) fn note_heard(&mut self, now: Instant) {
        self.last_heard = now;
    }

    /// The host has answered a heartbeat.
    pub(super) fn note_answer(&mut self, number: u64) {
        while let Some((_, sent)) = self.unanswered.front().copied().filter(|(first, _)| *first <= number) {
            self.unanswered.pop_front();
            self.renewed = sent;
        }
    }

    pub(super) fn next_tick(&self, has_running_workers: bool) -> Instant {
        let end = if has_running_workers { self.lease().stop_at } else { self.last_heard + self.silence };
        self.next_beat_at.min(end)
    }

    /// The number of the heartbeat to send, if one is due. It counts as sent.
    pub(super) fn next_beat(&mut self, now: Instant) -> Option<u64> {
        if now < self.next_beat_at {
            return None;
        }
        self.next_beat_at = now + self.silence / BEATS_PER_SILENCE;
        self.beats_sent += 1;
        self.unanswered.push_back((self.beats_sent, now));
        Some(self.beats_sent)
    }

    /// The silence timeout, if the host has exceeded it.
    pub(super) fn exceeded_silence(&self, now: Instant) -> Option<Duration> {
        (now >= self.last_heard + self.silence).then_some(self.silence)
    }

    /// If this process missed the deadline `due` because it was suspended, restarts the silence timeout. The lease is not extended: the
    /// host's clock went on.
    pub(super) fn reset_after_suspension(&mut self, now: Instant, due: Instant) {
        if now > due + self.silence / 2 {
            (self.last_heard, self.next_beat_at) = (now, now);
        }
    }
}
