//! The thread that owns the descriptors of supervised processes, and its handles.
//!
//! The thread (`ferro-sup`) waits in a poller and does not poll on its own. It feeds events to the decisions in [`crate::supervise`] and
//! carries out their actions. Handles send orders and read the progress that the thread publishes. No lock is held across a wait.
//!
//! Imports go one way: `handle` -> handles of the parts and `event_loop` -> `order` -> `progress`.

mod event_loop;
mod group;
mod guard;
mod handle;
mod health;
mod order;
mod orphans;
mod processes;
mod progress;
mod tail;
mod watchdog;

pub use group::Group;
pub use handle::Engine;
pub use health::HealthServer;
pub use progress::{Leftover, StopReport, Survivor};
pub use tail::Tail;
pub use watchdog::Watchdog;
