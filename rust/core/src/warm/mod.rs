//! Warm workers: processes that were forked from an interpreter with its modules imported, and wait for their command.
//!
//! One *zygote* per node imports the modules. It forks *children*, which become siblings of the zygote: the agent is their parent. A child
//! *parks*: it waits at a channel. The agent *releases* it with a command, and it becomes a worker.
//!
//! - [`wire`]: the messages between the agent, the zygote and its children.
//! - [`zygote`]: the calls of the zygote and of its children.
//! - [`imported`]: the imported files, to detect that one has changed.

mod imported;
mod state;
pub mod wire;
pub mod zygote;

pub use imported::ImportedFiles;
pub(crate) use state::WarmProgress;
pub use state::{WarmPhase, WarmSpec, WarmState};
