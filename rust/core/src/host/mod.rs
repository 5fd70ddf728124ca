//! The node that hosts a job: one port for the key-value store of the workers and for the rendezvous of the agents.
//!
//! [`StoreServer`] is the handle of the thread. The thread owns the sockets, hands requests of workers to [`crate::store::state`] and
//! messages of agents to [`crate::rendezvous::rounds`], and carries out their actions.

mod accept;
mod agents;
mod connection;
mod frames;
mod meeting;
mod thread;
pub mod torchrun_peer;

pub use thread::StoreServer;
