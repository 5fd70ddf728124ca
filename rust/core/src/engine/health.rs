//! The handle of a health server.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::order::{EngineOrder, Line};
use crate::error::{Error, Result};
use crate::health::status::Update;
use crate::health::{HealthOrder, ProgressQuestion, liveness};
use crate::sys::clock::Moment;
use crate::sys::net::{InheritedListener, Listener, endpoint};

/// An HTTP server for health checks, on the engine thread. Dropping the handle closes the server.
///
/// One thread of the caller reports the progress of the agent: [`HealthServer::next_question`] blocks until a probe needs the progress,
/// [`HealthServer::started`] confirms that the thread has received the question, and [`HealthServer::answer`] delivers the answer.
#[derive(Debug)]
pub struct HealthServer {
    line: Arc<Line>,
    id: u64,
    address: SocketAddr,
    inherited: InheritedListener,
    question: Arc<ProgressQuestion>,
}

impl HealthServer {
    /// Listens on a name or address of this host; port 0 picks a free port. Liveness probes fail when the agent has made no progress for
    /// longer than `timeout`.
    pub(super) fn open(line: &Arc<Line>, host: &str, port: u16, timeout: Duration) -> Result<Self> {
        line.check_owner()?;
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let bound = Listener::bind_name(host, port);
        let listener = bound.map_err(|source| Error::os("listen on", endpoint(host, port), source))?;
        let (address, inherited) = (listener.address(), listener.inherited());
        let question = ProgressQuestion::new().map_err(|source| Error::os("create", "an eventfd", source))?;
        let question = Arc::new(question);
        let asked = Arc::clone(&question);
        let id =
            line.ask(|reply| EngineOrder::Health(HealthOrder::Open { listener, question: asked, timeout, reply }))??;
        Ok(Self { line: Arc::clone(line), id, address, inherited, question })
    }

    /// The address of the listener.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Blocks until a probe needs the agent's progress; `false` once the server is closed. Call it from one thread only.
    pub fn next_question(&self) -> Result<bool> {
        self.line.check_owner()?;
        self.question.wait().map_err(|source| Error::os("wait for", "a health probe", source))
    }

    /// Confirms that the answering thread has received the question.
    pub fn started(&self) -> Result<()> {
        self.send(HealthOrder::Started { server: self.id, at: Instant::now() })
    }

    /// Answers the question with the time of the last progress in seconds since the epoch, or with an error message.
    pub fn answer(&self, progress: std::result::Result<f64, String>) -> Result<()> {
        let now = Moment::now();
        let (at, answer) = (now.instant, progress.and_then(|progress| liveness::age(progress, now.wall_s())));
        self.send(HealthOrder::Answered { server: self.id, at, answer })
    }

    /// Updates the published status.
    pub fn update(&self, update: Update) -> Result<()> {
        self.send(HealthOrder::Update { server: self.id, update })
    }

    /// Stops serving; the port is free on return. In a forked child, closes the child's copy of the listener.
    pub fn close(&self) -> Result<()> {
        let closed =
            self.line.ask(|reply| EngineOrder::Health(HealthOrder::Close { server: self.id, reply: Some(reply) }));
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

    fn send(&self, order: HealthOrder) -> Result<()> {
        self.line.send(EngineOrder::Health(order))
    }
}

impl Drop for HealthServer {
    fn drop(&mut self) {
        if let Err(Error::Forked { .. }) = self.send(HealthOrder::Close { server: self.id, reply: None }) {
            self.inherited.close_in_child();
        }
    }
}
