//! The handles of tails and scans.

use std::sync::Arc;
use std::time::Duration;

use super::order::{EngineOrder, Line, TailOrder};
use crate::error::Result;
use crate::logs::{ScanSpec, TailReport, TailSpec};

/// Follows log files until it is finished or dropped.
#[derive(Debug)]
pub struct Tail {
    line: Arc<Line>,
    id: u64,
}

impl Tail {
    pub(super) fn open(line: &Arc<Line>, spec: TailSpec) -> Result<Self> {
        let id = line.ask(|reply| EngineOrder::Tail(TailOrder::Open { spec, reply }))??;
        Ok(Self { line: Arc::clone(line), id })
    }

    /// Copies the rest of the files and ends the tail. Gives up when the console has accepted no bytes for `timeout`.
    ///
    /// Idempotent: further calls, also from other threads, return the same report.
    pub fn finish(&self, timeout: Duration) -> Result<TailReport> {
        let tail = self.id;
        self.line.ask(|reply| EngineOrder::Tail(TailOrder::Finish { tail, timeout, reply }))
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        let _ = self.line.send(EngineOrder::Tail(TailOrder::Drop { tail: self.id }));
    }
}

/// Searches the log files of a group for lines that match rules, until it is dropped.
#[derive(Debug)]
pub struct LogScan {
    line: Arc<Line>,
    id: u64,
}

impl LogScan {
    pub(super) fn open(line: &Arc<Line>, spec: ScanSpec) -> Result<Self> {
        let id = line.ask(|reply| EngineOrder::Tail(TailOrder::OpenScan { spec, reply }))?;
        Ok(Self { line: Arc::clone(line), id })
    }

    /// Searches the rest of the files, last lines without an end included. Failures are published before the return.
    ///
    /// Returns `false` after `timeout`.
    pub fn finish(&self, timeout: Duration) -> Result<bool> {
        let scan = self.id;
        let order = |reply| EngineOrder::Tail(TailOrder::FinishScan { scan, reply });
        Ok(self.line.ask_within(timeout, order)?.is_some())
    }
}

impl Drop for LogScan {
    fn drop(&mut self) {
        let _ = self.line.send(EngineOrder::Tail(TailOrder::DropScan { scan: self.id }));
    }
}
