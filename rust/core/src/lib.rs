//! The supervision engine of ferroelastic: start workers, know at once when one is gone, leave nothing behind.
//!
//! Bird's eye view:
//!
//! - [`sys`] is the only place for `unsafe` and raw system calls: small safe wrappers over the kernel.
//! - [`supervise`] decides. Its state machines take time and events as arguments and return actions.
//! - [`health`] answers probes: is the agent alive, do its workers run, and figures of both.
//! - [`store`] is a key-value store for stock clients of torch's `TCPStore`, on a thread of its own, and [`rendezvous`] lets agents meet at its port.
//! - [`logs`] turns growing files into whole, prefixed console lines.
//! - [`text`] makes what others have written fit to be shown.
//! - [`engine`] is the one thread that owns the descriptors, feeds the decisions and carries out their actions.
//!
//! The crate knows no Python, reads no environment variable, installs no signal handler and has no global state.

pub mod engine;
pub mod error;
pub mod health;
pub mod logs;
pub mod published;
pub mod rendezvous;
pub mod store;
pub mod supervise;
pub mod sys;
pub mod text;
pub mod watchdog;

pub use engine::{Engine, Group, Tail};
pub use error::{Error, Result, SpawnError};
