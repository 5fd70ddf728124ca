//! The state of a pool of warm workers: published by the engine thread, read and awaited by its handle.

use std::sync::OnceLock;
use std::time::Duration;

use super::imported::ImportedFiles;
use crate::published::Published;
use crate::sys::spawn::Command;
use crate::vocabulary::named_values;

named_values! {
    /// The state of a pool of warm workers.
    WarmPhase, "phase of a pool of warm workers":
    /// The zygote imports the modules.
    Importing = "importing",
    /// The zygote forks children on demand.
    Ready = "ready",
    /// The zygote has ended. Parked children remain usable.
    Lost = "lost",
    /// The zygote cannot serve, nor could a new one. Parked children remain usable.
    Refused = "refused",
}

/// The published state of a pool.
#[derive(Clone, Debug)]
pub struct WarmState {
    /// The phase.
    pub phase: WarmPhase,
    /// The reason of [`WarmPhase::Lost`] or [`WarmPhase::Refused`].
    pub reason: String,
    /// Why the zygote could not fork the last missing child; empty if it could.
    pub shortage: String,
    /// Process id of the zygote.
    pub zygote: i32,
    /// Number of children that wait for a release.
    pub parked: usize,
    /// Number of children that were released.
    pub released: u64,
    /// Time from the start of the zygote until it was ready.
    pub ready_after: Option<Duration>,
}

/// The specification of a pool.
pub struct WarmSpec {
    /// The zygote. Its standard input becomes the channel.
    pub command: Command,
    /// The first message to the zygote.
    pub configuration: Vec<u8>,
    /// Number of children to keep parked.
    pub children: usize,
    /// The zygote is killed if it is not ready in this time.
    pub timeout: Duration,
}

/// State that the engine thread and the handle of a pool share.
#[derive(Debug)]
pub(crate) struct WarmProgress {
    pub(crate) state: Published<WarmState>,
    pub(crate) imported: OnceLock<ImportedFiles>,
}
