//! The thread that owns the descriptors of supervised processes, and its handles.
//!
//! The thread (`ferro-sup`) blocks in epoll until an event or a deadline. It feeds events to the state machines in [`crate::supervise`] and
//! carries out their actions. Handles send orders and read the progress that the thread publishes. No lock is held across a wait.
//!
//! Imports go one way: `handle` -> `event_loop`, `group`, `watchdog` and `health` -> `order` -> `progress`.

mod event_loop;
mod figures;
mod group;
mod guard;
mod handle;
mod health;
mod log_rules;
mod notice;
mod order;
mod orphans;
mod pool;
mod pools;
mod processes;
mod progress;
mod rotation;
mod warm;
mod warnings;
mod watchdog;

pub use group::Group;
pub use handle::Engine;
pub use health::HealthServer;
pub use progress::{Leftover, LogFailure, StopReport, Survivor};
pub use rotation::LogRotation;
pub use warm::WarmPool;
pub use watchdog::Watchdog;
