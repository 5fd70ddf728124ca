//! Metrics for Prometheus, in the `OpenMetrics` text format or in the older plain text format.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::time::{Duration, Instant};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::http::HttpStatus;
use super::status::{EngineFigures, JobStatus, WarmFigures, WatchdogFigures};
use crate::sys::usage::RunningUsage;
use crate::vocabulary::{AgentState, DropReason, RestartCause, RestartPhase, RestartReason, WorkerState};

/// Content type of [`encode`].
pub const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Content type of [`plain`].
pub const PLAIN: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Upper bounds of the histogram buckets in seconds, from 100 µs to 10 minutes.
const BUCKETS: [f64; 16] =
    [1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0];

/// Counts of a server since its start.
#[derive(Clone, Debug, Default)]
pub struct ProbeCounts {
    /// Answered requests by path and status.
    pub answered: BTreeMap<(&'static str, HttpStatus), u64>,
    /// Dropped connections by reason.
    pub dropped: [u64; DropReason::ALL.len()],
}

/// Histograms of the durations of restart phases.
#[derive(Clone, Debug)]
pub struct Phases([Histogram; RestartPhase::ALL.len()]);

impl Default for Phases {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Histogram::new(BUCKETS)))
    }
}

impl Phases {
    /// Adds the duration of one phase of a restart.
    pub fn observe(&self, phase: RestartPhase, took: Duration) {
        self.0[phase as usize].observe(took.as_secs_f64());
    }
}

/// A running worker with its resource usage.
#[derive(Clone, Copy, Debug)]
struct Running {
    rank: u64,
    usage: Option<RunningUsage>,
}

/// All metrics at one moment.
#[derive(Debug)]
struct Snapshot {
    uptime: Duration,
    state: AgentState,
    rounds: u64,
    restarts: [u64; RestartCause::ALL.len()],
    decisions: [u64; RestartReason::ALL.len()],
    workers: [u64; WorkerState::ALL.len()],
    exits: [u64; WorkerState::ALL.len()],
    running: Vec<Running>,
    counts: ProbeCounts,
    figures: EngineFigures,
    warm_refusals: u64,
    phases: Phases,
}

/// All metrics in the `OpenMetrics` text format.
///
/// # Panics
///
/// Never: writing to a `String` does not fail.
#[must_use]
pub fn encode(
    now: Instant,
    job: &JobStatus,
    phases: &Phases,
    counts: &ProbeCounts,
    figures: EngineFigures,
    usage: impl Fn(i32) -> Option<RunningUsage>,
) -> String {
    let mut workers = [0; WorkerState::ALL.len()];
    for worker in job.workers() {
        workers[worker.outcome() as usize] += 1;
    }
    let running = job.workers().iter().filter(|worker| worker.outcome() == WorkerState::Running);
    let snapshot = Snapshot {
        uptime: job.uptime(now),
        state: job.state(),
        rounds: job.rounds(),
        restarts: RestartCause::ALL.map(|cause| job.restarts(cause)),
        decisions: RestartReason::ALL.map(|reason| job.decisions(reason)),
        workers,
        exits: WorkerState::ALL.map(|outcome| job.exits(outcome)),
        running: running
            .map(|worker| Running { rank: worker.started.rank, usage: usage(worker.started.pid) })
            .collect(),
        counts: counts.clone(),
        figures,
        warm_refusals: job.warm_refusals(),
        phases: phases.clone(),
    };
    let mut registry = Registry::with_prefix("ferroelastic");
    registry.register_collector(Box::new(snapshot));
    let mut text = String::with_capacity(8192);
    text::encode(&mut text, &registry).expect("writing to a String does not fail");
    text
}

/// Converts `OpenMetrics` to the text format 0.0.4. There, the name of a counter family ends in `_total` like its samples, and there are no
/// `UNIT` and `EOF` lines.
#[must_use]
pub fn plain(openmetrics: &str) -> String {
    let words = |line: &'_ str| -> Option<(String, String, String)> {
        let mut words = line.strip_prefix("# ")?.splitn(3, ' ').map(str::to_owned);
        Some((words.next()?, words.next()?, words.next().unwrap_or_default()))
    };
    let types = openmetrics.lines().filter_map(words).filter(|(keyword, ..)| keyword == "TYPE");
    let counters: BTreeSet<String> = types.filter(|(.., kind)| kind == "counter").map(|(_, name, _)| name).collect();
    let mut text = String::with_capacity(openmetrics.len());
    for line in openmetrics.lines() {
        match words(line) {
            Some((keyword, name, rest)) if keyword == "HELP" || keyword == "TYPE" => {
                let total = if counters.contains(&name) { "_total" } else { "" };
                let _ = writeln!(text, "# {keyword} {name}{total} {rest}");
            }
            Some(_) => {}
            None if line == "# EOF" => {}
            None => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    text
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let encoder = &mut encoder;
        let help = "Time since the health server of the agent was started.";
        gauge(encoder, "uptime", help, Some(&Unit::Seconds))?.encode_gauge(&self.uptime.as_secs_f64())?;
        self.encode_job(encoder)?;
        self.encode_workers(encoder)?;
        self.encode_watchdog(encoder)?;
        self.encode_warm(encoder)?;

        let help = "Log lines that matched --fail-on-log or --warn-on-log, by effect and reason.";
        let mut matches = counter(encoder, "log_matches", help, None)?;
        for ((effect, reason), count) in &self.figures.log_matches {
            let labels = [("effect", (*effect).to_owned()), ("reason", reason.clone())];
            encode_count(&mut matches.encode_family(&labels)?, count)?;
        }

        let mut probes = counter(encoder, "health_probes", "Requests answered, by path and status.", None)?;
        for ((path, status), count) in &self.counts.answered {
            let labels = [("path", (*path).to_owned()), ("code", status.code().to_string())];
            encode_count(&mut probes.encode_family(&labels)?, count)?;
        }
        let help = "Probe connections that the server dropped, by reason.";
        let mut dropped = counter(encoder, "health_dropped_connections", help, None)?;
        for (reason, count) in DropReason::ALL.iter().zip(&self.counts.dropped) {
            encode_count(&mut dropped.encode_family(&[("reason", reason.name())])?, count)?;
        }
        let help = "Duration of restart phases: detect (from a worker's exit to the agent's reaction), stop (until every process \
                    group is empty), rendezvous, spawn (new processes), release (only warm workers).";
        let seconds = Unit::Seconds;
        let mut family = encoder.encode_descriptor("restart_phase", help, Some(&seconds), MetricType::Histogram)?;
        for phase in RestartPhase::ALL {
            self.phases.0[phase as usize].encode(family.encode_family(&[("phase", phase.name())])?)?;
        }
        Ok(())
    }
}

impl Snapshot {
    fn encode_job(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut states =
            gauge(encoder, "state", "State of the agent: 1 for the current state, 0 for all others.", None)?;
        for state in AgentState::ALL {
            states.encode_family(&[("state", state.name())])?.encode_gauge(&i64::from(state == self.state))?;
        }
        encode_count(&mut counter(encoder, "rounds", "Times the workers were started.", None)?, &self.rounds)?;
        let mut restarts = counter(encoder, "restarts", "Restarts of the workers, by cause.", None)?;
        for (cause, count) in RestartCause::ALL.iter().zip(self.restarts) {
            encode_count(&mut restarts.encode_family(&[("cause", cause.name())])?, &count)?;
        }
        let help = "Decisions of the restart policy after failures, by the rule that decided.";
        let mut decisions = counter(encoder, "restart_decisions", help, None)?;
        for (reason, count) in RestartReason::ALL.iter().zip(self.decisions) {
            encode_count(&mut decisions.encode_family(&[("reason", reason.name())])?, &count)?;
        }
        Ok(())
    }

    fn encode_workers(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut workers = gauge(encoder, "workers", "Workers of the last round, by state.", None)?;
        for (outcome, count) in WorkerState::ALL.iter().zip(self.workers) {
            workers.encode_family(&[("state", outcome.name())])?.encode_gauge(&count)?;
        }
        let mut exits = counter(encoder, "worker_exits", "Ended workers of all rounds, by outcome.", None)?;
        for (outcome, count) in WorkerState::ALL.iter().zip(self.exits).skip(1) {
            encode_count(&mut exits.encode_family(&[("outcome", outcome.name())])?, &count)?;
        }
        let help = "Resident memory of a worker's own process.";
        let mut memory = gauge(encoder, "worker_resident_memory", help, Some(&Unit::Bytes))?;
        for (rank, usage) in self.usages() {
            memory.encode_family(&[("rank", rank)])?.encode_gauge(&usage.resident_bytes)?;
        }
        let help = "CPU time of a worker's own process; resets with each round.";
        let mut cpu = counter(encoder, "worker_cpu", help, Some(&Unit::Seconds))?;
        for (rank, usage) in self.usages() {
            encode_count(&mut cpu.encode_family(&[("rank", rank)])?, &usage.cpu.as_secs_f64())?;
        }
        Ok(())
    }

    fn encode_watchdog(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let WatchdogFigures { requests, broken, expiries, .. } = self.figures.watchdog;
        for (name, help, count) in [
            ("watchdog_requests", "Valid requests to the watchdog.", requests),
            ("watchdog_broken_requests", "Lines that the watchdog rejected.", broken),
            ("watchdog_expiries", "Expired timers of workers.", expiries),
        ] {
            encode_count(&mut counter(encoder, name, help, None)?, &count)?;
        }
        Ok(())
    }

    fn encode_warm(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let WarmFigures { ready_zygotes, parked, used } = self.figures.warm;
        let help = "Zygotes that can fork warm workers.";
        gauge(encoder, "warm_ready_zygotes", help, None)?.encode_gauge(&ready_zygotes)?;
        gauge(encoder, "warm_parked", "Processes that wait to become workers.", None)?.encode_gauge(&parked)?;
        encode_count(&mut counter(encoder, "warm_used", "Processes that have become workers.", None)?, &used)?;
        let help = "Cold starts although warm workers were requested.";
        encode_count(&mut counter(encoder, "warm_refused", help, None)?, &self.warm_refusals)
    }

    fn usages(&self) -> impl Iterator<Item = (u64, RunningUsage)> {
        self.running.iter().filter_map(|worker| Some((worker.rank, worker.usage?)))
    }
}

fn gauge<'e>(
    encoder: &'e mut DescriptorEncoder<'_>,
    name: &'e str,
    help: &str,
    unit: Option<&'e Unit>,
) -> Result<MetricEncoder<'e>, fmt::Error> {
    encoder.encode_descriptor(name, help, unit, MetricType::Gauge)
}

fn counter<'e>(
    encoder: &'e mut DescriptorEncoder<'_>,
    name: &'e str,
    help: &str,
    unit: Option<&'e Unit>,
) -> Result<MetricEncoder<'e>, fmt::Error> {
    encoder.encode_descriptor(name, help, unit, MetricType::Counter)
}

fn encode_count(
    encoder: &mut MetricEncoder<'_>,
    count: &impl prometheus_client::encoding::EncodeCounterValue,
) -> fmt::Result {
    encoder.encode_counter::<NoLabelSet, _, f64>(count, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::status::{Started, Update};

    fn text_of(job: &JobStatus, phases: &Phases, counts: &ProbeCounts) -> String {
        let usage = |_| Some(RunningUsage { resident_bytes: 4096, cpu: Duration::from_millis(1500) });
        encode(Instant::now(), job, phases, counts, EngineFigures::default(), usage)
    }

    #[test]
    fn every_family_has_help_type_and_a_name_with_its_unit() {
        let mut job = JobStatus::new(Instant::now());
        job.apply(Instant::now(), Update::State(AgentState::Running));
        job.apply(Instant::now(), Update::Workers(vec![Started { local_rank: 0, rank: 3, pid: 1 }]));
        job.apply(Instant::now(), Update::Decision { reason: RestartReason::Backoff, text: "again".into() });
        let phases = Phases::default();
        phases.observe(RestartPhase::Stop, Duration::from_micros(200));
        let counts =
            ProbeCounts { answered: [(("/livez", HttpStatus::Unavailable), 2)].into(), ..ProbeCounts::default() };
        let text = text_of(&job, &phases, &counts);
        for line in [
            "# TYPE ferroelastic_restarts counter",
            "# UNIT ferroelastic_worker_resident_memory_bytes bytes",
            "ferroelastic_state{state=\"running\"} 1",
            "ferroelastic_state{state=\"exit barrier\"} 0",
            "ferroelastic_rounds_total 1",
            "ferroelastic_restarts_total{cause=\"failure\"} 0",
            "ferroelastic_restart_decisions_total{reason=\"backoff\"} 1",
            "ferroelastic_restart_decisions_total{reason=\"max_restarts\"} 0",
            "ferroelastic_workers{state=\"running\"} 1",
            "ferroelastic_worker_exits_total{outcome=\"failed\"} 0",
            "ferroelastic_worker_resident_memory_bytes{rank=\"3\"} 4096",
            "ferroelastic_worker_cpu_seconds_total{rank=\"3\"} 1.5",
            "ferroelastic_health_probes_total{path=\"/livez\",code=\"503\"} 2",
            "ferroelastic_watchdog_expiries_total 0",
            "ferroelastic_warm_parked 0",
            "ferroelastic_warm_refused_total 0",
            "ferroelastic_restart_phase_seconds_count{phase=\"stop\"} 1",
            "ferroelastic_restart_phase_seconds_bucket{le=\"0.0001\",phase=\"stop\"} 0",
            "ferroelastic_restart_phase_seconds_bucket{le=\"0.0003\",phase=\"stop\"} 1",
            "ferroelastic_restart_phase_seconds_bucket{le=\"600.0\",phase=\"detect\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\nis not in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
        let plain = plain(&text);
        for line in [
            "# TYPE ferroelastic_restarts_total counter",
            "# HELP ferroelastic_rounds_total Times the workers were started.",
            "ferroelastic_restarts_total{cause=\"failure\"} 0",
            "# TYPE ferroelastic_worker_cpu_seconds_total counter",
            "# TYPE ferroelastic_restart_phase_seconds histogram",
            "ferroelastic_restart_phase_seconds_count{phase=\"stop\"} 1",
        ] {
            assert!(plain.lines().any(|found| found == line), "{line}\nis not in\n{plain}");
        }
        assert!(!plain.contains("# UNIT") && !plain.contains("EOF"), "{plain}");
        let families = text.lines().filter(|line| line.starts_with("# TYPE")).count();
        assert_eq!(families, text.lines().filter(|line| line.starts_with("# HELP")).count());
    }
}
