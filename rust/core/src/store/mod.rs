//! A key-value store that stock clients of torch's `TCPStore` can use.
//!
//! [`wire`] cuts a connection's stream into requests, [`state`] says what each does, [`server`] is the thread that owns the
//! sockets. At the same port agents find the rendezvous.

mod agents;
pub mod client;
mod connection;
mod door;
pub mod server;
pub mod state;
mod talk;
pub mod wire;

pub use client::StoreClient;
pub use server::StoreServer;
