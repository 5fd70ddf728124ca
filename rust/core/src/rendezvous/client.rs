//! The thread of an agent that talks to the host of its rendezvous.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::member::{self, Action, Call, Event, Member, Settings, Standing};
use super::message::{self, Introduction, Notice, Request, UPGRADE};
use crate::error::{Error, Result, panic_text};
use crate::published::{Published, Wake};
use crate::store::client::endpoint;
use crate::store::wire::{MAGIC, opcode};
use crate::sys::lease::LeasePage;
use crate::sys::net::Stream;
use crate::sys::poller::{Interest, Poller};
use crate::sys::sigmask;
use crate::sys::timer::Timer;
use crate::sys::wake::WakeFd;

const THREAD: &str = "ferro-rdzv";

const WAKE: u64 = 0;
const TIMER: u64 = 1;
const STREAM: u64 = 2;

/// The host echoes this, as it does for every client of a `TCPStore`.
const NONCE: [u8; 4] = *b"ferr";

/// Where a host has several addresses, each has so long to answer before the next one is tried.
const ADDRESS_TURN: Duration = Duration::from_secs(1);

/// What the program can see.
#[derive(Debug)]
struct View {
    standing: Standing,
    /// Wishes to join that the thread has not heard of.
    joins_under_way: usize,
    /// This node, as the host is reached from it.
    address: Option<IpAddr>,
    remarks: Vec<String>,
    failure: Option<String>,
    is_closed: bool,
}

impl View {
    /// Of an agent that has not asked for anything.
    fn new() -> Self {
        Self {
            standing: Standing::Idle,
            joins_under_way: 0,
            address: None,
            remarks: Vec::new(),
            failure: None,
            is_closed: false,
        }
    }
}

#[derive(Debug)]
struct Shared {
    view: Published<View>,
    /// Readable while there is something that an agent whose workers run has to look at.
    alarm: WakeFd,
    /// Until when the workers may run.
    lease: Arc<LeasePage>,
    endpoint: String,
}

impl Shared {
    fn publish(&self, change: impl FnOnce(&mut View)) {
        self.view.publish(|view| {
            change(view);
            // Under the lock of the view, so that the alarm is about what is published.
            let is_quiet = matches!(view.standing, Standing::Joining | Standing::Placed(_) | Standing::Idle);
            if is_quiet && view.remarks.is_empty() && !view.is_closed {
                self.alarm.drain();
            } else {
                self.alarm.wake();
            }
        });
    }
}

/// An agent's membership in a rendezvous. Ends when it is dropped.
#[derive(Debug)]
pub struct Client {
    calls: Sender<Option<Call>>,
    wake: Arc<WakeFd>,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    owner: u32,
}

impl Client {
    /// Begins a membership; connects when it is asked to join.
    ///
    /// `host` and `port` say where the rendezvous is, `who` is the agent. Where its name is empty, it is the address of this node.
    pub fn start(host: &str, port: u16, who: Introduction, settings: Settings) -> Result<Self> {
        let wake = WakeFd::new().map_err(|source| Error::os("create", "an eventfd", source))?;
        let alarm = WakeFd::new().map_err(|source| Error::os("create", "an eventfd", source))?;
        let wake = Arc::new(wake);
        let lease = LeasePage::create().map_err(|source| Error::os("create", "the page of a lease", source))?;
        let (lease, endpoint) = (Arc::new(lease), settings.endpoint.clone());
        let shared = Arc::new(Shared { view: Published::new(View::new()), alarm, lease, endpoint });
        let (calls, inbox) = channel();
        let talker = Talker::new((host.to_owned(), port), who, settings, inbox, Arc::clone(&wake), Arc::clone(&shared))
            .map_err(|source| Error::os("create", "the poller of a rendezvous", source))?;
        let thread = std::thread::Builder::new().name(THREAD.into()).spawn(move || talker.run());
        let thread = thread.map_err(|source| Error::os("start", "the thread of a rendezvous", source))?;
        Ok(Self { calls, wake, shared, thread: Mutex::new(Some(thread)), owner: std::process::id() })
    }

    /// Says what the agent wants.
    pub fn call(&self, call: Call) -> Result<()> {
        self.check_owner()?;
        if matches!(call, Call::Join { .. }) {
            self.shared.view.publish(|view| view.joins_under_way += 1);
        }
        self.calls.send(Some(call)).map_err(|_| Error::Closed)?;
        self.wake.wake();
        Ok(())
    }

    /// How the agent stands.
    pub fn standing(&self) -> Result<Standing> {
        self.check_owner()?;
        // What is known from before a wish to join says nothing about it.
        let standing = self.shared.view.read(|view| match view.joins_under_way {
            0 => view.standing.clone(),
            _ => Standing::Joining,
        });
        // After a suspension of this process its thread may not have looked yet.
        Ok(match standing {
            Standing::Placed(place) if self.shared.lease.is_over() => {
                Standing::Over(place, member::lapsed(&self.shared.endpoint))
            }
            standing => standing,
        })
    }

    /// Until when the workers of this node may run; somebody who kills them then need not be able to ask.
    #[must_use]
    pub fn lease(&self) -> &Arc<LeasePage> {
        &self.shared.lease
    }

    /// How long the workers of this node may still run, if the lease has lapsed.
    #[must_use]
    pub fn lapsed_left(&self) -> Option<Duration> {
        self.shared.lease.left().filter(|_| self.shared.lease.is_over())
    }

    /// The address of this node by which it reaches the host, once it does.
    #[must_use]
    pub fn address(&self) -> Option<IpAddr> {
        self.shared.view.read(|view| view.address)
    }

    /// Takes what the host wants people to know.
    #[must_use]
    pub fn take_remarks(&self) -> Vec<String> {
        let mut remarks = Vec::new();
        // To look is no news: who waits for news looks each time.
        if self.shared.view.read(|view| view.remarks.is_empty()) {
            return remarks;
        }
        self.shared.publish(|view| remarks = std::mem::take(&mut view.remarks));
        remarks
    }

    /// Grows with each change of how the agent stands.
    pub fn generation(&self) -> Result<u64> {
        self.check_owner()?;
        Ok(self.shared.view.generation())
    }

    /// Blocks until there is something newer than `generation`, `timeout` has passed (`None`: never), or one of `others` is readable.
    pub fn wait(
        &self,
        generation: u64,
        timeout: Option<Duration>,
        others: [Option<BorrowedFd<'_>>; 2],
    ) -> Result<Wake> {
        self.check_owner()?;
        self.shared.view.wait(generation, timeout, others, |view| match &view.failure {
            Some(text) => Err(Error::Panicked { thread: THREAD, text: text.clone() }),
            None if view.is_closed => Err(Error::Closed),
            None => Ok(()),
        })
    }

    /// Readable while there are remarks, and from when a round is over, or the rendezvous, until the agent asks to join.
    #[must_use]
    pub fn alarm(&self) -> BorrowedFd<'_> {
        self.shared.alarm.as_fd()
    }

    /// Ends the membership. What was asked for before is still said.
    pub fn close(&self) -> Result<()> {
        self.check_owner()?;
        let _ = self.calls.send(None);
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

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.close();
    }
}

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
struct Talker {
    endpoint: (String, u16),
    who: Introduction,
    member: Member,
    inbox: Receiver<Option<Call>>,
    wake: Arc<WakeFd>,
    shared: Arc<Shared>,
    poller: Poller,
    timer: Timer,
    link: Option<Link>,
    shown: Standing,
}

impl Talker {
    fn new(
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
        Ok(Self { endpoint, who, member, inbox, wake, shared, poller, timer, link: None, shown: Standing::Idle })
    }

    fn run(mut self) {
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
        let (host, port) = &self.endpoint;
        match (host.as_str(), *port).to_socket_addrs() {
            // The last is taken first.
            Ok(addresses) => self.try_next(addresses.collect::<Vec<_>>().into_iter().rev().collect(), None),
            Err(error) => {
                let text = format!("host name {host:?} is not known: {error}");
                Some(Event::NotConnected { text, is_refused: false })
            }
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
