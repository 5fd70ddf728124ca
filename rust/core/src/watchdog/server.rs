//! The watchdog on the engine thread: reads the pipe, tracks the deadlines, and signals processes that miss one.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::clients::{Clients, Ownership};
use super::deadlines::{ArmedTimer, Deadlines, expiry_instant};
use super::evidence::{Subject, collect};
use super::lines::Lines;
use super::report::{Expiry, ExpiryOutcome, Reports, WatchdogCounts};
use super::wire::{Broken, TimerRequest, parse};
use crate::error::{Error, Result};
use crate::sys::beats::BeatPage;
use crate::sys::clock::Moment;
use crate::sys::fifo::Fifo;
use crate::sys::poller::{Interest, Poller};
use crate::sys::probe::Support;
use crate::sys::process::ProcessHandle;

/// Limit on the bytes read from the pipe in one turn of the engine's loop.
const CHUNK: usize = 64 * 1024;
/// Limit on the bytes read by one [`WatchdogServer::drain`], so that many writers cannot block the engine.
const MAX_DRAINED: usize = 4 << 20;

/// Upper bound of [`Config::evidence`].
const MAX_EVIDENCE_TIME: Duration = Duration::from_secs(60);

/// Bytes of a rejected line that are shown in [`WatchdogCounts::last_broken`].
const SHOWN_BYTES: usize = 200;

/// The settings of a watchdog.
#[derive(Clone, Debug)]
pub struct Config {
    /// Path of the named pipe.
    pub path: PathBuf,
    /// Time for collecting evidence, which delays the signal; one minute at most. Zero collects none.
    pub evidence: Duration,
    /// Path of py-spy, which dumps the stacks of workers that have not armed a handler of their own.
    pub py_spy: Option<PathBuf>,
}

/// A worker of the watchdog's agent.
#[derive(Clone, Debug)]
pub struct WorkerProcess {
    /// Process id.
    pub pid: i32,
    /// The worker's name in the evidence.
    pub label: String,
    /// Folder for its evidence; empty collects none.
    pub folder: PathBuf,
}

/// A collection of evidence, to be run on another thread.
#[derive(Debug)]
pub(crate) struct EvidenceCollection {
    id: u64,
    subjects: Vec<Subject>,
    headline: String,
    deadline: Instant,
    py_spy: Option<PathBuf>,
}

/// The files of evidence that a collection has written, by pid.
#[derive(Debug, Default)]
pub(crate) struct Evidence {
    id: u64,
    files: Vec<(i32, Vec<PathBuf>)>,
}

impl EvidenceCollection {
    pub(crate) fn run(&self) -> Evidence {
        let files = collect(&self.subjects, &self.headline, self.deadline, self.py_spy.as_deref());
        Evidence { id: self.id, files }
    }

    /// The result of a collection that could not be run.
    pub(crate) fn empty(&self) -> Evidence {
        Evidence { id: self.id, files: Vec::new() }
    }
}

/// Expiries whose signals wait for the evidence or for `deadline`.
#[derive(Debug)]
struct PendingSignals {
    deadline: Instant,
    /// The collection of evidence.
    id: u64,
    expiries: Vec<Expiry>,
}

/// The poller tokens of a watchdog.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WatchdogTokens {
    pub(crate) fifo: u64,
    /// The token of a client is this value plus its pid.
    pub(crate) clients: u64,
}

/// A watchdog on the engine thread.
#[derive(Debug)]
pub(crate) struct WatchdogServer {
    config: Config,
    fifo: Fifo,
    page: BeatPage,
    serving: bool,
    tokens: WatchdogTokens,
    support: Support,
    lines: Lines,
    chunk: Vec<u8>,
    deadlines: Deadlines,
    clients: Clients,
    workers: Vec<(WorkerProcess, Option<ProcessHandle>)>,
    /// The watchdog belongs to an agent: only the workers and their descendants are signalled.
    has_set_workers: bool,
    counts: WatchdogCounts,
    pending: Option<PendingSignals>,
    last_collection: u64,
    /// Signalled processes that have not ended yet, with the missed deadline and the signal.
    signalled: HashMap<i32, (Instant, i32)>,
    reports: Arc<Reports>,
}

/// Creates the pipe and the heartbeat page of a watchdog. Runs on the caller's thread.
pub(crate) fn create_files(path: &Path) -> Result<(Fifo, BeatPage)> {
    let name = || format!("the watchdog's pipe {}", path.display());
    let fifo = Fifo::create(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::AddrInUse => {
            Error::os("create", name() + " (another process serves it)", os_error(libc::EADDRINUSE))
        }
        std::io::ErrorKind::AlreadyExists => {
            Error::os("create", name() + " (a non-empty file exists there)", os_error(libc::EEXIST))
        }
        _ => Error::os("create", name(), source),
    })?;
    let mut link = path.as_os_str().to_owned();
    link.push(".beats");
    let page = BeatPage::create(link.as_ref());
    let page = page.map_err(|source| Error::os("create", format!("the heartbeat page {}", link.display()), source))?;
    Ok((fifo, page))
}

fn os_error(errno: i32) -> std::io::Error {
    std::io::Error::from_raw_os_error(errno)
}

impl WatchdogServer {
    pub(crate) fn new(
        config: Config,
        (fifo, page): (Fifo, BeatPage),
        tokens: WatchdogTokens,
        support: Support,
        reports: Arc<Reports>,
    ) -> Self {
        Self {
            config,
            fifo,
            page,
            serving: false,
            tokens,
            support,
            lines: Lines::default(),
            chunk: vec![0; CHUNK],
            deadlines: Deadlines::default(),
            clients: Clients::new(support),
            workers: Vec::new(),
            has_set_workers: false,
            counts: WatchdogCounts::default(),
            pending: None,
            last_collection: 0,
            signalled: HashMap::new(),
            reports,
        }
    }

    /// Starts serving, and recreates the pipe and the link to the heartbeat page if they were removed. Idempotent.
    pub(crate) fn start(&mut self, poller: &Poller) -> Result<()> {
        let linked = self.page.link();
        linked.map_err(|source| Error::os("link", "the heartbeat page", source))?;
        if self.serving && self.fifo.is_in_place() {
            return Ok(());
        }
        if !self.fifo.is_in_place() {
            let fifo = Fifo::create(self.fifo.path());
            let name = || format!("the watchdog's pipe {}", self.config.path.display());
            let fifo = fifo.map_err(|source| Error::os("recreate", name(), source))?;
            if self.serving {
                let _ = poller.remove(&self.fifo);
            }
            self.fifo = fifo;
            self.lines = Lines::default();
        }
        let watched = poller.add(&self.fifo, self.tokens.fifo, Interest::Readable);
        watched.map_err(|source| Error::os("watch", "the watchdog's pipe", source))?;
        self.serving = true;
        Ok(())
    }

    /// Stops serving and removes all descriptors from the poller. Pending signals are sent first.
    pub(crate) fn stop(&mut self, poller: &Poller) {
        for expiry in self.pending.take().into_iter().flat_map(|pending| pending.expiries) {
            self.signal_process(expiry);
        }
        if self.serving {
            let _ = poller.remove(&self.fifo);
            self.serving = false;
        }
        for (_, client) in self.clients.drain() {
            if let Some(pidfd) = client.pidfd() {
                let _ = poller.remove(pidfd);
            }
        }
    }

    /// Reads one chunk from the pipe and handles its requests.
    pub(crate) fn read_pipe(&mut self, poller: &Poller) {
        let mut chunk = std::mem::take(&mut self.chunk);
        if let Ok(read) = self.fifo.read(&mut chunk) {
            self.feed(&chunk[..read], poller);
        }
        self.chunk = chunk;
    }

    /// Reads the pipe until it is empty and handles the requests.
    pub(crate) fn drain(&mut self, poller: &Poller) {
        let mut chunk = std::mem::take(&mut self.chunk);
        let mut drained = 0;
        while drained < MAX_DRAINED {
            match self.fifo.read(&mut chunk) {
                Ok(0) | Err(_) => break,
                Ok(read) => self.feed(&chunk[..read], poller),
            }
            drained += CHUNK;
        }
        self.chunk = chunk;
    }

    fn feed(&mut self, bytes: &[u8], poller: &Poller) {
        let now = Moment::now();
        let mut requests = Vec::new();
        let counts = &mut self.counts;
        self.lines.feed(bytes, |line| {
            let Some(line) = line else {
                counts.oversized += 1;
                return;
            };
            let parsed = parse(line);
            requests.extend(parsed.request);
            if let Some(broken) = parsed.broken {
                match broken {
                    Broken::Version(_) => counts.unknown_version += 1,
                    _ => counts.broken += 1,
                }
                let shown = String::from_utf8_lossy(&line[..line.len().min(SHOWN_BYTES)]);
                counts.last_broken = format!("{broken}: {shown}");
            }
        });
        for request in requests {
            self.accept(request, now, poller);
        }
    }

    /// Handles one request.
    pub(crate) fn accept(&mut self, request: TimerRequest, now: Moment, poller: &Poller) {
        self.counts.requests += 1;
        let pid = request.pid;
        if pid > 0 {
            let workers = &self.workers;
            let is_worker = |pid| workers.iter().any(|(worker, _)| worker.pid == pid);
            let (client, is_new) = match self.clients.get_or_open(pid, now.instant, &is_worker) {
                Ok(found) => found,
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                    self.deadlines.release_all(pid);
                    if !request.is_release() {
                        self.counts.refused += 1;
                        self.counts.last_broken = format!(
                            "process {pid} does not exist: it has ended, or the pid belongs to another pid namespace"
                        );
                    }
                    return;
                }
                Err(error) => {
                    // Most likely out of descriptors. Without a pidfd the process cannot be signalled safely.
                    self.counts.refused += 1;
                    self.counts.last_broken = format!("failed to open process {pid}: {error}");
                    return;
                }
            };
            client.last_request = now.instant;
            if self.signalled.get(&pid).is_some_and(|(_, signal)| *signal != libc::SIGKILL) {
                // The process survived the signal and sends requests again.
                self.signalled.remove(&pid);
            }
            if is_new && let Some(pidfd) = client.pidfd() {
                let _ = poller.add(pidfd, self.tokens.clients | u64::from(pid.cast_unsigned()), Interest::Readable);
            }
        }
        if request.is_release() {
            self.deadlines.release(pid, &request.scope);
            self.remove_if_foreign(pid);
            return;
        }
        let at = match request.heartbeat {
            Some(beat) if self.page.last_beat_ns(beat.slot, pid).is_none() => {
                self.counts.refused += 1;
                return;
            }
            Some(beat) => now.instant.checked_add(Duration::from_secs_f64(beat.timeout_s)),
            None => expiry_instant(now, request.expiration_time),
        };
        if self.deadlines.arm(request, at).is_err() {
            self.counts.refused += 1;
        }
    }

    /// No event reports the end of a foreign process, so the table keeps it only while it has timers.
    fn remove_if_foreign(&mut self, pid: i32) {
        let foreign = self.clients.get(pid).is_some_and(|client| client.ownership == Ownership::Foreign);
        if foreign && !self.deadlines.has(pid) {
            self.clients.remove(pid);
        }
    }

    /// Removes a client and its timers if it has ended.
    pub(crate) fn remove_ended_client(&mut self, pid: i32, poller: &Poller) {
        if self.clients.get(pid).is_none_or(|client| !client.has_ended(pid)) {
            return;
        }
        self.deadlines.release_all(pid);
        self.page.free(pid);
        self.signalled.remove(&pid);
        if let Some(client) = self.clients.remove(pid)
            && let Some(pidfd) = client.pidfd()
        {
            let _ = poller.remove(pidfd);
        }
    }

    /// When the next call of [`WatchdogServer::handle_deadlines`] is due.
    pub(crate) fn next_tick(&mut self) -> Option<Instant> {
        let pending = self.pending.as_ref().map(|pending| pending.deadline);
        self.deadlines.next_at().into_iter().chain(pending).min()
    }

    /// Handles expired timers. If evidence must be collected before the signals, returns the collection to run.
    pub(crate) fn handle_deadlines(&mut self, now: Moment, poller: &Poller) -> Option<EvidenceCollection> {
        if self.serving && self.deadlines.next_at().is_some_and(|at| at <= now.instant) {
            // The loop may be late because the agent was suspended. Releases written meanwhile count.
            self.drain(poller);
        }
        if let Some(pending) = self.pending.take_if(|pending| pending.deadline <= now.instant) {
            for expiry in pending.expiries {
                self.signal_process(expiry);
            }
        }
        let mut by_process: Vec<(i32, Vec<ArmedTimer>)> = Vec::new();
        for timer in self.deadlines.expired(now.instant) {
            if let Some(timer) = self.check_heartbeat(timer, now) {
                let pid = timer.request.pid;
                match by_process.iter_mut().find(|(other, _)| *other == pid) {
                    Some((_, timers)) => timers.push(timer),
                    None => by_process.push((pid, vec![timer])),
                }
            }
        }
        let expiries: Vec<Expiry> =
            by_process.into_iter().filter_map(|(pid, timers)| self.decide(pid, timers, now, poller)).collect();
        if expiries.is_empty() {
            return None;
        }
        if let Some(pending) = &mut self.pending {
            pending.expiries.extend(expiries);
            return None;
        }
        if self.config.evidence.is_zero() || expiries.iter().all(|expiry| expiry.worker == 0) {
            for expiry in expiries {
                self.signal_process(expiry);
            }
            return None;
        }
        Some(self.begin_collection(expiries, now))
    }

    /// Returns an expired timer, unless it is a heartbeat and its process has beaten within the timeout: then the timer is armed again.
    fn check_heartbeat(&mut self, mut timer: ArmedTimer, now: Moment) -> Option<ArmedTimer> {
        let Some(beat) = timer.request.heartbeat else { return Some(timer) };
        // The process has released the slot: its heartbeat has ended.
        let last_ns = self.page.last_beat_ns(beat.slot, timer.request.pid)?;
        let timeout = Duration::from_secs_f64(beat.timeout_s);
        let since = Duration::from_nanos(now.monotonic_ns.saturating_sub(last_ns));
        if since < timeout {
            let at = now.instant.checked_add(timeout.saturating_sub(since));
            let _ = self.deadlines.arm(timer.request, at);
            return None;
        }
        let late = since.saturating_sub(timeout);
        timer.at = now.instant.checked_sub(late);
        timer.request.expiration_time = now.wall_s() - late.as_secs_f64();
        Some(timer)
    }

    /// Decides about one process by its expired timers, earliest first. Returns the expiry for which to signal the process, if any.
    fn decide(&mut self, pid: i32, timers: Vec<ArmedTimer>, now: Moment, poller: &Poller) -> Option<Expiry> {
        // Without pidfds, no event has reported the end of a helper process.
        self.remove_ended_client(pid, poller);
        let is_gone = pid > 0 && self.clients.get(pid).is_none();
        let ownership = match self.clients.get(pid).map_or(Ownership::Foreign, |client| client.ownership) {
            // An agent's watchdog signals workers and their descendants only, never the agent itself or its guard.
            Ownership::Ours { worker: 0 } if self.has_set_workers => Ownership::Foreign,
            ownership => ownership,
        };
        let worker = if let Ownership::Ours { worker } = ownership { worker } else { 0 };
        for timer in timers {
            self.counts.expired += 1;
            let missed = timer.at.unwrap_or(now.instant);
            let late = now.instant.saturating_duration_since(missed);
            let mut expiry = Expiry {
                pid,
                scope: timer.request.scope,
                expiration_time: timer.request.expiration_time,
                signal: timer.request.signal,
                late_ns: u64::try_from(late.as_nanos()).unwrap_or(u64::MAX),
                signalled_ns: 0,
                outcome: ExpiryOutcome::NoSignal,
                worker,
                evidence: Vec::new(),
            };
            if timer.request.signal <= 0 {
                self.reports.publish(expiry);
                continue;
            }
            // The other timers of the process are void.
            self.deadlines.release_all(pid);
            if ownership == Ownership::Foreign {
                expiry.outcome = if is_gone { ExpiryOutcome::Gone } else { ExpiryOutcome::NotOurs };
                self.clients.remove(pid);
                self.reports.publish(expiry);
                return None;
            }
            self.signalled.insert(pid, (missed, expiry.signal));
            expiry.outcome = ExpiryOutcome::Signalled;
            self.reports.record_cause(&expiry);
            return Some(expiry);
        }
        self.remove_if_foreign(pid);
        None
    }

    fn begin_collection(&mut self, expiries: Vec<Expiry>, now: Moment) -> EvidenceCollection {
        let budget = self.config.evidence.min(MAX_EVIDENCE_TIME);
        // The collecting threads stop earlier by this margin, so their results arrive before the signals are sent.
        let margin = (budget / 10).min(Duration::from_millis(50));
        let deadline = now.instant + budget;
        self.last_collection += 1;
        let id = self.last_collection;
        let examined = self.workers.iter().filter(|(worker, _)| !worker.folder.as_os_str().is_empty());
        let subjects = examined.filter_map(|(worker, handle)| {
            let handle = handle.as_ref()?.try_clone().ok()?;
            Some(Subject { handle, label: worker.label.clone(), folder: worker.folder.clone() })
        });
        let scopes = expiries.iter().map(|expiry| format!("{:?} of process {}", expiry.scope, expiry.pid));
        let collection = EvidenceCollection {
            id,
            subjects: subjects.collect(),
            headline: format!("{:.3} watchdog: expired {}", now.wall_s(), scopes.collect::<Vec<_>>().join(", ")),
            deadline: now.instant + budget.saturating_sub(margin),
            py_spy: self.config.py_spy.clone(),
        };
        self.pending = Some(PendingSignals { deadline, id, expiries });
        collection
    }

    /// Sends the pending signals after the collection of their evidence has finished.
    pub(crate) fn handle_evidence(&mut self, evidence: &Evidence) {
        let Some(pending) = self.pending.take_if(|pending| pending.id == evidence.id) else {
            return;
        };
        for mut expiry in pending.expiries {
            let (own, others): (Vec<_>, Vec<_>) = evidence.files.iter().partition(|(pid, _)| *pid == expiry.worker);
            expiry.evidence = own.into_iter().chain(others).flat_map(|(_, files)| files.iter().cloned()).collect();
            self.signal_process(expiry);
        }
    }

    /// Signals the process of an expired timer and its worker.
    fn signal_process(&mut self, mut expiry: Expiry) {
        expiry.signalled_ns = Moment::now().monotonic_ns;
        self.reports.record_cause(&expiry);
        let client = self.clients.get(expiry.pid);
        // The worker first: a worker that waits for its helper could see the helper end and exit with code 0 before its own signal.
        if expiry.worker != expiry.pid
            && client.is_some_and(|client| client.can_be_signalled(expiry.pid))
            && let Some((_, Some(handle))) = self.workers.iter().find(|(worker, _)| worker.pid == expiry.worker)
        {
            let _ = handle.signal(expiry.signal);
        }
        let signalled = client.map_or(Ok(false), |client| client.signal(expiry.signal));
        expiry.outcome = match signalled {
            Ok(true) => ExpiryOutcome::Signalled,
            Ok(false) => ExpiryOutcome::Gone,
            Err(_) => ExpiryOutcome::Denied,
        };
        if expiry.outcome != ExpiryOutcome::Signalled {
            expiry.signalled_ns = 0;
            self.signalled.remove(&expiry.pid);
        }
        self.reports.record_cause(&expiry);
        self.reports.publish(expiry);
    }

    /// Sets the workers, in place of the previous ones.
    pub(crate) fn set_workers(&mut self, workers: Vec<WorkerProcess>) {
        let support = self.support;
        self.reports.retain_causes(|pid| workers.iter().any(|worker| worker.pid == pid));
        let opened = workers.into_iter().map(|worker| {
            // The pid is not reused: the worker is still a child of the agent, running or not yet reaped.
            let handle = ProcessHandle::open(worker.pid, support).ok();
            (worker, handle)
        });
        self.workers = opened.collect();
        self.has_set_workers = true;
        self.clients.update_ownership(&|pid| self.workers.iter().any(|(worker, _)| worker.pid == pid));
    }

    /// Releases all timers of a process.
    pub(crate) fn clear(&mut self, pid: i32) {
        self.deadlines.release_all(pid);
        self.remove_if_foreign(pid);
    }

    pub(crate) fn timers(&self) -> Vec<TimerRequest> {
        self.deadlines.iter().map(|timer| timer.request.clone()).collect()
    }

    pub(crate) fn counts(&self) -> WatchdogCounts {
        WatchdogCounts { armed: self.deadlines.len(), ..self.counts.clone() }
    }

    /// The time since the last request or beat of a process.
    pub(crate) fn last_heard(&self, pid: i32, now: Moment) -> Option<Duration> {
        let client = self.clients.get(pid)?;
        let since_request = now.instant.saturating_duration_since(client.last_request);
        let beats = self.deadlines.of(pid).filter_map(|timer| {
            let beat = timer.request.heartbeat?;
            let last_ns = self.page.last_beat_ns(beat.slot, pid)?;
            Some(Duration::from_nanos(now.monotonic_ns.saturating_sub(last_ns)))
        });
        Some(beats.fold(since_request, Duration::min))
    }

    /// The time since the oldest missed deadline of a signalled process that has not ended.
    pub(crate) fn overdue(&self, now: Instant) -> Duration {
        let is_alive = |pid: i32| self.clients.get(pid).is_some_and(|client| !client.has_ended(pid));
        let alive = self.signalled.iter().filter(|(pid, _)| is_alive(**pid));
        alive.map(|(_, (missed, _))| now.saturating_duration_since(*missed)).max().unwrap_or_default()
    }
}

impl Drop for WatchdogServer {
    fn drop(&mut self) {
        self.reports.close();
    }
}
