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

/// The host echoes this, as every `TCPStore` server does.
const NONCE: [u8; 4] = *b"ferr";

/// If a host has several addresses, each has this long to answer before the next one is tried.
const ADDRESS_TURN: Duration = Duration::from_secs(1);

/// A connection to the host.
#[derive(Debug)]
struct HostConnection {
    stream: Stream,
    is_connected: bool,
    has_echoed: bool,
    input: Vec<u8>,
    output: Vec<u8>,
    interest: Interest,
    /// Further addresses of the host.
    others: Vec<SocketAddr>,
    /// The deadline for this address if there are others.
    turn_ends: Option<Instant>,
}

/// The state of the thread.
pub(super) struct MembershipThread {
    endpoint: (String, u16),
    who: Introduction,
    member: Member,
    inbox: Inbox<Order>,
    shared: Arc<Shared>,
    poller: Poller,
    timer: Timer,
    link: Option<HostConnection>,
    /// The channel of the resolver's answers.
    resolver: (Sender<Addresses>, Receiver<Addresses>),
    /// An answer of the resolver is outstanding.
    is_resolving: bool,
    /// The last published state.
    shown: MembershipState,
}

/// An answer of the resolver.
type Addresses = io::Result<Vec<SocketAddr>>;

impl Service for MembershipThread {
    type Order = Order;

    fn serve(&mut self) -> Result<()> {
        let mut ready = Vec::new();
        let poll_failed = |source| Error::os("wait for", "events", source);
        loop {
            self.poller.wait(true, &mut ready).map_err(poll_failed)?;
            if ready.contains(&TIMER) {
                // Received messages count before a deadline that has passed meanwhile.
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
                if self.link.as_ref().and_then(|link| link.turn_ends).is_some_and(|end| Instant::now() >= end) {
                    self.try_others(ErrorKind::TimedOut.into());
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
pub(super) enum Order {
    /// Carry out a call of the agent.
    Call(Call),
    /// End.
    Close,
}

impl ThreadOrder for Order {
    fn close() -> Self {
        Self::Close
    }
}

impl MembershipThread {
    pub(super) fn new(
        endpoint: (String, u16),
        who: Introduction,
        settings: MemberSettings,
        inbox: Inbox<Order>,
        shared: Arc<Shared>,
    ) -> Result<Self> {
        let failed = |source| Error::os("create", "the poller of a rendezvous", source);
        let poller = Poller::new().map_err(failed)?;
        let timer = Timer::new().map_err(failed)?;
        poller.add(inbox.wake(), WAKE, Interest::Readable).map_err(failed)?;
        poller.add(&timer, TIMER, Interest::Readable).map_err(failed)?;
        let member = Member::new(settings, Instant::now());
        let (link, resolver, is_resolving) = (None, channel(), false);
        let shown = MembershipState::Idle;
        Ok(Self { endpoint, who, member, inbox, shared, poller, timer, link, resolver, is_resolving, shown })
    }

    /// Carries out the orders; `false` if one of them ends the thread.
    fn take_orders(&mut self) -> bool {
        self.inbox.wake().drain();
        while let Some(order) = self.inbox.next() {
            match order {
                Order::Call(call) => {
                    let is_join = matches!(call, Call::Join { .. });
                    self.step(MemberEvent::Call(call));
                    if is_join {
                        self.shared.view.publish(|view| view.joins_under_way -= 1);
                    }
                }
                Order::Close => return false,
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
                        self.hang_up();
                    }
                    MemberAction::Remark(text) => self.shared.publish(|view| view.remarks.push(text)),
                }
            }
            events.extend(self.flush());
        }
        self.set_timer();
        self.show();
    }

    /// Publishes the state of the membership if it has changed.
    fn show(&mut self) {
        let lease = self.member.lease();
        let may_lapse = self.member.has_running_workers() || self.member.has_lapsed();
        let stop_at = lease.filter(|_| may_lapse).map(|lease| lease.stop_at);
        self.shared.lease.set(stop_at, lease.map(|lease| lease.kill_at));
        let standing = self.member.standing();
        if *standing == self.shown {
            return;
        }
        self.shown = standing.clone();
        self.shared.publish(|view| view.standing = standing.clone());
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
            // The thread may have ended.
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
            // The last is taken first.
            Ok(addresses) => self.try_next(addresses.into_iter().rev().collect(), None),
            Err(error) => {
                let text = format!("host name {:?} is not known: {error}", self.endpoint.0);
                Some(MemberEvent::NotConnected { text, is_refused: false })
            }
        };
        match event {
            Some(event) => self.step(event),
            None => self.set_timer(),
        }
    }

    fn try_next(&mut self, mut addresses: Vec<SocketAddr>, mut error: Option<io::Error>) -> Option<MemberEvent> {
        self.hang_up();
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
                    let is_one_of_several = error.is_some() || !addresses.is_empty();
                    let turn_ends = is_one_of_several.then(|| Instant::now() + ADDRESS_TURN);
                    let others = addresses;
                    self.link = Some(HostConnection {
                        stream,
                        is_connected,
                        has_echoed,
                        input,
                        output,
                        interest,
                        others,
                        turn_ends,
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

    /// The connection to one address has failed.
    fn try_others(&mut self, error: io::Error) {
        let others = self.link.as_mut().map(|link| std::mem::take(&mut link.others)).unwrap_or_default();
        match self.try_next(others, Some(error)) {
            Some(event) => self.step(event),
            None => self.set_timer(),
        }
    }

    fn set_timer(&mut self) {
        let turn_ends = self.link.as_ref().and_then(|link| link.turn_ends);
        // Cannot fail: the descriptor is valid.
        let _ = self.timer.set(self.member.next_tick().into_iter().chain(turn_ends).min());
    }

    fn hang_up(&mut self) {
        if let Some(link) = self.link.take() {
            let _ = self.poller.remove(&link.stream);
        }
    }

    /// The connection is established, readable or writable.
    fn serve_connection(&mut self) {
        let Some(link) = &mut self.link else { return };
        if !link.is_connected {
            match link.stream.connected() {
                Ok(true) => {}
                // The event belongs to an earlier connection.
                Ok(false) => return,
                Err(error) => return self.try_others(error),
            }
            link.is_connected = true;
            link.turn_ends = None;
            self.introduce();
            return self.step(MemberEvent::Connected);
        }
        let mut chunk = [0; 16 * 1024];
        match link.stream.read(&mut chunk) {
            Ok(0) => self.lost("it was closed by the host"),
            Ok(read) => {
                link.input.extend_from_slice(&chunk[..read]);
                self.take_messages();
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if let Some(event) = self.flush() {
                    self.step(event);
                }
            }
            Err(error) => self.lost(&error.to_string()),
        }
    }

    /// Introduces this agent, after the opening of every store client.
    fn introduce(&mut self) {
        let Some(link) = &mut self.link else { return };
        let address = link.stream.local_address().ok().map(|address| address.ip().to_canonical());
        self.who.connection += 1;
        let mut who = self.who.clone();
        if who.name.is_empty() {
            who.name = address.map_or_else(String::new, |address| address.to_string());
        }
        self.shared.view.publish(|view| view.address = address);
        link.output.push(opcode::VALIDATE);
        link.output.extend_from_slice(&MAGIC.to_le_bytes());
        link.output.push(opcode::PING);
        link.output.extend_from_slice(&NONCE);
        link.output.push(UPGRADE);
        message::encode(&AgentMessage::Enter(who), &mut link.output);
    }

    fn take_messages(&mut self) {
        while let Some(link) = &mut self.link {
            if !link.has_echoed {
                let Some(echo) = link.input.first_chunk() else { return };
                if *echo != NONCE {
                    return self.refuse_host("is no store, nor a rendezvous");
                }
                link.input.drain(..NONCE.len());
                link.has_echoed = true;
            }
            match message::decode::<HostMessage>(&mut link.input) {
                Ok(Some(notice)) => {
                    if let HostMessage::Welcome { silence } = &notice {
                        // Without it the heartbeats alone detect a broken network.
                        let _ = link.stream.set_peer_timeout(*silence);
                    }
                    self.step(MemberEvent::Received(notice));
                }
                Ok(None) => return,
                Err(garbled) => return self.lost(&format!("what it said is garbled: {garbled}")),
            }
        }
    }

    /// The connection has ended.
    fn lost(&mut self, text: &str) {
        // A ferrorun host would have sent more than the echo. If one has welcomed this agent earlier, that host has gone.
        let has_only_echoed = self.link.as_ref().is_some_and(|link| link.has_echoed && link.input.is_empty());
        if has_only_echoed && !self.member.was_welcome() {
            return self.refuse_host("is a TCPStore of torch: a torchrun hosts it, or a script does");
        }
        self.hang_up();
        self.step(MemberEvent::Disconnected(text.to_owned()));
    }

    fn refuse_host(&mut self, what: &str) {
        self.hang_up();
        let endpoint = endpoint(&self.endpoint.0, self.endpoint.1);
        let text = format!(
            "what listens at {endpoint} {what}: agents of ferrorun meet where ferrorun hosts; start all nodes with it, or choose another port"
        );
        self.step(MemberEvent::Stranger(text));
    }

    /// Sends as much as the kernel takes.
    fn flush(&mut self) -> Option<MemberEvent> {
        let link = self.link.as_mut().filter(|link| link.is_connected)?;
        while !link.output.is_empty() {
            match link.stream.write(&link.output) {
                Ok(sent) => drop(link.output.drain(..sent)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => {
                    self.hang_up();
                    return Some(MemberEvent::Disconnected(error.to_string()));
                }
            }
        }
        // Does not read while bytes are unsent: the host must read first.
        let interest = if link.output.is_empty() { Interest::Readable } else { Interest::Writable };
        if interest != link.interest {
            link.interest = interest;
            if let Err(error) = self.poller.modify(&link.stream, STREAM, interest) {
                self.hang_up();
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

    /// A listener that takes no more connections, as a machine behind a broken route: what asks for one gets no answer.
    fn silent() -> (TcpListener, Vec<TcpStream>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
        let address = listener.local_addr().expect("address");
        // The same listener goes on, with a shorter queue.
        rustix::net::listen(&listener, 0).expect("listen");
        let mut queued = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(100)) {
            queued.push(stream);
        }
        (listener, queued)
    }

    #[test]
    fn an_address_that_does_not_answer_gives_way_to_the_next() {
        let (dead, _queued) = silent();
        let live = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
        let [dead, there] = [&dead, &live].map(|listener| listener.local_addr().expect("address"));
        let who = Introduction::new("job".into(), "node".into(), (1, 1));
        let connect_timeout = Duration::from_secs(60);
        let settings = MemberSettings { endpoint: "host".into(), connect_timeout, is_host: false };
        let alarm = WakeFd::new().expect("alarm");
        let lease = Arc::new(LeasePage::create().expect("page"));
        let endpoint = settings.endpoint.clone();
        let shared = Arc::new(Shared { view: Published::new(MembershipView::new()), alarm, lease, endpoint });
        let (remote, inbox) = order_channel().expect("a channel");
        let endpoint = (dead.ip().to_string(), dead.port());
        let mut member = MembershipThread::new(endpoint, who, settings, inbox, shared).expect("a thread");
        let (role, timeout) = ("default".into(), Duration::from_secs(60));
        member.step(MemberEvent::Call(Call::Join { role, local_world_size: 1, timeout }));
        member.take_addresses();
        // As if the host's name had two addresses; the last is taken first.
        assert!(member.try_next(vec![there, dead], None).is_none());
        member.set_timer();
        let thread = std::thread::spawn(move || member.serve());
        live.accept().expect("a connection");
        assert!(remote.send(Order::Close));
        thread.join().expect("no panic").expect("no error");
    }
}
