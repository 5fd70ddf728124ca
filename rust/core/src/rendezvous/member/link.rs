//! The connection of one agent to its host, and for how long that vouches for its workers.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Of the silence after which the other side is taken for lost, an agent is silent for no more than this part.
const BEATS_PER_SILENCE: u32 = 15;

/// When the host has not answered for this part of the silence, the workers are told to end.
const STOP_PART: (u32, u32) = (4, 5);

/// When it has not for this part, none of them may be left.
const KILL_PART: (u32, u32) = (19, 20);

/// Until when workers may run.
///
/// The host takes an agent for lost a certain time after it has heard of it. The agent counts the same time from when it has *sent* what
/// the host has answered. That is earlier, so its workers are gone before others take their ranks, whatever is lost on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// When it was sent what the host has answered last.
    pub renewed: Instant,
    /// The workers are told to end.
    pub stop_at: Instant,
    /// None of them is left.
    pub kill_at: Instant,
}

#[derive(Debug)]
pub(super) enum Link {
    Down,
    /// Between two attempts to connect.
    Pausing {
        next: Instant,
    },
    Connecting,
    /// The host has not said anything yet.
    Entering {
        since: Instant,
    },
    Up(Up),
    /// It was given up, because the host did not answer for too long. The workers are being stopped.
    Lapsed(Lease),
}

/// Both sides talk.
#[derive(Debug)]
pub(super) struct Up {
    heard: Instant,
    beat_at: Instant,
    silence: Duration,
    /// Beats that were sent, and when those were that have no answer.
    beats: u64,
    unanswered: VecDeque<(u64, Instant)>,
    renewed: Instant,
}

impl Link {
    /// The host has answered what was sent at `since`.
    pub(super) fn up(since: Instant, now: Instant, silence: Duration) -> Self {
        let beat_at = now + silence / BEATS_PER_SILENCE;
        Self::Up(Up { heard: now, beat_at, silence, beats: 0, unanswered: VecDeque::new(), renewed: since })
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
        let part = |(part, whole): (u32, u32)| self.renewed + self.silence / whole * part;
        Lease { renewed: self.renewed, stop_at: part(STOP_PART), kill_at: part(KILL_PART) }
    }

    /// The host has said something.
    pub(super) fn hear(&mut self, now: Instant) {
        self.heard = now;
    }

    /// The host has answered a beat.
    pub(super) fn answered(&mut self, number: u64) {
        while let Some((_, sent)) = self.unanswered.front().copied().filter(|(first, _)| *first <= number) {
            self.unanswered.pop_front();
            self.renewed = sent;
        }
    }

    pub(super) fn next_tick(&self, has_running_workers: bool) -> Instant {
        let end = if has_running_workers { self.lease().stop_at } else { self.heard + self.silence };
        self.beat_at.min(end)
    }

    /// The number of the beat that is due, if one is; it counts as sent.
    pub(super) fn beat(&mut self, now: Instant) -> Option<u64> {
        if now < self.beat_at {
            return None;
        }
        self.beat_at = now + self.silence / BEATS_PER_SILENCE;
        self.beats += 1;
        self.unanswered.push_back((self.beats, now));
        Some(self.beats)
    }

    /// How long the host has been silent, if that is too long.
    pub(super) fn is_silent(&self, now: Instant) -> Option<Duration> {
        (now >= self.heard + self.silence).then_some(self.silence)
    }

    /// This process was stopped until now, when it was due to do something before. The lease goes on: time passes on the host too.
    pub(super) fn forgive_pause(&mut self, now: Instant, due: Instant) {
        if now > due + self.silence / 2 {
            (self.heard, self.beat_at) = (now, now);
        }
    }
}
