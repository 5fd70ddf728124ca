//! The health servers of an engine: their listeners and connections. Each turn of the loop does bounded work, and memory is bounded.

use std::collections::{BTreeMap, HashMap};
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::connection::{Next, ProbeConnection, ProbePath};
use super::http::{HttpStatus, MAX_HEAD};
use super::liveness::{Answer, Liveness};
use super::metrics::{self, Phases, ProbeCounts};
use super::question::ProgressQuestion;
use super::status::{EngineFigures, JobStatus, Update};
use crate::error::{Error, Result};
use crate::supervise::Exit;
use crate::sys::net::Listener;
use crate::sys::poller::{Interest, Poller};
use crate::sys::usage::{self, RunningUsage};
use crate::sys::wake::WakeFd;
use crate::vocabulary::DropReason;

/// Limit on the connections of a server. A newer connection replaces the one that has been idle longest.
const MAX_CONNECTIONS: usize = 256;
/// Limit on the unsent bytes of a server's answers. Beyond it, the connection that has been idle longest is dropped.
const MAX_UNSENT_BYTES: usize = 4 * 1024 * 1024;
/// Limits on the connections served in one turn of the loop, and accepted by one server in one turn.
const SERVED_PER_TURN: usize = 8;
const ACCEPTED_PER_TURN: usize = 4;
/// How long a server stops accepting when it is out of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);
/// How long the resource usage of workers is reused before it is read again.
const USAGE_REUSE: Duration = Duration::from_millis(250);
/// Limit on the number of workers whose resource usage is read.
const MAX_USAGES: usize = 256;

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";

/// Returns the counts of the engine's watchdogs, with the last beats of the given pids.
pub(crate) type FiguresSource<'a> = dyn Fn(&[i32]) -> EngineFigures + 'a;

/// The poller tokens of health servers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HealthTokens {
    /// The token of a server's listener, by the id of the server.
    pub(crate) listener: fn(u64) -> u64,
    /// The token of a connection, by its id.
    pub(crate) connection: fn(u64) -> u64,
}

/// Whether a server accepts connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listening {
    Yes,
    /// Paused until a connection can be dropped: all of them wait for the callback.
    PausedUntilRoom,
    /// Paused until this time: no descriptor is available.
    PausedUntil(Instant),
}

/// One health server.
#[derive(Debug)]
struct ProbeServer {
    listener: Listener,
    listening: Listening,
    /// Closed when the process is out of descriptors, to accept one more connection.
    spare_fd: Option<WakeFd>,
    question: Arc<ProgressQuestion>,
    liveness: Liveness,
    job: JobStatus,
    phases: Phases,
    counts: ProbeCounts,
    open_connections: usize,
    usages: Option<(Instant, HashMap<i32, RunningUsage>)>,
    /// The encoded status of this turn of the loop.
    status: Option<Arc<[u8]>>,
    /// The encoded metrics of this turn of the loop.
    metrics: Option<Arc<str>>,
}

impl ProbeServer {
    fn refresh_usages(&mut self, now: Instant) -> &HashMap<i32, RunningUsage> {
        let is_fresh = |at: Instant| now.saturating_duration_since(at) < USAGE_REUSE;
        if !self.usages.as_ref().is_some_and(|(at, _)| is_fresh(*at)) {
            let running = self.job.running().take(MAX_USAGES);
            let read = running.filter_map(|pid| Some((pid, usage::of(pid)?)));
            self.usages = Some((now, read.collect()));
        }
        self.usages.as_ref().map(|(_, usages)| usages).expect("set above")
    }

    fn figures(&self, figures: &FiguresSource<'_>) -> EngineFigures {
        figures(&self.job.running().collect::<Vec<_>>())
    }

    fn status(&mut self, now: Instant, figures: &FiguresSource<'_>) -> Arc<[u8]> {
        if self.status.is_none() {
            self.refresh_usages(now);
            let usages = self.usages.as_ref().map(|(_, usages)| usages);
            let usage = |pid| usages?.get(&pid).copied();
            self.status = Some(self.job.to_json(now, &self.figures(figures), usage).into());
        }
        self.status.clone().unwrap_or_default()
    }

    fn metrics(&mut self, now: Instant, figures: &FiguresSource<'_>) -> Arc<str> {
        if self.metrics.is_none() {
            self.refresh_usages(now);
            let usages = self.usages.as_ref().map(|(_, usages)| usages);
            let usage = |pid| usages?.get(&pid).copied();
            let text = metrics::encode(now, &self.job, &self.phases, &self.counts, self.figures(figures), usage);
            self.metrics = Some(text.into());
        }
        self.metrics.clone().unwrap_or_else(|| "".into())
    }

    /// The liveness verdict as a response; `None` if the probe must wait for the callback.
    fn verdict(&self, now: Instant) -> Option<(HttpStatus, String)> {
        let verdict = self.liveness.verdict(now)?;
        let status = if verdict.alive { HttpStatus::Ok } else { HttpStatus::Unavailable };
        Some((status, format!("{}; state {}\n", verdict.reason, self.job.state().name())))
    }
}

impl Drop for ProbeServer {
    fn drop(&mut self) {
        self.question.close();
    }
}

/// The health servers of an engine.
#[derive(Debug)]
pub(crate) struct Servers {
    tokens: HealthTokens,
    by_id: BTreeMap<u64, ProbeServer>,
    /// The connections of all servers in the order of acceptance, which is the order of their deadlines.
    connections: BTreeMap<u64, ProbeConnection>,
    last_connection: u64,
    ready_connections: Vec<u64>,
    ready_listeners: Vec<u64>,
    /// Connections with a complete request.
    complete: Vec<u64>,
    scratch: Vec<u8>,
    /// Whether the last turn left work undone.
    is_busy: bool,
}

impl Servers {
    pub(crate) fn new(tokens: HealthTokens) -> Self {
        Self {
            tokens,
            by_id: BTreeMap::new(),
            connections: BTreeMap::new(),
            last_connection: 0,
            ready_connections: Vec::new(),
            ready_listeners: Vec::new(),
            complete: Vec::new(),
            scratch: Vec::new(),
            is_busy: false,
        }
    }

    /// Starts a server on `listener`.
    pub(crate) fn open(
        &mut self,
        id: u64,
        listener: Listener,
        question: Arc<ProgressQuestion>,
        timeout: Duration,
        poller: &Poller,
    ) -> Result<()> {
        let watched = poller.add(&listener, (self.tokens.listener)(id), Interest::Readable);
        watched.map_err(|source| Error::os("watch", format!("the listener on {}", listener.address()), source))?;
        let server = ProbeServer {
            listener,
            listening: Listening::Yes,
            spare_fd: WakeFd::new().ok(),
            question,
            liveness: Liveness::new(timeout),
            job: JobStatus::new(Instant::now()),
            phases: Phases::default(),
            counts: ProbeCounts::default(),
            open_connections: 0,
            usages: None,
            status: None,
            metrics: None,
        };
        self.by_id.insert(id, server);
        self.scratch.resize(MAX_HEAD, 0);
        Ok(())
    }

    /// Closes a server and its connections.
    pub(crate) fn close(&mut self, id: u64, poller: &Poller) {
        let owned: Vec<u64> = self.connections.iter().filter(|(_, one)| one.server == id).map(|(id, _)| *id).collect();
        for connection in owned {
            self.drop_connection(connection, poller);
        }
        if let Some(server) = self.by_id.remove(&id)
            && server.listening == Listening::Yes
        {
            let _ = poller.remove(&server.listener);
        }
        self.is_busy &= !self.by_id.is_empty();
    }

    /// Applies a report of the agent.
    pub(crate) fn update(&mut self, id: u64, now: Instant, update: Update) {
        let Some(server) = self.by_id.get_mut(&id) else { return };
        match &update {
            Update::Phase { phase, took } => server.phases.observe(*phase, *took),
            Update::Workers(_) => server.usages = None,
            _ => {}
        }
        server.job.apply(now, update);
    }

    /// Records exits of supervised processes.
    pub(crate) fn record_exits(&mut self, exits: &[Exit]) {
        for server in self.by_id.values_mut() {
            for exit in exits {
                server.job.record_exit(exit);
            }
        }
    }

    /// Records that a Python thread calls the callback now.
    pub(crate) fn started(&mut self, id: u64, at: Instant) {
        if let Some(server) = self.by_id.get_mut(&id) {
            server.liveness.started(at);
        }
    }

    /// Records the answer of the callback.
    pub(crate) fn answered(&mut self, id: u64, at: Instant, answer: Answer) {
        if let Some(server) = self.by_id.get_mut(&id) {
            server.liveness.answered(at, answer);
        }
    }

    /// Queues a readable listener for [`Servers::receive`].
    pub(crate) fn listener_ready(&mut self, id: u64) {
        self.ready_listeners.push(id);
    }

    /// Queues a ready or broken connection for [`Servers::receive`].
    pub(crate) fn connection_ready(&mut self, id: u64) {
        self.ready_connections.push(id);
    }

    /// Drops expired connections, then advances ready ones and accepts new ones, within the limits of one turn. The poller reports the
    /// rest again. `true` if there are complete requests.
    pub(crate) fn receive(&mut self, now: Instant, poller: &Poller) -> bool {
        let is_expired = |(_, connection): &(&u64, &ProbeConnection)| connection.deadline <= now;
        let expired = self.connections.iter().take_while(is_expired).take(SERVED_PER_TURN);
        for id in expired.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.drop_for(DropReason::Deadline, id, poller);
        }
        let mut ready = std::mem::take(&mut self.ready_connections);
        for id in ready.drain(..).take(SERVED_PER_TURN) {
            self.advance(id, now, poller);
        }
        self.ready_connections = ready;
        for id in std::mem::take(&mut self.ready_listeners) {
            self.accept(id, now, poller);
        }
        !self.complete.is_empty()
    }

    /// Answers complete requests and probes that have waited for the callback.
    pub(crate) fn respond(&mut self, now: Instant, poller: &Poller, figures: &FiguresSource<'_>) {
        self.is_busy = false;
        for id in std::mem::take(&mut self.complete) {
            self.serve(id, now, poller, figures);
        }
        let ids: Vec<u64> = self.by_id.keys().copied().collect();
        for id in ids {
            self.tick(id, now, poller);
        }
    }

    /// Whether there is no server.
    pub(crate) fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// Whether the next turn must not block.
    pub(crate) fn is_busy(&self) -> bool {
        self.is_busy
    }

    /// The earliest deadline of a connection, a question or a pause.
    pub(crate) fn next_tick(&self) -> Option<Instant> {
        let first = self.connections.first_key_value().map(|(_, connection)| connection.deadline);
        let ticks = self.by_id.values().filter_map(|server| server.liveness.next_tick());
        let pauses = self.by_id.values().filter_map(|server| match server.listening {
            Listening::PausedUntil(at) => Some(at),
            Listening::Yes | Listening::PausedUntilRoom => None,
        });
        ticks.chain(pauses).chain(first).min()
    }

    /// Resumes a paused listener if it is time, and answers probes that wait for the callback.
    fn tick(&mut self, id: u64, now: Instant, poller: &Poller) {
        let Some(server) = self.by_id.get_mut(&id) else { return };
        (server.status, server.metrics) = (None, None);
        let resume = match server.listening {
            Listening::Yes => false,
            Listening::PausedUntilRoom => {
                let mut owned = self.connections.values().filter(|connection| connection.server == id);
                server.open_connections < MAX_CONNECTIONS || owned.any(|connection| !connection.is_waiting())
            }
            Listening::PausedUntil(at) => at <= now,
        };
        if resume {
            server.spare_fd = server.spare_fd.take().or_else(|| WakeFd::new().ok());
            let token = (self.tokens.listener)(id);
            server.listening = match poller.add(&server.listener, token, Interest::Readable) {
                Ok(()) => Listening::Yes,
                Err(_) => Listening::PausedUntil(now + PAUSE),
            };
        }
        server.liveness.tick(now);
        self.answer_waiting(id, now, poller);
    }

    /// Answers probes that wait for the callback, up to the limit of one turn, or asks the callback again.
    fn answer_waiting(&mut self, id: u64, now: Instant, poller: &Poller) {
        let waiting = self.connections.iter().filter(|(_, one)| one.server == id && one.is_waiting());
        let waiting: Vec<u64> = waiting.map(|(id, _)| *id).take(SERVED_PER_TURN + 1).collect();
        let Some(server) = self.by_id.get_mut(&id) else { return };
        if waiting.is_empty() {
            return;
        }
        let Some((status, text)) = server.verdict(now) else {
            // The last answer is too old for the remaining probes.
            if server.liveness.ask(now) {
                server.question.ask();
            }
            return;
        };
        self.is_busy |= waiting.len() > SERVED_PER_TURN;
        for id in waiting.into_iter().take(SERVED_PER_TURN) {
            self.answer(id, now, poller, status, TEXT, text.as_bytes());
        }
    }

    fn accept(&mut self, id: u64, now: Instant, poller: &Poller) {
        for _ in 0..ACCEPTED_PER_TURN {
            if !self.make_room(id, now, poller) {
                self.pause(id, Listening::PausedUntilRoom, poller);
                return;
            }
            let Some(server) = self.by_id.get_mut(&id) else { return };
            let stream = match server.listener.accept() {
                Ok(stream) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                    // Frees a descriptor for the next attempt: the spare one, or that of the connection that has been idle longest.
                    if server.spare_fd.take().is_none() && !self.evict(id, PAUSE, now, poller) {
                        self.pause(id, Listening::PausedUntil(now + PAUSE), poller);
                        return;
                    }
                    continue;
                }
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::ENOMEM)) => {
                    self.pause(id, Listening::PausedUntil(now + PAUSE), poller);
                    return;
                }
                // The peer has closed the connection, or the network failed.
                Err(_) => continue,
            };
            server.open_connections += 1;
            self.last_connection += 1;
            self.connections.insert(self.last_connection, ProbeConnection::new(id, stream, now));
            // Most peers have sent their request by now.
            self.advance(self.last_connection, now, poller);
        }
    }

    fn pause(&mut self, id: u64, until: Listening, poller: &Poller) {
        if let Some(server) = self.by_id.get_mut(&id)
            && server.listening == Listening::Yes
        {
            let _ = poller.remove(&server.listener);
            server.listening = until;
        }
    }

    /// Makes room for another connection by dropping an idle one if necessary; `false` if none can be dropped.
    fn make_room(&mut self, id: u64, now: Instant, poller: &Poller) -> bool {
        let is_full = self.by_id.get(&id).is_some_and(|server| server.open_connections >= MAX_CONNECTIONS);
        !is_full || self.evict(id, Duration::ZERO, now, poller)
    }

    /// Drops the connection of a server that has been idle longest; `false` if none has been idle for `min_idle`, or all wait for the
    /// callback.
    ///
    /// Reads from the connection once before dropping it, because its request may have arrived meanwhile.
    fn evict(&mut self, server: u64, min_idle: Duration, now: Instant, poller: &Poller) -> bool {
        loop {
            let candidates = self.connections.iter().filter(|(_, one)| one.server == server && !one.is_waiting());
            let is_idle = |one: &ProbeConnection| {
                one.is_lingering() || now.saturating_duration_since(one.last_active) >= min_idle
            };
            let candidates = candidates.filter(|(_, one)| is_idle(one));
            // Answered connections are dropped first.
            let Some(id) = candidates.min_by_key(|(_, one)| (!one.is_lingering(), one.last_active)).map(|(id, _)| *id)
            else {
                return false;
            };
            self.advance(id, now, poller);
            match self.connections.get(&id) {
                Some(connection) if connection.is_waiting() => {}
                Some(_) => {
                    self.drop_for(DropReason::Room, id, poller);
                    return true;
                }
                None => return true,
            }
        }
    }

    /// Makes one step of a connection and carries out the required action.
    fn advance(&mut self, id: u64, now: Instant, poller: &Poller) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match connection.step(now, &mut self.scratch) {
            Next::Wait => self.watch(id, poller),
            Next::Close => self.drop_connection(id, poller),
            Next::Refuse(status) => self.answer(id, now, poller, status, TEXT, status.error_text().as_bytes()),
            Next::Answer => self.complete.push(id),
        }
    }

    fn serve(&mut self, id: u64, now: Instant, poller: &Poller, figures: &FiguresSource<'_>) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let Some(server) = self.by_id.get_mut(&connection.server) else { return };
        match connection.path {
            ProbePath::Live(_) => {
                if let Some((status, text)) = server.verdict(now) {
                    return self.answer(id, now, poller, status, TEXT, text.as_bytes());
                }
                if server.liveness.ask(now) {
                    server.question.ask();
                }
                self.watch(id, poller);
            }
            ProbePath::Ready => {
                let (ready, text) = server.job.readiness();
                let status = if ready { HttpStatus::Ok } else { HttpStatus::Unavailable };
                self.answer(id, now, poller, status, TEXT, format!("{text}\n").as_bytes());
            }
            ProbePath::Status => {
                let body = server.status(now, figures);
                self.answer(id, now, poller, HttpStatus::Ok, JSON, &body);
            }
            ProbePath::Metrics { open } => {
                let body = server.metrics(now, figures);
                if open {
                    self.answer(id, now, poller, HttpStatus::Ok, metrics::OPENMETRICS, body.as_bytes());
                } else {
                    self.answer(id, now, poller, HttpStatus::Ok, metrics::PLAIN, metrics::plain(&body).as_bytes());
                }
            }
            ProbePath::Other => {
                let status = HttpStatus::NotFound;
                self.answer(id, now, poller, status, TEXT, status.error_text().as_bytes());
            }
        }
    }

    fn answer(&mut self, id: u64, now: Instant, poller: &Poller, status: HttpStatus, content_type: &str, body: &[u8]) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let server = connection.server;
        if let Some(server) = self.by_id.get_mut(&server) {
            *server.counts.answered.entry((connection.path.label(), status)).or_default() += 1;
        }
        match connection.answer(now, status, content_type, body) {
            Next::Close => self.drop_connection(id, poller),
            _ if connection.unsent() > 0 => {
                self.watch(id, poller);
                self.limit_unsent(server, id, poller);
            }
            _ => self.watch(id, poller),
        }
    }

    /// Drops slow readers until the unsent bytes are within the limit: the one that has been idle longest first, and never `newest`.
    fn limit_unsent(&mut self, server: u64, newest: u64, poller: &Poller) {
        loop {
            let unread = self.connections.iter().filter(|(_, one)| one.server == server && one.unsent() > 0);
            let unsent: usize = unread.clone().map(|(_, one)| one.unsent()).sum();
            let idlest =
                unread.filter(|(id, _)| **id != newest).min_by_key(|(_, one)| one.last_active).map(|(id, _)| *id);
            match idlest {
                Some(id) if unsent > MAX_UNSENT_BYTES => self.drop_for(DropReason::Unread, id, poller),
                _ => return,
            }
        }
    }

    fn watch(&mut self, id: u64, poller: &Poller) {
        if let Some(connection) = self.connections.get_mut(&id)
            && connection.watch(poller, (self.tokens.connection)(id)).is_err()
        {
            self.drop_connection(id, poller);
        }
    }

    /// Drops a connection, and counts it unless its request was answered.
    fn drop_for(&mut self, reason: DropReason, id: u64, poller: &Poller) {
        let connection = self.connections.get(&id).filter(|connection| !connection.is_lingering());
        if let Some(server) = connection.and_then(|connection| self.by_id.get_mut(&connection.server)) {
            server.counts.dropped[reason as usize] += 1;
        }
        self.drop_connection(id, poller);
    }

    fn drop_connection(&mut self, id: u64, poller: &Poller) {
        let Some(connection) = self.connections.remove(&id) else { return };
        connection.unwatch(poller);
        let server = connection.server;
        drop(connection);
        if let Some(server) = self.by_id.get_mut(&server) {
            server.open_connections -= 1;
            if server.spare_fd.is_none() {
                server.spare_fd = WakeFd::new().ok();
            }
        }
    }
}
