//! One connection: a request is read, perhaps waits for its answer, is answered, and the rest of what the peer sends is thrown away.

use std::io::{self, ErrorKind};
use std::time::{Duration, Instant};

use super::http::{self, HttpStatus, Received};
use crate::sys::net::Stream;
use crate::sys::poller::{Interest, Poller};

/// A connection is over after this long, whatever it is doing.
pub(super) const LIFETIME: Duration = Duration::from_secs(2);

/// Most bytes that are thrown away behind a request.
const MOST_DISCARDED: usize = 64 * 1024;

/// What is answered at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProbePath {
    /// `/`, `/healthz` and `/livez`: whether the agent is alive.
    Live(&'static str),
    /// `/readyz`: whether the workers run.
    Ready,
    /// `/status`: the board.
    Status,
    /// `/metrics`: the figures.
    Metrics {
        /// In the format of `OpenMetrics`.
        open: bool,
    },
    /// Anything else.
    Other,
}

impl ProbePath {
    fn of(request: &http::HttpRequest<'_>) -> Self {
        match request.path {
            "/" => Self::Live("/"),
            "/healthz" => Self::Live("/healthz"),
            "/livez" => Self::Live("/livez"),
            "/readyz" => Self::Ready,
            "/status" => Self::Status,
            "/metrics" => Self::Metrics { open: request.wants_openmetrics },
            _ => Self::Other,
        }
    }

    /// The path as it is counted: what is not known counts as one.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Live(path) => path,
            Self::Ready => "/readyz",
            Self::Status => "/status",
            Self::Metrics { .. } => "/metrics",
            Self::Other => "other",
        }
    }
}

/// What a connection has come to.
#[derive(Debug)]
enum ProbeStage {
    Reading,
    Waiting,
    Writing { output: Vec<u8>, sent: usize },
    Lingering { discarded: usize },
}

/// What there is to do after a step.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Nothing before it is ready again.
    Wait,
    /// The request is complete: it waits for [`ProbeConnection::answer`].
    Answer,
    /// What came is no request that can be answered.
    Refuse(HttpStatus),
    /// It is over.
    Close,
}

#[derive(Debug)]
pub(super) struct ProbeConnection {
    /// The server that accepted it.
    pub(super) server: u64,
    pub(super) deadline: Instant,
    /// When bytes last moved.
    pub(super) active: Instant,
    /// What the request asks for, once it is complete.
    pub(super) page: ProbePath,
    head_only: bool,
    stream: Stream,
    stage: ProbeStage,
    received: Vec<u8>,
    watched: Option<Interest>,
}

impl ProbeConnection {
    pub(super) fn new(server: u64, stream: Stream, now: Instant) -> Self {
        Self {
            server,
            deadline: now + LIFETIME,
            active: now,
            page: ProbePath::Other,
            head_only: false,
            stream,
            stage: ProbeStage::Reading,
            received: Vec::new(),
            watched: None,
        }
    }

    pub(super) fn is_waiting(&self) -> bool {
        matches!(self.stage, ProbeStage::Waiting)
    }

    pub(super) fn is_lingering(&self) -> bool {
        matches!(self.stage, ProbeStage::Lingering { .. })
    }

    /// Bytes of an answer that the peer has not taken.
    pub(super) fn unsent(&self) -> usize {
        match &self.stage {
            ProbeStage::Writing { output, sent } => output.len() - sent,
            _ => 0,
        }
    }

    /// Does what can be done without waiting: one read, or as many writes as there is room for.
    pub(super) fn step(&mut self, now: Instant, scratch: &mut [u8]) -> Next {
        match &mut self.stage {
            ProbeStage::Reading => self.read_head(now, scratch),
            // Only errors are looked for meanwhile.
            ProbeStage::Waiting => Next::Close,
            ProbeStage::Writing { .. } => self.write(now),
            ProbeStage::Lingering { discarded } => match self.stream.read(scratch) {
                Ok(read @ 1..) if *discarded + read <= MOST_DISCARDED => {
                    *discarded += read;
                    Next::Wait
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => Next::Wait,
                Ok(_) | Err(_) => Next::Close,
            },
        }
    }

    fn read_head(&mut self, now: Instant, scratch: &mut [u8]) -> Next {
        let room = http::MAX_HEAD - self.received.len();
        let read = match self.stream.read(&mut scratch[..room]) {
            // A peer that connects and closes has found out what it wanted.
            Ok(0) => return Next::Close,
            Ok(read) => read,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Next::Wait,
            Err(_) => return Next::Close,
        };
        self.active = now;
        let head = if self.received.is_empty() {
            &scratch[..read]
        } else {
            self.received.extend_from_slice(&scratch[..read]);
            &self.received
        };
        let next = match http::parse(head) {
            Received::Incomplete => Next::Wait,
            Received::Refused(status) => Next::Refuse(status),
            Received::Request(request) => {
                (self.page, self.head_only) = (ProbePath::of(&request), request.head_only);
                Next::Answer
            }
        };
        if next == Next::Answer {
            self.stage = ProbeStage::Waiting;
        }
        if next != Next::Wait {
            self.received = Vec::new();
        } else if self.received.is_empty() {
            self.received = scratch[..read].to_vec();
        }
        next
    }

    /// Begins to send an answer.
    pub(super) fn answer(&mut self, now: Instant, status: HttpStatus, content_type: &str, body: &[u8]) -> Next {
        let mut output = http::response_head(status, content_type, body.len()).into_bytes();
        if !self.head_only {
            output.extend_from_slice(body);
        }
        self.stage = ProbeStage::Writing { output, sent: 0 };
        self.write(now)
    }

    fn write(&mut self, now: Instant) -> Next {
        let ProbeStage::Writing { output, sent } = &mut self.stage else { return Next::Wait };
        while *sent < output.len() {
            match self.stream.write(&output[*sent..]) {
                Ok(written) => {
                    *sent += written;
                    self.active = now;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Next::Wait,
                Err(_) => return Next::Close,
            }
        }
        // To close with bytes unread would reset the connection, and the peer could lose the answer. So it is the peer who closes.
        self.stream.finish_writing();
        self.stage = ProbeStage::Lingering { discarded: 0 };
        Next::Wait
    }

    /// Watches for what the connection waits for now.
    pub(super) fn watch(&mut self, poller: &Poller, token: u64) -> io::Result<()> {
        let wanted = match self.stage {
            ProbeStage::Reading | ProbeStage::Lingering { .. } => Interest::Readable,
            ProbeStage::Waiting => Interest::Hangup,
            ProbeStage::Writing { .. } => Interest::Writable,
        };
        if self.watched != Some(wanted) {
            match self.watched {
                None => poller.add(&self.stream, token, wanted)?,
                Some(_) => poller.modify(&self.stream, token, wanted)?,
            }
            self.watched = Some(wanted);
        }
        Ok(())
    }

    /// Ends the watch; a copy of the descriptor in a forked child would keep it.
    pub(super) fn unwatch(&self, poller: &Poller) {
        if self.watched.is_some() {
            let _ = poller.remove(&self.stream);
        }
    }
}
