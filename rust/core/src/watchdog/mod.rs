//! Deadlines that processes set for themselves: the wire format, the table of deadlines, and the server of the named pipe.
//!
//! - [`wire`] parses a line into a request; [`lines`] splits the stream of the pipe into lines. Both handle untrusted bytes.
//! - [`deadlines`] decides which timers have expired. It is pure: the time is an argument.
//! - `clients` keeps a handle to each requesting process, so a signal reaches that process or no process.
//! - `server` combines them on the engine thread; `evidence` examines hung processes on separate threads.

mod clients;
pub mod deadlines;
mod evidence;
pub mod lines;
mod order;
mod report;
mod server;
pub mod wire;

pub(crate) use order::WatchdogOrder;
pub(crate) use report::Reports;
pub use report::{Expiry, ExpiryOutcome, WatchdogCounts};
pub use server::{Config, WorkerProcess};
pub(crate) use server::{Evidence, WatchdogServer, WatchdogTokens, create_files};
