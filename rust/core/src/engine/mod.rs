//! The one thread that owns the descriptors, and the handles through which others speak to it.
//!
//! The thread (`ferro-sup`) waits in a poller and is woken, never polling. It feeds what happened to the decisions in
//! [`crate::supervise`] and carries out their actions. Handles send requests and read what the thread publishes; no lock is ever
//! held across a wait.

mod event_loop;
mod guard;
mod handle;
mod health;
mod orphans;
mod processes;
mod request;
mod view;
mod watchdog;

pub use handle::{Engine, Group, Tail};
pub use health::HealthServer;
pub use view::{Leftover, StopReport, Survivor};
pub use watchdog::Watchdog;
