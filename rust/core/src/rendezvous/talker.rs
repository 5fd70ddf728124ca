//! The thread of an agent that talks to the host of its rendezvous.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use super::client::Shared;
use super::member::{Action, Call, Event, Member, Settings, Standing};
use super::message::{self, Introduction, Notice, Request, UPGRADE};
use crate::error::panic_text;
use crate::store::client::endpoint;
use crate::store::wire::{MAGIC, opcode};
use crate::sys::net::Stream;
use crate::sys::poller::{Interest, Poller};
use crate::sys::resolve::resolve;
use crate::sys::sigmask;
use crate::sys::timer::Timer;
use crate::sys::wake::WakeFd;

const WAKE: u64 = 0;
const TIMER: u64 = 1;
const STREAM: u64 = 2;

/// The host echoes this, as it does for every client of a `TCPStore`.
const NONCE: [u8; 4] = *b"ferr";

/// Where a host has several addresses, each has so long to answer before the next one is tried.
const ADDRESS_TURN: Duration = Duration::from_secs(1);

/// A connection, and how far it is.
#[derive(Debug)]
struct Link {
    stream: Stream,
    is_connected: bool,
    has_echoed: bool,
    input: Vec<u8>,
    output: Vec<u8>,
    interest: Interest,
    /// Where else the host may be.
    others: Vec<SocketAddr>,
    /// When the next of them is tried.
    turn_ends: Option<Instant>,
}

/// Everything the thread owns.
pub(super) struct Talker {
    endpoint: (String, u16),
    who: Introduction,
    member: Member,
    inbox: Receiver<Option<Call>>,
    wake: Arc<WakeFd>,
    shared: Arc<Shared>,
    poller: Poller,
    timer: Timer,
    link: Option<Link>,
    /// Where answers of the resolver go, and whether one is awaited.
    resolver: (Sender<Addresses>, Receiver<Addresses>),
    is_resolving: bool,
    shown: Standing,
}

/// What the resolver says.
type Addresses = io::Result<Vec<SocketAddr>>;

impl Talker {
    pub(super) fn new(
        endpoint: (String, u16),
        who: Introduction,
        settings: Settings,
        inbox: Receiver<Option<Call>>,
        wake: Arc<WakeFd>,
        shared: Arc<Shared>,
    ) -> io::Result<Self> {
        let poller = Poller::new()?;
        let timer = Timer::new()?;
        poller.add(&*wake, WAKE, Interest::Readable)?;
        poller.add(&timer, TIMER, Interest::Readable)?;
        let member = Member::new(settings, Instant::now());
        let (link, resolver, is_resolving) = (None, channel(), false);
        let shown = Standing::Idle;
        Ok(Self { endpoint, who, member, inbox, wake, shared, poller, timer, link, resolver, is_resolving, shown })
    }

    pub(super) fn run(mut self) {
        // Signals are for the interpreter's main thread.
        sigmask::block_all().forever();
        let shared = Arc::clone(&self.shared);
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.talk()));
        shared.lease.set(None, None);
        shared.publish(|view| {
            view.is_closed = true;
            view.failure = ended.err().map(|panic| panic_text(&*panic));
        });
    }

    fn talk(&mut self) {
        let mut ready = Vec::new();
        while self.poller.wait(true, &mut ready).is_ok() {
            if ready.contains(&TIMER) && self.poller.wait(false, &mut ready).is_err() {
                return;
            }
            // What the host has said counts before what the clock says of its silence.
            let is_due = ready.contains(&TIMER);
            // Two looks may have reported the same.
            ready.sort_unstable();
            ready.dedup();
            for token in ready.drain(..) {
                match token {
                    WAKE if !self.obey() => return,
                    WAKE => self.take_addresses(),
                    STREAM => self.serve(),
                    _ => {}
                }
            }
            if is_due {
                self.timer.drain();
                if self.link.as_ref().and_then(|link| link.turn_ends).is_some_and(|end| Instant::now() >= end) {
                    self.try_others(ErrorKind::TimedOut.into());
                }
                self.step(Event::Tick);
            }
        }
    }

    /// Does what the program asks; `false` at the end.
    fn obey(&mut self) -> bool {
        self.wake.drain();
        while let Ok(call) = self.inbox.try_recv() {
            match call {
                Some(call) => {
                    let is_join = matches!(call, Call::Join { .. });
                    self.step(Event::Call(call));
                    if is_join {
                        self.shared.view.publish(|view| view.joins_under_way -= 1);
                    }
                }
                None => return false,
            }
        }
        true
    }

    fn step(&mut self, event: Event) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            for action in self.member.step(Instant::now(), event) {
                match action {
                    Action::Connect => events.extend(self.connect()),
                    Action::Send(request) => {
                        if let Some(link) = &mut self.link {
                            message::encode(&request, &mut link.output);
                        }
                    }
                    Action::Disconnect => {
                        // What was said before is said.
                        self.flush();
                        self.hang_up();
                    }
                    Action::Remark(text) => self.shared.publish(|view| view.remarks.push(text)),
                }
            }
            events.extend(self.flush());
        }
        self.set_timer();
        self.show();
    }

    /// Publishes how the agent stands, if that has changed.
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

    // ---- of the connection

    /// Begins to connect; what there is to say about it at once.
    fn connect(&mut self) -> Option<Event> {
        if self.is_resolving {
            return None; // the answer to the former question is awaited
        }
        let (host, port) = &self.endpoint;
        let (answer, wake) = (self.resolver.0.clone(), Arc::clone(&self.wake));
        let done = move |addresses| {
            // The thread may have ended.
            let _ = answer.send(addresses);
            wake.wake();
        };
        self.is_resolving = true;
        if let Err(error) = resolve(host, *port, done) {
            self.is_resolving = false;
            return Some(Event::NotConnected { text: error.to_string(), is_refused: false });
        }
        None
    }

    /// Connects to the addresses of the host, if the resolver has found them.
    fn take_addresses(&mut self) {
        let Ok(addresses) = self.resolver.1.try_recv() else { return };
        self.is_resolving = false;
        let event = match addresses {
            _ if !self.member.is_connecting() => None,
            // The last is taken first.
            Ok(addresses) => self.try_next(addresses.into_iter().rev().collect(), None),
            Err(error) => {
                let text = format!("host name {:?} is not known: {error}", self.endpoint.0);
                Some(Event::NotConnected { text, is_refused: false })
            }
        };
        match event {
            Some(event) => self.step(event),
            None => self.set_timer(),
        }
    }

    fn try_next(&mut self, mut addresses: Vec<SocketAddr>, mut error: Option<io::Error>) -> Option<Event> {
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
                    self.link =
                        Some(Link { stream, is_connected, has_echoed, input, output, interest, others, turn_ends });
                    return None;
                }
                Err(failed) => error = Some(failed),
            }
        }
        let error = error.unwrap_or_else(|| ErrorKind::AddrNotAvailable.into());
        let is_refused = error.kind() == ErrorKind::ConnectionRefused;
        Some(Event::NotConnected { text: error.to_string(), is_refused })
    }

    /// One address was not reached.
    fn try_others(&mut self, error: io::Error) {
        let others = self.link.as_mut().map(|link| std::mem::take(&mut link.others)).unwrap_or_default();
        match self.try_next(others, Some(error)) {
            Some(event) => self.step(event),
            None => self.set_timer(),
        }
    }

    fn set_timer(&mut self) {
        let turn_ends = self.link.as_ref().and_then(|link| link.turn_ends);
        // It fails for a descriptor that is none.
        let _ = self.timer.set(self.member.next_tick().into_iter().chain(turn_ends).min());
    }

    fn hang_up(&mut self) {
        if let Some(link) = self.link.take() {
            let _ = self.poller.remove(&link.stream);
        }
    }

    /// The connection has bytes, or room for some, or has been made.
    fn serve(&mut self) {
        let Some(link) = &mut self.link else { return };
        if !link.is_connected {
            match link.stream.connected() {
                Ok(true) => {}
                // What was reported was of a former connection.
                Ok(false) => return,
                Err(error) => return self.try_others(error),
            }
            link.is_connected = true;
            link.turn_ends = None;
            self.introduce();
            return self.step(Event::Connected);
        }
        let mut chunk = [0; 16 * 1024];
        match link.stream.read(&mut chunk) {
            Ok(0) => self.lost("it was closed by the host"),
            Ok(read) => {
                link.input.extend_from_slice(&chunk[..read]);
                self.understand();
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if let Some(event) = self.flush() {
                    self.step(event);
                }
            }
            Err(error) => self.lost(&error.to_string()),
        }
    }

    /// Says who this is: first what every client of a store says.
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
        message::encode(&Request::Enter(who), &mut link.output);
    }

    fn understand(&mut self) {
        while let Some(link) = &mut self.link {
            if !link.has_echoed {
                let Some(echo) = link.input.first_chunk() else { return };
                if *echo != NONCE {
                    return self.estranged("is no store, nor a rendezvous");
                }
                link.input.drain(..NONCE.len());
                link.has_echoed = true;
            }
            match message::decode::<Notice>(&mut link.input) {
                Ok(Some(notice)) => {
                    if let Notice::Welcome { silence } = &notice {
                        // Without it a broken network is noticed by what is said, or not.
                        let _ = link.stream.set_patience(*silence);
                    }
                    self.step(Event::Received(notice));
                }
                Ok(None) => return,
                Err(garbled) => return self.lost(&format!("what it said is garbled: {garbled}")),
            }
        }
    }

    /// The connection has ended.
    fn lost(&mut self, text: &str) {
        // A host that knows the opcode says more than the echo. It may be gone before, but it was there before, then.
        let has_only_echoed = self.link.as_ref().is_some_and(|link| link.has_echoed && link.input.is_empty());
        if has_only_echoed && !self.member.was_welcome() {
            return self.estranged("is a TCPStore of torch: a torchrun hosts it, or a script does");
        }
        self.hang_up();
        self.step(Event::Disconnected(text.to_owned()));
    }

    fn estranged(&mut self, what: &str) {
        self.hang_up();
        let endpoint = endpoint(&self.endpoint.0, self.endpoint.1);
        let text = format!(
            "what listens at {endpoint} {what}: agents of ferrorun meet where ferrorun hosts; start all nodes with it, or choose another port"
        );
        self.step(Event::Stranger(text));
    }

    /// Sends what there is room for.
    fn flush(&mut self) -> Option<Event> {
        let link = self.link.as_mut().filter(|link| link.is_connected)?;
        while !link.output.is_empty() {
            match link.stream.write(&link.output) {
                Ok(sent) => drop(link.output.drain(..sent)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => {
                    self.hang_up();
                    return Some(Event::Disconnected(error.to_string()));
                }
            }
        }
        // With something left to send, it is not read: the host is asked to read first.
        let interest = if link.output.is_empty() { Interest::Readable } else { Interest::Writable };
        if interest != link.interest {
            link.interest = interest;
            if let Err(error) = self.poller.modify(&link.stream, STREAM, interest) {
                self.hang_up();
                return Some(Event::Disconnected(error.to_string()));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use super::*;
    use crate::published::Published;
    use crate::rendezvous::client::View;
    use crate::sys::lease::LeasePage;

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
        let settings = Settings { endpoint: "host".into(), connect_timeout, is_host: false };
        let wake = Arc::new(WakeFd::new().expect("wake"));
        let alarm = WakeFd::new().expect("alarm");
        let lease = Arc::new(LeasePage::create().expect("page"));
        let endpoint = settings.endpoint.clone();
        let shared = Arc::new(Shared { view: Published::new(View::new()), alarm, lease, endpoint });
        let (calls, inbox) = channel();
        let endpoint = (dead.ip().to_string(), dead.port());
        let mut talker = Talker::new(endpoint, who, settings, inbox, Arc::clone(&wake), shared).expect("talker");
        let (role, timeout) = ("default".into(), Duration::from_secs(60));
        talker.step(Event::Call(Call::Join { role, local_world_size: 1, timeout }));
        talker.take_addresses();
        // As if the host's name had two addresses; the last is taken first.
        assert!(talker.try_next(vec![there, dead], None).is_none());
        talker.set_timer();
        let thread = std::thread::spawn(move || talker.talk());
        live.accept().expect("a connection");
        calls.send(None).expect("sent");
        wake.wake();
        thread.join().expect("ended");
    }
}
