//! The handle of a pool of warm workers.

use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::order::{EngineOrder, Line, PoolOrder};
use crate::error::{Error, Result};
use crate::published::{CallerFds, Wake};
use crate::sys::spawn::Command;
use crate::warm::{ImportedFiles, WarmProgress, WarmSpec, WarmState};

/// A zygote and its parked children. They end when this is dropped.
#[derive(Debug)]
pub struct WarmPool {
    line: Arc<Line>,
    id: u64,
    shared: Arc<WarmProgress>,
}

impl WarmPool {
    pub(super) fn open(line: &Arc<Line>, spec: WarmSpec) -> Result<Self> {
        let spec = Box::new(spec);
        let (id, shared) = line.ask(|reply| EngineOrder::Pool(PoolOrder::Open { spec, reply }))??;
        Ok(Self { line: Arc::clone(line), id, shared })
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// The current state.
    pub fn state(&self) -> Result<WarmState> {
        self.line.check_owner()?;
        Ok(self.shared.state.read(WarmState::clone))
    }

    /// A counter that grows with every change of the state.
    pub fn generation(&self) -> Result<u64> {
        self.line.check_owner()?;
        Ok(self.shared.state.generation())
    }

    /// Blocks until the generation exceeds `generation`, `timeout` has passed (`None`: no limit), or one of `others` is readable.
    pub fn wait(&self, generation: u64, timeout: Option<Duration>, others: CallerFds<'_>) -> Result<Wake> {
        self.line.check_owner()?;
        self.shared.state.wait(generation, timeout, others, |_| Ok(()))
    }

    /// The path of an imported file that has changed since its import; `None` if there is none.
    pub fn find_changed(&self) -> Result<Option<PathBuf>> {
        self.line.check_owner()?;
        let changed = self.shared.imported.get().map_or(Ok(None), ImportedFiles::find_changed);
        changed.map_err(|source| Error::os("check", "the imported files", source))
    }

    /// Changes the number of parked children.
    ///
    /// Missing ones are forked now, or with `delayed` a little later: workers that were just released start undisturbed.
    pub fn resize(&self, children: usize, delayed: bool) -> Result<()> {
        self.line.send(EngineOrder::Pool(PoolOrder::Resize { id: self.id, children, delayed }))
    }

    /// Turns a parked child into a process that the program supervises and reaps. Returns its pid; `None` if no child is parked.
    ///
    /// The process gets further descriptors with the given numbers, which stay open on exec. The program lets the engine observe it.
    pub fn release(&self, command: Command, fds: Vec<(RawFd, OwnedFd)>) -> Result<Option<i32>> {
        let (id, command) = (self.id, Box::new(command));
        self.line.ask(|reply| EngineOrder::Pool(PoolOrder::Release { id, command, fds, reply }))
    }

    /// Kills the zygote and the parked children. `false` if they have not ended within `timeout`. Idempotent.
    pub fn close(&self, timeout: Duration) -> Result<bool> {
        let id = self.id;
        Ok(self
            .line
            .ask_within(timeout, |reply| EngineOrder::Pool(PoolOrder::Close { id, reply: Some(reply) }))?
            .is_some())
    }
}

impl Drop for WarmPool {
    fn drop(&mut self) {
        let _ = self.line.send(EngineOrder::Pool(PoolOrder::Close { id: self.id, reply: None }));
    }
}
