//! Decides whether a job restarts after a failure, and after which delay. Pure: facts and the time in, decisions out.
//!
//! The host of the native rendezvous has one policy for the job. With other rendezvous handlers each agent has its own policy.

mod settings;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use settings::{InvalidSetting, OnNodeFailure, PolicySettings, RestartRate};

use crate::text::{bounded, printable_string};
use crate::vocabulary::RestartReason;

/// A script ends with this exit code to prevent a restart. Shells use 126 to 165 and 255, `sysexits.h` 64 to 78, Python 1, 2 and 120,
/// `timeout` and `xargs` 123 to 125, Rust 101. The code is below 128, because some schedulers take such codes as permanent failures.
pub const NO_RESTART_EXIT_CODE: i32 = 97;

/// A round that fails before this time and without progress has failed right after its start. The time is longer than the longest default
/// back-off: the round of a later failure has already run for longer than the back-off would last.
pub const EARLY: Duration = Duration::from_secs(10);

/// Maximum number of the causes of a failure, and maximum lengths of a cause and of a reason.
const MAX_CAUSES: usize = 16;
const MAX_CAUSE_BYTES: usize = 64;
const MAX_REASON_BYTES: usize = 1024;

/// The number of failures in a row from which restarts are delayed: the first one has no delay.
const FIRST_DELAYED: u32 = 2;

/// The jitter shortens a delay by up to this many thousandths.
const MAX_JITTER: u64 = 200;

/// The verdict of the agent's own policy on a failure.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RestartVerdict {
    /// The settings decide.
    #[default]
    Default,
    /// The agent has no restart left.
    Exhausted,
    /// The failure ends the job, for this reason.
    Final(String),
    /// If the settings allow a restart, it has this delay.
    Delay(Duration),
}

/// The facts of a failure.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailureFacts {
    /// Exit code of the worker that failed first, or minus the signal that ended it. `None` if no worker has ended.
    pub status: Option<i32>,
    /// The kind of failure and its known causes.
    pub causes: Vec<String>,
    /// The workers have made progress in this round.
    pub has_progressed: bool,
    /// The verdict of the agent.
    pub verdict: RestartVerdict,
}

impl FailureFacts {
    /// The facts of a failure that an agent or another program has announced, without an ended worker.
    #[must_use]
    pub fn of_agent() -> Self {
        Self { causes: vec!["agent".into()], ..Self::default() }
    }

    /// Shortens the texts to the limits of a message.
    #[must_use]
    pub fn shortened(mut self) -> Self {
        self.causes.truncate(MAX_CAUSES);
        for cause in &mut self.causes {
            cause.truncate(bounded(cause, MAX_CAUSE_BYTES).len());
        }
        if let RestartVerdict::Final(text) = &mut self.verdict {
            text.truncate(bounded(text, MAX_REASON_BYTES).len());
        }
        self
    }
}

/// A decision after a failure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// The rule that led to the decision.
    pub reason: RestartReason,
    /// The reason as text, which continues the description of a failure: "rank 0 exited with code 1, and ...".
    #[serde(deserialize_with = "printable_string")]
    pub text: String,
    /// The delay of the restart; `None` without a restart.
    pub after: Option<Duration>,
}

impl Decision {
    fn end(reason: RestartReason, text: String) -> Self {
        Self { reason, text, after: None }
    }

    /// Whether the failure ends the job.
    #[must_use]
    pub fn is_final(&self) -> bool {
        self.after.is_none()
    }

    /// Whether the counters led to the decision, and not the facts of the failure. Any failure of the round would then have ended the job.
    #[must_use]
    pub fn is_by_counters(&self) -> bool {
        use RestartReason::{MaxRestarts, MinUptime, NoProgress, RestartRate};
        matches!(self.reason, MaxRestarts | MinUptime | NoProgress | RestartRate)
    }
}

/// The counters of a policy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Counters {
    /// Restarts that count against the limit.
    used: u64,
    /// All restarts after failures.
    restarts: u64,
    /// Failures right after the start in a row.
    early_failures: u32,
    /// Restarts since the last progress.
    idle_restarts: u64,
    /// Times of the last restarts, as many as the rate limit needs.
    times: VecDeque<Instant>,
    /// A round has reached the minimum uptime or made progress.
    has_started: bool,
}

/// The restart policy of a job.
#[derive(Debug)]
pub struct RestartPolicy {
    settings: PolicySettings,
    seed: u64,
    round_began: Option<Instant>,
    has_progressed: bool,
    counters: Counters,
    /// The counters before the last decision of this round.
    undecided: Option<Counters>,
}

impl RestartPolicy {
    /// A policy without failures. `seed` determines the jitter.
    #[must_use]
    pub fn new(settings: PolicySettings, seed: &str) -> Self {
        Self {
            settings,
            seed: hash(seed.as_bytes()),
            round_began: None,
            has_progressed: false,
            counters: Counters::default(),
            undecided: None,
        }
    }

    /// The settings.
    #[must_use]
    pub fn settings(&self) -> &PolicySettings {
        &self.settings
    }

    /// Replaces the settings, but not the counters.
    pub fn set_settings(&mut self, settings: PolicySettings) {
        self.settings = settings;
    }

    /// Number of restarts that count against the limit.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.counters.used
    }

    /// A round begins.
    pub fn begin_round(&mut self, now: Instant) {
        self.round_began = Some(now);
        self.has_progressed = false;
        self.undecided = None;
    }

    /// The workers have made progress in this round.
    pub fn note_progress(&mut self) {
        self.has_progressed = true;
    }

    /// The round has ended by a change of membership.
    pub fn note_membership_change(&mut self, now: Instant) {
        self.note_uptime(now);
    }

    /// The decision to end the job because of the facts alone; `None` if it depends on the counters.
    #[must_use]
    pub fn fatal(&self, facts: &FailureFacts) -> Option<Decision> {
        let settings = &self.settings;
        if let RestartVerdict::Final(text) = &facts.verdict {
            return Some(Decision::end(RestartReason::Program, text.clone()));
        }
        if let Some(status) = facts.status {
            if status == NO_RESTART_EXIT_CODE {
                let text = format!("exit code {NO_RESTART_EXIT_CODE} forbids a restart");
                return Some(Decision::end(RestartReason::NoRestartCode, text));
            }
            if let Some(name) = settings.fatal_exit(status) {
                let text = format!("{name} is final (--fatal-exit-codes)");
                return Some(Decision::end(RestartReason::FatalExitCode, text));
            }
        }
        if let Some(cause) = facts.causes.iter().find(|cause| settings.fatal_causes.contains(*cause)) {
            let text = format!("the cause {cause} is final (--fatal-causes)");
            return Some(Decision::end(RestartReason::FatalCause, text));
        }
        let is_exhausted = facts.verdict == RestartVerdict::Exhausted;
        is_exhausted.then(|| Decision::end(RestartReason::MaxRestarts, "no restart is left".into()))
    }

    /// Decides on the failure that ends the round. A second call in a round replaces the first decision.
    pub fn decide(&mut self, now: Instant, facts: &FailureFacts) -> Decision {
        self.undo();
        self.undecided = Some(self.counters.clone());
        self.has_progressed |= facts.has_progressed;
        let uptime = self.note_uptime(now);
        if let Some(decision) = self.fatal(facts).or_else(|| self.exhausted(now, uptime)) {
            return decision;
        }
        self.counters.used += 1;
        self.counters.restarts += 1;
        self.counters.idle_restarts += 1;
        if let Some(rate) = self.settings.rate {
            self.counters.times.push_back(now);
            while self.counters.times.len() > usize::try_from(rate.restarts).unwrap_or(usize::MAX) {
                self.counters.times.pop_front();
            }
        }
        if uptime < EARLY && !self.has_progressed {
            self.counters.early_failures = self.counters.early_failures.saturating_add(1);
        } else {
            self.counters.early_failures = 0;
        }
        self.restart(&facts.verdict)
    }

    /// Takes back the last decision of this round, because the round has ended for another reason.
    pub fn undo(&mut self) {
        if let Some(counters) = self.undecided.take() {
            self.counters = counters;
        }
    }

    /// Applies the uptime and the progress of the round to the counters, and returns the uptime.
    fn note_uptime(&mut self, now: Instant) -> Duration {
        let uptime = self.round_began.map_or(Duration::ZERO, |began| now.saturating_duration_since(began));
        let settings = &self.settings;
        if settings.healthy_window.is_some_and(|window| uptime >= window) {
            self.counters.used = 0;
        }
        if self.has_progressed {
            (self.counters.early_failures, self.counters.idle_restarts) = (0, 0);
        }
        self.counters.has_started |= self.has_progressed || uptime >= settings.min_uptime;
        uptime
    }

    /// The decision to end the job because of the counters; `None` if a restart is left.
    fn exhausted(&self, now: Instant, uptime: Duration) -> Option<Decision> {
        let (settings, counters) = (&self.settings, &self.counters);
        if !counters.has_started {
            let (up_s, least_s) = (uptime.as_secs_f64(), settings.min_uptime.as_secs_f64());
            let text = format!("the first start failed after {up_s:.1} s, before {least_s} s (--min-uptime)");
            return Some(Decision::end(RestartReason::MinUptime, text));
        }
        if let Some(max) = settings.max_idle_restarts.filter(|max| counters.idle_restarts >= *max) {
            let text = format!("{max} restarts made no progress (--restarts-without-progress)");
            return Some(Decision::end(RestartReason::NoProgress, text));
        }
        if settings.max_restarts.is_some_and(|max| counters.used >= max) {
            return Some(Decision::end(RestartReason::MaxRestarts, "no restart is left".into()));
        }
        if let Some(rate) = settings.rate {
            let recent = counters.times.iter().filter(|at| now.saturating_duration_since(**at) < rate.period);
            if u64::try_from(recent.count()).unwrap_or(u64::MAX) >= rate.restarts {
                let (restarts, period_s) = (rate.restarts, rate.period.as_secs_f64());
                let text = format!("there were {restarts} restarts within {period_s} s (--restart-rate)");
                return Some(Decision::end(RestartReason::RestartRate, text));
            }
        }
        None
    }

    /// The decision to restart, with its delay.
    fn restart(&self, verdict: &RestartVerdict) -> Decision {
        let counters = &self.counters;
        let of_max = self.settings.max_restarts.map_or_else(String::new, |max| format!(" of {max}"));
        let restart = format!("restart {}{of_max}", counters.used);
        if let RestartVerdict::Delay(delay) = verdict {
            let text =
                format!("{restart} follows after {:.2} s: the restart policy of the program", delay.as_secs_f64());
            return Decision { reason: RestartReason::Program, text, after: Some(*delay) };
        }
        let delay = self.backoff();
        if delay.is_zero() {
            let text = format!("{restart} follows at once");
            return Decision { reason: RestartReason::AtOnce, text, after: Some(delay) };
        }
        let text = format!(
            "{restart} follows after {:.2} s: {} failures in a row within {} s of the start (--restart-backoff)",
            delay.as_secs_f64(),
            counters.early_failures,
            EARLY.as_secs()
        );
        Decision { reason: RestartReason::Backoff, text, after: Some(delay) }
    }

    /// The delay after the current number of failures in a row right after the start. Each further failure doubles the delay.
    fn backoff(&self) -> Duration {
        let Some(doublings) = self.counters.early_failures.checked_sub(FIRST_DELAYED) else { return Duration::ZERO };
        let factor = 1u32.checked_shl(doublings).unwrap_or(u32::MAX);
        let delay = self.settings.backoff.saturating_mul(factor).min(self.settings.max_backoff);
        let jitter = mix(self.seed ^ mix(self.counters.restarts)) % (MAX_JITTER + 1);
        let micros = u64::try_from(delay.as_micros()).unwrap_or(u64::MAX / 1000) / 1000 * (1000 - jitter);
        Duration::from_micros(micros)
    }
}

/// FNV-1a. The result is the same on all machines.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The output function of `SplitMix64`.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
