//! The handle of a relay.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::log_thread::{LogOrder, LogThread};
use super::relay::{RelayReport, RelayState, SharedLast, WorkerEnds, open_stream};
use crate::error::{Error, Result};
use crate::sys::console::Console;
use crate::sys::spawn::Command;

/// Time for the thread to reply after the timeout of a finish. The thread may be blocked in a write to a disk that hangs, or the console
/// may be slow.
const REPLY_MARGIN: Duration = Duration::from_secs(2);

/// Copies the streams of workers to the agent's console and keeps the last bytes of each.
///
/// A worker has a terminal if the console is one, otherwise a pipe. Bytes are copied unchanged and at once. A full console blocks only the
/// workers that write to it.
#[derive(Debug)]
pub struct Relay {
    thread: Arc<LogThread>,
    id: u64,
    is_terminal: bool,
    worker_ends: WorkerEnds,
    last: Vec<SharedLast>,
}

impl Relay {
    pub(crate) fn open(
        thread: &Arc<LogThread>,
        console: BorrowedFd<'_>,
        streams: usize,
        successor: Option<Command>,
    ) -> Result<Self> {
        thread.line.check_owner()?;
        let is_terminal = rustix::termios::isatty(console);
        let console = Console::new(console).map_err(|source| Error::os("open", "the console", source))?;
        let (mut sources, mut worker_ends, mut last) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..streams {
            let object = if is_terminal { "a pseudo-terminal" } else { "a pipe" };
            let (source, worker_end) = open_stream(is_terminal).map_err(|error| Error::os("open", object, error))?;
            let kept = SharedLast::default();
            sources.push((source, Arc::clone(&kept)));
            worker_ends.push(Arc::new(worker_end));
            last.push(kept);
        }
        let id = thread.next_id();
        let worker_ends: WorkerEnds = Arc::new(Mutex::new(worker_ends));
        let relay = RelayState::new(id, console, is_terminal, sources, Arc::clone(&worker_ends), successor);
        let relay = Box::new(relay);
        thread.line.send(LogOrder::Relay { id, relay })?;
        Ok(Self { thread: Arc::clone(thread), id, is_terminal, worker_ends, last })
    }

    /// Whether the workers' streams are terminals.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        self.is_terminal
    }

    /// The worker's end of a stream. `None` after [`Relay::finish`], or if there is no stream of this index.
    pub fn worker_end(&self, index: usize) -> Result<Option<Arc<OwnedFd>>> {
        // In a forked child, a lock may be held by a thread that does not exist there.
        self.thread.line.check_owner()?;
        Ok(self.worker_ends.lock().unwrap_or_else(PoisonError::into_inner).get(index).cloned())
    }

    /// The last bytes of a stream that were read, at most [`KEPT`](super::KEPT).
    pub fn last(&self, index: usize) -> Result<Vec<u8>> {
        self.thread.line.check_owner()?;
        let kept = self.last.get(index);
        Ok(kept.map_or_else(Vec::new, |kept| kept.lock().unwrap_or_else(PoisonError::into_inner).get().to_vec()))
    }

    /// Copies the bytes that the workers have written, unless the console is full. Waits for at most `timeout`.
    pub fn flush(&self, timeout: Duration) -> Result<()> {
        let id = self.id;
        self.thread.line.ask_within(timeout, |reply| LogOrder::FlushRelay { id, reply }).map(drop)
    }

    /// Copies the rest of the streams. Call this when the workers have ended. Gives up when the console has accepted no bytes for
    /// `timeout`.
    ///
    /// Processes that have left their workers may write further. Their bytes are copied until they close the stream: by the thread, and
    /// after the end of the engine by the successor. A further call may return an empty report.
    pub fn finish(&self, timeout: Duration) -> Result<RelayReport> {
        self.thread.line.check_owner()?;
        let id = self.id;
        let order = |reply| LogOrder::FinishRelay { id, timeout, reply };
        Ok(self.thread.line.ask_within(timeout + REPLY_MARGIN, order)?.unwrap_or_default())
    }
}

/// Without a [`Relay::finish`], the streams are copied until all processes have closed them.
impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.thread.line.send(LogOrder::ReleaseRelay { id: self.id });
    }
}
