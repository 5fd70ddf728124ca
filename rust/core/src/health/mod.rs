//! Health checks: is the agent alive, do its workers run, what is it doing, and figures of it.
//!
//! [`liveness`] is the rule, [`http`] the protocol, [`status`] the board in the words of [`vocabulary`], [`metrics`] the figures: all
//! of them pure. The server lives on the engine thread, so that a probe is answered while Python is busy or stuck.

mod connection;
mod desk;
pub mod http;
pub mod liveness;
pub mod metrics;
mod server;
pub mod status;
pub mod vocabulary;

pub(crate) use desk::Desk;
pub(crate) use server::{Servers, Tokens};
