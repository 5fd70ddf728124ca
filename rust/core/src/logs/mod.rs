//! The output of workers: copies growing log files to a console as whole, prefixed lines, and searches them for lines that match rules.
//!
//! Workers write their streams directly to files, and the thread `ferro-tee` reads these files. A training loop therefore never waits for
//! the agent or for the reader of the console, and the files are complete even if the agent is killed. The files are also the buffer: a
//! blocked console uses no memory and loses no lines. The thread `ferro-rotate` keeps the files within their limits.
//!
//! A stream that is not redirected passes through a relay on the thread `ferro-log`. Here a blocked console blocks the worker.

mod events;
mod format;
mod last;
mod lines;
mod live;
mod log_file;
mod log_thread;
mod patterns;
mod relay;
mod relay_handle;
mod rotation;
mod rotation_thread;
mod scans;
mod tail;
mod tail_handle;
mod tails;
mod tee_thread;
mod time;

pub use last::KEPT;
pub use lines::{Formatted, LineFormat, MAX_LINE};
pub(crate) use log_file::RotatedFile;
pub(crate) use log_thread::LogThread;
pub use patterns::{LogRule, LogRules, PatternError};
pub use relay::RelayReport;
pub use relay_handle::Relay;
pub use rotation::RotationLimits;
pub(crate) use rotation_thread::{RotationOrder, start_rotation};
pub use scans::ScanFile;
pub(crate) use scans::{LogMatch, ScanSpec};
pub use tail::{TailReport, TailSpec};
pub use tail_handle::{LogScan, Tail};
pub(crate) use tee_thread::{TeeEvent, TeeThread};
