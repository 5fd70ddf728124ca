//! The handles of tails and scans.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::scans::ScanSpec;
use super::tail::{TailReport, TailSpec};
use super::tee_thread::{TeeOrder, TeeThread};
use crate::error::{Error, Result};

/// Time for the thread to reply after the timeout of a finish. The thread may wait for a disk.
const REPLY_MARGIN: Duration = Duration::from_secs(2);

/// Follows log files until it is finished or dropped.
#[derive(Debug)]
pub struct Tail {
    thread: Arc<TeeThread>,
    id: u64,
    paths: Vec<PathBuf>,
}

impl Tail {
    pub(crate) fn open(thread: &Arc<TeeThread>, spec: TailSpec) -> Result<Self> {
        let id = thread.next_id();
        let paths = spec.files.iter().map(|(path, _)| path.clone()).collect();
        thread.open("follow", |reply| TeeOrder::Open { id, spec, reply })??;
        Ok(Self { thread: Arc::clone(thread), id, paths })
    }

    /// Copies the rest of the files and ends the tail. Gives up when the console has accepted no bytes for `timeout`. Also gives up when
    /// the disk of the files has not responded for 2 s longer than `timeout`: then [`TailReport::unread`] has all files.
    ///
    /// Idempotent: further calls, also from other threads, return the same report.
    pub fn finish(&self, timeout: Duration) -> Result<TailReport> {
        let (tail, limit) = (self.id, timeout.saturating_add(REPLY_MARGIN));
        let order = |reply| TeeOrder::Finish { tail, timeout, reply };
        Ok(self.thread.ask_while_it_turns(limit, order)?.unwrap_or_else(|| {
            let reason = format!("the disk has not responded for {} s", limit.as_secs());
            let unread = self.paths.iter().map(|path| (path.clone(), reason.clone())).collect();
            TailReport { unread, ..TailReport::default() }
        }))
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        let _ = self.thread.line().send(TeeOrder::Drop { tail: self.id });
    }
}

/// Searches the log files of a group for lines that match rules, until it is dropped.
#[derive(Debug)]
pub struct LogScan {
    thread: Arc<TeeThread>,
    id: u64,
}

impl LogScan {
    pub(crate) fn open(thread: &Arc<TeeThread>, spec: ScanSpec) -> Result<Self> {
        let id = thread.next_id();
        thread.open("search", |reply| TeeOrder::OpenScan { id, spec, reply })?;
        Ok(Self { thread: Arc::clone(thread), id })
    }

    /// Searches the rest of the files, last lines without an end included. Failures are published before the return.
    ///
    /// Returns `false` after `timeout`, or if the thread that searches has failed.
    pub fn finish(&self, timeout: Duration) -> Result<bool> {
        let scan = self.id;
        let order = |reply| TeeOrder::FinishScan { scan, reply };
        match self.thread.line().ask_within(timeout, order) {
            Err(Error::Closed) => Ok(false),
            reply => Ok(reply?.is_some()),
        }
    }
}

impl Drop for LogScan {
    fn drop(&mut self) {
        let _ = self.thread.line().send(TeeOrder::DropScan { scan: self.id });
    }
}
