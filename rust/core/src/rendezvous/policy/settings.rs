//! The settings of a restart policy. An agent sends them to the host as text when it introduces itself.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::time::Duration;

use crate::vocabulary::named_values;

/// Upper bound of all times in seconds: one year.
const MAX_SECONDS: f64 = 365.0 * 24.0 * 3600.0;

/// Text of a setting that is not set.
const NONE: &str = "none";

named_values! {
    /// Reaction to a node of the round that leaves or is lost.
    OnNodeFailure, "reaction to a lost node":
    /// The other nodes restart at once if they are enough.
    Restart = "restart",
    /// The other nodes wait for another node in its place, up to the join timeout.
    Wait = "wait",
    /// The job ends.
    Exit = "exit",
}

/// Maximum number of restarts within a period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestartRate {
    /// Number of restarts.
    pub restarts: u64,
    /// Length of the period.
    pub period: Duration,
}

/// The settings of a restart policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicySettings {
    /// Maximum number of restarts after failures; `None` means no limit.
    pub max_restarts: Option<u64>,
    /// Delay of the restart after the second failure in a row right after the start. Each further failure doubles it. Zero for no delay.
    pub backoff: Duration,
    /// The longest delay.
    pub max_backoff: Duration,
    /// A round that was up for this time gives all restarts back.
    pub healthy_window: Option<Duration>,
    /// Maximum number of restarts within a period.
    pub rate: Option<RestartRate>,
    /// Exit codes that end the job; signals are negative.
    pub fatal_exits: Vec<RangeInclusive<i32>>,
    /// Kinds and causes of failures that end the job.
    pub fatal_causes: BTreeSet<String>,
    /// A failure ends the job while no round has been up for this time or made progress.
    pub min_uptime: Duration,
    /// Maximum number of restarts without progress in between.
    pub max_idle_restarts: Option<u64>,
    /// Reaction to a node of the round that leaves or is lost.
    pub on_node_failure: OnNodeFailure,
    /// The round has failed if other nodes run on for longer than this after a node has succeeded.
    pub early_exit: Option<Duration>,
}

impl Default for PolicySettings {
    /// No limit of restarts, and the default back-off.
    fn default() -> Self {
        Self {
            max_restarts: None,
            backoff: Duration::from_millis(250),
            max_backoff: Duration::from_secs(5),
            healthy_window: None,
            rate: None,
            fatal_exits: Vec::new(),
            fatal_causes: BTreeSet::from(["stuck".to_owned()]),
            min_uptime: Duration::ZERO,
            max_idle_restarts: None,
            on_node_failure: OnNodeFailure::Restart,
            early_exit: None,
        }
    }
}

/// A setting that is not valid.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name}={value:?} is not valid: {expected}")]
pub struct InvalidSetting {
    /// The option.
    pub name: String,
    /// Its value.
    pub value: String,
    /// Description of valid values.
    pub expected: String,
}

impl PolicySettings {
    /// Parses the settings from option names and values. Other options are ignored, and missing ones have their defaults.
    pub fn parse(options: &BTreeMap<String, String>) -> Result<Self, InvalidSetting> {
        let mut settings = Self::default();
        for (name, value) in options {
            settings.set(name, value.trim()).map_err(|expected| InvalidSetting {
                name: name.clone(),
                value: value.clone(),
                expected,
            })?;
        }
        Ok(settings)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        match name {
            "--max-restarts" => self.max_restarts = whole_number(value)?,
            "--restart-backoff" => self.backoff = seconds(value)?,
            "--restart-backoff-max" => self.max_backoff = seconds(value)?,
            "--healthy-window" => self.healthy_window = optional_seconds(value)?,
            "--restart-rate" => self.rate = rate(value)?,
            "--fatal-exit-codes" => self.fatal_exits = exits(value)?,
            "--fatal-causes" => self.fatal_causes = causes(value)?,
            "--min-uptime" => self.min_uptime = seconds(value)?,
            "--restarts-without-progress" => self.max_idle_restarts = whole_number(value)?,
            "--on-node-failure" => self.on_node_failure = value.parse().map_err(|_| "give restart, wait or exit")?,
            "--early-exit-timeout" => self.early_exit = optional_seconds(value)?,
            _ => {}
        }
        Ok(())
    }

    /// The exit code or signal as text if it ends the job.
    pub(super) fn fatal_exit(&self, status: i32) -> Option<String> {
        let is_fatal = self.fatal_exits.iter().any(|range| range.contains(&status));
        let name = || match SIGNALS.iter().find(|(_, number)| -number == status) {
            Some((name, _)) => format!("SIG{name}"),
            None if status < 0 => format!("signal {}", -status),
            None => format!("exit code {status}"),
        };
        is_fatal.then(name)
    }
}

/// Signals that end a process. The numbers of these are the same on x86 and ARM.
const SIGNALS: [(&str, i32); 20] = [
    ("HUP", libc::SIGHUP),
    ("INT", libc::SIGINT),
    ("QUIT", libc::SIGQUIT),
    ("ILL", libc::SIGILL),
    ("TRAP", libc::SIGTRAP),
    ("ABRT", libc::SIGABRT),
    ("BUS", libc::SIGBUS),
    ("FPE", libc::SIGFPE),
    ("KILL", libc::SIGKILL),
    ("USR1", libc::SIGUSR1),
    ("SEGV", libc::SIGSEGV),
    ("USR2", libc::SIGUSR2),
    ("PIPE", libc::SIGPIPE),
    ("ALRM", libc::SIGALRM),
    ("TERM", libc::SIGTERM),
    ("STKFLT", libc::SIGSTKFLT),
    ("XCPU", libc::SIGXCPU),
    ("XFSZ", libc::SIGXFSZ),
    ("SYS", libc::SIGSYS),
    ("IO", libc::SIGIO),
];

fn whole_number(value: &str) -> Result<Option<u64>, String> {
    if value == NONE {
        return Ok(None);
    }
    value.parse().map(Some).map_err(|_| "give a whole number from 0, or none".into())
}

fn seconds(value: &str) -> Result<Duration, String> {
    let seconds = value.parse().ok().filter(|seconds| (0.0..=MAX_SECONDS).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "give seconds from 0 to one year".into())
}

/// Seconds; 0 means that the setting is off.
fn optional_seconds(value: &str) -> Result<Option<Duration>, String> {
    seconds(value).map(|seconds| (!seconds.is_zero()).then_some(seconds))
}

/// A rate in the form `RESTARTS/SECONDS`.
fn rate(value: &str) -> Result<Option<RestartRate>, String> {
    if value == NONE {
        return Ok(None);
    }
    let parse = || {
        let (restarts, period) = value.split_once('/')?;
        let restarts = restarts.trim().parse().ok().filter(|restarts| *restarts <= 1000)?;
        let period = seconds(period.trim()).ok().filter(|period| !period.is_zero())?;
        Some(RestartRate { restarts, period })
    };
    parse().map(Some).ok_or_else(|| "give RESTARTS/SECONDS, e.g. 5/3600, with at most 1000 restarts, or none".into())
}

fn words(value: &str) -> BTreeSet<String> {
    let words = value.split(',').map(str::trim).filter(|word| !word.is_empty() && *word != NONE);
    words.map(str::to_owned).collect()
}

/// Kinds and causes of failures that `--fatal-causes` accepts. `python/ferroelastic/_failure` finds them.
const CAUSES: [&str; 13] = [
    "agent",
    "cuda_out_of_memory",
    "early_exit",
    "exit",
    "log_pattern",
    "missing_module",
    "nccl_timeout",
    "oom_killer",
    "port_in_use",
    "shm_full",
    "signal",
    "stuck",
    "watchdog",
];

/// A list of kinds and causes of failures.
fn causes(value: &str) -> Result<BTreeSet<String>, String> {
    let causes = words(value);
    match causes.iter().find(|cause| !CAUSES.contains(&cause.as_str())) {
        Some(cause) => Err(format!("{cause:?} is not one of {}", CAUSES.join(", "))),
        None => Ok(causes),
    }
}

/// A list of exit codes, ranges of them, and names of signals.
fn exits(value: &str) -> Result<Vec<RangeInclusive<i32>>, String> {
    let exit = |word: &str| {
        exit_range(word).ok_or_else(|| {
            format!("{word:?} is not an exit code from 1 to 255, a range such as 3-5, or a signal such as SIGSEGV")
        })
    };
    words(value).iter().map(|word| exit(word)).collect()
}

fn exit_range(word: &str) -> Option<RangeInclusive<i32>> {
    let upper = word.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = SIGNALS.iter().find(|(known, _)| *known == name) {
        return Some(-number..=-number);
    }
    let (first, last) = word.split_once('-').unwrap_or((word, word));
    let (first, last): (i32, i32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    (1 <= first && first <= last && last <= 255).then_some(first..=last)
}
