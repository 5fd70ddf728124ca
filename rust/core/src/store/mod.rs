//! A key-value store that is compatible with clients of torch's `TCPStore`.
//!
//! [`wire`] decodes the stream of a connection into requests, [`state`] applies them, and [`client`] is a client. The server's thread is in
//! [`crate::host`], because a rendezvous uses the same port.

pub mod client;
pub mod state;
pub mod wire;

pub use client::StoreClient;
