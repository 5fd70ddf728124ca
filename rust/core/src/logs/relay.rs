//! One relay: the streams of workers that use the agent's console, and the last bytes of each.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PIPE_BUF, PipeFlags};

use super::last::LastBytes;
use crate::sys::console::Console;
use crate::sys::fd::discard;
use crate::sys::poller::{Interest, Poller};
use crate::sys::pty::{self, Pty};
use crate::sys::spawn::{Command, SpawnStack, spawn};
use crate::thread::Reply;

/// Requested capacity of a worker's pipe. A write takes at least one page of it, see [`pipe`].
const PIPE_SIZE: usize = 256 * 1024;
/// Bytes read from one stream before the next is served.
const BATCH: usize = 64 * 1024;
/// Upper bound of the bytes that a stream holds when its worker has ended. Further bytes come from a helper that goes on writing:
/// [`RelayFinish`] does not wait for them.
const MAX_LEFT: usize = 1 << 20;

/// Interval between checks of the window size of a terminal, and of a console that the poller refuses.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// The agent's and the worker's end of a new stream.
pub(super) fn open_stream(is_terminal: bool) -> io::Result<(OwnedFd, OwnedFd)> {
    let (agent_end, worker_end) = if is_terminal {
        let Pty { agent_end, worker_end } = Pty::open()?;
        (agent_end, worker_end)
    } else {
        pipe()?
    };
    // If the agent runs with a closed standard stream, the end could get its number. dup2 in the worker would then do nothing.
    Ok((agent_end, rustix::io::fcntl_dupfd_cloexec(&worker_end, 3)?))
}

/// Whether a process has the other end of a stream open.
fn has_writer(source: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(source, PollFlags::empty())];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut polled, Some(&at_once)).is_ok() && !polled[0].revents().contains(PollFlags::HUP)
}

/// A pipe whose reads return the bytes of one write (`O_DIRECT`). The bytes of a write then stay together on the console, as if the worker
/// wrote there itself.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let packets = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::DIRECT);
    let (reader, writer) = packets.or_else(|_| rustix::pipe::pipe_with(PipeFlags::CLOEXEC))?;
    // Fails at the user's limit. The pipe then has the default size.
    let _ = rustix::pipe::fcntl_setpipe_size(&writer, PIPE_SIZE);
    rustix::io::ioctl_fionbio(&reader, true)?;
    Ok((reader, writer))
}

/// Outcome of [`Relay::finish`](super::Relay::finish).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RelayReport {
    /// Bytes written to the console.
    pub bytes: u64,
    /// Bytes that were not written, because the console had an error or was blocked at the end.
    pub dropped_bytes: u64,
    /// The last error of the console.
    pub console_error: Option<String>,
}

/// The workers' ends of the streams of a relay. This process keeps them open until the workers have ended, so that a stream does not end
/// when a worker closes its end.
pub(super) type WorkerEnds = Arc<Mutex<Vec<Arc<OwnedFd>>>>;

/// The last bytes of a stream, shared with the handle.
pub(super) type SharedLast = Arc<Mutex<LastBytes>>;

#[derive(Debug)]
struct RelayStream {
    /// `None` after the end of the stream.
    source: Option<OwnedFd>,
    last: SharedLast,
    /// Whether the poller reports bytes of the stream.
    is_watched: bool,
    /// While the relay finishes: upper bound of the unread bytes of the worker.
    left: usize,
}

impl RelayStream {
    /// Reads once, appends the bytes to `buffer` and keeps the last ones.
    fn read(&mut self, buffer: &mut Vec<u8>) -> Read {
        let Some(source) = &self.source else { return Read::Ended };
        let length = buffer.len();
        buffer.resize(length + PIPE_BUF, 0);
        let read = rustix::io::read(source, &mut buffer[length..]);
        buffer.truncate(length + *read.as_ref().unwrap_or(&0));
        match read {
            Ok(0) => Read::Ended,
            Ok(count) => {
                self.last.lock().unwrap_or_else(PoisonError::into_inner).push(&buffer[length..]);
                Read::Bytes(count)
            }
            Err(rustix::io::Errno::AGAIN) => Read::Empty,
            Err(rustix::io::Errno::INTR) => Read::Bytes(0),
            // EIO: no process has the worker's end of the terminal open.
            Err(_) => Read::Ended,
        }
    }
}

/// Outcome of [`RelayStream::read`].
enum Read {
    Bytes(usize),
    Empty,
    Ended,
}

/// A relay that copies the rest of its streams. It gives up when the console has been blocked for `timeout`.
struct RelayFinish {
    timeout: Duration,
    deadline: Option<Instant>,
    reply: Reply<RelayReport>,
}

/// A relay on its thread.
pub(super) struct RelayState {
    id: u64,
    console: Console,
    is_terminal: bool,
    streams: Vec<RelayStream>,
    /// Bytes for the console. Streams are read when the console has taken all of them.
    pending: Vec<u8>,
    written: usize,
    /// Where `pending` is split into two writes of at most `PIPE_BUF` bytes each.
    boundary: usize,
    is_full: bool,
    /// When the window size, or a full console that the poller refuses, is checked next.
    poll_at: Option<Instant>,
    finish: Option<RelayFinish>,
    report: RelayReport,
    worker_ends: WorkerEnds,
    /// A program that copies standard input to standard error until its end.
    successor: Option<Command>,
}

impl RelayState {
    /// A relay of streams to a console. `id` is unique among the relays of a poller, which reports [`token`]s.
    pub(super) fn new(
        id: u64,
        console: Console,
        is_terminal: bool,
        sources: Vec<(OwnedFd, SharedLast)>,
        worker_ends: WorkerEnds,
        successor: Option<Command>,
    ) -> Self {
        let stream = |(source, last)| RelayStream { source: Some(source), last, is_watched: false, left: 0 };
        Self {
            id,
            console,
            is_terminal,
            streams: sources.into_iter().map(stream).collect(),
            pending: Vec::new(),
            written: 0,
            boundary: 0,
            is_full: false,
            poll_at: is_terminal.then(Instant::now),
            finish: None,
            report: RelayReport::default(),
            worker_ends,
            successor,
        }
    }

    /// Watches all streams.
    pub(super) fn watch(&mut self, poller: &Poller) {
        for (index, stream) in self.streams.iter_mut().enumerate() {
            if let Some(source) = &stream.source
                && !stream.is_watched
            {
                stream.is_watched = poller.add(source, token(self.id, index + 1), Interest::Readable).is_ok();
            }
        }
    }

    /// Handles an event: `slot` 0 is the console, the others are the streams.
    pub(super) fn handle_ready(&mut self, slot: usize, poller: &Poller) {
        if slot == 0 {
            self.console_ready(poller);
        } else if self.is_full {
            // The poller would report the bytes again and again.
            self.unwatch(slot - 1, poller);
        } else {
            self.copy(slot - 1, poller);
        }
    }

    /// Copies the rest of the streams and then replies. Gives up when the console has been blocked for `timeout`.
    pub(super) fn finish(&mut self, timeout: Duration, now: Instant, reply: Reply<RelayReport>) {
        self.close_worker_ends();
        self.streams.iter_mut().for_each(|stream| stream.left = MAX_LEFT);
        self.finish = Some(RelayFinish { timeout, deadline: now.checked_add(timeout), reply });
    }

    /// Handles deadlines, and continues to finish.
    pub(super) fn tick(&mut self, now: Instant, poller: &Poller) {
        if self.poll_at.take_if(|at| *at <= now).is_some() {
            if self.is_terminal {
                self.copy_window_size();
                self.poll_at = now.checked_add(POLL_INTERVAL);
            }
            if self.is_full {
                self.console_ready(poller);
            }
        }
        if self.finish.is_none() {
            return;
        }
        for index in 0..self.streams.len() {
            if self.streams[index].left > 0 && !self.is_full {
                let (read, has_more) = self.copy(index, poller);
                let stream = &mut self.streams[index];
                stream.left = if has_more { stream.left.saturating_sub(read) } else { 0 };
            }
        }
        let is_copied = !self.is_full && self.streams.iter().all(|stream| stream.left == 0);
        let is_late = self.finish.as_ref().and_then(|finish| finish.deadline).is_some_and(|at| at <= now);
        let is_blocked = self.is_full && is_late;
        if is_blocked {
            self.give_up();
        }
        if let Some(finish) = self.finish.take_if(|_| is_copied || is_blocked) {
            let _ = finish.reply.send(self.report.clone());
        }
    }

    /// Whether [`RelayState::tick`] has something to do now.
    pub(super) fn is_busy(&self) -> bool {
        self.finish.is_some() && !self.is_full
    }

    /// The next deadline of [`RelayState::tick`].
    pub(super) fn next_tick(&self) -> Option<Instant> {
        let finish = self.finish.as_ref().and_then(|finish| finish.deadline);
        [finish, self.poll_at].into_iter().flatten().min()
    }

    /// Whether all streams have ended. A process that has left its worker may keep one open.
    pub(super) fn is_over(&self) -> bool {
        self.finish.is_none() && self.streams.iter().all(|stream| stream.source.is_none())
    }

    /// Copies the available bytes of each stream, up to `MAX_LEFT`.
    pub(super) fn copy_all(&mut self, poller: &Poller) {
        for index in 0..self.streams.len() {
            let mut left = MAX_LEFT;
            while left > 0 && !self.is_full {
                let (read, has_more) = self.copy(index, poller);
                left = if has_more { left.saturating_sub(read) } else { 0 };
            }
        }
    }

    /// Copies the available bytes, and stops watching the console.
    pub(super) fn close(&mut self, poller: &Poller) {
        self.copy_all(poller);
        let _ = poller.remove(&self.console);
    }

    /// Closes the workers' ends in this process, those that a caller still owns included.
    pub(super) fn close_worker_ends(&self) {
        for end in self.take_worker_ends() {
            // On failure the stream ends later, with the last owner.
            let _ = discard(&end);
        }
    }

    /// Closes the workers' ends that no caller owns.
    pub(super) fn release_worker_ends(&self) {
        drop(self.take_worker_ends());
    }

    fn take_worker_ends(&self) -> Vec<Arc<OwnedFd>> {
        std::mem::take(&mut *self.worker_ends.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Starts a successor for each stream that another process holds open. Such a process has left its worker and outlives this process.
    pub(super) fn hand_over(&mut self) {
        let Some(successor) = &self.successor else { return };
        for source in self.streams.iter_mut().filter_map(|stream| stream.source.take()).filter(has_writer) {
            let _ = rustix::io::ioctl_fionbio(&source, false);
            let command = Command { stdin: Some(Arc::new(source)), outlives_agent: true, ..successor.clone() };
            // On failure, writes to the stream fail.
            let _ = spawn(&command, 0, false, None, &mut SpawnStack::new());
        }
    }

    /// Copies bytes of a stream until it is empty, the console is full, or `BATCH` is reached. Returns the number of bytes, and whether
    /// there may be more.
    fn copy(&mut self, index: usize, poller: &Poller) -> (usize, bool) {
        let mut total = 0;
        while total < BATCH && !self.is_full {
            let length = self.pending.len();
            match self.streams[index].read(&mut self.pending) {
                Read::Bytes(count) => total += count,
                Read::Empty => {
                    self.flush(poller);
                    return (total, false);
                }
                Read::Ended => {
                    self.flush(poller);
                    self.unwatch(index, poller);
                    self.streams[index].source = None;
                    return (total, false);
                }
            }
            if self.pending.len() > PIPE_BUF {
                self.boundary = length;
                self.flush(poller);
            }
        }
        self.flush(poller);
        (total, true)
    }

    /// Writes the pending bytes. If the console is full, waits for room.
    fn flush(&mut self, poller: &Poller) {
        while self.written < self.pending.len() {
            let end = if self.written < self.boundary { self.boundary } else { self.pending.len() };
            match self.console.write(&self.pending[self.written..end]) {
                Ok(count) => {
                    self.written += count;
                    self.report.bytes += count as u64;
                    if let Some(finish) = &mut self.finish {
                        finish.deadline = Instant::now().checked_add(finish.timeout);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !self.is_full {
                        self.is_full = true;
                        if poller.add(&self.console, token(self.id, 0), Interest::Writable).is_err() {
                            self.poll_at = Instant::now().checked_add(POLL_INTERVAL);
                        }
                    }
                    return;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // The reader has closed the console, or the disk is full. Workers go on.
                    self.report.dropped_bytes += (end - self.written) as u64;
                    self.report.console_error = Some(error.to_string());
                    self.written = end;
                }
            }
        }
        self.pending.clear();
        (self.written, self.boundary) = (0, 0);
    }

    fn console_ready(&mut self, poller: &Poller) {
        if std::mem::take(&mut self.is_full) {
            let _ = poller.remove(&self.console);
            self.flush(poller);
            if !self.is_full {
                self.watch(poller);
            }
        }
    }

    /// Drops the bytes that the console has not taken. The last bytes of each stream are still kept.
    fn give_up(&mut self) {
        self.report.dropped_bytes += (self.pending.len() - self.written) as u64;
        self.pending.clear();
        (self.written, self.boundary) = (0, 0);
        for stream in &mut self.streams {
            while stream.left > 0 {
                let Read::Bytes(count) = stream.read(&mut self.pending) else { break };
                self.pending.clear();
                self.report.dropped_bytes += count as u64;
                stream.left = stream.left.saturating_sub(count);
            }
            stream.left = 0;
        }
    }

    fn copy_window_size(&self) {
        for source in self.streams.iter().filter_map(|stream| stream.source.as_ref()) {
            let _ = pty::copy_size(&self.console, source);
        }
    }

    fn unwatch(&mut self, index: usize, poller: &Poller) {
        let stream = &mut self.streams[index];
        if let Some(source) = &stream.source
            && std::mem::take(&mut stream.is_watched)
        {
            let _ = poller.remove(source);
        }
    }
}

const SLOT_BITS: u32 = 16;

/// The poller token of a relay's console (`slot` 0) or stream (`slot` from 1).
fn token(id: u64, slot: usize) -> u64 {
    id << SLOT_BITS | slot as u64
}

/// The relay and the slot of a [`token`].
pub(super) fn unpack_token(token: u64) -> (u64, usize) {
    (token >> SLOT_BITS, usize::try_from(token & ((1 << SLOT_BITS) - 1)).unwrap_or(0))
}
