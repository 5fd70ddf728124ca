//! The thread of the node that hosts a job: it accepts connections, applies requests to the store and sends replies.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::agents::Agents;
use super::connection::{Connection, Protocol};
use crate::error::{Error, Result};
use crate::rendezvous::rounds::{HostEvent, HostSettings};
use crate::store::state::{Peer, StoreReply, StoreState};
use crate::store::wire::{Limits, StoreRequest};
use crate::sys::clock::after;
use crate::sys::net::Listener;
use crate::sys::poller::{Interest, Poller};
use crate::sys::timer::Timer;
use crate::sys::wake::WakeFd;
use crate::thread::{CloseOutcome, Inbox, NativeThread, Service, ThreadOrder};

const WAKE: u64 = 0;
pub(super) const LISTENER: u64 = 1;
const TIMER: u64 = 2;
const FIRST_PEER: Peer = 3;

/// Number of bytes read from a connection before the others are served.
const CHUNK: usize = 64 * 1024;

/// A connection with this many unsent bytes is not read from until the peer reads.
const MAX_UNSENT: usize = 1 << 20;

/// Number of reply bytes for a connection before the others are served.
const REPLIED_PER_TURN: usize = 4 << 20;

/// An order to the thread.
#[derive(Debug)]
pub(super) enum HostOrder {
    /// Stop listening, and end once the agents have gone, or after this time.
    Close { timeout: Duration },
    #[cfg(test)]
    Panic,
}

impl ThreadOrder for HostOrder {
    fn close() -> Self {
        Self::Close { timeout: Duration::ZERO }
    }
}

/// The server of a key-value store for clients of torch's `TCPStore`, and of a rendezvous at the same port. Dropping it ends both.
#[derive(Debug)]
pub struct StoreServer {
    address: SocketAddr,
    thread: NativeThread<HostOrder>,
}

impl StoreServer {
    /// Listens on `address`; port 0 selects a free port. Without `rendezvous` it serves only the store.
    pub fn start(address: SocketAddr, limits: Limits, rendezvous: Option<HostSettings>) -> Result<Self> {
        let listener = Listener::bind(address).map_err(|source| Error::os("listen on", address.to_string(), source))?;
        let address = listener.address();
        let thread = NativeThread::start("ferro-store", |inbox| HostThread::new(listener, limits, rendezvous, inbox))?;
        Ok(Self { address, thread })
    }

    /// The address of the listener.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Closes the port and all connections. Agents that are about to leave have until `timeout` to do so.
    ///
    /// Returns the error with which the thread ended earlier, but only once.
    pub fn close(&self, timeout: Duration) -> Result<()> {
        match self.thread.close(HostOrder::Close { timeout }, None)? {
            CloseOutcome::Ended(outcome) => outcome,
            CloseOutcome::TimedOut => Ok(()),
        }
    }
}

/// The state of the thread.
pub(super) struct HostThread {
    pub(super) listener: Option<Listener>,
    /// No connection is accepted before this time.
    pub(super) resume_at: Option<Instant>,
    pub(super) limits: Limits,
    inbox: Inbox<HostOrder>,
    pub(super) poller: Poller,
    timer: Timer,
    pub(super) state: StoreState,
    pub(super) agents: Option<Agents>,
    /// The thread ends at this time, even if agents are still connected.
    pub(super) close_at: Option<Instant>,
    pub(super) connections: HashMap<Peer, Connection>,
    pub(super) last_peer: Peer,
    replies: Vec<StoreReply>,
    /// Connections with unsent replies.
    pub(super) to_flush: Vec<Peer>,
    chunk: Vec<u8>,
    /// A reserve descriptor, for when the process has no other left.
    pub(super) spare: Option<WakeFd>,
}

impl Service for HostThread {
    type Order = HostOrder;

    fn serve(&mut self) -> Result<()> {
        let mut ready = Vec::new();
        let poll_failed = |source| Error::os("wait for", "events", source);
        loop {
            self.poller.wait(true, &mut ready).map_err(poll_failed)?;
            // Handle received messages before deadlines that have passed meanwhile.
            let is_due = ready.contains(&TIMER);
            if is_due {
                self.poller.wait(false, &mut ready).map_err(poll_failed)?;
            }
            for token in ready.drain(..) {
                match token {
                    WAKE => self.take_orders(),
                    LISTENER => self.accept(),
                    TIMER => {}
                    peer => self.serve_connection(peer),
                }
            }
            if is_due {
                self.handle_deadlines();
            }
            if self.close_at.is_some_and(|at| !self.has_agents() || Instant::now() >= at) {
                return Ok(());
            }
        }
    }

    fn finish(&mut self, outcome: &Result<()>) {
        if let Err(error) = outcome {
            self.announce_end(&format!("the agent that hosts the rendezvous has failed: {error}"));
        }
    }
}

impl HostThread {
    fn new(
        listener: Listener,
        limits: Limits,
        rendezvous: Option<HostSettings>,
        inbox: Inbox<HostOrder>,
    ) -> Result<Self> {
        let timer = Timer::new().map_err(|source| Error::os("create", "a timerfd", source))?;
        let poller = Poller::new().map_err(|source| Error::os("create", "an epoll instance", source))?;
        let watched = poller
            .add(inbox.wake(), WAKE, Interest::Readable)
            .and_then(|()| poller.add(&listener, LISTENER, Interest::Readable))
            .and_then(|()| poller.add(&timer, TIMER, Interest::Readable));
        watched.map_err(|source| Error::os("watch", "the descriptors of the store's thread", source))?;
        Ok(Self {
            listener: Some(listener),
            resume_at: None,
            inbox,
            poller,
            timer,
            state: StoreState::new(&limits),
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

    fn take_orders(&mut self) {
        self.inbox.wake().drain();
        while let Some(order) = self.inbox.next() {
            match order {
                HostOrder::Close { timeout } => self.begin_close(timeout),
                #[cfg(test)]
                HostOrder::Panic => panic!("on purpose"),
            }
        }
    }

    /// Stops listening. The thread ends when the agents have gone, or after `timeout`.
    fn begin_close(&mut self, timeout: Duration) {
        if let Some(listener) = self.listener.take() {
            // A forked process may hold a copy of the listener, for which the poller would still report connections.
            let _ = self.poller.remove(&listener);
        }
        self.close_at = Some(after(timeout));
        self.decide(HostEvent::Tick);
        self.set_timer();
    }

    fn handle_deadlines(&mut self) {
        self.timer.drain();
        let now = Instant::now();
        if self.resume_at.take_if(|at| now >= *at).is_some() {
            self.spare = self.spare.take().or_else(|| WakeFd::new().ok());
            self.watch_listener(Interest::Readable);
        }
        self.close_unintroduced(now);
        self.decide(HostEvent::Tick);
        self.set_timer();
    }

    pub(super) fn set_timer(&mut self) {
        let agents = self.agents.as_ref().and_then(Agents::next_tick);
        let next = [agents, self.close_at, self.resume_at].into_iter().flatten().min();
        // Cannot fail: the descriptor is valid.
        let _ = self.timer.set(next);
    }

    /// Empties the store for a new round and closes the connections of the old round's workers.
    pub(super) fn renew_store(&mut self) {
        self.connections.retain(|_, connection| {
            if !connection.is_agent() {
                // A forked process may hold a copy of the socket, which the poller would still report.
                let _ = self.poller.remove(&connection.stream);
            }
            connection.is_agent()
        });
        self.state = StoreState::new(&self.limits);
    }

    /// Reads from a ready connection, or writes to it.
    fn serve_connection(&mut self, peer: Peer) {
        let Some(connection) = self.connections.get_mut(&peer) else { return };
        if connection.interest == Interest::Readable {
            match connection.stream.read(&mut self.chunk) {
                Ok(0) => return self.disconnect(peer),
                Ok(read) => {
                    connection.silent_since = None;
                    match &mut connection.protocol {
                        Protocol::Store(decoder) => decoder.feed(&self.chunk[..read]),
                        Protocol::Agent(frames) => {
                            frames.feed(&self.chunk[..read]);
                            return self.take_messages(peer);
                        }
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => return self.disconnect(peer),
            }
        } else {
            self.to_flush.push(peer);
            self.flush();
        }
        self.serve_requests(peer);
    }

    /// Serves the complete requests of a connection while the peer takes the replies.
    fn serve_requests(&mut self, peer: Peer) {
        let mut replied = 0;
        while let Some(connection) = self.connections.get_mut(&peer)
            && connection.unsent() < MAX_UNSENT
        {
            if replied > REPLIED_PER_TURN {
                return self.postpone(peer);
            }
            let Protocol::Store(decoder) = &mut connection.protocol else { break };
            let served = match decoder.next() {
                Ok(Some(StoreRequest::Upgrade)) => {
                    let rest = decoder.take_rest();
                    return self.upgrade(peer, rest);
                }
                Ok(Some(request)) => {
                    // `admit` may have begun a new round. Connections of the old round must not write to the new store.
                    let is_for_us = self.admit(peer, &request) && self.connections.contains_key(&peer);
                    !is_for_us || self.state.apply(peer, request, &mut self.replies).is_ok()
                }
                Ok(None) => break,
                Err(_) => false,
            };
            for StoreReply { peer, bytes } in self.replies.drain(..) {
                if let Some(connection) = self.connections.get_mut(&peer) {
                    replied += bytes.len();
                    connection.reply(bytes);
                    self.to_flush.push(peer);
                }
            }
            if !served {
                self.flush();
                return self.disconnect(peer);
            }
            if self.connections.get(&peer).is_some_and(|connection| connection.unsent() >= MAX_UNSENT) {
                self.flush();
            }
        }
        self.flush();
    }

    /// Stops serving a connection in this turn. It continues when the connection is writable.
    fn postpone(&mut self, peer: Peer) {
        self.flush();
        if let Some(connection) = self.connections.get_mut(&peer)
            && connection.interest == Interest::Readable
        {
            connection.interest = Interest::Writable;
            if self.poller.modify(&connection.stream, peer, Interest::Writable).is_err() {
                self.disconnect(peer);
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
                self.disconnect(peer);
            }
        }
    }

    pub(super) fn disconnect(&mut self, peer: Peer) {
        self.state.forget(peer);
        if let Some(connection) = self.connections.remove(&peer) {
            let _ = self.poller.remove(&connection.stream);
            if connection.is_agent() {
                self.decide(HostEvent::Lost(peer, "its connection was closed".into()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpStream;

    use super::*;
    use crate::membership::RendezvousClient;
    use crate::rendezvous::member::{self, Call, MembershipState};
    use crate::rendezvous::message::Introduction;

    const TIMEOUT: Duration = Duration::from_secs(20);

    fn start(rendezvous: Option<HostSettings>) -> StoreServer {
        StoreServer::start("127.0.0.1:0".parse().expect("an address"), Limits::default(), rendezvous).expect("start")
    }

    #[test]
    fn a_panic_closes_all_connections_and_is_an_error_of_close() {
        let server = start(None);
        let mut client = TcpStream::connect(server.address()).expect("connect");
        client.set_read_timeout(Some(TIMEOUT)).expect("set");
        server.thread.send(HostOrder::Panic).expect("it runs");
        assert_eq!(client.read(&mut [0]).unwrap_or(0), 0, "expected the end of the stream or a reset");
        let error = server.close(Duration::ZERO).expect_err("it has failed");
        assert_eq!(error.to_string(), "the thread ferro-store panicked: on purpose");
        server.close(Duration::ZERO).expect("the error is returned once");
        assert!(TcpStream::connect(server.address()).is_err(), "the port is still open");
    }

    #[test]
    fn a_panic_is_reported_to_all_agents() {
        let server = start(Some(HostSettings {
            run_id: "job".into(),
            min_nodes: 1,
            max_nodes: 1,
            last_call: Duration::ZERO,
            silence: TIMEOUT,
            address: None,
            max_membership_changes: None,
        }));
        let port = server.address().port();
        let introduction = Introduction { is_host: true, ..Introduction::new("job".into(), "a".into(), (1, 1)) };
        let settings =
            member::MemberSettings { endpoint: format!("127.0.0.1:{port}"), connect_timeout: TIMEOUT, is_host: true };
        let agent = RendezvousClient::start("127.0.0.1", port, introduction, settings).expect("client");
        agent.call(Call::Join { role: "default".into(), local_world_size: 1, timeout: TIMEOUT }).expect("call");
        let wait_for = |is_wanted: fn(&MembershipState) -> bool| {
            let deadline = Instant::now() + TIMEOUT;
            loop {
                let generation = agent.generation().expect("generation");
                let state = agent.state().expect("state");
                if is_wanted(&state) {
                    return state;
                }
                assert!(Instant::now() < deadline, "the state stays {state:?}");
                agent.wait(generation, Some(TIMEOUT), [None; 2]).expect("wait");
            }
        };
        wait_for(|state| matches!(state, MembershipState::Placed(_)));
        server.thread.send(HostOrder::Panic).expect("it runs");
        let state = wait_for(|state| !matches!(state, MembershipState::Placed(_)));
        let MembershipState::Closed { text, code: 1, .. } = state else { panic!("the state is {state:?}") };
        assert_eq!(text, "the agent that hosts the rendezvous has failed: the thread ferro-store panicked: on purpose");
    }
}
