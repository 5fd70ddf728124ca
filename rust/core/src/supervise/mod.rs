//! The decisions: how a group of workers is stopped and what its exits mean. No clock, no process, no descriptor in here.

mod exit;
mod group;
mod teardown;

pub use exit::Exit;
pub use group::{GroupEvent, GroupState};
pub use teardown::{GroupAction, StopPlan, Stopped};
