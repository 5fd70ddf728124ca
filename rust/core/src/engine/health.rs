//! A handle on a health server of the engine, and what it asks of the engine thread.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::handle::{Engine, Line};
use super::request::{Reply, Request};
use crate::error::{Error, Result};
use crate::health::liveness::Answer;
use crate::health::status::Update;
use crate::health::{Desk, Servers};
use crate::supervise::Exit;
use crate::sys::net::{InheritedListener, Listener};
use crate::sys::poller::Poller;

/// What is asked of the health servers on the engine thread.
pub(super) enum HealthRequest {
    Open { listener: Listener, desk: Arc<Desk>, timeout: Duration, reply: Reply<Result<u64>> },
    Started { server: u64, at: Instant },
    Answered { server: u64, at: Instant, answer: Answer },
    Update { server: u64, update: Update },
    Close { server: u64, reply: Option<Reply<()>> },
}

impl HealthRequest {
    /// Does it. `id` names a new server; `exits` are those of all processes that the engine supervises.
    pub(super) fn serve<'a>(
        self,
        servers: &mut Servers,
        poller: &Poller,
        id: u64,
        exits: impl Iterator<Item = &'a [Exit]>,
    ) {
        match self {
            Self::Open { listener, desk, timeout, reply } => {
                let _ = reply.send(servers.open(id, listener, desk, timeout, poller).map(|()| id));
            }
            Self::Started { server, at } => servers.started(server, at),
            Self::Answered { server, at, answer } => servers.answered(server, at, answer),
            Self::Update { server, update } => {
                let is_new_round = matches!(update, Update::Workers(_));
                servers.update(server, Instant::now(), update);
                if is_new_round {
                    // A worker may have ended before the agent said that it was started.
                    exits.for_each(|exits| servers.note_exits(exits));
                }
            }
            Self::Close { server, reply } => {
                servers.close(server, poller);
                if let Some(reply) = reply {
                    let _ = reply.send(());
                }
            }
        }
    }
}

/// A server of health checks, on the engine thread. Ends when it is dropped.
///
/// Whether the agent is alive is asked of one thread of the caller: [`HealthServer::next_question`] blocks until a probe wants to
/// know, [`HealthServer::started`] says that the thread is at work, [`HealthServer::answer`] what it found.
#[derive(Debug)]
pub struct HealthServer {
    line: Arc<Line>,
    id: u64,
    address: SocketAddr,
    inherited: InheritedListener,
    desk: Arc<Desk>,
}

impl Engine {
    /// Listens on a name or address of this host; port 0 takes a free one. Without progress for longer than `timeout` the agent
    /// counts as dead.
    pub fn health_server(&self, host: &str, port: u16, timeout: Duration) -> Result<HealthServer> {
        let line = self.line();
        line.check_owner()?;
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let place = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        let listener = listen(host, port).map_err(|source| Error::os("listen on", place, source))?;
        let (address, inherited) = (listener.address(), listener.inherited());
        let desk = Arc::new(Desk::new().map_err(|source| Error::os("create", "an eventfd", source))?);
        let theirs = Arc::clone(&desk);
        let opened = |reply| Request::Health(HealthRequest::Open { listener, desk: theirs, timeout, reply });
        let id = line.ask(opened)??;
        Ok(HealthServer { line: Arc::clone(line), id, address, inherited, desk })
    }
}

fn listen(host: &str, port: u16) -> io::Result<Listener> {
    let mut refused = io::Error::new(io::ErrorKind::AddrNotAvailable, "the host has no address");
    for address in (host, port).to_socket_addrs()? {
        match Listener::bind(address) {
            Ok(listener) => return Ok(listener),
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

impl HealthServer {
    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Blocks until a probe wants to know of the agent's progress; `false` when the server is closed. For one thread.
    pub fn next_question(&self) -> Result<bool> {
        self.line.check_owner()?;
        self.desk.wait().map_err(|source| Error::os("wait for", "a health probe", source))
    }

    /// The thread that took the question is at work on it.
    pub fn started(&self) -> Result<()> {
        self.tell(HealthRequest::Started { server: self.id, at: Instant::now() })
    }

    /// The answer: when there was progress last, in seconds since the epoch, or why it cannot be told.
    pub fn answer(&self, progress: std::result::Result<f64, String>) -> Result<()> {
        let (at, since_epoch) = (Instant::now(), SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default());
        let answer = progress.and_then(|progress| {
            if progress.is_nan() {
                return Err("it returned nan, which is no time".to_owned());
            }
            // A time to come is as good as now.
            let age = (since_epoch.as_secs_f64() - progress).max(0.0);
            Ok(Duration::try_from_secs_f64(age).unwrap_or(Duration::MAX))
        });
        self.tell(HealthRequest::Answered { server: self.id, at, answer })
    }

    /// Puts something on the board.
    pub fn update(&self, update: Update) -> Result<()> {
        self.tell(HealthRequest::Update { server: self.id, update })
    }

    /// Stops to serve; the port is free when this returns. In a forked child it closes the child's copy of the listener.
    pub fn close(&self) -> Result<()> {
        let closed =
            self.line.ask(|reply| Request::Health(HealthRequest::Close { server: self.id, reply: Some(reply) }));
        match closed {
            // A closed engine has closed its servers.
            Ok(()) | Err(Error::Closed) => Ok(()),
            Err(Error::Forked { .. }) => {
                self.inherited.close_in_child();
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn tell(&self, request: HealthRequest) -> Result<()> {
        self.line.tell(Request::Health(request))
    }
}

impl Drop for HealthServer {
    fn drop(&mut self) {
        if let Err(Error::Forked { .. }) = self.tell(HealthRequest::Close { server: self.id, reply: None }) {
            self.inherited.close_in_child();
        }
    }
}
