//! How a worker ended.

use crate::sys::clock::Moment;
use crate::sys::wait::{ExitStatus, Usage};

/// How one worker of a group ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Position of the worker in its group.
    pub index: usize,
    /// Its process id.
    pub pid: i32,
    /// Position among the exits of the group, set by the group: 0 is the first that the kernel reported.
    pub order: usize,
    /// Exit code or signal.
    pub status: ExitStatus,
    /// The kernel's accounting.
    pub usage: Usage,
    /// The stop of the group may have caused the exit, because it had signalled this worker. Set by the group.
    pub stopped: bool,
    /// When it was noticed.
    pub at: Moment,
}

impl Exit {
    /// An exit that the kernel has reported.
    #[must_use]
    pub fn new(index: usize, pid: i32, status: ExitStatus, usage: Usage, at: Moment) -> Self {
        Self { index, pid, order: 0, status, usage, stopped: false, at }
    }
}
