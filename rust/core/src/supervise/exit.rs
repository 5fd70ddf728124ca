//! How a worker ended.

use crate::sys::clock::Moment;
use crate::sys::wait::{Status, Usage};

/// How one worker of a group ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Position of the worker in its group.
    pub index: usize,
    /// Its process id.
    pub pid: i32,
    /// Rank of this exit in the group: 0 is the first the kernel reported.
    pub order: usize,
    /// Exit code or signal.
    pub status: Status,
    /// The kernel's accounting.
    pub usage: Usage,
    /// The exit came after the group's stop had signalled this worker, and that may be why.
    pub stopped: bool,
    /// When it was noticed.
    pub at: Moment,
}
