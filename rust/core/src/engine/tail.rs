//! The handle of a tail.

use std::sync::Arc;
use std::time::Duration;

use super::order::{EngineOrder, Line};
use crate::error::Result;
use crate::logs::{TailReport, TailSpec};

/// Follows log files until it is finished or dropped.
#[derive(Debug)]
pub struct Tail {
    line: Arc<Line>,
    id: u64,
}

impl Tail {
    pub(super) fn open(line: &Arc<Line>, spec: TailSpec) -> Result<Self> {
        let id = line.ask(|reply| EngineOrder::Tail { spec, reply })??;
        Ok(Self { line: Arc::clone(line), id })
    }

    /// Copies the rest of the files and ends the tail. Gives up when the console has accepted no bytes for `timeout`.
    ///
    /// Idempotent: further calls, also from other threads, return the same report.
    pub fn finish(&self, timeout: Duration) -> Result<TailReport> {
        let tail = self.id;
        self.line.ask(|reply| EngineOrder::FinishTail { tail, timeout, reply })
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        let _ = self.line.send(EngineOrder::DropTail { tail: self.id });
    }
}
