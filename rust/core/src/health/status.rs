//! The board: what the agent says of its job and the engine of its workers, and how it is shown.

use std::collections::HashMap;
use std::fmt;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::supervise::Exit;
use crate::sys::usage::RunningUsage;
use crate::sys::wait::ExitStatus;
use crate::vocabulary::{AgentState, RestartCause, RestartPhase, WorkerState};

/// What the agent says.
#[derive(Clone, Debug, PartialEq)]
pub enum Update {
    /// Which job it is.
    Job {
        /// Name of the job.
        run_id: String,
        /// Role of the workers.
        role: String,
    },
    /// What the agent is doing now.
    State(AgentState),
    /// The workers of a new round, which have been started.
    Workers(Vec<Started>),
    /// The workers are to be started again.
    Restart {
        /// Why.
        cause: RestartCause,
        /// What happened, for people.
        reason: String,
    },
    /// A part of a restart is over.
    Phase {
        /// Which.
        phase: RestartPhase,
        /// How long it took.
        took: Duration,
    },
}

/// A worker that was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Started {
    /// Its rank on this host.
    pub local_rank: u64,
    /// Its rank in the job.
    pub rank: u64,
    /// Its process.
    pub pid: i32,
}

/// A worker on the board.
#[derive(Clone, Copy, Debug)]
pub struct Worker {
    /// Who it is.
    pub started: Started,
    /// How it ended, if it has.
    ending: Option<(ExitStatus, bool)>,
}

impl Worker {
    /// How it is, or how it ended.
    #[must_use]
    pub fn outcome(&self) -> WorkerState {
        match self.ending {
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
        match self.ending {
            None => write!(formatter, "runs"),
            Some((ExitStatus::Exited(code), _)) => write!(formatter, "exited with code {code}"),
            Some((ExitStatus::Signalled { signal, .. }, _)) => write!(formatter, "was ended by signal {signal}"),
            Some((ExitStatus::Unknown, _)) => write!(formatter, "ended"),
        }
    }
}

/// What a watchdog has counted, and who it heard of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WatchdogFigures {
    /// Requests that were understood.
    pub requests: u64,
    /// Lines that were not.
    pub broken: u64,
    /// Timers that expired.
    pub expiries: u64,
    /// By pid, how long ago the last request or beat of a process was.
    pub last_beats: HashMap<i32, Duration>,
}

/// What is known of the job.
#[derive(Debug)]
pub struct Board {
    began: Instant,
    run_id: Option<String>,
    role: Option<String>,
    state: (AgentState, Instant),
    rounds: u64,
    restarts: [u64; RestartCause::ALL.len()],
    last_restart: Option<(RestartCause, String, Instant)>,
    workers: Vec<Worker>,
    exits: [u64; WorkerState::ALL.len()],
}

impl Board {
    /// Nothing is known.
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
            workers: Vec::new(),
            exits: [0; WorkerState::ALL.len()],
        }
    }

    /// Enters what the agent says. The duration of a phase is for a histogram and not for the board.
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
                self.workers = started.into_iter().map(|started| Worker { started, ending: None }).collect();
            }
            Update::Restart { cause, reason } => {
                self.restarts[cause as usize] += 1;
                self.last_restart = Some((cause, reason, now));
            }
            Update::Phase { .. } => {}
        }
    }

    /// Enters how a process ended, if it is one of the workers.
    pub fn note_exit(&mut self, exit: &Exit) {
        let worker = self.workers.iter_mut().find(|worker| worker.started.pid == exit.pid && worker.ending.is_none());
        if let Some(worker) = worker {
            worker.ending = Some((exit.status, exit.stopped));
            self.exits[worker.outcome() as usize] += 1;
        }
    }

    /// What the agent is doing.
    #[must_use]
    pub fn state(&self) -> AgentState {
        self.state.0
    }

    /// The workers of the last round.
    #[must_use]
    pub fn workers(&self) -> &[Worker] {
        &self.workers
    }

    /// Processes of the workers that run.
    pub fn running(&self) -> impl Iterator<Item = i32> {
        let running = self.workers.iter().filter(|worker| worker.ending.is_none());
        running.map(|worker| worker.started.pid)
    }

    /// How often workers were started.
    #[must_use]
    pub fn rounds(&self) -> u64 {
        self.rounds
    }

    /// How often workers were started again for this cause.
    #[must_use]
    pub fn restarts(&self, cause: RestartCause) -> u64 {
        self.restarts[cause as usize]
    }

    /// How many workers of all rounds ended in this way.
    #[must_use]
    pub fn exits(&self, outcome: WorkerState) -> u64 {
        self.exits[outcome as usize]
    }

    /// For how long there has been a board.
    #[must_use]
    pub fn uptime(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.began)
    }

    /// Whether the workers run, and a line that says so or what else is the case.
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

    /// The board as JSON.
    ///
    /// # Panics
    ///
    /// Never: there is nothing in it that JSON cannot say.
    #[must_use]
    pub fn to_json(
        &self,
        now: Instant,
        watchdog: &WatchdogFigures,
        usage: impl Fn(i32) -> Option<RunningUsage>,
    ) -> Vec<u8> {
        let since = |at: Instant| now.saturating_duration_since(at).as_secs_f64();
        let last = self.last_restart.as_ref();
        let shown = Shown {
            run_id: self.run_id.as_deref(),
            role: self.role.as_deref(),
            state: self.state.0.name(),
            state_age_s: since(self.state.1),
            round: self.rounds,
            uptime_s: since(self.began),
            restarts: ShownRestarts {
                failure: self.restarts(RestartCause::Failure),
                membership: self.restarts(RestartCause::Membership),
                last: last.map(|(cause, reason, at)| ShownRestart { cause: cause.name(), reason, age_s: since(*at) }),
            },
            watchdog: ShownWatchdog {
                requests: watchdog.requests,
                broken_requests: watchdog.broken,
                expiries: watchdog.expiries,
            },
            workers: self.workers.iter().map(|worker| self.show(worker, watchdog, &usage)).collect(),
        };
        let mut json = serde_json::to_vec_pretty(&shown).expect("strings, numbers and lists of them");
        json.push(b'\n');
        json
    }

    fn show(
        &self,
        worker: &Worker,
        watchdog: &WatchdogFigures,
        usage: impl Fn(i32) -> Option<RunningUsage>,
    ) -> ShownWorker {
        let Started { local_rank, rank, pid } = worker.started;
        let (exit_code, signal) = match worker.ending {
            Some((ExitStatus::Exited(code), _)) => (Some(code), None),
            Some((ExitStatus::Signalled { signal, .. }, _)) => (None, Some(signal)),
            _ => (None, None),
        };
        // The number of a process that has ended may be somebody else's by now.
        let usage = if worker.ending.is_none() { usage(pid) } else { None };
        ShownWorker {
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
struct Shown<'a> {
    run_id: Option<&'a str>,
    role: Option<&'a str>,
    state: &'static str,
    state_age_s: f64,
    round: u64,
    uptime_s: f64,
    restarts: ShownRestarts<'a>,
    watchdog: ShownWatchdog,
    workers: Vec<ShownWorker>,
}

#[derive(Serialize)]
struct ShownRestarts<'a> {
    failure: u64,
    membership: u64,
    last: Option<ShownRestart<'a>>,
}

#[derive(Serialize)]
struct ShownRestart<'a> {
    cause: &'static str,
    reason: &'a str,
    age_s: f64,
}

#[derive(Serialize)]
struct ShownWatchdog {
    requests: u64,
    broken_requests: u64,
    expiries: u64,
}

#[derive(Serialize)]
struct ShownWorker {
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
    fn a_board_tells_the_life_of_a_job() {
        let start = Instant::now();
        let mut board = Board::new(start);
        assert_eq!(board.readiness(), (false, "not ready: state unknown".into()));
        board.apply(start, Update::Job { run_id: "the \"run\"".into(), role: "trainer".into() });
        board.apply(start, started(2));
        board.apply(start, Update::State(AgentState::Running));
        assert_eq!(board.readiness(), (true, "ready: 2 of 2 workers are running".into()));
        board.note_exit(&exit(100, ExitStatus::Exited(0), false));
        assert_eq!(board.readiness(), (true, "ready: 1 of 2 workers are running".into()));
        board.note_exit(&exit(101, ExitStatus::Signalled { signal: 9, core_dumped: false }, false));
        assert_eq!(board.readiness(), (false, "not ready: rank 9 (pid 101) was ended by signal 9".into()));
        board.apply(start, Update::Restart { cause: RestartCause::Failure, reason: "rank 9".into() });
        board.apply(start, started(2));
        assert!(board.readiness().0);
        assert_eq!(
            (board.rounds(), board.restarts(RestartCause::Failure), board.restarts(RestartCause::Membership)),
            (2, 1, 0)
        );
        assert_eq!((board.exits(WorkerState::Succeeded), board.exits(WorkerState::Failed)), (1, 1));
    }

    #[test]
    fn an_exit_counts_once_and_only_if_it_is_a_workers() {
        let mut board = Board::new(Instant::now());
        board.apply(Instant::now(), started(1));
        for _ in 0..2 {
            board.note_exit(&exit(100, ExitStatus::Exited(1), true));
            board.note_exit(&exit(999, ExitStatus::Exited(1), false));
        }
        assert_eq!((board.exits(WorkerState::Stopped), board.exits(WorkerState::Failed)), (1, 0));
    }

    #[test]
    fn the_json_has_every_field_and_reads_nothing_of_who_has_ended() {
        let start = Instant::now();
        let mut board = Board::new(start);
        board.apply(start, Update::Job { run_id: "r\n".into(), role: "trainer".into() });
        board.apply(start, started(2));
        board.apply(start, Update::State(AgentState::Running));
        board.note_exit(&exit(101, ExitStatus::Exited(7), false));
        board.apply(start, Update::Restart { cause: RestartCause::Membership, reason: "1 node waits".into() });
        let now = start + Duration::from_millis(1500);
        let watchdog = WatchdogFigures {
            requests: 5,
            broken: 1,
            expiries: 2,
            last_beats: HashMap::from([(100, Duration::from_millis(250))]),
        };
        let usage = |pid| {
            assert_eq!(pid, 100);
            Some(RunningUsage { resident_bytes: 4096, cpu: Duration::from_millis(500) })
        };
        let json: serde_json::Value = serde_json::from_slice(&board.to_json(now, &watchdog, usage)).expect("JSON");
        let expected = serde_json::json!({
            "run_id": "r\n", "role": "trainer", "state": "running", "state_age_s": 1.5, "round": 1, "uptime_s": 1.5,
            "restarts": {
                "failure": 0, "membership": 1,
                "last": {"cause": "membership", "reason": "1 node waits", "age_s": 1.5}
            },
            "watchdog": {"requests": 5, "broken_requests": 1, "expiries": 2},
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
