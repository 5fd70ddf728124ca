//! The status of the job: reported by the agent and the engine, published as JSON.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::supervise::Exit;
use crate::sys::usage::RunningUsage;
use crate::sys::wait::ExitStatus;
use crate::vocabulary::{AgentState, RestartCause, RestartPhase, RestartReason, WorkerState};

/// A report of the agent.
#[derive(Clone, Debug, PartialEq)]
pub enum Update {
    /// The identity of the job.
    Job {
        /// Run id of the job.
        run_id: String,
        /// Role of the workers.
        role: String,
    },
    /// The new state of the agent.
    State(AgentState),
    /// The started workers of a new round.
    Workers(Vec<Started>),
    /// The workers will be restarted.
    Restart {
        /// Cause of the restart.
        cause: RestartCause,
        /// Description of the event, for people.
        reason: String,
    },
    /// The restart policy has decided on a failure.
    Decision {
        /// The rule that decided.
        reason: RestartReason,
        /// The reason, for people.
        text: String,
    },
    /// Workers start cold although warm workers were requested, for this reason.
    WarmRefusal(String),
    /// A phase of a restart has finished.
    Phase {
        /// The phase.
        phase: RestartPhase,
        /// Its duration.
        took: Duration,
    },
}

/// A started worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Started {
    /// Rank on this host.
    pub local_rank: u64,
    /// Rank in the job.
    pub rank: u64,
    /// Process id.
    pub pid: i32,
}

/// The status of a worker.
#[derive(Clone, Copy, Debug)]
pub struct Worker {
    /// Ranks and pid.
    pub started: Started,
    /// Exit status, and whether the agent stopped the worker; `None` while it runs.
    exit: Option<(ExitStatus, bool)>,
}

impl Worker {
    /// The state of the worker.
    #[must_use]
    pub fn outcome(&self) -> WorkerState {
        match self.exit {
            None => WorkerState::Running,
            Some((_, true)) => WorkerState::Stopped,
            Some((ExitStatus::Exited(0), _)) => WorkerState::Succeeded,
            Some((ExitStatus::Unknown, _)) => WorkerState::Ended,
            Some(_) => WorkerState::Failed,
        }
    }
}

impl fmt::Display for Worker {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "rank {} (pid {}) ", self.started.rank, self.started.pid)?;
        match self.exit {
            None => write!(formatter, "is running"),
            Some((status, _)) => write!(formatter, "{status}"),
        }
    }
}

/// Counts of the watchdogs, and the ages of the last beats.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WatchdogFigures {
    /// Valid requests.
    pub requests: u64,
    /// Rejected lines.
    pub broken: u64,
    /// Expired timers.
    pub expiries: u64,
    /// The time since the last request or beat of each process, by pid.
    pub last_beats: HashMap<i32, Duration>,
}

/// Counts of the pools of warm workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WarmFigures {
    /// Zygotes that can fork workers.
    pub ready_zygotes: u64,
    /// Processes that wait to become workers.
    pub parked: u64,
    /// Processes that have become workers.
    pub used: u64,
}

/// Figures of the engine thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EngineFigures {
    /// Of its watchdogs.
    pub watchdog: WatchdogFigures,
    /// Of its pools of warm workers.
    pub warm: WarmFigures,
    /// Log lines that matched a rule, by effect and reason of the rule.
    pub log_matches: BTreeMap<(&'static str, String), u64>,
}

/// The status of the job.
#[derive(Debug)]
pub struct JobStatus {
    began: Instant,
    run_id: Option<String>,
    role: Option<String>,
    state: (AgentState, Instant),
    rounds: u64,
    restarts: [u64; RestartCause::ALL.len()],
    last_restart: Option<(RestartCause, String, Instant)>,
    decisions: [u64; RestartReason::ALL.len()],
    last_decision: Option<(RestartReason, String, Instant)>,
    workers: Vec<Worker>,
    exits: [u64; WorkerState::ALL.len()],
    warm_refusals: u64,
    last_warm_refusal: Option<(String, Instant)>,
}

impl JobStatus {
    /// The status before the first report.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            began: now,
            run_id: None,
            role: None,
            state: (AgentState::Unknown, now),
            rounds: 0,
            restarts: [0; RestartCause::ALL.len()],
            last_restart: None,
            decisions: [0; RestartReason::ALL.len()],
            last_decision: None,
            workers: Vec::new(),
            exits: [0; WorkerState::ALL.len()],
            warm_refusals: 0,
            last_warm_refusal: None,
        }
    }

    /// Applies a report of the agent. [`Update::Phase`] has no effect: its duration goes to the histograms in [`super::metrics`].
    pub fn apply(&mut self, now: Instant, update: Update) {
        match update {
            Update::Job { run_id, role } => (self.run_id, self.role) = (Some(run_id), Some(role)),
            Update::State(state) => {
                if state != self.state.0 {
                    self.state = (state, now);
                }
            }
            Update::Workers(started) => {
                self.rounds += 1;
                self.workers = started.into_iter().map(|started| Worker { started, exit: None }).collect();
            }
            Update::Restart { cause, reason } => {
                self.restarts[cause as usize] += 1;
                self.last_restart = Some((cause, reason, now));
            }
            Update::Decision { reason, text } => {
                self.decisions[reason as usize] += 1;
                self.last_decision = Some((reason, text, now));
            }
            Update::WarmRefusal(reason) => {
                self.warm_refusals += 1;
                self.last_warm_refusal = Some((reason, now));
            }
            Update::Phase { .. } => {}
        }
    }

    /// Records the exit of a process if it is a running worker.
    pub fn record_exit(&mut self, exit: &Exit) {
        let worker = self.workers.iter_mut().find(|worker| worker.started.pid == exit.pid && worker.exit.is_none());
        if let Some(worker) = worker {
            worker.exit = Some((exit.status, exit.stopped));
            self.exits[worker.outcome() as usize] += 1;
        }
    }

    /// The state of the agent.
    #[must_use]
    pub fn state(&self) -> AgentState {
        self.state.0
    }

    /// The workers of the last round.
    #[must_use]
    pub fn workers(&self) -> &[Worker] {
        &self.workers
    }

    /// Process ids of the running workers.
    pub fn running(&self) -> impl Iterator<Item = i32> {
        let running = self.workers.iter().filter(|worker| worker.exit.is_none());
        running.map(|worker| worker.started.pid)
    }

    /// The number of rounds, which is the number of times the workers were started.
    #[must_use]
    pub fn rounds(&self) -> u64 {
        self.rounds
    }

    /// The number of restarts for this cause.
    #[must_use]
    pub fn restarts(&self, cause: RestartCause) -> u64 {
        self.restarts[cause as usize]
    }

    /// The number of decisions of the restart policy by this rule.
    #[must_use]
    pub fn decisions(&self, reason: RestartReason) -> u64 {
        self.decisions[reason as usize]
    }

    /// The number of workers of all rounds that ended in this state.
    #[must_use]
    pub fn exits(&self, outcome: WorkerState) -> u64 {
        self.exits[outcome as usize]
    }

    /// The number of cold starts although warm workers were requested.
    #[must_use]
    pub fn warm_refusals(&self) -> u64 {
        self.warm_refusals
    }

    /// The time since the status was created.
    #[must_use]
    pub fn uptime(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.began)
    }

    /// Whether the workers run, with the reason as one line of text.
    #[must_use]
    pub fn readiness(&self) -> (bool, String) {
        let state = self.state.0;
        if state != AgentState::Running {
            return (false, format!("not ready: state {}", state.name()));
        }
        match self.workers.iter().find(|worker| worker.outcome() == WorkerState::Failed) {
            Some(failed) => (false, format!("not ready: {failed}")),
            None => (true, format!("ready: {} of {} workers are running", self.running().count(), self.workers.len())),
        }
    }

    /// The status as JSON.
    ///
    /// # Panics
    ///
    /// Never: all fields have a JSON form.
    #[must_use]
    pub fn to_json(
        &self,
        now: Instant,
        figures: &EngineFigures,
        usage: impl Fn(i32) -> Option<RunningUsage>,
    ) -> Vec<u8> {
        let EngineFigures { watchdog, warm, .. } = figures;
        let since = |at: Instant| now.saturating_duration_since(at).as_secs_f64();
        let last = self.last_restart.as_ref();
        let status = StatusJson {
            run_id: self.run_id.as_deref(),
            role: self.role.as_deref(),
            state: self.state.0.name(),
            state_age_s: since(self.state.1),
            round: self.rounds,
            uptime_s: since(self.began),
            restarts: RestartsJson {
                failure: self.restarts(RestartCause::Failure),
                membership: self.restarts(RestartCause::Membership),
                last: last.map(|(cause, reason, at)| RestartJson { cause: cause.name(), reason, age_s: since(*at) }),
                last_decision: self.last_decision.as_ref().map(|(reason, text, at)| DecisionJson {
                    reason: reason.name(),
                    text,
                    age_s: since(*at),
                }),
            },
            watchdog: WatchdogJson {
                requests: watchdog.requests,
                broken_requests: watchdog.broken,
                expiries: watchdog.expiries,
            },
            warm: WarmJson {
                ready_zygotes: warm.ready_zygotes,
                parked: warm.parked,
                used: warm.used,
                refused: self.warm_refusals,
                last_refusal: self
                    .last_warm_refusal
                    .as_ref()
                    .map(|(reason, at)| RefusalJson { reason, age_s: since(*at) }),
            },
            workers: self.workers.iter().map(|worker| self.worker_json(worker, watchdog, &usage)).collect(),
        };
        let mut json = serde_json::to_vec_pretty(&status).expect("strings, numbers and lists are valid JSON");
        json.push(b'\n');
        json
    }

    fn worker_json(
        &self,
        worker: &Worker,
        watchdog: &WatchdogFigures,
        usage: impl Fn(i32) -> Option<RunningUsage>,
    ) -> WorkerJson {
        let Started { local_rank, rank, pid } = worker.started;
        let (exit_code, signal) = match worker.exit {
            Some((ExitStatus::Exited(code), _)) => (Some(code), None),
            Some((ExitStatus::Signalled { signal, .. }, _)) => (None, Some(signal)),
            _ => (None, None),
        };
        // The pid of a worker that has ended may have been reused.
        let usage = if worker.exit.is_none() { usage(pid) } else { None };
        WorkerJson {
            rank,
            local_rank,
            pid,
            state: worker.outcome().name(),
            exit_code,
            signal,
            restarts: self.rounds.saturating_sub(1),
            last_beat_age_s: watchdog.last_beats.get(&pid).map(Duration::as_secs_f64),
            resident_bytes: usage.map(|usage| usage.resident_bytes),
            cpu_s: usage.map(|usage| usage.cpu.as_secs_f64()),
        }
    }
}

#[derive(Serialize)]
struct StatusJson<'a> {
    run_id: Option<&'a str>,
    role: Option<&'a str>,
    state: &'static str,
    state_age_s: f64,
    round: u64,
    uptime_s: f64,
    restarts: RestartsJson<'a>,
    watchdog: WatchdogJson,
    warm: WarmJson<'a>,
    workers: Vec<WorkerJson>,
}

#[derive(Serialize)]
struct RestartsJson<'a> {
    failure: u64,
    membership: u64,
    last: Option<RestartJson<'a>>,
    last_decision: Option<DecisionJson<'a>>,
}

#[derive(Serialize)]
struct DecisionJson<'a> {
    reason: &'static str,
    text: &'a str,
    age_s: f64,
}

#[derive(Serialize)]
struct RestartJson<'a> {
    cause: &'static str,
    reason: &'a str,
    age_s: f64,
}

#[derive(Serialize)]
struct WatchdogJson {
    requests: u64,
    broken_requests: u64,
    expiries: u64,
}

#[derive(Serialize)]
struct WarmJson<'a> {
    ready_zygotes: u64,
    parked: u64,
    used: u64,
    refused: u64,
    last_refusal: Option<RefusalJson<'a>>,
}

#[derive(Serialize)]
struct RefusalJson<'a> {
    reason: &'a str,
    age_s: f64,
}

#[derive(Serialize)]
struct WorkerJson {
    rank: u64,
    local_rank: u64,
    pid: i32,
    state: &'static str,
    exit_code: Option<u8>,
    signal: Option<i32>,
    restarts: u64,
    last_beat_age_s: Option<f64>,
    resident_bytes: Option<u64>,
    cpu_s: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::clock::Moment;
    use crate::sys::wait::Usage;

    fn exit(pid: i32, status: ExitStatus, stopped: bool) -> Exit {
        Exit { index: 0, pid, order: 0, status, stopped, usage: Usage::default(), at: Moment::now() }
    }

    fn started(count: u64) -> Update {
        let pid = |rank| 100 + i32::try_from(rank).expect("small");
        Update::Workers((0..count).map(|rank| Started { local_rank: rank, rank: 8 + rank, pid: pid(rank) }).collect())
    }

    #[test]
    fn the_status_follows_the_reports_and_exits_of_a_job() {
        let start = Instant::now();
        let mut job = JobStatus::new(start);
        assert_eq!(job.readiness(), (false, "not ready: state unknown".into()));
        job.apply(start, Update::Job { run_id: "the \"run\"".into(), role: "trainer".into() });
        job.apply(start, started(2));
        job.apply(start, Update::State(AgentState::Running));
        assert_eq!(job.readiness(), (true, "ready: 2 of 2 workers are running".into()));
        job.record_exit(&exit(100, ExitStatus::Exited(0), false));
        assert_eq!(job.readiness(), (true, "ready: 1 of 2 workers are running".into()));
        job.record_exit(&exit(101, ExitStatus::Signalled { signal: 9, core_dumped: false }, false));
        assert_eq!(job.readiness(), (false, "not ready: rank 9 (pid 101) was killed by signal 9".into()));
        job.apply(start, Update::Restart { cause: RestartCause::Failure, reason: "rank 9".into() });
        job.apply(start, started(2));
        assert!(job.readiness().0);
        assert_eq!(
            (job.rounds(), job.restarts(RestartCause::Failure), job.restarts(RestartCause::Membership)),
            (2, 1, 0)
        );
        assert_eq!((job.exits(WorkerState::Succeeded), job.exits(WorkerState::Failed)), (1, 1));
    }

    #[test]
    fn an_exit_counts_once_and_only_for_workers() {
        let mut job = JobStatus::new(Instant::now());
        job.apply(Instant::now(), started(1));
        for _ in 0..2 {
            job.record_exit(&exit(100, ExitStatus::Exited(1), true));
            job.record_exit(&exit(999, ExitStatus::Exited(1), false));
        }
        assert_eq!((job.exits(WorkerState::Stopped), job.exits(WorkerState::Failed)), (1, 0));
    }

    #[test]
    fn the_json_has_every_field_and_no_usage_of_ended_workers() {
        let start = Instant::now();
        let mut job = JobStatus::new(start);
        job.apply(start, Update::Job { run_id: "r\n".into(), role: "trainer".into() });
        job.apply(start, started(2));
        job.apply(start, Update::State(AgentState::Running));
        job.record_exit(&exit(101, ExitStatus::Exited(7), false));
        job.apply(start, Update::Restart { cause: RestartCause::Membership, reason: "1 node waits".into() });
        job.apply(start, Update::WarmRefusal("a second thread".into()));
        let now = start + Duration::from_millis(1500);
        let watchdog = WatchdogFigures {
            requests: 5,
            broken: 1,
            expiries: 2,
            last_beats: HashMap::from([(100, Duration::from_millis(250))]),
        };
        let warm = WarmFigures { ready_zygotes: 1, parked: 3, used: 4 };
        let figures = EngineFigures { watchdog, warm, ..EngineFigures::default() };
        let usage = |pid| {
            assert_eq!(pid, 100);
            Some(RunningUsage { resident_bytes: 4096, cpu: Duration::from_millis(500) })
        };
        let json: serde_json::Value = serde_json::from_slice(&job.to_json(now, &figures, usage)).expect("JSON");
        let expected = serde_json::json!({
            "run_id": "r\n", "role": "trainer", "state": "running", "state_age_s": 1.5, "round": 1, "uptime_s": 1.5,
            "restarts": {
                "failure": 0, "membership": 1,
                "last": {"cause": "membership", "reason": "1 node waits", "age_s": 1.5},
                "last_decision": null
            },
            "watchdog": {"requests": 5, "broken_requests": 1, "expiries": 2},
            "warm": {
                "ready_zygotes": 1, "parked": 3, "used": 4, "refused": 1,
                "last_refusal": {"reason": "a second thread", "age_s": 1.5}
            },
            "workers": [
                {"rank": 8, "local_rank": 0, "pid": 100, "state": "running", "exit_code": null, "signal": null,
                 "restarts": 0, "last_beat_age_s": 0.25, "resident_bytes": 4096, "cpu_s": 0.5},
                {"rank": 9, "local_rank": 1, "pid": 101, "state": "failed", "exit_code": 7, "signal": null,
                 "restarts": 0, "last_beat_age_s": null, "resident_bytes": null, "cpu_s": null},
            ]
        });
        assert_eq!(json, expected);
    }
}
