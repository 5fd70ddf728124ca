//! Decisions about a group of workers: how it is stopped and which exits are failures. This module reads no clock and uses no process or
//! descriptor.

mod exit;
mod group;
mod teardown;

pub use exit::Exit;
pub use group::{GroupEvent, GroupState};
pub use teardown::{GroupAction, StopNotice, StopPlan, Stopped};
