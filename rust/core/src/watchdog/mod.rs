//! Deadlines that processes set themselves: the wire format, the table of deadlines, and the server of the named pipe.
//!
//! - [`wire`] turns a line into a request; [`lines`] cuts the stream of the pipe into lines. Both face bytes from outside.
//! - [`deadlines`] decides what has expired. It is given the time.
//! - `clients` holds on to the processes that have asked, so that a signal hits the one that asked or nobody.
//! - `server` puts them together on the engine thread; `evidence` looks at hung processes from a thread of its own.

mod clients;
pub mod deadlines;
mod evidence;
pub mod lines;
mod order;
mod report;
mod server;
pub mod wire;

pub(crate) use order::Order;
pub(crate) use report::Reports;
pub use report::{Expiry, ExpiryOutcome, WatchdogCounts};
pub use server::{Config, WorkerProcess};
pub(crate) use server::{Gathered, WatchdogServer, WatchdogTokens, make_files};
