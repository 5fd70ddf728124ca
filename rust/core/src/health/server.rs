//! The listeners and connections of an engine. What a turn of its loop does here is bounded, and so is what is held.

use std::collections::{BTreeMap, HashMap};
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::connection::{Next, ProbeConnection, ProbePath};
use super::http::{HttpStatus, MAX_HEAD};
use super::liveness::{Answer, Liveness};
use super::metrics::{self, Phases, ProbeCounts};
use super::question::ProgressQuestion;
use super::status::{Board, Update, WatchdogFigures};
use crate::error::{Error, Result};
use crate::supervise::Exit;
use crate::sys::net::Listener;
use crate::sys::poller::{Interest, Poller};
use crate::sys::usage::{self, RunningUsage};
use crate::sys::wake::WakeFd;
use crate::vocabulary::DropReason;

/// Most connections of a server. When another comes, the one that has been idle for longest makes room.
const MOST_CONNECTIONS: usize = 256;
/// Most bytes of answers that the peers of a server have not taken. Beyond that the one that has been idle for longest is dropped.
const MOST_UNSENT: usize = 4 * 1024 * 1024;
/// Most connections that are served in one turn of the loop, and most that a server accepts in one.
const SERVED_PER_TURN: usize = 8;
const ACCEPTED_PER_TURN: usize = 4;
/// How long a server that is out of descriptors waits before it tries again.
const PAUSE: Duration = Duration::from_millis(100);
/// For how long what workers use is not read again, and for how many of them it is read.
const USAGE_REUSE: Duration = Duration::from_millis(250);
const MOST_USAGES: usize = 256;

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";

/// What the watchdogs of the engine know of some processes.
pub(crate) type WatchdogOf<'a> = dyn Fn(&[i32]) -> WatchdogFigures + 'a;

/// How registrations in the poller are named.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HealthTokens {
    /// Of the listener of a server.
    pub(crate) listener: fn(u64) -> u64,
    /// Of a connection.
    pub(crate) connection: fn(u64) -> u64,
}

/// Whether a server takes connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listening {
    Yes,
    /// All connections wait for the callback: not before one of them is over.
    UntilRoom,
    /// There is no descriptor to be had.
    Until(Instant),
}

/// One health server.
#[derive(Debug)]
struct ProbeServer {
    listener: Listener,
    listening: Listening,
    /// Given up where no other descriptor is to be had, so that a probe is answered even then.
    spare: Option<WakeFd>,
    question: Arc<ProgressQuestion>,
    liveness: Liveness,
    board: Board,
    phases: Phases,
    counts: ProbeCounts,
    open: usize,
    usages: Option<(Instant, HashMap<i32, RunningUsage>)>,
    /// Made at most once in a turn.
    status: Option<Arc<[u8]>>,
    metrics: Option<Arc<str>>,
}

impl ProbeServer {
    fn refresh_usages(&mut self, now: Instant) -> &HashMap<i32, RunningUsage> {
        let is_fresh = |at: Instant| now.saturating_duration_since(at) < USAGE_REUSE;
        if !self.usages.as_ref().is_some_and(|(at, _)| is_fresh(*at)) {
            let running = self.board.running().take(MOST_USAGES);
            let read = running.filter_map(|pid| Some((pid, usage::of(pid)?)));
            self.usages = Some((now, read.collect()));
        }
        self.usages.as_ref().map(|(_, usages)| usages).expect("made above")
    }

    fn watchdog(&self, watchdog: &WatchdogOf<'_>) -> WatchdogFigures {
        watchdog(&self.board.running().collect::<Vec<_>>())
    }

    fn status(&mut self, now: Instant, watchdog: &WatchdogOf<'_>) -> Arc<[u8]> {
        if self.status.is_none() {
            self.refresh_usages(now);
            let usages = self.usages.as_ref().map(|(_, usages)| usages);
            let usage = |pid| usages?.get(&pid).copied();
            self.status = Some(self.board.to_json(now, &self.watchdog(watchdog), usage).into());
        }
        self.status.clone().unwrap_or_default()
    }

    fn metrics(&mut self, now: Instant, watchdog: &WatchdogOf<'_>) -> Arc<str> {
        if self.metrics.is_none() {
            self.refresh_usages(now);
            let usages = self.usages.as_ref().map(|(_, usages)| usages);
            let usage = |pid| usages?.get(&pid).copied();
            let text = metrics::encode(now, &self.board, &self.phases, &self.counts, self.watchdog(watchdog), usage);
            self.metrics = Some(text.into());
        }
        self.metrics.clone().unwrap_or_else(|| "".into())
    }

    /// The verdict on the agent, if it is known now.
    fn verdict(&self, now: Instant) -> Option<(HttpStatus, String)> {
        let verdict = self.liveness.verdict(now)?;
        let status = if verdict.alive { HttpStatus::Ok } else { HttpStatus::Unavailable };
        Some((status, format!("{}; state {}\n", verdict.reason, self.board.state().name())))
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
    /// Of all servers, in the order in which they were accepted: the first is the first whose time is over.
    connections: BTreeMap<u64, ProbeConnection>,
    last_connection: u64,
    readable: Vec<u64>,
    acceptable: Vec<u64>,
    /// Those whose request is complete.
    complete: Vec<u64>,
    scratch: Vec<u8>,
    /// Whether there is more to do than fitted into the last turn.
    is_busy: bool,
}

impl Servers {
    pub(crate) fn new(tokens: HealthTokens) -> Self {
        Self {
            tokens,
            by_id: BTreeMap::new(),
            connections: BTreeMap::new(),
            last_connection: 0,
            readable: Vec::new(),
            acceptable: Vec::new(),
            complete: Vec::new(),
            scratch: Vec::new(),
            is_busy: false,
        }
    }

    /// Begins to serve on `listener`.
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
            spare: WakeFd::new().ok(),
            question,
            liveness: Liveness::new(timeout),
            board: Board::new(Instant::now()),
            phases: Phases::default(),
            counts: ProbeCounts::default(),
            open: 0,
            usages: None,
            status: None,
            metrics: None,
        };
        self.by_id.insert(id, server);
        self.scratch.resize(MAX_HEAD, 0);
        Ok(())
    }

    /// Stops to serve; connections are dropped.
    pub(crate) fn close(&mut self, id: u64, poller: &Poller) {
        let of_it: Vec<u64> = self.connections.iter().filter(|(_, one)| one.server == id).map(|(id, _)| *id).collect();
        for connection in of_it {
            self.drop_connection(connection, poller);
        }
        if let Some(server) = self.by_id.remove(&id)
            && server.listening == Listening::Yes
        {
            let _ = poller.remove(&server.listener);
        }
        self.is_busy &= !self.by_id.is_empty();
    }

    /// Enters what the agent says.
    pub(crate) fn update(&mut self, id: u64, now: Instant, update: Update) {
        let Some(server) = self.by_id.get_mut(&id) else { return };
        match &update {
            Update::Phase { phase, took } => server.phases.observe(*phase, *took),
            Update::Workers(_) => server.usages = None,
            _ => {}
        }
        server.board.apply(now, update);
    }

    /// Enters how processes ended.
    pub(crate) fn note_exits(&mut self, exits: &[Exit]) {
        for server in self.by_id.values_mut() {
            for exit in exits {
                server.board.note_exit(exit);
            }
        }
    }

    /// A thread has the interpreter and calls the callback.
    pub(crate) fn started(&mut self, id: u64, at: Instant) {
        if let Some(server) = self.by_id.get_mut(&id) {
            server.liveness.started(at);
        }
    }

    /// The callback has returned.
    pub(crate) fn answered(&mut self, id: u64, at: Instant, answer: Answer) {
        if let Some(server) = self.by_id.get_mut(&id) {
            server.liveness.answered(at, answer);
        }
    }

    /// A listener has connections.
    pub(crate) fn acceptable(&mut self, id: u64) {
        self.acceptable.push(id);
    }

    /// A connection has bytes, has room, or is broken.
    pub(crate) fn ready(&mut self, id: u64) {
        self.readable.push(id);
    }

    /// Reads what has come, as far as one turn goes; what is left is reported again. `true` if there are requests to be answered.
    pub(crate) fn receive(&mut self, now: Instant, poller: &Poller) -> bool {
        let is_over = |(_, connection): &(&u64, &ProbeConnection)| connection.deadline <= now;
        let over = self.connections.iter().take_while(is_over).take(SERVED_PER_TURN);
        for id in over.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.drop_for(DropReason::Deadline, id, poller);
        }
        let mut readable = std::mem::take(&mut self.readable);
        for id in readable.drain(..).take(SERVED_PER_TURN) {
            self.advance(id, now, poller);
        }
        self.readable = readable;
        for id in std::mem::take(&mut self.acceptable) {
            self.accept(id, now, poller);
        }
        !self.complete.is_empty()
    }

    /// Answers what was received and what has waited for the callback.
    pub(crate) fn respond(&mut self, now: Instant, poller: &Poller, watchdog: &WatchdogOf<'_>) {
        self.is_busy = false;
        for id in std::mem::take(&mut self.complete) {
            self.serve(id, now, poller, watchdog);
        }
        let ids: Vec<u64> = self.by_id.keys().copied().collect();
        for id in ids {
            self.look_after(id, now, poller);
        }
    }

    /// Whether nobody is served.
    pub(crate) fn is_idle(&self) -> bool {
        self.by_id.is_empty()
    }

    /// Whether there is something to do at once.
    pub(crate) fn is_busy(&self) -> bool {
        self.is_busy
    }

    /// When there is something to do at the latest.
    pub(crate) fn next_tick(&self) -> Option<Instant> {
        let first = self.connections.first_key_value().map(|(_, connection)| connection.deadline);
        let ticks = self.by_id.values().filter_map(|server| server.liveness.next_tick());
        let pauses = self.by_id.values().filter_map(|server| match server.listening {
            Listening::Until(at) => Some(at),
            Listening::Yes | Listening::UntilRoom => None,
        });
        ticks.chain(pauses).chain(first).min()
    }

    /// What the time has brought for one server.
    fn look_after(&mut self, id: u64, now: Instant, poller: &Poller) {
        let Some(server) = self.by_id.get_mut(&id) else { return };
        (server.status, server.metrics) = (None, None);
        let resume = match server.listening {
            Listening::Yes => false,
            Listening::UntilRoom => {
                let mut of_it = self.connections.values().filter(|connection| connection.server == id);
                server.open < MOST_CONNECTIONS || of_it.any(|connection| !connection.is_waiting())
            }
            Listening::Until(at) => at <= now,
        };
        if resume {
            server.spare = server.spare.take().or_else(|| WakeFd::new().ok());
            let token = (self.tokens.listener)(id);
            server.listening = match poller.add(&server.listener, token, Interest::Readable) {
                Ok(()) => Listening::Yes,
                Err(_) => Listening::Until(now + PAUSE),
            };
        }
        server.liveness.tick(now);
        self.answer_waiting(id, now, poller);
    }

    /// Answers some of the probes that wait for the callback, if there is something to tell them.
    fn answer_waiting(&mut self, id: u64, now: Instant, poller: &Poller) {
        let waiting = self.connections.iter().filter(|(_, one)| one.server == id && one.is_waiting());
        let waiting: Vec<u64> = waiting.map(|(id, _)| *id).take(SERVED_PER_TURN + 1).collect();
        let Some(server) = self.by_id.get_mut(&id) else { return };
        if waiting.is_empty() {
            return;
        }
        let Some((status, text)) = server.verdict(now) else {
            // The answer has become too old for those who are left.
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
                self.pause(id, Listening::UntilRoom, poller);
                return;
            }
            let Some(server) = self.by_id.get_mut(&id) else { return };
            let stream = match server.listener.accept() {
                Ok(stream) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                    // With the spare, or that of the connection that has been idle for longest, there is one for the next try.
                    if server.spare.take().is_none() && !self.evict(id, PAUSE, now, poller) {
                        self.pause(id, Listening::Until(now + PAUSE), poller);
                        return;
                    }
                    continue;
                }
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::ENOMEM)) => {
                    self.pause(id, Listening::Until(now + PAUSE), poller);
                    return;
                }
                // The peer is gone already, or the network refused it.
                Err(_) => continue,
            };
            server.open += 1;
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

    /// Whether there is room for another connection, perhaps because one had to go.
    fn make_room(&mut self, id: u64, now: Instant, poller: &Poller) -> bool {
        let is_full = self.by_id.get(&id).is_some_and(|server| server.open >= MOST_CONNECTIONS);
        !is_full || self.evict(id, Duration::ZERO, now, poller)
    }

    /// Ends the connection of a server that has been idle for longest; `false` if none has been for `least`, or all wait for the
    /// callback.
    ///
    /// It is looked at once more before: its request may have come without having been read.
    fn evict(&mut self, server: u64, least: Duration, now: Instant, poller: &Poller) -> bool {
        loop {
            let candidates = self.connections.iter().filter(|(_, one)| one.server == server && !one.is_waiting());
            let is_idle =
                |one: &ProbeConnection| one.is_lingering() || now.saturating_duration_since(one.active) >= least;
            let candidates = candidates.filter(|(_, one)| is_idle(one));
            // Those that were answered go first.
            let Some(id) = candidates.min_by_key(|(_, one)| (!one.is_lingering(), one.active)).map(|(id, _)| *id)
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

    /// One step of a connection, with what follows from it.
    fn advance(&mut self, id: u64, now: Instant, poller: &Poller) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match connection.step(now, &mut self.scratch) {
            Next::Wait => self.watch(id, poller),
            Next::Close => self.drop_connection(id, poller),
            Next::Refuse(status) => self.answer(id, now, poller, status, TEXT, status.remedy().as_bytes()),
            Next::Answer => self.complete.push(id),
        }
    }

    fn serve(&mut self, id: u64, now: Instant, poller: &Poller, watchdog: &WatchdogOf<'_>) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let Some(server) = self.by_id.get_mut(&connection.server) else { return };
        match connection.page {
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
                let (ready, text) = server.board.readiness();
                let status = if ready { HttpStatus::Ok } else { HttpStatus::Unavailable };
                self.answer(id, now, poller, status, TEXT, format!("{text}\n").as_bytes());
            }
            ProbePath::Status => {
                let body = server.status(now, watchdog);
                self.answer(id, now, poller, HttpStatus::Ok, JSON, &body);
            }
            ProbePath::Metrics { open } => {
                let body = server.metrics(now, watchdog);
                if open {
                    self.answer(id, now, poller, HttpStatus::Ok, metrics::OPENMETRICS, body.as_bytes());
                } else {
                    self.answer(id, now, poller, HttpStatus::Ok, metrics::PLAIN, metrics::plain(&body).as_bytes());
                }
            }
            ProbePath::Other => {
                let status = HttpStatus::NotFound;
                self.answer(id, now, poller, status, TEXT, status.remedy().as_bytes());
            }
        }
    }

    fn answer(&mut self, id: u64, now: Instant, poller: &Poller, status: HttpStatus, content_type: &str, body: &[u8]) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let server = connection.server;
        if let Some(server) = self.by_id.get_mut(&server) {
            *server.counts.answered.entry((connection.page.label(), status)).or_default() += 1;
        }
        match connection.answer(now, status, content_type, body) {
            Next::Close => self.drop_connection(id, poller),
            _ if connection.unsent() > 0 => {
                self.watch(id, poller);
                self.bound_unsent(server, id, poller);
            }
            _ => self.watch(id, poller),
        }
    }

    /// Drops readers that are too slow, the one that has been idle for longest first, but not `newest`.
    fn bound_unsent(&mut self, server: u64, newest: u64, poller: &Poller) {
        loop {
            let of_it = self.connections.iter().filter(|(_, one)| one.server == server && one.unsent() > 0);
            let unsent: usize = of_it.clone().map(|(_, one)| one.unsent()).sum();
            let slowest = of_it.filter(|(id, _)| **id != newest).min_by_key(|(_, one)| one.active).map(|(id, _)| *id);
            match slowest {
                Some(id) if unsent > MOST_UNSENT => self.drop_for(DropReason::Unread, id, poller),
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

    /// Ends a connection whose peer has not, and counts it unless its request was answered.
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
            server.open -= 1;
            if server.spare.is_none() {
                server.spare = WakeFd::new().ok();
            }
        }
    }
}
