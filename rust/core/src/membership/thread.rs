//! The thread of a membership: connected to the host, it carries out the decisions of [`crate::rendezvous::member`].

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use super::view::Shared;
use crate::error::{Error, Result};
use crate::rendezvous::member::{Call, Member, MemberAction, MemberEvent, MemberSettings, MembershipState};
use crate::rendezvous::message::{self, AgentMessage, HostMessage, Introduction};
use crate::store::wire::{MAGIC, UPGRADE, opcode};
use crate::sys::net::{Stream, endpoint};
use crate::sys::poller::{Interest, Poller};
use crate::sys::resolve::resolve;
use crate::sys::timer::Timer;
use crate::thread::{Inbox, Service, ThreadOrder};

const WAKE: u64 = 0;
const TIMER: u64 = 1;
const STREAM: u64 = 2;

/// The payload of the first ping. Every `TCPStore` server echoes it.
const NONCE: [u8; 4] = *b"ferr";

/// If the host has several addresses, the time for each to accept a connection before the next one is tried.
const ADDRESS_TIMEOUT: Duration = Duration::from_secs(1);

/// A connection to the host.
#[derive(Debug)]
struct HostConnection {
    stream: Stream,
    is_connected: bool,
    has_echoed: bool,
    input: Vec<u8>,
    output: Vec<u8>,
    interest: Interest,
    /// The remaining addresses of the host; the last one is tried next.
    others: Vec<SocketAddr>,
    /// When the next address is tried instead, if there are several.
    attempt_deadline: Option<Instant>,
}

/// The state of the thread.
pub(super) struct MembershipThread {
    endpoint: (String, u16),
    introduction: Introduction,
    member: Member,
    inbox: Inbox<MembershipOrder>,
    shared: Arc<Shared>,
    poller: Poller,
    timer: Timer,
    link: Option<HostConnection>,
    /// The channel of the resolver's answers.
    resolver: (Sender<Addresses>, Receiver<Addresses>),
    /// An answer of the resolver is outstanding.
    is_resolving: bool,
    /// The last published state.
    published: MembershipState,
}

/// An answer of the resolver.
type Addresses = io::Result<Vec<SocketAddr>>;

impl Service for MembershipThread {
    type Order = MembershipOrder;

    fn serve(&mut self) -> Result<()> {
        let mut ready = Vec::new();
        let poll_failed = |source| Error::os("wait for", "events", source);
        loop {
            self.poller.wait(true, &mut ready).map_err(poll_failed)?;
            if ready.contains(&TIMER) {
                // Handle received messages before a deadline that has passed meanwhile.
                self.poller.wait(false, &mut ready).map_err(poll_failed)?;
            }
            let is_due = ready.contains(&TIMER);
            // Both waits may have reported the same descriptor.
            ready.sort_unstable();
            ready.dedup();
            for token in ready.drain(..) {
                match token {
                    WAKE if !self.take_orders() => return Ok(()),
                    WAKE => self.take_addresses(),
                    STREAM => self.serve_connection(),
                    _ => {}
                }
            }
            if is_due {
                self.timer.drain();
                if self.link.as_ref().and_then(|link| link.attempt_deadline).is_some_and(|end| Instant::now() >= end) {
                    self.try_other_addresses(ErrorKind::TimedOut.into());
                }
                self.step(MemberEvent::Tick);
            }
        }
    }

    fn finish(&mut self, outcome: &Result<()>) {
        self.shared.lease.set(None, None);
        self.shared.publish(|view| {
            view.is_closed = true;
            view.failure = outcome.as_ref().err().map(ToString::to_string);
        });
    }
}

/// An order to the thread.
#[derive(Debug)]
pub(super) enum MembershipOrder {
    /// Carry out a call of the agent.
    Call(Call),
    /// End.
    Close,
}

impl ThreadOrder for MembershipOrder {
    fn close() -> Self {
        Self::Close
    }
}

impl MembershipThread {
    pub(super) fn new(
        endpoint: (String, u16),
        introduction: Introduction,
        settings: MemberSettings,
        inbox: Inbox<MembershipOrder>,
        shared: Arc<Shared>,
    ) -> Result<Self> {
        let failed = |source| Error::os("create", "the poller of a rendezvous", source);
        let poller = Poller::new().map_err(failed)?;
        let timer = Timer::new().map_err(failed)?;
        poller.add(inbox.wake(), WAKE, Interest::Readable).map_err(failed)?;
        poller.add(&timer, TIMER, Interest::Readable).map_err(failed)?;
        let member = Member::new(settings, Instant::now());
        let (link, resolver, is_resolving) = (None, channel(), false);
        let published = MembershipState::Idle;
        Ok(Self {
            endpoint,
            introduction,
            member,
            inbox,
            shared,
            poller,
            timer,
            link,
            resolver,
            is_resolving,
            published,
        })
    }

    /// Carries out the orders; `false` if one of them ends the thread.
    fn take_orders(&mut self) -> bool {
        self.inbox.wake().drain();
        while let Some(order) = self.inbox.next() {
            match order {
                MembershipOrder::Call(call) => {
                    let is_join = matches!(call, Call::Join { .. });
                    self.step(MemberEvent::Call(call));
                    if is_join {
                        self.shared.view.publish(|view| view.pending_joins -= 1);
                    }
                }
                MembershipOrder::Close => return false,
            }
        }
        true
    }

    fn step(&mut self, event: MemberEvent) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            for action in self.member.step(Instant::now(), event) {
                match action {
                    MemberAction::Connect => events.extend(self.connect()),
                    MemberAction::Send(request) => {
                        if let Some(link) = &mut self.link {
                            message::encode(&request, &mut link.output);
                        }
                    }
                    MemberAction::Disconnect => {
                        // Messages from before the disconnect are still sent.
                        self.flush();
                        self.drop_connection();
                    }
                    MemberAction::Warning(text) => self.shared.publish(|view| view.warnings.push(text)),
                }
            }
            events.extend(self.flush());
        }
        self.set_timer();
        self.publish_state();
    }

    /// Publishes the state of the membership if it has changed.
    fn publish_state(&mut self) {
        let lease = self.member.lease();
        let may_lapse = self.member.has_running_workers() || self.member.has_lapsed();
        let stop_at = lease.filter(|_| may_lapse).map(|lease| lease.stop_at);
        self.shared.lease.set(stop_at, lease.map(|lease| lease.kill_at));
        let state = self.member.state();
        if *state == self.published {
            return;
        }
        self.published = state.clone();
        self.shared.publish(|view| view.state = state.clone());
    }

    // ---- connecting

    /// Starts to connect. Returns an event if that fails at once.
    fn connect(&mut self) -> Option<MemberEvent> {
        if self.is_resolving {
            return None; // a lookup is under way
        }
        let (host, port) = &self.endpoint;
        let (answer, wake) = (self.resolver.0.clone(), self.inbox.remote());
        let done = move |addresses| {
            // Fails if the thread has ended.
            let _ = answer.send(addresses);
            wake.wake();
        };
        self.is_resolving = true;
        if let Err(error) = resolve(host, *port, done) {
            self.is_resolving = false;
            return Some(MemberEvent::NotConnected { text: error.to_string(), is_refused: false });
        }
        None
    }

    /// Connects to the addresses of the host once the resolver has found them.
    fn take_addresses(&mut self) {
        let Ok(addresses) = self.resolver.1.try_recv() else { return };
        self.is_resolving = false;
        let event = match addresses {
            _ if !self.member.is_connecting() => None,
            // Addresses are taken from the end.
            Ok(addresses) => self.try_next_address(addresses.into_iter().rev().collect(), None),
            Err(error) => {
                let text = format!("host name {:?} cannot be resolved: {error}", self.endpoint.0);
                Some(MemberEvent::NotConnected { text, is_refused: false })
            }
        };
        match event {
            Some(event) => self.step(event),
            None => self.set_timer(),
        }
    }

    fn try_next_address(
        &mut self,
        mut addresses: Vec<SocketAddr>,
        mut error: Option<io::Error>,
    ) -> Option<MemberEvent> {
        self.drop_connection();
        while let Some(address) = addresses.pop() {
            let stream = Stream::connect(address).and_then(|stream| {
                stream.set_nodelay()?;
                self.poller.add(&stream, STREAM, Interest::Writable)?;
                Ok(stream)
            });
            match stream {
                Ok(stream) => {
                    let interest = Interest::Writable;
                    let (input, output) = (Vec::new(), Vec::new());
                    let (is_connected, has_echoed) = (false, false);
                    let has_alternatives = error.is_some() || !addresses.is_empty();
                    let attempt_deadline = has_alternatives.then(|| Instant::now() + ADDRESS_TIMEOUT);
                    let others = addresses;
                    self.link = Some(HostConnection {
                        stream,
                        is_connected,
                        has_echoed,
                        input,
                        output,
                        interest,
                        others,
                        attempt_deadline,
                    });
                    return None;
                }
                Err(failed) => error = Some(failed),
            }
        }
        let error = error.unwrap_or_else(|| ErrorKind::AddrNotAvailable.into());
        let is_refused = error.kind() == ErrorKind::ConnectionRefused;
        Some(MemberEvent::NotConnected { text: error.to_string(), is_refused })
    }

    /// An attempt to connect to one address has failed: tries the next one.
    fn try_other_addresses(&mut self, error: io::Error) {
        let others = self.link.as_mut().map(|link| std::mem::take(&mut link.others)).unwrap_or_default();
        match self.try_next_address(others, Some(error)) {
            Some(event) => self.step(event),
            None => self.set_timer(),
        }
    }

    fn set_timer(&mut self) {
        let attempt_deadline = self.link.as_ref().and_then(|link| link.attempt_deadline);
        // Cannot fail: the descriptor is valid.
        let _ = self.timer.set(self.member.next_tick().into_iter().chain(attempt_deadline).min());
    }

    fn drop_connection(&mut self) {
        if let Some(link) = self.link.take() {
            let _ = self.poller.remove(&link.stream);
        }
    }

    /// Serves the connection after an event: it is established, readable or writable.
    fn serve_connection(&mut self) {
        let Some(link) = &mut self.link else { return };
        if !link.is_connected {
            match link.stream.connected() {
                Ok(true) => {}
                // The event belongs to an earlier connection.
                Ok(false) => return,
                Err(error) => return self.try_other_addresses(error),
            }
            link.is_connected = true;
            link.attempt_deadline = None;
            self.introduce();
            return self.step(MemberEvent::Connected);
        }
        let mut chunk = [0; 16 * 1024];
        match link.stream.read(&mut chunk) {
            Ok(0) => self.connection_lost("it was closed by the host"),
            Ok(read) => {
                link.input.extend_from_slice(&chunk[..read]);
                self.take_messages();
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if let Some(event) = self.flush() {
                    self.step(event);
                }
            }
            Err(error) => self.connection_lost(&error.to_string()),
        }
    }

    /// Sends the opening of a store client, the upgrade and the introduction of this agent.
    fn introduce(&mut self) {
        let Some(link) = &mut self.link else { return };
        let address = link.stream.local_address().ok().map(|address| address.ip().to_canonical());
        self.introduction.connection += 1;
        let mut introduction = self.introduction.clone();
        if introduction.name.is_empty() {
            introduction.name = address.map_or_else(String::new, |address| address.to_string());
        }
        self.shared.view.publish(|view| view.address = address);
        link.output.push(opcode::VALIDATE);
        link.output.extend_from_slice(&MAGIC.to_le_bytes());
        link.output.push(opcode::PING);
        link.output.extend_from_slice(&NONCE);
        link.output.push(UPGRADE);
        message::encode(&AgentMessage::Enter(introduction), &mut link.output);
    }

    fn take_messages(&mut self) {
        while let Some(link) = &mut self.link {
            if !link.has_echoed {
                let Some(echo) = link.input.first_chunk() else { return };
                if *echo != NONCE {
                    return self.refuse_host("is neither a TCPStore nor a ferrorun rendezvous");
                }
                link.input.drain(..NONCE.len());
                link.has_echoed = true;
            }
            match message::decode::<HostMessage>(&mut link.input) {
                Ok(Some(message)) => {
                    if let HostMessage::Welcome { silence } = &message {
                        // If this fails, heartbeats alone detect a broken network.
                        let _ = link.stream.set_peer_timeout(*silence);
                    }
                    self.step(MemberEvent::Received(message));
                }
                Ok(None) => return,
                Err(error) => return self.connection_lost(&format!("it sent an invalid message: {error}")),
            }
        }
    }

    /// Handles the end of the connection.
    fn connection_lost(&mut self, text: &str) {
        // A ferrorun host would have sent more than the echo. If one has welcomed this agent earlier, that host has gone.
        let has_only_echoed = self.link.as_ref().is_some_and(|link| link.has_echoed && link.input.is_empty());
        if has_only_echoed && !self.member.was_welcomed() {
            return self.refuse_host("is a TCPStore of torch, started by torchrun or by a script");
        }
        self.drop_connection();
        self.step(MemberEvent::Disconnected(text.to_owned()));
    }

    fn refuse_host(&mut self, description: &str) {
        self.drop_connection();
        let endpoint = endpoint(&self.endpoint.0, self.endpoint.1);
        let text =
            format!("the server at {endpoint} {description}: start all nodes with ferrorun, or choose another port");
        self.step(MemberEvent::ForeignServer(text));
    }

    /// Sends as much as the kernel takes.
    fn flush(&mut self) -> Option<MemberEvent> {
        let link = self.link.as_mut().filter(|link| link.is_connected)?;
        while !link.output.is_empty() {
            match link.stream.write(&link.output) {
                Ok(sent) => drop(link.output.drain(..sent)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => {
                    self.drop_connection();
                    return Some(MemberEvent::Disconnected(error.to_string()));
                }
            }
        }
        // While bytes are unsent, wait for the host to read them, and read nothing.
        let interest = if link.output.is_empty() { Interest::Readable } else { Interest::Writable };
        if interest != link.interest {
            link.interest = interest;
            if let Err(error) = self.poller.modify(&link.stream, STREAM, interest) {
                self.drop_connection();
                return Some(MemberEvent::Disconnected(error.to_string()));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use super::*;
    use crate::membership::view::MembershipView;
    use crate::published::Published;
    use crate::sys::lease::LeasePage;
    use crate::sys::wake::WakeFd;
    use crate::thread::order_channel;

    /// A listener that accepts no further connection, like a machine behind a broken route: connection attempts get no answer.
    fn unresponsive_listener() -> (TcpListener, Vec<TcpStream>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
        let address = listener.local_addr().expect("address");
        // Shortens the queue of the same listener.
        rustix::net::listen(&listener, 0).expect("listen");
        let mut queued = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(100)) {
            queued.push(stream);
        }
        (listener, queued)
    }

    #[test]
    fn the_next_address_is_tried_if_one_does_not_answer() {
        let (dead, _queued) = unresponsive_listener();
        let live = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
        let [dead, there] = [&dead, &live].map(|listener| listener.local_addr().expect("address"));
        let introduction = Introduction::new("job".into(), "node".into(), (1, 1));
        let connect_timeout = Duration::from_secs(60);
        let settings = MemberSettings { endpoint: "host".into(), connect_timeout, is_host: false };
        let alarm = WakeFd::new().expect("alarm");
        let lease = Arc::new(LeasePage::create().expect("page"));
        let endpoint = settings.endpoint.clone();
        let shared = Arc::new(Shared { view: Published::new(MembershipView::new()), alarm, lease, endpoint });
        let (remote, inbox) = order_channel().expect("a channel");
        let endpoint = (dead.ip().to_string(), dead.port());
        let mut member = MembershipThread::new(endpoint, introduction, settings, inbox, shared).expect("a thread");
        let (role, timeout) = ("default".into(), Duration::from_secs(60));
        member.step(MemberEvent::Call(Call::Join { role, local_world_size: 1, timeout }));
        member.take_addresses();
        // As if the host's name had two addresses. They are taken from the end.
        assert!(member.try_next_address(vec![there, dead], None).is_none());
        member.set_timer();
        let thread = std::thread::spawn(move || member.serve());
        live.accept().expect("a connection");
        assert!(remote.send(MembershipOrder::Close));
        thread.join().expect("no panic").expect("no error");
    }
}
