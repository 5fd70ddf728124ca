//! A key-value store that stock clients of torch's `TCPStore` can use.
//!
//! [`wire`] parses the stream of a connection into requests, [`state`] applies them, and [`client`] is a client. The server's thread is in
//! [`crate::host`], because a rendezvous uses the same port.

pub mod client;
pub mod state;
pub mod wire;

pub use client::StoreClient;
