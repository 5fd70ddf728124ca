//! The thread that reads log files (`ferro-tee`): it copies their lines to consoles and searches them. The thread may wait for a disk.
//! Supervision does not wait for the thread.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use super::events::{Events, MAX_TOKEN};
use super::log_file::RotatedFile;
use super::scans::{LogMatch, ScanSpec};
use super::tail::{TailReport, TailSpec};
use super::tails::Tails;
use crate::error::{Error, Result};
use crate::thread::{CloseOutcome, Inbox, NativeThread, Reply, Service, ThreadOrder};

const NOTIFIER: u64 = MAX_TOKEN;

/// An order to the thread.
pub(super) enum TeeOrder {
    Open { id: u64, spec: TailSpec, reply: Reply<Result<()>> },
    Finish { tail: u64, timeout: Duration, reply: Reply<TailReport> },
    Drop { tail: u64 },
    OpenScan { id: u64, spec: ScanSpec, reply: Reply<()> },
    FinishScan { scan: u64, reply: Reply<()> },
    DropScan { scan: u64 },
    Rotate { files: Vec<(PathBuf, Arc<RotatedFile>)>, reply: Reply<()> },
    EndRotation { files: Vec<PathBuf> },
    Close,
}

impl ThreadOrder for TeeOrder {
    fn close() -> Self {
        Self::Close
    }
}

/// A report of the thread to the engine.
pub(crate) enum TeeEvent {
    /// Lines that match rules. The waiters are woken when the engine has handled them.
    Found { matches: Vec<LogMatch>, waiters: Vec<Reply<()>> },
    /// The thread has failed, and reads no more.
    Failed(String),
}

/// The handle of the thread.
pub(crate) struct TeeThread {
    line: NativeThread<TeeOrder>,
    last_id: AtomicU64,
    /// Number of turns of the thread's loop. It stands still while the thread waits for a disk.
    turns: Arc<AtomicU64>,
    /// The number of turns at the last request without an answer in time, plus 1. 0 if there was none.
    stuck_at: AtomicU64,
}

impl TeeThread {
    /// Starts the thread. It calls `report` with its events.
    pub(crate) fn start(report: impl Fn(TeeEvent) + Send + 'static) -> Result<Self> {
        let turns = Arc::<AtomicU64>::default();
        let (thread_turns, report) = (Arc::clone(&turns), Box::new(report));
        let line = NativeThread::start("ferro-tee", |inbox| TeeService::new(inbox, thread_turns, report))?;
        Ok(Self { line, last_id: AtomicU64::new(0), turns, stuck_at: AtomicU64::new(0) })
    }

    /// Ends the thread. `false` if it has not ended within `timeout`.
    pub(crate) fn close(&self, timeout: Duration) -> Result<bool> {
        let ended = self.line.close(TeeOrder::Close, Some(timeout))?;
        Ok(matches!(ended, CloseOutcome::Ended(_)))
    }

    /// Registers files with a size limit: readers that are added later keep their position while the beginnings of the files are removed.
    pub(crate) fn rotate(&self, files: Vec<(PathBuf, Arc<RotatedFile>)>) -> Result<()> {
        self.open("rotate", |reply| TeeOrder::Rotate { files, reply })
    }

    /// Takes back [`TeeThread::rotate`].
    pub(crate) fn end_rotation(&self, files: Vec<PathBuf>) {
        let _ = self.line.send(TeeOrder::EndRotation { files });
    }

    pub(super) fn next_id(&self) -> u64 {
        self.last_id.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(super) fn line(&self) -> &NativeThread<TeeOrder> {
        &self.line
    }

    /// Sends an order that opens files, and waits for the reply. Fails if the thread waits for a disk.
    pub(super) fn open<T>(&self, operation: &'static str, order: impl FnOnce(Reply<T>) -> TeeOrder) -> Result<T> {
        const TIMEOUT: Duration = Duration::from_secs(10);
        self.ask_while_it_turns(TIMEOUT, order)?.ok_or_else(|| {
            let text = format!("the disk has not responded for {} s", TIMEOUT.as_secs());
            Error::os(operation, "log files", std::io::Error::new(std::io::ErrorKind::TimedOut, text))
        })
    }

    /// Sends an order and waits for the reply. Returns `None` if the thread has made no turn of its loop for `timeout`. Further calls then
    /// return `None` at once, until the thread makes a turn.
    pub(super) fn ask_while_it_turns<T>(
        &self,
        timeout: Duration,
        order: impl FnOnce(Reply<T>) -> TeeOrder,
    ) -> Result<Option<T>> {
        let (reply, answer) = sync_channel(1);
        self.line.send(order(reply))?;
        loop {
            let turns = self.turns.load(Ordering::Relaxed);
            let is_stuck = self.stuck_at.load(Ordering::Relaxed) == turns + 1;
            match answer.recv_timeout(if is_stuck { Duration::ZERO } else { timeout }) {
                Ok(answer) => return Ok(Some(answer)),
                Err(RecvTimeoutError::Disconnected) => return Err(Error::Closed),
                Err(RecvTimeoutError::Timeout) if self.turns.load(Ordering::Relaxed) == turns => {
                    self.stuck_at.store(turns + 1, Ordering::Relaxed);
                    return Ok(None);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

impl std::fmt::Debug for TeeThread {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("TeeThread").field("line", &self.line).finish_non_exhaustive()
    }
}

/// The state of the thread.
struct TeeService {
    events: Events<TeeOrder>,
    tails: Tails,
    turns: Arc<AtomicU64>,
    report: Box<dyn Fn(TeeEvent) + Send>,
    is_closing: bool,
}

impl TeeService {
    fn new(inbox: Inbox<TeeOrder>, turns: Arc<AtomicU64>, report: Box<dyn Fn(TeeEvent) + Send>) -> Result<Self> {
        let events = Events::new(inbox, "ferro-tee")?;
        Ok(Self { events, tails: Tails::new(NOTIFIER), turns, report, is_closing: false })
    }

    fn handle(&mut self, order: TeeOrder) {
        let (tails, poller) = (&mut self.tails, &self.events.poller);
        match order {
            TeeOrder::Open { id, spec, reply } => {
                let _ = reply.send(tails.add(id, &spec, poller));
            }
            TeeOrder::Finish { tail, timeout, reply } => tails.finish(tail, timeout, Instant::now(), reply),
            TeeOrder::Drop { tail } => tails.drop_tail(tail, poller),
            TeeOrder::OpenScan { id, spec, reply } => {
                tails.add_scan(id, &spec, poller);
                let _ = reply.send(());
            }
            TeeOrder::FinishScan { scan, reply } => tails.finish_scan(scan, reply),
            TeeOrder::DropScan { scan } => tails.drop_scan(scan, poller),
            TeeOrder::Rotate { files, reply } => {
                tails.rotations.extend(files);
                let _ = reply.send(());
            }
            TeeOrder::EndRotation { files } => tails.rotations.retain(|path, _| !files.contains(path)),
            TeeOrder::Close => self.is_closing = true,
        }
    }
}

impl Service for TeeService {
    type Order = TeeOrder;

    fn serve(&mut self) -> Result<()> {
        let mut ready = Vec::new();
        while !self.is_closing {
            let orders = self.events.wait(self.tails.next_tick(), self.tails.is_busy(), &mut ready)?;
            for order in orders {
                self.handle(order);
            }
            for token in ready.drain(..) {
                match token {
                    NOTIFIER => self.tails.notified(),
                    tail => self.tails.console_ready(tail, &self.events.poller),
                }
            }
            self.tails.pump(Instant::now(), &self.events.poller);
            let (matches, waiters) = self.tails.scans.take_found();
            if !matches.is_empty() || !waiters.is_empty() {
                (self.report)(TeeEvent::Found { matches, waiters });
            }
            self.turns.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn finish(&mut self, outcome: &Result<()>) {
        if let Err(error) = outcome {
            (self.report)(TeeEvent::Failed(error.to_string()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::sync::mpsc::channel;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::logs::{LogRule, LogRules, LogScan, ScanFile, Tail};
    use crate::vocabulary::LogEffect;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn a_failed_thread_is_reported_and_blocks_no_caller() {
        let (sender, failures) = channel();
        let thread = TeeThread::start(move |event| match event {
            TeeEvent::Found { matches, .. } => panic!("on purpose, after {} match", matches.len()),
            TeeEvent::Failed(error) => sender.send(error).expect("the test waits"),
        });
        let thread = Arc::new(thread.expect("started"));
        let file = memfd_create("log", MemfdFlags::CLOEXEC).expect("a file");
        rustix::io::write(&file, b"nan\n").expect("written");
        let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        let rule = LogRule { effect: LogEffect::Warn, pattern: "nan".to_owned(), reason: "why".to_owned() };
        let spec = ScanSpec {
            group: 1,
            files: vec![ScanFile { path, worker: 0, label: "stdout of rank 0".to_owned() }],
            rules: Arc::new(LogRules::compile(vec![rule]).expect("valid")),
        };
        let scan = LogScan::open(&thread, spec).expect("opened");
        let error = failures.recv_timeout(PATIENCE).expect("a report");
        assert_eq!(error, "the thread ferro-tee panicked: on purpose, after 1 match");
        assert!(!scan.finish(PATIENCE).expect("no error"));
        let console = memfd_create("console", MemfdFlags::CLOEXEC).expect("a file");
        let spec = TailSpec {
            files: Vec::new(),
            console,
            only_lines_with: Vec::new(),
            whole_lines_only: false,
            is_json: false,
        };
        assert!(matches!(Tail::open(&thread, spec), Err(Error::Closed)));
        assert!(thread.close(PATIENCE).expect("own process"));
    }
}
