//! The store's thread: connections in, requests to the state, replies out.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::agents::Agents;
use super::connection::{Connection, Protocol};
pub use super::state::Peer;
use super::state::{Reply, State};
use super::wire::{Decoder, Limits, Request};
use crate::error::{Error, Result};
use crate::rendezvous::rounds::{Event, Settings};
use crate::sys::net::Listener;
use crate::sys::poller::{Interest, Poller};
use crate::sys::sigmask;
use crate::sys::timer::after;
use crate::sys::wake::WakeFd;

const WAKE: u64 = 0;
const LISTENER: u64 = 1;
const TIMER: u64 = 2;
const FIRST_PEER: Peer = 3;

/// What is read of a connection, and how many connections are accepted, before the others have their turn.
const CHUNK: usize = 64 * 1024;
const ACCEPTED_PER_TURN: usize = 256;

/// A connection whose replies are not taken is not read from beyond this.
const MOST_UNSENT: usize = 1 << 20;

/// What is said to a connection before the others have their turn.
const REPLIED_PER_TURN: usize = 4 << 20;

/// A store that clients of `TCPStore` can use, and a rendezvous at the same port, on a thread of their own. Ends when it is dropped.
#[derive(Debug)]
pub struct StoreServer {
    address: SocketAddr,
    /// Says how long agents that are still there have to go.
    closing: Sender<Duration>,
    wake: Arc<WakeFd>,
    thread: Mutex<Option<JoinHandle<()>>>,
    owner: u32,
}

impl StoreServer {
    /// Listens on `address`; port 0 takes a free one. Without `rendezvous` it is a store alone.
    pub fn start(address: SocketAddr, limits: Limits, rendezvous: Option<Settings>) -> Result<Self> {
        let listener = Listener::bind(address).map_err(|source| Error::os("listen on", address.to_string(), source))?;
        let address = listener.address();
        let wake = Arc::new(WakeFd::new().map_err(|source| Error::os("create", "an eventfd", source))?);
        let (closing, inbox) = channel();
        let worker = Worker::new(listener, limits, rendezvous, inbox, Arc::clone(&wake))?;
        let thread = std::thread::Builder::new().name("ferro-store".into()).spawn(move || worker.run());
        let thread = thread.map_err(|source| Error::os("start", "the store's thread", source))?;
        Ok(Self { address, closing, wake, thread: Mutex::new(Some(thread)), owner: std::process::id() })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Closes the port and all connections. Agents that are still there, and are about to go, have `patience` for that.
    pub fn close(&self, patience: Duration) -> Result<()> {
        self.check_owner()?;
        let _ = self.closing.send(patience);
        self.wake.wake();
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = thread.join();
        }
        Ok(())
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
    listener: Option<Listener>,
    limits: Limits,
    inbox: Receiver<Duration>,
    wake: Arc<WakeFd>,
    poller: Poller,
    pub(super) state: State,
    pub(super) agents: Option<Agents>,
    /// When it ends, whoever is still there.
    pub(super) close_at: Option<Instant>,
    pub(super) connections: HashMap<Peer, Connection>,
    last_peer: Peer,
    replies: Vec<Reply>,
    /// Those with something to send.
    pub(super) to_flush: Vec<Peer>,
    chunk: Vec<u8>,
    /// Holds a descriptor for when there is none.
    spare: Option<WakeFd>,
}

impl Worker {
    fn new(
        listener: Listener,
        limits: Limits,
        rendezvous: Option<Settings>,
        inbox: Receiver<Duration>,
        wake: Arc<WakeFd>,
    ) -> Result<Self> {
        let agents = rendezvous.map(Agents::new).transpose();
        let agents = agents.map_err(|source| Error::os("create", "a timer", source))?;
        let poller = Poller::new().map_err(|source| Error::os("create", "an epoll instance", source))?;
        let watched = poller
            .add(&*wake, WAKE, Interest::Readable)
            .and_then(|()| poller.add(&listener, LISTENER, Interest::Readable))
            .and_then(|()| agents.iter().try_for_each(|agents| poller.add(&agents.timer, TIMER, Interest::Readable)));
        watched.map_err(|source| Error::os("watch", "the store's own descriptors", source))?;
        Ok(Self {
            listener: Some(listener),
            limits,
            inbox,
            wake,
            poller,
            state: State::new(&limits),
            agents,
            close_at: None,
            connections: HashMap::new(),
            last_peer: FIRST_PEER,
            replies: Vec::new(),
            to_flush: Vec::new(),
            chunk: vec![0; CHUNK],
            spare: WakeFd::new().ok(),
        })
    }

    fn run(mut self) {
        // Signals are for the interpreter's main thread.
        sigmask::block_all().forever();
        let mut ready = Vec::new();
        while self.poller.wait(true, &mut ready).is_ok() {
            if ready.contains(&TIMER) && self.poller.wait(false, &mut ready).is_err() {
                return;
            }
            // What somebody has said counts before what the clock says of those who are silent.
            let is_due = ready.contains(&TIMER);
            for token in ready.drain(..) {
                match token {
                    WAKE => self.begin_to_close(),
                    LISTENER => self.accept(),
                    TIMER => {}
                    peer => self.serve(peer),
                }
            }
            if is_due {
                if let Some(agents) = &mut self.agents {
                    agents.timer.drain();
                }
                self.decide(Event::Tick);
            }
            if self.close_at.is_some_and(|at| !self.has_agents() || Instant::now() >= at) {
                return;
            }
        }
    }

    /// Takes nobody in any more, and ends when the agents have gone, or in time.
    fn begin_to_close(&mut self) {
        self.wake.drain();
        while let Ok(patience) = self.inbox.try_recv() {
            if let Some(listener) = self.listener.take() {
                // A forked process may hold a copy.
                let _ = self.poller.remove(&listener);
            }
            self.close_at = Some(after(patience));
            self.decide(Event::Tick);
        }
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

    fn accept(&mut self) {
        for _ in 0..ACCEPTED_PER_TURN {
            let Some(listener) = &self.listener else { return };
            let stream = match listener.accept() {
                Ok(stream) => stream,
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                    self.turn_away();
                    return;
                }
                Err(_) => return,
            };
            self.last_peer += 1;
            let peer = self.last_peer;
            let _ = stream.set_nodelay();
            if self.poller.add(&stream, peer, Interest::Readable).is_ok() {
                self.connections.insert(peer, Connection::new(stream, Decoder::new(self.limits)));
            }
        }
    }

    /// No descriptor is to be had: the next connection is accepted on the spare one and dropped. Its client tries again later; left
    /// where it is, it would be reported for ever.
    fn turn_away(&mut self) {
        if self.spare.take().is_some() {
            drop(self.listener.as_ref().map(Listener::accept));
        }
        self.spare = WakeFd::new().ok();
    }

    /// A connection has bytes, or room for some.
    fn serve(&mut self, peer: Peer) {
        let Some(connection) = self.connections.get_mut(&peer) else { return };
        if connection.interest == Interest::Readable {
            match connection.stream.read(&mut self.chunk) {
                Ok(0) => return self.end(peer),
                Ok(read) => match &mut connection.protocol {
                    Protocol::Store(decoder) => decoder.feed(&self.chunk[..read]),
                    Protocol::Agent(input) => {
                        input.extend_from_slice(&self.chunk[..read]);
                        return self.listen_to(peer);
                    }
                },
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
