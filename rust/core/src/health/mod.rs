//! Health checks over HTTP: liveness of the agent, readiness of its workers, status and metrics.
//!
//! [`liveness`] decides whether the agent is alive, [`http`] parses requests, [`status`] holds the published status, and [`metrics`] encodes
//! it for Prometheus. All four are pure. The server runs on the engine thread, so it answers probes while Python is busy or stuck.

mod connection;
pub mod http;
pub mod liveness;
pub mod metrics;
mod order;
mod question;
mod server;
pub mod status;

pub(crate) use order::HealthOrder;
pub(crate) use question::ProgressQuestion;
pub(crate) use server::{HealthTokens, Servers};
