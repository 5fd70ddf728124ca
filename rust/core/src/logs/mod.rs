//! Growing log files to whole, prefixed console lines.
//!
//! Workers write their streams straight into files; the engine only reads behind them. So a training loop never waits for the agent or
//! for whoever reads the console, the files are complete even if the agent is killed, and the files are the buffer: a
//! console that takes nothing costs neither memory nor lines.

mod lines;
mod tail;
mod tails;

pub use lines::{Formatted, LineFormat, MAX_LINE};
pub use tail::{TailReport, TailSpec};
pub(crate) use tails::Tails;
