//! The supervision engine of ferroelastic: it starts workers, detects their exits immediately and leaves no process behind.
//!
//! Modules, from the bottom up. Imports go up only.
//!
//! - [`sys`]: safe wrappers over the kernel. The only place for `unsafe` and raw system calls.
//! - `owner`: the check that refuses the use of an object in a forked child.
//! - [`vocabulary`]: enumerations whose names are visible outside the crate.
//! - [`text`]: escapes untrusted text before it is displayed.
//! - `thread`: the native threads and their handles.
//! - [`supervise`]: decisions about a group of workers. Its state machines take time and events as arguments and return actions.
//! - [`health`]: answers health probes about the agent and its workers.
//! - [`watchdog`]: deadlines that workers set through a named pipe.
//! - [`warm`]: workers that were forked in advance from an interpreter with its modules imported.
//! - [`logs`]: copies growing log files to the console as whole, prefixed lines.
//! - [`store`]: a key-value store for clients of torch's `TCPStore`.
//! - [`rendezvous`]: decisions about rounds and membership.
//! - [`engine`]: the thread that supervises processes.
//! - [`host`]: the thread of the node that hosts a job: store and rendezvous at one port.
//! - [`membership`]: the thread that connects an agent to the host.
//!
//! The crate does not depend on Python, reads no environment variable, installs no signal handler and has no global state.

pub mod engine;
pub mod error;
pub mod health;
pub mod host;
pub mod logs;
pub mod membership;
mod owner;
pub mod published;
pub mod rendezvous;
pub mod store;
pub mod supervise;
pub mod sys;
pub mod text;
mod thread;
pub mod vocabulary;
pub mod warm;
pub mod watchdog;

pub use engine::{Engine, Group};
pub use error::{Error, Result, SpawnError};
pub use owner::Owner;
