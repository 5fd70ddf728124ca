//! The exit of a worker.

use crate::sys::clock::Moment;
use crate::sys::wait::{ExitStatus, Usage};

/// How one worker of a group ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Position of the worker in its group.
    pub index: usize,
    /// Process id of the worker.
    pub pid: i32,
    /// Position among the exits of the group: 0 is the first that the kernel reported. Set by the group.
    pub order: usize,
    /// Exit code or signal.
    pub status: ExitStatus,
    /// Resource usage of the worker.
    pub usage: Usage,
    /// The stop of the group may have caused the exit: it had already signalled the workers. Set by the group.
    pub stopped: bool,
    /// The time at which the engine noticed the exit.
    pub at: Moment,
}

impl Exit {
    /// An exit that the kernel has reported.
    #[must_use]
    pub fn new(index: usize, pid: i32, status: ExitStatus, usage: Usage, at: Moment) -> Self {
        Self { index, pid, order: 0, status, usage, stopped: false, at }
    }
}
