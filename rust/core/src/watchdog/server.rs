//! The watchdog on the engine thread: reads the pipe, keeps the deadlines, signals who has missed one.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::clients::{Clients, Ownership};
use super::deadlines::{ArmedTimer, Deadlines, expiry_instant};
use super::evidence::{Subject, gather};
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

/// What is read from the pipe before the engine looks at its other work.
const CHUNK: usize = 64 * 1024;
/// What [`WatchdogServer::drain`] reads at most: a crowd of writers must not keep it.
const MOST_DRAINED: usize = 4 << 20;

/// No hung process is kept for longer to be looked at.
const LONGEST_EVIDENCE: Duration = Duration::from_secs(60);

const SHOWN_BYTES: usize = 200;

/// How a watchdog is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the named pipe is made.
    pub path: PathBuf,
    /// How long gathering evidence may delay the signal, a minute at most; zero gathers none.
    pub evidence: Duration,
    /// Who is asked for the stacks of workers that have not armed a dump of their own.
    pub py_spy: Option<PathBuf>,
}

/// A worker whose evidence is of interest.
#[derive(Clone, Debug)]
pub struct WorkerProcess {
    /// Process id.
    pub pid: i32,
    /// What to call it.
    pub label: String,
    /// Where its evidence goes; empty if none is wanted.
    pub folder: PathBuf,
}

/// Evidence to be gathered, on a thread of its own.
#[derive(Debug)]
pub(crate) struct Gather {
    number: u64,
    subjects: Vec<Subject>,
    headline: String,
    deadline: Instant,
    py_spy: Option<PathBuf>,
}

/// What was gathered.
#[derive(Debug, Default)]
pub(crate) struct Gathered {
    number: u64,
    files: Vec<(i32, Vec<PathBuf>)>,
}

impl Gather {
    pub(crate) fn run(&self) -> Gathered {
        let files = gather(&self.subjects, &self.headline, self.deadline, self.py_spy.as_deref());
        Gathered { number: self.number, files }
    }

    /// It could not be run.
    pub(crate) fn nothing(&self) -> Gathered {
        Gathered { number: self.number, files: Vec::new() }
    }
}

/// Processes that are signalled once the evidence is there, or the time is over.
#[derive(Debug)]
struct Gathering {
    until: Instant,
    number: u64,
    awaiting_signal: Vec<Expiry>,
}

/// The numbers under which readiness is reported.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WatchdogTokens {
    pub(crate) fifo: u64,
    /// Plus the pid.
    pub(crate) clients: u64,
}

/// A watchdog, as the engine thread owns it.
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
    /// This is the watchdog of an agent: only its workers, and what they have started, are signalled.
    has_named_workers: bool,
    counts: WatchdogCounts,
    gathering: Option<Gathering>,
    gatherings: u64,
    /// Processes that were signalled and have not ended yet, with the deadline they missed and the signal.
    signalled: HashMap<i32, (Instant, i32)>,
    reports: Arc<Reports>,
}

/// The files of a watchdog, made on the caller's thread.
pub(crate) fn make_files(path: &Path) -> Result<(Fifo, BeatPage)> {
    let name = || format!("the watchdog's pipe {}", path.display());
    let fifo = Fifo::create(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::AddrInUse => {
            Error::os("take", name() + " (another process serves it)", source_of(libc::EADDRINUSE))
        }
        std::io::ErrorKind::AlreadyExists => {
            Error::os("make", name() + " (it is a file with content)", source_of(libc::EEXIST))
        }
        _ => Error::os("make", name(), source),
    })?;
    let mut link = path.as_os_str().to_owned();
    link.push(".beats");
    let page = BeatPage::create(link.as_ref());
    let page =
        page.map_err(|source| Error::os("make", format!("the page of heartbeats {}", link.display()), source))?;
    Ok((fifo, page))
}

fn source_of(errno: i32) -> std::io::Error {
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
            has_named_workers: false,
            counts: WatchdogCounts::default(),
            gathering: None,
            gatherings: 0,
            signalled: HashMap::new(),
            reports,
        }
    }

    /// Begins to serve; makes the pipe and the link to the page of heartbeats anew if somebody has removed them.
    pub(crate) fn start(&mut self, poller: &Poller) -> Result<()> {
        let linked = self.page.link();
        linked.map_err(|source| Error::os("link", "the page of heartbeats", source))?;
        if self.serving && self.fifo.is_in_place() {
            return Ok(());
        }
        if !self.fifo.is_in_place() {
            let fifo = Fifo::create(self.fifo.path());
            let name = || format!("the watchdog's pipe {}", self.config.path.display());
            let fifo = fifo.map_err(|source| Error::os("make anew", name(), source))?;
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

    /// Releases everything that it watches. Processes that await their signal get it.
    pub(crate) fn stop(&mut self, poller: &Poller) {
        for expiry in self.gathering.take().into_iter().flat_map(|gathering| gathering.awaiting_signal) {
            self.signal_process(expiry);
        }
        if self.serving {
            let _ = poller.remove(&self.fifo);
            self.serving = false;
        }
        for (_, client) in self.clients.drain() {
            if let Some(pidfd) = client.hold().and_then(ProcessHandle::pidfd) {
                let _ = poller.remove(pidfd);
            }
        }
    }

    /// The pipe is readable.
    pub(crate) fn readable(&mut self, poller: &Poller) {
        let mut chunk = std::mem::take(&mut self.chunk);
        if let Ok(read) = self.fifo.read(&mut chunk) {
            self.feed(&chunk[..read], poller);
        }
        self.chunk = chunk;
    }

    /// Reads all that is in the pipe.
    pub(crate) fn drain(&mut self, poller: &Poller) {
        let mut chunk = std::mem::take(&mut self.chunk);
        let mut drained = 0;
        while drained < MOST_DRAINED {
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

    /// Takes one request.
    pub(crate) fn accept(&mut self, request: TimerRequest, now: Moment, poller: &Poller) {
        self.counts.requests += 1;
        let pid = request.pid;
        if pid > 0 {
            let workers = &self.workers;
            let is_worker = |pid| workers.iter().any(|(worker, _)| worker.pid == pid);
            let (client, is_new) = match self.clients.known(pid, now.instant, &is_worker) {
                Ok(known) => known,
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                    self.deadlines.forget(pid);
                    if !request.is_release() {
                        self.counts.refused += 1;
                        self.counts.last_broken = format!(
                            "process {pid} does not exist: it has ended, or its number is that of another pid namespace"
                        );
                    }
                    return;
                }
                Err(error) => {
                    // Without a descriptor, most likely: nobody could be signalled safely.
                    self.counts.refused += 1;
                    self.counts.last_broken = format!("failed to take hold of process {pid}: {error}");
                    return;
                }
            };
            client.last_request = now.instant;
            if self.signalled.get(&pid).is_some_and(|(_, signal)| *signal != libc::SIGKILL) {
                // It has survived the signal, and goes on.
                self.signalled.remove(&pid);
            }
            if is_new && let Some(pidfd) = client.hold().and_then(ProcessHandle::pidfd) {
                let _ = poller.add(pidfd, self.tokens.clients | u64::from(pid.cast_unsigned()), Interest::Readable);
            }
        }
        if request.is_release() {
            self.deadlines.release(pid, &request.scope);
            self.forget_if_foreign(pid);
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

    /// A foreign process is not watched, so nobody says when it ends: it is known as long as it has timers.
    fn forget_if_foreign(&mut self, pid: i32) {
        let foreign = self.clients.get(pid).is_some_and(|client| client.ownership == Ownership::Foreign);
        if foreign && !self.deadlines.has(pid) {
            self.clients.remove(pid);
        }
    }

    /// The pidfd of a client is readable.
    pub(crate) fn client_ended(&mut self, pid: i32, poller: &Poller) {
        if self.clients.get(pid).is_none_or(|client| !client.has_ended(pid)) {
            return;
        }
        self.deadlines.forget(pid);
        self.page.free(pid);
        self.signalled.remove(&pid);
        if let Some(client) = self.clients.remove(pid)
            && let Some(pidfd) = client.hold().and_then(ProcessHandle::pidfd)
        {
            let _ = poller.remove(pidfd);
        }
    }

    /// The next time at which [`WatchdogServer::pump`] has something to do.
    pub(crate) fn next_tick(&mut self) -> Option<Instant> {
        let until = self.gathering.as_ref().map(|gathering| gathering.until);
        self.deadlines.next_at().into_iter().chain(until).min()
    }

    /// Deals with what has expired. Evidence that is to be gathered first is returned.
    pub(crate) fn pump(&mut self, now: Moment, poller: &Poller) -> Option<Gather> {
        if self.serving && self.deadlines.next_at().is_some_and(|at| at <= now.instant) {
            // The loop may come late, after the agent itself was stopped for a while: what has been released meanwhile counts.
            self.drain(poller);
        }
        if let Some(gathering) = self.gathering.take_if(|gathering| gathering.until <= now.instant) {
            for expiry in gathering.awaiting_signal {
                self.signal_process(expiry);
            }
        }
        let mut by_process: Vec<(i32, Vec<ArmedTimer>)> = Vec::new();
        for timer in self.deadlines.expired(now.instant) {
            if let Some(timer) = self.missed(timer, now) {
                let pid = timer.request.pid;
                match by_process.iter_mut().find(|(other, _)| *other == pid) {
                    Some((_, timers)) => timers.push(timer),
                    None => by_process.push((pid, vec![timer])),
                }
            }
        }
        let awaiting_signal: Vec<Expiry> =
            by_process.into_iter().filter_map(|(pid, timers)| self.decide(pid, timers, now, poller)).collect();
        if awaiting_signal.is_empty() {
            return None;
        }
        if let Some(gathering) = &mut self.gathering {
            gathering.awaiting_signal.extend(awaiting_signal);
            return None;
        }
        if self.config.evidence.is_zero() || awaiting_signal.iter().all(|expiry| expiry.worker == 0) {
            for expiry in awaiting_signal {
                self.signal_process(expiry);
            }
            return None;
        }
        Some(self.begin_gathering(awaiting_signal, now))
    }

    /// A timer whose time has come: `None` if its process has beaten since, and it was armed again.
    fn missed(&mut self, mut timer: ArmedTimer, now: Moment) -> Option<ArmedTimer> {
        let Some(beat) = timer.request.heartbeat else { return Some(timer) };
        // A slot that the process has given back is a heartbeat that has ended.
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

    /// What the expired timers of one process (earliest first) mean for it: the one over which it is to be signalled, if any.
    fn decide(&mut self, pid: i32, timers: Vec<ArmedTimer>, now: Moment, poller: &Poller) -> Option<Expiry> {
        // Without pidfds nobody has told of the end of a helper.
        self.client_ended(pid, poller);
        let is_gone = pid > 0 && self.clients.get(pid).is_none();
        let ownership = match self.clients.get(pid).map_or(Ownership::Foreign, |client| client.ownership) {
            // An agent's watchdog ends workers, and neither the agent itself nor its guard.
            Ownership::Ours { worker: 0 } if self.has_named_workers => Ownership::Foreign,
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
            // Whatever else it has promised is void.
            self.deadlines.forget(pid);
            if ownership == Ownership::Foreign {
                expiry.outcome = if is_gone { ExpiryOutcome::Gone } else { ExpiryOutcome::NotOurs };
                self.clients.remove(pid);
                self.reports.publish(expiry);
                return None;
            }
            self.signalled.insert(pid, (missed, expiry.signal));
            expiry.outcome = ExpiryOutcome::Signalled;
            self.reports.note_cause(&expiry);
            return Some(expiry);
        }
        self.forget_if_foreign(pid);
        None
    }

    fn begin_gathering(&mut self, awaiting_signal: Vec<Expiry>, now: Moment) -> Gather {
        let budget = self.config.evidence.min(LONGEST_EVIDENCE);
        // The gatherers stop a little earlier, so that what was found in time is known in time.
        let margin = (budget / 10).min(Duration::from_millis(50));
        let until = now.instant + budget;
        self.gatherings += 1;
        let number = self.gatherings;
        let wanted = self.workers.iter().filter(|(worker, _)| !worker.folder.as_os_str().is_empty());
        let subjects = wanted.filter_map(|(worker, hold)| {
            let hold = hold.as_ref()?.try_clone().ok()?;
            Some(Subject { hold, label: worker.label.clone(), folder: worker.folder.clone() })
        });
        let scopes = awaiting_signal.iter().map(|expiry| format!("{:?} of process {}", expiry.scope, expiry.pid));
        let gather = Gather {
            number,
            subjects: subjects.collect(),
            headline: format!("{:.3} watchdog: expired {}", now.wall_s(), scopes.collect::<Vec<_>>().join(", ")),
            deadline: now.instant + budget.saturating_sub(margin),
            py_spy: self.config.py_spy.clone(),
        };
        self.gathering = Some(Gathering { until, number, awaiting_signal });
        gather
    }

    /// The evidence is there: now the signals.
    pub(crate) fn gathered(&mut self, gathered: &Gathered) {
        let Some(gathering) = self.gathering.take_if(|gathering| gathering.number == gathered.number) else {
            return;
        };
        for mut expiry in gathering.awaiting_signal {
            let (own, others): (Vec<_>, Vec<_>) = gathered.files.iter().partition(|(pid, _)| *pid == expiry.worker);
            expiry.evidence = own.into_iter().chain(others).flat_map(|(_, files)| files.iter().cloned()).collect();
            self.signal_process(expiry);
        }
    }

    /// Signals the process of an expired timer, and the worker it belongs to.
    fn signal_process(&mut self, mut expiry: Expiry) {
        expiry.signalled_ns = Moment::now().monotonic_ns;
        self.reports.note_cause(&expiry);
        let client = self.clients.get(expiry.pid);
        // The worker first: if it waits for its helper, it could take the helper's end for its own, and end as a success.
        if expiry.worker != expiry.pid
            && client.is_some_and(|client| client.can_be_signalled(expiry.pid))
            && let Some((_, Some(hold))) = self.workers.iter().find(|(worker, _)| worker.pid == expiry.worker)
        {
            let _ = hold.signal(expiry.signal);
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
        self.reports.note_cause(&expiry);
        self.reports.publish(expiry);
    }

    /// Names the workers, in place of the former ones.
    pub(crate) fn set_workers(&mut self, workers: Vec<WorkerProcess>) {
        let support = self.support;
        self.reports.keep_causes(|pid| workers.iter().any(|worker| worker.pid == pid));
        let held = workers.into_iter().map(|worker| {
            // Still the agent's child, dead or alive: the number is its own.
            let hold = ProcessHandle::open(worker.pid, support).ok();
            (worker, hold)
        });
        self.workers = held.collect();
        self.has_named_workers = true;
        self.clients.look_again(&|pid| self.workers.iter().any(|(worker, _)| worker.pid == pid));
    }

    /// Forgets the timers of a process.
    pub(crate) fn clear(&mut self, pid: i32) {
        self.deadlines.forget(pid);
        self.forget_if_foreign(pid);
    }

    pub(crate) fn timers(&self) -> Vec<TimerRequest> {
        self.deadlines.iter().map(|timer| timer.request.clone()).collect()
    }

    pub(crate) fn counts(&self) -> WatchdogCounts {
        WatchdogCounts { armed: self.deadlines.len(), ..self.counts.clone() }
    }

    /// How long ago a process was last heard of, by a request or a beat.
    pub(crate) fn last_heard(&self, pid: i32, now: Moment) -> Option<Duration> {
        let client = self.clients.get(pid)?;
        let asked = now.instant.saturating_duration_since(client.last_request);
        let beats = self.deadlines.of(pid).filter_map(|timer| {
            let beat = timer.request.heartbeat?;
            let last_ns = self.page.last_beat_ns(beat.slot, pid)?;
            Some(Duration::from_nanos(now.monotonic_ns.saturating_sub(last_ns)))
        });
        Some(beats.fold(asked, Duration::min))
    }

    /// How long the oldest missed deadline has been waiting for its process to end.
    pub(crate) fn overdue(&self, now: Instant) -> Duration {
        let living = |pid: i32| self.clients.get(pid).is_some_and(|client| !client.has_ended(pid));
        let waiting = self.signalled.iter().filter(|(pid, _)| living(**pid));
        waiting.map(|(_, (missed, _))| now.saturating_duration_since(*missed)).max().unwrap_or_default()
    }
}

impl Drop for WatchdogServer {
    fn drop(&mut self) {
        self.reports.close();
    }
}
