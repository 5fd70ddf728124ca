//! One connection of a probe: reads a request, waits for the answer if necessary, sends it, and discards further input.

use std::io::{self, ErrorKind};
use std::time::{Duration, Instant};

use super::http::{self, HttpStatus, Received};
use crate::sys::net::Stream;
use crate::sys::poller::{Interest, Poller};

/// Limit on the lifetime of a connection, in every stage.
pub(super) const LIFETIME: Duration = Duration::from_secs(2);

/// Limit on the bytes discarded after a request.
const MAX_DISCARDED: usize = 64 * 1024;

/// The resource that a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProbePath {
    /// `/`, `/healthz` and `/livez`: whether the agent is alive.
    Live(&'static str),
    /// `/readyz`: whether the workers run.
    Ready,
    /// `/status`: the job status as JSON.
    Status,
    /// `/metrics`: the metrics for Prometheus.
    Metrics {
        /// Use the `OpenMetrics` format instead of plain text.
        open: bool,
    },
    /// An unknown path.
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

    /// The path as a metrics label; all unknown paths share one.
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

#[derive(Debug)]
enum ProbeStage {
    Reading,
    Waiting,
    Writing {
        output: Vec<u8>,
        sent: usize,
    },
    /// The answer is sent; input is discarded until the peer closes.
    Lingering {
        discarded: usize,
    },
}

/// The action that a step requires.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Wait until the connection is ready again.
    Wait,
    /// Answer the complete request with [`ProbeConnection::answer`].
    Answer,
    /// Answer with this status: the input is not a valid request.
    Refuse(HttpStatus),
    /// Close the connection.
    Close,
}

#[derive(Debug)]
pub(super) struct ProbeConnection {
    /// The id of its server.
    pub(super) server: u64,
    pub(super) deadline: Instant,
    /// When bytes were last read or written.
    pub(super) last_active: Instant,
    /// The requested resource, once the request is complete.
    pub(super) path: ProbePath,
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
            last_active: now,
            path: ProbePath::Other,
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

    /// Bytes of the answer that are still unsent.
    pub(super) fn unsent(&self) -> usize {
        match &self.stage {
            ProbeStage::Writing { output, sent } => output.len() - sent,
            _ => 0,
        }
    }

    /// Makes progress without blocking: one read, or writes until the socket buffer is full.
    pub(super) fn step(&mut self, now: Instant, scratch: &mut [u8]) -> Next {
        match &mut self.stage {
            ProbeStage::Reading => self.read_head(now, scratch),
            // A waiting connection is watched for hangups and errors only.
            ProbeStage::Waiting => Next::Close,
            ProbeStage::Writing { .. } => self.write(now),
            ProbeStage::Lingering { discarded } => match self.stream.read(scratch) {
                Ok(read @ 1..) if *discarded + read <= MAX_DISCARDED => {
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
            // A TCP probe connects and closes without a request.
            Ok(0) => return Next::Close,
            Ok(read) => read,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Next::Wait,
            Err(_) => return Next::Close,
        };
        self.last_active = now;
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
                (self.path, self.head_only) = (ProbePath::of(&request), request.head_only);
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

    /// Starts to send an answer.
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
                    self.last_active = now;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Next::Wait,
                Err(_) => return Next::Close,
            }
        }
        // Closing with unread input would reset the connection, and the peer could lose the answer. So the peer closes first.
        self.stream.finish_writing();
        self.stage = ProbeStage::Lingering { discarded: 0 };
        Next::Wait
    }

    /// Registers the readiness that the current stage waits for.
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

    /// Removes the registration explicitly: a copy of the descriptor in a forked child would keep it alive after a close.
    pub(super) fn unwatch(&self, poller: &Poller) {
        if self.watched.is_some() {
            let _ = poller.remove(&self.stream);
        }
    }
}
