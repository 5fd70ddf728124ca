//! Health checks: is the agent alive, do its workers run, what is it doing, and figures of it.
//!
//! [`liveness`] is the rule, [`http`] the protocol, [`status`] the published state, [`metrics`] the figures: all
//! of them pure. The server lives on the engine thread, so that a probe is answered while Python is busy or stuck.

mod connection;
pub mod http;
pub mod liveness;
pub mod metrics;
mod order;
mod question;
mod server;
pub mod status;

pub(crate) use order::Order;
pub(crate) use question::ProgressQuestion;
pub(crate) use server::{HealthTokens, Servers};
