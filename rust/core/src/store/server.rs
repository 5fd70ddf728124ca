//! The store's thread: connections in, requests to the state, replies out.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::agents::Agents;
use super::connection::{Connection, Protocol};
pub use super::state::Peer;
use super::state::{Reply, State};
use super::wire::{Limits, Request};
use crate::error::{Error, Result};
use crate::rendezvous::rounds::{Event, Settings};
use crate::sys::net::Listener;
use crate::sys::poller::{Interest, Poller};
use crate::sys::sigmask;
use crate::sys::threads;
use crate::sys::timer::{Timer, after};
use crate::sys::wake::WakeFd;

const WAKE: u64 = 0;
pub(super) const LISTENER: u64 = 1;
const TIMER: u64 = 2;
const FIRST_PEER: Peer = 3;

/// What is read of a connection before the others have their turn.
const CHUNK: usize = 64 * 1024;

/// A connection whose replies are not taken is not read from beyond this.
const MOST_UNSENT: usize = 1 << 20;

/// What is said to a connection before the others have their turn.
const REPLIED_PER_TURN: usize = 4 << 20;

const THREAD: &str = "ferro-store";

/// What the thread is to do.
type Order = Box<dyn FnOnce(&mut Worker) + Send>;

/// A store that clients of `TCPStore` can use, and a rendezvous at the same port, on a thread of their own. Ends when it is dropped.
#[derive(Debug)]
pub struct StoreServer {
    address: SocketAddr,
    orders: Sender<Order>,
    wake: Arc<WakeFd>,
    thread: Mutex<Option<JoinHandle<Result<()>>>>,
    owner: u32,
}

impl StoreServer {
    /// Listens on `address`; port 0 takes a free one. Without `rendezvous` it is a store alone.
    pub fn start(address: SocketAddr, limits: Limits, rendezvous: Option<Settings>) -> Result<Self> {
        let listener = Listener::bind(address).map_err(|source| Error::os("listen on", address.to_string(), source))?;
        let address = listener.address();
        let wake = Arc::new(WakeFd::new().map_err(|source| Error::os("create", "an eventfd", source))?);
        let (orders, inbox) = channel();
        let worker = Worker::new(listener, limits, rendezvous, inbox, Arc::clone(&wake))?;
        let thread = threads::builder(THREAD).spawn(move || worker.run());
        let thread = thread.map_err(|source| Error::os("start", "the store's thread", source))?;
        Ok(Self { address, orders, wake, thread: Mutex::new(Some(thread)), owner: std::process::id() })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Closes the port and all connections. Agents that are still there, and are about to go, have `patience` for that.
    ///
    /// Fails, once, if the thread had ended before by an error.
    pub fn close(&self, patience: Duration) -> Result<()> {
        self.check_owner()?;
        self.tell(move |worker| worker.begin_to_close(patience));
        match self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(thread) => thread.join().unwrap_or_else(|panic| Err(Error::panicked(THREAD, &*panic))),
            None => Ok(()),
        }
    }

    fn tell(&self, order: impl FnOnce(&mut Worker) + Send + 'static) {
        // It fails where the thread has ended.
        let _ = self.orders.send(Box::new(order));
        self.wake.wake();
    }

    fn check_owner(&self) -> Result<()> {
        let here = std::process::id();
        if here == self.owner { Ok(()) } else { Err(Error::Forked { owner: self.owner, here }) }
    }
}

impl Drop for StoreServer {
    fn drop(&mut self) {
        let _ = self.close(Duration::ZERO);
    }
}

/// Everything the store's thread owns.
pub(super) struct Worker {
    pub(super) listener: Option<Listener>,
    /// Until when it does not listen.
    pub(super) listen_at: Option<Instant>,
    pub(super) limits: Limits,
    inbox: Receiver<Order>,
    wake: Arc<WakeFd>,
    pub(super) poller: Poller,
    timer: Timer,
    pub(super) state: State,
    pub(super) agents: Option<Agents>,
    /// When it ends, whoever is still there.
    pub(super) close_at: Option<Instant>,
    pub(super) connections: HashMap<Peer, Connection>,
    pub(super) last_peer: Peer,
    replies: Vec<Reply>,
    /// Those with something to send.
    pub(super) to_flush: Vec<Peer>,
    chunk: Vec<u8>,
    /// Holds a descriptor for when there is none.
    pub(super) spare: Option<WakeFd>,
}

impl Worker {
    fn new(
        listener: Listener,
        limits: Limits,
        rendezvous: Option<Settings>,
        inbox: Receiver<Order>,
        wake: Arc<WakeFd>,
    ) -> Result<Self> {
        let timer = Timer::new().map_err(|source| Error::os("create", "a timerfd", source))?;
        let poller = Poller::new().map_err(|source| Error::os("create", "an epoll instance", source))?;
        let watched = poller
            .add(&*wake, WAKE, Interest::Readable)
            .and_then(|()| poller.add(&listener, LISTENER, Interest::Readable))
            .and_then(|()| poller.add(&timer, TIMER, Interest::Readable));
        watched.map_err(|source| Error::os("watch", "the store's own descriptors", source))?;
        Ok(Self {
            listener: Some(listener),
            listen_at: None,
            inbox,
            wake,
            poller,
            timer,
            state: State::new(&limits),
            limits,
            agents: rendezvous.map(Agents::new),
            close_at: None,
            connections: HashMap::new(),
            last_peer: FIRST_PEER,
            replies: Vec::new(),
            to_flush: Vec::new(),
            chunk: vec![0; CHUNK],
            spare: WakeFd::new().ok(),
        })
    }

    /// Runs until closed. After a panic the agents are told, and all connections end.
    fn run(mut self) -> Result<()> {
        // Signals are for the interpreter's main thread.
        sigmask::block_all().forever();
        let outcome = catch_unwind(AssertUnwindSafe(|| self.work()));
        let outcome = outcome.unwrap_or_else(|panic| Err(Error::panicked(THREAD, &*panic)));
        if let Err(error) = &outcome {
            let text = format!("the agent that hosts the rendezvous has failed: {error}");
            // Whatever the panic has left in disorder: there is no more to it than that nobody is told.
            let _ = catch_unwind(AssertUnwindSafe(|| self.say_farewell(&text)));
        }
        outcome
    }

    fn work(&mut self) -> Result<()> {
        let mut ready = Vec::new();
        let poll_failed = |source| Error::os("wait for", "events", source);
        loop {
            self.poller.wait(true, &mut ready).map_err(poll_failed)?;
            // What somebody has said counts before what the clock says of those who are silent.
            let is_due = ready.contains(&TIMER);
            if is_due {
                self.poller.wait(false, &mut ready).map_err(poll_failed)?;
            }
            for token in ready.drain(..) {
                match token {
                    WAKE => self.obey(),
                    LISTENER => self.accept(),
                    TIMER => {}
                    peer => self.serve(peer),
                }
            }
            if is_due {
                self.look_at_clock();
            }
            if self.close_at.is_some_and(|at| !self.has_agents() || Instant::now() >= at) {
                return Ok(());
            }
        }
    }

    fn obey(&mut self) {
        self.wake.drain();
        while let Ok(order) = self.inbox.try_recv() {
            order(self);
        }
    }

    /// Takes nobody in any more, and ends when the agents have gone, or in time.
    fn begin_to_close(&mut self, patience: Duration) {
        if let Some(listener) = self.listener.take() {
            // A forked process may hold a copy.
            let _ = self.poller.remove(&listener);
        }
        self.close_at = Some(after(patience));
        self.decide(Event::Tick);
        self.set_timer();
    }

    fn look_at_clock(&mut self) {
        self.timer.drain();
        let now = Instant::now();
        if self.listen_at.take_if(|at| now >= *at).is_some() {
            self.spare = self.spare.take().or_else(|| WakeFd::new().ok());
            self.listen(Interest::Readable);
        }
        self.end_visits(now);
        self.decide(Event::Tick);
        self.set_timer();
    }

    pub(super) fn set_timer(&mut self) {
        let agents = self.agents.as_ref().and_then(Agents::next_tick);
        let next = [agents, self.close_at, self.listen_at].into_iter().flatten().min();
        // It fails for a descriptor that is none.
        let _ = self.timer.set(next);
    }

    /// Begins anew: without a key, and without those who knew the former ones.
    pub(super) fn renew(&mut self) {
        self.connections.retain(|_, connection| {
            if !connection.is_agent() {
                // A forked process may hold a copy of the socket, for which it would go on to be reported.
                let _ = self.poller.remove(&connection.stream);
            }
            connection.is_agent()
        });
        self.state = State::new(&self.limits);
    }

    /// A connection has bytes, or room for some.
    fn serve(&mut self, peer: Peer) {
        let Some(connection) = self.connections.get_mut(&peer) else { return };
        if connection.interest == Interest::Readable {
            match connection.stream.read(&mut self.chunk) {
                Ok(0) => return self.end(peer),
                Ok(read) => {
                    connection.silent_since = None;
                    match &mut connection.protocol {
                        Protocol::Store(decoder) => decoder.feed(&self.chunk[..read]),
                        Protocol::Agent(talk) => {
                            talk.feed(&self.chunk[..read]);
                            return self.listen_to(peer);
                        }
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => return self.end(peer),
            }
        } else {
            self.to_flush.push(peer);
            self.flush();
        }
        self.understand(peer);
    }

    /// Serves the requests of a connection that are complete, for as long as it takes the replies.
    fn understand(&mut self, peer: Peer) {
        let mut replied = 0;
        while let Some(connection) = self.connections.get_mut(&peer)
            && connection.unsent() < MOST_UNSENT
        {
            if replied > REPLIED_PER_TURN {
                return self.postpone(peer);
            }
            let Protocol::Store(decoder) = &mut connection.protocol else { break };
            let served = match decoder.next() {
                Ok(Some(Request::Upgrade)) => {
                    let rest = decoder.take_rest();
                    return self.upgrade(peer, rest);
                }
                Ok(Some(request)) => {
                    // To look at it may have begun a new round, whose empty store is not for those who knew the former one.
                    let is_for_us = self.admit(peer, &request) && self.connections.contains_key(&peer);
                    !is_for_us || self.state.apply(peer, request, &mut self.replies).is_ok()
                }
                Ok(None) => break,
                Err(_) => false,
            };
            for Reply { peer, bytes } in self.replies.drain(..) {
                if let Some(connection) = self.connections.get_mut(&peer) {
                    replied += bytes.len();
                    connection.reply(bytes);
                    self.to_flush.push(peer);
                }
            }
            if !served {
                self.flush();
                return self.end(peer);
            }
            if self.connections.get(&peer).is_some_and(|connection| connection.unsent() >= MOST_UNSENT) {
                self.flush();
            }
        }
        self.flush();
    }

    /// Goes on with a connection when the poller says that there is room for more, in turn with the others.
    fn postpone(&mut self, peer: Peer) {
        self.flush();
        if let Some(connection) = self.connections.get_mut(&peer)
            && connection.interest == Interest::Readable
        {
            connection.interest = Interest::Writable;
            if self.poller.modify(&connection.stream, peer, Interest::Writable).is_err() {
                self.end(peer);
            }
        }
    }

    pub(super) fn flush(&mut self) {
        while let Some(peer) = self.to_flush.pop() {
            let Some(connection) = self.connections.get_mut(&peer) else { continue };
            let mut is_broken = connection.send().is_err();
            let interest = if connection.unsent() > 0 { Interest::Writable } else { Interest::Readable };
            if interest != connection.interest {
                is_broken |= self.poller.modify(&connection.stream, peer, interest).is_err();
                connection.interest = interest;
            }
            if is_broken {
                self.end(peer);
            }
        }
    }

    pub(super) fn end(&mut self, peer: Peer) {
        self.state.forget(peer);
        if let Some(connection) = self.connections.remove(&peer) {
            let _ = self.poller.remove(&connection.stream);
            if connection.is_agent() {
                self.decide(Event::Lost(peer, "its connection was closed".into()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpStream;

    use super::*;
    use crate::rendezvous::Client;
    use crate::rendezvous::member::{self, Call, Standing};
    use crate::rendezvous::message::Introduction;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn start(rendezvous: Option<Settings>) -> StoreServer {
        StoreServer::start("127.0.0.1:0".parse().expect("an address"), Limits::default(), rendezvous).expect("start")
    }

    #[test]
    fn a_panic_ends_all_connections_and_is_told_to_the_owner() {
        let server = start(None);
        let mut client = TcpStream::connect(server.address()).expect("connect");
        client.set_read_timeout(Some(PATIENCE)).expect("set");
        server.tell(|_| panic!("on purpose"));
        assert_eq!(client.read(&mut [0]).unwrap_or(0), 0, "the end, or a reset");
        let error = server.close(Duration::ZERO).expect_err("it has failed");
        assert_eq!(error.to_string(), "the thread ferro-store panicked: on purpose");
        server.close(Duration::ZERO).expect("it was told");
        assert!(TcpStream::connect(server.address()).is_err(), "nobody listens any more");
    }

    #[test]
    fn a_panic_is_told_to_all_agents() {
        let server = start(Some(Settings {
            run_id: "job".into(),
            min_nodes: 1,
            max_nodes: 1,
            last_call: Duration::ZERO,
            silence: PATIENCE,
            address: None,
            most_membership_changes: None,
        }));
        let port = server.address().port();
        let who = Introduction { is_host: true, ..Introduction::new("job".into(), "a".into(), (1, 1)) };
        let settings =
            member::Settings { endpoint: format!("127.0.0.1:{port}"), connect_timeout: PATIENCE, is_host: true };
        let agent = Client::start("127.0.0.1", port, who, settings).expect("client");
        agent.call(Call::Join { role: "default".into(), local_world_size: 1, timeout: PATIENCE }).expect("call");
        let stands = |is_wanted: fn(&Standing) -> bool| {
            let deadline = Instant::now() + PATIENCE;
            loop {
                let generation = agent.generation().expect("generation");
                let standing = agent.standing().expect("standing");
                if is_wanted(&standing) {
                    return standing;
                }
                assert!(Instant::now() < deadline, "it stays {standing:?}");
                agent.wait(generation, Some(PATIENCE), [None; 2]).expect("wait");
            }
        };
        stands(|standing| matches!(standing, Standing::Placed(_)));
        server.tell(|_| panic!("on purpose"));
        let standing = stands(|standing| !matches!(standing, Standing::Placed(_)));
        let Standing::Closed { text, code: 1 } = standing else { panic!("it is {standing:?}") };
        assert_eq!(text, "the agent that hosts the rendezvous has failed: the thread ferro-store panicked: on purpose");
    }
}
