//! The loop of the engine thread.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::figures::engine_figures;
use super::guard::GuardSlot;
use super::log_rules::LogMatches;
use super::order::{EngineOrder, Observed, PoolOrder, StartedGroup};
use super::orphans::Orphans;
use super::pool::{PoolHost, WarmTokens};
use super::pools::Pools;
use super::processes::{GroupEntry, Process, Reaper, SharedFile};
use super::warnings::Warnings;
use crate::error::{Error, Result};
use crate::health;
use crate::logs::TeeEvent;
use crate::supervise::{Exit, GroupEvent, StopPlan};
use crate::sys::clock::Moment;
use crate::sys::poller::{Interest, Poller};
use crate::sys::probe::Support;
use crate::sys::process::ProcessHandle;
use crate::sys::spawn::{Command, SpawnStack, can_spawn_in, spawn};
use crate::sys::threads;
use crate::sys::timer::Timer;
use crate::sys::wait::{Block, Collect, ExitStatus, Usage, wait};
use crate::thread::{Inbox, Remote, Service};
use crate::watchdog::{WatchdogServer, WatchdogTokens};

/// The source of an event, packed into a poller token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Wake,
    Timer,
    Process(u64),
    Fifo(u64),
    TimerClient { watchdog: u64, pid: u64 },
    HealthListener(u64),
    HealthConnection(u64),
    Guard,
    WarmChannel(u64),
    WarmProcess(u64),
}

impl Token {
    const KIND_SHIFT: u32 = 56;
    /// Pids have at most 22 bits on Linux. The watchdog's id is in the bits above the pid.
    const PID_BITS: u32 = 32;

    fn pack(self) -> u64 {
        let (kind, id) = match self {
            Self::Wake => (0, 0),
            Self::Timer => (1, 0),
            Self::Process(id) => (2, id),
            Self::Fifo(id) => (3, id),
            Self::TimerClient { watchdog, pid } => (4, watchdog << Self::PID_BITS | pid),
            Self::HealthListener(id) => (5, id),
            Self::HealthConnection(id) => (6, id),
            Self::Guard => (7, 0),
            Self::WarmChannel(id) => (8, id),
            Self::WarmProcess(pid) => (9, pid),
        };
        kind << Self::KIND_SHIFT | id
    }

    fn unpack(packed: u64) -> Self {
        let id = packed & ((1 << Self::KIND_SHIFT) - 1);
        match packed >> Self::KIND_SHIFT {
            0 => Self::Wake,
            1 => Self::Timer,
            2 => Self::Process(id),
            3 => Self::Fifo(id),
            5 => Self::HealthListener(id),
            6 => Self::HealthConnection(id),
            7 => Self::Guard,
            8 => Self::WarmChannel(id),
            9 => Self::WarmProcess(id),
            _ => Self::TimerClient { watchdog: id >> Self::PID_BITS, pid: id & ((1 << Self::PID_BITS) - 1) },
        }
    }
}

/// The state of the engine thread.
pub(super) struct EventLoop {
    inbox: Inbox<EngineOrder>,
    /// For the threads that wait for exits on kernels without pidfds.
    exit_sender: Arc<Mutex<Remote<EngineOrder>>>,
    poller: Poller,
    timer: Timer,
    support: Support,
    stack: SpawnStack,
    groups: BTreeMap<u64, GroupEntry>,
    /// Group and index of each process, by its id in this engine (not its pid).
    processes: HashMap<u64, (u64, usize)>,
    log_matches: LogMatches,
    watchdogs: BTreeMap<u64, WatchdogServer>,
    health: health::Servers,
    guard: GuardSlot,
    orphans: Orphans,
    warm: Pools,
    warnings: Warnings,
    /// The cgroup of new workers; `None` means the agent's own.
    cgroup: Option<OwnedFd>,
    last_id: u64,
    closing: bool,
}

impl EventLoop {
    pub(super) fn new(inbox: Inbox<EngineOrder>, support: Support, warnings: Warnings) -> Result<Self> {
        let poller = Poller::new().map_err(|source| Error::os("create", "an epoll instance", source))?;
        let timer = Timer::new().map_err(|source| Error::os("create", "a timerfd", source))?;
        let watched = poller
            .add(inbox.wake(), Token::Wake.pack(), Interest::Readable)
            .and_then(|()| poller.add(&timer, Token::Timer.pack(), Interest::Readable));
        watched.map_err(|source| Error::os("watch", "the engine's own descriptors", source))?;
        Ok(Self {
            exit_sender: Arc::new(Mutex::new(inbox.remote())),
            inbox,
            poller,
            timer,
            support,
            stack: SpawnStack::new(),
            groups: BTreeMap::new(),
            processes: HashMap::new(),
            log_matches: LogMatches::default(),
            watchdogs: BTreeMap::new(),
            health: health::Servers::new(health::HealthTokens {
                listener: |server| Token::HealthListener(server).pack(),
                connection: |connection| Token::HealthConnection(connection).pack(),
            }),
            warm: Pools::new(
                WarmTokens {
                    channel: |pool| Token::WarmChannel(pool).pack(),
                    process: |pid| Token::WarmProcess(u64::from(pid.cast_unsigned())).pack(),
                },
                warnings.clone(),
            ),
            guard: GuardSlot::new(warnings.clone()),
            warnings,
            orphans: Orphans::new(),
            cgroup: None,
            last_id: 0,
            closing: false,
        })
    }

    fn reap_orphans(&mut self, now: Instant) {
        let (groups, guard, warm) = (&self.groups, self.guard.pid(), &self.warm);
        let is_worker = |pid| groups.values().any(|group| group.processes.iter().any(|one| one.leader.pid() == pid));
        self.orphans.reap(now, |pid| Some(pid) == guard || is_worker(pid) || warm.contains(pid));
    }

    fn handle_guard_end(&mut self) {
        let leaders = self.groups.values().flat_map(|group| group.processes.iter().map(|process| &process.leader));
        let token = Token::Guard.pack();
        self.guard.handle_end(&self.poller, token, self.support.pidfd, &mut self.stack, leaders);
    }

    fn answer_probes(&mut self) {
        if self.health.is_empty() {
            return;
        }
        if self.health.receive(Instant::now(), &self.poller) {
            // An order sent before the request takes effect before the answer.
            self.handle_orders();
        }
        let (watchdogs, warm, matches, now) = (&self.watchdogs, self.warm.figures(), &self.log_matches, Moment::now());
        let figures = |pids: &[i32]| engine_figures(watchdogs, warm, matches, pids, now);
        self.health.respond(now.instant, &self.poller, &figures);
    }

    /// Handles the exits in `ready`. Polls again until there is no further exit before it acts on the first one: workers that died
    /// together are then all known to be dead before any worker is signalled.
    fn handle_exits(&mut self, ready: &mut Vec<u64>) -> Result<()> {
        let mut batches: BTreeMap<u64, Vec<Exit>> = BTreeMap::new();
        let mut seen = 0;
        loop {
            let before = self.processes.len();
            for token in &ready[seen..] {
                if let Token::Process(process) = Token::unpack(*token)
                    && let Some((group, index)) = self.processes.get(&process).copied()
                    && let Some(entry) = self.groups.get(&group)
                    && let Some(ended) = entry.collect(index, Moment::now())
                {
                    if let Some(fd) = entry.processes[index].exit_fd() {
                        // The pidfd of a dead process stays readable.
                        let _ = self.poller.remove(fd);
                    }
                    self.processes.remove(&process);
                    batches.entry(group).or_default().push(ended);
                }
            }
            if self.processes.len() == before {
                break;
            }
            seen = ready.len();
            let mut further = Vec::new();
            self.poller.wait(false, &mut further).map_err(|source| Error::os("wait for", "events", source))?;
            // Other events are in `ready` already or will be reported again. Adding them would handle them twice in one turn.
            ready.extend(further.into_iter().filter(|token| matches!(Token::unpack(*token), Token::Process(_))));
        }
        for (group, ended) in batches {
            self.record_exits(group, ended);
        }
        Ok(())
    }

    fn record_exits(&mut self, id: u64, ended: Vec<Exit>) {
        for watchdog in self.watchdogs.values_mut() {
            for ended in &ended {
                watchdog.remove_ended_client(ended.pid, &self.poller);
            }
        }
        if let Some(group) = self.groups.get_mut(&id) {
            let known = group.state.exits().len();
            group.step(Instant::now(), GroupEvent::Ended(ended));
            self.health.record_exits(&group.state.exits()[known..]);
        }
        self.remove_released(id);
    }

    fn next_tick(&mut self) -> Option<Instant> {
        let groups = self.groups.values().filter_map(|group| group.state.next_tick());
        let watchdogs = self.watchdogs.values_mut().filter_map(WatchdogServer::next_tick);
        let others = [self.orphans.next_tick(), self.warm.next_tick()];
        groups.chain(others.into_iter().flatten()).chain(self.health.next_tick()).chain(watchdogs).min()
    }

    /// Handles expired timers.
    fn handle_deadlines(&mut self) {
        if self.watchdogs.is_empty() {
            return;
        }
        let now = Moment::now();
        for (id, watchdog) in &mut self.watchdogs {
            let Some(collection) = watchdog.handle_deadlines(now, &self.poller) else { continue };
            let (watchdog_id, engine) = (*id, self.inbox.remote());
            let empty = collection.empty();
            let collect = move || {
                let evidence = collection.run();
                // The engine may have ended.
                let _ = engine.send(EngineOrder::Evidence { watchdog: watchdog_id, evidence });
            };
            if threads::builder("ferro-evidence").spawn(collect).is_err() {
                watchdog.handle_evidence(&empty);
            }
        }
    }

    fn handle_orders(&mut self) {
        while let Some(order) = self.inbox.next() {
            self.handle(order);
        }
    }

    fn handle(&mut self, order: EngineOrder) {
        match order {
            EngineOrder::Spawn { commands, pool, stop_file, reply } => {
                let _ = reply.send(self.spawn_group(&commands, pool, stop_file));
            }
            EngineOrder::Pool(order) => self.handle_pool_order(order),
            EngineOrder::Observe { processes, stop_file, reply } => {
                let _ = reply.send(self.observe_group(processes, stop_file));
            }
            EngineOrder::GroupEvent { group, event } => {
                if let Some(group) = self.groups.get_mut(&group) {
                    group.step(Instant::now(), event);
                }
            }
            EngineOrder::Signal { group, index, signal, leader_only, reply } => {
                let leader = self.groups.get(&group).and_then(|group| group.processes.get(index));
                let delivered = leader.map_or(Ok(false), |process| {
                    if leader_only { process.leader.signal(signal) } else { process.leader.signal_group(signal) }
                });
                let _ = reply.send(delivered);
            }
            EngineOrder::Release { group } => {
                if let Some(entry) = self.groups.get_mut(&group) {
                    entry.released = true;
                }
                self.remove_released(group);
            }
            EngineOrder::Exited { process, status, usage, at } => {
                if let Some((group, index)) = self.processes.remove(&process)
                    && let Some(entry) = self.groups.get(&group)
                {
                    let pid = entry.processes[index].leader.pid();
                    let ended = Exit::new(index, pid, status, usage, at);
                    self.record_exits(group, vec![ended]);
                }
            }
            EngineOrder::Logs(event) => self.handle_log_event(event),
            EngineOrder::CreateWatchdog { config, files, reports, reply } => {
                let id = self.next_id();
                let clients = Token::TimerClient { watchdog: id, pid: 0 }.pack();
                let tokens = WatchdogTokens { fifo: Token::Fifo(id).pack(), clients };
                self.watchdogs.insert(id, WatchdogServer::new(config, files, tokens, self.support, reports));
                let _ = reply.send(id);
            }
            EngineOrder::Watchdog { id, order } => {
                if let Some(watchdog) = self.watchdogs.get_mut(&id) {
                    watchdog.handle(order, &self.poller);
                }
            }
            EngineOrder::DrainWatchdog { id, reply } => {
                if let Some(watchdog) = self.watchdogs.get_mut(&id) {
                    watchdog.drain(&self.poller);
                    self.handle_deadlines();
                    let _ = reply.send(());
                }
            }
            EngineOrder::Evidence { watchdog, evidence } => {
                if let Some(watchdog) = self.watchdogs.get_mut(&watchdog) {
                    watchdog.handle_evidence(&evidence);
                }
            }
            EngineOrder::CloseWatchdog { id, reply } => {
                if let Some(mut watchdog) = self.watchdogs.remove(&id) {
                    watchdog.stop(&self.poller);
                }
                if let Some(reply) = reply {
                    let _ = reply.send(());
                }
            }
            EngineOrder::Health(order) => {
                let id = self.next_id();
                let exits = self.groups.values().map(|group| group.state.exits());
                order.handle(&mut self.health, &self.poller, id, exits);
            }
            EngineOrder::AdoptGuard { guard, program, reply } => {
                let _ = reply.send(self.guard.adopt(guard, program, &self.poller, Token::Guard.pack()));
            }
            EngineOrder::WatchLease(page) => self.guard.watch_lease(page),
            EngineOrder::OwnOrphans => self.orphans.own_all(),
            EngineOrder::UseCgroup { folder, reply } => {
                let is_requested = folder.is_some();
                self.cgroup = folder.filter(|folder| can_spawn_in(folder.as_fd(), &mut self.stack));
                let _ = reply.send(self.cgroup.is_some() == is_requested);
            }
            EngineOrder::DismissGuard { reply } => self.guard.dismiss(reply),
            EngineOrder::Close { kill_wait } => {
                self.closing = true;
                self.kill_all(kill_wait);
            }
        }
    }

    fn handle_log_event(&mut self, event: TeeEvent) {
        match event {
            TeeEvent::Found { matches, waiters } => {
                let now = Instant::now();
                for found in matches {
                    self.log_matches.handle(found, &mut self.groups, &self.warnings, now);
                }
                for waiter in waiters {
                    let _ = waiter.send(());
                }
            }
            TeeEvent::Failed(error) => self.warnings.add(format!(
                "{error}; log files are no longer copied to the console or searched for patterns; the workers go on, and their files are complete"
            )),
        }
    }

    fn handle_pool_order(&mut self, order: PoolOrder) {
        let id = self.next_id();
        let cgroup = self.cgroup.as_ref().map(AsFd::as_fd);
        let host = PoolHost { support: self.support, poller: &self.poller, guard: &self.guard };
        self.warm.handle(order, id, host, &mut self.stack, cgroup);
    }

    fn kill_all(&mut self, kill_wait: Duration) {
        let now = Instant::now();
        self.warm.close_all();
        for group in self.groups.values_mut() {
            group.step(now, GroupEvent::Stop(StopPlan::kill(kill_wait)));
            group.step(now, GroupEvent::EndGrace);
        }
    }

    /// Starts a group. Commands become warm workers as long as `pool` has parked children.
    fn spawn_group(&mut self, commands: &[Command], pool: Option<u64>, stop_file: SharedFile) -> Result<StartedGroup> {
        let mut processes = Vec::with_capacity(commands.len());
        let mut warm = Vec::new();
        for (index, command) in commands.iter().enumerate() {
            if let Some(leader) = pool.and_then(|pool| self.warm.release(pool, command, &[], &self.poller)) {
                warm.push(index);
                processes.push(Process { id: self.next_id(), leader, sentinel: None });
                continue;
            }
            let cgroup = self.cgroup.as_ref().map(AsFd::as_fd);
            match spawn(command, index, self.support.pidfd, cgroup, &mut self.stack) {
                Ok(spawned) => processes.push(Process {
                    id: self.next_id(),
                    leader: ProcessHandle::spawned(spawned.pid, spawned.pidfd, self.support),
                    sentinel: None,
                }),
                Err(error) => {
                    for Process { leader, .. } in &processes {
                        let _ = leader.signal_group(libc::SIGKILL);
                        let _ = wait(leader.pid(), Collect::Reap, Block::Yes);
                    }
                    return Err(error.into());
                }
            }
        }
        Ok(StartedGroup { warm, ..self.register_group(GroupEntry::new(processes, Reaper::Engine, stop_file))? })
    }

    fn observe_group(&mut self, observed: Vec<Observed>, stop_file: SharedFile) -> Result<StartedGroup> {
        let mut processes = Vec::with_capacity(observed.len());
        for Observed { pid, sentinel } in observed {
            let opened = ProcessHandle::open(pid, self.support);
            let leader = opened.map_err(|source| Error::os("observe", format!("process {pid}"), source))?;
            let is_child = !matches!(wait(pid, Collect::Observe, Block::No), Ok(Some((ExitStatus::Unknown, _))));
            processes.push(Process {
                id: self.next_id(),
                leader,
                // A child is observed directly: its own children may keep the sentinel's pipe open.
                sentinel: sentinel.filter(|_| !is_child),
            });
        }
        let started = self.register_group(GroupEntry::new(processes, Reaper::Program, stop_file))?;
        Ok(StartedGroup { warm: self.warm.observed(&started.pids), ..started })
    }

    /// Registers the processes of a new group with the poller, the guard and the orphan reaper.
    fn register_group(&mut self, entry: GroupEntry) -> Result<StartedGroup> {
        let id = self.next_id();
        let started = StartedGroup {
            id,
            pids: entry.processes.iter().map(|process| process.leader.pid()).collect(),
            progress: Arc::clone(&entry.progress),
            warm: Vec::new(),
        };
        for (index, process) in entry.processes.iter().enumerate() {
            self.processes.insert(process.id, (id, index));
            let watched = match process.exit_fd() {
                Some(fd) => self.poller.add(fd, Token::Process(process.id).pack(), Interest::Readable),
                None => self.wait_on_thread(process),
            };
            if let Err(source) = watched {
                for Process { leader, id, .. } in &entry.processes {
                    self.processes.remove(id);
                    if entry.reaper == Reaper::Engine {
                        let _ = leader.signal_group(libc::SIGKILL);
                        let _ = wait(leader.pid(), Collect::Reap, Block::Yes);
                    }
                }
                let object = format!("worker {index} (pid {})", process.leader.pid());
                return Err(Error::os("watch", object, source));
            }
        }
        let now = Instant::now();
        for Process { leader, .. } in &entry.processes {
            self.guard.add_worker(leader.pid(), leader.pidfd());
            self.orphans.add_session(leader.pid(), now);
        }
        self.groups.insert(id, entry);
        Ok(started)
    }

    /// Without pidfds, starts a thread that blocks in `waitid` until the process has ended and leaves the zombie. It polls a process that
    /// is not a child.
    fn wait_on_thread(&self, process: &Process) -> std::io::Result<()> {
        let (id, leader) = (process.id, process.leader.try_clone()?);
        let engine = Arc::clone(&self.exit_sender);
        let wait_for_exit = move || {
            let (status, usage) = loop {
                match wait(leader.pid(), Collect::Observe, Block::Yes) {
                    Ok(Some((ExitStatus::Unknown, usage))) => {
                        leader.poll_until_end();
                        break (ExitStatus::Unknown, usage);
                    }
                    Ok(Some(ended)) => break ended,
                    Ok(None) => {}
                    Err(_) => break (ExitStatus::Unknown, Usage::default()),
                }
            };
            // The timestamp is read under the lock, so exits arrive in timestamp order.
            let engine = engine.lock().unwrap_or_else(PoisonError::into_inner);
            let at = Moment::now();
            // The engine may have ended.
            let _ = engine.send(EngineOrder::Exited { process: id, status, usage, at });
        };
        threads::builder("ferro-wait").spawn(wait_for_exit).map(drop)
    }

    /// Removes a group if its handle was dropped and all its processes have ended.
    fn remove_released(&mut self, id: u64) {
        if self.groups.get(&id).is_some_and(|group| group.released && group.all_ended())
            && let Some(group) = self.groups.remove(&id)
        {
            group.reap_zombies();
            for Process { leader, .. } in &group.processes {
                self.guard.remove_worker(leader.pid());
            }
        }
    }

    fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }
}

impl Service for EventLoop {
    type Order = EngineOrder;

    fn serve(&mut self) -> Result<()> {
        let mut ready = Vec::new();
        let is_done = |this: &Self| this.groups.values().all(|group| group.is_stopped() || group.processes.is_empty());
        while !(self.closing && self.warm.is_empty() && is_done(self)) {
            let poll_failed = |source| Error::os("wait for", "events", source);
            let next = self.next_tick();
            self.timer.set(next).map_err(poll_failed)?;
            ready.clear();
            self.poller.wait(!self.health.is_busy(), &mut ready).map_err(poll_failed)?;
            self.handle_exits(&mut ready)?;
            for token in ready.drain(..) {
                match Token::unpack(token) {
                    Token::Wake => {
                        self.inbox.wake().drain();
                        self.handle_orders();
                    }
                    Token::Timer => self.timer.drain(),
                    Token::Fifo(id) => {
                        if let Some(watchdog) = self.watchdogs.get_mut(&id) {
                            watchdog.read_pipe(&self.poller);
                        }
                    }
                    Token::TimerClient { watchdog, pid } => {
                        if let (Some(watchdog), Ok(pid)) = (self.watchdogs.get_mut(&watchdog), pid.try_into()) {
                            watchdog.remove_ended_client(pid, &self.poller);
                        }
                    }
                    Token::HealthListener(server) => self.health.listener_ready(server),
                    Token::HealthConnection(connection) => self.health.connection_ready(connection),
                    Token::Guard => self.handle_guard_end(),
                    Token::WarmChannel(pool) => {
                        let host = PoolHost { support: self.support, poller: &self.poller, guard: &self.guard };
                        self.warm.channel_ready(pool, host);
                    }
                    Token::WarmProcess(pid) => {
                        if let Ok(pid) = i32::try_from(pid) {
                            let host = PoolHost { support: self.support, poller: &self.poller, guard: &self.guard };
                            self.warm.process_ended(pid, host);
                        }
                    }
                    Token::Process(_) => {}
                }
            }
            self.handle_deadlines();
            let now = Instant::now();
            for group in self.groups.values_mut() {
                if group.state.next_tick().is_some_and(|at| at <= now) {
                    group.step(now, GroupEvent::Tick);
                }
            }
            self.warm.tick(now);
            if self.warnings.announce() {
                self.groups.values().for_each(|group| group.progress.wake_waiters());
            }
            self.reap_orphans(now);
            // Probes come last, so they do not delay signals, deadlines or log lines.
            self.answer_probes();
        }
        Ok(())
    }

    /// Kills the workers after a failure of the thread, and passes the error to the waiters.
    fn finish(&mut self, outcome: &Result<()>) {
        let failure = outcome.as_ref().err().map(ToString::to_string);
        if failure.is_some() {
            // The forgotten guard keeps its socket open until this process ends. Then the guard kills the remaining workers.
            self.warm.close_all();
            std::mem::forget(std::mem::replace(&mut self.guard, GuardSlot::new(Warnings::default())));
        }
        for group in self.groups.values() {
            if failure.is_some() {
                for process in &group.processes {
                    let _ = process.leader.signal_group(libc::SIGKILL);
                }
            }
            group.reap_zombies();
            group.progress.publish_closed(failure.clone());
        }
    }
}
